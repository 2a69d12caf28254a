"""Parsers of /proc files, from bytes, and the few that read one. Formats: proc(5).

/proc/PID/fdinfo, maps and stat never ask the file system of the object; readlink of fd links does not either.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Dict, FrozenSet, Iterable, List, NamedTuple, Optional, Tuple

_READ = 1 << 16
_PAGE = 4096  # bytes of a file made record by record that the kernel makes at a time


def read(path: str) -> bytes:
    """A whole /proc file; without the buffering of open(), which costs more than the file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts: List[bytes] = []
        while True:
            part = os.read(fd, _READ)
            if not part:
                return b"".join(parts)
            parts.append(part)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Stat:
    """The fields of /proc/PID/stat in use. ``start``: clock ticks since boot; with the pid it names a process."""

    command: str
    state: str
    parent: int
    start: int
    fields: Tuple[str, ...]  # from the third on: fields[0] is the state


def parse_stat(data: bytes) -> Stat:
    opened, closed = data.index(b"("), data.rindex(b")")  # the command may hold either
    fields = tuple(data[closed + 2 :].decode().split())
    command = data[opened + 1 : closed].decode(errors="replace")
    return Stat(command, fields[0], int(fields[1]), int(fields[19]), fields)


@dataclass(frozen=True)
class Status:
    """The fields of /proc/PID/status in use."""

    group: int  # the process that it is a thread of; its own number if it is the first one
    tracer: int
    kernel_thread: bool
    uid: int  # of the file system credentials, as gid and groups
    gid: int
    groups: Tuple[int, ...]
    seccomp: int  # 0 off, 1 strict, 2 filter
    umask: int
    caught: int  # signals that have a handler, a bit each


def parse_status(data: bytes) -> Status:
    values: Dict[str, str] = {}
    for line in data.decode(errors="replace").splitlines():
        key, _, value = line.partition(":")
        values[key] = value.strip()
    return Status(
        group=int(values.get("Tgid", "0")),
        tracer=int(values.get("TracerPid", "0")),
        kernel_thread=values.get("Kthread", "0") == "1" or "VmSize" not in values,
        uid=int(values["Uid"].split()[3]),
        gid=int(values["Gid"].split()[3]),
        groups=tuple(int(group) for group in values.get("Groups", "").split()),
        seccomp=int(values.get("Seccomp", "0")),
        umask=int(values.get("Umask", "022"), 8),
        caught=int(values.get("SigCgt", "0"), 16),
    )


def handles_signal(tid: int) -> bool:
    """Whether a signal is pending for the task, or for its process, that a handler will be run for: proc(5), status."""
    sets = {"SigPnd": 0, "ShdPnd": 0, "SigBlk": 0, "SigCgt": 0}
    for line in read(f"/proc/{tid}/status").decode(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key in sets:
            sets[key] = int(value, 16)
    return bool((sets["SigPnd"] | sets["ShdPnd"]) & sets["SigCgt"] & ~sets["SigBlk"])


class Lock(NamedTuple):
    """A lock as fdinfo shows it: ``start`` and ``end`` are the first and the last byte, None: the end of the file."""

    kind: str  # POSIX, FLOCK, OFDLCK or LEASE
    state: str  # ADVISORY; of a lease ACTIVE, BREAKING or BREAKER
    mode: str  # READ, WRITE or UNLCK
    start: int = 0
    end: Optional[int] = None


@dataclass(frozen=True)
class FdInfo:
    """/proc/PID/fdinfo/N: offset, status flags as fcntl(2) has them plus O_CLOEXEC, mount id, locks, watches."""

    position: int
    flags: int
    mount_id: int
    locks: Tuple[Lock, ...]
    lines: Tuple[str, ...]  # what the kind of file adds


def parse_fdinfo(data: bytes) -> FdInfo:
    values = {"pos": "0", "flags": "0", "mnt_id": "0"}
    locks: List[Lock] = []
    lines: List[str] = []
    for line in data.decode(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key in values:
            values[key] = value.strip()
        elif key == "lock":
            words = value.split()  # by white space: the columns move
            start, end = words[-2:]
            locks.append(Lock(words[1], words[2], words[3], int(start), None if end == "EOF" else int(end)))
        else:
            lines.append(line)
    return FdInfo(int(values["pos"]), int(values["flags"], 8), int(values["mnt_id"]), tuple(locks), tuple(lines))


def locks_on(locks: bytes, device: int) -> Dict[int, List[bytes]]:
    """The lines of /proc/locks that are on ``device``, by inode number and without their ordinal numbers."""
    found: Dict[int, List[bytes]] = {}
    text = b"%02x:%02x:" % (os.major(device), os.minor(device))
    for line in locks.splitlines() if b" " + text in locks else ():
        for word in line.split():
            if word.startswith(text):
                found.setdefault(int(word[len(text) :]), []).append(line.split(b":", 1)[1])
    return found


class Mapping(NamedTuple):
    """One line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str  # "rwxp" or "rwxs"
    offset: int  # bytes
    inode: int
    name: str

    @property
    def shared(self) -> bool:
        return self.permissions[3] == "s"


_MAPPING = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+) *(.*)")


def device_text(device: int) -> bytes:
    """How maps writes a device number, with the blanks around it: what to look for in the whole file."""
    return b" %02x:%02x " % (os.major(device), os.minor(device))


def lines_of_device(maps: bytes, device: int) -> List[bytes]:
    """The lines of maps whose file is on ``device``."""
    text = device_text(device)
    if text not in maps:
        return []
    return [line for line in maps.splitlines() if line.split(b" ", 4)[3] == text.strip()]


def parse_mapping(line: bytes) -> Mapping:
    match = _MAPPING.match(line)
    if match is None:
        raise ValueError(f"not a line of maps: {line!r}")
    start, end, permissions, offset, inode, name = match.groups()
    return Mapping(
        int(start, 16), int(end, 16), permissions.decode(), int(offset, 16), int(inode), os.fsdecode(name)
    )


def find_vdso(maps: bytes) -> Optional[Tuple[int, int]]:
    """(start, end) of the vDSO in the contents of maps."""
    end = maps.find(b"[vdso]")
    if end < 0:
        return None
    mapping = parse_mapping(maps[maps.rfind(b"\n", 0, end) + 1 : end])
    return mapping.start, mapping.end


def parse_vm_flags(smaps: bytes) -> Dict[int, FrozenSet[str]]:
    """The VmFlags of each mapping in smaps, by start address; "pkey" among them if it has a protection key."""
    found: Dict[int, FrozenSet[str]] = {}
    start = 0
    keyed: FrozenSet[str] = frozenset()
    for line in smaps.splitlines():
        if line.startswith(b"VmFlags:"):
            found[start] = frozenset(line.decode().split()[1:]) | keyed
            keyed = frozenset()
        elif line.startswith(b"ProtectionKey:") and line.split()[1] != b"0":
            keyed = frozenset(["pkey"])
        else:
            head = line.split(b"-", 1)[0]
            if b":" not in head and re.match(rb"[0-9a-f]+-[0-9a-f]+ ", line):
                start = int(head, 16)
    return found


def read_vm_flags(path: str, wanted: Iterable[int]) -> Dict[int, FrozenSet[str]]:
    """``parse_vm_flags`` of smaps file ``path``, read only up to the last of the start addresses ``wanted``: the kernel
    walks the page tables of each mapping that is read."""
    last = re.compile(rb"^%08x-" % max(wanted), re.MULTILINE)
    data, looked_at, record = b"", 0, -1
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            part = os.read(fd, _PAGE)
            data += part
            found = last.search(data, looked_at) if record < 0 else None
            if found is not None:
                record = found.start()
            looked_at = data.rfind(b"\n") + 1
            flags = data.find(b"\nVmFlags:", record) if record >= 0 else -1
            if not part or flags >= 0 and flags + 1 < looked_at:
                return parse_vm_flags(data)
    finally:
        os.close(fd)


def parse_descriptor_limits(limits: bytes) -> Tuple[int, int]:
    """RLIMIT_NOFILE, soft and hard. Not by prlimit(2), which wants CAP_SYS_RESOURCE for another user's process."""
    for line in limits.splitlines():
        if line.startswith(b"Max open files"):
            soft, hard = line.split()[3:5]
            return int(soft), int(hard)  # never "unlimited": fs.nr_open is above both
    raise ValueError("no open files in limits")


def parse_address_space_limit(limits: bytes) -> Optional[int]:
    """The soft RLIMIT_AS in bytes; None: there is none."""
    for line in limits.splitlines():
        if line.startswith(b"Max address space"):
            soft = line.split()[3]
            return None if soft == b"unlimited" else int(soft)
    raise ValueError("no address space in limits")


def tasks(pid: int) -> List[int]:
    """The thread ids of a process; empty if it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def task_count(pid: int) -> int:
    """How many threads a process has, zombies among them: a link of its directory for each (proc_task_getattr in
    fs/proc/base.c). 0 if it is gone."""
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    except (FileNotFoundError, ProcessLookupError):
        return 0


def processes() -> List[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
