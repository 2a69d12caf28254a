"""openat2(2) as the controller side uses it: text paths, close-on-exec. The call itself is ``stubfs.syscalls``'."""

from __future__ import annotations

import os

from stubfs import syscalls

RESOLVE_NO_MAGICLINKS = int(syscalls.Resolve.NO_MAGICLINKS)
RESOLVE_NO_SYMLINKS = int(syscalls.Resolve.NO_SYMLINKS)
RESOLVE_BENEATH = int(syscalls.Resolve.BENEATH)
RESOLVE_IN_ROOT = int(syscalls.Resolve.IN_ROOT)


def openat2(dirfd: int, path: str, flags: int, resolve: int) -> int:
    """Open ``path`` as openat(2) does, bound by ``resolve``; the fd is close-on-exec and the caller's."""
    return syscalls.openat2(dirfd, os.fsencode(path), flags, 0, resolve)
