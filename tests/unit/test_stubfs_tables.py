"""The tables of nodes, held requests and ignored interrupts, without a mount."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from typing import List, Tuple

import pytest

from stubfs import protocol
from stubfs.caches import spared
from stubfs.held import HeldTable
from stubfs.interrupts import Interrupts, is_fatal
from stubfs.nodes import NodeTable, Orphan
from stubfs.protocol import Opcode
from stubfs.request import Device, Request

DIRECTORY, FILE = stat.S_IFDIR, stat.S_IFREG


class RecordingDevice(Device):
    def __init__(self) -> None:
        super().__init__(-1)
        self.replies: List[Tuple[int, int]] = []

    def reply(self, unique: int, error: int, payload: bytes = b"") -> bool:
        self.replies.append((unique, error))
        return True


def request(unique: int, tid: int = 0, opcode: int = Opcode.LOOKUP, node: int = 1, body: bytes = b"name\0",
            device: Device = RecordingDevice()) -> Request:  # fmt: skip
    data = protocol.IN_HEADER.pack(40 + len(body), opcode, unique, node, 0, 0, tid, 0, 0) + body
    result = Request(device, data, data)
    result.parse(len(data))
    return result


class TestNodes:
    def test_paths(self) -> None:
        nodes = NodeTable()
        nodes.add(1, b"a", 2, 0, DIRECTORY)
        nodes.add(2, b"b", 3, 0, FILE)
        assert [nodes.path(number) for number in (1, 2, 3, 4)] == [b"", b"a", b"a/b", None]
        assert nodes.child_path(2, b"x") == b"a/x" and nodes.child_path(1, b"x") == b"x"
        assert nodes.child_path(99, b"x") is None
        nodes.rename(1, b"a", 1, b"z", None)
        assert nodes.path(3) == b"z/b"
        nodes.rename(2, b"b", 1, b"top", None)
        assert nodes.path(3) == b"top"

    def test_a_known_name_needs_no_library(self) -> None:
        nodes = NodeTable()
        assert nodes.look_up(1, b"a", FILE) is None
        nodes.add(1, b"a", 2, 5, FILE)
        node = nodes.look_up(1, b"a", FILE)
        assert node is not None and (node.number, node.generation, node.lookups, node.library_lookups) == (2, 5, 2, 1)
        assert nodes.forget(2, 1) == 0
        assert nodes.forget(2, 1) == 1  # the last one: libfuse is told of all that it knows
        assert nodes.get(2) is None and nodes.look_up(1, b"a", FILE) is None

    def test_a_directory_stays_for_its_children(self) -> None:
        nodes = NodeTable()
        nodes.add(1, b"a", 2, 0, DIRECTORY)
        nodes.add(2, b"b", 3, 0, FILE)
        assert nodes.forget(2, 1) == 1
        assert nodes.path(3) == b"a/b"
        assert nodes.look_up(1, b"a", DIRECTORY) is None  # libfuse has to count it again
        assert nodes.forget(3, 1) == 1
        assert len(nodes) == 1

    def test_a_removed_name(self) -> None:
        nodes = NodeTable()
        nodes.add(1, b"a", 2, 0, FILE)
        fd = os.open("/", os.O_PATH)
        assert nodes.remove(1, b"a", Orphan(fd, 1))
        assert nodes.path(2) is None and len(nodes) == 2
        nodes.forget(2, 1)
        with pytest.raises(OSError):
            os.fstat(fd)  # closed with the node that owned it
        assert not nodes.remove(1, b"a", None)

    def test_a_replaced_name(self) -> None:
        nodes = NodeTable()
        nodes.add(1, b"a", 2, 0, FILE)
        nodes.add(1, b"b", 3, 0, FILE)
        nodes.rename(1, b"a", 1, b"b", None)
        assert (nodes.path(2), nodes.path(3)) == (b"b", None)
        found = nodes.child(1, b"b")
        assert found is not None and found.number == 2 and nodes.child(1, b"a") is None

    def test_a_reply_that_was_not_taken(self) -> None:
        nodes = NodeTable()
        nodes.add(1, b"a", 2, 0, FILE)
        nodes.look_up(1, b"a", FILE)
        nodes.take_back(2, from_library=False)
        nodes.take_back(2, from_library=True)
        assert nodes.get(2) is None

    def test_only_what_was_read_is_cached(self) -> None:
        nodes = NodeTable()
        nodes.add(1, b"a", 2, 0, FILE)
        nodes.add(1, b"b", 3, 0, FILE)
        node = nodes.get(3)
        assert node is not None
        node.has_pages = True
        assert nodes.cached() == [3]


class TestHeld:
    def test_in_order_and_one_per_caller(self) -> None:
        held = HeldTable()
        for unique, tid in ((2, 10), (4, 10), (6, 11), (8, 0), (10, 0)):
            held.add(request(unique, tid))
        held.let_go(True)
        first, second = held.next(), held.next()
        assert first is not None and second is not None
        assert (first.unique, second.unique) == (2, 6)  # 4 is of the same caller as 2
        others = [held.next(), held.next()]
        assert [item.unique for item in others if item] == [8, 10]
        held.served(first)
        last = held.next()
        assert last is not None and last.unique == 4 and len(held) == 0

    def test_closed_again(self) -> None:
        held = HeldTable()
        held.add(request(2))
        held.add(request(4))
        held.let_go(True)
        first = held.next()
        assert first is not None
        held.let_go(False)
        held.add(first, back_to_front=True)
        assert [item.unique for item, _ in held.snapshot()] == [2, 4]
        found: List[object] = []
        thread = threading.Thread(target=lambda: found.append(held.next()))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        held.let_go(True)
        thread.join(5)
        assert found == [first]

    def test_the_end(self) -> None:
        device = RecordingDevice()
        held = HeldTable()
        held.add(request(2, device=device))
        held.end()
        held.add(request(4, device=device))
        assert device.replies == [(2, errno.EIO), (4, errno.EIO)]
        assert held.next() is None and held.take(2) is None

    def test_what_locks_pages(self) -> None:
        held = HeldTable()
        read = protocol.READ_IN.pack(1, 8192, 4096, 0, 0, 0, 0)
        held.add(request(2, opcode=Opcode.READ, node=5, body=read))
        held.add(request(4, opcode=Opcode.READ, node=6, body=read))
        held.add(request(6, opcode=Opcode.GETATTR, node=5))
        assert held.data_ranges(5) == [(2, 8192, 4096)]


def test_what_an_invalidation_spares() -> None:
    assert list(spared([])) == [(0, 0)]
    assert list(spared([(0, 4096)])) == [(4096, 0)]
    assert list(spared([(10_000, 10), (4096, 100), (20_480, 8192)])) == [(0, 4096), (12_288, 8192), (28_672, 0)]
    assert list(spared([(0, 8192), (4096, 8192)])) == [(12_288, 0)]


def status(**fields: int) -> bytes:
    names = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
    lines = [f"{name}:\t{fields.get(name, 0):016x}" for name in names]
    return ("Name:\tx\nTracerPid:\t%d\n" % fields.get("TracerPid", 0) + "\n".join(lines) + "\n").encode()


def bit(number: int) -> int:
    return 1 << (number - 1)


@pytest.mark.parametrize(
    "text, fatal",
    [
        (status(), False),
        (status(SigPnd=bit(signal.SIGKILL)), True),
        (status(ShdPnd=bit(signal.SIGKILL), TracerPid=5), True),
        (status(ShdPnd=bit(signal.SIGQUIT)), True),
        (status(ShdPnd=bit(signal.SIGQUIT), SigCgt=bit(signal.SIGQUIT)), False),
        (status(ShdPnd=bit(signal.SIGQUIT), SigBlk=bit(signal.SIGQUIT)), False),
        (status(ShdPnd=bit(signal.SIGQUIT), SigIgn=bit(signal.SIGQUIT)), False),
        (status(ShdPnd=bit(signal.SIGQUIT), TracerPid=5), False),
        (status(SigPnd=bit(signal.SIGSTOP) | bit(signal.SIGTSTP), ShdPnd=bit(signal.SIGCONT)), False),
        (status(ShdPnd=bit(signal.SIGCHLD) | bit(signal.SIGWINCH) | bit(signal.SIGURG)), False),
        (status(SigPnd=bit(signal.SIGRTMAX)), True),
    ],
)
def test_fatal_signals(text: bytes, fatal: bool) -> None:
    assert is_fatal(text) is fatal


def test_who_was_ignored_is_looked_at_again() -> None:
    waiting, ended = {2: os.getpid(), 4: os.getpid()}, []
    interrupts = Interrupts(lambda unique: unique in waiting, ended.append)
    for unique, tid in waiting.items():
        interrupts.interrupt(unique, tid)  # nothing fatal is pending in this very process
    interrupts.interrupt(6, 0)
    assert ended == [6]
    del waiting[2]
    interrupts.look()
    interrupts.look()
    assert ended == [6]
