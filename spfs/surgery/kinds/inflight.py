"""Descriptors in flight: sent over a unix socket (SCM_RIGHTS) and not received yet.

Nothing can be put into a queue in another's place. So all that lies in it is sent once more by our copy of the other
end, with the counterparts of the files, and then as much is taken out at the front: nobody who could see it runs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Optional, Set, Tuple

from spfs.errors import reason
from spfs.linux import process as syscalls
from spfs.linux import procfs, statx
from spfs.linux.process import KCMP_FILE
from spfs.linux.sockdiag import UnixSocket
from spfs.references import Kind
from spfs.surgery import socketcopy, socketlist, socketqueue
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.kinds.base import Found, Handler, Scene, Survey
from spfs.surgery.records import Description, FdTable, Holding, Process, kind_of
from spfs.surgery.socketqueue import Message

_WHY = "it is in flight in a socket {}: asked again when it has been received, it goes"
_CLOSED = _WHY.format("whose other end is closed")
_NOBODY = _WHY.format("whose other end was found with nobody who can be stopped")
_SHUT = _WHY.format("to which nothing more can be sent")
_URGENT = _WHY.format("with an urgent byte, or an error")
_PLAIN = (Kind.FILE, Kind.PATH, Kind.SYMLINK)


@dataclass(eq=False)
class Flying(Holding):
    """A descriptor in the queue, for one who can receive it. Before all stands still, those of the first message."""


@dataclass(eq=False)
class Wire(Holding):
    """An end of a connection in which something is in flight."""


Ends = Dict[int, List[Tuple[Process, Holding]]]


class InFlight(Handler):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._pids: List[int] = []
        self._sockets: Dict[int, UnixSocket] = {}
        self._flying: Dict[int, List[statx.Object]] = {}  # by the socket in whose queue they are
        self._ends: Dict[int, int] = {}  # of both ends, the one in whose queue something is
        self._counterparts: Optional[Counterparts] = None
        self._made: List[Description] = []

    def survey(self, survey: Survey) -> None:
        self._pids = survey.pids
        self._sockets = {one.number: one for one in survey.sockets}
        self._flying.clear()
        self._ends.clear()
        for number, flight in survey.in_flight.items():
            mine = [one for one in flight.objects if one.device == self.device]
            if mine or not flight.is_complete:
                self._flying[number] = mine
                self._ends[number] = number
                self._ends.setdefault(self._peer(number), number)
        self._ends.pop(0, None)

    def _peer(self, number: int) -> int:
        known = self._sockets.get(number)
        return known.peer if known is not None else 0

    def look(self, found: Found) -> None:
        number = found.object.inode
        if not stat.S_ISSOCK(found.object.mode) or number not in self._ends:
            return
        inode = next((one.inode for one in self._flying[self._ends[number]]), 0)
        wire = Wire(found.number, Kind.SOCKET, inode, found.object, attached=True)
        wire.copy = found.copy()
        found.table.holdings.append(wire)
        _note(found.table, wire, (one.inode for one in self._flying.get(number, ())))

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        self._counterparts = counterparts
        for holding in (one for table in process.tables for one in table.holdings):
            if isinstance(holding, (Flying, Wire)):
                holding.path = counterparts.path(holding.inode)

    def judge(self, scene: Scene) -> None:
        ends = _ends(scene)
        for flying in _flying(scene):
            if flying.problem is None:
                flying.problem = self._obstacle(ends, flying.holder.inode)

    def _obstacle(self, ends: Ends, number: int) -> Optional[str]:
        reader, writer = self._sockets.get(number), self._sockets.get(self._peer(number))
        if reader is None or writer is None or writer.peer != number:
            return _CLOSED
        if writer.number not in ends:
            return _NOBODY
        for process, end in (*ends.get(number, ()), *ends[writer.number]):
            why = process.problem or ("its table is out of reach" if end.copy < 0 else None)
            if why is not None:
                return _WHY.format(f"one end of which has process {process.pid} ({process.command}), which {why}")
        states = [socketcopy.state(ends[one][0][1].copy) for one in (number, writer.number)]
        if any(state & (select.POLLPRI | select.POLLERR) for state in states):
            return _URGENT
        return _SHUT if reader.shutdown & 1 else None

    def transfer(self, scene: Scene) -> None:
        if not _ends(scene):
            return
        self._sockets = {one.number: one for one in socketlist.of_processes(self._pids)}
        self.judge(scene)
        ends = _ends(scene)
        stopped = {process.pid for process in scene.processes if process.problem is None}
        holders = socketlist.holders(self._ends)
        try:
            for number in (number for number in self._flying if number in ends and number in self._sockets):
                process, wire = ends[number][0]
                if {pid for pid, _ in holders[number]} - stopped or wire.copy < 0:
                    continue  # nor can all be looked at, then
                messages = socketqueue.peek(wire.copy, bool(self._sockets[number].shutdown & 1))
                try:
                    self._settle(scene, ends, holders, number, messages)
                finally:
                    for message in messages:
                        message.close()
        finally:
            for description in self._made:
                description.close()
            self._made.clear()

    def _settle(
        self,
        scene: Scene,
        ends: Ends,
        holders: Dict[int, Set[Tuple[int, int]]],
        number: int,
        messages: List[Message],
    ) -> None:
        """Exchange what is in flight in one queue, or note why it cannot be; now all of it is seen."""
        found = [statx.examine("", fd, statx.AT_EMPTY_PATH) for message in messages for fd in message.files]
        inodes = [one.inode for one in found if one.device == self.device]
        peer = self._peer(number)
        why = self._obstacle(ends, number)
        outside = {pid for pid, _ in holders.get(peer, ())} - {process.pid for process in scene.processes}
        if why is None and outside:
            why = _WHY.format(f"one end of which has process {min(outside)}, too, which is not stopped")
        if why is None and inodes:
            process, reader = ends[number][0]
            try:
                self._exchange(scene, process, reader.copy, ends[peer][0][1].copy, messages)
            except OSError as error:
                why = f"it is in flight in a socket, and cannot be exchanged: {reason(error)}"
        for _, table, wire in scene.holdings():
            if isinstance(wire, Wire) and wire.holder.inode == number:
                table.holdings[:] = [one for one in table.holdings if not _is_flying(one, wire)]
                _note(table, wire, inodes)
                for one in (one for one in table.holdings if _is_flying(one, wire)):
                    one.path = self._counterparts.path(one.inode) if self._counterparts is not None else None
                    one.problem, one.moved = why, why is None

    def _exchange(self, scene: Scene, process: Process, reader: int, writer: int, messages: List[Message]) -> None:
        socketqueue.refuse_hidden(reader, writer, messages)
        anew = [
            Message(one.data, [self._counterpart(scene, process, fd) for fd in one.files], one.credentials)
            for one in messages
        ]  # whose descriptors are others'
        socketqueue.exchange(reader, writer, messages, anew)

    def _counterpart(self, scene: Scene, process: Process, fd: int) -> int:
        """Of a descriptor that came out of a queue, or itself if it is not of the mount. OSError: none can be had."""
        found = statx.examine("", fd, statx.AT_EMPTY_PATH)
        if found.device != self.device:
            return fd
        known = [one for process in scene.processes for table in process.tables for one in table.held.values()]
        for description in (*known, *self._made):
            if (description.object.inode, description.object.mount_id) == (found.inode, found.mount_id):
                if description.copy >= 0 and _is_same(fd, description.copy):
                    return _usable(description)
        description = self._description(found, fd)
        assert self._counterparts is not None
        self._counterparts.provide_one(process.status, description)
        new = _usable(description)
        if description.kind is Kind.FILE:
            os.lseek(new, description.position, os.SEEK_SET)
        return new

    def _description(self, found: statx.Object, fd: int) -> Description:
        info = procfs.parse_fdinfo(procfs.read(f"/proc/self/fdinfo/{fd}"))
        kind = kind_of(found.mode, info.flags)
        if kind not in _PLAIN or any(line.startswith("lock:") for line in info.lines):
            raise OSError(errno.EBUSY, f"a {kind.value} with a state of its own is among what was sent")
        copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        description = Description(found, info.flags & ~os.O_CLOEXEC, kind, info.position, copy)
        self._made.append(description)
        return description


def _usable(description: Description) -> int:
    if description.problem is not None or description.new < 0 or description.carried is not None:
        raise OSError(errno.EBUSY, description.problem or "something without a name is among what was sent")
    return description.new


def _is_same(one: int, other: int) -> bool:
    return syscalls.kcmp(os.getpid(), os.getpid(), KCMP_FILE, one, other) == 0


def _flying(scene: Scene) -> Iterator[Flying]:
    return (holding for _, _, holding in scene.holdings() if isinstance(holding, Flying))


def _is_flying(one: Holding, wire: Holding) -> bool:
    return isinstance(one, Flying) and one.number == wire.number


def _note(table: FdTable, wire: Wire, inodes: Iterable[int]) -> None:
    for index, inode in enumerate(inodes, 1):
        table.holdings.append(Flying(wire.number, Kind.IN_FLIGHT, inode, wire.holder, f"in flight {index}"))


def _ends(scene: Scene) -> Ends:
    found: Ends = {}
    for process, _, holding in scene.holdings():
        if isinstance(holding, Wire):
            found.setdefault(holding.holder.inode, []).append((process, holding))
    return found
