"""What restore mode's files come to that the real side lacks: carried over there, or left behind.

What the real side has stays as it is there, whatever was written in restore mode. A socket's name is carried, too: who
listens on it is found by it, as long as the mount is there. Works beneath two directory descriptors; no link is
followed on either side. Files are made by their owners where these may, so that it also works where a server squashes
root. Raises OSError.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Callable, Dict, List, Tuple

from stubfs import syscalls
from stubfs.credentials import ROOT, Credentials, ThreadIdentity
from stubfs.syscalls import Resolve

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_INSIDE = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS
_OURS = "security.spfs."  # marks for a restorer, which mean nothing on the real side
_PIECE = 1 << 24  # bytes copied by one call
_NO_XATTRS = (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EPERM)


class Carrying:
    """Carries once, by ``run``; ``undo`` takes away again what it has made. The descriptors stay the caller's."""

    def __init__(self, staging: int, target: int) -> None:
        self._staging = staging
        self._target = target
        self._identity = ThreadIdentity()
        self._made: List[Tuple[bytes, bool]] = []  # path, whether it is a directory; in the order of making
        self._linked: Dict[int, bytes] = {}  # inode number in the staging directory -> path of its copy

    @property
    def carried(self) -> List[bytes]:
        """Paths relative to the directory, in the order in which they were made."""
        return [path for path, _ in self._made]

    def run(self) -> None:
        """On an error everything is as before, then raises OSError with the file's path."""
        try:
            staging = os.open(".", _DIRECTORY, dir_fd=self._staging)
            try:
                target = os.open(".", _DIRECTORY, dir_fd=self._target)
                try:
                    self._directory(staging, target, b"")
                finally:
                    os.close(target)
            finally:
                os.close(staging)
        except BaseException:
            self.undo()
            raise
        finally:
            self._identity.assume(ROOT)

    def undo(self) -> None:
        """What has been put into a carried directory since, by others, keeps it there."""
        made, self._made = self._made, []
        for path, is_directory in reversed(made):
            parent, _, name = path.rpartition(b"/")
            try:
                fd = syscalls.openat2(self._target, parent or b".", os.O_PATH | os.O_DIRECTORY, 0, _INSIDE)
                try:
                    os.rmdir(name, dir_fd=fd) if is_directory else os.unlink(name, dir_fd=fd)
                finally:
                    os.close(fd)
            except OSError:
                pass  # somebody else's by now

    def _directory(self, source: int, target: int, path: bytes) -> None:
        for name in sorted(map(os.fsencode, os.listdir(source))):
            below = path + b"/" + name if path else name
            try:
                self._entry(source, target, name, below)
            except OSError as error:
                if error.filename is None or error.filename == name:
                    raise OSError(error.errno, error.strerror, os.fsdecode(below)) from error
                raise

    def _entry(self, source: int, target: int, name: bytes, path: bytes) -> None:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        try:
            there = os.stat(name, dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            self._copy(source, target, name, path, status)
        else:
            if stat.S_ISDIR(status.st_mode) and stat.S_ISDIR(there.st_mode):
                self._descend(source, target, name, path)

    def _descend(self, source: int, target: int, name: bytes, path: bytes) -> None:
        inner_source = os.open(name, _DIRECTORY, dir_fd=source)
        try:
            inner_target = os.open(name, _DIRECTORY, dir_fd=target)
            try:
                self._directory(inner_source, inner_target, path)
            finally:
                os.close(inner_target)
        finally:
            os.close(inner_source)

    def _copy(self, source: int, target: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        kind = stat.S_IFMT(status.st_mode)
        copy = self._linked.get(status.st_ino) if status.st_nlink > 1 and kind != stat.S_IFDIR else None
        if copy is not None:
            self._as_root(status, lambda: self._link(copy, target, name))
            self._made.append((path, False))
            return
        if kind == stat.S_IFDIR:
            self._as_owner(status, lambda: os.mkdir(name, 0o700, dir_fd=target))
        elif kind == stat.S_IFLNK:
            content = os.readlink(name, dir_fd=source)
            self._as_owner(status, lambda: os.symlink(content, name, dir_fd=target))
        elif kind == stat.S_IFREG:
            self._as_owner(status, lambda: os.close(_create(name, target)))
        else:
            self._as_owner(status, lambda: os.mknod(name, kind | 0o600, status.st_rdev, dir_fd=target))
        self._made.append((path, kind == stat.S_IFDIR))
        if status.st_nlink > 1:
            self._linked[status.st_ino] = path
        if kind == stat.S_IFDIR:
            self._descend(source, target, name, path)
        elif kind == stat.S_IFREG:
            self._as_root(status, lambda: _contents(source, target, name, status.st_size))
        self._attributes(source, target, name, status)

    def _link(self, copy: bytes, target: int, name: bytes) -> None:
        parent, _, last = copy.rpartition(b"/")
        fd = syscalls.openat2(self._target, parent or b".", os.O_PATH | os.O_DIRECTORY, 0, _INSIDE)
        try:
            os.link(last, name, src_dir_fd=fd, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(fd)

    def _attributes(self, source: int, target: int, name: bytes, status: os.stat_result) -> None:
        """Owner first: a change of the owner takes set-id bits. Times last."""
        there = os.stat(name, dir_fd=target, follow_symlinks=False)
        if (there.st_uid, there.st_gid) != (status.st_uid, status.st_gid):
            owner = status.st_uid, status.st_gid
            self._as_root(status, lambda: os.chown(name, *owner, dir_fd=target, follow_symlinks=False))
        if not stat.S_ISLNK(status.st_mode):
            mode = stat.S_IMODE(status.st_mode)
            self._as_root(status, lambda: syscalls.fchmodat(target, name, mode))
            self._as_root(status, lambda: _xattrs(source, target, name))
        times = [divmod(when, 1_000_000_000) for when in (status.st_atime_ns, status.st_mtime_ns)]
        self._as_root(status, lambda: syscalls.utimensat(target, name, *times))

    def _as_owner(self, status: os.stat_result, action: Callable[[], None]) -> None:
        """As the file's owner, else as root, who then gives it away."""
        self._identity.assume(Credentials(status.st_uid, status.st_gid, ()))
        try:
            return action()
        except PermissionError:
            self._identity.assume(ROOT)
            return action()
        finally:
            self._identity.assume(ROOT)

    def _as_root(self, status: os.stat_result, action: Callable[[], None]) -> None:
        """As root, else as the file's owner."""
        try:
            return action()
        except PermissionError:
            if not status.st_uid:
                raise
            self._identity.assume(Credentials(status.st_uid, status.st_gid, ()))
            try:
                return action()
            finally:
                self._identity.assume(ROOT)


def _create(name: bytes, target: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=target)


def _contents(source: int, target: int, name: bytes, size: int) -> None:
    """With its holes."""
    reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
    try:
        writing = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target)
        try:
            os.ftruncate(writing, size)
            for start, end in _extents(reading, size):
                os.lseek(writing, start, os.SEEK_SET)
                while start < end:
                    sent = os.sendfile(writing, reading, start, min(end - start, _PIECE))
                    if not sent:
                        break  # it has become shorter
                    start += sent
            os.fsync(writing)  # a full server says so here, not when the file is closed
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _extents(fd: int, size: int) -> List[Tuple[int, int]]:
    extents = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # nothing but a hole
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        extents.append((start, position))
    return extents


def _xattrs(source: int, target: int, name: bytes) -> None:
    """Those that the real side takes: it may have none of a kind."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    there = here = -1
    try:
        here = os.open(name, flags, dir_fd=source)
        there = os.open(name, flags, dir_fd=target)
        for attribute in os.listxattr(f"/proc/self/fd/{here}"):
            if attribute.startswith(_OURS):
                continue
            try:
                os.setxattr(f"/proc/self/fd/{there}", attribute, os.getxattr(f"/proc/self/fd/{here}", attribute))
            except OSError as error:
                if error.errno not in _NO_XATTRS:
                    raise
    finally:
        for fd in (here, there):
            if fd >= 0:
                os.close(fd)
