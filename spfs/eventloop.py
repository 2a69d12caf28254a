"""The manager's loop: readiness of descriptors, timers, signals and the ends of processes; one thread, no policy."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import signal
import socket
import time
from typing import Callable, Dict, List, Optional, Tuple

log = logging.getLogger(__name__)

Callback = Callable[[], None]

LONGEST_SLEEP = 3600.0  # seconds; epoll_wait(2) takes an int of milliseconds
_FEW_TIMERS = 64


class Timer:
    """A call in the future; cancel() is fine at any time."""

    def __init__(self, callback: Callback) -> None:
        self.callback: Optional[Callback] = callback

    def cancel(self) -> None:
        self.callback = None


class EventLoop:
    """Callbacks must not block. One that raises is a defect: it is logged, and the loop goes on."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: Dict[int, Callback] = {}
        self._timers: List[Tuple[float, int, Timer]] = []
        self._tidy_at = _FEW_TIMERS
        self._order = itertools.count()
        self._signals: Dict[int, Callback] = {}
        self._processes: Dict[int, Tuple[int, Optional[Callback], Callable[[Optional[int]], None]]] = {}
        self._stopped = False
        self._signal_read, self._signal_write = socket.socketpair()
        self._signal_read.setblocking(False)
        self._signal_write.setblocking(False)
        self.watch(self._signal_read.fileno(), self._take_signals)
        self._previous_wakeup = signal.set_wakeup_fd(self._signal_write.fileno(), warn_on_full_buffer=False)
        self.on_signal(signal.SIGCHLD, self._reap)

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        self._epoll.close()
        self._signal_read.close()
        self._signal_write.close()

    def watch(self, fd: int, callback: Callback, events: int = select.EPOLLIN) -> None:
        """Call back whenever one of ``events``, an error or a hang-up is there; replaces an earlier watch of the fd."""
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Must come before the fd is closed. Fine for one that is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def later(self, seconds: float, callback: Callback) -> Timer:
        if len(self._timers) >= self._tidy_at:
            # Those that were cancelled, for some may not be due for days.
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._tidy_at = max(_FEW_TIMERS, 2 * len(self._timers))
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def soon(self, callback: Callback) -> Timer:
        return self.later(0, callback)

    def on_signal(self, number: int, callback: Callback) -> None:
        self._signals[number] = callback
        signal.signal(number, lambda signal_number, frame: None)  # the wakeup fd tells us
        signal.siginterrupt(number, False)

    def on_process_end(
        self, pid: int, pidfd: int, ended: Callable[[Optional[int]], None], before: Optional[Callback] = None
    ) -> None:
        """Call ``ended`` once when ``pid`` has ended: with its exit code (negative: the signal), None if unknown as it
        is not our child. ``before`` is called first, while the pid and its process group are still its own.

        ``pidfd`` stays the caller's, and must not be closed earlier.
        """
        self._processes[pid] = (pidfd, before, ended)
        self.watch(pidfd, lambda: self._process_ended(pid))

    def _process_ended(self, pid: int) -> None:
        pidfd, before, ended = self._processes.pop(pid)
        self.unwatch(pidfd)
        if before is not None:
            self._guarded(before)
        try:
            _, status = os.waitpid(pid, os.WNOHANG)
            code: Optional[int] = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = None
        self._guarded(lambda: ended(code))

    def _reap(self) -> None:
        """Wait for children that nobody knows: what a job left is given to us by the kernel (child subreaper)."""
        while True:
            try:
                # Only a look: those whose end is somebody's business are waited for by him.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            if info.si_pid in self._processes:
                self._process_ended(info.si_pid)
            else:
                os.waitpid(info.si_pid, os.WNOHANG)

    def _take_signals(self) -> None:
        try:
            numbers = self._signal_read.recv(4096)
        except BlockingIOError:
            return
        for number in dict.fromkeys(numbers):
            if number in self._signals:
                self._guarded(self._signals[number])

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        """Until stop() is called."""
        while not self._stopped:
            ready = [(fd, self._watched.get(fd)) for fd, _ in self._epoll.poll(self._until_next_timer())]
            for fd, callback in ready:
                # An earlier callback of this round may have unwatched it, or given its number to another file.
                if callback is not None and self._watched.get(fd) is callback:
                    self._guarded(callback)
            self._run_timers()

    def _until_next_timer(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return min(LONGEST_SLEEP, max(0.0, self._timers[0][0] - time.monotonic())) if self._timers else LONGEST_SLEEP

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._guarded(callback)

    def _guarded(self, callback: Callback) -> None:
        try:
            callback()
        except Exception:
            log.exception("a callback of the manager failed")
