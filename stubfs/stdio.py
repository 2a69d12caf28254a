"""The standard descriptors of a daemon: open from the start, nobody's terminal in the end, and never waited for."""

from __future__ import annotations

import logging
import os
import select


def open_missing() -> None:
    """Open on /dev/null those that the caller has closed. First of all: whatever is opened earlier would get their
    numbers, and be taken for standard output later on."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one


def let_go(output: int = -1) -> None:
    """Standard input becomes empty; output and error go to ``output``, which stays the caller's (-1: nowhere)."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for fd in (1, 2):
        os.dup2(null if output < 0 else output, fd)
    os.close(null)


class PatientHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Logs to standard error. What nobody takes from there (a full pipe, a stopped terminal) is dropped: whoever logs
    must not wait for whoever reads."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is None:
            return  # Python found no standard error when it started
        poll = select.poll()
        poll.register(self.stream, select.POLLOUT)
        if poll.poll(0):
            super().emit(record)
