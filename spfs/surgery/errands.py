"""Calls that stopped processes make ahead of what is done to themselves, for the sake of something they share.

The kernel takes some facts from whoever makes a call, and from nobody else: who listens, who connects (unix(7),
SO_PEERCRED). Each errand is a table of calls of its own, made and over before the next ones.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Sequence, Tuple

from spfs.linux import ptrace
from spfs.linux.arch import LOAD_ARGUMENT_0
from spfs.linux.calls import ENTRY, results
from spfs.surgery.gadget import GadgetFinder
from spfs.surgery.program import Program
from spfs.surgery.records import FdTable, Process
from spfs.surgery.scratch import BASE_STEP, FIRST_BASE, open_scratch, room
from spfs.tracee import USER, Script, Tracee

_LEAST_SPARE = 3  # descriptors: the socketpair's two, of which one is closed, a fixed one, one received


class Errand:
    """One process's, with one of its descriptor tables: ``fill`` adds the calls to its program."""

    def __init__(self, process: Process, table: FdTable, base: int, fill: "Fill") -> None:
        self.process, self.base, self._fill = process, base, fill
        self.tid = table.tid
        self.requests = ptrace.Requests(self.tid)
        self._chunk, self._descriptors = room(table, _LEAST_SPARE)
        self.program = Program(base)
        # The descriptors received take the lowest numbers that are free: the fixed one lies behind them.
        free = (number for number in range(len(table.numbers) + self._chunk + 2) if number not in table.numbers)
        self.fixed = list(free)[self._chunk + 1]

    def receive(self, fds: List[int], use: Callable[[int, int], None]) -> None:
        """Have the process receive ``fds``, and call ``use`` for each with its index and its place, to add calls; they
        are closed after that."""
        for start in range(0, len(fds), self._chunk):
            slots = self.program.receive(fds[start : start + self._chunk])
            for index, slot in enumerate(slots, start):
                use(index, slot)
                self.program.add("close", slot, load=LOAD_ARGUMENT_0)

    def refuse(self, why: str) -> None:
        """What was not done, its results do not tell."""

    def take_stock(self, tracee: Tracee) -> None:
        """Who expects results is told none."""

    def script(self, tracee: Tracee, gadgets: GadgetFinder) -> Script:
        tracee.capture()
        maps = self.process.memory.maps if self.process.memory is not None else b""
        gadgets.provide(tracee, gadgets.look_ahead(self.tid, maps), True)
        self._fill(self)
        yield from open_scratch(tracee, self.base, self.program.end - self.base, self._descriptors)
        if tracee.base != self.base:
            self.program = Program(tracee.base)
            self._fill(self)
        program = self.program
        program.seal()
        tracee.write(program.base + USER, program.image)
        yield from tracee.run(program.table, len(program), program.groups, last=True)
        outcome = results(tracee.read(program.table, len(program) * ENTRY))
        yield from tracee.close()
        program.settle(outcome)


Fill = Callable[[Errand], None]


class Errands:
    """Has processes that stand still run errands, all at once. ``operate``: what has them do it."""

    def __init__(self, operate: Callable[[Sequence[Errand]], None]) -> None:
        self._operate = operate

    def run(self, tasks: Dict[Process, Fill]) -> None:
        """Each process with its first table."""
        self.run_with([(process, process.tables[0], fill) for process, fill in tasks.items()])

    def run_with(self, tasks: Sequence[Tuple[Process, FdTable, Fill]]) -> None:
        """What a call returned is told to whoever expects it (``Program.expect``); what was not called, nobody."""
        bases = range(FIRST_BASE, FIRST_BASE + len(tasks) * BASE_STEP, BASE_STEP)
        if tasks:
            self._operate([Errand(process, table, base, fill) for base, (process, table, fill) in zip(bases, tasks)])
