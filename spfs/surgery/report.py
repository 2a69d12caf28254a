"""What is, was, and could not be moved, as counts and lists for reports."""

from __future__ import annotations

from typing import Dict, Iterable, Iterator, List, Optional, Tuple

from spfs.references import HeldReference, LeftReference
from spfs.surgery.records import Process


def entries(process: Process) -> Iterator[Tuple[str, str, Optional[str], Optional[str]]]:
    """(kind, what, path, problem) of everything the process still holds on the old mount."""
    for table in process.tables:
        if table.owner is not None:
            continue
        for number, description in sorted(table.held.items()):
            if number not in table.moved and not description.elsewhere:
                problem = table.failures.get(number) or description.problem
                yield description.kind.value, f"fd {number}", description.path, problem
        for holding in (one for one in table.holdings if not one.attached):
            if not holding.elsewhere and not holding.moved and holding.number not in table.moved:
                problem = table.failures.get(holding.number) or holding.problem
                yield holding.kind.value, holding.what, holding.path, problem
    for context in process.contexts:
        for place in (context.cwd, context.root) if context.owner is None else ():
            if place is not None and not place.moved and not place.elsewhere:
                yield place.kind.value, place.kind.value, place.path, place.problem
    memory = process.memory
    if memory is not None and memory.owner is None:
        for region in memory.regions:
            if not region.moved and not region.elsewhere:
                yield region.kind.value, region.what, region.path, region.problem
        if memory.exe is not None and not memory.exe.moved and not memory.exe.elsewhere:
            yield memory.exe.kind.value, "exe", memory.exe.path, memory.exe.problem


def moved(process: Process) -> Iterator[Tuple[str, str]]:
    """(kind, what) of everything that was moved."""
    for table in process.tables:
        for number in table.moved:
            if number in table.held:
                yield table.held[number].kind.value, f"fd {number}"
        for holding in table.holdings:
            if not holding.attached and (holding.moved or holding.number in table.moved):
                yield holding.kind.value, holding.what
    for place in process.places():
        if place.moved:
            yield place.kind.value, place.kind.value
    for region in process.memory.regions if process.memory else ():
        if region.moved:
            yield region.kind.value, region.what


def lost(process: Process) -> Iterator[LeftReference]:
    """What did not survive the move of something else."""
    for table in process.tables:
        for kind, number, why in table.losses:
            path = table.held[number].path if number in table.held else None
            yield LeftReference(process.pid, process.command, kind.value, f"fd {number}", path, why)


def held(processes: Iterable[Process]) -> Iterator[HeldReference]:
    """Everything on the old mount."""
    for process in processes:
        for kind, what, path, problem in entries(process):
            yield HeldReference(process.pid, process.command, kind, what, path, process.problem or problem)


def left(processes: Iterable[Process]) -> List[LeftReference]:
    """What will stay, or has stayed, on the old mount because of a known problem."""
    return [
        LeftReference(one.pid, one.command, one.kind, one.what, one.path, one.reason)
        for one in held(processes)
        if one.reason is not None
    ]


def references(processes: Iterable[Process]) -> Dict[str, int]:
    """How many references of each kind there are."""
    counts: Dict[str, int] = {}
    for process in processes:
        for kind, _, _, _ in entries(process):
            counts[kind] = counts.get(kind, 0) + 1
    return counts
