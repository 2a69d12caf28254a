"""Counterparts of what has no name on the old mount any more: files that were removed while they are in use.

Where the old file system only passes requests on to the new one, the file it still has open is the counterpart itself.
Else one is made on the new mount, without a name as well, and regular files get their contents when nobody runs.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Optional

from spfs.linux import procfs, statx
from spfs.linux.process import Credentials
from spfs.references import MountRoot, Resolver
from spfs.surgery.records import Carried
from stubfs import syscalls

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
_NAME = ".spfs-%s"  # for the moment in which a file system must have one
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)  # open(2): EISDIR before Linux 3.11


class Nameless:
    """Owns the descriptors of all such counterparts until ``close``; those that are used are opened from them."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._found: Dict[int, _Object] = {}

    def close(self) -> None:
        for one in self._found.values():
            one.close()
        self._found.clear()

    def learn(self, inodes: Iterable[int]) -> None:
        """Ask for what is left of ``inodes``, none of which has a name."""
        unknown = [inode for inode in inodes if inode not in self._found]
        for inode, remains in self._resolver.remains(unknown).items() if unknown else ():
            self._found[inode] = _Object(remains.fd, real=remains.on_target)

    def link(self, old: statx.Object, status: procfs.Status, root: MountRoot) -> str:
        """A path by which the counterpart of ``old`` can be opened; made if there is none yet. OSError."""
        if old.inode not in self._found and old.links:
            raise OSError(errno.ESTALE, "it has no name that is known")  # but one: no copy of it is to be made
        found = self._found.setdefault(old.inode, _Object())
        if found.real:
            return f"/proc/self/fd/{found.remains}"
        if found.made < 0:
            made = _make(old, status, root)
            try:
                _reserve(made, old)
            except OSError:
                os.close(made)
                raise
            found.made = made
        return f"/proc/self/fd/{found.made}"

    def carried(self, old: statx.Object) -> Optional[Carried]:
        """What must be copied to the counterpart before it is used; one object for all users. None: nothing."""
        found = self._found.get(old.inode)
        if found is None or found.real or found.made < 0 or not stat.S_ISREG(old.mode):
            return None
        if found.carried is None:
            found.carried = Carried(old.inode, found.made, found.remains)
        return found.carried


@dataclass
class _Object:
    remains: int = -1  # O_PATH: what the old file system still has of it
    real: bool = False  # ``remains`` is on the new one
    made: int = -1
    carried: Optional[Carried] = None

    def close(self) -> None:
        for fd in (self.remains, self.made):
            if fd >= 0:
                os.close(fd)


def _make(old: statx.Object, status: procfs.Status, root: MountRoot) -> int:
    """A descriptor of a new object without a name, like ``old`` in type, permissions and owner."""
    try:
        return _make_beneath(old, root.fd)
    except PermissionError:
        # A server that does not trust our root may let the user do it (who then owns the file).
        with Credentials(status.uid, status.gid, status.groups):
            return _make_beneath(old, root.fd)


def _reserve(fd: int, old: statx.Object) -> None:
    """Have room for the contents, which come when it is too late to say that there is none. OSError ENOSPC, EDQUOT …"""
    length = min(old.size, old.allocated) if stat.S_ISREG(old.mode) else 0
    try:
        if length:
            syscalls.fallocate(fd, _KEEP_SIZE, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _make_beneath(old: statx.Object, directory: int) -> int:
    mode = stat.S_IMODE(old.mode)
    if stat.S_ISREG(old.mode):
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            fd = _with_name(directory, lambda name: _create(name, directory), os.O_RDWR, os.unlink)
    elif stat.S_ISDIR(old.mode):
        fd = _with_name(directory, lambda name: os.mkdir(name, 0o700, dir_fd=directory), os.O_RDONLY, os.rmdir)
    elif stat.S_ISFIFO(old.mode):
        fd = _with_name(directory, lambda name: os.mkfifo(name, 0o600, dir_fd=directory), os.O_RDWR, os.unlink)
    else:
        raise OSError(errno.ESTALE, "it has no name any more (deleted)")
    try:
        if (os.fstat(fd).st_uid, os.fstat(fd).st_gid) != (old.uid, old.gid):
            os.fchown(fd, old.uid, old.gid)
        os.fchmod(fd, mode)
    except PermissionError:
        pass  # root_squash: it can be used all the same by those who have it open
    return fd


def _create(name: str, directory: int) -> None:
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory))


def _with_name(
    directory: int, make: Callable[[str], object], flags: int, remove: Callable[..., None]
) -> int:
    name = _NAME % secrets.token_hex(8)
    make(name)
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    finally:
        remove(name, dir_fd=directory)
