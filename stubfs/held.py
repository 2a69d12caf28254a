"""The ordered table of the requests that wait: as the bytes they came in, without a thread each.

A request waits under the state it was held in. When another state is in force, those of former ones are handed out
again, the oldest first and one caller's in order, to be looked at anew. Besides they leave by a fatal signal to
whoever waits, at the end of their time, or at the end of the session.
"""

from __future__ import annotations

import errno
import heapq
import threading
import time
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Optional, OrderedDict, Set, Tuple

from stubfs.protocol import BODY, READ_IN, Opcode
from stubfs.request import Request
from stubfs.rules import HOLD, Action, ActiveRule, Matcher, PathsOf, Treatment

if TYPE_CHECKING:
    from stubfs.waits import WaitRecorder

_DATA = frozenset((Opcode.READ, Opcode.WRITE))


class Wait:
    """How one request waits. Its table alone changes it."""

    __slots__ = ("since", "state", "rule", "deadline", "passed")

    def __init__(self, now: float) -> None:
        self.since = now  # monotonic, as the deadline
        self.state: object = None  # the one in force when it was held
        self.rule: Optional[ActiveRule] = None  # which made it wait, if not the mode
        self.deadline: Optional[float] = None
        self.passed: Tuple[ActiveRule, ...] = ()  # those that have delayed it, long enough


class Watch:
    """Counts the held requests that a filter means; ``on_enough`` is called, under the table's lock, when there are
    ``wanted`` of them, and at the end of the session."""

    def __init__(self, matcher: Matcher, paths_of: PathsOf, wanted: int, on_enough: Callable[[], None]) -> None:
        self._matcher = matcher
        self._paths_of = paths_of
        self._wanted = wanted
        self._on_enough = on_enough
        self.found: Set[int] = set()  # uniques
        self.enough = False

    def entered(self, request: Request) -> None:
        if self._matcher.matches(request, self._paths_of):
            self.found.add(request.unique)
        self.check()

    def check(self) -> None:
        if len(self.found) >= self._wanted and not self.enough:
            self.enough = True
            self._on_enough()

    def ended(self) -> None:
        self._on_enough()


class HeldTable:
    """``paths_of`` is for watches, which may be for a path. ``recorder``, if there is one, is told of each wait; it
    must not block."""

    def __init__(self, paths_of: PathsOf = lambda request: ()) -> None:
        self.recorder: Optional["WaitRecorder"] = None
        self._paths_of = paths_of
        self._lock = threading.Lock()
        self._may_leave = threading.Condition(self._lock)
        self._waiting: "OrderedDict[int, Request]" = OrderedDict()
        self._readers: Dict[int, int] = {}  # unique -> thread id, of the READs that wait
        self._leaving: "OrderedDict[int, Request]" = OrderedDict()  # to be handed out
        self._state: object = None
        self._reconsidering = True  # former states' requests are handed out
        self._ended = False
        self._being_served: Set[int] = set()  # thread ids
        self._handed_out: Dict[int, Request] = {}  # unique -> what next() gave and served() has not been called for
        self._watches: List[Watch] = []
        self._deadlines: List[Tuple[float, int]] = []  # a heap of (monotonic, unique); of those that left, too
        self._time_has_come = threading.Condition(self._lock)
        self._timer: Optional[threading.Thread] = None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._leaving)

    def __contains__(self, unique: int) -> bool:
        return unique in self._waiting or unique in self._leaving

    def add(self, request: Request, state: object, treatment: Treatment = HOLD) -> None:
        """Keep ``request``, which must be a copy of its own: held or delayed under ``state``."""
        now = time.monotonic()
        with self._lock:
            if self._ended:
                request.fail(errno.EIO)
                return
            wait = request.wait
            if wait is None:
                wait = request.wait = Wait(now)
                if self.recorder is not None:
                    self.recorder.began(request)
            rule = treatment.rule
            if rule is not wait.rule:
                wait.rule, wait.deadline = rule, None
                if rule is not None and rule.seconds is not None:
                    # Held for at most so long since it came; delayed for so long from now on, after other delays.
                    wait.deadline = (now if rule.action is Action.DELAY else wait.since) + rule.seconds
            wait.state = state
            if state is not self._state and self._reconsidering:
                # The state has changed since somebody looked at it.
                self._leaving[request.unique] = request
                self._may_leave.notify()
                return
            self._waiting[request.unique] = request
            if request.opcode == Opcode.READ:
                self._readers[request.unique] = request.tid
            if wait.deadline is not None:
                heapq.heappush(self._deadlines, (wait.deadline, request.unique))
                if self._deadlines[0][1] == request.unique:
                    self._time_has_come.notify()
            for watch in self._watches:
                watch.entered(request)

    def take(self, unique: int) -> Optional[Request]:
        """The request, out of the table: who takes it answers it, as its caller is to die."""
        with self._lock:
            request = self._remove(unique) or self._leaving.pop(unique, None)
            if request is not None:
                self._ended_wait(request, "interrupted")
            return request

    def _ended_wait(self, request: Request, how: str) -> None:
        if self.recorder is not None:
            self.recorder.ended(request, how)

    def _remove(self, unique: int) -> Optional[Request]:
        request = self._waiting.pop(unique, None)
        if request is not None:
            self._readers.pop(unique, None)
            for watch in self._watches:
                watch.found.discard(unique)
        return request

    def caller(self, unique: int) -> Optional[int]:
        """The thread id of a request's caller, held or handed out; None if the request is neither."""
        with self._lock:
            request = self._waiting.get(unique) or self._leaving.get(unique) or self._handed_out.get(unique)
        return request.tid if request is not None else None

    # --- leaving

    def enter(self, state: object) -> None:
        """``state`` is about to be in force: what is held stays, and nothing leaves before reconsider()."""
        with self._lock:
            self._state = state
            self._reconsidering = False
            if self._leaving:
                everything = sorted([*self._leaving.values(), *self._waiting.values()], key=_since)
                self._leaving.clear()
                self._waiting.clear()
                self._readers.update((item.unique, item.tid) for item in everything if item.opcode == Opcode.READ)
                self._waiting.update((request.unique, request) for request in everything)

    def reconsider(self) -> None:
        """Hand out those that were not held under the state in force, and all that are to come."""
        with self._lock:
            self._reconsidering = True
            former = [request for request in self._waiting.values() if _state(request) is not self._state]
            for request in former:
                self._remove(request.unique)
                self._leaving[request.unique] = request
            # Without those of requests that have left: they may be far in the future, and many.
            limits = ((request.wait.deadline, unique) for unique, request in self._waiting.items() if request.wait)
            self._deadlines = [(deadline, unique) for deadline, unique in limits if deadline is not None]
            heapq.heapify(self._deadlines)
            self._may_leave.notify_all()

    def next(self) -> Optional[Request]:
        """Wait until requests may leave, and take the oldest; None at the end of the session.

        A caller's next request is not handed out before served() was called for its former one.
        """
        with self._lock:
            while not self._ended:
                request = self._oldest()
                if request is not None:
                    return request
                self._may_leave.wait()
            return None

    def _oldest(self) -> Optional[Request]:
        for unique, request in self._leaving.items():
            if request.tid not in self._being_served:
                del self._leaving[unique]
                self._handed_out[unique] = request
                if request.tid:  # 0: nobody in particular; their order means nothing
                    self._being_served.add(request.tid)
                return request
        return None

    def served(self, request: Request) -> None:
        with self._lock:
            self._being_served.discard(request.tid)
            self._handed_out.pop(request.unique, None)
            if request.unique not in self:  # else it waits on, for something else
                self._ended_wait(request, "answered")
            if self._leaving:
                self._may_leave.notify()

    # --- time

    def keep_time(self) -> None:
        """Make ready for rules with a time limit. RuntimeError if there can be no thread for it."""
        if self._timer is None:
            timer = threading.Thread(target=self._watch_time, name="time limits", daemon=True)
            timer.start()
            self._timer = timer

    def _watch_time(self) -> None:
        with self._lock:
            while not self._ended:
                now = time.monotonic()
                if not self._deadlines:
                    self._time_has_come.wait()
                elif self._deadlines[0][0] > now:
                    self._time_has_come.wait(self._deadlines[0][0] - now)
                else:
                    self._end_time(*heapq.heappop(self._deadlines))

    def _end_time(self, deadline: float, unique: int) -> None:
        request = self._waiting.get(unique)
        wait = request.wait if request is not None else None
        if request is None or wait is None or wait.rule is None or wait.deadline != deadline:
            return  # it has left, or waits for something else by now
        self._remove(unique)
        if wait.rule.action is Action.DELAY:
            wait.passed, wait.rule = (*wait.passed, wait.rule), None
            self._leaving[unique] = request
            self._may_leave.notify()
        else:
            self._ended_wait(request, "timed out")
            request.fail(wait.rule.errno)

    # --- looking

    def _data_requests(self, node: int) -> Iterator[Request]:
        for table in (self._waiting, self._leaving):
            for request in table.values():
                if request.node == node and request.opcode in _DATA:
                    yield request

    def data_ranges(self, node: int) -> List[Tuple[int, int]]:
        """(offset, size) of the held READs and WRITEs of a node: what they lock in the page cache."""
        with self._lock:
            # WRITE_IN begins alike.
            return [READ_IN.unpack_from(request.buffer, BODY)[1:3] for request in self._data_requests(node)]

    def take_data(self, node: int) -> List[Request]:
        """As take(), the READs and WRITEs of a node; not those that a rule holds."""
        with self._lock:
            requests = [item for item in self._data_requests(node) if item.wait is None or item.wait.rule is None]
            for request in requests:
                self._leaving.pop(request.unique, None)
                self._remove(request.unique)
                self._ended_wait(request, "answered")
            return requests

    def readers(self) -> Dict[int, int]:
        """unique -> thread id of the READs that wait."""
        with self._lock:
            return dict(self._readers)

    def snapshot(self) -> List[Tuple[Request, float]]:
        """(request, seconds it has been waiting), the oldest first."""
        with self._lock:
            requests = [*self._leaving.values(), *self._waiting.values()]
        now = time.monotonic()
        return [(request, now - _since(request)) for request in sorted(requests, key=_since)]

    def watch(self, matcher: Matcher, wanted: int, on_enough: Callable[[], None]) -> Watch:
        """Begin to count those that wait now and from now on, until unwatch()."""
        watch = Watch(matcher, self._paths_of, wanted, on_enough)
        with self._lock:
            for request in self._waiting.values():
                watch.entered(request)
            watch.check()
            self._watches.append(watch)
            if self._ended:
                watch.ended()
        return watch

    def unwatch(self, watch: Watch) -> None:
        with self._lock:
            self._watches.remove(watch)

    def has_ended(self) -> bool:
        return self._ended

    def end(self) -> None:
        """Answer everything with EIO, now and from now on; next() ends."""
        with self._lock:
            self._ended = True
            requests = [*self._leaving.values(), *self._waiting.values()]
            for request in requests:
                self._ended_wait(request, "failed")
            self._leaving.clear()
            self._waiting.clear()
            self._readers.clear()
            self._may_leave.notify_all()
            self._time_has_come.notify_all()
            for watch in self._watches:
                watch.ended()
        for request in requests:
            request.fail(errno.EIO)


def _since(request: Request) -> float:
    return request.wait.since if request.wait is not None else 0.0


def _state(request: Request) -> object:
    return request.wait.state if request.wait is not None else None
