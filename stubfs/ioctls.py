"""The ioctls that are passed on to the file behind: those of a fixed size, about one file, and harmless to others.

FUSE hands over an ioctl's argument as bytes, as many as its number says. So one whose argument holds a pointer or a
descriptor, or is longer than that, would be misunderstood; and one that acts on a whole file system (a trim, a resize)
would act on more than the mount shows. All of these are ENOTTY, as are those that we do not know.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Dict, NamedTuple

_INT = 4  # bytes


class _Passed(NamedTuple):
    command: int  # as the system that we run on has it
    size: int  # bytes that it reads or writes


# linux/fs.h. The number says "long" of the first four, but all that is read and written is an int: more in the answer
# would overwrite what lies behind it in the caller's memory. Programs of 32 bits use numbers of their own.
_GETFLAGS, _SETFLAGS = _Passed(0x80086601, _INT), _Passed(0x40086602, _INT)
_GETVERSION, _SETVERSION = _Passed(0x80087601, _INT), _Passed(0x40087602, _INT)
_PASSED: Dict[int, _Passed] = {
    **{passed.command: passed for passed in (_GETFLAGS, _SETFLAGS, _GETVERSION, _SETVERSION)},
    0x80046601: _GETFLAGS,
    0x40046602: _SETFLAGS,
    0x80047601: _GETVERSION,
    0x40047602: _SETVERSION,
    0x801C581F: _Passed(0x801C581F, 28),  # FS_IOC_FSGETXATTR, struct fsxattr
    0x401C5820: _Passed(0x401C5820, 28),  # FS_IOC_FSSETXATTR
}
_WRITES = 0x40000000  # _IOC_WRITE in the number: the caller's argument is read; else it is written


def perform(fd: int, command: int, argument: bytes) -> bytes:
    """What is to be copied back to the caller. OSError: ENOTTY for what is not passed on, else what ioctl(2) says."""
    passed = _PASSED.get(command)
    if passed is None:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    reads = bool(command & _WRITES)
    if reads and len(argument) < passed.size:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    # Larger than what is written, so that a file system that takes the number at its word does no harm.
    result = fcntl.ioctl(fd, passed.command, argument[: passed.size].ljust(64, b"\0"))
    return b"" if reads else result[: passed.size]
