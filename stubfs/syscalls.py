"""The kernel's calls that Python has no wrapper for, one function each, named as their manual pages.

With ``libfuse`` the only module of the package that uses ctypes. Every function raises OSError.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from enum import IntFlag
from functools import lru_cache
from typing import Any, Optional, Sequence, Tuple

from stubfs.libc import bind, bind_quick, bind_syscall, machine_syscall

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EACCESS = 0x200
AT_STATX_FORCE_SYNC = 0x2000
AT_STATX_DONT_SYNC = 0x4000
AT_EMPTY_PATH = 0x1000
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
MNT_DETACH = 2
CLONE_FS = 0x200
MOVE_MOUNT_F_EMPTY_PATH = 4
FSMOUNT_CLOEXEC = 1
FSOPEN_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6


class Resolve(IntFlag):
    NO_XDEV = 1
    NO_MAGICLINKS = 2
    NO_SYMLINKS = 4
    BENEATH = 8
    IN_ROOT = 16


class MountAttr(IntFlag):
    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


_openat2 = bind_syscall(
    "openat2",
    machine_syscall((437, 437)),
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(_OpenHow),
    ctypes.c_size_t,
)
_HOW_SIZE = ctypes.sizeof(_OpenHow)
_fchmodat = bind("fchmodat", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_int)
_utimensat = bind("utimensat", ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Timespec), ctypes.c_int)
_faccessat2 = bind_syscall(
    "faccessat2", machine_syscall((439, 439)), ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int
)
_renameat2 = bind(
    "renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)
_fallocate = bind("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_getdents64 = bind("getdents64", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, restype=ctypes.c_ssize_t)
# glibc's setgroups changes every thread of the process; credentials are a matter of one thread here.
_setgroups = bind_syscall(
    "setgroups", machine_syscall((116, 159)), ctypes.c_size_t, ctypes.POINTER(ctypes.c_uint32)
)
# Of a header (struct __user_cap_header_struct) and the sets.
_capget = bind_quick("capget")
_capset = bind_quick("capset")
_setfsuid = bind_quick("setfsuid")
_setfsgid = bind_quick("setfsgid")
_unshare = bind("unshare", ctypes.c_int)
_fsopen = bind("fsopen", ctypes.c_char_p, ctypes.c_uint)
_fsconfig = bind(
    "fsconfig", ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int
)
_fsmount = bind("fsmount", ctypes.c_int, ctypes.c_uint, ctypes.c_uint)
_move_mount = bind(
    "move_mount", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)
_umount2 = bind("umount2", ctypes.c_char_p, ctypes.c_int)
_statx = bind("statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


def openat2(dir_fd: int, path: bytes, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """The caller closes the fd. O_CLOEXEC is added. Unlike openat(2), unknown flags are EINVAL."""
    return _openat2(dir_fd, path, _open_how(flags | os.O_CLOEXEC, mode, resolve), _HOW_SIZE)


@lru_cache(maxsize=64)
def _open_how(flags: int, mode: int, resolve: int) -> Any:
    """A pointer to a structure that the kernel only reads."""
    return ctypes.byref(_OpenHow(flags, mode, resolve))


def fchmodat(dir_fd: int, path: bytes, mode: int) -> None:
    """Never follows a symbolic link: EOPNOTSUPP for one."""
    _fchmodat(dir_fd, path, mode, AT_SYMLINK_NOFOLLOW)


def _timespecs(atime: Sequence[int], mtime: Sequence[int]) -> "ctypes.Array[_Timespec]":
    return (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))


def utimensat(dir_fd: int, path: bytes, atime: Sequence[int], mtime: Sequence[int]) -> None:
    """Times as (seconds, nanoseconds); UTIME_NOW and UTIME_OMIT as nanoseconds. Follows no symbolic link."""
    _utimensat(dir_fd, path, _timespecs(atime, mtime), AT_SYMLINK_NOFOLLOW)


def utimensat_following(path: bytes, atime: Sequence[int], mtime: Sequence[int]) -> None:
    """As utimensat, but follows a symbolic link: for /proc/self/fd/N."""
    _utimensat(AT_FDCWD, path, _timespecs(atime, mtime), 0)


def faccessat2(dir_fd: int, path: bytes, mode: int, flags: int = 0) -> None:
    """With the thread's effective (file system) ids; follows no symbolic link."""
    _faccessat2(dir_fd, path, mode, AT_EACCESS | AT_SYMLINK_NOFOLLOW | flags)


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    _renameat2(old_dir, old, new_dir, new, flags)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _fallocate(fd, mode, offset, length)


def getdents64(fd: int, size: int) -> bytes:
    """The next entries of a directory, as struct linux_dirent64; b"" at its end."""
    buffer = ctypes.create_string_buffer(size)
    return ctypes.string_at(buffer, _getdents64(fd, buffer, size))


def setfsuid(uid: int) -> None:
    """Of this thread. The call cannot fail; without CAP_SETUID it does nothing."""
    _setfsuid(uid)


def setfsgid(gid: int) -> None:
    _setfsgid(gid)


def setgroups(groups: Sequence[int]) -> None:
    """Of this thread alone."""
    _setgroups(len(groups), _group_list(tuple(groups)))


@lru_cache(maxsize=64)
def _group_list(groups: Tuple[int, ...]) -> "ctypes.Array[ctypes.c_uint32]":
    """What the kernel only reads."""
    return (ctypes.c_uint32 * len(groups))(*groups)


# struct __user_cap_data_struct, twice: effective, permitted, inheritable; the lower halves, then the upper ones.
_CAPABILITY_SETS = struct.Struct("=6I")


def effective_of(sets: bytes) -> int:
    low, _, _, high, _, _ = _CAPABILITY_SETS.unpack(sets)
    return int(low | high << 32)


class Capabilities:
    """Capabilities as masks, where capget(2) and capset(2) want them: an object for each thread that uses it."""

    def __init__(self) -> None:
        self._header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, linux/capability.h
        self._sets = bytearray(_CAPABILITY_SETS.size)
        own = (ctypes.c_char * len(self._sets)).from_buffer(self._sets)
        self._arguments = ctypes.byref(self._header), ctypes.byref(own)

    def _get(self, tid: int) -> None:
        self._header[1] = tid
        if _capget(*self._arguments) < 0:  # nothing else is wrong with the arguments
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), "capget")

    def sets(self, tid: int) -> bytes:
        """Of any thread, all of them as the kernel gives them; 0 means the calling one."""
        self._get(tid)
        return bytes(self._sets)

    def are(self, tid: int, sets: bytes) -> bool:
        """Whether those of a thread, if it is there, still are what sets() gave."""
        self._header[1] = tid
        return _capget(*self._arguments) >= 0 and self._sets == sets

    def effective(self, tid: int) -> int:
        return effective_of(self.sets(tid))

    def permitted(self, tid: int) -> int:
        _, low, _, _, high, _ = _CAPABILITY_SETS.unpack(self.sets(tid))
        return int(low | high << 32)

    def set(self, effective: int, permitted: int) -> None:
        """Of the calling thread alone; nothing is inheritable then."""
        self._header[1] = 0
        _CAPABILITY_SETS.pack_into(
            self._sets, 0, effective & 0xFFFFFFFF, permitted & 0xFFFFFFFF, 0, effective >> 32, permitted >> 32, 0
        )
        if _capset(*self._arguments) < 0:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), "capset")


def unshare(flags: int) -> None:
    """With CLONE_FS: the calling thread has a umask and a working directory of its own."""
    _unshare(flags)


def fsopen(name: str) -> int:
    return int(_fsopen(name.encode(), FSOPEN_CLOEXEC))


def fsconfig(fd: int, key: Optional[str], value: Optional[str] = None) -> None:
    """Set a flag (no value) or a string; without a key: make the superblock (FSCONFIG_CMD_CREATE)."""
    if key is None:
        _fsconfig(fd, FSCONFIG_CMD_CREATE, None, None, 0)
    elif value is None:
        _fsconfig(fd, FSCONFIG_SET_FLAG, key.encode(), None, 0)
    else:
        _fsconfig(fd, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)


def fsmount(fd: int, attributes: int) -> int:
    """A detached mount, which goes away with its fd unless move_mount attaches it."""
    return int(_fsmount(fd, FSMOUNT_CLOEXEC, attributes))


def move_mount(mount_fd: int, path: bytes) -> None:
    _move_mount(mount_fd, b"", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH)


def umount2(path: bytes, flags: int) -> None:
    _umount2(path, flags)


def statx(dir_fd: int, path: bytes, flags: int, mask: int) -> bytes:
    """A struct statx, of linux/stat.h."""
    buffer = ctypes.create_string_buffer(256)
    _statx(dir_fd, path, flags, mask, buffer)
    return buffer.raw


def identity_without_sync(path: bytes, dir_fd: int = AT_FDCWD) -> Tuple[int, int]:
    """st_dev and st_ino of a path, of which a FUSE server need not be asked (AT_STATX_DONT_SYNC, statx(2))."""
    found = statx(dir_fd, path, AT_STATX_DONT_SYNC | AT_EMPTY_PATH, 0)
    # stx_ino, stx_dev_major and stx_dev_minor, struct statx in linux/stat.h
    places = ((32, 40), (136, 140), (140, 144))
    inode, major, minor = (int.from_bytes(found[start:end], "little") for start, end in places)
    return os.makedev(major, minor), inode


def device_without_sync(path: bytes, dir_fd: int = AT_FDCWD) -> int:
    """st_dev of a path, as identity_without_sync()."""
    return identity_without_sync(path, dir_fd)[0]
