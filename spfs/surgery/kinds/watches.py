"""inotify and fanotify watches of what is on the old mount."""

from __future__ import annotations

import stat

from spfs.references import Kind
from spfs.surgery.kinds.base import Found, Handler, kernel_device
from spfs.surgery.records import Holding

_KINDS = {"inotify": Kind.INOTIFY, "fanotify": Kind.FANOTIFY}


class Watches(Handler):
    def look(self, found: Found) -> None:
        if stat.S_IFMT(found.object.mode):
            return
        device = f"{kernel_device(self.device):x}"
        for line in found.info().lines:
            words = line.split()
            values = dict(word.split(":", 1) for word in words if ":" in word)
            if line.startswith(("inotify wd", "fanotify ino")) and values.get("sdev") == device:
                kind, inode = _KINDS[words[0]], int(values["ino"], 16)
                found.table.holdings.append(
                    Holding(found.number, kind, inode, found.object, problem="watches are not moved")
                )
