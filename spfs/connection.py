"""The manager's side of its sockets: clients that ask, and file systems that are asked. No meaning of the messages.

Everything is non-blocking, so that a client that does not read or a file system that does not answer delays nobody.
"""

from __future__ import annotations

import collections
import errno
import json
import logging
import os
import select
import socket
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

from spfs import protocol, replies
from spfs.errors import SpfsError, UsageError, reason
from spfs.eventloop import EventLoop
from spfs.replies import Reply
from spfs.requests import Request
from stubfs import wire

log = logging.getLogger(__name__)

MAX_REQUEST = 32 << 20  # bytes; some hundred thousand files to create. Who waits meanwhile, waits for a second.

Answer = Callable[[Reply, Sequence[int]], None]
"""Answers one request; the descriptors are copied, and stay the caller's. Fine to call when the client is gone."""


class Connection:
    """One client: one request at a time, replies in order.

    A client that will send no more (shutdown(2)) still gets its answers; one that is gone gives up what it waits for.
    """

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        handle: Callable[["Connection", Request, Answer], None],
        closed: Callable[["Connection"], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._handle = handle
        self._closed = closed
        self._busy = False
        self._unsent: Deque[Tuple[Reply, Tuple[int, ...]]] = collections.deque()
        self.on_gone: Optional[Callable[[], None]] = None  # what to drop if the client leaves before its answer
        sock.setblocking(False)
        loop.watch(sock.fileno(), self._readable)

    @property
    def idle(self) -> bool:
        """Has every request been answered, and the answer been taken by the socket?"""
        return not self._busy and not self._unsent

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        while self._unsent:
            _close_all(self._unsent.popleft()[1])
        gone, self.on_gone = self.on_gone, None
        if gone is not None:
            gone()
        self._closed(self)

    def _readable(self) -> None:
        try:
            # No request has descriptors: what is not taken is the kernel's to close, which may take its time.
            packet = wire.receive(self._sock, limit=MAX_REQUEST, descriptors=False)
        except BlockingIOError:
            return
        except ConnectionError:
            return self.close()
        except OSError as error:
            self._busy = True
            number = error.errno or errno.EPROTO
            return self._answer(replies.error_reply(f"cannot read the request: {reason(error)}", "", number))
        if packet is None:
            if self._at_end():
                return self.close()
            self._sock.recv(1)  # an empty packet, which is no request
            self._busy = True
            return self._answer(replies.error_reply("cannot read the request: the packet is empty"))
        self._busy = True
        self._take(packet[1])
        if self._busy and self._sock.fileno() >= 0:
            # The next request is not its turn yet; only a hang-up matters, which epoll tells without being asked.
            self._loop.watch(self._sock.fileno(), self.close, 0)

    def _take(self, payload: bytes) -> None:
        try:
            request = protocol.parse(payload)
        except UsageError as error:
            log.info("refused: %s", error)
            return self._answer(replies.error_reply(error.message, error.hint, error.errno))
        try:
            self._handle(self, request, self._answer)
        except SpfsError as error:
            log.info("refused: %s", error)
            self._answer(replies.error_reply(error.message, error.hint, error.errno))
        except Exception as error:
            log.exception("request %s", type(request).__name__)  # not the request: options may hold passwords
            self._answer(replies.error_reply(f"cannot do it: {error!r}", "a defect: the log has more", errno.EIO))

    def _at_end(self) -> bool:
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _answer(self, reply: Reply, fds: Sequence[int] = ()) -> None:
        self._busy = False
        self.on_gone = None
        if self._sock.fileno() < 0:
            return
        try:
            copies = _copies(fds)  # it may be a while before the socket takes them
        except OSError as error:
            reply, copies = _not_sent(error), ()
        self._unsent.append((reply, copies))
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            (status, data), fds = self._unsent[0]
            try:
                wire.send(self._sock, replies.encode_data(data), fds, replies.encode_status(status))
            except BlockingIOError:
                return self._loop.watch(self._sock.fileno(), self._flush, select.EPOLLOUT)
            except (BrokenPipeError, ConnectionError) as error:
                log.debug("a client went away before its answer: %s", error)
                return self.close()
            except OSError as error:
                if status == -(error.errno or 0):
                    return self.close()  # that was said already, and could not be sent, either
                _close_all(fds)
                self._unsent[0] = (_not_sent(error), ())
                continue
            _close_all(self._unsent.popleft()[1])
        self._loop.watch(self._sock.fileno(), self._readable)


def _copies(fds: Sequence[int]) -> Tuple[int, ...]:
    copies: List[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        _close_all(copies)
        raise
    return tuple(copies)


def _not_sent(error: OSError) -> Reply:
    log.error("cannot send an answer: %s", error)
    hint = "it was done all the same: see status"
    return replies.error_reply(f"cannot send the answer: {reason(error)}", hint, error.errno or errno.EIO)


class Call:
    """One request to a file system's control socket; ``done`` gets its reply and descriptors, exactly once."""

    def __init__(
        self,
        loop: EventLoop,
        path: str,
        request: Dict[str, Any],
        done: Callable[[Reply, wire.Descriptors], None],
        timeout: float,
        fds: Sequence[int] = (),
    ) -> None:
        self._loop = loop
        self._path = path
        self._done = done
        self._sock: Optional[socket.socket] = None
        late = TimeoutError(errno.ETIMEDOUT, f"no answer in {timeout} s")
        self._timer = loop.later(timeout, lambda: self._fail(late))
        try:
            # Timeout 0: a full backlog gives EAGAIN instead of blocking us, unix(7).
            self._sock = wire.connect(path, 0)
            wire.send(self._sock, json.dumps(request).encode(), fds)
        except OSError as error:
            failure = error  # the name of an except clause ends with it
            loop.soon(lambda: self._fail(failure))
        else:
            loop.watch(self._sock.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            packet = wire.receive(self._sock, replies.STATUS_LENGTH)
            if packet is None:
                raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
            prefix, payload, fds = packet
            reply = replies.decode_reply(prefix, payload)
        except BlockingIOError:
            return
        except OSError as error:
            return self._fail(error)
        except ValueError as error:
            return self._fail(OSError(errno.EPROTO, f"not a reply: {error}"))
        self._finish(reply, fds)

    def _fail(self, error: OSError) -> None:
        text = f"cannot reach the file system process: {self._path}: {reason(error)}"
        self._finish(replies.error_reply(text, "", error.errno or errno.EIO), wire.Descriptors())

    def _finish(self, reply: Reply, fds: wire.Descriptors) -> None:
        if self._done is _ignore:
            fds.close()
            return
        self._timer.cancel()
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
        done, self._done = self._done, _ignore
        with fds:
            done(reply, fds)


def _ignore(reply: Reply, fds: wire.Descriptors) -> None:
    """Stands for the caller once it has been told."""


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
