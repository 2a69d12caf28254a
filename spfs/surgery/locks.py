"""File locks: a flock goes along with its description; with any other lock the file stays where it is.

Locks that come between the examination and the standstill are noticed by one look at /proc/locks.
"""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING, Dict, Iterable, List

from spfs.errors import reason
from spfs.linux import procfs

if TYPE_CHECKING:  # examine imports this module
    from spfs.surgery.examine import Description, Process

_LOCKED = "holds a lock that cannot be moved"
_FLOCKS = {"READ": fcntl.LOCK_SH, "WRITE": fcntl.LOCK_EX}


def note(description: Description, info: procfs.FdInfo) -> None:
    """Take over what fdinfo says about the locks of a description, now."""
    description.flock = None
    if description.problem is not None and description.problem.startswith(_LOCKED):
        description.problem = None
    for kind, mode in info.locks:
        if kind == "FLOCK" and mode in _FLOCKS:
            description.flock = _FLOCKS[mode]
        else:
            description.problem = f"{_LOCKED} ({kind})"


def judge(processes: Iterable[Process]) -> None:
    """A POSIX lock keeps all descriptors of its file in the table: closing any of them would drop it (fcntl(2))."""
    for process in processes:
        for table in process.tables:
            locked = {
                description.object.inode: description.problem
                for description in table.held.values()
                if description.problem is not None and "(POSIX)" in description.problem
            }
            for description in table.held.values() if locked else ():
                description.problem = description.problem or locked.get(description.object.inode)


def transfer(processes: Iterable[Process]) -> None:
    """Lock the counterparts as the originals are, while nobody runs."""
    done = set()
    for process in processes:
        for table in process.tables:
            for description in table.held.values():
                if description.flock is None or id(description) in done or description.problem or description.new < 0:
                    continue
                done.add(id(description))
                try:
                    fcntl.flock(description.new, description.flock | fcntl.LOCK_NB)
                except OSError as error:
                    description.problem = f"its lock cannot be had on the new mount: {reason(error)}"


def held(device: int) -> Dict[int, List[bytes]]:
    """The locks on ``device``, by inode number; what is compared later."""
    return procfs.locks_on(procfs.read("/proc/locks"), device)
