"""Are the processes, now that they stand still, what they were when they were examined?

Everything is prepared ahead: one table of system calls for all processes (kcmp of each known descriptor against our
copy, statx of all others, offsets and flags of the descriptions, the mappings of files), run in one go, a long one by
two threads: another processor has nothing to do meanwhile. A thousand readlinks and fdinfos would cost more than the
whole move.
"""

from __future__ import annotations

import array
import fcntl
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

from spfs.linux import mapquery
from spfs.linux import process as syscalls
from spfs.linux import procfs, statx
from spfs.linux.arch import LOAD_ARGUMENT_1
from spfs.linux.calls import ENTRY, CallTable, address_of, result_address, run_local, run_shared
from spfs.references import Kind
from spfs.surgery.bulk import add_statx
from spfs.surgery.counterparts import SETTABLE
from spfs.surgery.kinds import locks
from spfs.surgery.records import Description, FdTable, Process

_WORDS = statx.SIZE // 4  # of 32 bits, in an answer of statx
_PART = 300  # calls, of some 0.8 µs each: worth waking another thread


class _Numbers(NamedTuple):
    """Which of the paths are a table's descriptors: from ``first`` on, and at ``directory`` the one that has them."""

    table: FdTable
    first: int
    directory: int


class Comparison:
    """The prepared comparison of ``processes``; ``stale`` runs it, once. ``close`` lets go of its descriptors."""

    def __init__(self, processes: List[Process], device: int, known_locks: Dict[int, List[bytes]]) -> None:
        self._processes = processes
        self._device = device
        self._calls = CallTable()
        self._kcmps: List[Tuple[int, int, Process]] = []  # range of entries that must give 0
        self._paths: List[Tuple[str, Process, Optional[int]]] = []  # with the inode expected on the device
        self._numbers: Dict[int, List[_Numbers]] = {}  # by pid
        self._mappings: Dict[int, mapquery.FileMappings] = {}  # by pid
        self._descriptions: List[Description] = []
        self._locks = known_locks
        self.locked: Set[int] = set()  # inode numbers whose locks have changed, as ``stale`` found
        self._same_mappings: Set[int] = set()  # pids, as ``stale`` found
        for process in processes:
            self._add(process)
        self._first_statx = len(self._calls)
        self._answers, self._names = add_statx(self._calls, [path for path, _, _ in self._paths])
        for mappings in self._mappings.values():
            mappings.add(self._calls)
        self._offsets = _Offsets(self._calls, self._descriptions)
        self._helper: Optional[ThreadPoolExecutor] = None
        if len(self._calls) >= 2 * _PART and len(os.sched_getaffinity(0)) > 1:
            self._helper = ThreadPoolExecutor(1, "comparison")
            self._helper.submit(int).result()  # it is there from now on

    def close(self) -> None:
        if self._helper is not None:
            self._helper.shutdown()
        for mappings in self._mappings.values():
            mappings.close()

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
            begin = len(self._paths)
            for number in table.numbers - table.held.keys():
                self._paths.append((f"/proc/{table.tid}/fd/{number}", process, None))
            self._numbers.setdefault(process.pid, []).append(_Numbers(table, begin, len(self._paths)))
            self._paths.append((f"/proc/{table.tid}/fd", process, None))
        self._kcmps.append((first, len(calls), process))
        for context in process.contexts:
            for name, place in (("cwd", context.cwd), ("root", context.root)):
                expected = place.object.inode if place else None
                self._paths.append((f"/proc/{context.tid}/{name}", process, expected))
        memory = process.memory
        exe = memory.exe if memory else None
        self._paths.append((f"/proc/{leader}/exe", process, exe.object.inode if exe else None))
        mappings = mapquery.expected_of(memory.tid, memory.maps) if memory is not None else None
        if mappings is not None:
            self._mappings[process.pid] = mappings

    def stale(self, tasks: Callable[[int], Set[int]]) -> List[Process]:
        """Those of the processes that hold something else by now, but for their mappings. The counterparts' offsets
        and flags are set. ``tasks``: of a process that stands still, by its pid; empty for one that does not."""
        outcome = self._run()
        stale: Dict[int, Process] = {}
        for first, end, process in self._kcmps:
            if any(outcome[first:end]) or not tasks(process.pid) <= process.tids:
                stale[process.pid] = process
            elif not all(self._has_same_numbers(numbers, outcome) for numbers in self._numbers[process.pid]):
                stale[process.pid] = process
        self._same_mappings = {pid for pid, mappings in self._mappings.items() if mappings.same(outcome)}
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
            start = index * _WORDS
            if outcome[self._first_statx + index] >= 0:
                if (words[start + statx.DEVICE_WORDS[0]], words[start + statx.DEVICE_WORDS[1]]) == wanted:
                    inode = words[start + 8] | words[start + 9] << 32
            if inode != expected:
                stale[process.pid] = process
        self._offsets.finish(outcome)
        return list(stale.values())

    def _run(self) -> "array.array[int]":
        if self._helper is None:
            return run_local(self._calls)
        cuts = [self._offsets.before(entry) for entry in range(_PART, len(self._calls), _PART)]
        return run_shared(self._calls, cuts, self._helper)

    def _has_same_numbers(self, numbers: _Numbers, outcome: Sequence[int]) -> bool:
        table = numbers.table
        first, directory = self._first_statx + numbers.first, self._first_statx + numbers.directory
        if outcome[directory] == 0 and min(outcome[first:directory], default=0) == 0:
            # The size of /proc/PID/fd is their number (Linux 6.2): all known ones are there, so no other one is.
            (count,) = struct.unpack_from("<Q", self._answers, numbers.directory * statx.SIZE + statx.SIZE_OFFSET)
            if count == len(table.numbers) and all(held.copy >= 0 for held in table.held.values()):
                return True
        try:
            return set(map(int, os.listdir(f"/proc/{table.tid}/fd"))) == table.numbers
        except (FileNotFoundError, ProcessLookupError):
            return False

    def memory_is_same(self, process: Process) -> bool:
        """After ``stale``: whether the mappings of the device are those examined. ``process.memory.maps`` is true then
        for all mappings of files."""
        memory = process.memory
        if memory is None or process.pid in self._same_mappings:
            return memory is not None
        try:
            memory.maps = procfs.read(f"/proc/{memory.tid}/maps")
        except (FileNotFoundError, ProcessLookupError):
            memory.maps = b""
        return procfs.lines_of_device(memory.maps, self._device) == memory.lines


_PER_DESCRIPTION = 3  # calls


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
        for index in range(self._first, len(calls), _PER_DESCRIPTION):
            start = (index + 1) * ENTRY + 16  # the second argument
            encoded[start : start + 8] = result_address(base, index).to_bytes(8, "little")

    def before(self, entry: int) -> int:
        """The last entry up to ``entry`` before which the table can be cut in parts that are run in any order."""
        return entry - max(0, entry - self._first) % _PER_DESCRIPTION

    def finish(self, outcome: "array.array[int]") -> None:
        positions = outcome[self._first :: _PER_DESCRIPTION]
        for description, position, flags in zip(
            self._descriptions, positions, outcome[self._first + 2 :: _PER_DESCRIPTION]
        ):
            description.position = position
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
