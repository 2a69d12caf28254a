"""Unix sockets and where they are bound, as the kernel lists them per network namespace: sock_diag(7).

No file system is asked: the kernel has the inode of the path in the socket itself.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import Dict, Iterator, List, Tuple

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_ALL_STATES = 0xFFFFFFFF
_SHOW = 0x2 | 0x4 | 0x10  # UDIAG_SHOW_VFS, _PEER, _RQLEN
_VFS, _PEER, _QUEUES, _SHUTDOWN = 1, 2, 4, 6  # attributes, linux/unix_diag.h
_BUFFER = 1 << 18

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBxxIIIII")
_MESSAGE = struct.Struct("=BBBxIII")
_ATTRIBUTE = struct.Struct("=HH")


LISTENING = 10  # TCP_LISTEN
ESTABLISHED = 1


@dataclass(frozen=True)
class UnixSocket:
    """A unix socket: ``number`` as in its /proc link, and the 32 bits of the inode number that are told of its path."""

    number: int
    type: int  # SOCK_STREAM …
    state: int
    device: int = 0  # st_dev of the path it is bound to; 0: to none
    inode: int = 0
    peer: int = 0  # the number of the socket it is connected to
    queued: int = 0  # messages or bytes that were not read; of a listening one, connections that were not accepted
    limit: int = 0  # of a listening one, its backlog
    shutdown: int = 0  # 1: nothing more can be received, 2: sent; 3: both


def unix_sockets() -> List[UnixSocket]:
    """Those of the network namespace of the calling thread. An accepted socket has its listener's path. OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as link:
        body = _REQUEST.pack(socket.AF_UNIX, 0, _ALL_STATES, 0, _SHOW, 0, 0)
        link.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0) + body)
        found: List[UnixSocket] = []
        while True:
            for kind, message in _messages(link.recv(_BUFFER)):
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    (number,) = struct.unpack_from("=i", message)
                    raise OSError(-number, os.strerror(-number), "sock_diag")
                found.append(_parsed(message))


def _messages(data: bytes) -> Iterator[Tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _parsed(message: bytes) -> UnixSocket:
    _, kind, state, number, _, _ = _MESSAGE.unpack_from(message)
    values: Dict[str, int] = {}
    rest = message[_MESSAGE.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, attribute = _ATTRIBUTE.unpack_from(rest)
        if attribute == _VFS:
            values["inode"], device = struct.unpack_from("=II", rest, _ATTRIBUTE.size)
            # The kernel's own encoding: 12 bits for the major number, 20 for the minor one.
            values["device"] = os.makedev(device >> 20, device & 0xFFFFF)
        elif attribute == _PEER:
            (values["peer"],) = struct.unpack_from("=I", rest, _ATTRIBUTE.size)
        elif attribute == _QUEUES:
            values["queued"], values["limit"] = struct.unpack_from("=II", rest, _ATTRIBUTE.size)
        elif attribute == _SHUTDOWN:
            values["shutdown"] = rest[_ATTRIBUTE.size]
        rest = rest[_aligned(length) :]
    return UnixSocket(number, kind, state, **values)


def _aligned(length: int) -> int:
    return -(-length // 4) * 4
