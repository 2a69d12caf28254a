"""Packets with descriptors: what does not fit goes in a memfd, and what is no such thing is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
from pathlib import Path
from typing import Iterator, Tuple

import pytest

from stubfs import wire

LARGE = b"x" * (1 << 20)  # more than a socket takes at once
Pair = Tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = set(os.listdir("/proc/self/fd"))
    with ours, theirs:
        yield ours, theirs
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("payload", [b"small", LARGE])
def test_descriptors_come_in_order_and_close_on_exec(pair: Pair, tmp_path: Path, payload: bytes) -> None:
    sent = []
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        sent.append(os.open(tmp_path / name, os.O_RDONLY))
    wire.send(pair[0], payload, sent, prefix=b"head")
    packet = wire.receive(pair[1], 4)
    assert packet is not None and packet[:2] == (b"head", payload)
    with packet[2] as received:
        assert len(received) == 2
        first = received.steal(0)
        assert os.pread(first, 9, 0) == b"a" and not os.get_inheritable(first)
        with pytest.raises(IndexError):
            received.steal(0)
        second = received.steal(1)
        assert os.pread(second, 9, 0) == b"b"
    for fd in (*sent, first, second):
        os.close(fd)


def test_descriptors_that_are_not_taken_are_closed(pair: Pair) -> None:
    with open(os.devnull) as null:
        wire.send(pair[0], b"x", [null.fileno()] * 3)
        wire.send(pair[0], LARGE, [null.fileno()])
    for payload in (b"x", LARGE):
        packet = wire.receive(pair[1], descriptors=False)
        assert packet is not None and packet[1] == payload and len(packet[2]) == 0


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.mark.parametrize(
    "length, size, seals, number",
    [
        (10, 10, SEALED, 0),
        (10, 11, SEALED, errno.EPROTO),
        (10, 9, SEALED, errno.EPROTO),
        (10, 10, SEALED & ~fcntl.F_SEAL_WRITE, errno.EPROTO),
        (10, 10, SEALED & ~fcntl.F_SEAL_SHRINK, errno.EPROTO),
        (0, 0, SEALED, errno.EPROTO),
        (-1, 0, SEALED, errno.EPROTO),
        (True, 1, SEALED, errno.EPROTO),
        (1001, 1001, SEALED, errno.EMSGSIZE),
    ],
)
def test_an_announcement_is_checked(pair: Pair, length: int, size: int, seals: int, number: int) -> None:
    fd = memfd(size, seals)
    try:
        socket.send_fds(pair[0], [json.dumps({"memfd": length}).encode()], [fd])
    finally:
        os.close(fd)
    if number:
        with pytest.raises(OSError) as caught:
            wire.receive(pair[1], limit=1000)
        assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]
    else:
        packet = wire.receive(pair[1], limit=1000)
        assert packet is not None and packet[1] == bytes(length)


def test_an_announcement_without_its_memfd(pair: Pair) -> None:
    pair[0].send(b'{"memfd": 10}')
    with pytest.raises(OSError) as caught:
        wire.receive(pair[1])
    assert caught.value.errno == errno.EPROTO
    with open(os.devnull) as null:
        socket.send_fds(pair[0], [b'{"memfd": 10}'], [null.fileno()])
    with pytest.raises(OSError, match="is not one"):
        wire.receive(pair[1])


def test_a_socket_is_its_owners_and_replaces_only_a_dead_one(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    umask = os.umask(0)
    try:
        first = wire.listen(path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(OSError) as caught:
        wire.listen(path)
    assert caught.value.errno == errno.EADDRINUSE
    made = os.stat(path)
    os.unlink(path)  # by somebody who cleans up
    with first, wire.listen(path):
        wire.remove(path, made)
        assert os.path.exists(path)
    with wire.listen(path):  # whose last listener was killed
        wire.remove(path, os.stat(path))
        assert not os.path.exists(path)


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    path.write_text("important")
    with pytest.raises(OSError) as caught:
        wire.listen(str(path))
    assert caught.value.errno == errno.EADDRINUSE and path.read_text() == "important"
