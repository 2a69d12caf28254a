"""openat2(2): paths that are resolved without leaving a directory. glibc has no wrapper for it."""

from __future__ import annotations

import ctypes
import os

from stubfs.libc import bind_syscall

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_NUMBER = 437  # the same on every architecture since it came in Linux 5.6


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


_openat2 = bind_syscall("openat2", _NUMBER, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)


def openat2(dirfd: int, path: str, flags: int, resolve: int) -> int:
    """Open ``path`` as openat(2) does, bound by ``resolve``; the fd is close-on-exec and the caller's."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    return _openat2(dirfd, os.fsencode(path), ctypes.addressof(how), ctypes.sizeof(how))
