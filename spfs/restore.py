"""What a restorer does around a delayed mount: start a manager, mount, create files, block, ask for the real mount.

Files are only a scaffold, so that the restored processes can open them; their contents are the real file system's.
"""

from __future__ import annotations

import errno
import os
import stat
from types import TracebackType
from typing import Any, Dict, Iterable, List, Mapping, MutableMapping, NamedTuple, Optional, Sequence, Tuple, Type

from spfs.client import MODE_VARIABLE, SOCKET_VARIABLE, ManagerClient
from spfs.errors import SpfsError, UsageError, reason
from spfs.managerstart import ManagerStart
from stubfs import syscalls

PERMISSIONS = 0o777
"""Of what is made without permissions being given, and of parents: whoever is restored must be able to get there."""

_CONTAINED = syscalls.Resolve.NO_MAGICLINKS | syscalls.Resolve.NO_SYMLINKS | syscalls.Resolve.BENEATH
_MAX_CACHED = 64  # open parent directories at a time
_TYPES = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "fifo",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class FileSpec(NamedTuple):
    """A file to create. ``mode``: type and permissions as in st_mode; without permissions, PERMISSIONS.

    ``size``: bytes of a regular file, all of them a hole; ``target``: of a symbolic link. ``link_remap``: it stands for
    the file of this name on the real side, also for those who still have it open when this name is removed here.
    ``device``: of a block or character device, as st_rdev. ``owner``: uid and gid; None: who makes it.
    """

    path: str
    mode: Optional[int]
    size: Optional[int] = None
    target: Optional[str] = None
    link_remap: bool = False
    device: Optional[int] = None
    owner: Optional[Tuple[int, int]] = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "FileSpec":
        """UsageError for unknown keys or values of the wrong type."""
        kinds: Dict[str, type] = {"path": str, "mode": int, "size": int, "target": str, "link_remap": bool}
        kinds.update(device=int, owner=list)
        for key, value in record.items():
            if key not in kinds:
                raise UsageError(f"cannot create a file: unknown key {key!r}", "one of: " + ", ".join(kinds))
            if value is not None and type(value) is not kinds[key]:
                raise UsageError(f"cannot create a file: key {key}: {value!r} is no {kinds[key].__name__}")
        if record.get("path") is None:
            raise UsageError("cannot create a file: key path is missing")
        link_remap = bool(record.get("link_remap"))
        size, target, device = (record.get(key) for key in ("size", "target", "device"))
        owner = record.get("owner")
        if owner is not None and [type(one) for one in owner] != [int, int]:
            raise UsageError(f"cannot create a file: key owner: {owner!r} is not [uid, gid]")
        owned = None if owner is None else (owner[0], owner[1])
        return cls(record["path"], record.get("mode"), size, target, link_remap, device, owned)


def create_file(
    root_fd: int, path: str, mode: Optional[int], size: Optional[int] = None, target: Optional[str] = None
) -> None:
    """Create one file beneath the directory ``root_fd``, parents included. What exists already is fine.

    SpfsError: no mode, a type that cannot be made, a fifo with a size; or what the system says.
    """
    create_files(root_fd, [FileSpec(path, mode, size, target)])


def create_files(root_fd: int, files: Iterable[FileSpec]) -> None:
    """As create_file, for many. All are checked before the first one is made."""
    checked = list(files)
    for spec in checked:
        _check(spec)
    directories = _Directories(root_fd)
    try:
        for spec in checked:
            _create(directories, spec)
    finally:
        directories.close()


def _check(spec: FileSpec) -> None:
    if spec.mode is None:
        raise _bad(spec, "it has no mode", "give type and permissions, as in st_mode")
    kind = stat.S_IFMT(spec.mode)
    if kind not in _TYPES:
        raise _bad(spec, f"unknown type in mode {spec.mode:#o}", "one of: " + ", ".join(_TYPES.values()))
    if spec.mode != kind | stat.S_IMODE(spec.mode):
        raise _bad(spec, f"mode {spec.mode:#o} is no st_mode", "")
    if spec.size is not None and spec.size < 0:
        raise _bad(spec, f"negative size {spec.size}", "")
    if kind == stat.S_IFIFO and spec.size:
        raise _bad(spec, "a fifo with a size", "its contents are not a matter of the file", errno.ENOTSUP)
    if (kind == stat.S_IFLNK) != bool(spec.target):
        raise _bad(spec, "a target is for symbolic links, and they need one", "")
    if (kind in (stat.S_IFBLK, stat.S_IFCHR)) != (spec.device is not None):
        raise _bad(spec, "a device number is for devices, and they need one", "")
    if spec.device is not None and not 0 <= spec.device < 1 << 32:
        raise _bad(spec, f"no device number: {spec.device}", "give st_rdev")
    if spec.link_remap and kind != stat.S_IFREG:
        raise _bad(spec, "a link remap is a regular file", "")
    names = _names(spec)
    if not names and kind != stat.S_IFDIR:
        raise _bad(spec, "that is the root directory itself", "give a path beneath it")


def _names(spec: FileSpec) -> List[bytes]:
    names = [name for name in os.fsencode(spec.path).split(b"/") if name not in (b"", b".")]
    if b".." in names:
        raise _bad(spec, "leads out of the directory", "give a path without '..'", errno.EXDEV)
    if b"\0" in os.fsencode(spec.path):
        raise _bad(spec, "a NUL in the path", "")
    return names


def _bad(spec: FileSpec, why: str, hint: str, number: int = errno.EINVAL) -> SpfsError:
    return SpfsError(f"cannot create file: {spec.path}: {why}", hint, number)


def _create(directories: "_Directories", spec: FileSpec) -> None:
    assert spec.mode is not None
    names = _names(spec)
    if not names:
        root = directories.open(b"")
        if spec.owner is not None:
            os.chown(root, *spec.owner)
        return os.chmod(root, stat.S_IMODE(spec.mode) or PERMISSIONS)
    kind, permissions = stat.S_IFMT(spec.mode), stat.S_IMODE(spec.mode) or PERMISSIONS
    parent, name = b"/".join(names[:-1]), names[-1]
    try:
        directory = directories.open(parent)
        _make(directory, name, kind, permissions, spec)
    except FileExistsError:
        pass
    except OSError as error:
        raise SpfsError(
            f"cannot create {_TYPES[kind]}: {spec.path}: {reason(error)}", _hint(error), error.errno or errno.EIO
        ) from error


def _make(directory: int, name: bytes, kind: int, permissions: int, spec: FileSpec) -> None:
    """FileExistsError if there is something already."""
    if kind == stat.S_IFREG:
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, permissions, dir_fd=directory)
        try:
            if spec.size:
                os.ftruncate(fd, spec.size)
            if spec.owner is not None:
                os.fchown(fd, *spec.owner)  # before: it takes set-id bits
            os.fchmod(fd, permissions)  # whatever the umask is
            if spec.link_remap:
                from stubfs.backing import LINK_REMAP  # rare, and whoever restores is waited for

                os.setxattr(fd, LINK_REMAP, b"/".join(_names(spec)))
        finally:
            os.close(fd)
        return
    if kind == stat.S_IFLNK:
        assert spec.target is not None
        os.symlink(os.fsencode(spec.target), name, dir_fd=directory)
        return _own(directory, name, spec)
    if kind == stat.S_IFDIR:
        os.mkdir(name, permissions, dir_fd=directory)
    else:
        os.mknod(name, kind | permissions, spec.device or 0, dir_fd=directory)
    _own(directory, name, spec)
    _permit(directory, name, permissions)


def _permit(directory: int, name: bytes, permissions: int) -> None:
    """Whatever the umask is. Not by chmod(2): users of the mount may put a symbolic link there just now."""
    syscalls.fchmodat(directory, name, permissions)


def _own(directory: int, name: bytes, spec: FileSpec) -> None:
    if spec.owner is not None:
        os.chown(name, *spec.owner, dir_fd=directory, follow_symlinks=False)


def _hint(error: OSError) -> str:
    return {
        errno.EOPNOTSUPP: "somebody has put a symbolic link in its place",
        errno.ELOOP: "a symbolic link in the path: give the path that it stands for",
        errno.EXDEV: "it leads out of the directory",
        errno.ENOTDIR: "a parent of it is no directory",
    }.get(error.errno or 0, "")


class _Directories:
    """Open directories beneath ``root_fd``, made where they are missing; many files have the same parent."""

    def __init__(self, root_fd: int) -> None:
        self._root = root_fd
        self._open: Dict[bytes, int] = {}

    def open(self, path: bytes) -> int:
        """The fd stays ours."""
        if not path:
            return self._root
        if path not in self._open:
            if len(self._open) >= _MAX_CACHED:
                self.close()
            self._open[path] = self._open_or_make(path)
        return self._open[path]

    def _open_or_make(self, path: bytes) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            return syscalls.openat2(self._root, path, flags, 0, _CONTAINED)
        except FileNotFoundError:
            parent, _, name = path.rpartition(b"/")
            directory = self.open(parent)
            try:
                os.mkdir(name, PERMISSIONS, dir_fd=directory)
                _permit(directory, name, PERMISSIONS)
            except FileExistsError:
                pass
            return syscalls.openat2(self._root, path, flags, 0, _CONTAINED)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def set_env(
    manager_socket: str, mode: str = "stub", environment: Optional[MutableMapping[str, str]] = None
) -> None:
    """Tell action scripts which mode to ask for, and where: SPFS_MODE, SPFS_MANAGER_SOCK (by default in our own
    environment, which children inherit)."""
    environment = os.environ if environment is None else environment
    environment[MODE_VARIABLE] = mode
    environment[SOCKET_VARIABLE] = manager_socket


class Restore:
    """The delayed mounts of one restore: a manager, started if need be, and a connection to it.

    ::

        with Restore.start("/run/spfs-manager/4711") as restore:
            restore.mount("87", "/data", ns_pid=4711)
            restore.create_files("87", [FileSpec("dir/file", 0o100644, size=4096)])
            restore.request_replace("87", "server:/export", "nfs4", options="vers=4.2")
            ...                             # the processes are restored
            restore.stub()                  # from now on they block, until the server is there
    """

    def __init__(self, client: ManagerClient) -> None:
        """The client is ours from now on."""
        self.client = client
        self.request_replace = client.replace  # "request": it is accepted, and goes on by itself

    @classmethod
    def start(cls, work_dir: str, socket_path: Optional[str] = None) -> "Restore":
        """Connect to the manager at ``socket_path`` (default: control.sock in ``work_dir``); start one if need be."""
        path = socket_path or os.path.join(work_dir, "control.sock")
        try:
            return cls(ManagerClient(path))
        except SpfsError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
        ManagerStart(work_dir, path).wait()
        return cls(ManagerClient(path))

    def close(self) -> None:
        self.client.close()

    def __enter__(self) -> "Restore":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def set_env(self, mode: str = "stub") -> None:
        set_env(self.client.socket_path, mode)

    def mount(
        self,
        id: str,
        mountpoint: str,
        *,
        ns_pid: Optional[int] = None,
        ns_list: Optional[Sequence[str]] = None,
        root: Optional[str] = None,
        ns_mountpoint: Optional[str] = None,
    ) -> None:
        """A mount in restore mode; usable on return."""
        self.client.mount(
            id, mountpoint, "restore", ns_pid=ns_pid, ns_list=ns_list, root=root, ns_mountpoint=ns_mountpoint
        )

    def create_files(self, id: str, files: Iterable[FileSpec]) -> None:
        """Create files in bulk, without a FUSE request each."""
        directory = self.client.staging(id)
        try:
            create_files(directory, files)
        finally:
            os.close(directory)

    def mode(self, mode: str, id: Optional[str] = None) -> None:
        self.client.mode(mode, id)

    def stub(self, id: Optional[str] = None) -> None:
        """Shut the doors: every request blocks from now on."""
        self.client.mode("stub", id)

    def release(self, id: Optional[str] = None) -> None:
        """Begin the replaces that were asked for with ``begin="hold"``."""
        self.client.begin("release", id)
