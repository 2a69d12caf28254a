"""Are the processes, now that they stand still, what they were when they were examined?

Everything is prepared ahead: one table of system calls for all processes (kcmp of each known descriptor against our
copy, statx of all others, offsets and flags of the descriptions), run in one go. A thousand readlinks and fdinfos
would cost more than the whole move.
"""

from __future__ import annotations

import fcntl
import os
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple

from spfs.linux import process as syscalls
from spfs.linux import procfs, statx
from spfs.linux.arch import LOAD_ARGUMENT_1
from spfs.linux.calls import ENTRY, CallTable, address_of, result_address, run_local
from spfs.references import Kind
from spfs.surgery.bulk import add_statx
from spfs.surgery.counterparts import SETTABLE
from spfs.surgery.examine import is_dead
from spfs.surgery.kinds import locks
from spfs.surgery.records import Description, Process

_DEVICE_WORDS = statx.SIZE // 4


class Comparison:
    """The prepared comparison of ``processes``; ``stale`` runs it."""

    def __init__(self, processes: List[Process], device: int, known_locks: Dict[int, List[bytes]]) -> None:
        self._processes = processes
        self._device = device
        self._calls = CallTable()
        self._kcmps: List[Tuple[int, int, Process]] = []  # range of entries that must give 0
        self._paths: List[Tuple[str, Process, Optional[int]]] = []  # with the inode expected on the device
        self._descriptions: List[Description] = []
        self._locks = known_locks
        self.locked: Set[int] = set()  # inode numbers whose locks have changed, as ``stale`` found
        for process in processes:
            self._add(process)
        self._first_statx = len(self._calls)
        self._answers, self._names = add_statx(self._calls, [path for path, _, _ in self._paths])
        self._offsets = _Offsets(self._calls, self._descriptions)

    def _add(self, process: Process) -> None:
        calls, me = self._calls, os.getpid()
        first = len(calls)
        owners = {table.tid for table in process.tables}
        contexts = {context.tid for context in process.contexts}
        leader = process.tables[0].tid
        for tid in process.tids:
            if tid not in owners:
                calls.add("kcmp", leader, tid, syscalls.KCMP_FILES)
            if tid not in contexts:
                calls.add("kcmp", leader, tid, syscalls.KCMP_FS)
        seen: Set[int] = {id(description) for description in self._descriptions}
        for table in process.tables:
            for number, description in table.held.items():
                if description.copy < 0:
                    continue
                calls.add("kcmp", table.tid, me, syscalls.KCMP_FILE, number, description.copy)
                if id(description) not in seen and _follows(description):
                    seen.add(id(description))
                    self._descriptions.append(description)
            for number in table.numbers - table.held.keys():
                self._paths.append((f"/proc/{table.tid}/fd/{number}", process, None))
        self._kcmps.append((first, len(calls), process))
        for context in process.contexts:
            for name, place in (("cwd", context.cwd), ("root", context.root)):
                expected = place.object.inode if place else None
                self._paths.append((f"/proc/{context.tid}/{name}", process, expected))
        exe = process.memory.exe if process.memory else None
        self._paths.append((f"/proc/{leader}/exe", process, exe.object.inode if exe else None))

    def stale(self) -> List[Process]:
        """Those of the processes that hold something else by now. The counterparts' offsets and flags are set."""
        outcome = run_local(self._calls)
        stale: Dict[int, Process] = {}
        for first, end, process in self._kcmps:
            if any(outcome[first:end]) or self._changed(process):
                stale[process.pid] = process
        now = locks.held(self._device)
        known = self._locks
        changed = {inode for inode in now.keys() | known.keys() if now.get(inode) != known.get(inode)}
        self.locked = changed
        for process in self._processes if changed else ():
            if any(d.object.inode in changed for table in process.tables for d in table.held.values()):
                stale[process.pid] = process
        words = memoryview(self._answers).cast("I")
        wanted = (os.major(self._device), os.minor(self._device))
        for index, (_, process, expected) in enumerate(self._paths):
            inode = None
            start = index * _DEVICE_WORDS
            if outcome[self._first_statx + index] >= 0:
                if (words[start + statx.DEVICE_WORDS[0]], words[start + statx.DEVICE_WORDS[1]]) == wanted:
                    inode = words[start + 8] | words[start + 9] << 32
            if inode != expected:
                stale[process.pid] = process
        self._offsets.finish(outcome)
        return list(stale.values())

    @staticmethod
    def _changed(process: Process) -> bool:
        for table in process.tables:
            try:
                names = os.listdir(f"/proc/{table.tid}/fd")
            except (FileNotFoundError, ProcessLookupError):
                return True
            if len(names) != len(table.numbers) or set(map(int, names)) != table.numbers:
                return True
        return any(tid not in process.tids and not is_dead(tid) for tid in procfs.tasks(process.pid))


class _Offsets:
    """Gives counterparts the offsets and flags of their originals: calls to be added last to a table."""

    def __init__(self, calls: CallTable, descriptions: List[Description]) -> None:
        self._descriptions = descriptions
        self._first = len(calls)
        for description in descriptions:
            calls.add("lseek", description.copy, 0, os.SEEK_CUR)
            calls.add("lseek", description.new, 0, os.SEEK_SET, load=LOAD_ARGUMENT_1)
            calls.add("fcntl", description.copy, fcntl.F_GETFL)
        # Each counterpart's lseek takes its offset from the result of the call before it.
        encoded = calls.encode()
        base = address_of(encoded)
        for index in range(self._first, len(calls), 3):
            start = (index + 1) * ENTRY + 16  # the second argument
            encoded[start : start + 8] = result_address(base, index).to_bytes(8, "little")

    def finish(self, outcome: Sequence[int]) -> None:
        for index, description in enumerate(self._descriptions):
            description.position, _, flags = outcome[self._first + 3 * index : self._first + 3 * index + 3]
            if flags >= 0 and (flags ^ description.flags) & SETTABLE:
                fcntl.fcntl(description.new, fcntl.F_SETFL, flags & SETTABLE)


def _follows(description: Description) -> bool:
    """Does the counterpart take its offset and flags from the original? Not when somebody uses it already."""
    return description.new >= 0 and description.kind is not Kind.PATH and not description.moved


def take_offsets_over(processes: Iterable[Process]) -> None:
    """For counterparts that were opened when the processes stood still already."""
    found = {
        id(description): description
        for process in processes
        for table in process.tables
        for description in table.held.values()
        if _follows(description)
    }
    calls = CallTable()
    offsets = _Offsets(calls, list(found.values()))
    offsets.finish(run_local(calls))


def memory_is_same(process: Process, maps: bytes, device: int) -> bool:
    """Whether the mappings of the device are those examined; ``maps`` is what /proc/PID/maps says now."""
    return process.memory is not None and procfs.lines_of_device(maps, device) == process.memory.lines
