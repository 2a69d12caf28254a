"""prctl(2): the few settings of the calling process that the controller side needs."""

from __future__ import annotations

import ctypes

from stubfs.libc import bind

_PR_SET_CHILD_SUBREAPER = 36

_prctl = bind("prctl", ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def set_child_subreaper(on: bool = True) -> None:
    """Descendants whose parent has ended become our children, and their ends ours to wait for. Not inherited."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)
