"""What /proc tells of those who make requests: which process a thread belongs to, and what it is called."""

from __future__ import annotations

import errno
import os
from typing import Dict, Tuple

_COMMAND_LINE = 500  # bytes


class ThreadGroup:
    """One live process and its threads, by its directory in /proc: never another one that gets its number later.

    ProcessLookupError if there is no such process. Owns a descriptor, which ends with the object: whoever decides
    on a request may still look at rules that have been replaced meanwhile.
    """

    __slots__ = ("_fd",)

    def __init__(self, pid: int) -> None:
        self._fd = -1
        try:
            self._fd = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def __contains__(self, tid: int) -> bool:
        try:
            # Only a thread of this very process is found there (proc_task_lookup() in fs/proc/base.c).
            os.stat(f"task/{tid}", dir_fd=self._fd)
        except OSError:
            return False
        return True


class Processes:
    """Which process each of many threads belongs to, with as few looks as can be; for one listing."""

    def __init__(self) -> None:
        self._known: Dict[int, Tuple[int, str]] = {0: (0, "")}

    def of(self, tid: int) -> Tuple[int, str]:
        """(process id, command) of a thread; (0, "") for nobody, (tid, "") for one that is gone."""
        found = self._known.get(tid)
        if found is None:
            found = self._known[tid] = self._look(tid)
        return found

    def _look(self, tid: int) -> Tuple[int, str]:
        try:
            status = _read(f"/proc/{tid}/status")
            pid = int(_field(status, b"\nTgid:\t"))
            if tid != pid:
                found = pid, os.fsdecode(_read(f"/proc/{pid}/comm")[:-1])
            else:
                found = pid, os.fsdecode(_field(b"\n" + status, b"\nName:\t"))
            if int(_field(status, b"\nThreads:\t")) > 1:
                # One listing names them all: thousands of threads that wait are often of one process.
                self._known.update((int(name), found) for name in os.listdir(f"/proc/{pid}/task"))
            return found
        except (OSError, ValueError):
            return tid, ""


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _field(status: bytes, name: bytes) -> bytes:
    start = status.index(name) + len(name)
    return status[start : status.index(b"\n", start)]


def shows_device(tid: int, device: int) -> bool:
    """Is anything of file system ``device`` (st_dev) mounted in a thread's mount namespace, as far as can be told?"""
    wanted = b" %d:%d " % (os.major(device), os.minor(device))
    try:
        with open(f"/proc/{tid}/mountinfo", "rb") as table:  # up to its root
            return any(wanted in line for line in table)
    except OSError:
        return True


def command_line(pid: int) -> str:
    """How a process was called, its beginning; "" for nobody, kernel threads, and one that is gone."""
    try:
        words = _read(f"/proc/{pid}/cmdline")[:_COMMAND_LINE]
    except OSError:
        return ""
    return os.fsdecode(words.rstrip(b"\0").replace(b"\0", b" "))
