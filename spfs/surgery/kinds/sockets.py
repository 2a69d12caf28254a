"""Unix sockets that wait on the old mount: they keep it in use without a descriptor of it.

connect(2) finds a socket by the inode that its path leads to. So a socket that waits for others to come is replaced by
a new one, bound by the same address where that leads to the new mount. (Connections: ``connections``.)
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

from spfs.errors import reason
from spfs.linux import process as syscalls
from spfs.linux import sockdiag
from spfs.linux.sockdiag import UnixSocket
from spfs.references import Kind
from spfs.surgery import socketbind, socketcopy, socketlist
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.kinds.base import Found, Handler, Scene, Survey
from spfs.surgery.program import Program
from spfs.surgery.records import FdTable, Holding, Process

_WAITING = "{} wait in it that cannot be handed over: asked again when they are gone, it goes"


@dataclass(eq=False)
class BoundSocket(Holding):
    """``known``: what the kernel lists of it; ``directory``: where its path is on the new mount, this record's."""

    known: Optional[UnixSocket] = None
    directory: int = -1
    listens: bool = False  # this one's process is to call listen(2)

    @property
    def is_listening(self) -> bool:
        return self.known is not None and self.known.state == sockdiag.LISTENING

    @property
    def is_datagram(self) -> bool:
        return self.known is not None and self.known.type == socket.SOCK_DGRAM

    @property
    def name(self) -> str:
        """Its last component."""
        return os.fsdecode(self.path or "").rpartition("/")[2]

    def close(self) -> None:
        super().close()
        if self.directory >= 0:
            os.close(self.directory)
            self.directory = -1


class Sockets(Handler):
    """One new socket for all that share an old one; bound by us, listened on by the process itself, whose credentials
    those who connect are shown (SO_PEERCRED)."""

    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._bound: Dict[int, UnixSocket] = {}

    def survey(self, survey: Survey) -> None:
        self._bound = {one.number: one for one in survey.sockets if one.device == self.device}

    def look(self, found: Found) -> None:
        known = self._bound.get(found.object.inode) if stat.S_ISSOCK(found.object.mode) else None
        if known is not None and (known.type == socket.SOCK_DGRAM or known.state != sockdiag.ESTABLISHED):
            place = BoundSocket(found.number, Kind.SOCKET, known.inode, found.object, exchanged=True, known=known)
            place.copy = found.copy()
            place.problem = None if place.copy >= 0 else "its table is out of reach"
            found.table.holdings.append(place)

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        for holding in _of(process):
            holding.path = counterparts.path(holding.inode)
            if holding.problem is None and holding.new < 0:
                holding.listens = holding.is_listening and _should_listen(process, holding)
                try:
                    holding.directory = counterparts.open_parent(process.status, holding.inode)
                    socketbind.check(holding.copy, holding.directory, holding.name)
                    holding.new = socketcopy.like(holding.copy)
                except OSError as error:
                    holding.problem = f"it cannot be bound on the new mount: {reason(error)}"

    def judge(self, scene: Scene) -> None:
        for users in by_socket(scene):
            for _, one in users:
                if one.problem is None and socketcopy.state(one.copy) & select.POLLIN:
                    one.problem = _WAITING.format("connections" if one.is_listening else "messages")
            why = next(filter(None, (process.problem or one.problem for process, one in users)), None)
            for _, one in users if why is not None else ():
                one.problem = one.problem or f"it is shared with somebody who cannot go: {why}"

    def changed(self, process: Process) -> bool:
        """Whether a descriptor is another socket's by now: a server's numbers come again soon."""
        return any(
            not _is_still(table, one) for table in process.tables for one in table.exchangeable if one.copy >= 0
        )

    def transfer(self, scene: Scene) -> None:
        for users in (users for users in by_socket(scene) if all(one.problem is None for _, one in users)):
            process, first = users[0]
            try:
                socketbind.bind(process, first.copy, first.new, first.directory, first.name)
            except OSError as error:
                for _, one in users:
                    one.problem = f"it cannot be bound on the new mount: {reason(error)}"
                continue
            for _, one in users[1:]:
                os.dup2(first.new, one.new, inheritable=False)

    def finish(self, program: Program, table: FdTable) -> None:
        for holding in table.holdings:
            if isinstance(holding, BoundSocket) and holding.number in program.exchanged and holding.listens:
                assert holding.known is not None
                program.add("listen", holding.number, holding.known.limit)


def _should_listen(process: Process, one: BoundSocket) -> bool:
    """Of those that share it, the one whose credentials those who connect have been shown so far; all, if it is none
    of them."""
    pid, _, _ = struct.unpack("iII", socketcopy.peer_identity(one.copy)[0])
    return pid == process.pid or not socketlist.has_socket(pid, one.holder.inode)


def _of(process: Process) -> Iterator[BoundSocket]:
    return (one for table in process.tables for one in table.holdings if isinstance(one, BoundSocket))


def _is_still(table: FdTable, one: Holding) -> bool:
    try:
        return syscalls.kcmp(table.tid, os.getpid(), syscalls.KCMP_FILE, one.number, one.copy) == 0
    except OSError:  # closed, or the process has ended
        return False


def by_socket(scene: Scene) -> List[List[Tuple[Process, BoundSocket]]]:
    """All who share each of them."""
    found: Dict[int, List[Tuple[Process, BoundSocket]]] = {}
    for process, _, holding in scene.holdings():
        if isinstance(holding, BoundSocket):
            found.setdefault(holding.holder.inode, []).append((process, holding))
    return list(found.values())
