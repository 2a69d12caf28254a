"""Which processes are to be moved when it is not all that use the mount, and what they cannot leave alone.

What a chosen process shares with one that is not chosen stays: moved, it would be shared no longer.
"""

from __future__ import annotations

import os
import time
from typing import Callable, Dict, Iterable, Iterator, List, Sequence, Set, Union

from spfs.linux import procfs
from spfs.linux.process import KCMP_FILES, KCMP_FS, KCMP_VM
from spfs.surgery.examine import shared
from spfs.surgery.records import (
    NOT_CHOSEN,
    Description,
    FdTable,
    FsContext,
    Holding,
    Memory,
    Place,
    Process,
    Region,
)

Record = Union[FdTable, FsContext, Memory]
Movable = Union[Description, Holding, Place, Region]


class Everybody:
    def __contains__(self, pid: object) -> bool:
        return True


class Members:
    """Those that ``list_them`` names, at the moment when it is asked: the members of a cgroup."""

    def __init__(self, list_them: Callable[[], Iterable[int]]) -> None:
        self._list = list_them

    def __contains__(self, pid: object) -> bool:
        return pid in set(self._list())


class Family:
    """The given processes, and what they and their descendants have forked since this object was made."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids: Set[int] = set(pids)
        # /proc/PID/stat has the start in clock ticks since boot: one too early costs a look at the parent.
        self._since = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")) - 1

    def __contains__(self, pid: object) -> bool:
        assert isinstance(pid, int)
        line: List[int] = []
        while pid not in self._pids:
            if pid <= 1:
                return False
            try:
                stat = procfs.parse_stat(procfs.read(f"/proc/{pid}/stat"))
            except (FileNotFoundError, ProcessLookupError):
                return False
            if stat.start < self._since:
                return False
            line.append(pid)
            pid = stat.parent
        self._pids.update(line)  # they belong to it also when their parent has ended
        return True


def judge(chosen: Sequence[Process], others: Sequence[Process]) -> None:
    """Give what a chosen process shares with another one the reason why it stays."""
    owner: Dict[int, Process] = {}
    for process in others:
        for table in process.tables:
            owner.update((id(description), process) for description in table.held.values())
    for process in chosen if others else ():
        for table in process.tables:
            for description in table.held.values():
                if id(description) in owner:
                    _keep([description], owner[id(description)])
    _judge_shared(chosen, others, KCMP_FILES, _tables)
    _judge_shared(chosen, others, KCMP_FS, _contexts)
    _judge_shared(chosen, others, KCMP_VM, _memories)


def _judge_shared(
    chosen: Sequence[Process], others: Sequence[Process], kind: int, records: Callable[[Process], Sequence[Record]]
) -> None:
    of = {record.tid: (process, record) for process in (*others, *chosen) for record in records(process)}
    groups: Dict[int, Set[int]] = {}
    for tid, first in shared(list(of), kind).items() if others else ():
        groups.setdefault(first, {first}).add(tid)
    foreign = {process.pid for process in others}
    for group in groups.values():
        outside = [of[tid][0] for tid in sorted(group) if of[tid][0].pid in foreign]
        for process, record in (of[tid] for tid in group) if outside else ():
            if process.pid not in foreign:
                _keep(_things(record), outside[0])


def _tables(process: Process) -> Sequence[FdTable]:
    return [table for table in process.tables if table.in_use]


def _contexts(process: Process) -> Sequence[FsContext]:
    return [context for context in process.contexts if context.cwd or context.root]


def _memories(process: Process) -> Sequence[Memory]:
    return [process.memory] if process.memory is not None and (process.memory.lines or process.memory.exe) else []


def _things(record: Record) -> Iterator[Movable]:
    if isinstance(record, FdTable):
        yield from record.held.values()
        yield from record.holdings
    elif isinstance(record, FsContext):
        yield from (place for place in (record.cwd, record.root) if place is not None)
    else:
        yield from record.regions
        if record.exe is not None:
            yield record.exe


def _keep(things: Iterable[Movable], other: Process) -> None:
    for thing in things:
        if thing.problem is None:
            thing.problem = f"it is shared with process {other.pid} ({other.command}), which {NOT_CHOSEN}"
