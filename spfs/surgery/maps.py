"""Exchanges the mappings of the old mount in a tracee that runs tables of calls.

A mapping without pages of the process's own is mapped anew over itself, in one call. One with such pages (a private
one that was written to) is mapped aside first; the tracee copies its pages there with process_vm_readv(2), which
reports what a copying instruction would be killed for; then it is moved over the old one, which frees that one's
pages: piece by piece, so that no more than ``COPIED`` bytes are there twice, and fewer where a cgroup's limit is near.
Copy-on-write sharing with a forked child ends there.
"""

from __future__ import annotations

import array
import logging
import os
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Tuple

from spfs.linux.arch import LOAD_ARGUMENT_0, LOAD_ARGUMENT_4
from spfs.linux.calls import ENTRY, CallTable, result_address
from spfs.linux.pagemap import PageMap, Pages, Range, Runs
from spfs.surgery import headroom, message
from spfs.surgery.records import Memory, Process, Region
from spfs.surgery.tables import run_table
from spfs.tracee import PAGE, USER, Script, Tracee

_log = logging.getLogger(__name__)

COPIED = 8 << 20  # bytes copied before the old pages are freed
LEAST = 64 << 10  # bytes; with less to spare nothing is copied
_RUNS = 1024  # UIO_MAXIOV of process_vm_readv(2)
_POPULATED = 16 * PAGE  # a run that is worth a call of its own to have its pages made at once

_MS_SYNC = 4
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_NORESERVE = 1, 2, 0x10, 0x4000
_MREMAP_REPLACE = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED
_READ, _WRITE = 1, 2
_PROT = {"r": _READ, "w": _WRITE, "x": 4}
_POPULATE_WRITE, _GUARD_INSTALL = 23, 102  # madvise(2)
_MLOCK_ONFAULT = 1
_READ_AHEAD = 128 << 10  # bytes; the kernel cuts a longer wish to what the device's settings allow

# VmFlags of smaps, proc(5) -> madvise(2). What a mapping of a file cannot have (WIPEONFORK) is not there.
_ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16}
_REFUSED = {
    "um": "is registered with userfaultfd",
    "uw": "is registered with userfaultfd",
    "ui": "is registered with userfaultfd",
    "pkey": "has a protection key",
    "sl": "is sealed (mseal)",
    "gd": "grows downwards",
}


@dataclass(eq=False)
class _Mapping:
    """A region that is being exchanged."""

    region: Region
    pages: Pages
    aside: int = 0  # where its replacement lies for the time being; 0: it goes directly to where it belongs

    @property
    def start(self) -> int:
        return self.region.mapping.start

    @property
    def length(self) -> int:
        return self.region.mapping.end - self.start

    @property
    def protection(self) -> int:
        return sum(bit for letter, bit in _PROT.items() if letter in self.region.mapping.permissions)

    @property
    def needs_writing(self) -> bool:
        """Whether it has to be writable at first: to be filled, or because it was, and so has its memory reserved
        (VM_ACCOUNT): otherwise it could later be refused to be made writable again."""
        if self.region.mapping.shared:
            return False
        return bool(self.pages.own) or "ac" in self.region.flags and not self.protection & _WRITE

    @property
    def written_back(self) -> bool:
        """Whether there can be pages that its file system does not know of yet."""
        return self.region.mapping.shared and "mw" in self.region.flags

    def there(self, address: int) -> int:
        """The address in the replacement for one of the mapping."""
        return self.aside + address - self.start


class _Piece(NamedTuple):
    """A part of a mapping that is moved at once; ``runs`` are its pages that have to be copied."""

    mapping: _Mapping
    start: int
    end: int
    runs: Runs

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def is_first(self) -> bool:
        return self.start == self.mapping.start

    @property
    def is_last(self) -> bool:
        return self.end == self.mapping.start + self.mapping.length


def read_ahead(processes: Iterable[Process]) -> None:
    """Have the new files' pages read (in the background) that will be wanted in the blackout: beneath pages to be
    copied, since a private page is made from the file's, and all of a locked mapping. Nothing needs to stand still."""
    for process in processes:
        memory = process.memory
        if memory is None or process.problem is not None:
            continue
        try:
            with PageMap(memory.tid) as page_map:
                for region in memory.regions:
                    if region.new >= 0 and (not region.mapping.shared or "lo" in region.flags):
                        _read_ahead(page_map, region)
        except OSError as error:
            _log.debug("process %d: nothing is read ahead: %s", process.pid, error)


def _read_ahead(page_map: PageMap, region: Region) -> None:
    start, end = region.mapping.start, region.mapping.end
    for run in [Range(start, end)] if "lo" in region.flags else page_map.pages(start, end).own:
        for address in range(run.start, run.end, _READ_AHEAD):
            offset = region.mapping.offset + address - start
            os.posix_fadvise(region.new, offset, min(_READ_AHEAD, run.end - address), os.POSIX_FADV_WILLNEED)


class Exchange:
    """The exchange of all mappings of an address space whose users stand still; the records tell what was."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._mappings: List[_Mapping] = []
        with PageMap(memory.tid) as page_map:
            for region in memory.regions:
                for flag, why in _REFUSED.items():
                    if flag in region.flags and region.problem is None:
                        region.problem = why
                if region.problem is None and region.new >= 0:
                    try:
                        pages = page_map.pages(region.mapping.start, region.mapping.end)
                    except OSError as error:
                        region.problem = f"what is the process's own in it cannot be told: {error.strerror}"
                        continue
                    self._mappings.append(_Mapping(region, pages))

    @property
    def space(self) -> int:
        """Bytes behind USER that ``script`` may need."""
        calls = 2 * COPIED // _POPULATED + len(self._mappings) * (8 + len(_ADVICE))
        calls += sum(len(mapping.pages.guards) for mapping in self._mappings)
        return calls * ENTRY + max(2 * 16 * _RUNS, message.size(len(self._mappings))) + PAGE

    def script(self, tracee: Tracee, most: int) -> Script:
        """``most``: descriptors the tracee can receive at once."""
        yield from self._write_back(tracee)
        waiting = [mapping for mapping in self._mappings if mapping.region.problem is None]
        while waiting:
            fds: List[int] = []
            now: List[_Mapping] = []
            for mapping in waiting:
                if mapping.region.new in fds or len(fds) < most:
                    now.append(mapping)
                    fds += [mapping.region.new] if mapping.region.new not in fds else []
            waiting = [mapping for mapping in waiting if mapping not in now]
            yield from self._map(tracee, now, fds)
            for batch in _batches([mapping for mapping in now if mapping.aside], self._allowance):
                yield from self._copy(tracee, batch)
                yield from self._move(tracee, batch)

    def _allowance(self) -> int:
        return headroom.allowance(self._memory, COPIED)

    def _write_back(self, tracee: Tracee) -> Script:
        calls = CallTable()
        dirty = [mapping for mapping in self._mappings if mapping.written_back]
        for mapping in dirty:
            calls.add("msync", mapping.start, mapping.length, _MS_SYNC)
        outcome = yield from run_table(tracee, calls)
        for result, mapping in zip(outcome, dirty):
            if result < 0:
                mapping.region.problem = f"it cannot be written back: {os.strerror(-result)}"

    @staticmethod
    def _map(tracee: Tracee, mappings: List[_Mapping], fds: List[int]) -> Script:
        """Map anew: what has nothing to be copied directly, the others aside."""
        calls = CallTable()
        data, slots = message.receive(calls, tracee.base, tracee.base + USER, len(fds))
        slot_of = dict(zip(fds, slots))
        entries: List[int] = []
        locks: Dict[int, Region] = {}
        for mapping in mappings:
            flags = _MAP_NORESERVE if "nr" in mapping.region.flags else 0
            flags |= _MAP_SHARED if mapping.region.mapping.shared else _MAP_PRIVATE
            start, protection = mapping.start, mapping.protection
            if mapping.needs_writing:
                start, protection = 0, _READ | _WRITE
            else:
                flags |= _MAP_FIXED
            arguments = (start, mapping.length, protection, flags, slot_of[mapping.region.new])
            entries.append(calls.add("mmap", *arguments, mapping.region.mapping.offset, load=LOAD_ARGUMENT_4))
            if not mapping.needs_writing:
                locks.update(_advise(calls, mapping))
        for slot in slots:
            calls.add("close", slot, load=LOAD_ARGUMENT_0)
        outcome = yield from run_table(tracee, calls, data, [fds])
        for entry, mapping in zip(entries, mappings):
            result = outcome[entry]
            if result < 0:
                mapping.region.problem = f"it cannot be mapped from the new mount: {os.strerror(-result)}"
            elif mapping.needs_writing:
                mapping.aside = result
            else:
                mapping.region.moved = True
        _warn_of_locks(tracee, locks, outcome)

    @staticmethod
    def _copy(tracee: Tracee, batch: List[_Piece]) -> Script:
        """Fill the pieces, and give them the protection they will have: what can fail without harm."""
        address = tracee.base + USER
        vectors = bytearray()
        reads: List[Tuple[int, int]] = []  # addresses of the two vectors of each piece
        sizes = [piece.runs.lengths() for piece in batch]
        for piece, lengths in zip(batch, sizes):
            reads.append((address + len(vectors), address + len(vectors) + 16 * len(lengths)))
            there = map((piece.mapping.aside - piece.mapping.start).__add__, piece.runs.starts)
            vectors += _vector(array.array("Q", there), lengths) + _vector(piece.runs.starts, lengths)
        calls = CallTable()
        own_id = result_address(address + len(vectors) + -len(vectors) % ENTRY, calls.add("gettid"))
        copies: List[int] = []
        protections: Dict[int, _Piece] = {}
        for piece, lengths, (local, remote) in zip(batch, sizes, reads):
            mapping = piece.mapping
            if piece.is_first and not mapping.protection & _READ:
                calls.add("mprotect", mapping.start, mapping.length, _READ)
            for start, length in zip(piece.runs.starts, lengths):
                if length >= _POPULATED:
                    # Cheaper than a fault for each; unknown before Linux 5.14, and what fails there fails below.
                    calls.add("madvise", mapping.there(start), length, _POPULATE_WRITE)
            count = len(lengths)
            arguments = (own_id, local, count, remote, count, 0)
            copies.append(calls.add("process_vm_readv", *arguments, load=LOAD_ARGUMENT_0))
            if mapping.protection != _READ | _WRITE:
                protections[calls.add("mprotect", mapping.there(piece.start), piece.length, mapping.protection)] = piece
        outcome = yield from run_table(tracee, calls, bytes(vectors))
        for entry, piece, lengths in zip(copies, batch, sizes):
            result = outcome[entry]
            if result != sum(lengths):
                why = os.strerror(-result) if result < 0 else "not all of them can be had"
                _fail(piece, f"its pages cannot be copied: {why}")
        for entry, piece in protections.items():
            if outcome[entry] < 0:
                _fail(piece, f"it cannot have the same protection: {os.strerror(-outcome[entry])}")

    @staticmethod
    def _move(tracee: Tracee, batch: List[_Piece]) -> Script:
        """Put the filled pieces in place; take away what is left of the mappings that failed."""
        calls = CallTable()
        moves: Dict[int, _Piece] = {}
        locks: Dict[int, Region] = {}
        for piece in batch:
            mapping = piece.mapping
            there = mapping.there(piece.start)
            if mapping.region.problem is None:
                arguments = (there, piece.length, piece.length, _MREMAP_REPLACE, piece.start)
                moves[calls.add("mremap", *arguments)] = piece
                if piece.is_last:
                    locks.update(_advise(calls, mapping))
            elif not mapping.protection & _READ:
                calls.add("mprotect", piece.start, piece.length, mapping.protection)
            # If it was moved, there is nothing any more. In a process that stands still, nobody else maps there.
            calls.add("munmap", there, piece.length)
        outcome = yield from run_table(tracee, calls)
        failed = CallTable()
        for entry, piece in moves.items():
            if outcome[entry] < 0:
                _fail(piece, f"it cannot be put in place: {os.strerror(-outcome[entry])}")
                if not piece.mapping.protection & _READ:
                    failed.add("mprotect", piece.start, piece.length, piece.mapping.protection)
            elif piece.is_last:
                piece.mapping.region.moved = piece.mapping.region.problem is None
        _warn_of_locks(tracee, locks, outcome)
        yield from run_table(tracee, failed)


def _batches(mappings: List[_Mapping], allowance: Callable[[], int]) -> Iterator[List[_Piece]]:
    """All of the mappings in pieces, with at most ``allowance`` bytes and _RUNS runs to be copied at once.

    One that failed, or for which there are not LEAST bytes, is not copied any further.
    """
    batch: List[_Piece] = []
    size = count = 0
    most = allowance()
    for mapping in mappings:
        start, runs = mapping.start, Runs()
        own, done = Runs(mapping.pages.own.starts, mapping.pages.own.ends), 0
        while done < len(own) and mapping.region.problem is None:
            first = own.starts[done]
            if size and size == most or count == _RUNS:
                # Of one that has only been come to, there is nothing yet: no call takes an empty range.
                yield batch + ([_Piece(mapping, start, first, runs)] if first > start else [])
                batch, start, runs, size, count = [], first, Runs(), 0, 0
                most = allowance()
            if most < LEAST:
                why = f"its pages cannot be copied: its memory cgroup is {most >> 10} KiB from its limit"
                _fail(_Piece(mapping, start, first, Runs()), why)
                break
            part, done = own.part(done, _RUNS - count, most - size)
            runs.extend(part.starts, part.ends)
            size, count = size + sum(part.lengths()), count + len(part)
        batch.append(_Piece(mapping, start, mapping.start + mapping.length, runs))
    if batch:
        yield batch


def _vector(starts: "array.array[int]", lengths: "array.array[int]") -> bytes:
    """An array of struct iovec."""
    vector = array.array("Q", bytes(16 * len(starts)))
    vector[::2], vector[1::2] = starts, lengths
    return vector.tobytes()


def _fail(piece: _Piece, why: str) -> None:
    region = piece.mapping.region
    if region.problem is None:
        region.problem = why if piece.is_first else f"from {piece.start:x} on: {why}"


def _advise(calls: CallTable, mapping: _Mapping) -> Dict[int, Region]:
    """What mapping anew does not keep; the entry that locks the region, if it is locked."""
    region = mapping.region
    for flag, advice in _ADVICE.items():
        if flag in region.flags:
            calls.add("madvise", mapping.start, mapping.length, advice)
    for guard in mapping.pages.guards:  # not possible any more in locked memory
        calls.add("madvise", guard.start, guard.end - guard.start, _GUARD_INSTALL)
    if "lo" not in region.flags:
        return {}
    on_fault = bool({"lf", "??"} & region.flags)  # smaps had no letters for it before Linux 6.4
    return {calls.add("mlock2", mapping.start, mapping.length, _MLOCK_ONFAULT if on_fault else 0): region}


def _warn_of_locks(tracee: Tracee, locks: Dict[int, Region], outcome: "array.array[int]") -> None:
    for entry, region in locks.items():
        if outcome[entry] < 0:
            why = os.strerror(-outcome[entry])
            _log.warning("%s of process %d could not be locked in memory again: %s", region.what, tracee.pid, why)
