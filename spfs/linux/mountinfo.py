"""/proc/PID/mountinfo, parsed from its bytes: no I/O here.

Mounts that cannot be reached from the reading task's root are not shown by the kernel, so a chrooted process's
table has gaps (fs/proc_namespace.c, show_mountinfo: SEQ_SKIP).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

_ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line. Paths are unescaped and fsdecoded; ``propagation`` maps shared, master, propagate_from to group ids."""

    mount_id: int
    parent_id: int
    device: Tuple[int, int]
    root: str
    mountpoint: str
    options: Tuple[str, ...]
    propagation: Tuple[Tuple[str, int], ...]
    fstype: str
    source: str
    super_options: str

    @property
    def st_dev(self) -> int:
        return os.makedev(*self.device)

    def group(self, kind: str) -> Optional[int]:
        """The peer group id of ``kind`` (shared, master, propagate_from, unbindable), or None."""
        return dict(self.propagation).get(kind)


def unescape(field: bytes) -> str:
    """``\\040`` and the like back to bytes (fs/seq_file.c, mangle_path), then to a str path."""
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match.group(1), 8) & 0xFF]), field))


def parse_line(line: bytes) -> Mount:
    """ValueError for a line that is not one of mountinfo."""
    # Split at single spaces: a field may be empty (a source of "").
    fields = line.rstrip(b"\n").split(b" ")
    separator = fields.index(b"-", 6)
    major, minor = fields[2].split(b":")
    propagation = []
    for tag in fields[6:separator]:
        kind, _, group = tag.partition(b":")
        propagation.append((kind.decode(), int(group or 0)))
    return Mount(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        device=(int(major), int(minor)),
        root=unescape(fields[3]),
        mountpoint=unescape(fields[4]),
        options=tuple(os.fsdecode(fields[5]).split(",")),
        propagation=tuple(propagation),
        fstype=unescape(fields[separator + 1]),
        source=unescape(fields[separator + 2]),
        super_options=unescape(b" ".join(fields[separator + 3 :])),
    )


def parse(content: bytes) -> List[Mount]:
    """All mounts, in the kernel's order: a parent comes before what was mounted on it, unless mounts were moved."""
    return [parse_line(line) for line in content.split(b"\n") if line]


class MountTable:
    """The mounts of one namespace, by id and by parent."""

    def __init__(self, mounts: List[Mount]) -> None:
        self.mounts = mounts
        self.by_id: Dict[int, Mount] = {mount.mount_id: mount for mount in mounts}
        self._children: Dict[int, List[Mount]] = {}
        for mount in mounts:
            if mount.parent_id != mount.mount_id:
                self._children.setdefault(mount.parent_id, []).append(mount)

    @classmethod
    def from_bytes(cls, content: bytes) -> "MountTable":
        return cls(parse(content))

    def children(self, mount_id: int) -> List[Mount]:
        return self._children.get(mount_id, [])

    def beneath(self, mount_id: int) -> Iterator[Mount]:
        """All mounts on mount ``mount_id``, directly or not, each after the one it is mounted on."""
        for child in self.children(mount_id):
            yield child
            yield from self.beneath(child.mount_id)

    def top_at(self, mountpoint: str) -> Optional[Mount]:
        """The mount that a path walk to ``mountpoint`` ends on, if one is mounted exactly there."""
        here = [mount for mount in self.mounts if mount.mountpoint == mountpoint]
        covered = {mount.parent_id for mount in here}
        return next((mount for mount in here if mount.mount_id not in covered), None)
