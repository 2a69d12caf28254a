"""All kinds, and the calling of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, List, Tuple, Type

from spfs.linux.procfs import FdInfo
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.kinds.base import Found, Handler, Scene, Survey
from spfs.surgery.kinds.connections import Connections
from spfs.surgery.kinds.directories import Directories
from spfs.surgery.kinds.epolls import Epolls
from spfs.surgery.kinds.fanotify import Fanotify
from spfs.surgery.kinds.fifos import Fifos
from spfs.surgery.kinds.inflight import InFlight
from spfs.surgery.kinds.inotify import Inotify
from spfs.surgery.kinds.locks import Locks
from spfs.surgery.kinds.orphans import Orphans
from spfs.surgery.kinds.rings import Rings
from spfs.surgery.kinds.senders import Senders
from spfs.surgery.kinds.sockets import Sockets
from spfs.surgery.kinds.together import Together
from spfs.surgery.kinds.unlinked import Unlinked
from spfs.surgery.program import Program
from spfs.surgery.records import Description, FdTable, Process

if TYPE_CHECKING:  # imports this module
    from spfs.surgery.errands import Errands

# In this order they judge and act.
KINDS: Tuple[Type[Handler], ...] = (
    Together, Inotify, Unlinked, Directories, Locks, Fifos, InFlight, Senders, Sockets, Connections, Epolls,
    Orphans, Rings, Fanotify,
)  # fmt: skip


class Kinds:
    """The handlers of one switch, called one after the other; the hooks are those of ``Handler``."""

    def __init__(self, device: int) -> None:
        self._handlers: List[Handler] = [kind(device) for kind in KINDS]
        self._scene = Scene([])
        # Asked for each of thousands of descriptors.
        self._noters = [one for one in self._handlers if type(one).note is not Handler.note]
        self._watchers = [one for one in self._handlers if type(one).changed is not Handler.changed]
        self._preparers = [one for one in self._handlers if type(one).before is not Handler.before]

    def survey(self, pids: List[int]) -> None:
        survey = Survey(pids)
        for handler in self._handlers:
            handler.survey(survey)

    def note(self, table: FdTable, number: int, description: Description, info: FdInfo) -> None:
        for handler in self._noters:
            handler.note(table, number, description, info)

    def look(self, found: Found) -> None:
        for handler in self._handlers:
            handler.look(found)

    def provide(self, counterparts: Counterparts, processes: Iterable[Process]) -> None:
        for process in processes:
            for handler in self._handlers:
                handler.provide(counterparts, process)

    def rehearse(self, processes: Iterable[Process]) -> None:
        scene = Scene(processes)
        for handler in self._handlers:
            handler.rehearse(scene)

    def changed(self, processes: Iterable[Process]) -> List[Process]:
        # All are asked: some look again at what concerns everybody.
        return [process for process in processes if any([handler.changed(process) for handler in self._watchers])]

    def judge(self, processes: Iterable[Process]) -> None:
        self._scene = scene = Scene(processes)
        before = -1
        # What one of them makes stay can make something else stay.
        while before != _problems(scene):
            before = _problems(scene)
            for handler in self._handlers:
                handler.judge(scene)

    def transfer(self, errands: "Errands") -> None:
        """For those that were judged last, as ``conclude``."""
        self._scene.errands = errands
        for handler in self._handlers:
            handler.transfer(self._scene)

    def conclude(self) -> None:
        for handler in self._handlers:
            handler.conclude(self._scene)

    def before(self, program: Program, table: FdTable, number: int) -> None:
        for handler in self._preparers:
            handler.before(program, table, number)

    def finish(self, program: Program, table: FdTable) -> None:
        for handler in self._handlers:
            handler.finish(program, table)


def _problems(scene: Scene) -> int:
    problems = sum(use.description.problem is not None for use in scene.uses)
    return problems + sum(holding.problem is not None for _, _, holding in scene.holdings())
