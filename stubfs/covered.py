"""Directories that were mountpoints on a mount that is being taken off: who is on his way there starts anew.

With the mount go the mounts on it. A walk that has come as far as our directory beneath one of them when that happens
finds it uncovered, and would see what is in there instead of what was mounted. ESTALE makes the kernel walk the whole
path again (path_openat() and retry_estale() in fs/namei.c), which leads to the new mount.
"""

from __future__ import annotations

import os
from typing import AbstractSet

from stubfs import protocol
from stubfs.callers import shows_device
from stubfs.protocol import Opcode
from stubfs.request import Request
from stubfs.rules import ActiveRule, PathsOf, Rule

# By a path, to the directory itself; what is done to names in it begins with a lookup.
_BY_PATH = frozenset(
    (
        Opcode.OPEN, Opcode.OPENDIR, Opcode.GETATTR, Opcode.STATX, Opcode.SETATTR, Opcode.ACCESS, Opcode.STATFS,
        Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.SETXATTR, Opcode.REMOVEXATTR,
    )
)  # fmt: skip


class Covered(ActiveRule):
    """``paths``: relative to the root; ``device``: our st_dev, by which a caller's mounts are told from others."""

    def __init__(self, paths: AbstractSet[bytes], device: int) -> None:
        super().__init__(Rule("fail", errno="ESTALE"))
        self._paths = paths
        self._device = device

    def may_concern_caches(self) -> bool:
        return False  # pages are not what is walked over, and attributes are asked for as long as there is any rule

    def decides(self, request: Request, paths_of: PathsOf) -> bool:
        """Looks into /proc, as root, for what is beneath a mountpoint: rarely, for nobody comes there else."""
        opcode = request.opcode
        if opcode in _BY_PATH:
            found = any(path in self._paths for path in paths_of(request))
        else:
            # Not the lookup of the mountpoint itself: the kernel, told that a name is none, unmounts what is there.
            found = opcode in protocol.NAME_OFFSETS and any(
                os.path.dirname(path) in self._paths for path in paths_of(request)
            )
        # As long as we are mounted where he is, a mountpoint is covered, and whoever is beneath has come by a
        # descriptor.
        return found and not shows_device(request.tid, self._device)
