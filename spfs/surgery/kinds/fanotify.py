"""fanotify marks of files, mounts and file systems: set on the counterparts, too, by our copy of the group.

The old ones cannot be taken away: that needs the old object by a path or descriptor. They report nothing any more, and
end with the old file system, which they do not keep.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Optional, Set, Tuple

from spfs.errors import reason
from spfs.linux import mountinfo, notify, procfs
from spfs.references import Kind
from spfs.surgery.counterparts import NO_MOUNT, Counterparts
from spfs.surgery.kinds.base import Found, Handler, Scene, kernel_device
from spfs.surgery.records import Holding, Process

_IGNORE = 0x400  # FAN_MARK_IGNORE
_IGNORING = _IGNORE | 0x40  # FAN_MARK_IGNORED_SURV_MODIFY
_KEPT_FLAGS = _IGNORING | 0x200  # FAN_MARK_EVICTABLE
_KEYS = frozenset(["ino", "sdev", "mnt_id", "mflags", "mask", "ignored_mask"])


@dataclass(eq=False)
class Mark(Holding):
    scope: int = 0  # FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM, or 0 for one file
    mount_id: int = NO_MOUNT
    flags: int = 0
    mask: int = 0
    ignored: int = 0


class Fanotify(Handler):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._done: Set[Tuple[int, int, str]] = set()  # task, descriptor and mark, of those whose counterpart is set

    def look(self, found: Found) -> None:
        if stat.S_IFMT(found.object.mode):
            return
        for line in found.info().lines:
            if line.startswith("fanotify ") and "mask:" in line:
                mark = self._mark(found, line)
                if mark is not None and (found.table.tid, mark.number, mark.detail) not in self._done:
                    mark.copy = found.copy()
                    if mark.copy < 0:
                        mark.problem = "its table is out of reach"
                    found.table.holdings.append(mark)

    def _mark(self, found: Found, line: str) -> Optional[Mark]:
        words = (word.partition(":") for word in line.split())
        values = {key: int(value, 16) for key, _, value in words if key in _KEYS}
        mount_id = values.get("mnt_id", NO_MOUNT)
        inode = values.get("ino", 0)
        if mount_id != NO_MOUNT:
            scope, detail = notify.FAN_MARK_MOUNT, f"mark of mount {mount_id}"
            ours = _device_of_mount(found.table.tid, mount_id) == self.device
        else:
            scope, detail = (0, f"mark {inode}") if inode else (notify.FAN_MARK_FILESYSTEM, "mark of the file system")
            ours = values.get("sdev") == kernel_device(self.device)
        if not ours:
            return None
        mark = Mark(found.number, Kind.FANOTIFY, inode, found.object, detail)
        mark.scope, mark.mount_id, mark.flags = scope, mount_id, values.get("mflags", 0) & _KEPT_FLAGS
        mark.mask, mark.ignored = values.get("mask", 0), values.get("ignored_mask", 0)
        return mark

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        for mark in (one for table in process.tables for one in table.holdings if isinstance(one, Mark)):
            if mark.problem is not None or mark.new >= 0:
                continue
            try:
                if mark.scope:
                    mark.new = os.dup(counterparts.root(mark.mount_id).fd)
                else:
                    mark.path = counterparts.path(mark.inode)
                    mark.new = counterparts.open_path(process.status, mark.inode)
            except OSError as error:
                mark.problem = f"its counterpart cannot be watched: {reason(error)}"

    def judge(self, scene: Scene) -> None:
        for process, _, holding in scene.holdings():
            if isinstance(holding, Mark) and process.problem is not None:
                holding.problem = holding.problem or process.problem

    def conclude(self, scene: Scene) -> None:
        for process, table, holding in scene.holdings():
            if not isinstance(holding, Mark) or holding.problem is not None or holding.new < 0:
                continue
            flags = notify.FAN_MARK_ADD | holding.scope | holding.flags
            try:
                if holding.mask:
                    notify.mark(holding.copy, flags & ~_IGNORING, holding.mask, holding.new)
                if holding.ignored:
                    ignore = flags if flags & _IGNORE else flags | notify.FAN_MARK_IGNORED_MASK
                    notify.mark(holding.copy, ignore, holding.ignored, holding.new)
                holding.moved = True
                self._done.add((table.tid, holding.number, holding.detail))
            except OSError as error:
                holding.problem = f"its counterpart cannot be watched: {reason(error)}"


def _device_of_mount(tid: int, mount_id: int) -> Optional[int]:
    """Of a mount that the task sees: its st_dev."""
    mount = mountinfo.MountTable.from_bytes(procfs.read(f"/proc/{tid}/mountinfo")).by_id.get(mount_id)
    return mount.st_dev if mount is not None else None
