"""FUSE's wire format, as far as the session loop reads or writes it itself: headers, opcodes, replies.

From include/uapi/linux/fuse.h; the layouts are checked against the C compiler in the tests. Pure data: nothing
here does I/O, and libfuse's own structures are not here.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum, IntFlag
from typing import Dict, Iterator, Tuple, Union

ROOT_NODE = 1
UNKNOWN_INO = 0xFFFFFFFF  # inode number of directory entries whose node nobody has looked up, as libfuse has it

# Opcodes change with kernels: one that is not listed is answered with ENOSYS, which makes the kernel do without.


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


def opcode_name(opcode: int) -> str:
    """The operation's name as people know it: "lookup", or "opcode 99" for one from a newer kernel."""
    try:
        return Opcode(opcode).name.lower()
    except ValueError:
        return f"opcode {opcode}"


class InitFlags(IntFlag):
    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    FLOCK_LOCKS = 1 << 10
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    HANDLE_KILLPRIV_V2 = 1 << 28


class SetattrValid(IntFlag):
    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5
GETATTR_FH = 1 << 0
WRITE_CACHE = 1 << 0
FSYNC_FDATASYNC = 1 << 0
NOTIFY_INVAL_INODE = 2

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
HEADER_FIELDS = struct.Struct("=4xIQQIII4x")  # of it, those that tell requests apart: opcode to pid
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
# ino size blocks times(3) nsecs(3) mode nlink uid gid rdev blksize flags; times before 1970 are negative numbers in
# what the kernel calls unsigned.
ATTR = struct.Struct("=QQQqqqIIIIIIIIII")
ENTRY = struct.Struct("=QQQQII")  # nodeid generation entry_valid attr_valid and their nanoseconds; ATTR follows
ATTR_OUT = struct.Struct("=QII")  # attr_valid, nanoseconds, padding; ATTR follows
# What begins a whole reply with attributes, which follow.
_ENTRY_REPLY = struct.Struct(OUT_HEADER.format + ENTRY.format[1:])
_ATTR_REPLY = struct.Struct(OUT_HEADER.format + ATTR_OUT.format[1:])
OPEN_OUT = struct.Struct("=QII")  # fh open_flags padding
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
FORGET_ONE = struct.Struct("=QQ")  # nodeid nlookup
DIRENT = struct.Struct("=QqII")  # ino off namelen type; the name follows, padded to 8 bytes
# struct.pack() of a whole one, padded, by the length of its name: (node, offset, length, type, name).
PACK_DIRENT = [struct.Struct(f"{DIRENT.format}{-(-length // 8) * 8}s").pack for length in range(256)]
NATIVE_DIRENT = struct.Struct("=QqHB")  # struct linux_dirent64: ino off reclen type; the name follows
# Whole ones, by an eighth of their length, which is always a multiple of 8.
_UNPACK_NATIVE_DIRENT = [
    struct.Struct(f"=QqHB{max(size - NATIVE_DIRENT.size, 0)}s").unpack_from for size in range(0, 288, 8)
]

GETATTR_IN = struct.Struct("=IIQ")  # flags dummy fh
SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIIII")
OPEN_IN = struct.Struct("=II")  # flags open_flags
MKNOD_IN = struct.Struct("=IIII")  # mode rdev umask padding; the name follows
MKDIR_IN = struct.Struct("=II")  # mode umask; the name follows
CREATE_IN = struct.Struct("=IIII")  # flags mode umask open_flags; the name follows
RELEASE_IN = struct.Struct("=QIIQ")  # fh flags release_flags lock_owner
READ_IN = struct.Struct("=QQIIQII")  # fh offset size read_flags lock_owner flags padding
WRITE_IN = struct.Struct("=QQIIQII")  # fh offset size write_flags lock_owner flags padding
FSYNC_IN = struct.Struct("=QII")  # fh flags padding
FALLOCATE_IN = struct.Struct("=QQQII")  # fh offset length mode padding
LSEEK_IN = struct.Struct("=QQII")  # fh offset whence padding
RENAME_IN = struct.Struct("=Q")  # newdir; two names follow
RENAME2_IN = struct.Struct("=QII")  # newdir flags padding; two names follow
INVAL_INODE_OUT = struct.Struct("=Qqq")  # ino offset length
COPY_FILE_RANGE_IN = struct.Struct("=QQQQQQQ")  # fh_in off_in nodeid_out fh_out off_out len flags
IOCTL_IN = struct.Struct("=QIIQII")  # fh flags cmd arg in_size out_size; the argument follows
IOCTL_OUT = struct.Struct("=iIII")  # result flags in_iovs out_iovs; what is to be written back follows
STATX_IN = struct.Struct("=IIQII")  # getattr_flags reserved fh sx_flags sx_mask
STATX_OUT = struct.Struct("=QII16x")  # attr_valid, nanoseconds, flags; a struct statx follows
STATX = struct.Struct("=IIQIIIHHQQQQ")  # mask blksize attributes nlink uid gid mode spare ino size blocks mask; times
STATX_TIME = struct.Struct("=qI4x")
GETXATTR_IN = struct.Struct("=II")  # size padding; GETXATTR: the name follows
GETXATTR_OUT = struct.Struct("=II")
SETXATTR_IN = struct.Struct("=II")  # size flags; the name and the value follow
STATFS_OUT = struct.Struct("=QQQQQIIII24x")  # blocks bfree bavail files ffree bsize namelen frsize padding
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")
WRITE_OUT = struct.Struct("=II")  # size padding

BODY = IN_HEADER.size  # where a request's own structure begins
# Where the fixed structure before the name ends, of the operations that carry a name.
NAME_OFFSETS: Dict[int, int] = {
    Opcode.LOOKUP: BODY,
    Opcode.UNLINK: BODY,
    Opcode.RMDIR: BODY,
    Opcode.SYMLINK: BODY,
    Opcode.RENAME: BODY + 8,
    Opcode.RENAME2: BODY + 16,
    Opcode.LINK: BODY + 8,
    Opcode.MKDIR: BODY + 8,
    Opcode.MKNOD: BODY + 16,
    Opcode.CREATE: BODY + 16,
    Opcode.REMOVEXATTR: BODY,
}
# The largest request is a WRITE: the header and WRITE_IN before the data must fit too.
MAX_PAGES = 256
MAX_WRITE = MAX_PAGES * 4096
BUFFER_SIZE = MAX_WRITE + 4096


def text_at(buffer: Union[bytes, memoryview], offset: int, end: int) -> bytes:
    """The NUL-terminated bytes at ``offset``."""
    return bytes(buffer[offset:end]).partition(b"\0")[0]


def attr(node: int, status: os.stat_result) -> bytes:
    """struct fuse_attr of ``status``; the inode number is the node's, so that /proc identifies an object by it."""
    # As a tuple it has the ten oldest members, the times in whole seconds.
    mode, _, _, nlink, uid, gid, size, atime, mtime, ctime = status
    device = status.st_rdev
    return ATTR.pack(
        node, size, status.st_blocks, atime, mtime, ctime,
        status.st_atime_ns % 1_000_000_000, status.st_mtime_ns % 1_000_000_000, status.st_ctime_ns % 1_000_000_000,
        mode, nlink, uid, gid, encode_device(device) if device else 0, status.st_blksize, 0,
    )  # fmt: skip


def encode_device(device: int) -> int:
    """A device number as FUSE has it: new_encode_dev() of the kernel, 32 bits."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def attr_reply(unique: int, node: int, status: os.stat_result) -> bytes:
    """The whole reply to a GETATTR or SETATTR; never valid for longer than the answer itself."""
    return _ATTR_REPLY.pack(_ATTR_REPLY.size + ATTR.size, 0, unique, 0, 0, 0) + attr(node, status)


def statx_out(node: int, found: bytes) -> bytes:
    """A STATX reply from a struct statx (FUSE has the same layout), valid for no longer than itself."""
    return STATX_OUT.pack(0, 0, 0) + found[:32] + U64.pack(node) + found[40:]


def basic_statx(status: os.stat_result) -> bytes:
    """A struct statx with what stat(2) tells, STATX_BASIC_STATS."""
    times = b"".join(
        STATX_TIME.pack(*divmod(time, 1_000_000_000))
        for time in (status.st_atime_ns, 0, status.st_ctime_ns, status.st_mtime_ns)
    )
    device = os.major(status.st_rdev), os.minor(status.st_rdev), 0, 0
    return (
        STATX.pack(
            0x7FF, status.st_blksize, 0, status.st_nlink, status.st_uid, status.st_gid, status.st_mode, 0,
            status.st_ino, status.st_size, status.st_blocks, 0,
        )  # fmt: skip
        + times
        + struct.pack("=IIII112x", *device)
    )


def entry_reply(unique: int, node: int, status: os.stat_result, valid: int = 0, opened: bytes = b"") -> bytes:
    """The whole reply to a LOOKUP, or to what makes a name; ``opened``: the OPEN_OUT of a CREATE. The name may not be
    cached, the attributes for ``valid`` nanoseconds.

    The kernel rounds them up to ticks of its clock (fuse_time_to_jiffies() in fs/fuse/dir.c): 1 ns is at least one
    tick, and less than two.
    """
    size = _ENTRY_REPLY.size + ATTR.size + len(opened)
    return _ENTRY_REPLY.pack(size, 0, unique, node, 0, 0, 0, 0, valid) + attr(node, status) + opened


def statfs_out(status: os.statvfs_result) -> bytes:
    return STATFS_OUT.pack(
        status.f_blocks, status.f_bfree, status.f_bavail, status.f_files, status.f_ffree,
        status.f_bsize, status.f_namemax, status.f_frsize, 0,
    )  # fmt: skip


def native_dirents(data: bytes) -> Iterator[Tuple[int, int, int, bytes]]:
    """(offset of the next entry, inode number, type, name) of each entry in a getdents64 buffer."""
    position, end = 0, len(data)
    while position < end:
        size = data[position + 16] | data[position + 17] << 8
        inode, offset, _, kind, name = _UNPACK_NATIVE_DIRENT[size >> 3](data, position)
        yield offset, inode, kind, name.partition(b"\0")[0]  # what is behind it is not always zero
        position += size
