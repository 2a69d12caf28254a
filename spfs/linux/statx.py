"""statx(2), as far as it tells what an object is without asking its file system.

With AT_STATX_DONT_SYNC a FUSE file system is sent no request: the kernel answers from the inode (fuse_update_get_attr
in fs/fuse/dir.c), so that even one that holds every request can be examined.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from typing import Union

from stubfs.libc import bind

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
STATX_BASIC_STATS = 0x7FF
STATX_MNT_ID = 0x1000
MASK = STATX_BASIC_STATS | STATX_MNT_ID

SIZE = 256  # of struct statx
DEVICE_WORDS = (34, 35)  # major and minor, as 32-bit words of the structure
SIZE_OFFSET = 40  # of stx_size, in bytes
_MOUNT_ROOT = 0x2000  # STATX_ATTR_MOUNT_ROOT, since Linux 5.8
# 16: links, uid, gid; 28: mode; 32: ino, size, blocks; 128: device number of a device node; 136: device; 144: mount id
_LAYOUT = struct.Struct("<16xIIIHxx Q Q Q 72x II II Q")

_statx = bind("statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


@dataclass(frozen=True)
class Object:
    """What a file descriptor or a path refers to."""

    device: int  # st_dev, as os.makedev() encodes it
    inode: int
    mode: int
    mount_id: int
    size: int  # bytes; for a remote file as the kernel knew it last
    links: int  # names, st_nlink
    uid: int
    gid: int
    rdev: int  # of a device node, as st_rdev
    allocated: int = 0  # bytes that it takes on its file system: less than its size if it has holes


def decode(data: Union[bytes, bytearray], offset: int = 0) -> Object:
    links, uid, gid, mode, inode, size, blocks, *numbers, mount_id = _LAYOUT.unpack_from(data, offset)
    rdev, device = os.makedev(*numbers[:2]), os.makedev(*numbers[2:])
    return Object(device, inode, mode, mount_id, size, links, uid, gid, rdev, blocks * 512)


def examine(path: str, dirfd: int = AT_FDCWD, flags: int = 0) -> Object:
    """What ``path`` refers to, without a request to its file system. Magic links of /proc are followed."""
    buffer = ctypes.create_string_buffer(SIZE)
    _statx(dirfd, os.fsencode(path), AT_STATX_DONT_SYNC | flags, MASK, ctypes.addressof(buffer))
    return decode(buffer.raw)


def is_mount_root(fd: int) -> bool:
    """Is the directory ``fd`` the root of a mount?"""
    buffer = ctypes.create_string_buffer(SIZE)
    _statx(fd, b"", AT_STATX_DONT_SYNC | AT_EMPTY_PATH, MASK, ctypes.addressof(buffer))
    (attributes,) = struct.unpack_from("<Q", buffer.raw, 8)
    return bool(attributes & _MOUNT_ROOT)
