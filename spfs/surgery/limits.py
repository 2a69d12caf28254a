"""What a process's own limits (setrlimit(2)) leave no room for: known ahead, before anything is changed.

Both are the soft limits, but for that of descriptors, which is raised meanwhile up to the hard one. Where they suffice
for our calls, and not for a large mapping, that is met only when it is tried.
"""

from __future__ import annotations

from typing import Iterable, Optional

from spfs.linux import procfs
from spfs.surgery.records import Process
from spfs.tracee import PAGE

_DESCRIPTORS = 2  # of the socket pair by which a process is sent all others
_MEMORY = 2 * PAGE  # bytes, of the smallest scratch mapping
_NO_DESCRIPTOR = "it cannot be operated on: Too many open files (RLIMIT_NOFILE)"
_NO_MEMORY = "it cannot be operated on: Cannot allocate memory (RLIMIT_AS)"


def look(processes: Iterable[Process]) -> None:
    """Give those that have no room the reason why they stay."""
    for process in processes:
        if process.problem is None and process.is_concerned:
            process.problem = _exhausted(process)


def look_again(processes: Iterable[Process]) -> None:
    """Only at those that had no room, since this is done while everybody waits."""
    for process in processes:
        if process.problem in (_NO_DESCRIPTOR, _NO_MEMORY):
            process.problem = _exhausted(process)


def _exhausted(process: Process) -> Optional[str]:
    try:
        limits = procfs.read(f"/proc/{process.pid}/limits")
        pages = int(procfs.read(f"/proc/{process.pid}/statm").split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return None  # it has ended: found out where that matters
    _, most = procfs.parse_descriptor_limits(limits)
    for table in process.tables:
        if most - sum(1 for number in table.numbers if number < most) < _DESCRIPTORS:
            return _NO_DESCRIPTOR
    space = procfs.parse_address_space_limit(limits)
    return _NO_MEMORY if space is not None and pages * PAGE + _MEMORY > space else None
