"""A new unix socket like an old one: type, network namespace, options, status flags, owner of the inode."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
from contextlib import contextmanager
from typing import Iterator, Tuple

from spfs.linux import namespaces, sockets
from spfs.surgery import socketlist
from spfs.surgery.counterparts import copy_flags

_SIOCGSKNS = 0x894C  # the network namespace of a socket, netdevice(7)
_SO_PASSSEC, _SO_PASSPIDFD, _SO_PASSRIGHTS = 34, 76, 83
SO_PEEK_OFF = 42
_SO_RXQ_OVFL, _SO_BUSY_POLL = 40, 46
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFERS = ((socket.SO_SNDBUF, _SO_SNDBUFFORCE), (socket.SO_RCVBUF, _SO_RCVBUFFORCE))
_PASSED = (socket.SO_PASSCRED, _SO_PASSSEC, _SO_PASSPIDFD)  # what comes along with messages
_OPTIONS = (
    *(socket.SO_DEBUG, socket.SO_REUSEADDR, socket.SO_DONTROUTE, socket.SO_BROADCAST, socket.SO_KEEPALIVE),
    *(socket.SO_OOBINLINE, socket.SO_RCVLOWAT, socket.SO_PRIORITY, socket.SO_MARK, 29, 35),  # SO_TIMESTAMP(NS)
    *(_SO_RXQ_OVFL, SO_PEEK_OFF, _SO_BUSY_POLL, _SO_PASSRIGHTS),
)
_STRUCTURES = ((socket.SO_RCVTIMEO, 16), (socket.SO_SNDTIMEO, 16), (socket.SO_LINGER, 8))
_SHUT = {1: socket.SHUT_RD, 2: socket.SHUT_WR, 3: socket.SHUT_RDWR}
_UNKNOWN = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL)  # not of this kernel, or not of this type
_MOST = 1 << 18  # bytes of an option: as many groups as a process can have (65536)


@contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """As a socket object, without its ownership."""
    wrapped = socket.socket(fileno=fd)
    try:
        yield wrapped
    finally:
        wrapped.detach()


def fresh(copy: int) -> int:
    """A new socket of the same type in the same network namespace; the caller's."""
    namespace = fcntl.ioctl(copy, _SIOCGSKNS)
    try:
        with borrowed(copy) as old:
            kind = old.type | socket.SOCK_CLOEXEC
        made = socketlist.in_thread(
            lambda: socket.socket(socket.AF_UNIX, kind), [(namespace, namespaces.CLONE_NEWNET)]
        )
        return made.detach()
    finally:
        os.close(namespace)


def like(copy: int) -> int:
    """A new socket with everything of the old one but its address, its peer and what lies in it; the caller's."""
    made = fresh(copy)
    try:
        assimilate(copy, made)
        return made
    except BaseException:
        os.close(made)
        raise


def assimilate(copy: int, made: int) -> None:
    """Give ``made`` the options, flags and owner of ``copy``. OSError EBUSY for what cannot be given to it."""
    _refuse_filter(copy)
    with borrowed(copy) as old, borrowed(made) as new:
        for option in (*_PASSED, *_OPTIONS):
            _copy_option(old, new, option)
        for option, force in _BUFFERS:
            value = old.getsockopt(socket.SOL_SOCKET, option)
            if value != new.getsockopt(socket.SOL_SOCKET, option):
                # What is read is twice what was set: the kernel adds as much for its own use (socket(7)).
                new.setsockopt(socket.SOL_SOCKET, force, value // 2)
        for option, length in _STRUCTURES:
            new.setsockopt(socket.SOL_SOCKET, option, old.getsockopt(socket.SOL_SOCKET, option, length))
    copy_flags(copy, made)
    found, now = os.fstat(copy), os.fstat(made)
    if (found.st_uid, found.st_gid) != (now.st_uid, now.st_gid):
        os.fchown(made, found.st_uid, found.st_gid)
    if found.st_mode != now.st_mode:
        os.fchmod(made, stat.S_IMODE(found.st_mode))


def _refuse_filter(copy: int) -> None:
    try:
        if not sockets.filter_length(copy):
            return
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
    raise OSError(errno.EBUSY, "it has a packet filter")


def keep_to_itself(made: int) -> None:
    """Have nothing come along with messages: an accepted socket inherits that from its listener (since Linux 6.16)."""
    with borrowed(made) as new:
        for option in _PASSED:
            try:
                if new.getsockopt(socket.SOL_SOCKET, option):
                    new.setsockopt(socket.SOL_SOCKET, option, 0)
            except OSError as error:
                if error.errno not in _UNKNOWN:
                    raise


def widen(made: int) -> None:
    """Have room for whatever could have been queued."""
    with borrowed(made) as new:
        new.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 1 << 29)


def set_room(fd: int, size: int) -> None:
    """SO_SNDBUF as it was read."""
    with borrowed(fd) as one:
        # What is read is twice what was set: the kernel adds as much for its own use (socket(7)).
        one.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size // 2)


def passes(fd: int) -> Tuple[bool, bool]:
    """Whether it shows a sender's credentials, and whether anything else of them (SO_PASSPIDFD, SO_PASSSEC)."""
    with borrowed(fd) as one:
        shown = [_option(one, option) for option in _PASSED]
    return bool(shown[0]), any(shown[1:])


def peer_identity(fd: int) -> Tuple[bytes, bytes, bytes]:
    """SO_PEERCRED, SO_PEERGROUPS, SO_PEERSEC: who the other end is, as it was when they met."""
    return sockets.option(fd, socket.SO_PEERCRED, 12), _long(fd, sockets.SO_PEERGROUPS), _long(fd, sockets.SO_PEERSEC)


def addresses(fd: int) -> Tuple[object, object]:
    """Its own and its peer's."""
    with borrowed(fd) as one:
        return one.getsockname(), one.getpeername()


def shut(fd: int, how: int) -> None:
    """``how``: as ``UnixSocket.shutdown``."""
    if how:
        with borrowed(fd) as one:
            one.shutdown(_SHUT[how])


def state(fd: int) -> int:
    """What poll(2) says: POLLIN, POLLPRI, POLLERR."""
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLPRI)
    return next((events for _, events in poller.poll(0)), 0)


def _copy_option(old: socket.socket, new: socket.socket, option: int) -> None:
    try:
        value = old.getsockopt(socket.SOL_SOCKET, option)
        if value != new.getsockopt(socket.SOL_SOCKET, option):
            new.setsockopt(socket.SOL_SOCKET, option, value)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise


def _option(one: socket.socket, option: int) -> int:
    try:
        return one.getsockopt(socket.SOL_SOCKET, option)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return 0


def _long(fd: int, option: int) -> bytes:
    try:
        return sockets.option(fd, option, _MOST)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.ENODATA):
            raise
        return b""
