"""One generation of contents: a directory fd and the operations beneath it, none of which leaves it.

Paths are bytes relative to the directory, without a leading slash; b"" is the directory itself. Parents are
resolved by openat2 without following any link, the last component never is one that gets followed.
Credentials are the calling thread's, but for the way to the parent: the kernel has asked for each step of the caller's
own way already, which may have begun in a directory that this caller could not have got to. Everything raises OSError.
"""

from __future__ import annotations

import errno
import os
from typing import Callable, Dict, Tuple, TypeVar

from stubfs import syscalls
from stubfs.credentials import OVER_DIRECTORIES, insist, ourselves
from stubfs.syscalls import Resolve

_T = TypeVar("_T")
_INSIDE = int(Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS)
_PATH_MAX = 4096  # limits.h: of one path that a call takes, with its NUL; a tree may be deeper
_PARENT = os.O_PATH | os.O_DIRECTORY
_SLASH = ord("/")  # to look for: for b"/" in bytes, "in" takes a multiple of the time
# What a caller's open flags may ask of the backing file. Not O_DIRECT: our buffers are not aligned as it wants, and
# FUSE has bypassed the page cache already.
_OPEN_FLAGS = (
    os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NOATIME | os.O_NONBLOCK | os.O_DIRECTORY
)
_ONCE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY


def allowed_flags(flags: int) -> int:
    """Of a caller's open flags, those that make sense for the backing file.

    With O_NONBLOCK: what is a regular file to the kernel may be a fifo by now, which must not hang us.
    """
    return flags & _OPEN_FLAGS | os.O_NONBLOCK | os.O_CLOEXEC


def reopen_flags(flags: int) -> int:
    """``flags`` less what must happen only at the first open: O_TRUNC would empty the file again."""
    return flags & ~_ONCE_FLAGS


LINK_REMAP = b"security.spfs.link_remap"
"""Extended attribute of a staging file: the name by which it is to be found on the real side, whatever it had here."""


def _status(name: bytes, parent: int) -> os.stat_result:
    return os.lstat(name, dir_fd=parent)


class Backing:
    """Owns ``fd`` (a directory, O_PATH or not), which close() closes."""

    def __init__(self, fd: int, number: int, is_staging: bool) -> None:
        self.fd = fd
        self.number = number
        self.is_staging = is_staging
        # Whether a file in it can have an extended attribute that we ask for unasked, security.capability or a mark of
        # our own: not while only we could have set one, and have not.
        self.may_have_xattrs = not is_staging

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _parent(self, path: bytes) -> Tuple[int, bytes]:
        """(fd of the parent, last component); the fd is the directory's own or to be given to _done."""
        parent, slash, name = path.rpartition(b"/")
        if not slash:
            return self.fd, name or b"."
        try:
            return self._walk(parent), name
        except PermissionError:
            with ourselves():
                return self._walk(parent), name

    def _walk(self, path: bytes) -> int:
        """An O_PATH fd of a directory beneath, which the caller closes; also where the path is longer than PATH_MAX."""
        fd = self.fd
        while True:
            cut = len(path) if len(path) < _PATH_MAX else path.rindex(b"/", 0, _PATH_MAX)
            above = fd
            try:
                fd = syscalls.openat2(above, path[:cut], _PARENT, 0, _INSIDE)
            finally:
                self._done(above)
            path = path[cut + 1 :]
            if not path:
                return fd

    def _done(self, parent: int) -> None:
        if parent != self.fd:
            os.close(parent)

    def _in_parent(self, path: bytes, action: Callable[[bytes, int], _T]) -> _T:
        """``action`` on the last component and an fd of its parent."""
        parent, name = self._parent(path)
        try:
            try:
                return action(name, parent)
            except PermissionError:
                return insist(lambda fd: action(name, fd), parent, OVER_DIRECTORIES)
        finally:
            self._done(parent)

    def stat(self, path: bytes) -> os.stat_result:
        if _SLASH not in path:
            try:
                return os.lstat(path or b".", dir_fd=self.fd)
            except PermissionError:
                pass
        return self._in_parent(path, _status)

    def open(self, path: bytes, flags: int, mode: int = 0) -> int:
        """open(2) with these flags, following nothing; the caller closes the fd."""
        try:
            if _SLASH not in path:
                # Nothing to resolve, and no link to follow: what os has does it, at half the price.
                return os.open(path or b".", flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=self.fd)
            return syscalls.openat2(self.fd, path, flags, mode, _INSIDE)
        except OSError as error:
            if error.errno != errno.EACCES and len(path) < _PATH_MAX:
                raise
            parent, name = self._parent(path)
            try:
                return syscalls.openat2(parent, name, flags, mode, _INSIDE)
            except PermissionError:
                if not flags & os.O_CREAT:
                    raise
                # Power over the directory is none over a file that is there by now.
                return insist(
                    lambda fd: syscalls.openat2(fd, name, flags | os.O_EXCL, mode, _INSIDE), parent, OVER_DIRECTORIES
                )
            finally:
                self._done(parent)

    def pin(self, path: bytes) -> int:
        """An O_PATH fd of the object, of whatever type, which nobody needs a right to; the caller closes it."""
        try:
            return self.open(path, os.O_PATH | os.O_NOFOLLOW)
        except PermissionError:
            with ourselves():
                return self.open(path, os.O_PATH | os.O_NOFOLLOW)

    @property
    def may_keep_names(self) -> bool:
        """Whether there can be one that keeps() is true of."""
        return False

    def keeps(self, path: bytes) -> bool:
        """Whether this name is only to seem removed."""
        return False

    # What makes a name returns the attributes of what is there then.

    def mkdir(self, path: bytes, mode: int) -> os.stat_result:
        def make(name: bytes, parent: int) -> os.stat_result:
            os.mkdir(name, mode, dir_fd=parent)
            return _status(name, parent)

        return self._in_parent(path, make)

    def mknod(self, path: bytes, mode: int, device: int) -> os.stat_result:
        def make(name: bytes, parent: int) -> os.stat_result:
            os.mknod(name, mode, device, dir_fd=parent)
            return _status(name, parent)

        return self._in_parent(path, make)

    def symlink(self, target: bytes, path: bytes) -> os.stat_result:
        def make(name: bytes, parent: int) -> os.stat_result:
            os.symlink(target, name, dir_fd=parent)
            return _status(name, parent)

        return self._in_parent(path, make)

    def link(self, old: bytes, new: bytes) -> os.stat_result:
        old_parent, old_name = self._parent(old)
        try:
            new_parent, new_name = self._parent(new)
            try:
                os.link(old_name, new_name, src_dir_fd=old_parent, dst_dir_fd=new_parent, follow_symlinks=False)
                return os.stat(new_name, dir_fd=new_parent, follow_symlinks=False)
            finally:
                self._done(new_parent)
        finally:
            self._done(old_parent)

    def link_fd(self, fd: int, path: bytes) -> os.stat_result:
        """A name for an open file without one: what open(2) says of O_TMPFILE."""
        parent, name = self._parent(path)
        try:
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent, follow_symlinks=True)
            return os.lstat(name, dir_fd=parent)
        finally:
            self._done(parent)

    def unlink(self, path: bytes) -> None:
        self._in_parent(path, lambda name, parent: os.unlink(name, dir_fd=parent))

    def rmdir(self, path: bytes) -> None:
        self._in_parent(path, lambda name, parent: os.rmdir(name, dir_fd=parent))

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        old_parent, old_name = self._parent(old)
        try:
            new_parent, new_name = self._parent(new)
            try:
                if flags:
                    syscalls.renameat2(old_parent, old_name, new_parent, new_name, flags)
                else:
                    os.rename(old_name, new_name, src_dir_fd=old_parent, dst_dir_fd=new_parent)
            finally:
                self._done(new_parent)
        finally:
            self._done(old_parent)


class Staging(Backing):
    """Where restore mode keeps its files: a tmpfs that is mounted nowhere, so nothing can be left behind.

    Where that is not allowed (no CAP_SYS_ADMIN) a private temporary directory, which close() removes.
    """

    def __init__(self, number: int) -> None:
        self._directory = ""
        super().__init__(self._make(), number, is_staging=True)

    def _make(self) -> int:
        try:
            return _detached_tmpfs({"source": "stubfs-staging", "mode": "0755"})
        except OSError:
            import tempfile

            self._directory = tempfile.mkdtemp(prefix="stubfs-")
            root = os.path.join(self._directory, "root")
            os.mkdir(root, 0o755)
            return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def may_keep_names(self) -> bool:
        return self.may_have_xattrs

    def keeps(self, path: bytes) -> bool:
        """A name that stands for the same name on the real side, where it is the only one left of a removed file.

        A restorer has such names made at the dump, removes them here when it has opened the file, and cannot remove
        them there. Those who have the file open find it by this name.
        """
        try:
            fd = self.pin(path)
        except OSError:
            return False
        try:
            return os.getxattr(f"/proc/self/fd/{fd}", LINK_REMAP) == path
        except OSError:
            return False
        finally:
            os.close(fd)

    def directory(self) -> int:
        """A new fd of the directory, open for reading; the caller closes it, and may do there what it likes."""
        self.may_have_xattrs = True
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)

    def discard(self) -> None:
        """Remove what would outlive the process: nothing, in the usual case."""
        directory, self._directory = self._directory, ""
        if directory:
            import shutil

            shutil.rmtree(directory, ignore_errors=True)


def _detached_tmpfs(options: Dict[str, str]) -> int:
    context = syscalls.fsopen("tmpfs")
    try:
        for key, value in options.items():
            syscalls.fsconfig(context, key, value)
        syscalls.fsconfig(context, None)
        return syscalls.fsmount(context, syscalls.MountAttr.NOSUID | syscalls.MountAttr.NODEV)
    finally:
        os.close(context)
