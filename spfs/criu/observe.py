"""What is mounted for a process that is to be dumped, and which of it is to be delayed at its restore."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Callable, Dict, List, Optional, Sequence, Set, Tuple

from spfs.criu.delayed import CONTAINER, HOST, DelayedMount, Place, PlannedFile, Wish, unlike
from spfs.errors import SpfsError, UsageError, reason
from spfs.linux import namespaces, openat2
from spfs.linux.mountinfo import Mount, MountTable

NETWORK_TYPES = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "lustre", "beegfs", "gfs2", "ocfs2", "pvfs2"]
    + ["fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.davfs2", "fuse.curlftpfs"]
)
# Without a source there is nothing to be mounted again; what they held is gone, or in CRIU's images.
_SOURCELESS = frozenset(["tmpfs", "ramfs", "overlay", "proc", "sysfs", "devtmpfs", "devpts", "mqueue", "cgroup2"])
# What mountinfo shows and mount(2) does not take, or what was true of this client alone.
_NOT_OPTIONS = re.compile(r"(ro|rw|seclabel|(clientaddr|user_id|group_id|rootmode|fd)=.*)")


class Observed:
    """The mounts of process ``pid``. Close it: it holds the roots of those that are to be delayed."""

    def __init__(self, pid: int, wishes: Sequence[Wish]) -> None:
        """Without ``wishes`` all network file systems. SpfsError for a process or mount that is not there."""
        try:
            with open(f"/proc/{pid}/mountinfo", "rb") as file:
                table = MountTable.from_bytes(file.read())
            self.namespaced = namespaces.inode(str(pid), "mnt") != namespaces.inode("self", "mnt")
            networked = namespaces.inode(str(pid), "net") != namespaces.inode("self", "net")
        except OSError as error:
            raise SpfsError(
                f"cannot look at the mounts of process {pid}: {reason(error)}",
                "give the process that is to be dumped: -t PID",
                errno.ESRCH,
            ) from error
        self._roots: Dict[str, Tuple[int, str]] = {}
        found = _wished(table, wishes) if wishes else _network(table)
        hosts = _own_table() if self.namespaced else MountTable([])
        described = [_describe(wish, primary, table, hosts, self.namespaced) for wish, primary in found]
        primaries = [primary for _, primary in found]
        self.mounts = unlike([_in_network(*one, networked, hosts) for one in zip(described, primaries)])
        ours = {place.mountpoint for mount in self.mounts for place in mount.places}
        self.others = [mount.mountpoint for mount in table.mounts if mount.mountpoint not in ours]
        try:
            for mount, (_, primary) in zip(self.mounts, found):
                self._hold(pid, mount, primary)
        except BaseException:
            self.close()
            raise

    def _hold(self, pid: int, mount: DelayedMount, primary: Mount) -> None:
        path = f"/proc/{pid}/root{primary.mountpoint}"
        try:
            # The directory lives on when the process and its namespace are gone. O_PATH: no server is asked.
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SpfsError(
                f"cannot look into {primary.mountpoint} of process {pid}: {reason(error)}",
                "is it hidden by a mount above it? then there is nothing to delay",
                error.errno or errno.EIO,
            ) from error
        shown = next(place.subdirectory for place in mount.places if place.mountpoint == primary.mountpoint)
        self._roots[mount.key] = (fd, shown)

    def looks(self) -> Dict[str, Callable[[str], Optional[PlannedFile]]]:
        """Key → what is at a path of that file system, None if nothing is, or it is not in what can be seen."""
        return {key: lambda path, key=key: self._look(key, path) for key in self._roots}  # type: ignore[misc]

    def _look(self, key: str, path: str) -> Optional[PlannedFile]:
        fd, shown = self._roots[key]
        if shown and not (path + "/").startswith(shown + "/"):
            return None
        below = path[len(shown) :].strip("/")
        parent, name = os.path.split(below)
        try:
            directory = openat2.openat2(fd, parent or ".", os.O_PATH | os.O_DIRECTORY, openat2.RESOLVE_IN_ROOT)
            try:
                there = os.stat(name or ".", dir_fd=directory, follow_symlinks=False)
                target = os.readlink(name, dir_fd=directory) if stat.S_ISLNK(there.st_mode) else None
            finally:
                os.close(directory)
        except OSError:
            return None
        size = there.st_size if stat.S_ISREG(there.st_mode) else None
        device = there.st_rdev if stat.S_ISCHR(there.st_mode) or stat.S_ISBLK(there.st_mode) else None
        return PlannedFile(path, there.st_mode, size, target, device=device, owner=(there.st_uid, there.st_gid))

    def close(self) -> None:
        while self._roots:
            os.close(self._roots.popitem()[1][0])

    def __enter__(self) -> "Observed":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _own_table() -> MountTable:
    with open("/proc/self/mountinfo", "rb") as file:
        return MountTable.from_bytes(file.read())


def _wished(table: MountTable, wishes: Sequence[Wish]) -> List[Tuple[Wish, Mount]]:
    found = []
    for wish in wishes:
        if wish.mountpoint is None:
            raise UsageError(f"cannot delay {wish.key}: no mountpoint", f"--delayed {wish.key}=MOUNTPOINT")
        mount = table.top_at(wish.mountpoint)
        if mount is None:
            raise SpfsError(
                f"cannot delay {wish.key}: nothing is mounted on {wish.mountpoint}",
                "give a mountpoint as the process sees it",
                errno.EINVAL,
            )
        found.append((wish, mount))
    return found


def _network(table: MountTable) -> List[Tuple[Wish, Mount]]:
    """One mount of each network file system, with a key from its path."""
    found: Dict[int, Tuple[Wish, Mount]] = {}
    keys: Set[str] = set()
    for mount in sorted(table.mounts, key=lambda one: (len(one.root), len(one.mountpoint))):
        if mount.fstype in NETWORK_TYPES and mount.st_dev not in found:
            word = re.sub(r"[^A-Za-z0-9_.-]+", "-", mount.mountpoint.strip("/"))[:50] or "root"
            key = word if word not in keys else f"{word}-{len(keys)}"
            keys.add(key)
            found[mount.st_dev] = (Wish(key, mount.mountpoint), mount)
    return list(found.values())


def _describe(wish: Wish, primary: Mount, table: MountTable, hosts: MountTable, namespaced: bool) -> DelayedMount:
    if wish.source is None and primary.fstype in _SOURCELESS:
        raise UsageError(
            f"cannot delay {wish.key}: {primary.mountpoint} is {primary.fstype}, which has nothing to be mounted again",
            f"say what shall take its place: --delayed {wish.key}={primary.mountpoint},type=…,source=…",
        )
    root = "/" if wish.source is None else primary.root
    places: List[Place] = []
    for mount in [primary, *(one for one in table.mounts if one is not primary)]:
        if mount.st_dev != primary.st_dev or table.top_at(mount.mountpoint) is not mount:
            continue
        if not (mount.root + "/").startswith(root.rstrip("/") + "/"):
            if not namespaced:
                continue  # stays as it is
            raise SpfsError(
                f"cannot delay {wish.key}: {mount.mountpoint} shows {mount.root} of the same file system, which is not"
                f" within {root}, that is to be seen on {primary.mountpoint}",
                "name the mount that shows the most of it",
                errno.EINVAL,
            )
        external = wish.key if mount is primary else f"{wish.key}.{len(places)}"
        below = mount.root[len(root.rstrip("/")) :].strip("/")
        places.append(Place(mount.mountpoint, below, external if namespaced else ""))
    same = [one for one in hosts.mounts if one.st_dev == primary.st_dev and one.root == primary.root]
    return DelayedMount(
        key=wish.key,
        type=wish.type or primary.fstype,
        source=wish.source or primary.source,
        flags=wish.flags or 0,
        options=wish.options if wish.options is not None else "" if wish.source is not None else options_of(primary),
        root=root,
        places=tuple(places),
        host=wish.host or (same[0].mountpoint if same else None),
        network=wish.network,
    )


def _in_network(mount: DelayedMount, primary: Mount, networked: bool, hosts: MountTable) -> DelayedMount:
    """``networked``: do they have a network of their own?"""
    # A volume was mounted by the host, and is there, too; what only they have, they have mounted themselves.
    theirs = networked and hosts.mounts and all(one.st_dev != primary.st_dev for one in hosts.mounts)
    return mount._replace(network=mount.network or (CONTAINER if theirs else HOST))


def options_of(mount: Mount) -> str:
    """What has to be given to mount(2) to get such a mount again; not what was true of this client alone."""
    words = [word for word in mount.super_options.split(",") if word and not _NOT_OPTIONS.fullmatch(word)]
    words += [word for word in mount.options if word not in ("ro", "rw")]
    readonly = "ro" in mount.options or "ro" in mount.super_options.split(",")
    return ",".join([*words, "ro" if readonly else "rw"])
