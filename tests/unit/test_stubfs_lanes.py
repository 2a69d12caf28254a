"""When a lane gets another owner: real threads, the monitor's looks made by hand."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from typing import Callable, Iterator, List, Optional

import pytest

from stubfs import lanes
from stubfs.lanes import Lane, Monitor, Worker
from stubfs.request import Device, Request

_LIMIT = 10.0  # seconds for what takes a moment


class Served:
    """A lane whose requests are functions that its owner calls."""

    def __init__(self) -> None:
        self.actions: "queue.Queue[Optional[Callable[[], object]]]" = queue.Queue()
        self.by: List[int] = []
        self.failed = threading.Event()
        self.lane = Lane("test", Device(-1), Monitor(), self._fetch, self._serve, self.failed.set)
        self._action: Callable[[], object] = lambda: None

    def _fetch(self, worker: Worker) -> Optional[Request]:
        action = self.actions.get()
        if action is None:
            return None
        self._action = action
        return worker.read_request

    def _serve(self, worker: Worker, request: Request) -> None:
        self.by.append(worker.tid)
        self._action()


@pytest.fixture
def served() -> Iterator[Served]:
    result = Served()
    result.lane.start()
    yield result
    result.lane.end()
    deadline = time.monotonic() + _LIMIT
    while result.lane.workers:
        result.actions.put(None)
        assert time.monotonic() < deadline, "a thread of the lane does not end"
        time.sleep(0.001)
    assert not result.failed.is_set()


def _begin(served: Served, action: Callable[[], object]) -> Worker:
    """Have the owner begin with ``action``; a first look has seen it there."""
    begun = threading.Event()

    def act() -> None:
        begun.set()
        action()

    served.actions.put(act)
    assert begun.wait(_LIMIT)
    (worker,) = served.lane.workers
    served.lane.check(time.monotonic())
    return worker


def test_an_owner_that_sleeps_is_replaced_and_stands_by_afterwards(served: Served) -> None:
    go_on = threading.Event()
    worker = _begin(served, lambda: go_on.wait(_LIMIT))
    deadline = time.monotonic() + _LIMIT
    while not worker.sleeps():
        assert time.monotonic() < deadline
    served.lane.check(time.monotonic())
    assert len(served.lane.workers) == 2
    other = threading.Event()
    served.actions.put(other.set)
    assert other.wait(_LIMIT), "a request behind the stuck one is not served"
    assert served.by == [worker.tid, served.lane.workers[1].tid] and len(set(served.by)) == 2
    go_on.set()


def test_an_owner_that_runs_is_left_alone(served: Served) -> None:
    # Without the interpreter's lock, so that it truly runs, or waits for a CPU, while it is looked at.
    worker = _begin(served, lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000))
    deadline = time.monotonic() + _LIMIT
    while worker.sleeps():  # it waits for the lock that it is about to give up
        assert time.monotonic() < deadline
    seen = []
    for _ in range(3):
        served.lane.check(time.monotonic())
        seen.append(worker.busy)
    assert seen[0], "the computation is too short for this machine"
    assert len(served.lane.workers) == 1


def test_an_owner_that_runs_for_too_long_is_replaced(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "sleeps", lambda worker: False)
    go_on = threading.Event()
    _begin(served, lambda: go_on.wait(_LIMIT))
    since = served.lane._since
    served.lane.check(since + lanes._PATIENCE)
    assert len(served.lane.workers) == 1
    served.lane.check(since + lanes._PATIENCE + 0.001)
    assert len(served.lane.workers) == 2
    go_on.set()
