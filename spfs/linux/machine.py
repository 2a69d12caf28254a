"""This machine's processor type, and the numbers of its system calls."""

from __future__ import annotations

import mmap
import os
import struct
from typing import Dict, Optional

from spfs.linux.aarch64 import AARCH64
from spfs.linux.arch import Architecture
from spfs.linux.x86_64 import X86_64

_KNOWN: Dict[str, Architecture] = {one.machine: one for one in (X86_64, AARCH64)}


_HERE = _KNOWN.get(os.uname().machine, AARCH64)

EPOLL_EVENT = struct.Struct(_HERE.epoll_event)  # struct epoll_event


def current() -> Optional[Architecture]:
    """This machine's architecture; None if there is no code for it, or if its pages are not of 4096 bytes."""
    return _KNOWN.get(os.uname().machine) if mmap.PAGESIZE == 4096 else None


def call_numbers() -> Dict[str, int]:
    """The system call numbers of this machine, also where there is no code to inject (then those of the table that new
    architectures have, include/uapi/asm-generic/unistd.h)."""
    return _HERE.calls
