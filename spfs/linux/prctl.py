"""prctl(2): the few settings of the calling process that the controller side needs."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import List, Sequence

from stubfs.libc import bind

_PR_SET_NAME = 15
_PR_SET_MM, _PR_SET_MM_ARG_START, _PR_SET_MM_ARG_END = 35, 8, 9
_PR_SET_CHILD_SUBREAPER = 36

_prctl = bind("prctl", ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def set_child_subreaper(on: bool = True) -> None:
    """Descendants whose parent has ended become our children, and their ends ours to wait for. Not inherited."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def set_name(name: str) -> None:
    """Of the calling thread, as /proc/PID/comm shows it; the kernel cuts it to 15 bytes."""
    text = ctypes.create_string_buffer(os.fsencode(name))
    _prctl(_PR_SET_NAME, ctypes.addressof(text), 0, 0, 0)


_shown: List[mmap.mmap] = []  # memory that must stay where it is: the kernel reads it whenever somebody looks


def set_command_line(words: Sequence[str]) -> None:
    """What /proc/PID/cmdline shows. PermissionError without CAP_SYS_RESOURCE."""
    data = b"".join(os.fsencode(word) + b"\0" for word in words)
    memory = mmap.mmap(-1, len(data), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(data)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # The start first: mappings are below the stack, where the end still is, and a start behind its end is refused.
    _prctl(_PR_SET_MM, _PR_SET_MM_ARG_START, address, 0, 0)
    _shown.append(memory)
    _prctl(_PR_SET_MM, _PR_SET_MM_ARG_END, address + len(data), 0, 0)
