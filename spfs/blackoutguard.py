"""A process that ends a blackout when the one who began it cannot: it was killed, or a call of it does not return.

Nobody else may be left to do it, or know of it. The stopped tasks let themselves go as soon as their tracer is dead; a
frozen cgroup does not.
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import contextmanager
from typing import Iterator, NoReturn, Sequence

from spfs.freezer import Freezer

LIMIT = 30.0
"""Seconds after which a blackout is ended by force: a call may wait for a real file system that hangs."""

_ARM, _DISARM = b"+", b"-"


class BlackoutGuard:
    """Forked at once, so make it early: right after a fork, pages are slow to write to.

    ``keep``: descriptors that stay open in it, too, until it has done its work.
    """

    def __init__(self, freezer: Freezer, keep: Sequence[int] = ()) -> None:
        self._pid = -1
        freezer.remember()
        hears, self._told = os.pipe()
        watched = os.pidfd_open(os.getpid())
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _guard(freezer, hears, watched, keep)
        except OSError:
            os.close(self._told)
            raise
        finally:
            os.close(hears)
            os.close(watched)

    @property
    def pid(self) -> int:
        """Of a process that for a moment holds all that its parent held, and is never to be stopped."""
        return self._pid

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Should we die within the block, the cgroup becomes what it was when this object was made; should it take
        longer than LIMIT, we are killed."""
        self._tell(_ARM)
        try:
            yield
        finally:
            self._tell(_DISARM)

    def _tell(self, what: bytes) -> None:
        try:
            os.write(self._told, what)
        except BrokenPipeError:  # somebody has killed it: we are no worse off than without
            pass

    def close(self) -> None:
        if self._pid > 0:
            os.close(self._told)
            try:
                os.waitpid(self._pid, 0)
            except ChildProcessError:  # somebody reaps all children
                pass
            self._pid = -1


def _guard(freezer: Freezer, hears: int, watched: int, keep: Sequence[int]) -> NoReturn:
    """The whole life of the child."""
    try:
        os.setsid()  # who kills a job kills its session
        os.chdir("/")  # ours may be on the mount that is left
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        _close_all_but(hears, watched, *keep)
        if _listen(hears, watched):
            freezer.restore()
    finally:
        os._exit(0)


def _listen(hears: int, watched: int) -> bool:
    """Until the other end is closed; was that in a blackout?"""
    poll = select.poll()
    poll.register(hears, select.POLLIN)
    end = None
    while True:
        left = None if end is None else max(0.0, end - time.monotonic())
        if not poll.poll(None if left is None else 1000 * left):
            signal.pidfd_send_signal(watched, signal.SIGKILL)
            poll.poll()  # the end of the pipe comes with its death
            return True
        told = os.read(hears, 64)
        if not told:
            return end is not None
        end = time.monotonic() + LIMIT if told.endswith(_ARM) else None


def _close_all_but(*keep: int) -> None:
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
