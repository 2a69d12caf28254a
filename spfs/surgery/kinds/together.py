"""What processes have in common with one that cannot go stays with it: a file in two places is two files.

A description has one offset. Locks exclude nobody on another mount, and memory that is shared by a file is shared by
those who have it on the same one.
"""

from __future__ import annotations

import os
import stat
from typing import Dict, List, Tuple, Union

from spfs.references import Kind
from spfs.surgery.kinds.base import Handler, Scene
from spfs.surgery.records import NOT_CHOSEN, Description, Process, Region

_SHARED = "it is shared with process {} ({}), which {}"
_OPEN = "process {} ({}) has the file open, too, and would see neither locks nor shared memory of it: that process {}"


class Together(Handler):
    """Looks at processes alone: what keeps a part of one of them is the affair of the other kinds."""

    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._kept: List[Tuple[Union[Description, Region], str]] = []

    def judge(self, scene: Scene) -> None:
        for record, why in self._kept:  # who was in the way then need not be any more: it was traced, say
            if record.problem == why:
                record.problem = None
        self._kept.clear()
        stuck = [one for one in scene.processes if one.problem is not None and one.problem != NOT_CHOSEN]
        if not stuck:
            return
        owners = {id(one): process for process in stuck for table in process.tables for one in table.held.values()}
        files = _files(stuck)
        for process, table in scene.tables() if owners or files else ():
            for description in table.held.values() if process.problem is None else ():
                if id(description) in owners:
                    self._keep(description, _SHARED, owners[id(description)])
        for process in scene.processes if files else ():
            for record, changes in _uses(process) if process.problem is None else ():
                holder, holder_changes = files.get(record.object.inode, (process, False))
                if holder is not process and (changes or holder_changes):
                    self._keep(record, _OPEN, holder)

    def _keep(self, record: Union[Description, Region], why: str, other: Process) -> None:
        if record.problem is None:
            record.problem = why.format(other.pid, other.command, other.problem)
            self._kept.append((record, record.problem))


def _files(processes: List[Process]) -> Dict[int, Tuple[Process, bool]]:
    """By inode number, who has it, and whether to write or with locks."""
    found: Dict[int, Tuple[Process, bool]] = {}
    for process in processes:
        for record, changes in _uses(process):
            found[record.object.inode] = (process, changes or found.get(record.object.inode, (process, False))[1])
    return found


def _uses(process: Process) -> List[Tuple[Union[Description, Region], bool]]:
    """What it has of files by which others could notice it, and whether they could now."""
    found: List[Tuple[Union[Description, Region], bool]] = []
    for table in process.tables:
        locked = {number for number, _ in table.locks}
        for number, one in table.held.items():
            if one.kind is Kind.FILE:
                found.append((one, _is_writable(one) or bool(one.locks) or number in locked))
    for region in process.memory.regions if process.memory is not None else ():
        if region.mapping.shared:
            found.append((region, bool(region.file_mode & stat.S_IWUSR)))
    return found


def _is_writable(description: Description) -> bool:
    return description.flags & os.O_ACCMODE != os.O_RDONLY
