"""Which pages of a mapping are the process's own, and which are guards: /proc/PID/pagemap.

By its PAGEMAP_SCAN ioctl (Linux 6.7), which passes over what is not populated; else by its 64-bit entries, one for
each page. Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import array
import bisect
import errno
import fcntl
import itertools
import operator
import os
import re
import struct
from mmap import PAGESIZE
from typing import Iterable, Iterator, NamedTuple, Tuple

_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_ARGUMENT = struct.Struct("<12Q")
_FILE, _PRESENT, _SWAPPED, _GUARD = 1 << 2, 1 << 3, 1 << 4, 1 << 8  # categories
_WALK_END = 4  # index of the field that says how far the kernel came
_RANGES = 1024  # per call

# The same as bits of an entry's last byte.
_BYTE_PRESENT, _BYTE_SWAPPED, _BYTE_FILE, _BYTE_GUARD = 0x80, 0x40, 0x20, 0x04
_ENTRIES = 1 << 19  # read at once
_MOST_ENTRIES = 1 << 24  # 64 GiB of 4 KiB pages, looked through in a tenth of a second


class Range(NamedTuple):
    """Addresses from ``start`` to before ``end``, multiples of the page size."""

    start: int
    end: int


class Runs:
    """Ranges in ascending order. There can be a hundred thousand of them: the interpreter does nothing for each."""

    def __init__(self, starts: "Iterable[int]" = (), ends: "Iterable[int]" = ()) -> None:
        self.starts, self.ends = array.array("Q", starts), array.array("Q", ends)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Range]:
        return map(Range, self.starts, self.ends)

    def lengths(self) -> "array.array[int]":
        """Bytes of each."""
        return array.array("Q", map(operator.sub, self.ends, self.starts))

    def extend(self, starts: "array.array[int]", ends: "array.array[int]") -> None:
        """Append ranges that lie behind these; the first of them may continue the last one here."""
        if self.ends and starts and self.ends[-1] == starts[0]:
            self.ends.pop()
            starts = starts[1:]
        self.starts += starts
        self.ends += ends

    def append(self, start: int, end: int) -> None:
        self.extend(array.array("Q", [start]), array.array("Q", [end]))

    def part(self, first: int, count: int, size: int) -> "Tuple[Runs, int]":
        """At most ``count`` ranges from number ``first`` on, of at most ``size`` bytes together; and the number of what
        comes behind them, which begins later from now on if its first bytes are among them."""
        starts, ends = self.starts[first : first + count], self.ends[first : first + count]
        sizes = list(itertools.accumulate(map(operator.sub, ends, starts), initial=0))
        whole = bisect.bisect_right(sizes, size) - 1
        taken = Runs(starts[:whole], ends[:whole])
        if whole < len(starts) and sizes[whole] < size:
            cut = starts[whole] + size - sizes[whole]
            taken.append(starts[whole], cut)
            self.starts[first + whole] = cut
        return taken, first + whole


class Pages(NamedTuple):
    """``own``: written to, of a private mapping (anonymous now, in memory or swapped out). ``guards``: madvise(2)'s
    MADV_GUARD_INSTALL."""

    own: Runs
    guards: Runs


def _entry_class(of_guards: bool) -> "re.Pattern[bytes]":
    wanted = [
        byte
        for byte in range(256)
        if byte & (_BYTE_PRESENT | _BYTE_SWAPPED)
        and not byte & _BYTE_FILE
        and bool(byte & _BYTE_GUARD) == of_guards
    ]
    return re.compile(b"[" + b"".join(b"\\x%02x" % byte for byte in wanted) + b"]+")


_OWN_ENTRIES, _GUARD_ENTRIES = _entry_class(False), _entry_class(True)


class PageMap:
    """The page map of task ``tid``, which should stand still. A context manager that closes its descriptor.

    ``by_entry``: read the entries although the kernel has the ioctl.
    """

    def __init__(self, tid: int, by_entry: bool = False) -> None:
        self._fd = os.open(f"/proc/{tid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._ranges = array.array("Q", bytes(24 * _RANGES))
        self._by_entry = by_entry
        self._guard = _GUARD  # 0 for a kernel that knows no such category, and has no guards in files (before 6.15)

    def __enter__(self) -> "PageMap":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def pages(self, start: int, end: int) -> Pages:
        """What lies between two addresses. OSError, such as ESRCH for a process that has ended, and EFBIG."""
        if not self._by_entry:
            try:
                return self._scan(start, end)
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
            if self._guard:
                self._guard = 0
                return self.pages(start, end)
            self._by_entry = True
        return self._read(start, end)

    def _scan(self, start: int, end: int) -> Pages:
        pages = Pages(Runs(), Runs())
        while start < end:
            unwanted, wanted = _FILE, _PRESENT | _SWAPPED
            argument = bytearray(
                _ARGUMENT.pack(
                    *(_ARGUMENT.size, 0, start, end, 0, self._ranges.buffer_info()[0], _RANGES, 0),
                    *(unwanted, unwanted, wanted, self._guard),
                )
            )
            count = fcntl.ioctl(self._fd, _SCAN, argument)
            found = self._ranges[: 3 * count]
            firsts, lasts, categories = found[::3], found[1::3], found[2::3]
            if not any(categories):
                pages.own.extend(firsts, lasts)
            else:
                for first, last, category in zip(firsts, lasts, categories):
                    (pages.guards if category & _GUARD else pages.own).append(first, last)
            if count < _RANGES:
                break
            # The kernel may have come farther: what it told stays if its own, smaller buffer was full in between.
            start = max(lasts[-1], _ARGUMENT.unpack(argument)[_WALK_END])
        return pages

    def _read(self, start: int, end: int) -> Pages:
        pages = Pages(Runs(), Runs())
        if (end - start) // PAGESIZE > _MOST_ENTRIES:
            raise OSError(errno.EFBIG, "it is too large for a kernel without PAGEMAP_SCAN (before Linux 6.7)")
        while start < end:
            count = min(_ENTRIES, (end - start) // PAGESIZE)
            # Of each entry the byte that has the bits in question.
            marks = os.pread(self._fd, 8 * count, 8 * (start // PAGESIZE))[7::8]
            if not marks:
                raise OSError(errno.ESRCH, "the page map ends early")
            for found, pattern in ((pages.own, _OWN_ENTRIES), (pages.guards, _GUARD_ENTRIES)):
                for match in pattern.finditer(marks):
                    found.append(start + match.start() * PAGESIZE, start + match.end() * PAGESIZE)
            start += len(marks) * PAGESIZE
        return pages
