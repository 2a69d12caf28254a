"""Whether the mappings of files in a process are those of a text of /proc/PID/maps, by PROCMAP_QUERY (Linux 6.11).

The kernel makes a structure for one mapping at a time, at a third of what it takes to write the lines of all: struct
procmap_query of include/uapi/linux/fs.h. All that is asked is known ahead, so that the queries are entries of a table
of calls.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import struct
from typing import Optional, Sequence

from spfs.linux.calls import CallTable, address_of

_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query)
_STRUCTURE = struct.Struct("<9QII24x")  # up to the device; names and build ids are not asked for
_NEXT_FILE = 0x10 | 0x20  # PROCMAP_QUERY_COVERING_OR_NEXT_VMA, PROCMAP_QUERY_FILE_BACKED_VMA
_FLAGS = {b"r": 1, b"w": 2, b"x": 4, b"s": 8}
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)", re.MULTILINE
)


class FileMappings:
    """What task ``tid`` has mapped of files, expected to be as ``maps`` says; ``add`` the queries, then ``same``.

    Owns a descriptor, of which ``close`` lets go. OSError: no such task, no descriptor to be had.
    """

    def __init__(self, tid: int, maps: bytes) -> None:
        self._queries, self._expected = bytearray(), b""
        self._first = self._count = 0
        address = 0
        expected = []
        for line in _LINE.finditer(maps):
            start, end, offset, major, minor = (int(line[group], 16) for group in (1, 2, 4, 5, 6))
            inode = int(line[7])
            if not (major or minor or inode):
                continue  # anonymous
            permissions = line[3]
            flags = sum(flag for letter, flag in _FLAGS.items() if letter in permissions)
            asked = (_STRUCTURE.size, _NEXT_FILE, address)
            self._queries += _STRUCTURE.pack(*asked, *[0] * 8)
            expected.append(_STRUCTURE.pack(*asked, start, end, flags, _PAGE, offset, inode, major, minor))
            address = end
        none = _STRUCTURE.pack(_STRUCTURE.size, _NEXT_FILE, address, *[0] * 8)
        self._queries += none
        self._expected = b"".join(expected) + none
        self._fd = os.open(f"/proc/{tid}/maps", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def add(self, calls: CallTable) -> None:
        """Append the queries to a table, which is to be run while this object lives."""
        self._first = len(calls)
        base = address_of(self._queries)
        for place in range(base, base + len(self._queries), _STRUCTURE.size):
            calls.add("ioctl", self._fd, _QUERY, place)
        self._count = len(calls) - self._first

    def same(self, outcome: Sequence[int]) -> bool:
        """After the table was run. False also for what cannot be told this way: mappings of huge pages."""
        last = self._first + self._count - 1
        return (
            outcome[last] == -errno.ENOENT
            and not any(outcome[self._first : last])
            and self._queries == self._expected
        )


@functools.lru_cache(maxsize=None)
def supported() -> bool:
    query = bytearray(_STRUCTURE.pack(_STRUCTURE.size, _NEXT_FILE, 0, *[0] * 8))
    fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _QUERY, query)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def expected_of(tid: int, maps: bytes) -> Optional[FileMappings]:
    """``FileMappings`` if the kernel has the queries and they can be had; otherwise the text is to be read."""
    try:
        return FileMappings(tid, maps) if supported() else None
    except OSError:
        return None
