"""The standard descriptors of a daemon: open from the start, and nobody's terminal in the end."""

from __future__ import annotations

import os


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
