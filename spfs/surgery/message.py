"""Receiving descriptors, as a part of a table of calls: a message's headers in the tracee's memory."""

from __future__ import annotations

import struct
from typing import List, Tuple

from spfs.linux.arch import LOAD_ARGUMENT_0
from spfs.linux.calls import CallTable
from spfs.tracee import SOCKET

_MSG_CMSG_CLOEXEC = 0x40000000
_CONTROL = 128  # offset of the control data, behind msghdr, iovec and the byte received
_HEADER = 16  # bytes of struct cmsghdr


def size(count: int) -> int:
    """Bytes that a message of ``count`` descriptors takes."""
    return _CONTROL + (_HEADER + 4 * count + 63) // 64 * 64


def receive(calls: CallTable, base: int, address: int, count: int) -> Tuple[bytes, List[int]]:
    """Add the recvmsg call for ``count`` descriptors with its data at ``address``: the data, and where in memory
    each descriptor will be found. One that does not come is -1, which no call takes for a descriptor."""
    control = address + _CONTROL
    length = (_HEADER + 4 * count + 7) & ~7
    data = struct.pack("<QIxxxxQQQQI", 0, 0, address + 64, 1, control, length, 0)
    data = data.ljust(64, b"\0") + struct.pack("<QQ", address + 80, 1)
    data = data.ljust(_CONTROL, b"\0") + bytes(_HEADER) + b"\xff" * (4 * count)
    calls.add("recvmsg", base + SOCKET, address, _MSG_CMSG_CLOEXEC, load=LOAD_ARGUMENT_0)
    slots = [control + _HEADER + 4 * index for index in range(count)]
    return data.ljust(size(count), b"\0"), slots
