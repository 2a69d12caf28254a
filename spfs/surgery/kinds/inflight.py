"""Descriptors in flight: sent over a unix socket (SCM_RIGHTS) and not received yet. Found and reported.

They are seen by peeking at the queue, which takes nothing out; only what its first message with descriptors carries can
be seen. Nothing can be put into a queue in another's place.
"""

from __future__ import annotations

import array
import os
import socket
import stat
from typing import List, Set

from spfs.linux import process as syscalls
from spfs.linux import statx
from spfs.references import Kind
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.kinds.base import Found, Handler, Survey
from spfs.surgery.records import Holding, Process
from stubfs.wire import MAX_FDS

_WHY = "it is in flight in a socket: asked again when it has been received, it goes"


class InFlight(Handler):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._queued: Set[int] = set()

    def survey(self, survey: Survey) -> None:
        self._queued = {one.number for one in survey.sockets if one.queued}

    def look(self, found: Found) -> None:
        if not stat.S_ISSOCK(found.object.mode) or found.object.inode not in self._queued or not carries(found):
            return
        inodes = [one.inode for one in first(found) if one.device == self.device]
        for index, inode in enumerate(inodes):
            detail = f"in flight {index + 1}"
            found.table.holdings.append(
                Holding(found.number, Kind.IN_FLIGHT, inode, found.object, detail, problem=_WHY)
            )

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        for table in process.tables:
            for holding in table.holdings:
                if holding.kind is Kind.IN_FLIGHT:
                    holding.path = counterparts.path(holding.inode)


def carries(found: Found) -> bool:
    """Whether descriptors lie in the queue of this socket."""
    return any(int(line.split()[1]) for line in found.info().lines if line.startswith("scm_fds:"))


def first(found: Found) -> List[statx.Object]:
    """What the first message with descriptors carries."""
    if found.pidfd < 0:
        return []
    # Not a copy that lasts: to others who look at the same time it would be one more socket with the descriptor.
    with socket.socket(fileno=syscalls.pidfd_getfd(found.pidfd, found.number, 0)) as wrapped:
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            _, ancillary, _, _ = wrapped.recvmsg(1, socket.CMSG_SPACE(4 * MAX_FDS), flags)
        except BlockingIOError:
            return []  # a listener, or it was received just now
    objects: List[statx.Object] = []
    for level, kind, data in ancillary:
        if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            continue
        numbers = array.array("i")
        numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        for number in numbers:
            objects.append(statx.examine("", number, statx.AT_EMPTY_PATH))
            os.close(number)
    return objects
