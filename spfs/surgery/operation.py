"""What one task is made to do: take over descriptors, change directories, exchange mappings.

A first table of calls moves descriptors and directories in one go. It is encoded ahead for the address where the
scratch memory will be; if that is taken by then, again for another one. Mappings follow in ``spfs.surgery.maps``.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import List, Optional, Tuple

from spfs.linux import statx
from spfs.linux.arch import LOAD_ARGUMENT_0, LOAD_ARGUMENT_2
from spfs.linux.calls import CallTable, result_address, results
from spfs.references import Kind
from spfs.surgery import maps, message
from spfs.surgery.examine import Description, EpollEntry, FdTable, FsContext, Memory, Place, Process, Region
from spfs.surgery.gadget import GadgetFinder
from spfs.tracee import DOT, PAGE, PAIR, USER, Script, Tracee
from stubfs.wire import MAX_FDS

FIRST_BASE = 1 << 44  # far from where programs, libraries, heaps and stacks are put
BASE_STEP = 1 << 28

_F_GETFD, _F_SETFD = 1, 2
_EPOLL_DEL, _EPOLL_ADD = 2, 1
_LEAST_SPARE = 2  # descriptors: the socketpair's two, of which one is closed before any is received


class _Program:
    """A table of calls, the data it needs, and the descriptors it receives, for one base address."""

    def __init__(self, operation: "Operation", base: int) -> None:
        self.base = base
        self.data = bytearray()
        self.calls = CallTable()
        self.groups: List[List[int]] = []
        self.moves: List[Tuple[int, int]] = []  # descriptor, entry of its dup3
        self.changes: List[Tuple[Place, int]] = []
        self.calls.add("close", base + PAIR, load=LOAD_ARGUMENT_0)
        self._fill(operation)
        self.data += bytes(-len(self.data) % 64)

    @property
    def table(self) -> int:
        return self.base + USER + len(self.data)

    def _fill(self, operation: "Operation") -> None:
        items = operation.items()
        # Result addresses depend on where the table lies, behind the data: so the data's size first.
        chunk = operation.chunk
        groups = [items[start : start + chunk] for start in range(0, len(items), chunk)]
        length = sum(message.size(len(group)) for group in groups)
        events = sum(len(operation.epolls(item)) for item in items)
        self._table = self.base + USER + length + (16 * events + 63) // 64 * 64
        self._event_at = self.base + USER + length
        self._events = bytearray()
        for group in groups:
            part, slots = message.receive(self.calls, self.base, self.base + USER + len(self.data), len(group))
            self.data += part
            self.groups.append([fd for _, _, fd in group])
            for slot, item in zip(slots, group):
                self._item(operation, item, slot)
        self.data += self._events

    def _item(self, operation: "Operation", item: "Item", slot: int) -> None:
        number, place, _ = item
        if place is not None:
            self._directory(place, slot)
        else:
            self._descriptor(operation, item, number, slot)
        self.calls.add("close", slot, load=LOAD_ARGUMENT_0)

    def _directory(self, place: Place, slot: int) -> None:
        add = self.calls.add
        if place.kind is Kind.CWD:
            self.changes.append((place, add("fchdir", slot, load=LOAD_ARGUMENT_0)))
            return
        # chroot(2) only to where the task is: it goes there and back, whether or not it may.
        here = add("openat", statx.AT_FDCWD, self.base + DOT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        add("fchdir", slot, load=LOAD_ARGUMENT_0)
        self.changes.append((place, add("chroot", self.base + DOT)))
        back = result_address(self._table, here)
        add("fchdir", back, load=LOAD_ARGUMENT_0)
        add("close", back, load=LOAD_ARGUMENT_0)

    def _descriptor(self, operation: "Operation", item: "Item", number: int, slot: int) -> None:
        add = self.calls.add
        watched = operation.epolls(item)
        for entry in watched:
            add("epoll_ctl", entry.epoll, _EPOLL_DEL, number, 0)
        state = add("fcntl", number, _F_GETFD)
        self.moves.append((number, add("dup3", slot, number, 0, load=LOAD_ARGUMENT_0)))
        # FD_CLOEXEC as it is now, not as it was when the process was examined.
        add("fcntl", number, _F_SETFD, result_address(self._table, state), load=LOAD_ARGUMENT_2)
        for entry in watched:
            add("epoll_ctl", entry.epoll, _EPOLL_ADD, number, self._event_at + len(self._events))
            self._events += struct.pack("<IQxxxx", entry.events, entry.data)


Item = Tuple[int, Optional[Place], int]  # descriptor in the tracee, or -1 and a directory; our descriptor


class Operation:
    """Everything that task ``tid`` does for its process: for its table, its directories, its memory, as given."""

    def __init__(
        self,
        process: Process,
        tid: int,
        base: int,
        table: Optional[FdTable] = None,
        context: Optional[FsContext] = None,
        memory: Optional[Memory] = None,
    ) -> None:
        self.process, self.tid, self.base = process, tid, base
        self.table, self.context, self.memory = table, context, memory
        self.chunk = MAX_FDS
        self.descriptors: Optional[int] = None
        self.gadget: Optional[Tuple[int, int]] = None
        self._maps = b""
        self._program: Optional[_Program] = None
        self._items: List[Item] = []

    # -- ahead of time

    def prepare(self, gadgets: GadgetFinder) -> None:
        self._spare()
        self._maps = self.maps()
        self.gadget = gadgets.look_ahead(self.tid, self._maps)
        self._items = self.items()
        self._program = _Program(self, self.base)

    def _spare(self) -> None:
        """How many descriptors can be received at once; a full table needs its soft limit raised, if it can be."""
        if self.table is None:
            return
        used = sum(1 for number in self.table.numbers if number < self.table.limit)
        spare = self.table.limit - used
        if spare < _LEAST_SPARE and self.table.hard_limit > self.table.limit:
            self.descriptors = min(self.table.hard_limit, self.table.limit + MAX_FDS + _LEAST_SPARE)
            spare += self.descriptors - self.table.limit
        self.chunk = max(1, min(MAX_FDS, spare - 1))

    def items(self) -> List[Item]:
        found: List[Item] = []
        if self.table is not None:
            found = [(n, None, d.new) for n, d in self.table.held.items() if movable(d)]
        if self.context is not None:
            # The root first: going there changes the working directory, which is set right afterwards.
            for place in (self.context.root, self.context.cwd):
                if place is not None and movable(place):
                    found.append((-1, place, place.new))
        return found

    def refuse(self, why: str) -> None:
        """Note that nothing of it can be done."""
        if self.table is not None:
            for number in self.table.held:
                self.table.failures.setdefault(number, why)
        records: List["Place | Region | None"] = []
        if self.context is not None:
            records += [self.context.cwd, self.context.root]
        if self.memory is not None:
            records += [*self.memory.regions, self.memory.exe]
        for record in records:
            if record is not None and record.problem is None:
                record.problem = why

    def epolls(self, item: Item) -> "List[EpollEntry]":
        number, place, _ = item
        return self.table.epolls.get(number, []) if self.table is not None and place is None else []

    # -- while the process stands still

    def maps(self) -> bytes:
        memory = self.process.memory
        return memory.maps if memory is not None else b""

    def script(self, tracee: Tracee, gadgets: GadgetFinder) -> Script:
        """The whole operation; what failed is noted in the records. OSError only for the process as a whole."""
        assert self._program is not None
        tracee.capture()
        gadgets.provide(tracee, self.maps(), self.gadget, self.maps() == self._maps)
        need = self._program.table - self._program.base + len(self._program.calls) * 64
        if self.memory is not None:
            need = max(need, USER + maps.space(self.memory))
        size = _round_up(need)
        for attempt in range(16):
            try:
                yield from tracee.open(self.base + attempt * BASE_STEP * 4096, size, self.descriptors)
                break
            except OSError as error:
                if error.errno != errno.EEXIST:
                    raise
        else:
            raise OSError(errno.ENOMEM, "no room for the scratch memory", str(self.process.pid))
        if tracee.base != self._program.base or self._items != self.items():
            # Fewer items at most: some turned out not to be movable when all stood still.
            self._program = _Program(self, tracee.base)
        program = self._program
        tracee.write(program.base + USER, program.data + program.calls.encode())
        yield from tracee.run(program.table, len(program.calls), program.groups)
        self._collect(tracee)
        if self.memory is not None:
            yield from maps.script(tracee, self.memory, self.chunk)
        yield from tracee.close()

    def _collect(self, tracee: Tracee) -> None:
        program = self._program
        assert program is not None
        outcome = results(tracee.read(program.table, len(program.calls) * 64))
        if self.table is not None:
            for number, entry in program.moves:
                if outcome[entry] == number:
                    self.table.moved.add(number)
                    self.table.held[number].moved = True
                else:
                    self.table.failures[number] = f"it cannot be exchanged: {os.strerror(-outcome[entry])}"
        for place, entry in program.changes:
            if outcome[entry] == 0:
                place.moved = True
            else:
                place.problem = f"the process cannot go there: {os.strerror(-outcome[entry])}"


def movable(record: "Description | Place | Region") -> bool:
    return record.problem is None and record.new >= 0


def _round_up(size: int) -> int:
    return -(-size // PAGE) * PAGE
