"""Processes that are not ours to wait for: named for good, looked at without blocking."""

from __future__ import annotations

import errno
import os
import select
from typing import Optional


def start_time(pid: int) -> int:
    """When the process began, in clock ticks since boot: with the pid it names a process for ever (proc(5)).

    ProcessLookupError if there is none.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def open_process(pid: int, started: int) -> int:
    """A pidfd of just that process; ProcessLookupError if it has ended, whoever has its pid now. The caller's."""
    pidfd = os.pidfd_open(pid)
    try:
        if start_time(pid) != started:
            raise ProcessLookupError(errno.ESRCH, "the pid is another process's now")
        if has_ended(pidfd, 0):
            raise ProcessLookupError(errno.ESRCH, "it has ended, and its parent has not taken notice yet")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def has_ended(pidfd: int, timeout: float) -> bool:
    """Has the process ended, at the latest in ``timeout`` seconds?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def is_frozen(cgroup: Optional[str]) -> bool:
    """Has somebody asked for this cgroup to be frozen? False for none, and for one that cannot be asked."""
    for name in ("freezer.self_freezing", "cgroup.freeze"):
        try:
            with open(os.path.join(cgroup or "", name)) as file:
                return file.read().strip() == "1"
        except OSError:
            continue
    return False
