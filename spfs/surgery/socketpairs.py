"""Makes connections of unix sockets anew: the same names, credentials, options, contents, at both ends.

For each name there is a listener bound by it: the one that replaces the old listener, or one for the moment. The
process whose credentials the connecting end is shown listens, the one whose credentials the accepted end is shown
connects, and we accept. Meanwhile the name is another one: who comes from outside must not be accepted by us.

The old ends stay whole until each process has put the new ones in their places.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Dict, Iterable, List, Optional, Tuple

from spfs.errors import reason
from spfs.linux.arch import LOAD_ARGUMENT_0
from spfs.linux.sockdiag import UnixSocket
from spfs.surgery import socketbind, socketcopy, socketqueue
from spfs.surgery.errands import Errand, Errands
from spfs.surgery.records import Holding, Process
from spfs.surgery.socketcopy import borrowed

_BACKLOG = 4096  # net.core.somaxconn, unless somebody has made it less
_MIRRORED = {0: 0, 1: 2, 2: 1, 3: 3}  # shutdown(2) of one end, as the other one has it


@dataclass(eq=False)
class End(Holding):
    """A descriptor of an end of a connection. ``directory``: where its name is on the new mount, this record's."""

    directory: int = -1

    def close(self) -> None:
        super().close()
        if self.directory >= 0:
            os.close(self.directory)
            self.directory = -1


@dataclass(eq=False)
class Side:
    """An end, with all who have it."""

    number: int
    users: List[Tuple[Process, End]] = field(default_factory=list)

    @property
    def first(self) -> End:
        return self.users[0][1]

    @property
    def copy(self) -> int:
        return self.first.copy

    @property
    def inode(self) -> int:
        return self.first.inode

    @property
    def attached(self) -> bool:
        return self.first.attached

    @property
    def name(self) -> str:
        return os.path.basename(self.first.path or "")

    @property
    def problem(self) -> Optional[str]:
        return next((end.problem for _, end in self.users if end.problem is not None), None)

    def refuse(self, why: str) -> None:
        for _, end in self.users:
            end.problem = end.problem or why


@dataclass(eq=False)
class Connection:
    """``named``: the end that is accepted anew, ``other``: that which connects; the new ones are this object's."""

    named: Side
    other: Side
    named_shutdown: int
    other_shutdown: int
    accepted: int = -1
    connecting: int = -1
    result: Optional[int] = None

    def refuse(self, why: str) -> None:
        self.named.refuse(why)
        self.other.refuse(why)
        self.close()

    def close(self) -> None:
        for fd in (self.accepted, self.connecting):
            if fd >= 0:
                os.close(fd)
        self.accepted = self.connecting = -1

    @property
    def is_refused(self) -> bool:
        return self.named.problem is not None


class Junction:
    """The connections of one name. ``listener``: what is bound by it already; not this object's, but with ``standing``,
    what is known of a socket that listens already, and goes on as it is. Without, one is made."""

    def __init__(self, side: Side, listener: int = -1, standing: Optional[UnixSocket] = None) -> None:
        self.side = side
        self.connections: List[Connection] = []
        self.listener = listener
        self.standing = standing
        self.node = -1
        self._owned = listener if standing is not None else -1
        self._hidden = ""
        self._mode = 0
        self._blocking = False

    @property
    def batch(self) -> int:
        """How many connections can wait to be accepted."""
        return self.standing.limit + 1 if self.standing is not None else _BACKLOG

    def prepare(self) -> None:
        process, end = self.side.users[0]
        if self.listener < 0:
            self._owned = self.listener = socketcopy.fresh(end.copy)
            socketbind.bind(process, end.copy, self._owned, end.directory, self.side.name)
        self._blocking = os.get_blocking(self.listener)
        os.set_blocking(self.listener, False)
        self._mode = stat.S_IMODE(os.stat(self.side.name, dir_fd=end.directory, follow_symlinks=False).st_mode)
        self._hidden = socketbind.hide(end.directory, self.side.name, self._mode)
        self.node = os.open(self._hidden, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=end.directory)
        os.chmod(f"/proc/self/fd/{self.node}", 0o777)  # who has connected once may not be allowed to any more
        if self.standing is not None and socketcopy.state(self.listener) & select.POLLIN:
            raise OSError(errno.EBUSY, "connections wait in the socket that listens by its name")

    def can_serve(self, connection: Connection) -> bool:
        """Whether it shows the right credentials without being told to listen."""
        shown = socketcopy.peer_identity(connection.other.copy)
        return self.standing is not None and shown == socketcopy.peer_identity(self.listener)

    def accept(self) -> Iterable[int]:
        with borrowed(self.listener) as listener:
            while True:
                try:
                    yield listener.accept()[0].detach()
                except BlockingIOError:
                    return

    def finish(self) -> None:
        directory = self.side.first.directory
        if self.listener >= 0:
            os.set_blocking(self.listener, self._blocking)
        if self.node >= 0:
            os.chmod(f"/proc/self/fd/{self.node}", self._mode)
        if self._hidden:
            os.rename(self._hidden, self.side.name, src_dir_fd=directory, dst_dir_fd=directory)
            self._hidden = ""
        for fd in (self.node, self._owned):
            if fd >= 0:
                os.close(fd)
        self.node = self._owned = -1


Wave = Dict[Junction, List[Connection]]


def join(
    junctions: List[Junction], processes: Iterable[Process], errands: Errands, list_all: Callable[[], List[UnixSocket]]
) -> None:
    """Put both ends of new connections into the places of the ends' records (``Holding.new``); what cannot be is
    refused, and stays as it is."""
    callers = {process.pid: process for process in processes if process.problem is None}
    ready: List[Junction] = []
    strangers: List[int] = []
    try:
        for junction in junctions:
            try:
                junction.prepare()
                for one in junction.connections:
                    _prepare(one)
                ready.append(junction)
            except OSError as error:
                for one in junction.connections:
                    one.refuse(f"it cannot be made again by its name: {reason(error)}")
        for wave in _waves(ready):
            _listen(wave, callers, errands)
            _connect(wave, callers, errands)
            strangers += _accept(wave, list_all)
        for connection in (one for junction in ready for one in junction.connections if not one.is_refused):
            try:
                _complete(connection)
            except OSError as error:
                connection.refuse(f"it cannot be made again: {reason(error)}")
    finally:
        for junction in junctions:
            junction.finish()
            for one in junction.connections:
                one.close()
        for fd in strangers:
            os.close(fd)


def _prepare(one: Connection) -> None:
    one.connecting = socketcopy.fresh(one.other.copy)
    os.set_blocking(one.connecting, False)
    if not one.other.attached:
        process, end = one.other.users[0]
        socketbind.bind(process, end.copy, one.connecting, end.directory, one.other.name)


def _waves(junctions: Iterable[Junction]) -> Iterable[Wave]:
    """A listener shows the credentials of one process at a time."""
    left = {junction: list(junction.connections) for junction in junctions}
    while any(left.values()):
        wave: Wave = {}
        for junction, connections in left.items():
            if connections:
                shown = _shown(connections[0].other)
                wave[junction] = [one for one in connections if _shown(one.other) == shown][: junction.batch]
                left[junction] = [one for one in connections if one not in wave[junction]]
        yield wave


def _shown(side: Side) -> int:
    """The process whose credentials this side is shown of the other one."""
    return int(struct.unpack("iII", socketcopy.peer_identity(side.copy)[0])[0])


def _listen(wave: Wave, callers: Dict[int, Process], errands: Errands) -> None:
    tasks: Dict[Process, List[Junction]] = {}
    results: Dict[Junction, int] = {}
    for junction, connections in wave.items():
        process = callers.get(_shown(connections[0].other))
        if junction.standing is not None:
            for one in (one for one in connections if not junction.can_serve(one)):
                one.refuse("the socket that listens by its name by now shows other credentials")
            results[junction] = 0
        elif process is not None:
            tasks.setdefault(process, []).append(junction)

    def filler(mine: List[Junction]) -> Callable[[Errand], None]:
        def listen(errand: Errand, index: int, slot: int) -> None:
            entry = errand.program.add("listen", slot, _BACKLOG, load=LOAD_ARGUMENT_0)
            errand.program.expect(entry, lambda result: results.update({mine[index]: result}))

        return lambda errand: errand.receive([one.listener for one in mine], partial(listen, errand))

    errands.run({process: filler(mine) for process, mine in tasks.items()})
    for junction, connections in wave.items():
        if results.get(junction) != 0:
            why = _failure(connections[0].other, "listens", results.get(junction))
            for one in connections:
                one.refuse(why)


def _connect(wave: Wave, callers: Dict[int, Process], errands: Errands) -> None:
    tasks: Dict[Process, Wave] = {}
    for junction, connections in wave.items():
        for one in connections:
            process = callers.get(_shown(one.named))
            if process is not None and not one.is_refused:
                tasks.setdefault(process, {}).setdefault(junction, []).append(one)

    def filler(mine: Wave) -> Callable[[Errand], None]:
        def fill(errand: Errand) -> None:
            # By a magic link, which needs no way to the name, and no right but that to the node itself.
            address = struct.pack("H", socket.AF_UNIX) + f"/proc/self/fd/{errand.fixed}".encode() + b"\0"
            place = errand.program.put(address)
            for junction, connections in mine.items():
                errand.receive([junction.node], partial(fix, errand))
                errand.receive(
                    [one.connecting for one in connections], partial(connect, errand, place, len(address), connections)
                )
                errand.program.add("close", errand.fixed)

        return fill

    def fix(errand: Errand, _: int, slot: int) -> None:
        errand.program.add("dup3", slot, errand.fixed, os.O_CLOEXEC, load=LOAD_ARGUMENT_0)

    def connect(
        errand: Errand, place: int, length: int, connections: List[Connection], index: int, slot: int
    ) -> None:
        entry = errand.program.add("connect", slot, place, length, load=LOAD_ARGUMENT_0)
        errand.program.expect(entry, partial(setattr, connections[index], "result"))

    errands.run({process: filler(mine) for process, mine in tasks.items()})
    for one in (one for connections in wave.values() for one in connections if not one.is_refused):
        if one.result != 0:
            one.refuse(_failure(one.named, "connects", one.result))


def _failure(side: Side, what: str, result: Optional[int]) -> str:
    why = os.strerror(-result) if result is not None else "it cannot be operated on"
    return f"process {_shown(side)}, whose credentials it shows, cannot be the one that {what} again: {why}"


def _accept(wave: Wave, list_all: Callable[[], List[UnixSocket]]) -> List[int]:
    """What was accepted and is nobody's."""
    accepted = {os.fstat(fd).st_ino: fd for junction in wave for fd in junction.accept()}
    peers = {one.peer: one.number for one in list_all() if one.number in accepted}
    for one in (one for connections in wave.values() for one in connections if not one.is_refused):
        number = peers.get(os.fstat(one.connecting).st_ino)
        if number is None:
            one.refuse("it was not connected anew")
        else:
            one.accepted = accepted.pop(number)
    return list(accepted.values())


def _complete(one: Connection) -> None:
    """All that a connection is besides its names and credentials; then both new ends are where they are expected."""
    if _MIRRORED[one.named_shutdown] != one.other_shutdown:
        raise OSError(errno.EBUSY, "one of its ends was shut down when the other one was not there")
    for new in (one.accepted, one.connecting):
        socketcopy.keep_to_itself(new)
        socketcopy.widen(new)
    _fill(one.named.copy, one.other.copy, one.named_shutdown, one.connecting)
    _fill(one.other.copy, one.named.copy, one.other_shutdown, one.accepted)
    socketqueue.refuse_skipped(one.other.copy, one.connecting)
    socketqueue.refuse_skipped(one.named.copy, one.accepted)
    socketcopy.shut(one.accepted, one.named_shutdown)
    for side, new in ((one.named, one.accepted), (one.other, one.connecting)):
        socketcopy.assimilate(side.copy, new)
        if socketcopy.peer_identity(side.copy) != socketcopy.peer_identity(new):
            who = f"process {_shown(side)}, whose credentials it shows"
            raise OSError(errno.EPERM, f"{who}, has other ones by now, or another security context")
        if socketcopy.addresses(side.copy) != socketcopy.addresses(new):
            raise OSError(errno.EADDRNOTAVAIL, "its names would be others")
        if socketqueue.waiting(side.copy) != socketqueue.waiting(new):
            raise OSError(errno.EBUSY, "not all that lies in it could be queued again")
    for side, new in ((one.named, one.accepted), (one.other, one.connecting)):
        for _, end in side.users:
            os.dup2(new, end.new, inheritable=False)


def _fill(reader: int, writer: int, shutdown: int, new_writer: int) -> None:
    """Have in the queue of the new connection what lies in that of ``reader``."""
    messages = socketqueue.peek(reader, bool(shutdown & 1))
    try:
        socketqueue.refuse_hidden(reader, writer, messages)
        socketqueue.put(new_writer, messages)
    finally:
        for message in messages:
            message.close()
