"""Brings whole processes to a stop and lets them go again: every task seized, none by a signal.

Belongs to the one thread that seizes. Whatever cannot be stopped or detached in time is let go by the kernel when
that thread ends, with what is still pending (``exit_ptrace``): ``in_own_thread`` gives the work such a thread.
"""

from __future__ import annotations

import errno
import signal
import threading
import time
from typing import Callable, Dict, List, Optional, Set, Tuple, TypeVar

from spfs.linux import procfs, ptrace
from spfs.surgery.scheduler import Bell, has_ended
from spfs.surgery.waits import Waits

T = TypeVar("T")

CANNOT_STOP = "it cannot be stopped"  # how such a problem begins
_UNINTERRUPTIBLE = 0.05  # seconds after which a task in D state (vfork(2), a hung file system) is given up


class Theatre:
    """``stops``: the stopped tasks by tid, each with (signal, event) of its stop."""

    def __init__(self, bell: Bell, waits: Waits) -> None:
        self.bell = bell
        self.waits = waits
        self._members: Dict[int, Set[int]] = {}
        self._pending: Dict[int, int] = {}  # tid -> pid: interrupted, not yet stopped
        self.stops: Dict[int, Tuple[int, int]] = {}
        self.problems: Dict[int, str] = {}  # by pid: why it could not be stopped
        self.seccomp_suspended = True

    def seize(self, pid: int) -> List[int]:
        """Seize and interrupt every task of ``pid`` that is not yet; the new ones. Does not wait."""
        members = self._members.setdefault(pid, set())
        added = []
        for tid in procfs.tasks(pid):
            if tid in members or pid in self.problems:
                continue
            if self.waits.is_starting(pid, tid):
                # PTRACE_SEIZE takes the process's cred_guard_mutex, which execve(2) keeps: it would wait with it, in a
                # blackout, for a file system that hangs.
                self._give_up(pid, f"it starts a program (task {tid}), which waits in a file system")
                break
            try:
                self._seize(tid)
                ptrace.interrupt(tid)
            except ProcessLookupError:
                continue
            except OSError as error:
                if not has_ended(tid):
                    self._give_up(pid, _who_traces(tid) or f"cannot be traced: {error.strerror}")
                continue
            members.add(tid)
            self._pending[tid] = pid
            added.append(tid)
        return added

    def seize_more(self, pid: int) -> List[int]:
        """The same for a process all seized tasks of which stand still: none of them can have ended, so their number
        tells whether there are others."""
        return self.seize(pid) if procfs.task_count(pid) != len(self._members.get(pid, ())) else []

    def _seize(self, tid: int) -> None:
        options = ptrace.O_TRACESYSGOOD
        if self.seccomp_suspended:
            try:
                ptrace.seize(tid, options | ptrace.O_SUSPEND_SECCOMP)
                return
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EINVAL):
                    raise
        ptrace.seize(tid, options)
        self.seccomp_suspended = False  # refused: we are under seccomp ourselves, or the kernel cannot

    def wait(self, timeout: float) -> None:
        """Until every interrupted task stands still; those that do not in time become ``problems``."""
        begin = time.monotonic()
        deadline = begin + timeout
        while self._pending:
            arrived = False
            for tid, pid in list(self._pending.items()):
                stop = ptrace.poll_stop(tid)
                if stop is None:
                    continue
                arrived = True
                if stop[1] != ptrace.EVENT_STOP:
                    # A signal that was on its way when we came: delivered as if we were not here.
                    ptrace.cont(tid, stop[0])
                    continue
                self.stops[tid] = stop
                self._pending.pop(tid, None)
            if arrived or self.bell.wait((), deadline):
                continue
            now = time.monotonic()
            for tid, pid in list(self._pending.items()):
                state = task_state(tid)
                if state in ("", "Z", "X"):
                    self._pending.pop(tid, None)
                    self._members.get(pid, set()).discard(tid)
                elif now > deadline or state == "D" and now > begin + _UNINTERRUPTIBLE:
                    self._give_up(pid, f"{CANNOT_STOP} (task {tid}): {_where(tid)}")

    def _give_up(self, pid: int, why: str) -> None:
        self.problems[pid] = why
        for tid in self._members.get(pid, set()):
            if tid in self.stops:
                self._detach(tid)
            self._pending.pop(tid, None)

    def _detach(self, tid: int) -> None:
        self.stops.pop(tid, None)
        try:
            self.waits.resume(tid)
            ptrace.detach(tid)
        except ProcessLookupError:
            pass  # killed meanwhile

    def release(self) -> None:
        """Detach everything that stands still."""
        for tid in list(self.stops):
            self._detach(tid)
        self._members.clear()

    def stopped(self) -> List[int]:
        """The processes that stand still."""
        return [pid for pid in self._members if self.is_stopped(pid)]

    def tasks(self, pid: int) -> Set[int]:
        """Those of a process that stands still; empty if it does not."""
        return self._members[pid] if self.is_stopped(pid) else set()

    def is_stopped(self, pid: int) -> bool:
        return bool(self._members.get(pid)) and pid not in self.problems


def task_state(tid: int) -> str:
    """The letter of /proc/TID/stat; "" if there is no such task."""
    try:
        return procfs.parse_stat(procfs.read(f"/proc/{tid}/stat")).state
    except (FileNotFoundError, ProcessLookupError):
        return ""


def in_group_stop(pid: int) -> bool:
    """Whether a frozen process was stopped by a signal before; its state in /proc only says that it is frozen."""
    return _wchan(pid) == "do_signal_stop"


def _wchan(tid: int) -> str:
    try:
        return procfs.read(f"/proc/{tid}/wchan").decode(errors="replace")
    except OSError:
        return ""


def _where(tid: int) -> str:
    function = _wchan(tid)
    return f"it waits in the kernel ({function})" if function not in ("", "0") else "it does not react"


def _who_traces(tid: int) -> Optional[str]:
    try:
        tracer = procfs.parse_status(procfs.read(f"/proc/{tid}/status")).tracer
        if not tracer:
            return None
        command = procfs.parse_stat(procfs.read(f"/proc/{tracer}/stat")).command
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None
    return f"is traced by process {tracer} ({command})"


def in_own_thread(work: Callable[[threading.Event], T]) -> T:
    """Run ``work`` in a thread of its own with SIGCHLD blocked here and there, and return or raise what it does.

    ``work`` gets an event that is set when this thread is told to give up (KeyboardInterrupt, a signal handler that
    raises): that exception is raised here only when the work has ended, so that nothing is left half done. If the
    work could be done all the same, it came too late and is dropped: what was done must not be reported as given up.
    """
    outcome: List[T] = []
    failure: List[BaseException] = []
    cancelled, done = threading.Event(), threading.Event()

    def body() -> None:
        try:
            outcome.append(work(cancelled))
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    interruption: Optional[BaseException] = None
    try:
        thread = threading.Thread(target=body, name="surgery")
        thread.start()
        # Not by join(): what interrupts that one makes a thread that still works pass for ended (Python 3.10 to 3.12).
        while not done.is_set():
            try:
                done.wait()
            except BaseException as error:
                interruption = error
                cancelled.set()
        thread.join()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if interruption is not None and not outcome:
        raise interruption
    if failure:
        raise failure[0]
    return outcome[0]
