"""How much memory a process can get before a memory cgroup of it is at its limit, where the kernel kills.

Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst, "Memory Interface Files".
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

from spfs.linux import procfs
from spfs.linux.mountinfo import parse

_UNLIMITED = 1 << 60  # version 1 says so with the largest number of pages there is


class Hierarchy(NamedTuple):
    """``root``: the cgroup that is seen at ``mountpoint``, as /proc/PID/cgroup calls it."""

    mountpoint: str
    root: str
    version: int


@dataclass(frozen=True)
class MemoryCgroup:
    """A cgroup with a limit. ``directory``: where it is in our mount namespace."""

    directory: str
    version: int

    def limit(self) -> Optional[int]:
        """Bytes; None if there is none (any more)."""
        text = self._read("memory.max" if self.version == 2 else "memory.limit_in_bytes").strip()
        return None if text == "max" or int(text) >= _UNLIMITED else int(text)

    def room(self, wanted: int) -> int:
        """Bytes that can be had beneath the limit, or at least ``wanted``; what can be reclaimed at once is counted.

        Those are clean pages of files. With swap there can be more.
        """
        try:
            limit = self.limit()
            if limit is None:
                return wanted
            used = int(self._read("memory.current" if self.version == 2 else "memory.usage_in_bytes"))
            if limit - used >= wanted:  # memory.stat is slower to read
                return limit - used
            return max(0, limit - used + self._reclaimable())
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            return wanted

    def _reclaimable(self) -> int:
        lines = (line.split() for line in self._read("memory.stat").splitlines())
        values: Dict[str, int] = {words[0]: int(words[1]) for words in lines}
        # Version 1 tells apart what is charged to the cgroup itself, and with all beneath it.
        names = ("inactive_file", "active_file"), ("file_dirty", "file_writeback")
        if self.version == 1:
            names = ("total_inactive_file", "total_active_file"), ("total_dirty", "total_writeback")
        clean, dirty = (sum(values.get(name, 0) for name in group) for group in names)
        return max(0, clean - dirty)

    def _read(self, name: str) -> str:
        return os.fsdecode(procfs.read(os.path.join(self.directory, name)))


def limited(pid: int, mounted: Sequence[Hierarchy]) -> List[MemoryCgroup]:
    """The cgroups with a limit that what the process allocates is charged to: its own, and those above it."""
    found: List[MemoryCgroup] = []
    for line in os.fsdecode(procfs.read(f"/proc/{pid}/cgroup")).splitlines() if mounted else ():
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        for mountpoint, root, of in mounted:
            relative = os.path.relpath(path, root)
            if of == version and not relative.startswith(".."):  # elsewhere: of a cgroup namespace beside ours
                found += _with_limits(mountpoint, relative, version)
                break
    return found


def hierarchies() -> Iterator[Hierarchy]:
    """Those that can have limits."""
    for mount in parse(procfs.read("/proc/self/mountinfo")):
        if mount.fstype == "cgroup2":
            yield Hierarchy(mount.mountpoint, mount.root, 2)
        elif mount.fstype == "cgroup" and "memory" in mount.super_options.split(","):
            yield Hierarchy(mount.mountpoint, mount.root, 1)


def _with_limits(mountpoint: str, relative: str, version: int) -> Iterator[MemoryCgroup]:
    while True:
        cgroup = MemoryCgroup(os.path.normpath(os.path.join(mountpoint, relative)), version)
        try:
            if cgroup.limit() is not None:
                yield cgroup
        except FileNotFoundError:  # the root has none, nor has one without the controller
            pass
        if relative in (".", ""):
            return
        relative = os.path.dirname(relative) or "."
