"""Several who move processes at the same time: one after the other, and none is in another one's way."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Iterator, Tuple

import pytest
from surgery_kit import Mounts, Victim, mounts, tasks_stopped, victim
from test_surgery_connections import client, everywhere, meet, server
from test_surgery_freezers import cgroup, enter, state
from test_surgery_sockets import can_be_listed, covered, over

from spfs.errors import SpfsError
from spfs.freezer import open_freezer
from spfs.linux import mountapi, procfs
from spfs.surgery import turns
from spfs.switch import SwitchReport

__all__ = ["can_be_listed", "cgroup", "client", "covered", "mounts", "server", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


Work = Callable[[Callable[[], None]], object]


class Other:
    """Somebody else's process that does something and stands still in the middle of it until it is told to go on."""

    def __init__(self, work: Work) -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(60)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self._ours.close()

                def pause() -> None:
                    theirs.send(b"here")
                    theirs.recv(1)

                work(pause)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        assert self._ours.recv(4) == b"here"

    def go_on(self) -> None:
        """To its end, which is a good one."""
        self._ours.close()
        assert self._reap() == 0

    def kill(self) -> None:
        self._ours.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> int:
        pid, self.pid = self.pid, 0
        return os.waitpid(pid, 0)[1]


Begin = Callable[[Work], Other]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Makes others; those who are left in the end are killed."""
    made = []

    def make(work: Work) -> Other:
        made.append(Other(work))
        return made[-1]

    yield make
    for other in made:
        other.kill()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Tuple[Mounts, Mounts]]:
    """A file "f" on each of two pairs of mounts."""
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(Mounts(tmp_path / name))
        made[-1].file("f")
    yield made[0], made[1]
    for one in made:
        one.close()


def hold_both(two: Tuple[Mounts, Mounts], victim: Victim) -> None:
    for name, one in zip("ab", two):
        victim.run(f"import os; {name} = os.open({str(one.old / 'f')!r}, os.O_RDONLY)")


def holds(victim: Victim) -> Any:
    return victim.run("[os.pread(fd, 3, 0) for fd in (a, b)]")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set as soon as somebody in this process waits for his turn."""
    event = threading.Event()

    class Time:
        from time import monotonic

        monotonic = staticmethod(monotonic)

        @staticmethod
        def sleep(seconds: float) -> None:
            event.set()
            threading.Event().wait(seconds)

    monkeypatch.setattr(turns, "time", Time)
    return event


def meanwhile(waits: threading.Event, work: Callable[[], SwitchReport], action: Callable[[], object]) -> SwitchReport:
    """The outcome of ``work``, which has to wait: then ``action`` is done."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        assert waits.wait(30) and not future.done()
        action()
        return future.result(30)


def test_the_copies_of_one_who_has_prepared_are_nobody_s(
    covered: Mounts, server: Victim, client: Victim, begin: Begin
) -> None:
    """He waits for his file system. Meanwhile a connection goes that he has copies of, and his own processes stay."""
    meet(covered, server, client)
    covered.keep_roots()
    other = begin(lambda pause: covered.switch(between=pause))
    assert everywhere(covered.switch(when_stopped=over(covered)), 2)
    other.go_on()
    client.run("end.send(b'over there')")
    assert server.run("end.recv(99)") == b"over there" and covered.users() == []


def test_a_process_that_another_one_has_stopped_is_waited_for(
    two: Tuple[Mounts, Mounts], victim: Victim, waits: threading.Event, begin: Begin
) -> None:
    """Else strict would refuse what is traced, and without it that would be left."""
    hold_both(two, victim)
    other = begin(lambda pause: two[0].switch(when_stopped=pause))
    report = meanwhile(waits, lambda: two[1].switch(strict=True), other.go_on)
    assert (report.moved, report.left, report.rounds) == ({"file": 1}, [], 1)
    assert holds(victim) == [b"new", b"new"]


def test_one_who_is_killed_gives_his_turn_back(
    two: Tuple[Mounts, Mounts], victim: Victim, waits: threading.Event, begin: Begin
) -> None:
    hold_both(two, victim)
    other = begin(lambda pause: two[0].switch(when_stopped=pause))
    report = meanwhile(waits, lambda: two[1].switch(strict=True), other.kill)
    assert report.left == [] and holds(victim) == [b"old", b"new"] and tasks_stopped(victim.pid) == []
    assert two[0].switch().left == [] and holds(victim) == [b"new", b"new"]


def test_a_cgroup_that_another_one_has_frozen_is_not_given_back_frozen(
    two: Tuple[Mounts, Mounts], cgroup: Path, waits: threading.Event, begin: Begin
) -> None:
    """It is as long as he wants it to be. Killed, his guard thaws it before the next one has his turn."""
    victim = Victim()
    try:
        enter(cgroup, victim)
        before = state(cgroup)
        hold_both(two, victim)
        for end in (Other.go_on, Other.kill):
            other = begin(lambda pause: frozen(two[0], cgroup, pause))
            assert state(cgroup) != before
            report = meanwhile(waits, lambda: two[1].switch(freezer=open_freezer(str(cgroup))), lambda: end(other))
            assert report.left == [] and state(cgroup) == before
            waits.clear()
            two[1].reverse()
        assert victim.run("os.pread(a, 3, 0)") == b"new"
    finally:
        victim.close()


def frozen(mounts: Mounts, cgroup: Path, pause: Callable[[], None]) -> None:
    freezer = open_freezer(str(cgroup))
    freeze = freezer.freeze

    def slow(timeout: float) -> None:
        freeze(timeout)
        pause()

    setattr(freezer, "freeze", slow)
    mounts.switch(freezer=freezer)


def test_whoever_does_not_come_to_an_end_is_named(
    two: Tuple[Mounts, Mounts], victim: Victim, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_both(two, victim)
    other = begin(lambda pause: two[0].switch(when_stopped=pause))
    monkeypatch.setattr(turns, "LIMIT", 0.1)
    with pytest.raises(SpfsError, match=rf"process {other.pid} \(.*\) has been at it for more than 0.1 s"):
        two[1].switch()
    other.go_on()
    assert two[1].switch().left == [] and holds(victim) == [b"new", b"new"]


def test_who_is_told_to_give_up_waits_no_longer(
    two: Tuple[Mounts, Mounts], victim: Victim, begin: Begin
) -> None:
    hold_both(two, victim)
    other = begin(lambda pause: two[0].switch(when_stopped=pause))
    turn = turns.Turn()
    with closing(turn), pytest.raises(SpfsError, match="told to give up") as caught, turn.taken(lambda: True):
        pass
    assert caught.value.errno == errno.ECANCELED
    other.go_on()


def test_without_debugfs_the_turn_is_the_user_namespace_s(
    two: Tuple[Mounts, Mounts],
    victim: Victim,
    waits: threading.Event,
    begin: Begin,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the kernel has none, or for root of a user namespace."""
    fsopen = mountapi.fsopen

    def refuse(fstype: str) -> int:
        if fstype == "debugfs":
            raise PermissionError(1, "Operation not permitted")
        return fsopen(fstype)

    turns._debugfs_root.cache_clear()
    monkeypatch.setattr(mountapi, "fsopen", refuse)
    try:
        hold_both(two, victim)
        other = begin(lambda pause: two[0].switch(when_stopped=pause))
        report = meanwhile(waits, lambda: two[1].switch(strict=True), other.go_on)
        assert report.left == [] and holds(victim) == [b"new", b"new"] and 1 not in turns.others()
    finally:
        turns._debugfs_root.cache_clear()


def test_nothing_is_left_of_a_turn() -> None:
    before = os.listdir("/proc/self/fd"), Path("/proc/self/mountinfo").read_text()
    turn = turns.Turn()
    with turn.taken():
        assert [pid for pid in procfs.processes() if pid in turns.others()] == []  # not we ourselves
    turn.close()
    assert (os.listdir("/proc/self/fd"), Path("/proc/self/mountinfo").read_text()) == before
    assert os.getpid() not in turns._lockers(turns._debugfs_root() or os.stat("/"), b"POSIX")
