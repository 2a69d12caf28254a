"""A client of the manager, as its loop sees it: requests in turn, answers in order, and clients that leave."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from typing import Any, Iterator, List, Tuple

import pytest

from spfs import requests
from spfs.connection import Answer, Connection
from spfs.errors import SpfsError
from spfs.eventloop import EventLoop
from spfs.replies import Reply
from spfs.requests import Request
from stubfs import messages, wire

STATUS = b'{"command": "status"}'


class Client:
    """Both ends of a connection; ``taken`` are the requests that were handed over, with the way to answer each."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.loop = EventLoop()
        self.taken: List[Tuple[Request, Answer]] = []
        self.closed: List[Connection] = []
        self.connection = Connection(self.loop, theirs, self._handle, self.closed.append)

    def _handle(self, connection: Connection, request: Request, answer: Answer) -> None:
        self.taken.append((request, answer))

    def turn(self) -> None:
        """Let the loop see to what is ready."""
        self.loop._stopped = False
        self.loop.later(0.01, self.loop.stop)
        self.loop.run()

    def reply(self) -> "Tuple[int, Any]":
        packet = wire.receive(self.sock, messages.STATUS.size)
        assert packet is not None
        packet[2].close()
        return messages.STATUS.unpack(packet[0])[0], json.loads(packet[1])


@pytest.fixture
def client() -> Iterator[Client]:
    handler = signal.getsignal(signal.SIGCHLD)
    before = len(os.listdir("/proc/self/fd"))
    made = Client()
    yield made
    made.connection.close()
    made.sock.close()
    made.loop.close()
    signal.signal(signal.SIGCHLD, handler)
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_request_at_a_time_and_answers_in_order(client: Client) -> None:
    client.sock.send(STATUS)
    client.sock.send(b'{"command": "held"}')
    client.turn()
    ((request, answer),) = client.taken
    assert request == requests.Status() and not client.connection.idle
    answer(Reply(0, {"first": True}), ())
    client.turn()
    assert client.taken[1][0] == requests.Held()
    client.taken[1][1](Reply(-errno.ENOENT, {"message": "none"}), ())
    assert [client.reply(), client.reply()] == [(0, {"first": True}), (-errno.ENOENT, {"message": "none"})]
    assert client.connection.idle


@pytest.mark.parametrize("packet", [b"", b"nonsense", b"{", b'{"command": "frob"}', b"\xff\xfe\0"])
def test_what_is_no_request_is_answered_and_the_next_one_served(client: Client, packet: bytes) -> None:
    client.sock.send(packet)
    client.sock.send(STATUS)
    client.turn()
    status, data = client.reply()
    assert status == -errno.EINVAL and data["message"].startswith("cannot read the request: ")
    assert [request for request, _ in client.taken] == [requests.Status()]


def test_a_client_that_leaves_gives_up_what_it_waits_for(client: Client) -> None:
    client.sock.send(STATUS)
    client.turn()
    gone: List[str] = []
    client.connection.on_gone = lambda: gone.append("gone")
    client.sock.close()
    client.turn()
    assert gone == ["gone"] and client.closed == [client.connection]
    client.taken[0][1](Reply(0, {}), ())  # too late, and no harm
    client.connection.close()
    assert gone == ["gone"] and len(client.closed) == 1


def test_what_was_answered_is_not_given_up_any_more(client: Client) -> None:
    client.sock.send(STATUS)
    client.turn()
    gone: List[str] = []
    client.connection.on_gone = lambda: gone.append("gone")
    client.taken[0][1](Reply(0, {}), ())
    client.sock.close()
    client.turn()
    assert gone == [] and client.closed == [client.connection]


def test_a_client_that_will_send_no_more_gets_its_answers(client: Client) -> None:
    client.sock.send(STATUS)
    client.sock.shutdown(socket.SHUT_WR)
    client.turn()
    assert client.closed == []
    client.taken[0][1](Reply(0, {"still": "here"}), ())
    assert client.reply() == (0, {"still": "here"})
    client.turn()
    assert client.closed == [client.connection]


def test_a_client_that_does_not_read_delays_nobody_and_loses_nothing(client: Client) -> None:
    with open(os.devnull) as null:
        for number in range(2000):  # more than the socket takes
            client.connection._answer(Reply(0, {"number": number}), [null.fileno()] if number % 2 else ())
    assert not client.connection.idle
    for number in range(2000):
        if not has_packet(client.sock):
            client.turn()
        assert client.reply() == (0, {"number": number})
    assert client.connection.idle


def has_packet(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.mark.parametrize(
    "error, number, words",
    [
        (SpfsError("cannot now", "later", errno.EBUSY), errno.EBUSY, "cannot now"),
        (ValueError("a defect"), errno.EIO, "cannot do it: ValueError('a defect')"),
    ],
)
def test_a_handler_that_fails_is_an_answer(client: Client, error: Exception, number: int, words: str) -> None:
    def fail(connection: Connection, request: Request, answer: Answer) -> None:
        raise error

    client.connection._handle = fail
    client.sock.send(STATUS)
    client.turn()
    status, data = client.reply()
    assert (status, data["message"]) == (-number, words) and client.connection.idle


def test_an_answer_that_cannot_be_sent_says_so(client: Client) -> None:
    client.sock.send(STATUS)
    client.turn()
    client.taken[0][1](Reply(0, {}), [-1])  # no descriptor: as when it cannot be copied
    status, data = client.reply()
    assert (status, data["hint"]) == (-errno.EBADF, "it was done all the same: see status")
    assert data["message"].startswith("cannot send the answer: ") and client.connection.idle
