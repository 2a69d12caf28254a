"""One surgery at a time on a machine: who looks at processes, or has stopped them, has the turn.

Else each would find the other's tracer, its freeze and its copies of descriptors, and take them for the processes' own.
Locks on an object that everybody has in common, in whatever mount, network and pid namespaces: flock(2) is the turn;
who is a surgeon is told by a lock for reading (fcntl(2)), which /proc/locks shows with its process.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct
import time
from contextlib import contextmanager
from typing import Callable, Container, Iterator, List, Optional, Set

from spfs.errors import SpfsError
from spfs.linux import mountapi, procfs
from spfs.linux.mountapi import FsConfig

LIMIT = 60.0
"""Seconds to wait for the others, whose blackouts end after 30 in any case (``spfs.blackoutguard``)."""

_POLL = 0.002  # seconds
_FOR_READING = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)  # struct flock


class Turn:
    """Kept by one who does surgery, from before the first copy of anything until the last one is closed; one at a time
    in a process.

    Children inherit the turn: it ends when it is given back, or when all who have its descriptor have ended.
    """

    def __init__(self) -> None:
        self._fd = _open()
        fcntl.fcntl(self._fd, fcntl.F_SETLK, _FOR_READING)  # of this process alone, until it closes such a descriptor

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextmanager
    def taken(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Nobody else's surgery goes on within. SpfsError EBUSY, with who it is, if that one does not come to an end;
        ECANCELED when ``given_up`` says so."""
        deadline = time.monotonic() + LIMIT
        while not self._try():
            if given_up():
                raise SpfsError("cannot examine processes: told to give up", errno=errno.ECANCELED)
            if time.monotonic() > deadline:
                raise SpfsError(
                    f"cannot examine processes: {_holder(self._fd)} has been at it for more than {LIMIT:g} s",
                    "one replace or switch at a time; end that one, or ask again later",
                    errno.EBUSY,
                )
            time.sleep(_POLL)  # flock(2) knows no time limit
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def others() -> Container[int]:
    """The processes of other surgeons as they are now: what these hold are copies."""
    there = _debugfs_root()
    if there is None:
        return ()  # they cannot be told from others who have a lock where anybody can
    return _Surgeons({pid for pid in _lockers(there, b"POSIX") if pid not in (0, os.getpid())})


class _Surgeons:
    """These processes, and their children, which can have inherited what they hold."""

    def __init__(self, pids: Set[int]) -> None:
        self._pids = pids

    def __contains__(self, pid: object) -> bool:
        if not self._pids or pid in self._pids:
            return pid in self._pids
        try:
            return procfs.parse_stat(procfs.read(f"/proc/{pid}/stat")).parent in self._pids
        except (FileNotFoundError, ProcessLookupError):
            return False


def _debugfs() -> int:
    """Its root, O_PATH. There is one, not one per namespace, and only root of the machine can open it (mode 0700):
    nobody else can keep us from working. The mount is attached nowhere, and goes with the descriptor."""
    context = mountapi.fsopen("debugfs")
    try:
        mountapi.fsconfig(context, FsConfig.CMD_CREATE)
        return mountapi.fsmount(context)
    finally:
        os.close(context)


def _open() -> int:
    try:
        mounted = _debugfs()
    except OSError:
        # Not in this kernel, or we are root of a user namespace only, and meet none but those of our own.
        return os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mounted)
    finally:
        os.close(mounted)


@functools.lru_cache(maxsize=None)
def _debugfs_root() -> Optional[os.stat_result]:
    try:
        mounted = _debugfs()
    except OSError:
        return None
    try:
        return os.fstat(mounted)
    finally:
        os.close(mounted)  # O_PATH: no lock of this process ends with it


def _lockers(there: os.stat_result, kind: bytes) -> List[int]:
    """Who has a lock of that kind; those of pid namespaces beside and above ours are not shown."""
    lines = procfs.locks_on(procfs.read("/proc/locks"), there.st_dev).get(there.st_ino, [])
    return [int(line.split()[3]) for line in lines if line.split()[0] == kind]


def _holder(fd: int) -> str:
    """For a message: who has the turn."""
    for pid in _lockers(os.fstat(fd), b"FLOCK"):
        try:
            return f"process {pid} ({procfs.parse_stat(procfs.read(f'/proc/{pid}/stat')).command})"
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended, and a child of it has not
    return "somebody else, in another pid namespace"
