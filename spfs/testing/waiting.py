"""Waiting in tests, for what is no event, and what a process does just now."""

from __future__ import annotations

import time
from typing import Callable, TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """The first true result of ``condition``, which is asked every few milliseconds; TimeoutError after ``timeout`` s.

    For what the kernel gives no event for (a state in /proc); where there is one, wait for that.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {what or condition}")
        time.sleep(0.002)


def process_state(pid: int) -> str:
    """The state letter of /proc/PID/stat ("R", "S", "D", "T", "t", "Z" …); "" if there is no such process."""
    from spfs.linux import procfs  # here: it needs ctypes, which most users of this package do not

    try:
        return procfs.parse_stat(procfs.read(f"/proc/{pid}/stat")).state
    except (FileNotFoundError, ProcessLookupError):
        return ""
