"""Unix sockets that are bound on the old mount: they keep it in use without a descriptor of it. They are reported.

An accepted socket has the path of its listener, and so holds the mount as well.
"""

from __future__ import annotations

import stat
from typing import Dict, List

from spfs.references import Kind
from spfs.surgery import socketlist
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.kinds.base import Found, Handler
from spfs.surgery.records import Holding, Process

STAY = "sockets are not moved: it is bound on the old mount, or was accepted by one that is"


class Sockets(Handler):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._bound: Dict[int, int] = {}  # number of the socket -> inode number of its path

    def survey(self, pids: List[int]) -> None:
        self._bound = socketlist.bound_on(self.device, pids)

    def look(self, found: Found) -> None:
        if stat.S_ISSOCK(found.object.mode) and found.object.inode in self._bound:
            inode = self._bound[found.object.inode]
            found.table.holdings.append(Holding(found.number, Kind.SOCKET, inode, found.object, problem=STAY))

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        for table in process.tables:
            for holding in table.holdings:
                if holding.kind is Kind.SOCKET:
                    holding.path = counterparts.path(holding.inode)
