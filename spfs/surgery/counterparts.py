"""Opens on the new mount what processes hold on the old one: same path, same flags, as the same user.

Done before anything stands still. What cannot be opened gets the reason into its record's ``problem``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from functools import partial
from typing import Callable, Container, Dict, Iterable, Iterator, List, Optional, Set, Tuple

from spfs.errors import reason
from spfs.linux import procfs, statx
from spfs.linux.openat2 import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2
from spfs.linux.process import Credentials, UserIds
from spfs.references import Kind, MountRoot, Resolver
from spfs.surgery.kinds import devices
from spfs.surgery.nameless import Nameless
from spfs.surgery.records import Description, Place, Process, Region

# What must not be done again when a file is opened once more; O_CLOEXEC belongs to the descriptor, O_ASYNC is set
# when the owner is.
_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC | os.O_ASYNC
_TMPFILE = 0o20000000  # __O_TMPFILE
SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME | os.O_ASYNC  # by F_SETFL, fcntl(2)
_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
_PAGE = 4096
_F_GET_RW_HINT, _F_SET_RW_HINT = 1035, 1036
_F_GETOWNER_UIDS = 17
_NOBODY = (1 << 32) - 1  # (uid_t)-1
NO_MOUNT = -1  # an id that no mount has

_NAMES = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class Counterparts:
    """Opens counterparts beneath the roots of the new mounts. Descriptors go to the records, which close them;
    those of mappings are shared between records and closed by ``close``."""

    def __init__(self, resolver: Resolver, roots: Callable[[int], MountRoot]) -> None:
        self._resolver = resolver
        self._roots = roots
        self._paths: Dict[int, Optional[str]] = {}
        self._mapped: Dict[Tuple[int, int, bool], int] = {}
        # How each counterpart was opened, by its descriptor; of those that were closed meanwhile, too.
        self._how: Dict[int, Tuple[procfs.Status, statx.Object, int]] = {}
        self._nameless = Nameless(resolver)

    def close(self) -> None:
        self.forget()
        self._nameless.close()

    def forget(self) -> None:
        """After a round: but what has no name is not made twice for who turns up with it later."""
        for fd in self._mapped.values():
            os.close(fd)
        self._mapped.clear()
        self._how.clear()

    def open_again(self, processes: Iterable[Process], mounts: Container[int]) -> List[str]:
        """Open the counterparts of what was on old ``mounts`` (ids) once more, behind the same descriptors and with
        the same offsets and flags: their new roots are others by now. What could not be is told; it keeps what it had.
        """
        wanted = {fd for process in processes for old, fd in _counterparts(process) if old.mount_id in mounts}
        failures: List[str] = []
        for fd in wanted:
            status, old, flags = self._how[fd]
            try:
                again = self._open_as(status, old, flags)
                try:
                    if not flags & os.O_PATH:
                        _copy_state(fd, again)
                    os.dup2(again, fd, inheritable=False)
                finally:
                    os.close(again)
            except OSError as error:
                failures.append(f"{self._paths.get(old.inode) or '.'}: {reason(error)}")
        return failures

    def provide(self, processes: Iterable[Process]) -> None:
        """Open what is still missing for the references of ``processes``."""
        processes = list(processes)
        self._resolve(processes)
        done: Set[int] = set()
        for process in processes:
            for table in process.tables:
                for description in table.held.values():
                    if id(description) not in done:
                        done.add(id(description))
                        self._description(process.status, description)
            for directory in process.places():
                self._attempt(directory, partial(self._place, process.status, directory))
            for region in process.memory.regions if process.memory else ():
                self._attempt(region, partial(self._region, process.status, region))

    def provide_one(self, status: procfs.Status, description: Description) -> None:
        """For a description that is in no process's table; what could not be opened has the reason as its problem."""
        self._learn({description.object.inode})
        self._description(status, description)

    def open_path(self, status: procfs.Status, inode: int) -> int:
        """The counterpart of what is not known to be on any one of the old mounts, as O_PATH; the caller's. OSError."""
        return self._open_beneath(status, inode, lambda relative: relative, os.O_PATH | os.O_NOFOLLOW)

    def open_parent(self, status: procfs.Status, inode: int) -> int:
        """The directory that it is in."""
        return self._open_beneath(status, inode, os.path.dirname, os.O_PATH | os.O_DIRECTORY)

    def _open_beneath(
        self, status: procfs.Status, inode: int, which: Callable[[str], str], flags: int
    ) -> int:
        path, root = self._paths.get(inode), self.root(NO_MOUNT)
        if path is None:
            raise OSError(errno.ESTALE, "it has no name that is known")
        relative = root.relative(path)
        if relative is None:
            raise OSError(errno.EXDEV, "it lies outside of what its mount shows")
        found = which(relative) or "."
        return _as_user(status, lambda: openat2(root.fd, found, flags, _RESOLVE))

    def root(self, mount_id: int) -> MountRoot:
        """OSError ESTALE if none is to take the place of that mount."""
        try:
            return self._roots(mount_id)
        except LookupError:
            raise OSError(errno.ESTALE, f"mount {mount_id} is not among those that are replaced") from None

    def path(self, inode: int) -> Optional[str]:
        """Of something that the processes given to ``provide`` hold, relative to the file system's root."""
        return self._paths.get(inode)

    def _resolve(self, processes: Iterable[Process]) -> None:
        wanted: Set[int] = set()
        for process in processes:
            wanted.update(d.object.inode for t in process.tables for d in t.held.values())
            wanted.update(place.object.inode for place in process.places())
            wanted.update(h.inode for t in process.tables for h in t.holdings if h.inode)
            if process.memory:
                wanted.update(region.object.inode for region in process.memory.regions)
        self._learn(wanted)

    def _learn(self, wanted: Set[int]) -> None:
        wanted = wanted - self._paths.keys()
        if wanted:
            found = self._resolver.paths(wanted)
            self._paths.update(found)
            self._nameless.learn(inode for inode, path in found.items() if path is None)

    def _attempt(self, record: "Description | Place | Region", action: Callable[[], None]) -> None:
        if record.problem is not None or record.new >= 0:
            return
        try:
            action()
        except OSError as error:
            if error.errno == errno.ENOENT:
                record.problem = "there is no such file on the new mount"
            else:
                record.problem = f"its counterpart cannot be opened: {reason(error)}"

    def _description(self, status: procfs.Status, description: Description) -> None:
        description.path = self._paths.get(description.object.inode)
        if description.kind is Kind.DEVICE and description.problem is None:
            description.problem = devices.obstacle(description.object)

        def action() -> None:
            flags = description.flags & ~_ONCE
            if flags & _TMPFILE:
                flags &= ~(_TMPFILE | os.O_DIRECTORY)
            mode = description.object.mode
            if flags & os.O_PATH and stat.S_ISLNK(mode):
                flags |= os.O_NOFOLLOW
            description.new = self._open(status, description.object, flags)
            if description.path is None:
                description.carried = self._nameless.carried(description.object)
            _copy_owner(description.copy, description.new, description.flags)
            if description.kind is Kind.FILE:
                _copy_hint(description.copy, description.new)

        self._attempt(description, action)

    def _fifo(self, status: procfs.Status, old: statx.Object, flags: int) -> int:
        # Opened for both, which never waits (fifo(7)), so that neither does the opening of one end.
        both = self._open_file(status, old, os.O_RDWR | os.O_NONBLOCK)
        try:
            fd = self._open_file(status, old, flags | os.O_NONBLOCK)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & SETTABLE)
            return fd
        finally:
            os.close(both)

    def _place(self, status: procfs.Status, place: Place) -> None:
        place.path = self._paths.get(place.object.inode)
        flags = os.O_RDONLY if place.kind is Kind.EXE else os.O_PATH | os.O_DIRECTORY
        place.new = self._open(status, place.object, flags)

    def _region(self, status: procfs.Status, region: Region) -> None:
        region.path = self._paths.get(region.object.inode)
        # Of a file opened for reading only, a shared mapping can never be made writable: neither must the new one.
        writable = region.mapping.shared and bool(region.file_mode & stat.S_IWUSR)
        key = (region.object.inode, region.object.mount_id, writable)
        fd = self._mapped.get(key)
        if fd is None:
            fd = self._open(status, region.object, os.O_RDWR if writable else os.O_RDONLY)
            self._mapped[key] = fd
        if region.path is None:
            region.carried = self._nameless.carried(region.object)
        size = region.object.size if region.carried is not None else os.fstat(fd).st_size
        end = region.mapping.offset + region.mapping.end - region.mapping.start
        if size < min(end, region.object.size) and -(-size // _PAGE) < -(-min(end, region.object.size) // _PAGE):
            region.problem = f"its counterpart is too short: {size} bytes, mapped are {end}"
            return
        region.new = fd

    def _open(self, status: procfs.Status, old: statx.Object, flags: int) -> int:
        fd = self._open_as(status, old, flags)
        self._how[fd] = (status, old, flags)
        return fd

    def _open_as(self, status: procfs.Status, old: statx.Object, flags: int) -> int:
        if stat.S_ISFIFO(old.mode) and not flags & os.O_PATH:
            return self._fifo(status, old, flags)
        if _is_device(old.mode) and not flags & os.O_PATH:
            fd = self._open_file(status, old, flags | os.O_NOCTTY | os.O_NONBLOCK)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & SETTABLE)
            return fd
        return self._open_file(status, old, flags)

    def _open_file(self, status: procfs.Status, old: statx.Object, flags: int) -> int:
        root = self.root(old.mount_id)
        path = self._paths.get(old.inode)
        if path is None:
            link = self._nameless.link(old, status, root)
            return _as_user(status, lambda: os.open(link, flags & ~os.O_NOFOLLOW | os.O_CLOEXEC))
        relative = root.relative(path)
        if relative is None:
            raise OSError(errno.EXDEV, "it lies outside of what its mount shows")
        relative = relative or "."
        # The type first: opening a fifo could wait, and opening a device could do anything.
        # As the user already: on a server that takes root for nobody, root may not even look.
        fd = _as_user(status, lambda: openat2(root.fd, relative, os.O_PATH | os.O_NOFOLLOW, _RESOLVE))
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
        if stat.S_IFMT(found.st_mode) != stat.S_IFMT(old.mode):
            old_name, new_name = (_NAMES.get(stat.S_IFMT(mode), "?") for mode in (old.mode, found.st_mode))
            raise OSError(errno.EINVAL, f"it is a {new_name} there, not a {old_name}")
        if _is_device(old.mode) and found.st_rdev != old.rdev:
            raise OSError(errno.EINVAL, "it is another device there")
        return _as_user(status, lambda: openat2(root.fd, relative, flags, _RESOLVE))


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _as_user(status: procfs.Status, open_it: Callable[[], int]) -> int:
    try:
        with Credentials(status.uid, status.gid, status.groups):
            return open_it()
    except PermissionError:
        # The process may have opened it before it gave up privileges, or got it from somebody who had them.
        return open_it()


def _counterparts(process: Process) -> Iterator[Tuple[statx.Object, int]]:
    """What the process holds, with the descriptors of the counterparts that there are and nobody has yet."""
    held = [one for table in process.tables for one in table.held.values() if not one.moved]
    records: List["Description | Place | Region"] = [*held, *process.places()]
    records += process.memory.regions if process.memory else ()
    return ((record.object, record.new) for record in records if record.new >= 0)


def _copy_state(old: int, new: int) -> None:
    """Offset, status flags and owner, from one description that is ours to another one."""
    copy_flags(old, new)
    if not stat.S_ISFIFO(os.fstat(old).st_mode):
        os.lseek(new, os.lseek(old, 0, os.SEEK_CUR), os.SEEK_SET)


def _copy_hint(old: int, new: int) -> None:
    """How long what is written is expected to live: the kernel has it in the inode, in memory alone (fcntl(2))."""
    try:
        hint = fcntl.fcntl(old, _F_GET_RW_HINT, bytes(8))
        if any(hint):
            fcntl.fcntl(new, _F_SET_RW_HINT, hint)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the kernel knows no hints
            raise


def copy_flags(old: int, new: int) -> None:
    """Status flags and owner."""
    flags = fcntl.fcntl(old, fcntl.F_GETFL)
    fcntl.fcntl(new, fcntl.F_SETFL, flags & SETTABLE & ~os.O_ASYNC)
    _copy_owner(old, new, flags)


def _copy_owner(old: int, new: int, flags: int) -> None:
    """F_SETOWN, F_SETSIG and O_ASYNC. Owner ids are translated by the kernel to and from our pid namespace.

    Whom the owner may signal goes by who set it (sigio_perm in fs/fcntl.c): that must not be root from now on.
    """
    if flags & os.O_PATH:
        return
    owner = fcntl.fcntl(old, 16, bytes(8))  # F_GETOWN_EX
    if owner[4:] != bytes(4):
        ids = struct.unpack("<2I", fcntl.fcntl(old, _F_GETOWNER_UIDS, bytes(8)))
        if _NOBODY in ids:
            raise OSError(errno.EOVERFLOW, "the user who asked for signals is none of our user namespace")
        with UserIds(*ids):
            fcntl.fcntl(new, 15, owner)  # F_SETOWN_EX
    number = fcntl.fcntl(old, fcntl.F_GETSIG)
    if number:
        fcntl.fcntl(new, fcntl.F_SETSIG, number)
    if flags & os.O_ASYNC:
        fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(new, fcntl.F_GETFL) | os.O_ASYNC)
