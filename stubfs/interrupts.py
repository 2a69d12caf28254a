"""Which waits end early: those of processes that a signal ends, as on a hard NFS mount.

The kernel announces the first signal to a waiting thread, whatever it is, and never another one. Fake signals of
the freezer and of ptrace, handled signals and job control must not be seen by the caller as EINTR. So who was
interrupted and goes on waiting is looked at again from time to time.

READs it does not announce at all: it sends them in the background, and who dies while it waits for a page leaves its
READ behind. So we look whether the readers are still there. And a signal that is fatal does not end such a wait if it
dumps core, or if there was another one before it (complete_signal() marks nobody with SIGKILL then). So we look at
their signals, too: a READ that fails brings the reader to ask for the page once more, in the foreground, where the
signal is announced.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Callable, Dict, Iterator, Tuple

_PERIOD = 0.25  # seconds between two looks
_MOST = 0.005  # share of a CPU's time that may go into looks at readers, and again into those at their signals
_BUDGET = 0.05  # seconds that one look may take; the rest has its turn at the next one
_IGNORED_BY_DEFAULT = (
    signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH,
    signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
)  # fmt: skip


def _bit(number: int) -> int:
    return 1 << (number - 1)


_HARMLESS = sum(_bit(number) for number in _IGNORED_BY_DEFAULT)
_KILL = _bit(signal.SIGKILL)


def is_fatal(status: bytes) -> bool:
    """Whether the thread with this /proc/TID/status is to die of a signal it has pending.

    The kernel marks a thread that dies of any signal without a core dump with SIGKILL (complete_signal() in
    kernel/signal.c). One that dumps core stays pending itself until it is delivered, which the wait prevents.
    """
    # Thousands are looked at in one sweep. The five lines follow one another (task_sig() in fs/proc/array.c).
    words = status[status.index(b"\nSigPnd:") :].split(None, 10)
    own, shared, blocked, ignored, caught = (int(word, 16) for word in words[1:10:2])
    pending = own | shared
    if pending & _KILL:
        return True
    if b"\nTracerPid:\t0\n" not in status:
        return False  # its tracer decides what becomes of the signal
    return bool(pending & ~(blocked | ignored | caught | _HARMLESS))


def is_dying(tid: int) -> bool:
    """Whether the waiting thread must be let go. Who cannot be seen (of another pid namespace) must, to be safe."""
    if not tid:
        return True
    try:
        with open(f"/proc/{tid}/status", "rb") as status:
            return is_fatal(status.read())
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return True


class Interrupts:
    """Decides on each INTERRUPT, at once and again later. ``end_wait`` answers a request with EINTR.

    ``still_waits`` tells whether a request is unanswered. Both are called with the request's unique number.
    ``readers`` gives the held READs as unique -> thread id.
    """

    def __init__(
        self, still_waits: Callable[[int], bool], end_wait: Callable[[int], None],
        readers: Callable[[], Dict[int, int]],
    ) -> None:  # fmt: skip
        self._still_waits = still_waits
        self._end_wait = end_wait
        self._readers = readers
        self._has_readers = False
        self._round: Iterator[Tuple[int, int]] = iter(())  # of the readers, those whose signals are to be looked at
        self._ignored: Dict[int, int] = {}
        self._some = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._sweep, name="interrupts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def interrupt(self, unique: int, tid: int) -> None:
        """The caller ``tid`` of the waiting request ``unique`` has got some signal."""
        if is_dying(tid):
            self._end_wait(unique)
            if not self._still_waits(unique):
                return
        self._ignored[unique] = tid
        self._some.set()

    def look_after_reads(self) -> None:
        """A READ is held now."""
        if not self._has_readers:
            self._has_readers = True
            self._some.set()

    def _sweep(self) -> None:
        pause = threading.Event()
        readers_due = 0.0
        while not self._ended:
            if not self._ignored and not self._has_readers:
                self._some.clear()
                if not self._ignored and not self._has_readers:  # again: one may have come before clear()
                    self._some.wait()
                continue
            pause.wait(_PERIOD)
            self.look()
            if self._has_readers:
                self.look_at_signals_of_readers()
            if self._has_readers and time.monotonic() >= readers_due:
                cost = -time.thread_time()
                self._has_readers = False  # before the look: whoever comes during it sets it again
                self._has_readers = self.look_at_readers() or self._has_readers
                cost += time.thread_time()
                readers_due = time.monotonic() + cost / _MOST

    def look_at_readers(self) -> bool:
        """End the READs of those that are gone. Whether there are others."""
        readers = self._readers()
        for unique, tid in readers.items():
            try:
                if tid:
                    os.kill(tid, 0)  # a tenth of what a look into /proc costs
            except ProcessLookupError:
                self._end_wait(unique)
            except OSError:
                pass  # somebody else's: it is there
        return bool(readers)

    def look_at_signals_of_readers(self) -> None:
        """Go on with the round, for a bounded time, and end the READs of those that are to die."""
        deadline = time.monotonic() + _PERIOD * _MOST
        for unique, tid in self._round:
            if tid and is_dying(tid):
                self._end_wait(unique)
            if time.monotonic() > deadline:
                return
        self._round = iter(self._readers().items())

    def look(self) -> None:
        """One bounded look at those that were interrupted and wait on."""
        deadline = time.monotonic() + _BUDGET
        for unique, tid in list(self._ignored.items()):
            if not self._still_waits(unique):
                self._ignored.pop(unique, None)
                continue
            if is_dying(tid):
                self._end_wait(unique)
            # To the end of the order, so that the next look begins with those not seen now. One that was looked at by
            # a mode change while it was ended may be held all the same: the next look finds it.
            self._ignored[unique] = self._ignored.pop(unique, tid)
            if time.monotonic() > deadline:
                break

    def end(self) -> None:
        self._ended = True
        self._some.set()
