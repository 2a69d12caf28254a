"""The tables of nodes, held requests and ignored interrupts, without a mount."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import threading
import time
from typing import List, Tuple

import pytest

from spfs.testing import wait_until
from stubfs import protocol
from stubfs.caches import spared
from stubfs.held import HeldTable
from stubfs.interrupts import Interrupts, is_fatal
from stubfs.nodes import Node, NodeTable, Orphan
from stubfs.protocol import UNKNOWN_INO, Opcode
from stubfs.request import Device, Request
from stubfs.rules import ActiveRule, Matcher, RequestFilter, Rule, decide

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
    result = Request(device, data)
    result.parse(len(data))
    return result


def status_of(inode: int, kind: int = FILE, device: int = 9) -> os.stat_result:
    return os.stat_result((kind | 0o644, inode, device, 1, 0, 0, 0, 0, 0, 0))


def enter(nodes: NodeTable, parent: int, name: bytes, inode: int, kind: int = FILE, generation: int = 1) -> Node:
    node = nodes.enter(parent, name, status_of(inode, kind), generation)
    assert node is not None
    return node


class TestNodes:
    def test_paths(self) -> None:
        nodes = NodeTable()
        enter(nodes, 1, b"a", 20, DIRECTORY)
        enter(nodes, 20, b"b", 30)
        assert [nodes.path(number) for number in (1, 20, 30, 4)] == [b"", b"a", b"a/b", None]
        assert nodes.child_path(20, b"x") == b"a/x" and nodes.child_path(1, b"x") == b"x"
        assert nodes.child_path(99, b"x") is None
        nodes.rename(1, b"a", 1, b"z", None)
        assert nodes.path(30) == b"z/b"
        nodes.rename(20, b"b", 1, b"top", None)
        assert nodes.path(30) == b"top"

    def test_the_number_is_the_inode_number_where_that_is_free(self) -> None:
        nodes = NodeTable()
        assert enter(nodes, 1, b"a", 20).number == 20
        taken = [enter(nodes, 1, b"b", 20, generation=2), enter(nodes, 1, b"c", 1), enter(nodes, 1, b"d", UNKNOWN_INO)]
        assert len({20, 1, UNKNOWN_INO, *(node.number for node in taken)}) == 6

        def number(generation: int, device: int, inode: int) -> int:
            return nodes.entry_numbers(1, generation, device)(b"unknown", inode)

        assert number(1, 9, 20) == 20 and number(2, 9, 20) == taken[0].number
        assert number(1, 9, 77) == 77 and number(1, 8, 20) == UNKNOWN_INO
        assert nodes.entry_numbers(1, 1, 8)(b"b", 20) == taken[0].number

    def test_a_hard_link_is_the_same_node(self) -> None:
        nodes = NodeTable()
        node = enter(nodes, 1, b"a", 20)
        assert enter(nodes, 1, b"b", 20) is node and node.lookups == 2
        assert nodes.path(20) == b"b"  # the latest
        assert nodes.lose(20) and nodes.path(20) == b"a" and not nodes.lose(20)
        assert nodes.link(20, 1, b"c", 1, status_of(20)) is node and node.lookups == 3
        assert nodes.link(20, 1, b"d", 1, status_of(21)) is None
        nodes.remove(1, b"c", None)
        assert nodes.path(20) == b"a"
        nodes.forget(20, 3)
        assert len(nodes) == 1 and nodes.child(1, b"a") is None

    def test_two_names_of_one_file_are_not_renamed(self) -> None:
        nodes = NodeTable()
        enter(nodes, 1, b"a", 20)
        enter(nodes, 1, b"b", 20)
        assert not nodes.rename(1, b"a", 1, b"b", None)
        assert nodes.child(1, b"a") is nodes.child(1, b"b") is nodes.get(20)

    def test_another_file_in_its_place_is_another_node(self) -> None:
        nodes = NodeTable()
        node = enter(nodes, 1, b"a", 20)
        other = enter(nodes, 1, b"a", 21)
        assert other is not node and nodes.path(20) is None and nodes.path(21) == b"a"
        assert enter(nodes, 1, b"a", 21, stat.S_IFIFO) is not other

    def test_a_directory_is_known_by_its_name(self) -> None:
        nodes = NodeTable()
        node = enter(nodes, 1, b"a", 20, DIRECTORY)
        assert enter(nodes, 1, b"a", 21, DIRECTORY) is node and node.number == 20
        assert enter(nodes, 1, b"mounted-here-too", 21, DIRECTORY) is not node

    def test_in_another_generation_the_name_tells(self) -> None:
        nodes = NodeTable()
        first, second = enter(nodes, 1, b"a", 20), enter(nodes, 1, b"b", 21)
        assert enter(nodes, 1, b"a", 70, generation=2) is first
        assert enter(nodes, 1, b"b", 70, generation=2) is second  # two files have become one: both are in use
        assert enter(nodes, 1, b"c", 70, generation=2) is first

    def test_what_changed_meanwhile_is_looked_at_again(self) -> None:
        nodes = NodeTable()
        seen = nodes.changes
        nodes.change()
        assert nodes.enter(1, b"a", status_of(20), 1, seen) is None
        enter(nodes, 1, b"a", 20)
        assert nodes.enter(1, b"a", status_of(20), 1, seen) is not None  # as it is known: nothing can be wrong
        assert nodes.enter(1, b"a", status_of(21), 1, seen) is None and nodes.path(20) == b"a"

    def test_a_directory_stays_for_its_children(self) -> None:
        nodes = NodeTable()
        enter(nodes, 1, b"a", 20, DIRECTORY)
        enter(nodes, 20, b"b", 30)
        nodes.forget(20, 1)
        assert nodes.path(30) == b"a/b"
        assert enter(nodes, 1, b"a", 20, DIRECTORY).lookups == 1
        nodes.forget(20, 1)
        nodes.forget(30, 1)
        assert len(nodes) == 1

    def test_the_deepest_path_goes_away_at_once(self) -> None:
        nodes = NodeTable()
        depth = 2048
        for number in range(2, depth):
            enter(nodes, number - 1, b"d", number, DIRECTORY)
        for number in range(2, depth):
            nodes.forget(number, 1)
        assert len(nodes) == 1

    def test_a_removed_name(self) -> None:
        nodes = NodeTable()
        enter(nodes, 1, b"a", 20)
        fd = os.open("/", os.O_PATH)
        assert nodes.remove(1, b"a", Orphan(fd, 1))
        assert nodes.path(20) is None and len(nodes) == 2
        nodes.forget(20, 1)
        with pytest.raises(OSError):
            os.fstat(fd)  # closed with the node that owned it
        assert not nodes.remove(1, b"a", None)

    def test_the_number_of_a_removed_file_that_nothing_keeps_may_be_another_ones(self) -> None:
        nodes = NodeTable()
        node = enter(nodes, 1, b"a", 20)
        assert not nodes.remove(1, b"a", None)
        assert enter(nodes, 1, b"b", 20) is not node

    def test_a_replaced_name(self) -> None:
        nodes = NodeTable()
        enter(nodes, 1, b"a", 20)
        enter(nodes, 1, b"b", 30)
        nodes.rename(1, b"a", 1, b"b", None)
        assert (nodes.path(20), nodes.path(30)) == (b"b", None)
        found = nodes.child(1, b"b")
        assert found is not None and found.number == 20 and nodes.child(1, b"a") is None

    def test_exchanged_names(self) -> None:
        nodes = NodeTable()
        enter(nodes, 1, b"d", 20, DIRECTORY)
        enter(nodes, 20, b"in", 21)
        enter(nodes, 1, b"f", 30)
        nodes.exchange(1, b"d", 1, b"f")
        assert (nodes.path(20), nodes.path(21), nodes.path(30)) == (b"f", b"f/in", b"d")
        nodes.exchange(1, b"f", 1, b"unknown")
        assert nodes.path(21) == b"unknown/in" and nodes.child(1, b"f") is None

    def test_without_a_name_from_the_start(self) -> None:
        nodes = NodeTable()
        node = nodes.enter_nameless(status_of(20), 1)
        assert nodes.path(20) is None and node.lookups == 1
        assert nodes.link(20, 1, b"a", 1, status_of(20)) is node and nodes.path(20) == b"a"

    def test_only_what_was_read_is_cached(self) -> None:
        nodes = NodeTable()
        enter(nodes, 1, b"a", 20)
        enter(nodes, 1, b"b", 30).has_pages = True
        assert nodes.cached() == [30]


STUB, PROXY, LATER = "stub", "proxy", "a later state"  # any objects will do


def table(*requests: Request, state: str = STUB) -> HeldTable:
    """``requests`` are held under ``state``, which is in force."""
    held = HeldTable(lambda item: [item.name()])
    held.enter(state)
    held.reconsider()
    for item in requests:
        held.add(item, state)
    return held


def uniques(held: HeldTable) -> List[int]:
    return [item.unique for item, _ in held.snapshot()]


class TestHeld:
    def test_in_order_and_one_per_caller(self) -> None:
        held = table(*(request(unique, tid) for unique, tid in ((2, 10), (4, 10), (6, 11), (8, 0), (10, 0))))
        held.enter(PROXY)
        held.reconsider()
        first, second = held.next(), held.next()
        assert first is not None and second is not None
        assert (first.unique, second.unique) == (2, 6)  # 4 is of the same caller as 2
        others = [held.next(), held.next()]
        assert [item.unique for item in others if item] == [8, 10]
        held.served(first)
        last = held.next()
        assert last is not None and last.unique == 4 and len(held) == 0

    def test_held_again(self) -> None:
        held = table(request(2), request(4))
        held.enter(PROXY)
        held.reconsider()
        first = held.next()
        assert first is not None
        held.enter(LATER)
        held.add(first, LATER)
        assert uniques(held) == [2, 4]  # by how long they wait
        found: List[object] = []
        thread = threading.Thread(target=lambda: found.extend((held.next(), held.next())))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        held.reconsider()
        wait_until(lambda: uniques(held) == [2])  # what is held under the state in force stays
        held.enter(PROXY)
        held.reconsider()
        thread.join(5)
        assert [item.unique for item in found if isinstance(item, Request)] == [4, 2]

    def test_held_under_a_state_that_is_over(self) -> None:
        held = table()
        held.enter(PROXY)
        held.add(request(2), STUB)
        held.reconsider()
        held.add(request(4), STUB)
        assert [item.unique for item in (held.next(), held.next()) if item] == [2, 4]

    def test_the_end(self) -> None:
        device = RecordingDevice()
        held = table(request(2, device=device), request(3, device=device))
        held.enter(PROXY)
        held.reconsider()
        held.add(request(4, device=device), PROXY)
        held.end()
        held.add(request(6, device=device), PROXY)
        assert device.replies == [(number, errno.EIO) for number in (2, 3, 4, 6)]
        assert held.next() is None and held.take(2) is None

    def test_what_locks_pages(self) -> None:
        read = protocol.READ_IN.pack(1, 8192, 4096, 0, 0, 0, 0)
        held = table(
            request(2, opcode=Opcode.READ, node=5, body=read), request(4, opcode=Opcode.READ, node=6, body=read),
            request(6, opcode=Opcode.GETATTR, node=5),
        )  # fmt: skip
        assert held.data_ranges(5) == [(8192, 4096)]
        assert [item.unique for item in held.take_data(5)] == [2] and held.data_ranges(5) == []
        by_rule = request(8, opcode=Opcode.READ, node=5, body=read)
        held.add(by_rule, STUB, ActiveRule(Rule("hold")).treatment)
        assert held.data_ranges(5) == [(8192, 4096)] and held.take_data(5) == []


class TestTimeLimits:
    def test_an_errno_when_the_time_is_over(self) -> None:
        device, rule = RecordingDevice(), ActiveRule(Rule("hold", seconds=0.05, errno="ENODATA"))
        held = table()
        held.keep_time()
        held.add(request(2, device=device), STUB, rule.treatment)
        held.add(request(4, device=device), STUB, ActiveRule(Rule("hold", seconds=1000)).treatment)
        held.add(request(6, device=device), STUB)
        wait_until(lambda: bool(device.replies))
        assert device.replies == [(2, errno.ENODATA)] and uniques(held) == [4, 6]
        held.end()

    def test_the_time_counts_from_the_beginning_of_the_wait(self) -> None:
        device, rule = RecordingDevice(), ActiveRule(Rule("hold", seconds=0.2))
        held, first = table(), request(2, device=device)
        held.keep_time()
        held.add(first, STUB)
        held.enter(LATER)
        held.reconsider()
        assert held.next() is first and first.wait is not None
        first.wait.since -= 1000
        held.add(first, LATER, rule.treatment)
        wait_until(lambda: bool(device.replies), 0.15)
        held.end()

    def test_delayed_then_on_to_the_rules_behind(self) -> None:
        delay, other, hold = (ActiveRule(rule) for rule in (
            Rule("delay", seconds=0.05), Rule("delay", seconds=0.05), Rule("hold")))  # fmt: skip
        rules = (delay, other, hold)
        held, item = table(), request(2)
        held.keep_time()
        start = time.monotonic()
        for expected in rules:
            treatment = decide(rules, item, lambda item: ())
            assert treatment is not None and treatment.rule is expected
            held.add(item, STUB, treatment)
            if expected is not hold:
                assert held.next() is item
        assert time.monotonic() - start >= 0.1 and uniques(held) == [2]
        held.end()

    def test_limits_of_those_that_left_mean_nothing(self) -> None:
        device, rule = RecordingDevice(), ActiveRule(Rule("hold", seconds=0.05))
        held = table()
        held.keep_time()
        held.add(request(2, device=device), STUB, rule.treatment)
        held.add(request(4, device=device), STUB, rule.treatment)
        assert held.take(2) is not None
        held.enter(PROXY)
        held.reconsider()
        left = held.next()
        assert left is not None
        held.add(left, PROXY)  # by the mode now, for ever
        held.add(request(6, device=device), PROXY, rule.treatment)
        wait_until(lambda: bool(device.replies))
        assert device.replies == [(6, errno.EIO)] and uniques(held) == [4]
        held.end()


class TestWatches:
    def test_counts_those_that_wait_and_that_come(self) -> None:
        held = table(request(2), request(4, body=b"other\0"))
        enough = threading.Event()
        watch = held.watch(Matcher(RequestFilter(path="na*")), 3, enough.set)
        held.add(request(6), STUB)
        held.take(6)
        held.add(request(8), STUB)
        assert watch.found == {2, 8} and not enough.is_set()
        held.add(request(10), STUB)
        assert enough.is_set()
        held.unwatch(watch)
        held.add(request(12), STUB)
        assert watch.found == {2, 8, 10}

    def test_there_already(self) -> None:
        enough = threading.Event()
        table(request(2)).watch(Matcher(RequestFilter()), 1, enough.set)
        assert enough.is_set()

    def test_the_end_wakes(self) -> None:
        held, woken = table(), threading.Event()
        held.watch(Matcher(RequestFilter()), 1, woken.set)
        held.end()
        assert woken.is_set() and held.has_ended()


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


def test_readers_that_are_gone() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    held, ended = {2: os.getpid(), 4: gone.pid, 6: 0}, []

    def end(unique: int) -> None:
        ended.append(unique)
        del held[unique]

    interrupts = Interrupts(lambda unique: False, end, lambda: dict(held))
    assert interrupts.look_at_readers() and interrupts.look_at_readers()
    assert ended == [4]
    held.clear()
    assert not interrupts.look_at_readers()


def test_readers_that_are_to_die() -> None:
    """Of a signal that dumps core: the kernel does not end the wait for a page."""
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        ended: List[int] = []
        interrupts = Interrupts(lambda unique: False, ended.append, lambda: {2: os.getpid(), 4: child, 6: 0})
        for _ in range(3):
            interrupts.look_at_signals_of_readers()
        assert ended == []
        os.kill(child, signal.SIGXCPU)  # dumps core, and pytest's fault handler leaves it alone
        for _ in range(3):
            interrupts.look_at_signals_of_readers()
        assert set(ended) == {4}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_is_handed_out_still_has_a_caller() -> None:
    """A signal may be announced at any moment, also between two tables."""
    table = HeldTable()
    held = request(2, tid=7)
    table.add(held, None)
    assert table.caller(2) == 7
    table.enter(object())
    table.reconsider()
    assert table.next() is held and table.caller(2) == 7 and len(table) == 0
    table.served(held)
    assert table.caller(2) is None


def test_who_was_ignored_is_looked_at_again() -> None:
    waiting, ended = {2: os.getpid(), 4: os.getpid()}, []
    interrupts = Interrupts(lambda unique: unique in waiting, ended.append, dict)
    for unique, tid in waiting.items():
        interrupts.interrupt(unique, tid)  # nothing fatal is pending in this very process
    interrupts.interrupt(6, 0)
    assert ended == [6]
    del waiting[2]
    interrupts.look()
    interrupts.look()
    assert ended == [6]
