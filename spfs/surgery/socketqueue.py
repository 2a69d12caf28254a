"""What lies in a unix socket's queue: looked at without taking anything out, and put into another one's.

Boundaries are kept: those of messages, and in a stream those that descriptors and changes of the writer make, which no
recv(2) reads across.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
import struct
import termios
from dataclasses import dataclass, field
from typing import Iterable, List, Optional, Sequence, Tuple

from spfs.linux import sockets
from spfs.surgery import socketcopy
from spfs.surgery.socketcopy import SO_PEEK_OFF, borrowed
from stubfs.wire import MAX_FDS

_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_SCM_CREDENTIALS = 2
_MOST = 1 << 20  # bytes of a message; net.core.wmem_max, unless somebody has made it more
_CREDENTIALS = struct.Struct("iII")  # struct ucred
_CONTROL = socket.CMSG_SPACE(4 * MAX_FDS) + socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(256)


@dataclass
class Message:
    """``files``: descriptors of ours, this object's. ``credentials``: what is shown of the writer, None if nothing."""

    data: bytes
    files: List[int] = field(default_factory=list)
    credentials: Optional[bytes] = None

    def close(self) -> None:
        for fd in self.files:
            os.close(fd)
        self.files = []


def waiting(fd: int) -> int:
    """The bytes that can be read (SIOCINQ)."""
    amount = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, amount)
    return amount[0]


def _sent(fd: int) -> int:
    """The memory of all that it has sent and nobody has received yet (SIOCOUTQ)."""
    amount = array.array("i", [0])
    fcntl.ioctl(fd, termios.TIOCOUTQ, amount)
    return amount[0]


def refuse_skipped(writer: int, anew: int) -> None:
    """OSError EBUSY if the messages that ``anew`` has sent are not all that ``writer`` has, and nobody has received.

    SO_PEEK_OFF leaves out an empty message that somebody has peeked at before. Nothing tells of it but the memory that
    it takes."""
    with borrowed(writer) as one:
        if one.type != socket.SOCK_STREAM and _sent(writer) != _sent(anew):
            raise OSError(errno.EBUSY, "not all messages that lie in it can be seen")


def peek(fd: int, at_end: bool) -> List[Message]:
    """All that lies in the queue of a connected socket, of which nobody reads meanwhile. ``at_end``: nothing more can
    come, which is told apart from an empty message in no other way.

    Where one look does not suffice, SO_PEEK_OFF is another one for that time. OSError EBUSY for what would not be the
    same elsewhere.
    """
    length = waiting(fd)
    found: List[Message] = []
    with borrowed(fd) as one:
        stream = one.type == socket.SOCK_STREAM
        datagrams = one.type == socket.SOCK_DGRAM  # of which only the first one's length is told
        if stream and not length or at_end and not length:
            return found
        before = one.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
        try:
            if before < 0 and stream:
                message = _look(one, length)
                if message is not None:
                    found.append(message)
                    if len(message.data) == length and not message.files:
                        return found
            _forget(found)
            found.clear()
            offset = 0
            one.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
            while not (stream or at_end) or offset < length:
                message = _look(one, length if not datagrams else _MOST)
                if message is None:
                    break
                found.append(message)
                if stream and message.files:
                    found[-1:] = _split(one, message, offset)
                offset += len(message.data)
        except BaseException:
            _forget(found)
            raise
        finally:
            if one.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) != before:
                one.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)
    if sum(len(message.data) for message in found) != length and not datagrams:
        _forget(found)
        raise OSError(errno.EBUSY, "not all that lies in it can be seen")
    return found


def refuse_hidden(reader: int, writer: int, messages: Sequence[Message]) -> None:
    """OSError EBUSY if ``messages``, from the queue of ``reader``, are more than what is seen of them."""
    if messages:
        shown, more = socketcopy.passes(reader)
        if more:
            raise OSError(errno.EBUSY, "what lies in it tells more of who wrote it than can be told again")
        if not shown and any(socketcopy.passes(writer)):
            raise OSError(errno.EBUSY, "what lies in it carries credentials that nobody is shown")
        if any(stat.S_ISSOCK(os.fstat(fd).st_mode) for message in messages for fd in message.files):
            raise OSError(errno.EBUSY, "another socket is in flight in it")


def exchange(reader: int, writer: int, messages: Sequence[Message], anew: Sequence[Message]) -> None:
    """Have ``anew`` in the queue of ``reader`` in the place of ``messages``, which are all there is in it.

    First those are added, then these are taken out: one killed in between leaves too much rather than too little. That
    they can be sent is tried with other sockets before.
    """
    for message in messages:
        if message.credentials is not None and not _CREDENTIALS.unpack(message.credentials)[0]:
            raise OSError(errno.EBUSY, "what lies in it was written when nobody wanted to know by whom")
    with borrowed(writer) as one, borrowed(reader) as other:
        first, second = socket.socketpair(socket.AF_UNIX, one.type)
        with first, second:
            socketcopy.widen(first.fileno())
            put(first.fileno(), anew)
            refuse_skipped(writer, first.fileno())
        room = one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        offset = other.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
        socketcopy.widen(writer)
        try:
            put(writer, anew)
            _take(other, messages)
        finally:
            socketcopy.set_room(writer, room)
            if other.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) != offset:
                other.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)


def _take(one: socket.socket, messages: Iterable[Message]) -> None:
    for message in messages:
        left = len(message.data)
        while True:
            data, ancillary, _, _ = one.recvmsg(left, _CONTROL, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
            for fd in _files(ancillary):
                os.close(fd)
            left -= len(data)
            if not left:
                break


def put(fd: int, messages: Iterable[Message]) -> None:
    """Send ``messages``, without waiting."""
    with borrowed(fd) as one:
        for message in messages:
            control: List[Tuple[int, int, "bytes | array.array[int]"]] = []
            if message.files:
                control.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", message.files)))
            # Without a process, it was written when nobody wanted to know by whom: that is the same here.
            if message.credentials is not None and _CREDENTIALS.unpack(message.credentials)[0]:
                control.append((socket.SOL_SOCKET, _SCM_CREDENTIALS, message.credentials))
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            sent = one.sendmsg([message.data], control, flags)
            credentials = [entry for entry in control if entry[1] == _SCM_CREDENTIALS]
            while sent < len(message.data):
                sent += one.sendmsg([message.data[sent:]], credentials, flags)


def _forget(messages: Iterable[Message]) -> None:
    for message in messages:
        message.close()


def _look(one: socket.socket, length: int) -> Optional[Message]:
    try:
        data, ancillary, flags, _ = one.recvmsg(length, _CONTROL, _PEEK)
    except BlockingIOError:
        return None
    message, strange = Message(data), bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))
    message.files += _files(ancillary)
    for _, kind, content in ancillary:
        if kind == _SCM_CREDENTIALS:
            message.credentials = content
        elif kind != socket.SCM_RIGHTS:
            strange = True
    if strange:
        message.close()
        raise OSError(errno.EBUSY, "what comes along with a message in it cannot be sent again")
    return message


def _files(ancillary: Iterable[Tuple[int, int, bytes]]) -> List[int]:
    found = array.array("i")
    for _, kind, content in ancillary:
        if kind == socket.SCM_RIGHTS:
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    return list(found)


def _split(one: socket.socket, message: Message, offset: int) -> List[Message]:
    """What was written without descriptors is read together with the first that has some after it: apart again. (That a
    peek shows descriptors does not say where: it goes on to look for them behind what it was asked for.)"""
    one.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
    begin = sockets.peek_but_one(one.fileno(), len(message.data))
    one.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset + len(message.data))
    before = [Message(message.data[:begin], credentials=message.credentials)] if begin else []
    return [*before, Message(message.data[begin:], message.files, message.credentials)]
