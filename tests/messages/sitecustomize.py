"""Which messages a test run has met: loaded by every Python of the run whose PYTHONPATH has this directory.

The place of each error that is made goes to the file that $SPFS_MESSAGES names, as ``file:line``.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Set


def _record(path: str) -> None:
    try:
        from stubfs import errors
    except ImportError:
        return  # some other program's Python
    top = os.path.dirname(os.path.dirname(os.path.abspath(errors.__file__)))
    met: Set[str] = set()
    make = errors.StubfsError.__init__

    def init(self: errors.StubfsError, *arguments: Any, **keywords: Any) -> None:
        make(self, *arguments, **keywords)
        frame = sys._getframe(1)
        place = f"{os.path.relpath(frame.f_code.co_filename, top)}:{frame.f_lineno}"
        if place not in met:
            met.add(place)
            _note(path, place)

    errors.StubfsError.__init__ = init  # type: ignore[method-assign]


def _note(path: str, place: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError:
        return  # full, out of descriptors, another root: what a test provokes must not look different with us
    try:
        os.write(fd, f"{place}\n".encode())
    finally:
        os.close(fd)


if os.environ.get("SPFS_MESSAGES"):
    _record(os.environ["SPFS_MESSAGES"])
