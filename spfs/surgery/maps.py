"""Exchanges mappings of the old mount, and the link to the executable, in a tracee that runs tables of calls.

Shared mappings: written back, then the new file is mapped over them. Private ones: the new file is mapped aside, the
pages that are the process's own (not the file's) are copied there, then it is moved over the old mapping in one call.
Either way a mapping is the old or the new one, never a part of each. Copy-on-write sharing with a forked child ends.
"""

from __future__ import annotations

import array
import os
import struct
from typing import Dict, Generator, List, Sequence

from spfs.linux import procfs
from spfs.linux.calls import ENTRY, CallTable, results
from spfs.surgery import message
from spfs.surgery.records import Memory, Region
from spfs.tracee import PAGE, USER, Script, Tracee, Wait

_MS_SYNC = 4
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_NORESERVE = 1, 2, 0x10, 0x4000
_MREMAP_REPLACE = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED
_PROT = {"r": 1, "w": 2, "x": 4}
_ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16}  # VmFlags -> madvise(2)
_REFUSED = {
    "um": "is registered with userfaultfd",
    "uw": "is registered with userfaultfd",
    "ui": "is registered with userfaultfd",
    "pkey": "has a protection key",
    "sl": "is sealed (mseal)",
}
_PRESENT, _SWAPPED, _OF_FILE, _GUARD = 1 << 63, 1 << 62, 1 << 61, 1 << 58  # pagemap, proc(5)
_COPY = 4 << 20  # bytes at once
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_MM_MAP = struct.Struct("<11QQII")


def space(memory: Memory) -> int:
    """Bytes behind USER that ``script`` may need."""
    return message.size(len(memory.regions) + 1) + (5 + len(_ADVICE)) * ENTRY * (len(memory.regions) + 1) + PAGE


def script(tracee: Tracee, memory: Memory, most: int) -> Script:
    """Exchange all that can be; the records tell what was. ``most``: descriptors the tracee can receive at once."""
    for region in memory.regions:
        for flag, why in _REFUSED.items():
            if flag in region.flags and region.problem is None:
                region.problem = why
    regions = [region for region in memory.regions if region.problem is None and region.new >= 0]
    while regions:
        fds: List[int] = []
        now: List[Region] = []
        for region in regions:
            if region.new in fds or len(fds) < most:
                now.append(region)
                fds += [region.new] if region.new not in fds else []
        regions = [region for region in regions if region not in now]
        yield from _exchange(tracee, now, fds)
    if memory.exe is not None and memory.exe.problem is None and memory.exe.new >= 0:
        yield from _executable(tracee, memory)


def _exchange(tracee: Tracee, regions: List[Region], fds: List[int]) -> Script:
    calls = CallTable()
    data, slots = message.receive(calls, tracee.base, tracee.base + USER, len(fds))
    syncs = {
        calls.add("msync", r.mapping.start, r.mapping.end - r.mapping.start, _MS_SYNC): r
        for r in regions
        if r.mapping.shared
    }
    outcome = yield from _run(tracee, calls, data, [fds])
    for entry, region in syncs.items():
        if outcome[entry] < 0:
            region.problem = f"it cannot be written back: {os.strerror(-outcome[entry])}"
    received = array.array("i", tracee.read(slots[0], 4 * len(fds)))
    theirs = dict(zip(fds, received))

    calls = CallTable()
    shared: Dict[int, Region] = {}
    private: Dict[int, Region] = {}
    for region in regions:
        if region.problem is not None:
            continue
        start, length, protection, fd = _arguments(region, theirs)
        flags = _MAP_NORESERVE if "nr" in region.flags else 0
        if region.mapping.shared:
            flags |= _MAP_SHARED | _MAP_FIXED
            shared[calls.add("mmap", start, length, protection, flags, fd, region.mapping.offset)] = region
        else:
            flags |= _MAP_PRIVATE
            private[calls.add("mmap", 0, length, protection, flags, fd, region.mapping.offset)] = region
    outcome = yield from _run(tracee, calls)
    for entry, region in shared.items():
        _settle(region, outcome[entry])

    calls = CallTable()
    moves: Dict[int, Region] = {}
    for entry, region in private.items():
        aside, length = outcome[entry], region.mapping.end - region.mapping.start
        if aside < 0:
            _settle(region, aside)
            continue
        try:
            _copy_own_pages(tracee, region, aside)
        except OSError as error:
            region.problem = f"its pages cannot be copied: {error.strerror}"
            calls.add("munmap", aside, length)
            continue
        moves[calls.add("mremap", aside, length, length, _MREMAP_REPLACE, region.mapping.start)] = region
        # Only left there if the move failed: otherwise nothing is at that address any more.
        calls.add("munmap", aside, length)
    for region in regions:
        _advise(calls, region)
    for fd in received:
        calls.add("close", fd)
    outcome = yield from _run(tracee, calls)
    for entry, region in moves.items():
        _settle(region, outcome[entry])


def _arguments(region: Region, theirs: Dict[int, int]) -> "tuple[int, int, int, int]":
    protection = sum(bit for letter, bit in _PROT.items() if letter in region.mapping.permissions)
    return region.mapping.start, region.mapping.end - region.mapping.start, protection, theirs[region.new]


def _settle(region: Region, result: int) -> None:
    if result < 0:
        region.problem = f"it cannot be mapped from the new mount: {os.strerror(-result)}"
    else:
        region.moved = True


def _advise(calls: CallTable, region: Region) -> None:
    start, length = region.mapping.start, region.mapping.end - region.mapping.start
    for flag, advice in _ADVICE.items():
        if flag in region.flags:
            calls.add("madvise", start, length, advice)
    if "lo" in region.flags:
        calls.add("mlock2", start, length, 1 if "lf" in region.flags else 0)  # MLOCK_ONFAULT


def _copy_own_pages(tracee: Tracee, region: Region, aside: int) -> None:
    start = region.mapping.start
    count = (region.mapping.end - start) // PAGE
    fd = os.open(f"/proc/{tracee.tid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pages = array.array("Q")
        while len(pages) < count:
            part = os.pread(fd, min(1 << 20, 8 * (count - len(pages))), 8 * (start // PAGE + len(pages)))
            if not part:
                raise OSError(5, "pagemap ends early")
            pages.frombytes(part)
    finally:
        os.close(fd)
    if any(page & _GUARD for page in pages):
        raise OSError(95, "it has guard pages")
    index = 0
    while index < count:
        if not _own(pages[index]):
            index += 1
            continue
        first = index
        while index < count and _own(pages[index]) and (index - first) * PAGE < _COPY:
            index += 1
        # By /proc/PID/mem, which reads and writes whatever the protection is, as for a debugger.
        tracee.write(aside + first * PAGE, tracee.read(start + first * PAGE, (index - first) * PAGE))


def _own(page: int) -> bool:
    """Whether a page of a private mapping has been written to: it is anonymous then, in memory or swapped out."""
    return bool(page & (_PRESENT | _SWAPPED)) and not page & _OF_FILE


def _executable(tracee: Tracee, memory: Memory) -> Script:
    """Exchange what /proc/PID/exe shows; refused while any mapping of the old executable is left (EBUSY)."""
    exe = memory.exe
    assert exe is not None
    calls = CallTable()
    data, slots = message.receive(calls, tracee.base, tracee.base + USER, 1)
    brk = calls.add("brk", 0)
    outcome = yield from _run(tracee, calls, data, [[exe.new]])
    (fd,) = struct.unpack("<i", tracee.read(slots[0], 4))
    fields = procfs.parse_stat(procfs.read(f"/proc/{tracee.tid}/stat")).fields
    # proc(5) counts from 1, and ``fields`` begins with the third.
    code = [int(fields[n - 3]) for n in (26, 27, 45, 46, 47)]
    rest = [int(fields[n - 3]) for n in (28, 48, 49, 50, 51)]
    layout = _MM_MAP.pack(*code, outcome[brk], *rest, 0, 0, fd)
    calls = CallTable()
    entry = calls.add("prctl", _PR_SET_MM, _PR_SET_MM_MAP, tracee.base + USER, len(layout), 0)
    calls.add("close", fd)
    outcome = yield from _run(tracee, calls, layout)
    if outcome[entry] < 0:
        exe.problem = f"the process may not change it: {os.strerror(-outcome[entry])}"
    else:
        exe.moved = True


def _run(
    tracee: Tracee, calls: CallTable, data: bytes = b"", fds: Sequence[Sequence[int]] = ()
) -> "Generator[Wait, None, array.array[int]]":
    """Run a table that lies behind ``data`` at USER; its results."""
    if not len(calls):
        return array.array("q")
    data += bytes(-len(data) % ENTRY)
    table = tracee.base + USER + len(data)
    tracee.write(tracee.base + USER, data + calls.encode())
    yield from tracee.run(table, len(calls), fds)
    return results(tracee.read(table, len(calls) * ENTRY))
