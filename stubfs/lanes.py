"""Threads that serve requests: one at a time per source, and another one as soon as that one is stuck.

A lane is a source of requests (the device; the held ones that are let go) with one thread, its owner, that fetches
and serves. When the owner has slept inside one request for a few milliseconds, the monitor makes another thread
the owner. So a request that hangs in the real file system never stops the others, and no hand-over costs the
usual case anything. A few idle threads are kept.

To look costs a busy mount about 20 microseconds, so the monitor does it often only while it finds somebody stuck: for a
second after each hand-over.

Where the CPUs are busy, an owner is mostly in the middle of a request, because it waits for a CPU. A second thread
would wait for the same, and for the interpreter besides; so an owner that does not sleep is left alone for longer.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Callable, List, Optional

from stubfs.credentials import ThreadIdentity
from stubfs.protocol import BUFFER_SIZE
from stubfs.request import Device, Request

_log = logging.getLogger(__name__)
# Seconds between two looks; an owner inside the same request at both counts as stuck.
_TICK = 0.004
_ALERT_TICK = 0.001
_ALERT = 1.0  # seconds for which a hand-over makes the monitor look more often
_PATIENCE = 0.1  # seconds for an owner inside the same request that runs or waits for a CPU
_IDLE = 0.02  # seconds without a request before the monitor sleeps
_SPARE_THREADS = 3  # per lane


class Worker:
    """What one serving thread has of its own. ``state`` is the one its request is served under, None between two."""

    def __init__(self, device: Device) -> None:
        self.buffer = memoryview(bytearray(BUFFER_SIZE))
        self.output = memoryview(bytearray(BUFFER_SIZE))
        self.read_request = Request(device, self.buffer)
        self.request: Request = self.read_request  # the one being served
        self.identity = ThreadIdentity()
        self.state: Optional[object] = None
        self.tid = 0  # of its thread
        self.count = 0  # requests begun
        self.busy = False
        self.wake = threading.Semaphore(0)

    def act_for(self, request: Request) -> None:
        """Take on the credentials of who has made the request. OSError as setgroups(2)."""
        identity = self.identity
        credentials = request.credentials
        if credentials is None:
            credentials = identity.of(request.uid, request.gid, request.tid)
        if credentials is not identity.current:
            identity.assume(credentials)

    def sleeps(self) -> bool:
        """Whether its thread waits for something else than a CPU (the state in /proc/PID/stat, proc(5))."""
        try:
            fd = os.open(f"/proc/self/task/{self.tid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            try:
                line = os.read(fd, 512)
            finally:
                os.close(fd)
        except OSError:
            return True
        return not line[line.rindex(b")") :].startswith(b") R")


class Monitor:
    """The thread that looks after stuck owners; sleeps while nothing is going on."""

    def __init__(self) -> None:
        self._lanes: List["Lane"] = []
        self._alert_until = 0.0  # monotonic
        self.asleep = False
        self._awake = threading.Semaphore(0)
        self._ended = False

    def watch(self, lane: "Lane") -> None:
        self._lanes.append(lane)

    def start(self) -> None:
        threading.Thread(target=self._run, name="monitor", daemon=True).start()

    def wake(self) -> None:
        if self.asleep:
            self.asleep = False
            self._awake.release()

    def end(self) -> None:
        self._ended = True
        self.wake()

    def alert(self) -> None:
        """Somebody was stuck: others may be soon."""
        self._alert_until = time.monotonic() + _ALERT

    def _run(self) -> None:
        active_at = time.monotonic()
        while not self._ended:
            active = False
            now = time.monotonic()
            for lane in self._lanes:
                active = lane.check(now) or active
            if active:
                active_at = now
            if now - active_at < _IDLE:
                time.sleep(_ALERT_TICK if now < self._alert_until else _TICK)  # an Event's wait() costs more
                continue
            self.asleep = True
            # An owner sets busy before it looks at asleep; so one of the two sees the other.
            if any(lane.is_busy() for lane in self._lanes) or self._ended:
                self.asleep = False
            else:
                self._awake.acquire()
            active_at = time.monotonic()


class Lane:
    """``fetch`` blocks for a worker's next request, None ends the lane. Neither it nor ``serve`` should raise: if one
    does, ``failed`` is called, which must end the mount. An error for its users, and not a wait without an end."""

    def __init__(
        self,
        name: str,
        device: Device,
        monitor: Monitor,
        fetch: Callable[[Worker], Optional[Request]],
        serve: Callable[[Worker, Request], None],
        failed: Callable[[], None],
    ) -> None:
        self.name = name
        self.workers: List[Worker] = []
        self._device = device
        self._monitor = monitor
        self._fetch = fetch
        self._serve = serve
        self._failed = failed
        self._lock = threading.Lock()
        self._spare: List[Worker] = []
        self._owner: Optional[Worker] = None
        self._seen = 0
        self._since = 0.0  # when the owner was first found inside its request; monotonic
        self._ended = False
        monitor.watch(self)

    def start(self) -> None:
        """Make a thread the owner. RuntimeError if there can be no more threads."""
        with self._lock:
            self._own()

    def _own(self) -> None:
        if self._spare:
            self._owner = self._spare.pop()
            self._owner.wake.release()
            return
        worker = Worker(self._device)
        thread = threading.Thread(
            target=self._run, args=(worker,), name=f"{self.name}-{len(self.workers)}", daemon=True
        )
        former, self._owner = self._owner, worker
        self.workers.append(worker)
        try:
            thread.start()
        except RuntimeError:
            self._owner = former
            self.workers.remove(worker)
            raise

    def is_busy(self) -> bool:
        owner = self._owner
        return owner is not None and owner.busy

    def stuck(self) -> List[Worker]:
        """Those inside a request that another thread has taken over from."""
        if len(self.workers) == 1:
            return []
        owner = self._owner
        return [worker for worker in self.workers if worker.busy and worker is not owner]

    def check(self, now: float) -> bool:
        """Replace an owner that has not got on since the last call. Whether there was anything going on.

        ``now``: monotonic.
        """
        owner = self._owner
        if owner is None:
            return False
        count, busy = owner.count, owner.busy
        if count != self._seen:
            self._seen, self._since = count, now
            return True
        if busy and not self._ended and (owner.sleeps() or now - self._since > _PATIENCE):
            with self._lock:
                # It may have got on while we looked.
                if owner is self._owner and owner.busy and owner.count == count:
                    try:
                        self._own()
                        self._seen, self._since = self._owner.count, now
                        self._monitor.alert()
                    except RuntimeError as error:
                        _log.error("cannot start another thread: %s; requests wait for the stuck one", error)
        return busy

    def _run(self, worker: Worker) -> None:
        worker.tid = threading.get_native_id()
        fetch, serve, monitor = self._fetch, self._serve, self._monitor
        try:
            while self._owner is worker or self._stand_by(worker):
                request = fetch(worker)
                if request is None:
                    break
                worker.request = request
                worker.count += 1
                worker.busy = True
                if monitor.asleep:
                    monitor.wake()
                serve(worker, request)
                worker.busy = False
        except Exception:
            _log.exception("the %s cannot go on", self.name)
            self._failed()
        finally:
            with self._lock:
                self.workers.remove(worker)

    def _stand_by(self, worker: Worker) -> bool:
        """Wait to become the owner; False: there are enough that wait, end this thread."""
        with self._lock:
            if self._owner is worker:
                return True
            if self._ended or len(self._spare) >= _SPARE_THREADS:
                return False
            self._spare.append(worker)
        worker.wake.acquire()
        return not self._ended

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for worker in self._spare:
                worker.wake.release()
            self._spare.clear()
