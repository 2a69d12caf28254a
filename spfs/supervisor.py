"""The manager's work on its mounts: which job or call to start when, and what follows from how it ended.

Owns what belongs to a mount while it lives: the watched process, the pinned target, the running job. The requests and
their answers are the controller's; the states and what may follow what are the registry's.
"""

from __future__ import annotations

import collections
import errno
import functools
import logging
import os
from dataclasses import dataclass, field
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Set, Tuple

from spfs import jobs, protocol
from spfs.connection import Call
from spfs.errors import SpfsError
from spfs.eventloop import EventLoop
from spfs.jobs import Context, Job, Outcome
from spfs.processes import is_frozen, open_process, start_time
from spfs.protocol import Reply
from spfs.registry import ENDED, PENDING, Managed, Phase, Registry, State
from spfs.state import WorkDirectory
from spfs.target import Target, members
from spfs.targetpacket import unpack_target
from stubfs import wire
from stubfs.errors import StubfsError

log = logging.getLogger(__name__)

MODE_TIMEOUT = 60.0  # seconds; leaving restore mode writes back the dirty pages of mapped staging files
STATUS_TIMEOUT = 1.0  # seconds for a file system to answer what is merely shown

Done = Callable[[Optional[StubfsError], Dict[str, Any]], None]
"""Told once how something ended: with an error, or with its data."""


@dataclass
class _Running:
    """What exists only while this manager runs. The descriptors are ours."""

    target: Optional[Target] = None
    pidfd: int = -1
    member_fd: int = -1  # pidfd of a process in the target's mount namespace, which keeps it alive
    job: Optional[Job] = None
    taken_over: bool = True
    mode_changes: Deque[Callable[[], None]] = field(default_factory=collections.deque)
    ended: Optional[Tuple[Optional[int]]] = None  # the file system process's exit code, once it has ended
    waiters: List[Callable[[], None]] = field(default_factory=list)


class Supervisor:
    def __init__(
        self,
        loop: EventLoop,
        work: WorkDirectory,
        log_dir: Optional[str],
        verbosity: int,
        on_change: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._work = work
        self._log_dir = log_dir
        self._verbosity = verbosity
        self._on_change = on_change
        self._jobs: Set[Job] = set()
        self._running: Dict[int, _Running] = {}
        self._stopping = False
        self.registry = Registry()

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    # Jobs and calls

    def start_job(
        self,
        kind: str,
        function: Callable[[Context], None],
        ended: Callable[[Outcome], None],
        on_progress: jobs.OnProgress = jobs.ignore_progress,
        keep: Sequence[int] = (),
        result_file: Optional[str] = None,
    ) -> Job:
        """SpfsError if no process can be made. ``ended`` is called from the loop, never from here."""
        if self._stopping:
            raise SpfsError(f"cannot do the {kind}: the manager is shutting down", "", errno.ESHUTDOWN)
        try:
            job = jobs.start(kind, function, on_progress, keep, result_file)
        except OSError as error:
            number = error.errno or errno.EAGAIN
            raise SpfsError(f"cannot do the {kind}: no new process: {error.strerror}", "", number) from error
        self._jobs.add(job)
        outcomes: List[Outcome] = []

        def read() -> None:
            if not job.read():
                self._loop.unwatch(job.sock.fileno())

        def before() -> None:
            self._loop.unwatch(job.sock.fileno())
            outcomes.append(job.finish())

        def after(code: Optional[int]) -> None:
            self._jobs.discard(job)
            with outcomes[0].fds:
                ended(outcomes[0])
            self._on_change()

        self._loop.watch(job.sock.fileno(), read)
        self._loop.on_process_end(job.pid, job.pidfd, after, before)
        return job

    def _run(
        self,
        managed: Managed,
        kind: str,
        function: Callable[[Context], None],
        ended: Callable[[Outcome], None],
        on_progress: jobs.OnProgress = jobs.ignore_progress,
        keep: Sequence[int] = (),
        result_file: Optional[str] = None,
    ) -> Job:
        """Start the one job that may be at work on ``managed``. What had to wait for its end follows by itself."""
        running = self._running[managed.number]

        def after(outcome: Outcome) -> None:
            running.job = None
            ended(outcome)
            self._job_over(managed)

        running.job = self.start_job(kind, function, after, on_progress, keep, result_file)
        return running.job

    def _job_over(self, managed: Managed) -> None:
        running = self._running.get(managed.number)
        if running is None or running.job is not None:
            return
        if running.ended is not None and managed.state in (State.MOUNTED, State.UNMOUNTING):
            self._settle(managed)  # before the waiters are woken: what they then see is the end
        else:
            self.start_if_ready(managed)
        self._wake(managed)

    def cancel_job(self, job: Job) -> None:
        job.cancel()
        self._loop.later(jobs.KILL_AFTER, lambda: job.kill() if job in self._jobs else None)

    def ask(
        self, managed: Managed, request: Dict[str, Any], done: Callable[[Reply, wire.Descriptors], None]
    ) -> None:
        """Ask a file system for something that is merely shown."""
        Call(self._loop, managed.control, request, done, STATUS_TIMEOUT)

    def _save(self, managed: Managed) -> None:
        try:
            self._work.save(managed.name, managed.to_json())
        except OSError as error:
            log.error("cannot save the state of mount %s: %s", managed.id, error)

    # Mounting

    def mount(self, request: protocol.Mount, done: Done) -> None:
        managed = self.registry.add(request)
        try:
            self._refuse_second_mount(request)
        except SpfsError:
            self.registry.discard(managed)
            raise
        managed.control = self._work.file(f"fs-{managed.number}.sock")
        running = self._running[managed.number] = _Running()
        log_file = self._log_file(managed)

        def work(context: Context) -> None:
            from spfs import filesystem

            filesystem.mount(
                context,
                filesystem.Settings(
                    id=request.id,
                    mode=request.mode,
                    mountpoint=request.mountpoint,
                    control=managed.control,
                    log=log_file,
                    ns_pid=request.ns_pid,
                    ns_list=request.ns_list,
                    root=request.root,
                    proxy_dir=request.proxy_dir,
                    options=request.options,
                    verbosity=self._verbosity,
                ),
            )

        def progress(stage: str, details: Dict[str, Any], when: float) -> None:
            # Saved before the mount is attached: a manager started later can then undo what was half done.
            managed.pid, managed.start_time = details["pid"], details["start_time"]
            managed.device, managed.identity = details["device"], details["identity"]
            self._save(managed)

        def ended(outcome: Outcome) -> None:
            if outcome.error is not None:
                log.warning("mount %s: %s", managed.id, outcome.error)
                if outcome.died and managed.pid:
                    self._undo(managed)
                else:
                    self.registry.discard(managed)
                    self._drop(managed)
                return done(outcome.error, {})
            value = outcome.value
            target = _take_target(outcome, value["target"])
            running.target = target
            self.registry.mounted(managed, value["pid"], value["start_time"], value["device"], target.identity())
            self._save(managed)
            self._watch(managed)
            log.info("mounted %s on %s in %s mode, pid %d", managed.id, managed.mountpoint, managed.mode, managed.pid)
            done(None, {"id": managed.id, "pid": managed.pid, "device": managed.device, "control": managed.control})

        try:
            self._run(managed, "mount", work, ended, progress)
        except SpfsError:
            self.registry.discard(managed)
            self._drop(managed)
            raise

    def _refuse_second_mount(self, request: protocol.Mount) -> None:
        try:
            namespace = os.stat(f"/proc/{request.ns_pid or 'self'}/ns/mnt").st_ino
        except OSError:
            return  # the job finds out, and says it
        own = os.stat("/proc/self/ns/mnt").st_ino
        if request.ns_list is not None and "mnt" not in request.ns_list:
            namespace = own
        place = os.path.normpath(request.mountpoint)
        for managed in self.registry:
            same_root = (managed.root or "/") == (request.root or "/")
            if managed.state is not State.MOUNTED or managed.identity.get("mnt", own) != namespace or not same_root:
                continue
            if managed.replacement is not None and managed.replacement.phase is Phase.DONE:
                continue  # what still serves somebody is on no path any more
            if place in (os.path.normpath(managed.attached_at), os.path.normpath(managed.mountpoint)):
                raise SpfsError(
                    f"cannot mount {request.id!r}: {request.mountpoint}: mount {managed.id!r} is there already",
                    "unmount that one, or use it",
                    errno.EBUSY,
                )

    def _log_file(self, managed: Managed) -> str:
        return os.path.join(self._log_dir or self._work.path, f"stubfs-{managed.number}.log")

    def _undo(self, managed: Managed) -> None:
        """A mount job was killed half way: take away what it may have made."""
        self._start_unmount(managed, True, _log_failure)

    # The file system process and the namespace that its mount is in

    def _watch(self, managed: Managed) -> None:
        running = self._running[managed.number]
        try:
            running.pidfd = open_process(managed.pid, managed.start_time)
        except ProcessLookupError:
            self._loop.soon(lambda: self._filesystem_ended(managed, None))
        else:
            self._loop.on_process_end(managed.pid, running.pidfd, lambda code: self._filesystem_ended(managed, code))
        self._watch_namespace(managed)

    def _watch_namespace(self, managed: Managed) -> None:
        """Our pins would keep the namespace, and with it the mount, alive for ever: drop them with its last process."""
        running = self._running.get(managed.number)
        if running is None or running.target is None or "mnt" not in running.target.namespaces:
            return
        if running.member_fd >= 0:
            self._loop.unwatch(running.member_fd)
            os.close(running.member_fd)
            running.member_fd = -1
        namespace = running.target.mount_namespace
        for pid in members({"mnt": namespace}):
            try:
                running.member_fd = os.pidfd_open(pid)
                if os.stat(f"/proc/{pid}/ns/mnt").st_ino == namespace:
                    self._loop.watch(running.member_fd, lambda: self._watch_namespace(managed))
                    return
            except OSError:
                pass  # it ended meanwhile
            if running.member_fd >= 0:
                os.close(running.member_fd)
                running.member_fd = -1
        log.info("mount %s: every process of its mount namespace has ended", managed.id)
        running.target.close()
        running.target = None

    def _filesystem_ended(self, managed: Managed, code: Optional[int]) -> None:
        running = self._running[managed.number]
        running.ended = (code,)
        if running.pidfd >= 0:
            os.close(running.pidfd)
            running.pidfd = -1
        if running.job is None and running.taken_over:
            self._settle(managed)

    def _settle(self, managed: Managed) -> None:
        """The process has ended and no job is at work on the mount: is the mount gone with it?"""
        running = self._running[managed.number]
        if managed.state is State.UNMOUNTING:
            return self._gone(managed, managed.end or "unmounted")
        target = running.target or Target.pin()

        def work(context: Context) -> None:
            from spfs import filesystem

            filesystem.count_instances(context, managed.device, target)

        def ended(outcome: Outcome) -> None:
            if outcome.error is None and outcome.value["instances"] == 0:
                replaced = managed.replacement is not None and managed.replacement.phase is Phase.DONE
                return self._gone(managed, "replaced" if replaced else "unmounted")
            (code,) = running.ended or (None,)
            how = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit code {code})"
            self.registry.failed(managed, f"its file system process {managed.pid} has ended{how}")
            log.error("mount %s on %s is dead: %s", managed.id, managed.mountpoint, managed.end)
            self._fail_pending(managed, managed.end, errno.ENOTCONN)
            self._save(managed)

        try:
            self._run(managed, "examination", work, ended, keep=target.fds())
        except SpfsError as error:
            log.error("mount %s: %s", managed.id, error)
        finally:
            if target is not running.target:
                target.close()

    def _fail_pending(self, managed: Managed, why: str, number: int) -> None:
        if managed.replacement is not None and managed.replacement.phase in PENDING:
            error = SpfsError(f"cannot replace mount {managed.id!r}: {why}", "", number)
            self.registry.replace_ended(managed, Phase.FAILED, None, error_data(error))

    def _gone(self, managed: Managed, why: str) -> None:
        log.info("mount %s on %s is gone: %s", managed.id, managed.mountpoint, why)
        self._fail_pending(managed, f"it is gone: {why}", errno.ENOENT)
        forgotten = self.registry.gone(managed, why)
        self._save(managed)
        if forgotten is not None:
            self._work.forget(f"{forgotten.name}.json")
        self._drop(managed, keep_record=True)
        self._on_change()

    def _drop(self, managed: Managed, keep_record: bool = False) -> None:
        """Give up everything that belongs to a mount that is not there (any more)."""
        running = self._running.pop(managed.number)
        for fd in (running.pidfd, running.member_fd):
            if fd >= 0:
                self._loop.unwatch(fd)
                os.close(fd)
        if running.target is not None:
            running.target.close()
        names = [os.path.basename(managed.control), _result_file(managed)]
        if self._log_dir is None:
            names.append(os.path.basename(self._log_file(managed)))
        self._work.forget(*names, *([] if keep_record else [f"{managed.name}.json"]))
        for waiter in running.waiters:
            waiter()

    def _wake(self, managed: Managed) -> None:
        running = self._running.get(managed.number)
        for waiter in list(running.waiters) if running is not None else ():
            waiter()

    # Modes

    def change_mode(self, chosen: List[Managed], request: protocol.Mode, done: Done) -> None:
        """``done`` when the change is in force everywhere."""
        for managed in chosen:
            self.registry.check_mode_change(managed)
        if request.mode != "proxy":
            return self._change_all(chosen, request.mode, -1, done)
        assert request.proxy_dir is not None
        path = request.proxy_dir

        def work(context: Context) -> None:
            from spfs import filesystem

            filesystem.open_directory(context, path, request.ns_pid)

        def ended(outcome: Outcome) -> None:
            if outcome.error is not None:
                return done(outcome.error, {})
            self._change_all(chosen, request.mode, outcome.fds.steal(0), done)

        self.start_job("mode change", work, ended)

    def _change_all(self, chosen: List[Managed], mode: str, directory: int, done: Done) -> None:
        """Takes ``directory`` over (-1: none)."""
        errors: List[StubfsError] = []
        waiting = {managed.number for managed in chosen}

        def one_done(managed: Managed, error: Optional[StubfsError]) -> None:
            waiting.discard(managed.number)
            if error is not None:
                errors.append(error)
            if not waiting:
                finish()

        def finish() -> None:
            if directory >= 0:
                os.close(directory)
            done(errors[0] if errors else None, {"mode": mode, "mounts": [managed.id for managed in chosen]})

        if not chosen:
            return finish()
        for managed in chosen:
            self._change_one(managed, mode, directory, functools.partial(one_done, managed))

    def _change_one(
        self, managed: Managed, mode: str, directory: int, done: Callable[[Optional[StubfsError]], None]
    ) -> None:
        """One after the other for each file system: the last one asked for is the one in force at the end."""
        running = self._running.get(managed.number)
        if running is None:
            return done(SpfsError(f"cannot change the mode of mount {managed.id!r}: it is gone", "", errno.ENOENT))

        def begin() -> None:
            request = {"command": "mode", "mode": mode}
            fds = [directory] if directory >= 0 else []
            Call(self._loop, managed.control, request, ended, MODE_TIMEOUT, fds)

        def ended(reply: Reply, fds: wire.Descriptors) -> None:
            error = None
            if reply.status == 0:
                if mode != managed.mode:
                    log.info("mount %s: %s mode", managed.id, mode)
                self.registry.mode_changed(managed, mode)
            else:
                why = reply.data.get("message", os.strerror(-reply.status))
                error = SpfsError(
                    f"cannot change the mode of mount {managed.id!r}: {why}", reply.data.get("hint", ""), -reply.status
                )
                log.warning("%s", error)
            running.mode_changes.popleft()
            done(error)
            if running.mode_changes:
                running.mode_changes[0]()
            else:
                self._wake(managed)
                self.start_if_ready(managed)

        running.mode_changes.append(begin)
        if len(running.mode_changes) == 1:
            begin()

    def mode_seen(self, managed: Managed, mode: str) -> None:
        """The file system says which mode it is in; somebody may have changed it by its own control socket."""
        if managed.state is State.MOUNTED and not self._running[managed.number].mode_changes:
            self.registry.mode_changed(managed, mode)
            self.start_if_ready(managed)

    # Replacing

    def ask_replace(self, request: protocol.Replace) -> Managed:
        managed = self.registry.ask_replace(request)
        self._save(managed)
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

            context.progress("begun", {"frozen_before": is_frozen(request.freeze_cgroup)})
            report = step.replace(
                step.ReplaceRequest(
                    source=request.source,
                    fstype=request.type,
                    flags=request.flags,
                    options=request.options,
                    bindmounts=request.bindmounts,
                    freeze_cgroup=request.freeze_cgroup,
                    strict=request.strict,
                    timeout=request.timeout,
                    wait_for_tracers=not wanted.released,
                ),
                step.MountedFilesystem(
                    id=managed.id,
                    control=managed.control,
                    pid=managed.pid,
                    device=managed.device,
                    mountpoint=managed.mountpoint,
                    target=target,
                ),
                context.progress,
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
                self._work.file(_result_file(managed)),
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

    def switch(self, request: protocol.Switch, done: Done) -> None:
        frozen_before = is_frozen(request.freeze_cgroup)

        def work(context: Context) -> None:
            from spfs import processswitch as step

            step_request = step.SwitchRequest(
                request.target, request.freeze_cgroup, request.source, request.device, request.ns_pid
            )
            context.deliver(step.switch(step_request, context.progress))

        def ended(outcome: Outcome) -> None:
            if outcome.died and request.freeze_cgroup is not None and not frozen_before:
                self._thaw(request.freeze_cgroup)
            done(outcome.error, outcome.value)

        self.start_job("switch", work, ended)

    def abort(self, id: Optional[str], done: Done) -> None:
        """``done`` when nothing that was aborted is at work any more."""
        aborted: List[Managed] = []
        working: Set[int] = set()
        for managed in self.registry.select(id):
            wanted = managed.replacement
            job = self._running[managed.number].job
            if wanted is not None and wanted.phase in PENDING:
                error = SpfsError(f"cannot finish the replace of {managed.id!r}: it was aborted", "", errno.ECANCELED)
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

    def _after_job(self, managed: Managed, callback: Callable[[], None]) -> None:
        """Call back once, when the job at work on the mount has ended."""

        def check() -> None:
            running = self._running.get(managed.number)
            if running is None or running.job is None:
                forget()
                callback()

        forget = self.add_waiter(managed, check)

    # Unmounting

    def unmount(self, managed: Managed, force: bool, done: Done) -> None:
        """``done`` when the mount is off every path; its process may live on for those who still use it."""
        job = self._running[managed.number].job
        if job is None:
            return self._start_unmount(managed, force, done)
        if not force or job.kind == "unmount":
            raise SpfsError(
                f"cannot unmount {managed.id!r} on {managed.mountpoint}: a {job.kind} is running", "", errno.EBUSY
            )
        self.cancel_job(job)

        def follow() -> None:
            if managed.number not in self._running:
                return done(None, {"id": managed.id, "ended": True})
            try:
                self.unmount(managed, force, done)
            except SpfsError as error:
                done(error, {})

        def soon() -> None:
            self._loop.soon(follow)  # the consequences of the job's end come first

        self._after_job(managed, soon)

    def _start_unmount(self, managed: Managed, force: bool, done: Done) -> None:
        running = self._running[managed.number]
        before = managed.state
        target = running.target or Target.pin()

        def work(context: Context) -> None:
            from spfs import filesystem

            filesystem.unmount(
                context, managed.device, managed.pid, managed.start_time, managed.control, force, target
            )

        def ended(outcome: Outcome) -> None:
            if outcome.error is not None:
                managed.state = before
                return done(outcome.error, {})
            data = {"id": managed.id, "ended": outcome.value["ended"]}
            if not outcome.value["ended"]:
                self._save(managed)
                return done(None, data)
            if running.pidfd < 0:
                self._gone(managed, "unmounted")
                return done(None, data)
            # The end of the process is about to be told to us, and is what makes the mount gone.
            self._once_gone(managed, functools.partial(done, None, data))

        try:
            self._run(managed, "unmount", work, ended, keep=target.fds())
            managed.state = State.UNMOUNTING
        except SpfsError as error:
            done(error, {})
        finally:
            if target is not running.target:
                target.close()

    def _once_gone(self, managed: Managed, callback: Callable[[], None]) -> None:
        def check() -> None:
            if not managed.live:
                forget()
                callback()

        forget = self.add_waiter(managed, check)

    def busy_with(self, managed: Managed) -> bool:
        """Is a mode change, or a replace that was asked for, still to come to its end?"""
        running = self._running.get(managed.number)
        if running is None:
            return False
        wanted = managed.replacement
        return bool(running.mode_changes) or (wanted is not None and wanted.phase not in ENDED)

    def add_waiter(self, managed: Managed, waiter: Callable[[], None]) -> Callable[[], None]:
        """``waiter`` is called whenever busy_with may have changed, until the returned function is called."""
        waiters = self._running[managed.number].waiters
        waiters.append(waiter)
        return lambda: waiters.remove(waiter) if waiter in waiters else None

    # The manager's own beginning and end

    def take_over(self) -> None:
        """Go on with what an earlier manager on this work directory left."""
        for name, record in self._work.load():
            try:
                managed = Managed.from_json(record)
            except (KeyError, TypeError, ValueError) as error:
                log.error("cannot take over %s: %r", self._work.file(name), error)
                continue
            self.registry.adopt(managed)
            if managed.live:
                self._running[managed.number] = _Running(taken_over=False)
                self._take_over(managed)

    def _take_over(self, managed: Managed) -> None:
        log.info("taking over mount %s on %s, pid %d", managed.id, managed.mountpoint, managed.pid)
        running = self._running[managed.number]
        if managed.state is State.STARTING:
            running.taken_over = True
            return self._undo(managed)
        managed.state = State.MOUNTED
        self._watch(managed)
        wanted = managed.replacement
        if wanted is not None and wanted.phase is Phase.RUNNING and wanted.job is not None:
            try:
                pidfd = open_process(wanted.job["pid"], wanted.job["start_time"])
            except ProcessLookupError:
                self._orphan_ended(managed)
            else:
                log.info("mount %s: its replace goes on in process %d", managed.id, wanted.job["pid"])

                def ended(code: Optional[int]) -> None:
                    os.close(pidfd)
                    self._orphan_ended(managed)

                self._loop.on_process_end(wanted.job["pid"], pidfd, ended)
            return
        self._pin_again(managed, None)

    def _orphan_ended(self, managed: Managed) -> None:
        """The replace job of the earlier manager has ended: by itself, with a report for us, or it was killed."""
        wanted = managed.replacement
        assert wanted is not None
        message = self._work.read(_result_file(managed))
        outcome = jobs.outcome_of(message, "replace")
        self._work.forget(_result_file(managed))
        begun = next((stage for stage in wanted.stages if stage["stage"] == "begun"), {})
        if not outcome.died and not outcome.cancelled:
            self._replace_ended(managed, outcome)
        else:
            self.registry.replace_ended(managed, Phase.WAITING, None, None)
            wanted.released = True
        thaw = wanted.request.freeze_cgroup if outcome.died and not begun.get("frozen_before") else None
        self._pin_again(managed, thaw)

    def _pin_again(self, managed: Managed, freeze_cgroup: Optional[str]) -> None:
        running = self._running[managed.number]

        def work(context: Context) -> None:
            from spfs import filesystem

            filesystem.take_over(context, managed.identity, managed.root, managed.control, freeze_cgroup)

        def ended(outcome: Outcome) -> None:
            running.taken_over = True
            if outcome.error is not None:
                log.error("mount %s: cannot take it over: %s", managed.id, outcome.error)
                return
            self.registry.mode_changed(managed, outcome.value["mode"])
            if outcome.value["target"] is not None:
                running.target = _take_target(outcome, outcome.value["target"])
                self._watch_namespace(managed)
            self._save(managed)

        try:
            self._run(managed, "take-over", work, ended)
        except SpfsError as error:
            log.error("mount %s: %s", managed.id, error)

    def stop(self) -> None:
        """Start nothing more, and end what is at work; mounts and their processes stay."""
        self._stopping = True
        for job in self._jobs:
            self.cancel_job(job)

    def close(self) -> bool:
        """After stop(), when not busy. Are there mounts that a later manager may take over?"""
        for running in self._running.values():
            for fd in (running.pidfd, running.member_fd):
                if fd >= 0:
                    os.close(fd)
            if running.target is not None:
                running.target.close()
        self._running.clear()
        return len(self.registry) > 0


def error_data(error: StubfsError) -> Dict[str, Any]:
    return {"message": error.message, "hint": error.hint, "errno": error.errno}


def _result_file(managed: Managed) -> str:
    return f"{managed.name}.result"


def _no_namespace(managed: Managed) -> SpfsError:
    return SpfsError(
        f"cannot replace mount {managed.id!r} on {managed.mountpoint}: every process of its mount namespace has ended",
        "there is nothing left to move; unmount it",
        errno.ESRCH,
    )


def _take_target(outcome: Outcome, packed: Dict[str, Any]) -> Target:
    return unpack_target(packed, [outcome.fds.steal(index) for index in range(len(outcome.fds))])


def _log_failure(error: Optional[StubfsError], data: Dict[str, Any]) -> None:
    if error is not None:
        log.error("%s", error)
