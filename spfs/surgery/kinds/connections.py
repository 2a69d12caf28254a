"""Connections of unix sockets one end of which has a name on the old mount: both ends are replaced.

An accepted socket has its listener's name, and with it the old file system. Nothing but a new connection through a
listener of that name gives another socket the same one, and a connection always has two new ends: so all who have
either must stand still. ``spfs.surgery.socketpairs`` makes it.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
from functools import partial
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

from spfs.errors import reason
from spfs.linux import process as syscalls
from spfs.linux import sockdiag
from spfs.linux.sockdiag import UnixSocket
from spfs.references import Kind
from spfs.surgery import socketbind, socketcopy, socketlist
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.errands import Errand
from spfs.surgery.kinds import epolls
from spfs.surgery.kinds.base import Found, Handler, Scene, Survey
from spfs.surgery.kinds.sockets import BoundSocket
from spfs.surgery.records import FdTable, Process
from spfs.surgery.scheduler import has_ended
from spfs.surgery.socketpairs import Connection, End, Junction, Side, join

Sides = Dict[int, Side]

_CLOSED = "its other end is closed: what lies in it can still be read, and then its end"
_NOBODY = "its other end was found with nobody who can be stopped"
_STALE = "it is registered with an epoll instance by a descriptor that is closed (epoll(7), Q6)"


class Connections(Handler):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._pids: List[int] = []
        self._sockets: Dict[int, UnixSocket] = {}  # all there are, by their numbers
        self._named: Dict[int, UnixSocket] = {}  # of each end of a connection in question, the one with the name
        self._sent: Set[int] = set()  # those that are in flight themselves
        self._holders: Optional[Dict[int, Set[Tuple[int, int]]]] = None  # process and descriptor, while nobody runs
        self._seen = False

    # -- finding them

    def survey(self, survey: Survey) -> None:
        self._pids = survey.pids
        flights = survey.in_flight.values()
        self._sent = {one.inode for flight in flights for one in flight.objects if stat.S_ISSOCK(one.mode)}
        self._holders = None
        self._seen = False
        self._list(survey.sockets)

    def _list(self, sockets: Iterable[UnixSocket]) -> None:
        self._sockets = {one.number: one for one in sockets}
        self._named.clear()
        for one in self._sockets.values():
            if one.device == self.device and one.state == sockdiag.ESTABLISHED and one.type != socket.SOCK_DGRAM:
                self._named[one.number] = one
                self._named.setdefault(one.peer, one)
        self._named.pop(0, None)

    def look(self, found: Found) -> None:
        number = found.object.inode
        if number in self._named:
            self._seen = True
            end = End(found.number, Kind.SOCKET, self._named[number].inode, found.object, exchanged=True)
            end.attached = self._sockets[number].device != self.device
            end.copy = found.copy()
            end.problem = None if end.copy >= 0 else "its table is out of reach"
            found.table.holdings.append(end)

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        for end in (one for table in process.tables for one in table.holdings if isinstance(one, End)):
            end.path = counterparts.path(end.inode)
            if end.problem is None and end.new < 0:
                try:
                    if not end.attached:
                        end.directory = counterparts.open_parent(process.status, end.inode)
                    end.new = os.dup(end.copy)  # a place for what will be made
                except OSError as error:
                    end.problem = f"its name does not lead to the new mount: {reason(error)}"

    def changed(self, process: Process) -> bool:
        """Whether it has such an end by another descriptor than was noted: one too few, and the connection is lost."""
        if not self._seen:
            return False
        if self._holders is None:
            self._list(socketlist.of_processes(self._pids))
            self._holders = socketlist.holders(self._named)
        noted = {(end.holder.inode, end.number) for end in _ends_of(process.tables[0])}
        found = {(n, fd) for n, holders in self._holders.items() for pid, fd in holders if pid == process.pid}
        return noted != found  # whether the numbers still are those sockets', ``Sockets`` finds out for all

    # -- what can go

    def judge(self, scene: Scene) -> None:
        sides = _sides(scene)
        for number, side in sides.items():
            if side.problem is None:
                try:
                    why = self._obstacle(scene, sides, number)
                except OSError as error:
                    why = f"it cannot be examined: {reason(error)}"
                if why is not None:
                    side.refuse(why)
                    other = sides.get(self._peer(number))
                    if other is not None:
                        other.refuse(why)

    def _peer(self, number: int) -> int:
        known = self._sockets.get(number)
        return known.peer if known is not None else 0

    def _obstacle(self, scene: Scene, sides: Sides, number: int) -> Optional[str]:
        side, other = sides[number], sides.get(self._peer(number))
        if other is None:
            return _CLOSED if self._peer(number) not in self._sockets else _NOBODY
        for one in (side, other):
            for process, end in one.users:
                why = process.problem or end.problem
                if why is not None:
                    return f"process {process.pid} ({process.command}), which has an end of it, cannot let it go: {why}"
            if self._strangers(scene, one.number):
                return f"process {min(self._strangers(scene, one.number))}, which has an end of it, was not examined"
        if number in self._sent:
            return "it is in flight in a socket itself: asked again when it has been received, it goes"
        waits = socketcopy.state(side.copy)
        if waits & select.POLLERR:
            return "an error waits in it"
        if waits & select.POLLPRI:
            return "an urgent byte waits in it (MSG_OOB): asked again when it has been read, it goes"
        if side.attached and socketcopy.addresses(side.copy)[0]:
            return f"its other end has a name of its own, {socketcopy.addresses(side.copy)[0]!r}, which it would lose"
        if _is_stale(scene, sides, number):
            return _STALE
        return _who_is_missing(scene, side.copy) or _listener_problem(scene, side)

    def _strangers(self, scene: Scene, number: int) -> Set[int]:
        known = {process.pid for process in scene.processes}
        return {pid for pid, _ in (self._holders or {}).get(number, ()) if pid not in known}

    # -- while nobody runs

    def transfer(self, scene: Scene) -> None:
        assert scene.errands is not None
        sides = _sides(scene)
        junctions: Dict[int, Junction] = {}
        for number, side in sides.items():
            other = sides.get(self._peer(number))
            if side.attached or side.problem is not None or other is None:
                continue
            # Where both have names, the one whose listener is known is accepted again: or else either.
            if not other.attached and (_listener(scene, other), other.number) > (_listener(scene, side), number):
                continue
            connection = Connection(side, other, self._sockets[number].shutdown, self._sockets[other.number].shutdown)
            try:
                junction = junctions.get(side.inode) or self._junction(scene, side)
            except OSError as error:
                connection.refuse(reason(error))
                continue
            junctions[side.inode] = junction
            junction.connections.append(connection)
        if junctions:
            join(list(junctions.values()), scene.processes, scene.errands, lambda: socketlist.of_processes(self._pids))

    def conclude(self, scene: Scene) -> None:
        """Give the old ends back to those who have new ones when somebody who is alive could not have his: the old
        connection is whole, and a new one with one end would be none."""
        assert scene.errands is not None
        sides = _sides(scene)
        back: Dict[int, _Back] = {}
        for number, side in sides.items():
            other = sides.get(self._peer(number))
            if other is None or number > other.number or side.problem is not None:
                continue
            uses = [*_uses(scene, side), *_uses(scene, other)]
            missing = [p for p, table, end in uses if end.number not in table.moved and not has_ended(p.pid)]
            if missing and any(end.number in table.moved for _, table, end in uses):
                why = f"process {missing[0].pid} ({missing[0].command}) could not let go of an end of it"
                side.refuse(why)
                other.refuse(why)
                for process, table, end in uses:
                    if end.number in table.moved:
                        back.setdefault(table.tid, _Back(process, table, {})).ends[end.number] = end
        scene.errands.run_with([(one.process, one.table, one.fill) for one in back.values()])

    def _junction(self, scene: Scene, side: Side) -> Junction:
        """Where the connections of its name are to be made. OSError: nowhere."""
        why = _listener_problem(scene, side)  # it could not be bound a moment ago
        if why is not None:
            raise OSError(errno.EBUSY, why)
        listener = _listener(scene, side)
        if listener >= 0:
            return Junction(side, listener)
        socketbind.find_hidden(side.first.directory, side.name)
        try:
            there = os.stat(side.name, dir_fd=side.first.directory, follow_symlinks=False)
        except FileNotFoundError:
            return Junction(side)
        node = there.st_dev, there.st_ino & 0xFFFFFFFF
        for one in self._sockets.values():
            if (one.device, one.inode) == node and one.state == sockdiag.LISTENING:
                return Junction(side, _taken(scene, one.number), one)  # it went at another time
        return Junction(side)


def _taken(scene: Scene, number: int) -> int:
    """A descriptor of ours of a socket, all users of which stand still; the caller's. OSError EBUSY if they do not."""
    processes = {process.pid: process for process in scene.processes if process.problem is None}
    holders = sorted(socketlist.holders([number])[number])
    outside = [pid for pid, _ in holders if pid not in processes]
    if outside or not holders:
        who = f"process {outside[0]}, which is not stopped" if outside else "nobody who can be found"
        raise OSError(errno.EBUSY, f"the socket that listens by its name belongs to {who}")
    return syscalls.pidfd_getfd(processes[holders[0][0]].pidfd, holders[0][1], 0)


def _ends_of(table: FdTable) -> Iterator[End]:
    return (one for one in table.holdings if isinstance(one, End))


class _Back(NamedTuple):
    """What is given back to one table: the ends by their descriptors."""

    process: Process
    table: FdTable
    ends: Dict[int, End]

    def fill(self, errand: Errand) -> None:
        numbers = list(self.ends)
        for number in numbers:
            epolls.remove(errand.program, self.table, number)
        errand.receive([self.ends[number].copy for number in numbers], partial(self._exchange, errand, numbers))
        for number in numbers:
            epolls.add_again(errand.program, self.table, number)

    def _exchange(self, errand: Errand, numbers: List[int], index: int, slot: int) -> None:
        entry = errand.program.exchange(numbers[index], slot)
        errand.program.expect(entry, lambda result: self.table.moved.discard(result))


def _uses(scene: Scene, side: Side) -> List[Tuple[Process, FdTable, End]]:
    """Who acts for whoever has an end: a table that processes share is operated on once."""
    return [
        (process, table.owner or table, holding)
        for process, table, holding in scene.holdings()
        if isinstance(holding, End) and holding.holder.inode == side.number
    ]


def _sides(scene: Scene) -> Sides:
    found: Sides = {}
    for process, _, holding in scene.holdings():
        if isinstance(holding, End):
            found.setdefault(holding.holder.inode, Side(holding.holder.inode)).users.append((process, holding))
    return found


def _is_stale(scene: Scene, sides: Sides, number: int) -> bool:
    device = sides[number].users[0][1].holder.device
    numbers = {end.number for _, end in sides[number].users}
    return any(
        (entry.device, entry.inode) == (device, number) and entry.number not in numbers
        for _, table in scene.tables()
        for entries in table.epolls.values()
        for entry in entries
    )


def _who_is_missing(scene: Scene, copy: int) -> Optional[str]:
    """Why nobody can make the call that shows the end of ``copy`` the same credentials of its peer."""
    (pid, _, _) = struct.unpack("iII", socketcopy.peer_identity(copy)[0])
    process = next((process for process in scene.processes if process.pid == pid), None)
    if process is not None and process.problem is None:
        return None
    why = "has ended, or is not among those that are stopped" if process is None else process.problem
    return f"it shows the credentials of process {pid} (SO_PEERCRED), which {why}: nobody else could give them"


def _listening(scene: Scene, side: Side) -> List[Tuple[Process, BoundSocket]]:
    return [
        (process, one)
        for process, _, one in scene.holdings()
        if isinstance(one, BoundSocket) and one.is_listening and one.inode == side.inode
    ]


def _listener_problem(scene: Scene, side: Side) -> Optional[str]:
    for process, one in _listening(scene, side):
        why = process.problem or one.problem
        if why is not None:
            return f"the socket that listens by its name cannot go: {why}"
    return None


def _listener(scene: Scene, side: Side) -> int:
    """What was bound in the place of the listener that has the name of ``side``; -1: there is none."""
    return next((one.new for _, one in _listening(scene, side) if one.problem is None), -1)
