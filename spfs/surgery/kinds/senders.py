"""Datagram sockets that are connected to one on the old mount: they stay, and are connected to the new one.

connect(2) has a datagram socket forget its former peer. It also drops what lies in its queue: there must be nothing.
"""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional, Set, Tuple

from spfs.errors import reason
from spfs.linux.sockdiag import UnixSocket
from spfs.references import Kind
from spfs.surgery import socketcopy, socketlist
from spfs.surgery.kinds.base import Found, Handler, Scene, Survey
from spfs.surgery.kinds.sockets import BoundSocket, by_socket
from spfs.surgery.records import FdTable, Holding, Loss, Process

Users = List[Tuple[Process, BoundSocket]]


@dataclass(eq=False)
class Sender(Holding):
    """``receiver``: the number of the socket that it is connected to."""

    receiver: int = 0


class Senders(Handler):
    """Acts before what they are connected to is bound anew, and again when that is in its place."""

    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._pids: List[int] = []
        self._receivers: Dict[int, UnixSocket] = {}  # those on the mount, by their numbers
        self._senders: Dict[int, Set[int]] = {}  # the numbers of those connected to each

    def survey(self, survey: Survey) -> None:
        self._pids = survey.pids
        self._list(survey.sockets)

    def _list(self, sockets: Iterable[UnixSocket]) -> None:
        datagram = [one for one in sockets if one.type == socket.SOCK_DGRAM]
        self._receivers = {one.number: one for one in datagram if one.device == self.device}
        self._senders = {number: set() for number in self._receivers}
        for one in datagram:
            if one.peer in self._senders:
                self._senders[one.peer].add(one.number)

    def look(self, found: Found) -> None:
        number = found.object.inode
        for receiver in (r for r, senders in self._senders.items() if number in senders):
            place = Sender(found.number, Kind.SOCKET, self._receivers[receiver].inode, found.object, attached=True)
            place.receiver, place.copy = receiver, found.copy()
            found.table.holdings.append(place)

    def judge(self, scene: Scene) -> None:
        senders = _senders(scene)
        for users in by_socket(scene):
            number = users[0][1].holder.inode
            if number not in self._receivers:
                continue
            why = "it is connected to another socket" if self._receivers[number].peer else None
            for sender in self._senders[number]:
                why = why or _obstacle(senders.get(sender, []))
            _refuse(users, why)

    def transfer(self, scene: Scene) -> None:
        """Look again: somebody can have connected a moment ago."""
        groups = [users for users in by_socket(scene) if users[0][1].is_datagram]
        if not groups:
            return
        self._list(socketlist.of_processes(self._pids))
        self.judge(scene)
        stopped = {process.pid for process in scene.processes if process.problem is None}
        holders = socketlist.holders(number for numbers in self._senders.values() for number in numbers)
        for users in groups:
            for sender in self._senders.get(users[0][1].holder.inode, ()):
                outside = {pid for pid, _ in holders[sender]} - stopped
                if outside:
                    _refuse(users, f"a socket is connected to it that process {min(outside)} has, which is not stopped")
            if socketcopy.state(users[0][1].copy) & select.POLLIN:
                _refuse(users, "messages have come a moment ago")

    def conclude(self, scene: Scene) -> None:
        senders = _senders(scene)
        for users in by_socket(scene):
            first = users[0][1]
            if not first.is_datagram or not any(one.number in table.moved for one, table in _tables(scene, users)):
                continue
            try:
                node = os.open(first.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=first.directory)
            except OSError as error:
                for sender in self._senders.get(first.holder.inode, ()):
                    _lose(senders.get(sender, []), error)
                continue
            try:
                for sender in self._senders.get(first.holder.inode, ()):
                    _connect(senders.get(sender, []), node)
            finally:
                os.close(node)


Holders = List[Tuple[Process, FdTable, Sender]]


def _connect(holders: Holders, node: int) -> None:
    try:
        with socketcopy.borrowed(holders[0][2].copy) as one:
            one.connect(f"/proc/self/fd/{node}")
    except OSError as error:
        _lose(holders, error)


def _lose(holders: Holders, error: OSError) -> None:
    for _, table, sender in holders:
        why = f"what it sends is lost: it cannot be connected to the new socket: {reason(error)}"
        table.losses.append(Loss(Kind.SOCKET, sender.number, why))


def _senders(scene: Scene) -> Dict[int, Holders]:
    found: Dict[int, Holders] = {}
    for process, table, holding in scene.holdings():
        if isinstance(holding, Sender):
            found.setdefault(holding.holder.inode, []).append((process, table, holding))
    return found


def _obstacle(holders: Holders) -> Optional[str]:
    if not holders:
        return "a socket is connected to it that was found with nobody who can be stopped"
    for process, _, sender in holders:
        why = process.problem or (sender.problem if sender.copy >= 0 else "its table is out of reach")
        if why is not None:
            return f"process {process.pid} ({process.command}), which has a socket that is connected to it, {why}"
    copy = holders[0][2].copy
    if socketcopy.state(copy) & select.POLLIN:
        return "messages wait in a socket that is connected to it, and would be lost: asked again when they are read"
    if any(socketcopy.passes(copy)) and not socketcopy.addresses(copy)[0]:
        return "a socket without a name is connected to it, which would get one (SO_PASSCRED)"
    return None


def _refuse(users: Users, why: Optional[str]) -> None:
    for _, one in users if why is not None else ():
        one.problem = one.problem or why


def _tables(scene: Scene, users: Users) -> List[Tuple[BoundSocket, FdTable]]:
    mine = {id(one) for _, one in users}
    return [
        (one, table.owner or table)
        for _, table, one in scene.holdings()
        if isinstance(one, BoundSocket) and id(one) in mine
    ]
