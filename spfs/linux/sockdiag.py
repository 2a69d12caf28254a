"""Unix sockets and where they are bound, as the kernel lists them per network namespace: sock_diag(7).

No file system is asked: the kernel has the inode of the path in the socket itself.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import Iterator, List, Tuple

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_ALL_STATES = 0xFFFFFFFF
_SHOW_VFS = 2
_VFS = 1  # attribute: inode and device number of the path
_BUFFER = 1 << 18

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBxxIIIII")
_MESSAGE = struct.Struct("=BBBxIII")
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True)
class BoundSocket:
    """A unix socket with a path: ``number`` as in its /proc link, and the 32 bits of the inode number it shows."""

    number: int
    device: int  # st_dev
    inode: int


def bound_sockets() -> List[BoundSocket]:
    """Those of the network namespace of the calling thread. An accepted socket has its listener's path. OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as link:
        body = _REQUEST.pack(socket.AF_UNIX, 0, _ALL_STATES, 0, _SHOW_VFS, 0, 0)
        link.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0) + body)
        found: List[BoundSocket] = []
        while True:
            for kind, message in _messages(link.recv(_BUFFER)):
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    (number,) = struct.unpack_from("=i", message)
                    raise OSError(-number, os.strerror(-number), "sock_diag")
                found += _bound(message)


def _messages(data: bytes) -> Iterator[Tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _bound(message: bytes) -> Iterator[BoundSocket]:
    _, _, _, number, _, _ = _MESSAGE.unpack_from(message)
    rest = message[_MESSAGE.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        if kind == _VFS:
            inode, device = struct.unpack_from("=II", rest, _ATTRIBUTE.size)
            # The kernel's own encoding: 12 bits for the major number, 20 for the minor one.
            yield BoundSocket(number, os.makedev(device >> 20, device & 0xFFFFF), inode)
        rest = rest[_aligned(length) :]


def _aligned(length: int) -> int:
    return -(-length // 4) * 4
