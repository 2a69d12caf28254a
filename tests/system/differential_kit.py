"""Two directories side by side, and users' processes that do the same in both: what each operation gives, comparable.

Results are made of what must be equal on two file systems of one kind: no inode numbers, no times but those that were
set; everything else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import pickle
import signal
import socket
import stat
import struct
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from stubfs import syscalls

RECENT = 10**18  # nanoseconds since the epoch: what is later was set by the kernel
LARGE = 5 * 2**30


FALLOC_FL_ZERO_RANGE = 0x10  # linux/falloc.h
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602  # linux/fs.h


class User(NamedTuple):
    name: str
    uid: int
    gid: int
    groups: Tuple[int, ...]


ROOT = User("root", 0, 0, ())
ALICE = User("alice", 1001, 1001, (2000,))
BOB = User("bob", 1002, 1002, (2000, 2001))
USERS = (ROOT, ALICE, BOB)


def timestamp(nanoseconds: int) -> Any:
    return nanoseconds if nanoseconds < RECENT else "recent"


def attributes(status: os.stat_result) -> Dict[str, Any]:
    names = ("st_mode", "st_uid", "st_gid", "st_rdev", "st_size", "st_nlink", "st_blocks", "st_blksize")
    found = {name: getattr(status, name) for name in names}
    if stat.S_ISDIR(status.st_mode):
        del found["st_size"], found["st_blocks"]  # which differ between native file systems, too
    return {**found, "atime": timestamp(status.st_atime_ns), "mtime": timestamp(status.st_mtime_ns)}


_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: Any, *arguments: Any) -> int:
    result = int(function(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Hands:
    """What one user's process does in one of the directories, which is its working directory; with open files."""

    def __init__(self) -> None:
        self.files: Dict[int, int] = {}

    # --- open files

    def open(self, slot: int, name: bytes, flags: int, mode: int) -> Any:
        self._no_special_file(name)
        fd = os.open(name, flags | os.O_NONBLOCK, mode)
        former = self.files.pop(slot, None)
        self.files[slot] = fd
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
        os.close(self.files.pop(slot))

    def close_all(self) -> None:
        for slot in list(self.files):
            self.close(slot)
        os.umask(0o022)

    def read(self, slot: int, count: int) -> bytes:
        return os.read(self.files[slot], count)

    def write(self, slot: int, data: bytes) -> Any:
        return os.write(self.files[slot], data), os.lseek(self.files[slot], 0, os.SEEK_CUR)

    def pread(self, slot: int, count: int, offset: int) -> bytes:
        return os.pread(self.files[slot], count, offset)

    def pwrite(self, slot: int, data: bytes, offset: int) -> int:
        return os.pwrite(self.files[slot], data, offset)

    def seek(self, slot: int, offset: int, whence: int) -> int:
        if whence > os.SEEK_CUR and stat.S_ISDIR(os.fstat(self.files[slot]).st_mode):
            raise ValueError("where a directory ends is each file system's own affair")
        return os.lseek(self.files[slot], offset, whence)

    def fstat(self, slot: int) -> Any:
        return attributes(os.fstat(self.files[slot]))

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.files[slot], size)

    def fallocate(self, slot: int, mode: int, offset: int, size: int) -> None:
        if mode == FALLOC_FL_ZERO_RANGE and os.fstat(self.files[slot]).st_mode & 0o6000:
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
        return os.copy_file_range(self.files[slot], self.files[other], count, source, target)

    def sendfile(self, slot: int, other: int, count: int) -> int:
        return os.sendfile(self.files[slot], self.files[other], 0, count)

    def _size_to_map(self, slot: int) -> int:
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

    def flock(self, slot: int, kind: int) -> None:
        fcntl.flock(self.files[slot], kind | fcntl.LOCK_NB)

    def lock(self, slot: int, ofd: bool, kind: int, start: int, size: int) -> None:
        command = 37 if ofd else fcntl.F_SETLK  # F_OFD_SETLK
        fcntl.fcntl(self.files[slot], command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0))

    def reopen(self, slot: int, flags: int) -> Any:
        fd = os.open(f"/proc/self/fd/{self.files[slot]}", flags | os.O_NONBLOCK)
        try:
            return os.pread(fd, 100, 0) if flags & os.O_ACCMODE == os.O_RDONLY else None
        finally:
            os.close(fd)

    def link_open(self, slot: int, name: bytes) -> None:
        fd = self.files[slot]
        os.link(f"/proc/self/fd/{fd}".encode(), name, src_dir_fd=fd, follow_symlinks=True)

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
        os.lseek(self.files[slot], 0, os.SEEK_SET)
        return sorted(os.listdir(self.files[slot]))

    def fgetxattr(self, slot: int, name: str) -> bytes:
        return os.getxattr(self.files[slot], name)

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
        return sorted(os.listdir(name))

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


class Actor:
    """A process of ``user`` in ``top``, doing one operation of Hands after another."""

    def __init__(self, user: User, top: str) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock = ours
        self.pid = os.fork()
        if not self.pid:
            try:
                ours.close()
                _serve(its, user, top)
            finally:
                os._exit(0)
        its.close()

    def ask(self, operation: str, *arguments: Any) -> None:
        self._sock.send(pickle.dumps((operation, arguments)))

    def answer(self, timeout: float = 30.0) -> Tuple[str, Any]:
        self._sock.settimeout(timeout)
        data = self._sock.recv(2**20 + 2**18)
        assert data, "the process has died"
        kind, value = pickle.loads(data)
        return kind, value

    def do(self, operation: str, *arguments: Any) -> Tuple[str, Any]:
        self.ask(operation, *arguments)
        return self.answer()

    def close(self) -> None:
        self._sock.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _serve(sock: socket.socket, user: User, top: str) -> None:
    os.chdir(top)
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    os.umask(0o022)
    hands = Hands()
    while True:
        data = sock.recv(2**20)
        if not data:
            return
        operation, arguments = pickle.loads(data)
        if b"." in arguments and not os.access(".", os.X_OK, effective_ids=True):
            # The kernel asks a file system for names alone: it does not get to know of a "." or ".." on the way.
            sock.send(pickle.dumps(("refused", "the working directory may not be searched")))
            continue
        if any(_is_protected(name, operation, arguments) for name in arguments if isinstance(name, bytes)):
            sock.send(pickle.dumps(("refused", "protected by a sysctl")))
            continue
        sock.send(pickle.dumps(_outcome(getattr(hands, operation), arguments)))


_FOLLOWING = ("open", "tmpfile", "contents", "stat", "list", "chdir", "chmod", "truncate", "access", "statfs")


def _is_protected(name: bytes, operation: str, arguments: Tuple[Any, ...], depth: int = 5) -> bool:
    """Whether fs.protected_symlinks or fs.protected_regular may refuse it: FUSE hides sticky bits from the kernel."""
    follows = operation in _FOLLOWING or operation in ("link", "chown") and arguments[-1] is True
    creates = operation == "open" and bool(arguments[2] & os.O_CREAT)
    at = b"."
    parts = name.split(b"/")
    for number, part in enumerate(parts, 1):
        try:
            parent, status = os.stat(at), os.lstat(at + b"/" + part)
        except (OSError, ValueError):
            return False
        is_last, is_link = number == len(parts), stat.S_ISLNK(status.st_mode)
        if (
            parent.st_mode & stat.S_ISVTX and parent.st_mode & 0o022
            and status.st_uid not in (os.geteuid(), parent.st_uid)
            and (is_link and (follows or not is_last) or creates and is_last)
        ):  # fmt: skip
            return True
        if is_link and depth and (follows or not is_last):
            target = os.path.join(at, os.readlink(at + b"/" + part))
            if _is_protected(target, operation, arguments, depth - 1):
                return True
        at += b"/" + part
    return False


def _outcome(action: Callable[..., Any], arguments: Any) -> Tuple[str, Any]:
    try:
        return "result", action(*arguments)
    except OSError as error:
        return "error", errno.errorcode[error.errno or 0]
    except (KeyError, ValueError) as error:  # no such slot; an empty mapping
        return "refused", type(error).__name__


def tree(top: bytes) -> Dict[bytes, Any]:
    """Everything beneath ``top``: attributes, contents, extended attributes, and which names are one file."""
    found: Dict[bytes, Any] = {}
    first: Dict[int, bytes] = {}
    for parent, directories, files in os.walk(top):
        for name in sorted(directories) + sorted(files):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            attributes_then = attributes(status)
            content: Optional[bytes] = None
            if stat.S_ISREG(status.st_mode) and status.st_size < 2**20:
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            keys = sorted(os.listxattr(path, follow_symlinks=False))
            extended = {key: os.getxattr(path, key, follow_symlinks=False) for key in keys}
            beneath = os.path.relpath(path, top)
            # Where links are met in another order the first one is another: the smallest name stands for the file.
            found[beneath] = (attributes_then, content, extended, status.st_ino)
            first[status.st_ino] = min(first.get(status.st_ino, beneath), beneath)
    return {name: (*rest, first[inode]) for name, (*rest, inode) in found.items()}


def _unflag(path: bytes) -> None:
    """So that it can be removed."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, bytes(8))
    finally:
        os.close(fd)


def empty(top: bytes) -> None:
    """Remove all that is beneath."""
    for parent, _, files in os.walk(top):
        _unflag(parent)
        for name in files:
            if stat.S_ISREG(os.lstat(os.path.join(parent, name)).st_mode):
                _unflag(os.path.join(parent, name))
    for parent, directories, files in os.walk(top, topdown=False):
        for name in files:
            os.unlink(os.path.join(parent, name))
        for name in directories:
            path = os.path.join(parent, name)
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)
