"""The mount system calls, old (mount, umount2) and new (open_tree … mount_setattr), each under its own name.

Mechanism only: which mount goes where is decided in ``spfs.mounts`` and ``spfs.realmount``. Every function raises
OSError; every returned fd is close-on-exec and the caller's. Constants: include/uapi/linux/mount.h.
"""

from __future__ import annotations

import ctypes
import enum
import os
from typing import List, Optional

from stubfs.libc import bind

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8


class MoveMount(enum.IntFlag):
    F_EMPTY_PATH = 0x4
    T_SYMLINKS = 0x10
    T_EMPTY_PATH = 0x40
    SET_GROUP = 0x100  # since Linux 5.15
    BENEATH = 0x200  # since Linux 6.5


class FsConfig(enum.IntEnum):
    SET_FLAG = 0
    SET_STRING = 1
    SET_FD = 5
    CMD_CREATE = 6
    CMD_RECONFIGURE = 7


class MountAttr(enum.IntFlag):
    """Per-mount attributes of fsmount(2) and mount_setattr(2)."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    NOATIME = 0x10
    STRICTATIME = 0x20
    ATIME_MASK = 0x70
    NODIRATIME = 0x80
    NOSYMFOLLOW = 0x200000


class MS(enum.IntFlag):
    """The flags of mount(2)."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    SYNCHRONOUS = 16
    REMOUNT = 32
    MANDLOCK = 64
    DIRSYNC = 128
    NOSYMFOLLOW = 256
    NOATIME = 1024
    NODIRATIME = 2048
    BIND = 4096
    MOVE = 8192
    REC = 16384
    SILENT = 32768
    UNBINDABLE = 1 << 17
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20
    RELATIME = 1 << 21
    STRICTATIME = 1 << 24
    LAZYTIME = 1 << 25


class _MountAttributes(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


_int, _uint, _path, _pointer = ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_void_p

_mount = bind("mount", _path, _path, _path, ctypes.c_ulong, _path)
_umount2 = bind("umount2", _path, _int)
_open_tree = bind("open_tree", _int, _path, _uint)
_move_mount = bind("move_mount", _int, _path, _int, _path, _uint)
_fsopen = bind("fsopen", _path, _uint)
_fsconfig = bind("fsconfig", _int, _uint, _path, _path, _int)
_fsmount = bind("fsmount", _int, _uint, _uint)
_mount_setattr = bind("mount_setattr", _int, _path, _uint, _pointer, ctypes.c_size_t)


def _bytes(text: Optional[str]) -> Optional[bytes]:
    return None if text is None else os.fsencode(text)


def mount(source: str, target: str, fstype: Optional[str], flags: int = 0, data: Optional[str] = None) -> None:
    _mount(os.fsencode(source), os.fsencode(target), _bytes(fstype), int(flags), _bytes(data))


def umount2(target: str, flags: int = 0) -> None:
    _umount2(os.fsencode(target), flags)


def open_tree(dirfd: int, path: str = "", flags: int = 0) -> int:
    """An O_PATH fd of what is at ``path`` (of ``dirfd`` itself if empty); with OPEN_TREE_CLONE of a detached copy."""
    if not path:
        flags |= AT_EMPTY_PATH
    return int(_open_tree(dirfd, os.fsencode(path), flags | OPEN_TREE_CLOEXEC))


def move_mount(mount_fd: int, dirfd: int, path: str = "", flags: int = 0) -> None:
    """Move the mount that ``mount_fd`` is the root of to ``path`` (onto ``dirfd`` itself if empty).

    With SET_GROUP nothing is moved: the mount at ``path``, which is private, joins the other one's peer group, and has
    its master.
    """
    flags |= MoveMount.F_EMPTY_PATH
    if not path:
        flags |= MoveMount.T_EMPTY_PATH
    _move_mount(mount_fd, b"", dirfd, os.fsencode(path), int(flags))


def fsopen(fstype: str) -> int:
    return int(_fsopen(os.fsencode(fstype), FSOPEN_CLOEXEC))


def fsconfig(fs_fd: int, command: FsConfig, key: Optional[str] = None, value: Optional[str] = None) -> None:
    """The kernel's own words about a refusal are to be had by ``fs_log``."""
    _fsconfig(fs_fd, int(command), _bytes(key), _bytes(value), 0)


def fs_log(fs_fd: int) -> List[str]:
    """The messages that a file system context has collected, e.g. ``e nfs: unknown parameter``; none twice."""
    messages = []
    while True:
        try:
            messages.append(os.fsdecode(os.read(fs_fd, 8192)).rstrip("\n"))
        except OSError:  # ENODATA: no more of them
            return messages


def fsmount(fs_fd: int, attributes: int = 0) -> int:
    return int(_fsmount(fs_fd, FSMOUNT_CLOEXEC, int(attributes)))


def mount_setattr(
    dirfd: int, path: str = "", flags: int = 0, *, set: int = 0, clear: int = 0, propagation: int = 0
) -> None:
    """Change attributes and propagation (one of MS.PRIVATE, SLAVE, SHARED, UNBINDABLE) of a mount."""
    if not path:
        flags |= AT_EMPTY_PATH
    change = _MountAttributes(int(set), int(clear), int(propagation), 0)
    _mount_setattr(dirfd, os.fsencode(path), flags, ctypes.byref(change), ctypes.sizeof(change))
