"""What was found to be held on the old mount, as records. Pure data: nothing here reads /proc or touches a process.

What can be shared between tasks (descriptor table, working directory, memory) has a record of its own with one task
that stands for all its users.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import Dict, FrozenSet, List, NamedTuple, Optional, Set, Tuple

from spfs.linux import procfs, statx
from spfs.linux.memcg import MemoryCgroup
from spfs.linux.procfs import Lock
from spfs.references import Kind

NOT_CHOSEN = "is not among the processes to be moved"  # a process's problem that is none of its own


@dataclass(eq=False)
class Carried:
    """A regular file that was made on the new mount for one without a name. The descriptors are not this record's.

    ``target`` can be written to until it is done; ``source`` (O_PATH) is what the old file system has of it, -1 if only
    its users have it.
    """

    inode: int
    target: int
    source: int = -1
    done: bool = False  # it has its contents


@dataclass(eq=False)
class Description:
    """An open file description of the old mount: one object however many descriptors refer to it.

    ``copy`` is our descriptor of it (-1 for what is out of reach), ``new`` that of its counterpart (-1: none yet); both
    are closed by ``close``.
    """

    object: statx.Object
    flags: int  # status flags as F_GETFL gives them
    kind: Kind
    position: int
    copy: int = -1
    new: int = -1
    path: Optional[str] = None
    problem: Optional[str] = None  # why it stays where it is
    elsewhere: bool = False  # not in the part of the file system that is to be left
    moved: bool = False  # somebody has the counterpart by now: its offset and flags are its own
    locks: Tuple[Lock, ...] = ()  # those that belong to the description: flock, OFD locks, leases
    carried: Optional[Carried] = None  # the counterpart is a file of ours that gets its contents when nobody runs

    @property
    def special(self) -> bool:
        """Whether more than the descriptor, the offset and the flags must be taken care of."""
        if self.carried is not None:
            return True
        if self.kind is Kind.FILE:  # nearly all are, and thousands are asked
            return bool(self.locks)
        return self.kind is not Kind.PATH and self.kind is not Kind.SYMLINK

    def close(self) -> None:
        for fd in (self.copy, self.new):
            if fd >= 0:
                os.close(fd)
        self.copy = self.new = -1


@dataclass(eq=False)
class Place:
    """A working or root directory, or an executable, of the old mount."""

    object: statx.Object
    kind: Kind
    new: int = -1
    path: Optional[str] = None
    problem: Optional[str] = None
    elsewhere: bool = False
    moved: bool = False

    def close(self) -> None:
        if self.new >= 0:
            os.close(self.new)
        self.new = -1


@dataclass(eq=False)
class Holding:
    """What a descriptor that is not of the old mount holds of it: a watch, a bound socket, a registered file.

    ``holder`` is what the descriptor refers to, ``copy`` a descriptor of ours for it, not this record's (-1: none).
    ``new``, which is this record's: the new file in place of the held one; with ``exchanged`` what is to be put in
    the descriptor's place. ``detail`` tells several holdings of one descriptor apart. ``attached``: it keeps nothing of
    the mount itself, but must go when something else does, and with it alone.
    """

    number: int
    kind: Kind
    inode: int  # of what is held; 0 if that is not known
    holder: statx.Object
    detail: str = ""
    exchanged: bool = False
    attached: bool = False
    copy: int = -1
    new: int = -1
    path: Optional[str] = None
    problem: Optional[str] = None
    elsewhere: bool = False
    moved: bool = False

    @property
    def what(self) -> str:
        return f"fd {self.number} {self.detail}".rstrip()

    def close(self) -> None:
        if self.new >= 0:
            os.close(self.new)
        self.new = -1


@dataclass(frozen=True)
class EpollEntry:
    """A descriptor that is registered with an epoll instance, as fdinfo shows it."""

    epoll: int
    number: int
    events: int
    data: int
    inode: int
    device: int  # st_dev


class Loss(NamedTuple):
    """What did not survive the move of descriptor ``number``, or of what it holds."""

    kind: Kind
    number: int
    why: str


@dataclass(eq=False)
class FdTable:
    """A descriptor table: ``numbers`` are all its descriptors, ``held`` those of the old mount."""

    tid: int
    numbers: Set[int] = field(default_factory=set)
    held: Dict[int, Description] = field(default_factory=dict)
    limit: int = 0  # RLIMIT_NOFILE, soft and hard
    hard_limit: int = 0
    holdings: List[Holding] = field(default_factory=list)
    locks: List[Tuple[int, Lock]] = field(default_factory=list)  # POSIX: descriptor they were set by, and the lock
    epolls: Dict[int, List[EpollEntry]] = field(default_factory=dict)  # by epoll descriptor, of all it has
    owner: Optional["FdTable"] = None  # another process's record of the same table, which is operated on instead
    moved: Set[int] = field(default_factory=set)
    failures: Dict[int, str] = field(default_factory=dict)
    losses: List[Loss] = field(default_factory=list)

    @property
    def in_use(self) -> bool:
        return bool(self.held or self.holdings)

    @property
    def exchangeable(self) -> List[Holding]:
        return [holding for holding in self.holdings if holding.exchanged]

    def close(self) -> None:
        for holding in self.holdings:
            holding.close()


@dataclass(eq=False)
class FsContext:
    """What CLONE_FS shares: working and root directory (None: not on the old mount)."""

    tid: int
    cwd: Optional[Place] = None
    root: Optional[Place] = None
    owner: Optional["FsContext"] = None


@dataclass(eq=False)
class Region:
    """A mapping of the old mount."""

    mapping: procfs.Mapping
    object: statx.Object
    kind: Kind
    flags: FrozenSet[str]  # VmFlags of smaps
    file_mode: int  # how the file it was made from had been opened: stat.S_IRUSR, S_IWUSR
    carried: Optional[Carried] = None
    new: int = -1
    path: Optional[str] = None
    problem: Optional[str] = None
    elsewhere: bool = False
    moved: bool = False

    @property
    def what(self) -> str:
        return f"mapping {self.mapping.start:x}-{self.mapping.end:x}"


@dataclass(eq=False)
class Memory:
    """An address space: ``lines`` are the lines of maps that are on the device.

    ``cgroups`` limit what it can have of memory (None: not looked up), with ``sharers`` that are to be moved.
    """

    tid: int
    lines: List[bytes] = field(default_factory=list)
    regions: List[Region] = field(default_factory=list)
    exe: Optional[Place] = None
    maps: bytes = b""
    owner: Optional["Memory"] = None
    cgroups: Optional[List[MemoryCgroup]] = None
    sharers: int = 1


@dataclass(eq=False)
class Process:
    """A thread group and what it holds. ``close`` closes ``pidfd`` and the places; descriptions are the examiner's."""

    pid: int
    command: str
    start: int
    pidfd: int
    status: procfs.Status
    tids: Set[int] = field(default_factory=set)
    tables: List[FdTable] = field(default_factory=list)
    contexts: List[FsContext] = field(default_factory=list)
    memory: Optional[Memory] = None
    problem: Optional[str] = None  # why nothing of it can be moved
    traced: bool = False  # that is the problem

    @property
    def uses_mount(self) -> bool:
        memory = self.memory
        return any(not record.elsewhere and not _is_attached(record) for record in self.records()) or (
            memory is not None and len(memory.lines) > len(memory.regions)
        )

    @property
    def is_concerned(self) -> bool:
        """Whether it uses the mount, or holds what must go with what another one uses."""
        return self.uses_mount or any(not record.elsewhere for record in self.records())

    def records(self) -> "List[Description | Place | Region | Holding]":
        """Everything that it holds."""
        found: "List[Description | Place | Region | Holding]" = []
        for table in self.tables:
            found += table.held.values()
            found += table.holdings
        return [*found, *self.places(), *(self.memory.regions if self.memory else ())]

    def places(self) -> List[Place]:
        found = [place for context in self.contexts for place in (context.cwd, context.root) if place]
        return found + ([self.memory.exe] if self.memory and self.memory.exe else [])

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        for place in self.places():
            place.close()
        for table in self.tables:
            table.close()


def _is_attached(record: "Description | Place | Region | Holding") -> bool:
    return isinstance(record, Holding) and record.attached


def kind_of(mode: int, flags: int) -> Kind:
    if flags & os.O_PATH:
        return Kind.PATH
    return {
        stat.S_IFREG: Kind.FILE,
        stat.S_IFDIR: Kind.DIRECTORY,
        stat.S_IFIFO: Kind.FIFO,
        stat.S_IFSOCK: Kind.SOCKET,
        stat.S_IFLNK: Kind.SYMLINK,
    }.get(stat.S_IFMT(mode), Kind.DEVICE)
