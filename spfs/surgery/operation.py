"""What one task is made to do: take over descriptors, change directories, exchange mappings.

A first table of calls moves descriptors and directories in one go. It is encoded ahead for the address where the
scratch memory will be; if that is taken by then, again for another one. Mappings (``spfs.surgery.maps``) and the
executable (``spfs.surgery.exe``) follow.
"""

from __future__ import annotations

import os
from typing import List, Optional, Tuple

from spfs.linux import ptrace, statx
from spfs.linux.arch import LOAD_ARGUMENT_0
from spfs.linux.calls import ENTRY, results
from spfs.references import Kind
from spfs.surgery import exe
from spfs.surgery.gadget import Gadget, GadgetFinder
from spfs.surgery.kinds.registry import Kinds
from spfs.surgery.maps import Exchange
from spfs.surgery.program import Program, Result
from spfs.surgery.records import Description, FdTable, FsContext, Holding, Memory, Place, Process, Region
from spfs.surgery.scratch import open_scratch, room
from spfs.tracee import DOT, USER, Script, Tracee
from stubfs.wire import MAX_FDS

_LEAST_SPARE = 2  # descriptors: the socketpair's two, of which one is closed before any is received


class _Program(Program):
    """All that is done to descriptors and directories."""

    def __init__(self, operation: "Operation", base: int) -> None:
        super().__init__(base)
        self.moves: List[Tuple[int, int]] = []  # descriptor, entry of its dup3
        self.changes: List[Tuple[Place, int]] = []
        items = operation.items()
        for start in range(0, len(items), operation.chunk):
            group = items[start : start + operation.chunk]
            for slot, (number, place, _) in zip(self.receive([fd for _, _, fd in group]), group):
                if place is not None:
                    self._directory(place, slot)
                else:
                    self._descriptor(operation, number, slot)
                self.add("close", slot, load=LOAD_ARGUMENT_0)
        if operation.table is not None:
            operation.kinds.finish(self, operation.table)
        self.seal()

    def _directory(self, place: Place, slot: int) -> None:
        add = self.add
        if place.kind is Kind.CWD:
            self.changes.append((place, add("fchdir", slot, load=LOAD_ARGUMENT_0)))
            return
        # chroot(2) only to where the task is: it goes there and back, whether or not it may.
        here = add("openat", statx.AT_FDCWD, self.base + DOT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        add("fchdir", slot, load=LOAD_ARGUMENT_0)
        self.changes.append((place, add("chroot", self.base + DOT)))
        add("fchdir", Result(here), load=LOAD_ARGUMENT_0)
        add("close", Result(here), load=LOAD_ARGUMENT_0)

    def _descriptor(self, operation: "Operation", number: int, slot: int) -> None:
        assert operation.table is not None
        operation.kinds.before(self, operation.table, number)
        self.moves.append((number, self.exchange(number, slot)))
        self.exchanged.add(number)


Item = Tuple[int, Optional[Place], int]  # descriptor in the tracee, or -1 and a directory; our descriptor


class Operation:
    """Everything that task ``tid`` does for its process: for its table, its directories, its memory, as given."""

    def __init__(
        self,
        process: Process,
        tid: int,
        base: int,
        kinds: Kinds,
        table: Optional[FdTable] = None,
        context: Optional[FsContext] = None,
        memory: Optional[Memory] = None,
    ) -> None:
        self.process, self.tid, self.base, self.kinds = process, tid, base, kinds
        self.table, self.context, self.memory = table, context, memory
        self.requests = ptrace.Requests(tid)
        self.chunk = MAX_FDS
        self.descriptors: Optional[int] = None
        self.gadget: Optional[Gadget] = None
        self._maps = b""
        self._program: Optional[_Program] = None
        self._outstanding = False  # the program may have been run, and its results have not been read
        self._items: List[Item] = []

    # -- ahead of time

    def prepare(self, gadgets: GadgetFinder) -> None:
        self._spare()
        self._maps = self.maps()
        self.gadget = gadgets.look_ahead(self.tid, self._maps)
        self._items = self.items()
        self._program = _Program(self, self.base)

    def _spare(self) -> None:
        """How many descriptors can be received at once."""
        if self.table is not None:
            self.chunk, self.descriptors = room(self.table, _LEAST_SPARE)

    def items(self) -> List[Item]:
        found: List[Item] = []
        if self.table is not None:
            found = [(n, None, d.new) for n, d in self.table.held.items() if movable(d)]
            found += [(h.number, None, h.new) for h in self.table.exchangeable if movable(h)]
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

    # -- while the process stands still

    def maps(self) -> bytes:
        memory = self.process.memory
        return memory.maps if memory is not None else b""

    def script(self, tracee: Tracee, gadgets: GadgetFinder) -> Script:
        """The whole operation; what failed is noted in the records. OSError only for the process as a whole."""
        assert self._program is not None
        tracee.capture()
        gadgets.provide(tracee, self.gadget, self.maps() == self._maps)
        need = self._program.end - self._program.base
        exchange = Exchange(self.memory) if self.memory is not None else None
        if exchange is not None:
            need = max(need, USER + exchange.space, USER + exe.SPACE)
        yield from open_scratch(tracee, self.base, need, self.descriptors)
        if tracee.base != self._program.base or self._items != self.items():
            # Fewer items at most: some turned out not to be movable when all stood still.
            self._program = _Program(self, tracee.base)
        program = self._program
        tracee.write(program.base + USER, program.image)
        self._outstanding = True
        yield from tracee.run(program.table, len(program), program.groups, last=self.memory is None)
        self._collect(tracee)
        if self.memory is not None and exchange is not None:
            yield from exchange.script(tracee, self.chunk)
            yield from exe.script(tracee, self.memory)
        yield from tracee.close()

    def take_stock(self, tracee: Tracee) -> None:
        if self._outstanding:
            self._collect(tracee)

    def _collect(self, tracee: Tracee) -> None:
        program = self._program
        assert program is not None
        self._outstanding = False
        outcome = results(tracee.read(program.table, len(program) * ENTRY))
        if self.table is not None:
            for number, entry in program.moves:
                if outcome[entry] == number:
                    self.table.moved.add(number)
                    held = self.table.held.get(number)
                    if held is not None:
                        held.moved = True
                else:
                    self.table.failures[number] = f"it cannot be exchanged: {os.strerror(-outcome[entry])}"
        for place, entry in program.changes:
            if outcome[entry] == 0:
                place.moved = True
            else:
                place.problem = f"the process cannot go there: {os.strerror(-outcome[entry])}"
        program.settle(outcome)


def movable(record: "Description | Place | Region | Holding") -> bool:
    return record.problem is None and record.new >= 0
