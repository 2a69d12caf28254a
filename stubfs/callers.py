"""What /proc tells of those who make requests: which process a thread belongs to, and what it is called."""

from __future__ import annotations

import errno
import os
from typing import Tuple


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


def process_of(tid: int) -> Tuple[int, str]:
    """(process id, command) of a thread; (0, "") for nobody, the tid itself for one that is gone."""
    if not tid:
        return 0, ""
    try:
        # Thousands may be asked for at once: as few steps as can be.
        fd = os.open(f"/proc/{tid}/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.read(fd, 4096)
        finally:
            os.close(fd)
        name, number = status.index(b"Name:\t") + 6, status.index(b"\nTgid:\t") + 7
        return int(status[number : status.index(b"\n", number)]), os.fsdecode(status[name : status.index(b"\n")])
    except (OSError, ValueError):
        return tid, ""
