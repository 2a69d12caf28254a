"""Where a file system is mounted: every mount of its device in every mount namespace, and how to get there.

A namespace without a process is found only through a ``Target`` that pins it. Nothing here causes a request to the
file system: mountinfo, mount ids and O_PATH descriptors of mount roots do without.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from spfs import nschild
from spfs.errors import SpfsError
from spfs.linux import namespaces
from spfs.linux.mountinfo import Mount, MountTable
from spfs.nschild import Answer
from spfs.target import Target

Device = Union[int, Tuple[int, int]]  # st_dev, or (major, minor)

_SCAN_TIMEOUT = 30.0  # seconds; reading mountinfo waits for whoever changes mounts, not for file systems


@dataclass(frozen=True)
class Instance:
    """One mount of the file system.

    ``root`` is the directory of the file system that it shows ("" = all of it), ``mountpoint`` its path from the root
    of its namespace (an inode number, of which ``pid`` is a member, None if only pinned). ``nested`` are the mounts on
    it, each after the one it is on; ``parent`` the one it is on, None at the root of the namespace; ``inside``: is it,
    directly or not, on another mount of the same file system?
    """

    mount: Mount
    namespace: int
    pid: Optional[int]
    parent: Optional[Mount]
    nested: Tuple[Mount, ...]
    inside: bool = False

    @property
    def mount_id(self) -> int:
        return self.mount.mount_id

    @property
    def mountpoint(self) -> str:
        return self.mount.mountpoint

    @property
    def root(self) -> str:
        return self.mount.root.strip("/")

    @property
    def options(self) -> Tuple[str, ...]:
        return self.mount.options

    @property
    def propagation(self) -> Tuple[Tuple[str, int], ...]:
        return self.mount.propagation

    @property
    def covered(self) -> bool:
        """Is another mount on its root, so that its path leads to that one?"""
        return any(m.parent_id == self.mount_id and m.mountpoint == self.mountpoint for m in self.nested)

    def describe(self) -> str:
        subdirectory = f" of {self.root}" if self.root else ""
        where = f"process {self.pid}" if self.pid else f"mount namespace {self.namespace}"
        return f"{self.mountpoint}{subdirectory} ({where})"


def major_minor(device: Device) -> Tuple[int, int]:
    return (os.major(device), os.minor(device)) if isinstance(device, int) else device


def instances(device: Device, targets: Sequence[Target] = (), source: Optional[str] = None) -> List[Instance]:
    """Every mount of ``device``, in the namespaces of all processes and in those that ``targets`` pin.

    Device numbers are used again as soon as nothing holds the file system any more. Who cannot be sure that it still
    lives gives its ``source``, as mountinfo shows it, if that is unlike all others'.
    """
    wanted = major_minor(device)
    found = []
    with _all_namespaces(targets) as opened:
        pids = {inode: pid for inode, (_, pid) in opened.items()}
        for inode, content in _tables(opened, b" %d:%d " % wanted).items():
            table = MountTable.from_bytes(content)
            ours = [m for m in table.mounts if m.device == wanted and source in (None, m.source)]
            here = [(mount, tuple(table.beneath(mount.mount_id))) for mount in ours]
            inner = {mount.mount_id for _, nested in here for mount in nested}
            for mount, nested in here:
                parent = table.by_id.get(mount.parent_id)
                found.append(Instance(mount, inode, pids[inode], parent, nested, mount.mount_id in inner))
    return found


def _tables(opened: Mapping[int, Tuple[int, Optional[int]]], needle: bytes) -> Dict[int, bytes]:
    """Namespace inode → mountinfo as seen from the namespace's root, for those that hold ``needle``."""

    def visit() -> Answer:
        # A task's own table, read by the way of a descriptor: /proc need not be mounted there.
        proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
        nschild.forbid_imports()
        tables = {}
        for inode, (fd, _) in opened.items():
            try:
                namespaces.setns(fd, namespaces.CLONE_NEWNS)
            except OSError as error:
                if error.errno == errno.EPERM:  # of a user namespace that is not beneath ours: not ours to change
                    continue
                raise
            content = read_mountinfo(proc)
            if needle in content:
                tables[str(inode)] = os.fsdecode(content)
        return tables, []

    with nschild.call(visit, _SCAN_TIMEOUT) as result:
        value: Dict[str, str] = result.value
    return {int(inode): os.fsencode(content) for inode, content in value.items()}


def read_mountinfo(proc: int) -> bytes:
    """mountinfo beneath ``proc``, a descriptor of /proc/PID."""
    parts: List[bytes] = []
    fd = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        while True:
            part = os.read(fd, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    finally:
        os.close(fd)


@contextmanager
def _all_namespaces(targets: Sequence[Target]) -> Iterator[Dict[int, Tuple[int, Optional[int]]]]:
    """Inode number → (fd, a member's pid), while the block lasts."""
    opened: Dict[int, Tuple[int, Optional[int]]] = {}
    try:
        for name in filter(str.isdigit, os.listdir("/proc")):
            path = f"/proc/{name}/ns/mnt"
            try:
                inode = os.stat(path).st_ino
                if inode not in opened:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    # Looked at again: the pid may be another process' by now.
                    if os.fstat(fd).st_ino in opened:
                        os.close(fd)
                    else:
                        opened[os.fstat(fd).st_ino] = (fd, int(name))
            except OSError:  # ended, a zombie, or a kernel thread
                continue
        for target in targets:
            if target.mount_namespace not in opened and "mnt" in target.namespaces:
                opened[target.mount_namespace] = (os.dup(target.namespaces["mnt"]), None)
        yield opened
    finally:
        for fd, _ in opened.values():
            os.close(fd)


def pin_namespace(instance: Instance, targets: Sequence[Target] = ()) -> Target:
    """A target of nothing but the mount namespace of ``instance``, at that namespace's own root; the caller's.

    SpfsError ESRCH if the namespace is gone.
    """
    for target in targets:
        if "mnt" in target.namespaces and target.mount_namespace == instance.namespace:
            return Target(instance.pid, -1, {"mnt": os.dup(target.namespaces["mnt"])}, -1, None)
    with _all_namespaces(targets) as opened:
        if instance.namespace in opened:
            fd, pid = opened[instance.namespace]
            return Target(pid, -1, {"mnt": os.dup(fd)}, -1, None)
    raise SpfsError(
        f"cannot enter the mount namespace of {instance.describe()}: it is gone",
        "its mounts went with its last process",
        errno.ESRCH,
    )


def mount_id(fd: int, proc: int) -> int:
    """The id of the mount that ``fd`` is on (proc(5), fdinfo), without a request to its file system.

    ``proc``: a descriptor of our /proc/self.
    """
    info = os.open(f"fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        fields: Dict[str, Any] = dict(line.split(":\t") for line in os.read(info, 4096).decode().splitlines())
    finally:
        os.close(info)
    return int(fields["mnt_id"])
