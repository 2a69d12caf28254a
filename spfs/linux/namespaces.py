"""setns(2), unshare(2) and what belongs to them; Python has both only since 3.12.

setns into a mount or user namespace wants a single-threaded process: ``spfs.nschild`` forks one.
"""

from __future__ import annotations

import ctypes
import os
from typing import Dict

from stubfs.libc import bind

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# In the order in which they are joined. The user namespace comes last: joining it gives up the capabilities over
# namespaces that belong to other user namespaces.
NAMESPACES: Dict[str, int] = {
    "cgroup": CLONE_NEWCGROUP,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "net": CLONE_NEWNET,
    "pid": CLONE_NEWPID,
    "mnt": CLONE_NEWNS,
    "user": CLONE_NEWUSER,
}

PR_SET_PDEATHSIG = 1

_setns = bind("setns", ctypes.c_int, ctypes.c_int)
_unshare = bind("unshare", ctypes.c_int)
_prctl = bind("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)


def setns(fd: int, kind: int = 0) -> None:
    """Join the namespace of ``fd``; OSError EINVAL if it is not of ``kind`` or this process has threads."""
    _setns(fd, kind)


def unshare(flags: int) -> None:
    _unshare(flags)


def die_with_parent(signal: int) -> None:
    """Be sent ``signal`` when the *thread* that forked this process ends (prctl(2), PR_SET_PDEATHSIG)."""
    _prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0)


def inode(pid: object, name: str) -> int:
    """The inode number of namespace ``name`` of ``pid`` (a number or "self"), which identifies it while it lives."""
    return os.stat(f"/proc/{pid}/ns/{name}").st_ino
