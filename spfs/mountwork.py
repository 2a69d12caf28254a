"""What all work on mounts needs: jobs and who waits for them, the record of what belongs to a live mount, its saving.

The base of the supervisor, which is put together from here upwards: replaces, changes of mode, lives of mounts.
"""

from __future__ import annotations

import collections
import errno
import logging
from dataclasses import dataclass, field
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Set, Tuple

from spfs import jobs
from spfs.connection import Call
from spfs.errors import SpfsError, reason
from spfs.eventloop import EventLoop
from spfs.events import Events
from spfs.jobs import Context, Job, Outcome
from spfs.registry import Managed, Registry
from spfs.replies import Reply
from spfs.state import WorkDirectory
from spfs.target import Target
from stubfs import wire
from stubfs.errors import StubfsError

log = logging.getLogger(__name__)

STATUS_TIMEOUT = 1.0  # seconds for a file system to answer what is merely shown
LISTING_TIMEOUT = 15.0  # seconds for all that it holds: some ten microseconds each on an idle machine

_MORE_PROCESSES = "end some, or raise the limit on processes, and ask again"

Done = Callable[[Optional[StubfsError], Dict[str, Any]], None]
"""Told once how something ended: with an error, or with its data."""


@dataclass
class Running:
    """What belongs to a mount only while this manager runs. The descriptors are ours."""

    target: Optional[Target] = None
    pidfd: int = -1
    member_fd: int = -1  # pidfd of a process in the target's mount namespace, which keeps it alive
    job: Optional[Job] = None
    taken_over: bool = True
    mode_changes: Deque[Callable[[], None]] = field(default_factory=collections.deque)
    ended: Optional[Tuple[Optional[int]]] = None  # the file system process's exit code, once it has ended
    waiters: List[Callable[[], None]] = field(default_factory=list)


class MountWork:
    def __init__(
        self,
        loop: EventLoop,
        work: WorkDirectory,
        log_dir: Optional[str],
        log_options: Sequence[str],
        on_change: Callable[[], None],
        events: Events,
    ) -> None:
        self._loop = loop
        self._work = work
        self._log_dir = log_dir
        self._log_options = tuple(log_options)  # of the file systems' command lines
        self._on_change = on_change
        self._jobs: Set[Job] = set()
        self._running: Dict[int, Running] = {}
        self._stopping = False
        self._events = events
        self.registry = Registry(events.tell)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

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
            raise SpfsError(f"cannot do the {kind}: the manager is shutting down", "ask the next one", errno.ESHUTDOWN)
        try:
            job = jobs.start(kind, function, on_progress, keep, result_file)
        except OSError as error:
            number = error.errno or errno.EAGAIN
            what = f"cannot do the {kind}: no new process: {reason(error)}"
            raise SpfsError(what, _MORE_PROCESSES, number) from error
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

    def _idle(self, managed: Managed) -> None:
        """No job is at work on the mount any more: see to what waited for that."""
        raise NotImplementedError

    def _job_over(self, managed: Managed) -> None:
        running = self._running.get(managed.number)
        if running is not None and running.job is None:
            self._idle(managed)  # before the waiters are woken: what they then see is the end
            self._wake(managed)

    def cancel_job(self, job: Job) -> None:
        job.cancel()
        self._loop.later(jobs.KILL_AFTER, lambda: job.kill() if job in self._jobs else None)

    def ask(
        self, managed: Managed, request: Dict[str, Any], done: Callable[[Reply, wire.Descriptors], None]
    ) -> None:
        """Ask a file system for something that is merely shown."""
        timeout = LISTING_TIMEOUT if request["command"] == "held" else STATUS_TIMEOUT
        Call(self._loop, managed.control, request, done, timeout)

    def _save(self, managed: Managed) -> None:
        try:
            self._save_or_refuse(managed)
        except SpfsError as error:
            log.error("%s", error)

    def _save_or_refuse(self, managed: Managed) -> None:
        """For what a later manager must know, or it would be lost: SpfsError if it cannot be saved."""
        try:
            self._work.save(managed.name, managed.to_json())
        except OSError as error:
            raise SpfsError(
                f"cannot save the state of mount {managed.id!r} in {self._work.path}: {reason(error)}",
                "make room there",
                error.errno or errno.EIO,
            ) from error

    def _wake(self, managed: Managed) -> None:
        running = self._running.get(managed.number)
        for waiter in list(running.waiters) if running is not None else ():
            waiter()

    def add_waiter(self, managed: Managed, waiter: Callable[[], None]) -> Callable[[], None]:
        """``waiter`` is called whenever busy_with may have changed, until the returned function is called."""
        waiters = self._running[managed.number].waiters
        waiters.append(waiter)
        return lambda: waiters.remove(waiter) if waiter in waiters else None

    def _after_job(self, managed: Managed, callback: Callable[[], None]) -> None:
        """Call back once, when the job at work on the mount has ended."""

        def check() -> None:
            running = self._running.get(managed.number)
            if running is None or running.job is None:
                forget()
                callback()

        forget = self.add_waiter(managed, check)

    def _once_gone(self, managed: Managed, callback: Callable[[], None]) -> None:
        def check() -> None:
            if not managed.live:
                forget()
                callback()

        forget = self.add_waiter(managed, check)
