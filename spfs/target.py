"""The process whose namespaces a request is about, pinned: pids are reused, descriptors are not.

A ``Target`` owns its descriptors. Pinned namespaces live as long as it does, also without a process in them, and with
them every mount there: whoever keeps a target must drop it when its processes are gone.
"""

from __future__ import annotations

import errno
import os
import select
from types import TracebackType
from typing import Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Type

from spfs.errors import SpfsError, reason
from spfs.linux import namespaces
from spfs.linux.openat2 import RESOLVE_IN_ROOT, openat2

_PATH_FLAGS = os.O_PATH | os.O_CLOEXEC
_NO_ROOT = (None, "", "(null)", "/")  # "(null)": what C callers print for a root that is not set


class Target:
    """Pinned namespaces (name → fd), a pidfd (-1 without a process) and an O_PATH fd of the root (-1: our own)."""

    def __init__(
        self, pid: Optional[int], pidfd: int, pinned: Mapping[str, int], root_fd: int, root: Optional[str]
    ) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.namespaces: Dict[str, int] = dict(pinned)
        self.root_fd = root_fd
        self.root = root
        self._start = -1 if pid is None else _start_time(pid)

    @classmethod
    def pin(
        cls, pid: Optional[int] = None, names: Optional[Sequence[str]] = None, root: Optional[str] = None
    ) -> "Target":
        """Pin the namespaces ``names`` of ``pid``, by default all that are not ours, and its root.

        ``root`` is a directory as seen by ``pid`` (a chroot tree there). Without a pid: our own namespaces. SpfsError
        ESRCH if there is no such process, EINVAL for a name that is no namespace, ENOENT or ENOTDIR for a bad root.
        """
        root = None if root in _NO_ROOT else root
        unknown = sorted(set(names or ()) - set(namespaces.NAMESPACES))
        if unknown:
            raise SpfsError(
                f"cannot pin namespaces of process {pid}: {', '.join(unknown)}: no such kind of namespace",
                f"known are {', '.join(namespaces.NAMESPACES)}",
            )
        if pid is None:
            return cls(None, -1, {}, _open_root("/", root, None) if root else -1, root)
        if pid <= 0:
            raise SpfsError(f"cannot pin namespaces of process {pid}: not a process id", errno=errno.EINVAL)
        fds: List[int] = []
        try:
            try:
                # First of all: what is opened after it is of the same process if that still lives at the end.
                pidfd = os.pidfd_open(pid)
                fds.append(pidfd)
                pinned = {}
                for name in names if names is not None else namespaces.NAMESPACES:
                    fd = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
                    fds.append(fd)
                    # Our own need no joining, and the kernel refuses to join one's own user namespace.
                    if os.fstat(fd).st_ino != namespaces.inode("self", name):
                        pinned[name] = fd
            except OSError as error:
                raise _unpinned(pid, error) from error
            root_fd = _open_root(f"/proc/{pid}/root", root, pid)
            fds.append(root_fd)
            if _ended(pidfd):
                raise _unpinned(pid, ProcessLookupError(errno.ESRCH, "it ended meanwhile"))
        except BaseException:
            _close_all(fds)
            raise
        _close_all(fd for fd in fds if fd not in (pidfd, root_fd, *pinned.values()))
        return cls(pid, pidfd, pinned, root_fd, root)

    @classmethod
    def from_inodes(cls, identity: Mapping[str, int], root: Optional[str] = None) -> "Target":
        """Pin again what ``identity`` described, through any process that is still in those namespaces.

        The one of then is preferred, if its pid was not reused. SpfsError ESRCH if nobody is left in them.
        """
        wanted = {name: identity[name] for name in namespaces.NAMESPACES if name in identity}
        if "pid_number" not in identity:
            return cls.pin(None, root=root)
        if not wanted and _start_time(identity["pid_number"]) != identity.get("pid_start"):
            # It was in our own namespaces, which are still there.
            return cls.pin(None, root=root)
        for pid in _candidates(identity["pid_number"], wanted):
            try:
                target = cls.pin(pid, list(wanted), root)
            except SpfsError:
                continue
            inodes = {name: os.fstat(fd).st_ino for name, fd in target.namespaces.items()}
            if inodes == wanted:
                return target
            target.close()
        raise SpfsError(
            f"cannot pin the namespaces of process {identity['pid_number']} again: no process is left in them",
            "the mount in them is gone with its last process",
            errno.ESRCH,
        )

    def identity(self) -> Dict[str, int]:
        """What ``from_inodes`` needs: namespace name → inode number, the process' pid and start time. JSON-able."""
        identity = {name: os.fstat(fd).st_ino for name, fd in self.namespaces.items()}
        if self.pid is not None:
            identity["pid_number"] = self.pid
            identity["pid_start"] = self._start
        return identity

    @property
    def dead(self) -> bool:
        """Has the process ended? The pinned namespaces are usable all the same."""
        return self.pidfd >= 0 and _ended(self.pidfd)

    @property
    def mount_namespace(self) -> int:
        """Inode number of the mount namespace: the pinned one, or ours."""
        fd = self.namespaces.get("mnt", -1)
        return os.fstat(fd).st_ino if fd >= 0 else namespaces.inode("self", "mnt")

    def in_network_of(self, other: "Target") -> "Target":
        """This one in the network namespace of ``other``: all descriptors stay theirs, so it must not be closed."""
        names = {name: fd for name, fd in self.namespaces.items() if name != "net"}
        if "net" in other.namespaces:  # else it is ours
            names["net"] = other.namespaces["net"]
        return Target(self.pid, self.pidfd, names, self.root_fd, self.root)

    def describe(self) -> str:
        """For messages: ``process 12 (mnt, net; root /vz/102)``."""
        if self.pid is None:
            place = "our own namespaces"
        else:
            place = f"process {self.pid} ({', '.join(self.namespaces) or 'our own namespaces'})"
        return f"{place}, root {self.root}" if self.root else place

    def fds(self) -> List[int]:
        """All descriptors that belong to this target."""
        return [fd for fd in (self.pidfd, self.root_fd, *self.namespaces.values()) if fd >= 0]

    def close(self) -> None:
        fds = self.fds()
        self.pidfd = self.root_fd = -1
        self.namespaces = {}
        _close_all(fds)

    def __enter__(self) -> "Target":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


def members(wanted: Mapping[str, int]) -> Iterator[int]:
    """The processes that are in all of the namespaces ``wanted`` (name → inode number)."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if all(namespaces.inode(entry, name) == inode for name, inode in wanted.items()):
                    yield int(entry)
            except OSError:  # ended, or a kernel thread's or zombie's
                continue


def _start_time(pid: int) -> int:
    """When the process was started, in clock ticks since boot (proc(5)): with the pid it names it. -1: gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return -1


def _candidates(first: int, wanted: Mapping[str, int]) -> Iterator[int]:
    yield first
    # Only by namespaces that are not ours: without any, a reused pid could not be told from the right one, nor could
    # any process of the machine.
    if wanted:
        yield from members(wanted)


def _open_root(base: str, root: Optional[str], pid: Optional[int]) -> int:
    try:
        base_fd = os.open(base, _PATH_FLAGS | os.O_DIRECTORY)
    except OSError as error:
        raise _unpinned(pid, error) from error
    if root is None:
        return base_fd
    try:
        # Absolute symlinks in it mean the target's root, not ours.
        return openat2(base_fd, root, _PATH_FLAGS | os.O_DIRECTORY, RESOLVE_IN_ROOT)
    except OSError as error:
        where = "here" if pid is None else f"in process {pid}"
        raise SpfsError(
            f"cannot use root directory: {root} {where}: {reason(error)}",
            "it must be a directory, as that process sees it",
            error.errno or errno.EINVAL,
        ) from error
    finally:
        os.close(base_fd)


def _unpinned(pid: Optional[int], error: OSError) -> SpfsError:
    # /proc/PID/ns of a zombie gives ENOENT or EACCES: to the caller all are one, it is not there.
    gone = error.errno in (errno.ESRCH, errno.ENOENT)
    return SpfsError(
        f"cannot pin namespaces: process {pid}: {'no such process' if gone else reason(error)}",
        "it must live until the request is answered" if gone else "needs root and CAP_SYS_PTRACE over it",
        errno.ESRCH if gone else error.errno or errno.EIO,
    )


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
