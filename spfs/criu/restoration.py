"""One restore by CRIU and its delayed mounts: prepare them, block them, let their replaces begin, or take all away.

Each step may be repeated, and by another process: what is known is in a directory below /run and in the manager.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from spfs.criu import cgroups, manager, record
from spfs.criu.delayed import CONTAINER, DelayedMount, Place, PlannedFile
from spfs.criu.manager import STATE
from spfs.errors import SpfsError, reason
from spfs.linux import mountapi
from spfs.linux.mountapi import MS

if TYPE_CHECKING:
    from spfs.restore import FileSpec, Restore

TOKEN_VARIABLE = "SPFS_CRIU_TOKEN"
"""By which the action script is told which restoration it belongs to."""

_HIDDEN = "mounts"
_ENDING = (errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.EBUSY, errno.EADDRINUSE)
_ENDING_TIMEOUT = 10.0  # seconds for a manager to end; it lets its clients have their last answers
_TRY_AGAIN = 0.05  # seconds


class Restoration:
    """``token`` names it as long as the machine runs; ids of its mounts in the manager are KEY@TOKEN."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.directory = os.path.join(STATE, token)
        self._mounts: Optional[List[DelayedMount]] = None

    @property
    def known(self) -> bool:
        """Has it begun, and not yet come to its end?"""
        return os.path.isdir(self.directory)

    def id(self, mount: DelayedMount) -> str:
        return f"{mount.key}@{self.token}"

    def hidden(self, mount: DelayedMount) -> str:
        """A mountpoint that nobody knows but we and CRIU, for a mount that is then seen elsewhere."""
        return os.path.join(self.directory, _HIDDEN, mount.key)

    def begin(self, mounts: Sequence[DelayedMount]) -> None:
        """Remember what it is about; does nothing if that is remembered already."""
        for path in (STATE, self.directory):
            manager.make_directory(path)
        if record.read(self.directory) is None:
            record.write(self.directory, mounts)
            self._mounts = list(mounts)

    def mounts(self) -> List[DelayedMount]:
        if self._mounts is None:
            self._mounts = record.read(self.directory) or []
        return self._mounts

    def prepare(self) -> None:
        """Mount all, create their files, and ask for the real ones. After a failure nothing of it is left."""
        deadline = time.monotonic() + _ENDING_TIMEOUT
        while True:
            try:
                return self._prepare_all()
            except SpfsError as error:
                # The manager of an earlier restore may be ending, with its last mount: nothing of ours is there then.
                if error.errno not in _ENDING or time.monotonic() > deadline:
                    raise
            time.sleep(_TRY_AGAIN)

    def _prepare_all(self) -> None:
        with self._manager(start=True) as restore:
            there = self._rows(restore)
            try:
                for mount in self.mounts():
                    if self.id(mount) not in there:
                        self._prepare(restore, mount)
            except BaseException:
                try:
                    self._take_away(restore)
                except SpfsError as error:
                    if error.errno not in _ENDING:
                        raise
                raise

    def _prepare(self, restore: Restore, mount: DelayedMount) -> None:
        base, shown = self._base(mount)
        if base.startswith(self.directory + "/"):
            for path in (os.path.dirname(base), base):
                manager.make_directory(path)
        id = self.id(mount)
        restore.client.mount(id, base, "restore", ns_mountpoint=shown, options=_own_options(mount))
        restore.create_files(id, [_spec(file) for file in mount.files or ()])
        for place in mount.places:
            if not mount.namespaced and place.mountpoint != base:
                _bind(base, place)
        self._ask(restore, mount)

    def _ask(self, restore: Restore, mount: DelayedMount, freezer: Optional[str] = None, pid: int = 0) -> None:
        """For the real mount, held back. ``pid`` and ``freezer`` cgroup: of the restored tree, when it is there."""
        _, shown = self._base(mount)
        restore.request_replace(
            self.id(mount), mount.source, mount.type, mount.flags, mount.options, begin="hold",
            bindmounts=[place.mountpoint for place in mount.places if place.mountpoint != shown],
            # CRIU has made these names on the server, and can remove them only here.
            remove=[file.path for file in mount.files or () if file.original is not None],
            freeze_cgroup=freezer,
            net_pid=pid if pid and mount.network == CONTAINER else None,
        )  # fmt: skip

    def settle(self, pid: int, criu: Sequence[int]) -> None:
        """The tree of process ``pid`` is there: ask for the real mounts in its network, and with its freezer cgroup.
        ``criu``: the processes of CRIU, which may still be in that."""
        freezer = cgroups.freezer_of(pid, criu)
        with self._manager() as restore:
            rows = self._rows(restore)
            for mount in self.mounts():
                wanted = (rows.get(self.id(mount)) or {}).get("replace") or {}
                if wanted.get("phase") == "held" and (freezer is not None or mount.network == CONTAINER):
                    self._ask(restore, mount, freezer, pid)

    def _base(self, mount: DelayedMount) -> Tuple[str, str]:
        """Where it is to be mounted for CRIU, and the path that users know it by."""
        whole = [place.mountpoint for place in mount.places if not place.subdirectory]
        shown = (whole or [place.mountpoint for place in mount.places])[0]
        if not mount.namespaced:
            return (whole[0] if whole else self.hidden(mount)), shown
        if mount.host is None:
            raise SpfsError(
                f"cannot restore delayed mount {mount.key} on {shown}: nobody says where it is mounted for CRIU",
                f"restore by spfs-criu restore, or give its place outside of the container: host, for {mount.key}",
                errno.EINVAL,
            )
        return mount.host, shown

    def block(self, exempt: Sequence[int] = ()) -> None:
        """From now on whoever touches one of the mounts waits, except for the processes ``exempt``."""
        with self._manager() as restore:
            for id, row in self._rows(restore).items():
                if row["mode"] != "proxy":  # else its replace has begun
                    restore.client.mode("stub", id, exempt=exempt)

    def release(self) -> None:
        """CRIU has let the processes go: the replaces may begin. The end of the restoration."""
        with self._manager() as restore:
            for id, row in self._rows(restore).items():
                if (row["replace"] or {}).get("phase") == "held":
                    restore.release(id)
        self.forget()

    def hide(self) -> None:
        """Take the mounts away from where only CRIU needed them: it has made its own of them."""
        for mount in self.mounts():
            _umount(self.hidden(mount))

    def abandon(self) -> None:
        """CRIU has failed: take away what nobody uses. Processes that do live, after all, get their real mount."""
        try:
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # whoever started CRIU does this, and the guard
            if self.known:
                try:
                    with self._manager() as restore:
                        self._take_away(restore)
                except SpfsError as error:
                    if error.errno != errno.ENOENT:
                        raise  # else it has not come to its first mount
                self.forget()
        finally:
            os.close(fd)

    def _take_away(self, restore: Restore) -> None:
        for id, row in self._rows(restore).items():
            if row["mode"] == "restore":
                restore.client.unmount(id, force=True)  # nobody can have been let go
                continue
            try:
                restore.client.unmount(id)
            except SpfsError as error:
                if error.errno != errno.EBUSY:
                    raise
                restore.release(id)

    def forget(self) -> None:
        """Remove what is known of it; its mounts are the manager's alone from now on."""
        if not self.known:
            return
        mounts = self.mounts()
        self.hide()
        _tell(self.guard_path)
        # Name by name: nothing may be removed that is mounted there after all.
        for mount in mounts:
            _remove(os.rmdir, self.hidden(mount))
        _remove(os.rmdir, os.path.join(self.directory, _HIDDEN))
        for path in (self.guard_path, self.answer_path, self.pid_path, self.script):
            _remove(os.unlink, path)
        _remove(os.unlink, os.path.join(self.directory, record.NAME))
        _remove(os.rmdir, self.directory)

    @property
    def script(self) -> str:
        """Where the action script of a restore by spfs-criu is kept."""
        return os.path.join(self.directory, "action")

    @property
    def guard_path(self) -> str:
        """The fifo by which the guard is asked to do a stage's part, and told that all is well."""
        return os.path.join(self.directory, "guard")

    @property
    def answer_path(self) -> str:
        """The fifo on which it answers."""
        return os.path.join(self.directory, "answer")

    @property
    def pid_path(self) -> str:
        return os.path.join(self.directory, "pid")

    @contextmanager
    def _manager(self, start: bool = False) -> Iterator[Restore]:
        with manager.connect(start) as restore:
            yield restore

    def _rows(self, restore: Restore) -> Dict[str, Dict[str, Any]]:
        rows = restore.client.status()["mounts"]
        return {row["id"]: row for row in rows if row["id"].endswith(f"@{self.token}")}


def _own_options(mount: DelayedMount) -> str:
    """The stand-in's: it may have less restrictions than is usual, if the real mount has. CRIU takes off what was not
    there at the dump, which it cannot do in a user namespace (mount_namespaces(7): flags are locked)."""
    from spfs.mountoptions import MountOptions

    flags = MountOptions.parse(mount.flags, mount.options).flags
    return ",".join(word for flag, word in ((MS.NOSUID, "suid"), (MS.NODEV, "dev")) if not flags & flag)


def _spec(file: PlannedFile) -> FileSpec:
    from spfs.restore import FileSpec

    size = file.size if stat.S_ISREG(file.mode) else None
    return FileSpec(file.path, file.mode, size, file.target, file.original is not None, file.device, file.owner)


def _bind(base: str, place: Place) -> None:
    source = os.path.join(base, place.subdirectory)
    try:
        mount_fd = mountapi.open_tree(mountapi.AT_FDCWD, source, mountapi.OPEN_TREE_CLONE)
        try:
            mountapi.move_mount(mount_fd, mountapi.AT_FDCWD, place.mountpoint)
        finally:
            os.close(mount_fd)
    except OSError as error:
        raise SpfsError(
            f"cannot bind delayed mount {base} to {place.mountpoint}: {reason(error)}",
            "the directory must exist, as at the dump",
            error.errno or errno.EIO,
        ) from error


def _umount(path: str) -> None:
    try:
        mountapi.umount2(path, mountapi.MNT_DETACH | mountapi.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # nothing is mounted there
            raise


def _remove(how: Callable[[str], None], path: str) -> None:
    try:
        how(path)
    except FileNotFoundError:
        pass


def _tell(fifo: str) -> None:
    try:
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # there is no guard
    os.write(fd, b"end\n")
    os.close(fd)
