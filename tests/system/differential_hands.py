"""What one user's process does in a directory, with open files, mappings and directory positions.

Results are made of what must be equal on two file systems of one kind: no inode numbers, no times but those that were
set; everything else.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import stat
import struct
from typing import Any, Dict, List, NamedTuple, Tuple, TypeVar

from stubfs import protocol, syscalls

RECENT = 10**18  # nanoseconds since the epoch: what is later was set by the kernel
FALLOC_FL_ZERO_RANGE = 0x10  # linux/falloc.h
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602  # linux/fs.h
FS_APPEND_FL = 0x20
F_OFD_GETLK, F_OFD_SETLK = 36, 37  # linux/fcntl.h


def timestamp(nanoseconds: int) -> Any:
    return nanoseconds if nanoseconds < RECENT else "recent"


def attributes(status: os.stat_result) -> Dict[str, Any]:
    names = ("st_mode", "st_uid", "st_gid", "st_rdev", "st_size", "st_nlink", "st_blocks", "st_blksize")
    found = {name: getattr(status, name) for name in names}
    if stat.S_ISDIR(status.st_mode):
        del found["st_size"], found["st_blocks"]  # which differ between native file systems, too
    return {**found, "atime": timestamp(status.st_atime_ns), "mtime": timestamp(status.st_mtime_ns)}


class Mapped(NamedTuple):
    area: mmap.mmap
    fd: int  # of the file, which is kept open beside it


_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: Any, *arguments: Any) -> int:
    result = int(function(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


_T = TypeVar("_T")


class Some(Dict[int, _T]):
    """Where there is nothing of a number, one of another number will do: most of what is asked for is to be done."""

    def __missing__(self, number: int) -> _T:
        known = sorted(self)
        if not known:
            raise KeyError(number)
        return self[known[number % len(known)]]


class Hands:
    """What one user's process does in one of the directories, which is its working directory; with open files."""

    def __init__(self) -> None:
        self.files: Dict[int, int] = Some()
        self.places: Dict[int, List[int]] = Some()  # in an open directory: where reading it has come to
        self.maps: Dict[int, Mapped] = Some()

    def one_of_type(self, slot: int, kind: int) -> int:
        """The number of an open file of this type (S_IFMT bits). KeyError if there is none."""
        of_it = [known for known, fd in self.files.items() if stat.S_IFMT(os.fstat(fd).st_mode) == kind]
        return Some(zip(of_it, of_it))[slot]

    # --- open files

    def open(self, slot: int, name: bytes, flags: int, mode: int) -> Any:
        self._no_special_file(name)
        fd = os.open(name, flags | os.O_NONBLOCK, mode)
        former = self.files.pop(slot, None)
        self.files[slot] = fd
        self.places[slot] = []
        if former is not None:
            os.close(former)
        return stat.S_IFMT(os.fstat(fd).st_mode), fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_LARGEFILE

    @staticmethod
    def _no_special_file(name: bytes) -> None:
        """The kernel opens fifos, devices and sockets without a word to the file system: anyone may."""
        try:
            kind = stat.S_IFMT(os.stat(name).st_mode)
        except OSError:
            return
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise ValueError("a special file")

    def tmpfile(self, slot: int, name: bytes, mode: int) -> Any:
        return self.open(slot, name, os.O_TMPFILE | os.O_RDWR, mode)

    def close(self, slot: int) -> None:
        fd = self.files[slot]
        known = next(known for known, one in self.files.items() if one == fd)
        del self.files[known], self.places[known]
        os.close(fd)

    def close_all(self) -> None:
        for slot in list(self.files):
            self.close(slot)
        for slot in list(self.maps):
            self.unmap(slot)
        os.umask(0o022)

    def read(self, slot: int, count: int) -> bytes:
        return os.read(self.files[slot], count)

    def write(self, slot: int, data: bytes) -> Any:
        return os.write(self.files[slot], data), os.lseek(self.files[slot], 0, os.SEEK_CUR)

    def pread(self, slot: int, count: int, offset: int) -> bytes:
        return os.pread(self.files[slot], count, offset)

    def pwrite(self, slot: int, data: bytes, offset: int) -> int:
        return os.pwrite(self.files[slot], data, offset)

    def pwritev2(self, slot: int, data: bytes, offset: int, flags: int) -> int:
        return os.pwritev(self.files[slot], [data], offset, flags)

    def seek(self, slot: int, offset: int, whence: int) -> int:
        if stat.S_ISDIR(os.fstat(self.files[slot]).st_mode):
            raise ValueError("places in a directory are each file system's own affair, but for those that it has told")
        return os.lseek(self.files[slot], offset, whence)

    def fstat(self, slot: int) -> Any:
        return attributes(os.fstat(self.files[slot]))

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.files[slot], size)

    def fallocate(self, slot: int, mode: int, offset: int, size: int) -> None:
        if mode & FALLOC_FL_ZERO_RANGE and os.fstat(self.files[slot]).st_mode & 0o6000:
            raise ValueError("FUSE takes set-id bits before it asks; tmpfs knows that it cannot do this")
        syscalls.fallocate(self.files[slot], mode, offset, size)

    def fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self.files[slot], mode)

    @staticmethod
    def _no_strangers_nothing(uid: int, gid: int, status: os.stat_result) -> None:
        """A chown to -1 and -1 looks to a FUSE file system as what the kernel asks before any writer writes."""
        if uid == gid == -1 and os.geteuid() not in (0, status.st_uid):
            raise ValueError("not the owner")

    def fchown(self, slot: int, uid: int, gid: int) -> None:
        self._no_strangers_nothing(uid, gid, os.fstat(self.files[slot]))
        os.fchown(self.files[slot], uid, gid)

    def futime(self, slot: int, atime: Tuple[int, int], mtime: Tuple[int, int]) -> None:
        syscalls.utimensat_following(f"/proc/self/fd/{self.files[slot]}".encode(), atime, mtime)

    def fsync(self, slot: int) -> None:
        os.fsync(self.files[slot])

    def flags(self, slot: int, flags: int) -> int:
        fcntl.fcntl(self.files[slot], fcntl.F_SETFL, flags | os.O_NONBLOCK)
        return fcntl.fcntl(self.files[slot], fcntl.F_GETFL)

    def copy(self, slot: int, other: int, count: int, source: int, target: int) -> int:
        if not count:
            raise ValueError("nothing: the kernel does not ask, and knows nothing of immutable files")
        return os.copy_file_range(self.files[slot], self.files[other], count, source, target)

    def sendfile(self, slot: int, other: int, count: int) -> int:
        return os.sendfile(self.files[slot], self.files[other], 0, count)

    def _size_to_map(self, slot: int) -> int:
        if self.getflags(slot) & FS_APPEND_FL:
            raise ValueError("the kernel does not know of that of a FUSE file")
        status = os.fstat(self.files[slot])
        # A look at a hole through a mapping allocates blocks, on tmpfs; other file systems do that when it is written.
        if status.st_size > min(2**20, status.st_blocks * 512):
            raise ValueError("too large, or not all there")
        return status.st_size

    def map_read(self, slot: int, shared: bool) -> bytes:
        size = self._size_to_map(slot)
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        with mmap.mmap(self.files[slot], size, kind, mmap.PROT_READ) as area:
            return area[:]

    def map_write(self, slot: int, data: bytes, shared: bool) -> bytes:
        size = self._size_to_map(slot)
        with mmap.mmap(self.files[slot], size, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) as area:
            area[: len(data)] = data[:size]
            if shared:
                area.flush()
            found = area[:]
        if shared:
            # Whether storing into a mapping sets the times is each file system's own affair (tmpfs: no).
            self.futime(slot, (7, 7), (7, 7))
        return found

    def map_keep(self, slot: int, area: int, shared: bool, writes: bool) -> int:
        slot = self.one_of_type(slot, stat.S_IFREG)
        size = self._size_to_map(slot)
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        made = mmap.mmap(self.files[slot], size, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, access)
        if area in self.maps:
            self.unmap(area)
        self.maps[area] = Mapped(made, os.dup(self.files[slot]))
        return size

    def _mapped(self, area: int) -> Tuple[mmap.mmap, int]:
        """With its length up to the end of the file: what is stored behind that is the kernel's own affair."""
        status = os.fstat(self.maps[area].fd)
        if status.st_size > status.st_blocks * 512:
            raise ValueError("not all there")
        return self.maps[area].area, min(status.st_size, len(self.maps[area].area))

    def map_peek(self, area: int) -> bytes:
        mapping, size = self._mapped(area)
        return mapping[:size]

    def map_poke(self, area: int, data: bytes, offset: int) -> bytes:
        mapping, size = self._mapped(area)
        data = data[: max(0, size - offset)]
        try:
            mapping[offset : offset + len(data)] = data
        except TypeError as error:
            raise ValueError("mapped for reading only") from error
        return mapping[:size]

    def map_sync(self, area: int) -> None:
        self.maps[area].area.flush()

    def unmap(self, area: int) -> None:
        mapped = self.maps[area]
        del self.maps[next(known for known, one in self.maps.items() if one is mapped)]
        mapped.area.close()
        os.close(mapped.fd)

    def flock(self, slot: int, kind: int) -> None:
        fcntl.flock(self.files[slot], kind | fcntl.LOCK_NB)

    def lock(self, slot: int, ofd: bool, kind: int, start: int, size: int) -> None:
        command = F_OFD_SETLK if ofd else fcntl.F_SETLK
        fcntl.fcntl(self.files[slot], command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0))

    def getlock(self, slot: int, ofd: bool, kind: int, start: int, size: int) -> Any:
        command = F_OFD_GETLK if ofd else fcntl.F_GETLK
        asked = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0)
        found = struct.unpack("hhqqi4x", fcntl.fcntl(self.files[slot], command, asked))
        return found[:1] if found[0] == fcntl.F_UNLCK else (*found[:4], found[4] > 0)

    def reopen(self, slot: int, flags: int) -> Any:
        fd = os.open(f"/proc/self/fd/{self.files[slot]}", flags | os.O_NONBLOCK)
        try:
            return os.pread(fd, 100, 0) if flags & os.O_ACCMODE == os.O_RDONLY else None
        finally:
            os.close(fd)

    def link_open(self, slot: int, name: bytes) -> None:
        fd = self.files[slot]
        os.link(f"/proc/self/fd/{fd}".encode(), name, src_dir_fd=fd, follow_symlinks=True)

    def link_empty(self, slot: int, name: bytes) -> None:
        _call(_libc.linkat, self.files[slot], b"", -100, name, syscalls.AT_EMPTY_PATH)

    def _openable(self, slot: int) -> None:
        """OSError if it may not be opened for reading: as which the kernel opens a FUSE file to ask for its flags."""
        os.close(os.open(f"/proc/self/fd/{self.files[slot]}", os.O_RDONLY | os.O_NONBLOCK))

    def getflags(self, slot: int) -> int:
        self._openable(slot)
        return int.from_bytes(fcntl.ioctl(self.files[slot], FS_IOC_GETFLAGS, bytes(8))[:4], "little")

    def setflags(self, slot: int, flags: int) -> None:
        self._openable(slot)
        fcntl.ioctl(self.files[slot], FS_IOC_SETFLAGS, struct.pack("=Q", flags))

    def flist(self, slot: int) -> List[str]:
        slot = self.one_of_type(slot, stat.S_IFDIR)
        os.lseek(self.files[slot], 0, os.SEEK_SET)
        return os.listdir(self.files[slot])

    def dirread(self, slot: int, size: int) -> Any:
        """Some entries: what ``size`` bytes can take."""
        slot = self.one_of_type(slot, stat.S_IFDIR)
        found = syscalls.getdents64(self.files[slot], size)
        self.places[slot].append(os.lseek(self.files[slot], 0, os.SEEK_CUR))
        return [(kind, name) for _, _, kind, name in protocol.native_dirents(found)]

    def dirseek(self, slot: int, place: int) -> None:
        """Back, or forth, to where dirread() has been."""
        slot = self.one_of_type(slot, stat.S_IFDIR)
        places = [0, *self.places[slot]]
        os.lseek(self.files[slot], places[place % len(places)], os.SEEK_SET)

    def fgetxattr(self, slot: int, name: str) -> bytes:
        return os.getxattr(self.files[slot], name)

    def fremovexattr(self, slot: int, name: str) -> None:
        os.removexattr(self.files[slot], name)

    def flistxattr(self, slot: int) -> Any:
        return sorted(os.listxattr(self.files[slot]))

    def fsetxattr(self, slot: int, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.files[slot], name, value, flags)

    # --- names

    def mkdir(self, name: bytes, mode: int) -> None:
        os.mkdir(name, mode)

    def mknod(self, name: bytes, mode: int, device: int) -> None:
        os.mknod(name, mode, device)

    def bind(self, name: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(name)
            sock.listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(name)

    def symlink(self, target: bytes, name: bytes) -> None:
        os.symlink(target, name)

    def readlink(self, name: bytes) -> bytes:
        return os.readlink(name)

    def link(self, name: bytes, other: bytes, follow: bool) -> None:
        os.link(name, other, src_dir_fd=-100, follow_symlinks=follow)

    def unlink(self, name: bytes) -> None:
        os.unlink(name)

    def rmdir(self, name: bytes) -> None:
        os.rmdir(name)

    def rename(self, name: bytes, other: bytes, flags: int) -> None:
        syscalls.renameat2(-100, name, -100, other, flags)

    def list(self, name: bytes) -> List[bytes]:
        return os.listdir(name)

    # --- objects by name

    def stat(self, name: bytes) -> Any:
        return attributes(os.stat(name))

    def lstat(self, name: bytes) -> Any:
        return attributes(os.lstat(name))

    def access(self, name: bytes, mode: int) -> bool:
        return os.access(name, mode, effective_ids=True)

    def contents(self, name: bytes) -> bytes:
        self._no_special_file(name)
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, 5000)
        finally:
            os.close(fd)

    def truncate(self, name: bytes, size: int) -> None:
        os.truncate(name, size)

    def chmod(self, name: bytes, mode: int) -> None:
        os.chmod(name, mode)

    def chown(self, name: bytes, uid: int, gid: int, follow: bool) -> None:
        self._no_strangers_nothing(uid, gid, os.stat(name, follow_symlinks=follow))
        os.chown(name, uid, gid, follow_symlinks=follow)

    def utime(self, name: bytes, atime: Tuple[int, int], mtime: Tuple[int, int]) -> None:
        syscalls.utimensat(-100, name, atime, mtime)

    def getxattr(self, name: bytes, key: str) -> bytes:
        return os.getxattr(name, key, follow_symlinks=False)

    def listxattr(self, name: bytes) -> List[str]:
        return sorted(os.listxattr(name, follow_symlinks=False))

    def setxattr(self, name: bytes, key: str, value: bytes, flags: int) -> None:
        os.setxattr(name, key, value, flags, follow_symlinks=False)

    def removexattr(self, name: bytes, key: str) -> None:
        os.removexattr(name, key, follow_symlinks=False)

    def statfs(self, name: bytes) -> Any:
        status = os.statvfs(name)
        return status.f_namemax, status.f_bsize, status.f_frsize, status.f_blocks > 0

    def umask(self, mask: int) -> int:
        return os.umask(mask)

    def chdir(self, name: bytes) -> Any:
        here = os.open(".", os.O_PATH)
        try:
            os.chdir(name)
            try:
                return sorted(os.listdir(".")), attributes(os.stat("."))
            finally:
                os.fchdir(here)
        finally:
            os.close(here)
