"""What the ``socket`` module cannot do: options longer than 1024 bytes, or of a length that is no length; peeking by
whole buffers."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct

from stubfs.libc import bind

SO_GET_FILTER, SO_PEERSEC, SO_PEERGROUPS = 26, 31, 59

_NOWHERE = 8  # an address in the first page, which nobody can have mapped

_getsockopt = bind(
    "getsockopt", *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p), restype=ctypes.c_int
)
_recvmsg = bind("recvmsg", ctypes.c_int, ctypes.c_void_p, ctypes.c_int, restype=ctypes.c_ssize_t)


def option(fd: int, name: int, length: int) -> bytes:
    """An option of SOL_SOCKET, of up to ``length`` bytes."""
    buffer = ctypes.create_string_buffer(length)
    size = ctypes.c_uint(length)
    _getsockopt(fd, socket.SOL_SOCKET, name, ctypes.addressof(buffer), ctypes.addressof(size))
    return buffer.raw[: size.value]


def filter_length(fd: int) -> int:
    """How many instructions its packet filter has. Not the answer's bytes but its instructions are counted
    (net/core/filter.c: sk_get_filter); asked for none, it writes nothing. OSError EACCES for one of eBPF."""
    size = ctypes.c_uint(0)
    _getsockopt(fd, socket.SOL_SOCKET, SO_GET_FILTER, None, ctypes.addressof(size))
    return size.value


def peek_but_one(fd: int, length: int) -> int:
    """How many bytes of a stream unix socket lie before the buffer with the last of the next ``length`` bytes.

    A buffer is what was written in one go, at most. The kernel copies one after the other, and what it has copied when
    one of them meets an address that is not there is the result (net/unix/af_unix.c: unix_stream_read_generic).
    """
    space = ctypes.create_string_buffer(max(1, length - 1))
    vector = struct.pack("PNPN", ctypes.addressof(space), length - 1, _NOWHERE, 1)
    entries = ctypes.create_string_buffer(vector, len(vector))
    header = struct.pack("PIPNPNi4x", 0, 0, ctypes.addressof(entries), 2, 0, 0, 0)
    message = ctypes.create_string_buffer(header, len(header))
    try:
        return int(_recvmsg(fd, ctypes.addressof(message), socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return 0
