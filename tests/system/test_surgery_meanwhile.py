"""References that come while processes are moved: by fork, by opening, from others. What was shared stays shared."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator

import pytest
from surgery_kit import Mounts, Victim, tasks_stopped

from spfs.linux import process, procfs
from spfs.testing import wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    made = Mounts(tmp_path)
    for name in ("file", "other"):
        made.file(name)
    yield made
    made.close()


@pytest.fixture
def victim(mounts: Mounts) -> Iterator[Victim]:
    made = Victim()
    made.run(f"import os, signal; os.chdir({str(mounts.old)!r}); top = os.open('.', os.O_RDONLY)")
    made.run("file = os.open('file', os.O_RDWR)")
    yield made
    made.close()


FORK = """
r, w = os.pipe()
child = os.fork()
if not child:
    os.close(w)
    os.read(r, 1)
    os._exit(os.lseek(file, 5, os.SEEK_CUR) if os.pread(file, 3, 0) == b"new" else 99)
child
"""


def test_a_child_that_was_forked_since_shares_what_its_parent_has(mounts: Mounts, victim: Victim) -> None:
    """Without a freezer it is found when its parent stands still, and moved with it."""
    _, report = mounts.prepared_switch(between=lambda: victim.run(FORK))
    assert report.left == [] and report.rounds == 1 and mounts.users() == []
    assert report.moved["file"] == 2
    assert victim.run("os.write(w, b'x'); os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])") == 5
    assert victim.run("os.lseek(file, 0, os.SEEK_CUR)") == 5  # one offset, as before


def test_children_of_children(mounts: Mounts, victim: Victim) -> None:
    victim.run(
        """
def fork(n):
    pid = os.fork()
    if not pid:
        n and fork(n - 1)
        signal.pause()
    return pid
"""
    )
    _, report = mounts.prepared_switch(between=lambda: victim.run("child = fork(3)"))
    assert report.left == [] and mounts.users() == [] and report.moved["file"] == 5
    victim.run("import psutil; [one.kill() for one in psutil.Process().children(recursive=True)]; os.wait()")


def test_a_process_that_forks_all_the_time(mounts: Mounts, victim: Victim) -> None:
    """However many there are, in the end nobody is left, or what is left is said to be."""
    victim.run(
        """
import threading
stop, wrong = threading.Event(), []
def forks():
    while not stop.is_set():
        pid = os.fork()
        if not pid:
            os._exit(os.pread(file, 3, 0) not in (b"old", b"new"))
        wrong.append(os.waitpid(pid, 0)[1])
thread = threading.Thread(target=forks)
thread.start()
"""
    )
    report = mounts.switch()
    count = victim.run("len(wrong)")
    wait_until(lambda: victim.run("len(wrong)") > count + 5, what="it to go on")
    victim.run("stop.set(); thread.join()")
    assert victim.run("set(wrong)") == {0}
    assert report.left == [] and mounts.users() == [] and tasks_stopped(victim.pid) == []


def test_what_is_opened_on_an_old_directory_meanwhile(mounts: Mounts, victim: Victim) -> None:
    _, report = mounts.prepared_switch(between=lambda: victim.run("late = os.open('other', os.O_RDONLY, dir_fd=top)"))
    assert report.left == [] and mounts.users() == []
    assert victim.run("os.pread(late, 3, 0)") == b"new"


TAKE = """
import ctypes, os
pidfd = os.pidfd_open({pid})
taken = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, {fd}, 0)  # pidfd_getfd
taken
"""


def test_a_description_that_another_process_gets_meanwhile_stays_shared(mounts: Mounts, victim: Victim) -> None:
    """It comes too late for the round of its owner, and in a round of its own gets what that one has by now."""
    other = Victim()
    try:
        fd = victim.run("file")
        victim.run("os.lseek(file, 3, os.SEEK_SET)")

        def take() -> None:
            assert other.run(TAKE.format(pid=victim.pid, fd=fd)) >= 0

        report = mounts.switch(when_stopped=take)
        assert report.left == [] and report.rounds == 2 and mounts.users() == []
        assert other.run("os.pread(taken, 3, 0)") == b"new" and other.run("os.lseek(taken, 4, os.SEEK_CUR)") == 7
        assert victim.run("os.lseek(file, 0, os.SEEK_CUR)") == 7
    finally:
        other.close()


def test_a_fifo_that_another_process_gets_meanwhile_has_its_bytes_once(mounts: Mounts, victim: Victim) -> None:
    mounts.both(lambda top: os.mkfifo(top / "fifo"))
    other = Victim()
    try:
        fd = victim.run("pipe = os.open('fifo', os.O_RDWR); os.write(pipe, b'once'); pipe")
        report = mounts.switch(when_stopped=lambda: other.run(TAKE.format(pid=victim.pid, fd=fd)) and None)
        assert report.left == [] and report.rounds == 2 and mounts.users() == []
        assert victim.run("os.set_blocking(pipe, False); os.read(pipe, 100)") == b"once"
        assert other.run("os.write(taken, b'twice')") == 5 and victim.run("os.read(pipe, 100)") == b"twice"
    finally:
        other.close()


def test_descriptors_that_travel_between_two_processes(mounts: Mounts) -> None:
    """One descriptor goes to and fro over a socket all the time: wherever it is, it is the same description."""
    victim = Victim()
    try:
        victim.run(
            f"""
import os, socket, threading
ours, theirs = socket.socketpair()
file = os.open({str(mounts.old / "file")!r}, os.O_RDWR)
child = os.fork()
if not child:
    ours.close(); os.close(file)
    while True:
        _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
        os.lseek(fd, 1, os.SEEK_CUR)
        socket.send_fds(theirs, [b"x"], [fd])
        os.close(fd)
rounds, stop = [], threading.Event()
def play():
    while not stop.is_set():
        before = os.lseek(file, 0, os.SEEK_CUR)
        socket.send_fds(ours, [b"x"], [file])
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        rounds.append(os.lseek(file, 0, os.SEEK_CUR) - before)
        os.close(fd)
thread = threading.Thread(target=play)
thread.start()
"""
        )
        report = mounts.switch()
        count = victim.run("len(rounds)")
        wait_until(lambda: victim.run("len(rounds)") > count + 5, what="them to go on")
        victim.run("stop.set(); thread.join()")
        assert report.left == [] and mounts.users() == []
        assert victim.run("set(rounds)") == {1} and victim.run("os.pread(file, 3, 0)") == b"new"
        victim.run("os.kill(child, 9); os.wait()")
    finally:
        victim.close()


@pytest.mark.parametrize("module, name", [(procfs, "read"), (process, "kcmp"), (process, "pidfd_getfd")])
def test_a_descriptor_that_is_closed_while_it_is_examined(
    mounts: Mounts, victim: Victim, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    """Nor is it a reason to fail, or to leave its process out: the next look at it finds nothing."""
    closing = victim.run("closing = os.open('file', os.O_RDONLY); closing")
    look = getattr(module, name)

    def closed_before(*arguments: Any) -> Any:
        if closing in arguments or f"/proc/{victim.pid}/fdinfo/{closing}" in arguments:
            monkeypatch.setattr(module, name, look)
            victim.run("os.close(closing)")
        return look(*arguments)

    monkeypatch.setattr(module, name, closed_before)
    preparation, report = mounts.prepared_switch()
    assert getattr(module, name) is look
    assert preparation.references == {"file": 1, "directory": 1, "cwd": 1} and preparation.left == []
    assert report.moved == preparation.references and report.left == [] and report.rounds == 1
