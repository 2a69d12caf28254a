"""inotify watches: made anew with the same watch descriptors on the counterparts, by our copy of the instance.

The kernel tells the end of a watch by an event; that one is read by us. It comes after all that wait to be read, and
nothing can be put back: so an instance with unread events keeps its watches until it has none.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Set, Tuple

from spfs.errors import reason
from spfs.linux import notify, procfs
from spfs.references import Kind
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.kinds.base import Found, Handler, Scene, kernel_device
from spfs.surgery.records import FdTable, Holding, Loss, Process

_UNREAD = "events of its instance were not read yet: asked again when they are, it goes"
_NO_NUMBERS = "this kernel cannot keep its watch descriptor (CONFIG_CHECKPOINT_RESTORE)"


@dataclass(eq=False)
class Watch(Holding):
    watch: int = 0
    mask: int = 0


class Inotify(Handler):
    """Watches end before anything is opened or closed on our behalf, and begin again when all of that is over."""

    def look(self, found: Found) -> None:
        if stat.S_IFMT(found.object.mode):
            return
        for watch, inode, device, mask in _watches(found.info().lines):
            if device == kernel_device(self.device):
                holding = Watch(found.number, Kind.INOTIFY, inode, found.object, f"watch {watch}")
                holding.watch, holding.mask = watch, mask
                holding.copy = found.copy()
                if holding.copy < 0:
                    holding.problem = "its table is out of reach"
                found.table.holdings.append(holding)

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        for table in process.tables:
            for holding in _of(table):
                holding.path = counterparts.path(holding.inode)
                if holding.problem is not None or holding.new >= 0:
                    continue
                try:
                    holding.new = counterparts.open_path(process.status, holding.inode)
                    if not notify.can_set_next_watch():
                        holding.problem = _NO_NUMBERS
                except OSError as error:
                    holding.problem = f"its counterpart cannot be watched: {reason(error)}"

    def changed(self, process: Process) -> bool:
        for table in process.tables:
            known: Dict[int, List[Tuple[int, int]]] = {}
            for holding in _of(table):
                if holding.copy >= 0:
                    known.setdefault(holding.copy, []).append((holding.watch, holding.mask))
            if any(sorted(watches) != sorted(self._now(copy)) for copy, watches in known.items()):
                return True
        return False

    def _now(self, copy: int) -> List[Tuple[int, int]]:
        lines = procfs.parse_fdinfo(procfs.read(f"/proc/self/fdinfo/{copy}")).lines
        device = kernel_device(self.device)
        return [(watch, mask) for watch, _, where, mask in _watches(lines) if where == device]

    def judge(self, scene: Scene) -> None:
        for users in _instances(scene):
            unread = users[0][2].copy >= 0 and notify.queued(users[0][2].copy)
            whose = next((process.problem for process, _, _ in users if process.problem), None)
            for _, _, holding in users:
                holding.problem = holding.problem or (_UNREAD if unread else whose)

    def transfer(self, scene: Scene) -> None:
        for users in _instances(scene):
            copy = users[0][2].copy
            ended: Set[int] = set()
            for _, _, holding in users:
                if not _goes(holding) or holding.watch in ended:
                    continue
                try:
                    notify.remove_watch(copy, holding.watch)
                    ended.add(holding.watch)
                except OSError as error:  # what it watched was removed just now
                    holding.problem = f"it cannot be ended: {reason(error)}"
            if not ended:
                continue
            if notify.queued(copy) == len(ended) * notify.EVENT_SIZE:
                os.read(copy, len(ended) * notify.EVENT_SIZE)
                continue
            # Of what is watched elsewhere, and that goes on: an event came just now, and is not to be lost.
            for _, table, holding in users:
                if holding.watch in ended:
                    _lose(table, holding, "seems to have ended (IN_IGNORED)")

    def conclude(self, scene: Scene) -> None:
        for users in _instances(scene):
            copy, done = users[0][2].copy, {}
            for _, table, holding in users:
                if not _goes(holding):
                    continue
                try:
                    if holding.watch not in done:
                        notify.set_next_watch(copy, holding.watch)
                        done[holding.watch] = notify.add_watch(copy, holding.new, holding.mask)
                    if done[holding.watch] != holding.watch:
                        _lose(table, holding, f"is {done[holding.watch]} now")
                    holding.moved = True
                except OSError as error:
                    holding.problem = f"its counterpart cannot be watched: {reason(error)}"
                    _lose(table, holding, f"has ended: {reason(error)}")
            if done:
                lines = procfs.parse_fdinfo(procfs.read(f"/proc/self/fdinfo/{copy}")).lines
                # What is watched next is to get a number that nobody had before.
                notify.set_next_watch(copy, max((watch for watch, _, _, _ in _watches(lines)), default=0) + 1)


def _lose(table: FdTable, holding: Watch, what: str) -> None:
    table.losses.append(Loss(Kind.INOTIFY, holding.number, f"watch {holding.watch} {what}"))


def _goes(holding: Watch) -> bool:
    return holding.problem is None and holding.new >= 0


def _of(table: FdTable) -> Iterator[Watch]:
    return (one for one in table.holdings if isinstance(one, Watch))


def _instances(scene: Scene) -> List[List[Tuple[Process, FdTable, Watch]]]:
    found: Dict[int, List[Tuple[Process, FdTable, Watch]]] = {}
    for process, table in scene.tables():
        for holding in _of(table):
            found.setdefault(holding.copy, []).append((process, table, holding))
    return list(found.values())


def _watches(lines: Iterable[str]) -> Iterator[Tuple[int, int, int, int]]:
    """Watch descriptor, inode number, device and mask of each line of fdinfo, all hexadecimal (fs/notify/fdinfo.c)."""
    for line in lines:
        if line.startswith("inotify wd:"):
            values = dict(word.split(":", 1) for word in line.split()[1:] if ":" in word)
            yield int(values["wd"], 16), int(values["ino"], 16), int(values["sdev"], 16), int(values["mask"], 16)
