"""SOCK_SEQPACKET packets of bytes and file descriptors, and who owns the descriptors; no meaning of the bytes.

A packet that the socket cannot take in one piece travels in a sealed memfd, announced by ``{"memfd": LENGTH}``;
both ends of this module hide that. Used by the file system's control socket and by the manager's.
"""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import socket
import stat
import struct
from types import TracebackType
from typing import Iterable, List, Optional, Sequence, Tuple, Type

MAX_FDS = 253  # SCM_MAX_FD, unix(7)
MAX_PAYLOAD = 256 << 20  # bytes; more than the largest listing, far less than what would harm the receiver
MAX_PATH = 107  # bytes of sun_path, less the final NUL, unix(7)
_ANNOUNCEMENT = b'{"memfd"'
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Descriptors:
    """Received file descriptors: closed with the object, unless somebody takes them over by ``steal``."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds: List[int] = list(fds)

    def __len__(self) -> int:
        return sum(fd >= 0 for fd in self._fds)

    def __enter__(self) -> "Descriptors":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def steal(self, index: int) -> int:
        """The fd at ``index``, which the caller closes from now on; IndexError if there is none."""
        fd = self._fds[index]
        if fd < 0:
            raise IndexError("descriptor already taken")
        self._fds[index] = -1  # -1, not removed: a stale index must not reach another's file
        return fd

    def close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def listen(path: str) -> socket.socket:
    """A listening socket bound at ``path``, mode 0600. A socket file nobody listens on is replaced.

    OSError: EADDRINUSE if somebody listens there or it is another kind of file, ENAMETOOLONG, or as bind(2).
    """
    _check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        old_umask = os.umask(0o177)  # the mode must be right from the first moment on
        try:
            try:
                sock.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _is_stale(path):
                    raise
                os.unlink(path)
                sock.bind(path)
        finally:
            os.umask(old_umask)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


def remove(path: str, made: os.stat_result) -> None:
    """Remove the socket's file if it still is the one that was ``made``: who found it gone may have bound another.

    Before the socket is closed, which keeps the inode number from being that one's.
    """
    try:
        if os.path.samestat(os.lstat(path), made):
            os.unlink(path)
    except FileNotFoundError:
        pass


def connect(path: str, timeout: Optional[float] = None) -> socket.socket:
    """A socket connected to the listener at ``path``; ``timeout`` in seconds is kept for later calls.

    TimeoutError if the listener's queue stays full for so long; with a timeout of 0, BlockingIOError at once.
    """
    _check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        if timeout == 0:
            sock.setblocking(False)
        elif timeout is not None:
            # A non-blocking connect does not wait for room in the queue but fails; a blocking one waits for the
            # time limit of sending, unix(7).
            seconds, rest = divmod(timeout, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))
        try:
            sock.connect(path)
        except BlockingIOError as error:
            if timeout == 0:
                raise
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path) from error
        sock.settimeout(timeout)
    except BaseException:
        sock.close()
        raise
    return sock


def _check_path(path: str) -> None:
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {MAX_PATH} bytes", path)


def _is_stale(path: str) -> bool:
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False
    finally:
        probe.close()
    return False


def send(sock: socket.socket, payload: bytes, fds: Sequence[int] = (), prefix: bytes = b"") -> None:
    """Send one packet: ``prefix`` (always in the packet itself), then ``payload``, with copies of ``fds``.

    OSError: EMSGSIZE for more than MAX_FDS descriptors or MAX_PAYLOAD bytes; ValueError for an empty packet, which
    would look like the end of the connection.
    """
    if not prefix and not payload:
        raise ValueError("an empty packet cannot be told from the end of a connection")
    if len(fds) >= MAX_FDS or len(payload) > MAX_PAYLOAD:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    try:
        _sendmsg(sock, prefix + payload, fds)
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
        memfd = _sealed_memfd(payload)
        try:
            _sendmsg(sock, prefix + json.dumps({"memfd": len(payload)}).encode(), [memfd, *fds])
        finally:
            os.close(memfd)


def _sendmsg(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def _sealed_memfd(payload: bytes) -> int:
    fd = os.memfd_create("packet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(payload)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def receive(
    sock: socket.socket, prefix_length: int = 0, limit: int = MAX_PAYLOAD, descriptors: bool = True
) -> Optional[Tuple[bytes, bytes, Descriptors]]:
    """(prefix, payload, descriptors) of the next packet; None at the end of the connection.

    The descriptors are close-on-exec and the caller's. With ``descriptors`` False none are taken, whatever was sent.
    OSError: EPROTO for a packet that is not what it announces, EMSGSIZE for too many descriptors or a payload of more
    than ``limit`` bytes, or as recvmsg(2) (BlockingIOError, TimeoutError).
    """
    head = bytearray(prefix_length + len(_ANNOUNCEMENT))
    size = sock.recv_into(head, len(head), socket.MSG_PEEK | socket.MSG_TRUNC)
    if size == 0:
        return None
    announced = head[prefix_length:] == _ANNOUNCEMENT
    wanted = MAX_FDS if descriptors else int(announced)
    space = socket.CMSG_LEN(wanted * array.array("i").itemsize) if wanted else 0
    # recvmsg, not recv_fds: the latter drops its flags in 3.9 to 3.11, and descriptors would survive an exec.
    data, ancillary, flags, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
    taken = Descriptors(received)
    try:
        if flags & socket.MSG_CTRUNC and (descriptors or (announced and not received)):
            raise OSError(errno.EMSGSIZE, "descriptors were lost: too many at once, or RLIMIT_NOFILE reached")
        if len(data) < prefix_length:
            raise OSError(errno.EPROTO, "packet shorter than its fixed part")
        prefix, payload = data[:prefix_length], data[prefix_length:]
        if announced:
            payload = _read_memfd(payload, received[0] if received else -1, limit)
            os.close(taken.steal(0))
            taken = Descriptors(received[1:])
        return prefix, payload, taken
    except BaseException:
        taken.close()
        raise


def _read_memfd(announcement: bytes, fd: int, limit: int) -> bytes:
    try:
        length = json.loads(announcement)["memfd"]
    except (ValueError, KeyError, TypeError, RecursionError):
        length = None
    if type(length) is not int or length <= 0 or fd < 0:
        raise OSError(errno.EPROTO, "announcement of a memfd without a length, or without the memfd")
    if length > limit:
        raise OSError(errno.EMSGSIZE, f"{length} bytes are more than the {limit} that are taken at once")
    try:
        # Sealed, or the sender could change or cut it while we read.
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise OSError(errno.EPROTO, "announced memfd is not one") from error
    if seals & (_SEALS & ~fcntl.F_SEAL_SEAL) != _SEALS & ~fcntl.F_SEAL_SEAL or os.fstat(fd).st_size != length:
        raise OSError(errno.EPROTO, "announced memfd is not sealed, or has another length")
    payload = bytearray()
    while len(payload) < length:
        part = os.pread(fd, length - len(payload), len(payload))
        if not part:
            raise OSError(errno.EPROTO, "announced memfd ended early")
        payload += part
    return bytes(payload)


def peer_uid(sock: socket.socket) -> int:
    """The uid of the process that connected (SO_PEERCRED, unix(7))."""
    credentials = array.array("i")
    credentials.frombytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * credentials.itemsize))
    return credentials[1]
