"""Who waited, for what and how long: written to a record by a thread that delays nobody.

The table of held requests tells of each beginning and end of a wait, which costs it a few words in a queue. The thread
looks the processes up (while they wait: afterwards they may have ended) and writes lines ``wait``, one for each of the
first requests; of those beyond that only sums, in lines ``waits``.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

from stubfs.callers import Processes, command_line
from stubfs.protocol import opcode_name
from stubfs.record import Record, line
from stubfs.request import Request

IN_DETAIL = 2000  # requests of one mount; each costs about 20 microseconds and 200 bytes
_PAUSE = 0.1  # seconds between looks: many come at once
_CLOSING = 2.0  # seconds for the last lines

Place = Tuple[Optional[bytes], Optional[bytes]]


@dataclass
class _Wait:
    place: Place
    process: Tuple[int, str, str]


class WaitRecorder:
    """Writes to ``record``; ``place_of`` gives a request's path and the name it carries."""

    def __init__(self, record: Record, place_of: Callable[[Request], Place]) -> None:
        self._record = record
        self._place_of = place_of
        self._queue: Deque[Tuple[Request, float, float, str]] = collections.deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._waiting: Dict[int, _Wait] = {}
        self._detailed = 0
        self._sums: Dict[str, List[float]] = {}  # by operation: how many, seconds of all, seconds of the longest

    def began(self, request: Request) -> None:
        self._tell(request, 0.0, "")

    def ended(self, request: Request, how: str) -> None:
        self._tell(request, request.wait.since if request.wait is not None else 0.0, how)

    def _tell(self, request: Request, since: float, how: str) -> None:
        self._queue.append((request, since, time.monotonic(), how))
        if not self._wake.is_set():
            if self._thread is None:  # most mounts of a test, or of a quick restore, never need it
                self._thread = threading.Thread(target=self._run, name="waits", daemon=True)
                self._thread.start()
            self._wake.set()

    def close(self) -> None:
        """Write what is known, for a bounded time."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSING)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            closing = self._closing.wait(_PAUSE)
            self._wake.clear()
            self._take_all()
            if closing:
                return

    def _take_all(self) -> None:
        # The clocks' distance now: a wait may have lasted through a change of the wall clock.
        to_epoch = time.time() - time.monotonic()
        lines, processes, called = [], Processes(), {0: ""}
        while self._queue:
            request, since, until, how = self._queue.popleft()
            if not how and self._detailed < IN_DETAIL:
                self._detailed += 1
                pid, command = processes.of(request.tid)
                if pid not in called:
                    called[pid] = command_line(pid)
                self._waiting[request.unique] = _Wait(self._place_of(request), (pid, command, called[pid]))
            elif how:
                lines += self._end(request, since + to_epoch, until + to_epoch, how)
        if self._sums and not self._waiting:
            sums = {name: {"count": int(one[0]), "seconds": one[1], "longest": one[2]}
                    for name, one in self._sums.items()}  # fmt: skip
            self._sums = {}
            lines.append(line("waits", {"operations": sums}))
        if lines:
            self._record.write(b"".join(lines))

    def _end(self, request: Request, since: float, until: float, how: str) -> List[bytes]:
        wait = self._waiting.pop(request.unique, None)
        operation = opcode_name(request.opcode)
        if wait is None:
            one = self._sums.setdefault(operation, [0, 0.0, 0.0])
            one[:] = one[0] + 1, one[1] + until - since, max(one[2], until - since)
            return []
        path, name = (None if one is None else os.fsdecode(one) for one in wait.place)
        pid, command, called = wait.process
        details: Dict[str, Any] = {
            "since": since, "operation": operation, "path": path, "name": name, "tid": request.tid, "pid": pid,
            "command": command, "command_line": called, "uid": request.uid, "how": how,
        }  # fmt: skip
        return [line("wait", details, until)]
