"""A process that gives a frozen cgroup back when the one who froze it is killed; nobody else may be left to do it."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import Iterator, NoReturn

from spfs.freezer import Freezer

_ARM, _DISARM = b"+", b"-"


class FreezeGuard:
    """Forked at once, so make it early: right after a fork, pages are slow to write to. Nothing without a cgroup."""

    def __init__(self, freezer: Freezer) -> None:
        self._pid = self._told = -1
        if freezer.path is None:
            return
        freezer.remember()
        hears, self._told = os.pipe()
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _guard(freezer, hears)
        except OSError:
            os.close(self._told)
            raise
        finally:
            os.close(hears)

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Should we die within the block, the cgroup becomes what it was when this object was made."""
        self._tell(_ARM)
        try:
            yield
        finally:
            self._tell(_DISARM)

    def _tell(self, what: bytes) -> None:
        if self._pid > 0:
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
            self._pid = self._told = -1


def _guard(freezer: Freezer, hears: int) -> NoReturn:
    """The whole life of the child."""
    try:
        os.setsid()  # who kills a job kills its session
        os.chdir("/")  # ours may be on the mount that is left
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.dup2(hears, 0)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        last = _DISARM
        while True:
            told = os.read(0, 64)
            if not told:
                break
            last = told[-1:]
        if last == _ARM:
            freezer.restore()
    finally:
        os._exit(0)
