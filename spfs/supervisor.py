"""The lives of mounts: how one comes to be, what its process and its namespace do, how it ends, how it is taken over.

The requests and their answers are the controller's; the states and what may follow what are the registry's.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import time
from typing import Any, Callable, Dict, Optional

from spfs import jobs, requests
from spfs.errors import SpfsError, reason
from spfs.events import introduction
from spfs.jobs import Context, Outcome
from spfs.modechange import ModeChanges
from spfs.mountwork import Done, Running
from spfs.processes import open_process
from spfs.registry import Managed, Phase, State
from spfs.replacing import helper_directory, result_file
from spfs.target import Target, members
from spfs.targetpacket import unpack_target
from stubfs.errors import StubfsError

log = logging.getLogger(__name__)

_OWN_JOBS = ("examination", "take-over")
"""Jobs that nobody has asked for, and that end soon: no reason to refuse anything."""

_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_WATCH_AGAIN = 1.0  # seconds


class Supervisor(ModeChanges):
    """All work on mounts, as the controller asks for it."""

    def mount(self, request: requests.Mount, done: Done) -> None:
        managed = self.registry.add(request)
        try:
            self._claim_place(managed, request)
        except SpfsError:
            self.registry.discard(managed)
            raise
        managed.control = self._work.file(f"fs-{managed.number}.sock")
        managed.record = self._record_file(managed)
        self._events.tell(managed, "mount", introduction(managed))
        running = self._running[managed.number] = Running()
        log_file = self._log_file(managed)

        def work(context: Context) -> None:
            from spfs import filesystem

            settings = filesystem.Settings(managed.control, log_file, managed.record, self._log_options)
            filesystem.mount(context, request, settings)

        def progress(stage: str, details: Dict[str, Any], when: float) -> None:
            # Saved before the mount is attached: a manager started later can then undo what was half done.
            managed.pid, managed.start_time = details["pid"], details["start_time"]
            managed.device, managed.source = details["device"], details["source"]
            managed.identity = details["identity"]
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
            managed.source = value["source"]
            self.registry.mounted(managed, value["pid"], value["start_time"], value["device"], target.identity())
            self._save(managed)
            self._watch(managed)
            log.info("mounted %s on %s in %s mode, pid %d", managed.id, managed.mountpoint, managed.mode, managed.pid)
            done(None, {"id": managed.id, "pid": managed.pid, "device": managed.device, "control": managed.control})

        try:
            # A place for what will have to be saved when the mount is about to be attached.
            self._save_or_refuse(managed)
            self._run(managed, "mount", work, ended, progress)
        except SpfsError:
            self.registry.discard(managed)
            self._drop(managed)
            raise

    def _claim_place(self, new: Managed, request: requests.Mount) -> None:
        """SpfsError EBUSY if one of our mounts is there, or is about to be."""
        try:
            namespace = os.stat(f"/proc/{request.ns_pid or 'self'}/ns/mnt").st_ino
        except OSError:
            return  # the job finds out, and says it
        own = os.stat("/proc/self/ns/mnt").st_ino
        if request.ns_list is not None and "mnt" not in request.ns_list:
            namespace = own
        new.identity = {"mnt": namespace}  # until the job has pinned all of it
        place = os.path.normpath(request.mountpoint)
        for managed in self.registry:
            same_root = (managed.root or "/") == (request.root or "/")
            if managed is new or managed.state not in (State.STARTING, State.MOUNTED) or not same_root:
                continue
            if managed.identity.get("mnt", own) != namespace:
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

    def _record_file(self, managed: Managed) -> str:
        # The time: mounts are numbered from 1 by each manager, several of which may have one log directory.
        name = f"{managed.name}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(managed.since))}-{os.getpid()}.jsonl"
        return os.path.join(self._log_dir or self._work.path, name)

    def _forget_record(self, managed: Managed) -> None:
        self._events.forget(managed)
        try:
            os.unlink(managed.record)
        except OSError:
            pass  # nothing could be written, or somebody has taken it

    def _undo(self, managed: Managed) -> None:
        """A mount job was killed half way: take away what it may have made."""
        self._start_unmount(managed, True, _log_failure)

    def _watch(self, managed: Managed) -> None:
        running = self._running[managed.number]
        try:
            running.pidfd = open_process(managed.pid, managed.start_time)
        except ProcessLookupError:
            self._loop.soon(lambda: self._filesystem_ended(managed, None))
        except OSError as error:
            self._watch_later(managed, error, self._watch)
        else:
            self._loop.on_process_end(managed.pid, running.pidfd, lambda code: self._filesystem_ended(managed, code))
        self._watch_namespace(managed)

    def _watch_later(self, managed: Managed, error: OSError, watch: Callable[[Managed], None]) -> None:
        """Out of descriptors: that says nothing about what is to be watched."""
        log.error("mount %s: cannot watch it now: %s", managed.id, reason(error))
        self._loop.later(_WATCH_AGAIN, lambda: watch(managed) if managed.number in self._running else None)

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
        likely = [running.target.pid] if running.target.pid is not None else []
        for pid in itertools.chain(likely, members({"mnt": namespace})):
            try:
                running.member_fd = os.pidfd_open(pid)
                if os.stat(f"/proc/{pid}/ns/mnt").st_ino == namespace:
                    self._loop.watch(running.member_fd, lambda: self._watch_namespace(managed))
                    return
            except OSError as error:
                if error.errno in _SCARCE:
                    return self._watch_later(managed, error, self._watch_namespace)
                # Else it has ended meanwhile.
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

    def _idle(self, managed: Managed) -> None:
        ended = self._running[managed.number].ended is not None
        if ended and managed.state in (State.MOUNTED, State.UNMOUNTING):
            self._settle(managed)
        else:
            self.start_if_ready(managed)

    def _settle(self, managed: Managed) -> None:
        """The process has ended and no job is at work on the mount: is the mount gone with it?"""
        running = self._running[managed.number]
        if managed.state is State.UNMOUNTING:
            return self._gone(managed, managed.end or "unmounted")
        target = running.target or Target.pin()

        def work(context: Context) -> None:
            from spfs import filesystem

            filesystem.look_after_end(context, managed, target)

        def ended(outcome: Outcome) -> None:
            if outcome.error is None and outcome.value["instances"] == 0:
                replaced = self.registry.was_replaced(managed, outcome.value["by_real"])
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

    def _gone(self, managed: Managed, why: str) -> None:
        log.info("mount %s on %s is gone: %s", managed.id, managed.mountpoint, why)
        self._fail_pending(managed, f"it is gone: {why}", errno.ENOENT)
        forgotten = self.registry.gone(managed, why)
        self._save(managed)
        if forgotten is not None:
            self._work.forget(f"{forgotten.name}.json")
            if self._log_dir is None:
                self._forget_record(forgotten)
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
        names = [os.path.basename(managed.control), result_file(managed)]
        if self._log_dir is None:
            names.append(os.path.basename(self._log_file(managed)))
        self._work.forget(*names, *([] if keep_record else [f"{managed.name}.json"]))
        self._work.forget_directory(helper_directory(managed))
        if not keep_record:
            self._forget_record(managed)
        for waiter in running.waiters:
            waiter()

    def unmount(self, managed: Managed, force: bool, done: Done) -> None:
        """``done`` when the mount is off every path; its process may live on for those who still use it."""
        job = self._running[managed.number].job
        if job is None:
            return self._start_unmount(managed, force, done)
        if job.kind not in _OWN_JOBS:
            if not force or job.kind == "unmount":
                what = "an unmount" if job.kind == "unmount" else f"a {job.kind}"
                raise SpfsError(
                    f"cannot unmount {managed.id!r} on {managed.mountpoint}: {what} is running",
                    "wait for it, or abort it",
                    errno.EBUSY,
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

            filesystem.unmount(context, managed, force, target)

        def ended(outcome: Outcome) -> None:
            if outcome.error is not None:
                managed.state = before
                return done(outcome.error, {})
            data = {"id": managed.id, **outcome.value}
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

    def take_over(self) -> None:
        """Go on with what an earlier manager on this work directory left."""
        found = []
        for name, record in self._work.load():
            try:
                found.append(Managed.from_json(record))
            except (KeyError, TypeError, ValueError) as error:
                log.error("cannot take over %s: %r", self._work.file(name), error)
        for managed in sorted(found, key=lambda one: one.number):
            self.registry.adopt(managed)
            if managed.live:
                self._running[managed.number] = Running(taken_over=False)
                self._take_over(managed)

    def _take_over(self, managed: Managed) -> None:
        log.info("taking over mount %s on %s, pid %d", managed.id, managed.mountpoint, managed.pid)
        running = self._running[managed.number]
        if managed.state is State.STARTING:
            running.taken_over = True
            if managed.pid:
                return self._undo(managed)
            # It got nowhere; what its job had in hand, the job has undone.
            self.registry.discard(managed)
            return self._drop(managed)
        managed.state = State.MOUNTED
        self._events.tell(managed, "taken-over", introduction(managed))
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
        message = self._work.read(result_file(managed))
        outcome = jobs.outcome_of(message, "replace")
        self._work.forget(result_file(managed))
        begun = next((stage for stage in wanted.stages if stage["stage"] == "begun"), {})
        if not outcome.died and not outcome.cancelled:
            self._replace_ended(managed, outcome)
        else:
            self._work.forget_directory(helper_directory(managed))
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
                # One whose process has ended with its mount cannot be asked; what became of it is looked at next.
                level = logging.ERROR if running.ended is None else logging.INFO
                log.log(level, "mount %s: cannot take it over: %s", managed.id, outcome.error)
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


def _take_target(outcome: Outcome, packed: Dict[str, Any]) -> Target:
    return unpack_target(packed, [outcome.fds.steal(index) for index in range(len(outcome.fds))])


def _log_failure(error: Optional[StubfsError], data: Dict[str, Any]) -> None:
    if error is not None:
        log.error("%s", error)
