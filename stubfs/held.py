"""The ordered table of the requests that wait: as the bytes they came in, without a thread each.

Requests enter at the end in the order they were read; they leave by being let go (the oldest first, one caller's
in order), by a fatal signal to whoever waits, or by the end of the session.
"""

from __future__ import annotations

import errno
import threading
import time
from typing import List, Optional, OrderedDict, Set, Tuple

from stubfs.protocol import BODY, READ_IN, Opcode
from stubfs.request import Request


class HeldTable:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._may_leave = threading.Condition(self._lock)
        self._requests: "OrderedDict[int, Tuple[Request, float]]" = OrderedDict()
        self._open = False
        self._ended = False
        self._being_served: Set[int] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, unique: int) -> bool:
        return unique in self._requests

    def add(self, request: Request, back_to_front: bool = False) -> None:
        """Keep ``request``, which must be a copy of its own. Back to the front: it had been let go too early."""
        with self._lock:
            if self._ended:
                request.fail(errno.EIO)
                return
            self._requests[request.unique] = (request, time.monotonic())
            if back_to_front:
                self._requests.move_to_end(request.unique, last=False)
            if self._open:
                self._may_leave.notify()

    def take(self, unique: int) -> Optional[Request]:
        """The request, out of the table: who takes it answers it."""
        with self._lock:
            entry = self._requests.pop(unique, None)
            return entry[0] if entry is not None else None

    def caller(self, unique: int) -> Optional[int]:
        """The thread id of a held request's caller; None if the request is not held."""
        entry = self._requests.get(unique)
        return entry[0].tid if entry is not None else None

    def let_go(self, allowed: bool) -> None:
        """Whether next() may hand requests out."""
        with self._lock:
            self._open = allowed
            self._may_leave.notify_all()

    def next(self) -> Optional[Request]:
        """Wait until requests may leave, and take the oldest; None at the end of the session.

        A caller's next request is not handed out before served() was called for its former one.
        """
        with self._lock:
            while not self._ended:
                if self._open and self._requests:
                    request = self._oldest()
                    if request is not None:
                        return request
                self._may_leave.wait()
            return None

    def _oldest(self) -> Optional[Request]:
        for unique, (request, _) in self._requests.items():
            if request.tid not in self._being_served:
                del self._requests[unique]
                if request.tid:  # 0: nobody in particular, e.g. a readahead; their order means nothing
                    self._being_served.add(request.tid)
                return request
        return None

    def served(self, request: Request) -> None:
        with self._lock:
            self._being_served.discard(request.tid)
            if self._requests:
                self._may_leave.notify()

    def data_ranges(self, node: int) -> List[Tuple[int, int, int]]:
        """(unique, offset, size) of the held READs and WRITEs of a node: what they lock in the page cache."""
        with self._lock:
            return [
                (unique, *READ_IN.unpack_from(request.buffer, BODY)[1:3])  # WRITE_IN begins alike
                for unique, (request, _) in self._requests.items()
                if request.node == node and request.opcode in (Opcode.READ, Opcode.WRITE)
            ]

    def snapshot(self) -> List[Tuple[Request, float]]:
        """(request, seconds it has been waiting) in the order of the table."""
        now = time.monotonic()
        with self._lock:
            return [(request, now - since) for request, since in self._requests.values()]

    def end(self) -> None:
        """Answer everything with EIO, now and from now on; next() ends."""
        with self._lock:
            self._ended = True
            requests = [request for request, _ in self._requests.values()]
            self._requests.clear()
            self._may_leave.notify_all()
        for request in requests:
            request.fail(errno.EIO)
