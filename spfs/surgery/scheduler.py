"""Drives many scripts of tracees at once and waits for stops and messages, every wait bounded.

Owned by the thread that seizes; that thread must have SIGCHLD blocked (``spfs.surgery.theatre``).
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from typing import Callable, Dict, Iterable, Optional, Set

from spfs.linux import process, ptrace
from spfs.tracee import Script, Tracee, Wait

_SLICE = 0.01  # seconds; a SIGCHLD that another thread took, or a death that sends none, is noticed this late


class Bell:
    """Rings when a tracee may have stopped, or one of the sockets has something to read."""

    def __init__(self) -> None:
        self._signals = process.signalfd([signal.SIGCHLD])

    def close(self) -> None:
        os.close(self._signals)

    def wait(self, sockets: Iterable[int], deadline: float) -> Set[int]:
        """Until something happened, a slice is over, or ``deadline`` (time.monotonic()) has come.

        The sockets that are readable; the set holds -1 if a signal came. Empty: nothing happened.
        """
        poller = select.poll()
        poller.register(self._signals, select.POLLIN)
        for fd in sockets:
            poller.register(fd, select.POLLIN)
        left = min(_SLICE, max(0.0, deadline - time.monotonic()))
        ready = {fd for fd, _ in poller.poll(1000 * left)}
        if self._signals in ready:
            ready.remove(self._signals)
            ready.add(-1)
            try:
                os.read(self._signals, 128)
            except BlockingIOError:
                pass
        return ready


def has_ended(tid: int) -> bool:
    try:
        with open(f"/proc/{tid}/stat", "rb") as file:
            data = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return data[data.rindex(b")") + 2 : data.rindex(b")") + 3] in (b"Z", b"X")


def run(
    scripts: Dict[Tracee, Script], bell: Bell, timeout: float, failed: Callable[[Tracee, OSError], None]
) -> None:
    """Run the scripts to their ends. An OSError out of one goes to ``failed``, also ESRCH for a tracee that ended
    and ETIMEDOUT for one that did not get on for ``timeout`` seconds."""
    waiting: Dict[Tracee, Wait] = {}

    def advance(tracee: Tracee, error: Optional[OSError] = None) -> None:
        script = scripts[tracee]
        try:
            waiting[tracee] = script.throw(error) if error is not None else next(script)
        except StopIteration:
            waiting.pop(tracee, None)
        except OSError as problem:
            waiting.pop(tracee, None)
            failed(tracee, problem)

    for tracee in scripts:
        advance(tracee)
    deadline = time.monotonic() + timeout
    ready: Set[int] = set()
    while waiting:
        progress = False
        for tracee, wait in list(waiting.items()):
            stop = ptrace.poll_stop(tracee.tid)
            if stop is None:
                if wait is Wait.MESSAGE and tracee.socket is not None and tracee.socket.fileno() in ready:
                    progress = True
                    advance(tracee)
                continue
            progress = True
            tracee.stop = stop
            if wait is Wait.STOP:
                advance(tracee)
                continue
            try:
                tracee.absorb()
            except OSError as error:
                advance(tracee, error)
        ready = set()
        if progress:
            deadline = time.monotonic() + timeout
            continue
        sockets = [t.socket.fileno() for t, w in waiting.items() if w is Wait.MESSAGE and t.socket is not None]
        ready = bell.wait(sockets, deadline)
        if ready:
            continue
        for tracee in list(waiting):
            if has_ended(tracee.tid):
                advance(tracee, ProcessLookupError(errno.ESRCH, "the process ended", str(tracee.pid)))
            elif time.monotonic() > deadline:
                advance(tracee, TimeoutError(errno.ETIMEDOUT, "the process did not get on", str(tracee.pid)))
