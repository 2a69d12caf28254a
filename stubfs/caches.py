"""Dropping what the kernel has cached of files, without waiting for ourselves.

An invalidation waits for pages that a request under way has locked. While it runs, READs and WRITEs are held; so it
spares the ranges they have locked (such pages hold nothing old), and where one slipped in, that one is answered
under the old state and the file is gone through again. Runs in threads that serve no requests.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable, Iterator, List, Sequence, Tuple

from stubfs.held import HeldTable
from stubfs.request import Device, Request

_log = logging.getLogger(__name__)
_PAGE = 4096
_STUCK = 0.002  # seconds inside one invalidation after which something is taken to stand in its way
_LIMIT = 5.0  # seconds for all of it: write-back to a real file system that hangs must not stop a change for good
_ROUNDS = 50  # per file


def spared(ranges: Sequence[Tuple[int, int]]) -> Iterator[Tuple[int, int]]:
    """(offset, length) of the parts outside the page-aligned ``ranges`` (offset, size); length 0: to the end."""
    position = 0
    for offset, size in sorted(ranges):
        start, end = offset // _PAGE * _PAGE, -(-(offset + size) // _PAGE) * _PAGE
        if start > position:
            yield position, start - position
        position = max(position, end)
    yield position, 0


class _Pass(threading.Thread):
    def __init__(self, device: Device, held: HeldTable, nodes: List[int]) -> None:
        super().__init__(name="invalidation", daemon=True)
        self._device = device
        self._held = held
        self._nodes = nodes
        self.node = 0
        self.step = 0  # invalidations begun
        self.again = False  # something was answered under the old state: go through the file again
        self.stop = False
        self.failed = False
        self.done = threading.Event()

    def run(self) -> None:
        try:
            for self.node in self._nodes:
                for _ in range(_ROUNDS):
                    self.again = False
                    for offset, length in spared(self._held.data_ranges(self.node)):
                        self.step += 1
                        self._device.invalidate(self.node, offset, length)
                    if not self.again:
                        break
                if self.stop:
                    break
        except OSError as error:
            self.failed = True
            _log.error("cannot drop the cached pages of node %d: %s", self.node, error)
        finally:
            self.done.set()


def drop(device: Device, held: HeldTable, nodes: List[int], serve: Callable[[Request], None]) -> bool:
    """Drop the pages of ``nodes``; False: not all of them. ``serve`` answers a held request that is in the way."""
    work = _Pass(device, held, nodes)
    work.start()
    deadline = time.monotonic() + _LIMIT
    step = -1
    while not work.done.wait(_STUCK):
        if work.step != step:
            step = work.step
            continue
        if time.monotonic() > deadline:
            work.stop = True
            _log.warning("the kernel's cached pages of node %d cannot be written back or dropped", work.node)
            return False
        requests = held.take_data(work.node)
        if requests:
            work.again = True
            helper = threading.Thread(target=_serve_all, args=(serve, requests), name="invalidation", daemon=True)
            helper.start()
            helper.join(max(0.0, deadline - time.monotonic()))
    return not work.failed


def _serve_all(serve: Callable[[Request], None], requests: List[Request]) -> None:
    for request in requests:
        serve(request)
