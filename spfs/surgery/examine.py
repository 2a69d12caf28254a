"""Finds the processes that hold something of a device, and what: by /proc alone, never by asking the file system.

The result is a set of ``Process`` records; ``spfs.surgery.compare`` tells later whether they still are true. What
can be shared between tasks (descriptor table, working directory, memory) has a record of its own with one task that
stands for all its users.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Container, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from spfs.linux import process, procfs, statx
from spfs.linux.calls import CallTable, address_of, run_local
from spfs.references import Kind
from spfs.surgery import locks

OUT_OF_REACH = "a thread has it in a table of its own, which cannot be reached before Linux 6.9"


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
    flock: Optional[int] = None  # fcntl.LOCK_SH or LOCK_EX, which goes along

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
class FdTable:
    """A descriptor table: ``numbers`` are all its descriptors, ``held`` those of the old mount."""

    tid: int
    numbers: Set[int] = field(default_factory=set)
    held: Dict[int, Description] = field(default_factory=dict)
    limit: int = 0  # RLIMIT_NOFILE, soft and hard
    hard_limit: int = 0
    watches: List[Tuple[int, str]] = field(default_factory=list)  # descriptors that watch the mount, and how
    sockets: Dict[int, "SocketPlace"] = field(default_factory=dict)  # those bound on the mount
    epolls: Dict[int, List["EpollEntry"]] = field(default_factory=dict)  # by watched descriptor
    owner: Optional["FdTable"] = None  # another process's record of the same table, which is operated on instead
    moved: Set[int] = field(default_factory=set)
    failures: Dict[int, str] = field(default_factory=dict)


@dataclass(eq=False)
class SocketPlace:
    """Where a unix socket is bound on the mount."""

    inode: int
    path: Optional[str] = None
    elsewhere: bool = False


@dataclass(frozen=True)
class EpollEntry:
    """A descriptor that is registered with an epoll instance, as fdinfo shows it."""

    epoll: int
    events: int
    data: int


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
    flags: frozenset[str]  # VmFlags of smaps
    file_mode: int  # how the file it was made from had been opened: stat.S_IRUSR, S_IWUSR
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
    """An address space: ``lines`` are the lines of maps that are on the device."""

    tid: int
    lines: List[bytes] = field(default_factory=list)
    regions: List[Region] = field(default_factory=list)
    exe: Optional[Place] = None
    maps: bytes = b""
    owner: Optional["Memory"] = None


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
        return (
            any(not record.elsewhere for record in self.records())
            or any(table.watches for table in self.tables)
            or (memory is not None and len(memory.lines) > len(memory.regions))
        )

    def records(self) -> "List[Description | Place | Region | SocketPlace]":
        """Everything that it holds."""
        found: "List[Description | Place | Region | SocketPlace]" = []
        for table in self.tables:
            found += table.held.values()
            found += table.sockets.values()
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


def objects(paths: Sequence[str]) -> List[Optional[statx.Object]]:
    """statx of many paths at once, without requests to their file systems; None for what cannot be examined."""
    if not paths:
        return []
    table, buffer, keep = statx_table(paths)
    outcome = run_local(table)
    return [
        None if result < 0 else statx.decode(buffer, index * statx.SIZE) for index, result in enumerate(outcome)
    ]


def statx_table(paths: Sequence[str]) -> Tuple[CallTable, bytearray, bytearray]:
    """A table of statx calls, the buffer for their answers, and the names, which must be kept while it runs."""
    encoded = [os.fsencode(path) + b"\0" for path in paths]
    names = bytearray(b"".join(encoded))
    buffer = bytearray(statx.SIZE * len(paths))
    table = CallTable()
    name, answer = address_of(names), address_of(buffer)
    for path in encoded:
        table.add("statx", statx.AT_FDCWD, name, statx.AT_STATX_DONT_SYNC, statx.MASK, answer)
        name += len(path)
        answer += statx.SIZE
    return table, buffer, names


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


class Examiner:
    """Examines processes for references to ``device``; descriptions that several of them share are one object."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.sockets: Dict[int, int] = {}  # sockets bound on it; ``spfs.surgery.sockets.bound_on``
        self._descriptions: Dict[Tuple[int, int], List[Description]] = {}

    def close(self) -> None:
        for candidates in self._descriptions.values():
            for description in candidates:
                description.close()
        self._descriptions.clear()

    def forget(self) -> None:
        """Let go of all descriptions but those that were moved: who else turns up with one of them gets the same
        counterpart, which stays shared."""
        for candidates in self._descriptions.values():
            for description in candidates:
                if not description.moved:
                    description.close()
            candidates[:] = [description for description in candidates if description.moved]

    def process(self, pid: int) -> Optional[Process]:
        """Everything ``pid`` holds; None if it is gone, a zombie or a kernel thread."""
        try:
            before = procfs.parse_stat(procfs.read(f"/proc/{pid}/stat"))
            task = pid
            if before.state in "ZX":  # only the first thread, perhaps
                task = next((tid for tid in procfs.tasks(pid) if not is_dead(tid)), 0)
                if not task:
                    return None
            status = procfs.parse_status(procfs.read(f"/proc/{task}/status"))
            if status.kernel_thread:
                return None
            pidfd = process.pidfd_open(pid)
        except (FileNotFoundError, ProcessLookupError):
            return None
        record = Process(pid, before.command, before.start, pidfd, status)
        try:
            self._fill(record)
            if _is_32_bit(task):
                record.problem = "is a 32-bit process, which cannot be operated on"
            elif status.tracer:
                record.problem, record.traced = f"is traced by process {status.tracer}", True
        except (FileNotFoundError, ProcessLookupError):
            record.close()
            return None
        except BaseException:
            record.close()
            raise
        return record

    def refresh(self, record: Process, locked: Container[int] = ()) -> bool:
        """Bring the record of a stopped process up to date: what it still holds keeps its description or place, and
        so its counterpart. ``locked``: inode numbers whose locks have changed.

        False if it cannot be done that way (other tasks have tables of their own, or it is gone): examine it anew.
        """
        try:
            now = procfs.parse_stat(procfs.read(f"/proc/{record.pid}/stat"))
            if now.start != record.start:
                return False
            record.command = now.command
            tids = [tid for tid in procfs.tasks(record.pid) if tid in record.tids or not is_dead(tid)]
            if not self._has_same_owners(record, tids):
                return False
            record.tids = set(tids)
            record.status = procfs.parse_status(procfs.read(f"/proc/{record.tables[0].tid}/status"))
            for table in record.tables:
                self._refresh_table(record, table, locked)
            for context in record.contexts:
                cwd, root = objects([f"/proc/{context.tid}/cwd", f"/proc/{context.tid}/root"])
                context.cwd = self._same_place(context.cwd, cwd, Kind.CWD)
                context.root = self._same_place(context.root, root, Kind.ROOT)
            if record.memory is not None:
                self._refresh_memory(record.memory)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return True

    @staticmethod
    def _has_same_owners(record: Process, tids: List[int]) -> bool:
        """Whether each task has the table and the directories of one that stands for them, as before."""
        leader = record.tables[0].tid
        for records, kind in ((record.tables, process.KCMP_FILES), (record.contexts, process.KCMP_FS)):
            own = {one.tid for one in records}
            if not own <= set(tids) or records[0].tid != leader:
                return False
            if any(process.kcmp(leader, tid, kind, 0, 0) for tid in tids if tid not in own):
                return False
        return record.memory is not None and record.memory.tid == leader

    def _refresh_table(self, record: Process, table: FdTable, locked: Container[int]) -> None:
        fresh = {int(name) for name in os.listdir(f"/proc/{table.tid}/fd")}
        calls, me = CallTable(), os.getpid()
        for number, description in table.held.items():
            calls.add("kcmp", table.tid, me, process.KCMP_FILE, number, description.copy)
        same = [number for number, result in zip(table.held, run_local(calls)) if result == 0]
        changed = {number for number in same if table.held[number].object.inode in locked}
        kept = {number: table.held[number] for number in same}
        table.numbers, table.held = fresh, {}
        with self._pidfd_of(record, table.tid) as pidfd:
            others = sorted(fresh - (kept.keys() - changed))
            found = dict(zip(others, objects([f"/proc/{table.tid}/fd/{number}" for number in others])))
            for number in sorted(fresh):
                if number not in found:
                    table.held[number] = kept[number]
                    continue
                thing = found[number]
                if thing is not None and thing.device == self.device:
                    opened = self._description(table.tid, pidfd, number, thing)
                    if opened is not None:
                        table.held[number] = opened
        # Registrations do not show in the descriptor: these are read again.
        table.watches, table.epolls, table.sockets = [], {}, {}
        for number, thing in found.items():
            if thing is not None:
                self._look_closer(table, number, thing)

    def _same_place(self, former: Optional[Place], found: Optional[statx.Object], kind: Kind) -> Optional[Place]:
        if former is not None:
            if found is not None and _is_same(former.object, found):
                return former
            former.close()
        return self._place(found, kind)

    def _refresh_memory(self, memory: Memory) -> None:
        (exe,) = objects([f"/proc/{memory.tid}/exe"])
        memory.exe = self._same_place(memory.exe, exe, Kind.EXE)
        memory.maps = procfs.read(f"/proc/{memory.tid}/maps")
        lines = procfs.lines_of_device(memory.maps, self.device)
        if lines == memory.lines:
            return
        former = {region.mapping: region for region in memory.regions}
        mappings = [procfs.parse_mapping(line) for line in lines]
        memory.lines, memory.regions = lines, []
        new = [mapping.start for mapping in mappings if mapping not in former]
        flags = procfs.read_vm_flags(f"/proc/{memory.tid}/smaps", new) if new else {}
        for mapping in mappings:
            region = former.get(mapping) or _region(memory.tid, mapping, flags)
            if region is not None:
                memory.regions.append(region)

    def _fill(self, record: Process) -> None:
        tids = [tid for tid in procfs.tasks(record.pid) if not is_dead(tid)]
        if not tids:
            raise ProcessLookupError(record.pid)
        record.tids = set(tids)
        leader = record.pid if record.pid in record.tids else tids[0]
        own_tables, own_contexts = {leader}, {leader}
        for tid in tids:
            if tid != leader:
                if process.kcmp(leader, tid, process.KCMP_FILES, 0, 0):
                    own_tables.add(tid)
                if process.kcmp(leader, tid, process.KCMP_FS, 0, 0):
                    own_contexts.add(tid)
        for tid in sorted(own_tables):
            record.tables.append(self.table(record, tid))
        for tid in sorted(own_contexts):
            record.contexts.append(self.context(tid))
        record.memory = self.memory(leader)

    # -- descriptors

    def table(self, record: Process, tid: int) -> FdTable:
        numbers = [int(name) for name in os.listdir(f"/proc/{tid}/fd")]
        soft, hard = procfs.parse_descriptor_limits(procfs.read(f"/proc/{tid}/limits"))
        table = FdTable(tid, set(numbers), limit=soft, hard_limit=hard)
        with self._pidfd_of(record, tid) as pidfd:
            for number, found in zip(numbers, objects([f"/proc/{tid}/fd/{number}" for number in numbers])):
                if found is None:
                    continue
                if found.device == self.device:
                    description = self._description(tid, pidfd, number, found)
                    if description is not None:
                        table.held[number] = description
                else:
                    self._look_closer(table, number, found)
        return table

    @staticmethod
    @contextmanager
    def _pidfd_of(record: Process, tid: int) -> Iterator[int]:
        """A pidfd of the task whose table it is: the process's, or one of its own; -1 if that cannot be had."""
        if tid == record.pid:
            yield record.pidfd
            return
        try:
            pidfd = process.pidfd_open(tid, leader=False)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            yield -1
            return
        try:
            yield pidfd
        finally:
            os.close(pidfd)

    def _description(self, tid: int, pidfd: int, number: int, found: statx.Object) -> Optional[Description]:
        info = procfs.parse_fdinfo(procfs.read(f"/proc/{tid}/fdinfo/{number}"))
        flags = info.flags & ~os.O_CLOEXEC
        candidates = self._descriptions.setdefault((found.inode, found.mount_id), [])
        low, high = 0, len(candidates)
        while low < high:  # candidates are in the kernel's order, so that many openings of one file cost no n²
            middle = (low + high) // 2
            order = process.kcmp(tid, os.getpid(), process.KCMP_FILE, number, candidates[middle].copy)
            if order == 0:
                locks.note(candidates[middle], info)
                if pidfd < 0:  # nor can the other descriptors of it go: they would no longer share the offset
                    candidates[middle].problem = OUT_OF_REACH
                return candidates[middle]
            low, high = (low, middle) if order == 1 else (middle + 1, high)
        if pidfd < 0:
            return Description(found, flags, kind_of(found.mode, flags), info.position, problem=OUT_OF_REACH)
        try:
            copy = process.pidfd_getfd(pidfd, number, 0)
        except OSError as error:
            if error.errno == errno.EBADF:  # closed meanwhile
                return None
            raise
        kind = kind_of(found.mode, flags)
        description = Description(found, flags, kind, info.position, copy)
        locks.note(description, info)
        candidates.insert(low, description)
        return description

    def _look_closer(self, table: FdTable, number: int, found: statx.Object) -> None:
        """At what is not on the mount: it may hold it all the same."""
        if stat.S_IFMT(found.mode) == 0:  # an anonymous inode: epoll, inotify, fanotify …
            self._watch(table, number)
        elif stat.S_ISSOCK(found.mode) and found.inode in self.sockets:
            table.sockets[number] = SocketPlace(self.sockets[found.inode])

    def _watch(self, table: FdTable, number: int) -> None:
        """Note what an inotify, fanotify or epoll descriptor watches on the mount."""
        try:
            info = procfs.parse_fdinfo(procfs.read(f"/proc/{table.tid}/fdinfo/{number}"))
        except FileNotFoundError:
            return
        device = f"{_kernel_device(self.device):x}"
        for line in info.lines:
            words = line.split()
            values = dict(word.split(":", 1) for word in words if ":" in word)
            if line.startswith(("inotify wd", "fanotify ino")) and values.get("sdev") == device:
                table.watches.append((number, words[0] + " watch"))
            elif line.startswith("tfd:") and values.get("sdev") == device:
                # "tfd: 5 events: 1 data: 5 pos:0 ino:1 sdev:1": the first three have a blank before their value
                entry = EpollEntry(number, int(words[3], 16), int(words[5], 16))
                table.epolls.setdefault(int(words[1]), []).append(entry)

    # -- directories

    def context(self, tid: int) -> FsContext:
        cwd, root = objects([f"/proc/{tid}/cwd", f"/proc/{tid}/root"])
        return FsContext(tid, self._place(cwd, Kind.CWD), self._place(root, Kind.ROOT))

    def _place(self, found: Optional[statx.Object], kind: Kind) -> Optional[Place]:
        return Place(found, kind) if found is not None and found.device == self.device else None

    # -- memory

    def memory(self, tid: int) -> Memory:
        maps = procfs.read(f"/proc/{tid}/maps")
        (exe,) = objects([f"/proc/{tid}/exe"])
        memory = Memory(tid, procfs.lines_of_device(maps, self.device), exe=self._place(exe, Kind.EXE), maps=maps)
        if memory.lines:
            mappings = [procfs.parse_mapping(line) for line in memory.lines]
            flags = procfs.read_vm_flags(f"/proc/{tid}/smaps", [mapping.start for mapping in mappings])
            for mapping in mappings:
                region = _region(tid, mapping, flags)
                if region is not None:
                    memory.regions.append(region)
        return memory


def _region(tid: int, mapping: procfs.Mapping, flags: Dict[int, frozenset[str]]) -> Optional[Region]:
    link = f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}"
    try:
        mode = os.lstat(link).st_mode
        found = statx.examine(link)
    except FileNotFoundError:
        return None  # changed since maps was read: seen when the process stands still
    kind = Kind.SHARED_MAPPING if mapping.shared else Kind.PRIVATE_MAPPING
    return Region(mapping, found, kind, flags.get(mapping.start, frozenset()), mode)


def _is_same(former: statx.Object, found: statx.Object) -> bool:
    return (former.device, former.inode, former.mount_id) == (found.device, found.inode, found.mount_id)


def is_dead(tid: int) -> bool:
    try:
        return procfs.parse_stat(procfs.read(f"/proc/{tid}/stat")).state in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _is_32_bit(pid: int) -> bool:
    """By its auxiliary vector: pairs of words, of which the first one's type is small."""
    entry = procfs.read(f"/proc/{pid}/auxv")[:8]
    return len(entry) == 8 and int.from_bytes(entry, "little") >= 1 << 32


def _kernel_device(device: int) -> int:
    """dev_t as the kernel prints it in fdinfo (MKDEV: 20 bits for the minor number)."""
    return os.major(device) << 20 | os.minor(device)


def shared(tids: Sequence[int], kind: int) -> Dict[int, int]:
    """For each task that shares what kcmp(2) calls ``kind`` with one earlier in the kernel's order: that one."""

    def compare(first: int, second: int) -> int:
        try:
            return {0: 0, 1: -1}.get(process.kcmp(first, second, kind, 0, 0), 1)
        except ProcessLookupError:
            return -1 if first < second else 1

    found: Dict[int, int] = {}
    first: Optional[int] = None
    for tid in sorted(tids, key=functools.cmp_to_key(compare)):
        if first is not None and compare(first, tid) == 0:
            found[tid] = first
        else:
            first = tid
    return found
