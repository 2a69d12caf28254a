"""What a process can hold on a mount, and the two things surgery must be told about the mount itself.

Pure data: nothing here reads /proc or touches a process (``spfs.surgery`` does). Imported by whoever prepares a
mount for a switch (``MountRoot``) or knows the names behind the old one's inode numbers (``Resolver``).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Dict, Iterable, Optional, Protocol


@dataclass(frozen=True)
class MountRoot:
    """Where the references of one old mount go: the new mount's root, and which part of the tree it shows.

    ``fd`` is an O_PATH or directory descriptor, owned by whoever made the object. ``prefix`` is the subdirectory of
    the old file system that stands at the root of the mount ("" = the whole file system), so that "a/b/c" of the file
    system is "c" beneath ``fd`` when the prefix is "a/b".
    """

    fd: int
    prefix: str = ""

    def relative(self, path: str) -> Optional[str]:
        """``path`` of the file system as seen from this root; None if it lies outside of what the mount shows."""
        if not self.prefix:
            return path
        if path == self.prefix:
            return ""
        return path[len(self.prefix) + 1 :] if path.startswith(self.prefix + "/") else None


@dataclass(frozen=True)
class Remains:
    """A file without a name. ``fd``: O_PATH, of whoever gets the object. ``on_target``: it is on the new file system,
    to which the old one only passes requests on, and so is what is to be had there itself."""

    fd: int
    on_target: bool


class Resolver(Protocol):
    """Who knows what an inode number of the old mount stands for."""

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        """The path of each inode number, relative to the file system's root ("" = the root); None = no name left."""

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        """What the old file system itself still has of those without a name; nothing for one that knows of none."""


class Kind(enum.Enum):
    """The kinds of references, by the names that reports use."""

    FILE = "file"
    DIRECTORY = "directory"
    FIFO = "fifo"
    PATH = "path"
    CWD = "cwd"
    ROOT = "root"
    EXE = "exe"
    SHARED_MAPPING = "shared mapping"
    PRIVATE_MAPPING = "private mapping"
    SOCKET = "socket"
    DEVICE = "device"
    SYMLINK = "symlink"
    INOTIFY = "inotify watch"
    FANOTIFY = "fanotify watch"
    LOCK = "lock"
    IN_FLIGHT = "descriptor in flight"
    RING = "io_uring file"
    EPOLL = "epoll registration"


@dataclass(frozen=True)
class HeldReference:
    """Whose (``pid`` of the thread group; 0: the kernel's own), what, and ``reason``: why it stays where it is (None:
    it need not).

    ``what`` tells which one within the process ("fd 3", "mapping 7f00-7f01", "cwd"); ``path`` is relative to the file
    system's root, None when it has no name.
    """

    pid: int
    command: str
    kind: str
    what: str
    path: Optional[str]
    reason: Optional[str]


@dataclass(frozen=True)
class LeftReference(HeldReference):
    """A reference that still is on the old mount."""

    reason: str
