"""When replaces begin, in which process, and what follows from how they ended. The step itself: ``spfs.replace``."""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
from typing import Any, Dict, List, Optional, Set

from spfs import freezer, jobs, requests
from spfs.errors import SpfsError
from spfs.jobs import Context, Outcome
from spfs.mountwork import Done, MountWork
from spfs.processes import is_frozen, start_time
from spfs.registry import ENDED, PENDING, Managed, Phase, State
from spfs.target import Target
from stubfs.errors import StubfsError

log = logging.getLogger(__name__)


class Replaces(MountWork):
    def ask_replace(self, request: requests.Replace) -> Managed:
        former = self.registry.usable(request.id).replacement
        network: Dict[str, int] = {}
        if request.net_pid is not None:
            with Target.pin(request.net_pid, ("net",)) as target:
                network = target.identity()
        seen = request.freeze_cgroup is not None and freezer.is_there(request.freeze_cgroup)
        managed = self.registry.ask_replace(request, network, seen)
        try:
            self._save_or_refuse(managed)
        except SpfsError:
            managed.replacement = former
            raise
        self.start_if_ready(managed)
        return managed

    def begin(self, id: Optional[str], mode: str) -> List[Managed]:
        chosen = self.registry.begin(id, mode)
        for managed in chosen:
            self._save(managed)
            self.start_if_ready(managed)
        return chosen

    def start_if_ready(self, managed: Managed) -> None:
        # Soon, not now: whoever asked gets his answer before we spend time on a fork.
        self._loop.soon(lambda: self._start_replace(managed))

    def _start_replace(self, managed: Managed) -> None:
        running = self._running.get(managed.number)
        wanted = managed.replacement
        if running is None or wanted is None or not managed.ready_to_replace or self._stopping:
            return
        if running.job is not None or not running.taken_over or running.mode_changes:
            return  # tried again when that has ended
        target = running.target
        if target is None:
            self.registry.replace_ended(managed, Phase.FAILED, None, error_data(_no_namespace(managed)))
            self._save(managed)
            return self._wake(managed)
        request = wanted.request

        def work(context: Context) -> None:
            from spfs import replace as step

            cgroup = request.freeze_cgroup
            if wanted.cgroup_seen and not os.path.isdir(str(cgroup)):
                cgroup = None  # it was removed meanwhile, and can be only when nobody is in it any more
            context.progress("begun", {"frozen_before": is_frozen(cgroup)})
            network = Target.from_inodes(wanted.network) if wanted.network else None
            report = step.replace(
                dataclasses.replace(request, freeze_cgroup=cgroup),
                step.MountedFilesystem(
                    id=managed.id,
                    control=managed.control,
                    pid=managed.pid,
                    device=managed.device,
                    source=managed.source,
                    mountpoint=managed.mountpoint,
                    target=target,
                ),
                context.progress,
                wait_for_tracers=not wanted.released,
                helper_directory=self._work.file(helper_directory(managed)),
                network=network,
            )
            context.deliver(report)

        def progress(stage: str, details: Dict[str, Any], when: float) -> None:
            log.info("mount %s: replace: %s %s", managed.id, stage, details)
            self.registry.replace_progress(managed, stage, details, when)
            if stage != jobs.UNCHANGED:
                self._save(managed)

        try:
            job = self._run(
                managed,
                "replace",
                work,
                functools.partial(self._replace_ended, managed),
                progress,
                target.fds(),
                self._work.file(result_file(managed)),
            )
        except SpfsError as error:
            self.registry.replace_ended(managed, Phase.FAILED, None, error_data(error))
        else:
            self.registry.replace_started(managed, job.pid, start_time(job.pid))
        self._save(managed)

    def _replace_ended(self, managed: Managed, outcome: Outcome) -> None:
        wanted = managed.replacement
        assert wanted is not None
        begun = next((stage for stage in wanted.stages if stage["stage"] == "begun"), {})
        if outcome.died and wanted.request.freeze_cgroup is not None and not begun.get("frozen_before"):
            self._thaw(wanted.request.freeze_cgroup)
        if outcome.died:
            self._work.forget_directory(helper_directory(managed))
        if outcome.error is None:
            log.info("mount %s: replaced", managed.id)
            self.registry.replace_ended(managed, Phase.DONE, outcome.value, None)
            if outcome.value.get("ended"):
                # Nothing was left: the process has ended with its mount, which we are about to be told.
                managed.state, managed.end = State.UNMOUNTING, "replaced"
        elif outcome.cancelled and self._stopping:
            # For the next manager on this work directory.
            self.registry.replace_ended(managed, Phase.WAITING, None, None)
            wanted.released = True
        else:
            log.warning("mount %s: %s", managed.id, outcome.error)
            phase = Phase.ABORTED if outcome.cancelled else Phase.FAILED
            self.registry.replace_ended(managed, phase, None, error_data(outcome.error))
        self._save(managed)

    def _thaw(self, cgroup: str) -> None:
        def work(context: Context) -> None:
            from spfs import filesystem

            filesystem.thaw(cgroup)

        def ended(outcome: Outcome) -> None:
            if outcome.error is not None:
                log.error("cannot let go %s: %s", cgroup, outcome.error)

        try:
            self.start_job("thaw", work, ended)
        except SpfsError as error:
            log.error("cannot let go %s: %s", cgroup, error)

    def switch(self, request: requests.Switch, done: Done) -> None:
        begun: Dict[str, Any] = {}

        def work(context: Context) -> None:
            from spfs import processswitch as step

            # Not by the manager itself: who names a cgroup may name any path, also one on a file system that hangs.
            context.progress("begun", {"frozen_before": is_frozen(request.freeze_cgroup)})
            step_request = step.SwitchRequest(**dataclasses.asdict(request))
            context.deliver(step.switch(step_request, context.progress, (os.getppid(),)))

        def progress(stage: str, details: Dict[str, Any], when: float) -> None:
            if stage == "begun":
                begun.update(details)

        def ended(outcome: Outcome) -> None:
            if outcome.died and request.freeze_cgroup is not None and not begun.get("frozen_before"):
                self._thaw(request.freeze_cgroup)
            done(outcome.error, outcome.value)

        self.start_job("switch", work, ended, progress)

    def abort(self, id: Optional[str], done: Done) -> None:
        """``done`` when nothing that was aborted is at work any more."""
        aborted: List[Managed] = []
        working: Set[int] = set()
        for managed in self.registry.select(id):
            wanted = managed.replacement
            job = self._running[managed.number].job
            if wanted is not None and wanted.phase in PENDING:
                what = f"cannot finish the replace of {managed.id!r}: it was aborted"
                error = SpfsError(what, "ask for it again", errno.ECANCELED)
                self.registry.replace_ended(managed, Phase.ABORTED, None, error_data(error))
                self._save(managed)
                self._wake(managed)
            elif job is not None and job.kind in ("replace", "mount"):
                self.cancel_job(job)
                working.add(managed.number)
            elif id is not None:
                raise SpfsError(
                    f"cannot abort: mount {id!r}: nothing is pending or running for it", "see status", errno.EINVAL
                )
            else:
                continue
            aborted.append(managed)
        data = {"mounts": [managed.id for managed in aborted]}

        def one_done(managed: Managed) -> None:
            working.discard(managed.number)
            if not working:
                done(None, data)

        for managed in aborted:
            if managed.number in working:
                self._after_job(managed, functools.partial(one_done, managed))
        if not working:
            done(None, data)

    def busy_with(self, managed: Managed) -> bool:
        """Is a mode change, or a replace that was asked for, still to come to its end?"""
        running = self._running.get(managed.number)
        if running is None:
            return False
        wanted = managed.replacement
        return bool(running.mode_changes) or (wanted is not None and wanted.phase not in ENDED)

    def _fail_pending(self, managed: Managed, why: str, number: int) -> None:
        if managed.replacement is not None and managed.replacement.phase in PENDING:
            error = SpfsError(f"cannot replace mount {managed.id!r}: {why}", "", number)
            self.registry.replace_ended(managed, Phase.FAILED, None, error_data(error))


def error_data(error: StubfsError) -> Dict[str, Any]:
    return {"message": error.message, "hint": error.hint, "errno": error.errno}


def result_file(managed: Managed) -> str:
    return f"{managed.name}.result"


def helper_directory(managed: Managed) -> str:
    """For a mount helper to mount on; only there while one works, or when its job was killed."""
    return f"{managed.name}.real"


def _no_namespace(managed: Managed) -> SpfsError:
    return SpfsError(
        f"cannot replace mount {managed.id!r} on {managed.mountpoint}: every process of its mount namespace has ended",
        "there is nothing left to move; unmount it",
        errno.ESRCH,
    )
