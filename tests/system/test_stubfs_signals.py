"""Signals to processes that wait for a held request: only the fatal ones end the wait."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator, List

import pytest
from stubfs_kit import Filesystem, Process, mounted, wait_until

from spfs.testing import process_state
from stubfs.client import FilesystemClient
from stubfs.messages import HeldRequest
from stubfs.rules import Rule

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
_PTRACE_DETACH, _PTRACE_SEIZE, _PTRACE_INTERRUPT = 17, 0x4206, 0x4207


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path) as filesystem:
        (filesystem.path / "f").write_text("staging")
        (filesystem.real / "f").write_text("real")
        filesystem.client.mode("stub")
        yield filesystem


def waiting(fs: Filesystem) -> List[HeldRequest]:
    """What processes wait for. A RELEASE of restore mode that the loop read late is held, too, and nobody waits."""
    return [item for item in fs.client.held() if item.tid]


class Reader(Process):
    """A process that waits. ``request``: the one it waits for, by its unique number."""

    request = 0


def reader(fs: Filesystem, prepare: object = None) -> Reader:
    """A process that is blocked in an open; its result is what it then read."""

    def read() -> str:
        if prepare is not None:
            prepare()  # type: ignore[operator]
        return (fs.path / "f").read_text()

    held = len(waiting(fs))
    process = Reader(read)
    fs.processes.append(process)
    fs.wait_held(held + 1)
    (process.request,) = [item.unique for item in waiting(fs) if item.pid == process.pid]
    return process


def must_go_on(fs: Filesystem, process: Reader) -> None:
    """The wait has not ended, and ends well. It is the same wait: Python asks again after an EINTR (PEP 475)."""
    assert not process.finished(0.7)  # longer than it takes to be looked at again
    assert [(item.pid, item.unique) for item in waiting(fs)] == [(process.pid, process.request)]
    fs.proxy()
    assert process.result() == "real"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1,
                                    signal.SIGQUIT, signal.SIGABRT, signal.SIGSEGV])  # fmt: skip
def test_a_fatal_signal_ends_the_wait_at_once(fs: Filesystem, number: int) -> None:
    def prepare() -> None:
        faulthandler.disable()  # pytest's, which handles some of them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = reader(fs, prepare)
    process.kill(number)
    assert os.WTERMSIG(process.wait(3)) == number
    assert waiting(fs) == []


def test_several_ended_at_once_and_others_go_on(fs: Filesystem) -> None:
    processes = [reader(fs) for _ in range(10)]
    for process in processes[::2]:
        process.kill()
    for process in processes[::2]:
        process.wait(3)
    assert sorted(item.pid for item in waiting(fs)) == sorted(process.pid for process in processes[1::2])
    fs.proxy()
    assert [process.result() for process in processes[1::2]] == ["real"] * 5


def handled() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)


def test_a_handled_signal_waits_with_the_process(fs: Filesystem) -> None:
    process = reader(fs, handled)
    for _ in range(3):
        process.kill(signal.SIGUSR1)
    must_go_on(fs, process)


def test_an_ignored_and_a_blocked_signal(fs: Filesystem) -> None:
    def prepare() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGQUIT])

    process = reader(fs, prepare)
    process.kill(signal.SIGUSR1)
    process.kill(signal.SIGTERM)
    process.kill(signal.SIGQUIT)
    must_go_on(fs, process)


def test_killed_after_a_signal_that_was_ignored(fs: Filesystem) -> None:
    process = reader(fs, handled)
    process.kill(signal.SIGUSR1)
    time.sleep(0.1)  # not waited for: that the file system has seen, and ignored, it
    start = time.monotonic()
    process.kill()
    process.wait(3)
    assert time.monotonic() - start < 1.0
    assert waiting(fs) == []


def test_stop_and_continue(fs: Filesystem) -> None:
    process = reader(fs)
    process.kill(signal.SIGTSTP)
    process.kill(signal.SIGCONT)
    process.kill(signal.SIGSTOP)
    process.kill(signal.SIGCONT)
    must_go_on(fs, process)


def test_ptrace_attach_and_detach(fs: Filesystem) -> None:
    process = reader(fs)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    assert libc.ptrace(_PTRACE_SEIZE, process.pid, None, None) == 0
    assert libc.ptrace(_PTRACE_INTERRUPT, process.pid, None, None) == 0
    assert not process.finished(0.7)
    assert [item.unique for item in waiting(fs)] == [process.request]
    fs.proxy()
    # Let go by the file system, it stops for us at last.
    wait_until(lambda: os.waitpid(process.pid, os.WNOHANG | 0x40000000)[0] == process.pid, 5)
    assert libc.ptrace(_PTRACE_DETACH, process.pid, None, None) == 0
    assert process.result() == "real"


def test_a_tracer_that_goes_away(fs: Filesystem) -> None:
    process = reader(fs)

    def trace() -> None:
        libc = ctypes.CDLL(None)
        libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        assert libc.ptrace(_PTRACE_SEIZE, process.pid, None, None) == 0
        assert libc.ptrace(_PTRACE_INTERRUPT, process.pid, None, None) == 0

    fs.run(trace).wait()  # by its end it lets go
    must_go_on(fs, process)


def freezer(version: int) -> Path:
    top = Path("/sys/fs/cgroup/freezer" if version == 1 else "/sys/fs/cgroup/unified")
    if version == 2 and not top.is_dir():
        top = Path("/sys/fs/cgroup")
    path = top / f"spfs-test-{os.getpid()}-stubfs"
    path.mkdir()
    return path


VERSIONS = [pytest.param(1, marks=pytest.mark.needs_cgroup1), pytest.param(2, marks=pytest.mark.needs_cgroup2)]


@contextmanager
def frozen_and_thawed(fs: Filesystem, version: int) -> Iterator[Reader]:
    """A process that waits, and that was told to freeze in between, which it cannot do while it waits."""
    path = freezer(version)
    control, freeze, thaw, state = (
        (path / "freezer.state", "FROZEN", "THAWED", path / "freezer.state") if version == 1
        else (path / "cgroup.freeze", "1", "0", path / "cgroup.events")
    )  # fmt: skip
    process = reader(fs)
    try:
        (path / "cgroup.procs").write_text(str(process.pid))
        control.write_text(freeze)
        assert not process.finished(0.7)
        assert state.read_text().strip() in ("FREEZING", "populated 1\nfrozen 0"), "who waits cannot be frozen"
        control.write_text(thaw)
        yield process
    finally:
        control.write_text(thaw)
        process.close()
        wait_until(lambda: not (path / "cgroup.procs").read_text(), 5)
        path.rmdir()


@pytest.mark.parametrize("version", VERSIONS)
def test_freeze_and_thaw(fs: Filesystem, version: int) -> None:
    with frozen_and_thawed(fs, version) as process:
        must_go_on(fs, process)
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("version", VERSIONS)
def test_killed_within_a_second_after_freeze_and_thaw(fs: Filesystem, version: int, number: int) -> None:
    """The freezer's fake signal has used up the kernel's only announcement."""
    with frozen_and_thawed(fs, version) as process:
        start = time.monotonic()
        process.kill(number)
        process.wait(3)
        assert time.monotonic() - start < 1.0
    assert waiting(fs) == []


def test_killed_after_freeze_and_thaw(fs: Filesystem) -> None:
    """A fake signal has used up the kernel's only announcement: the later one is found all the same."""
    process = reader(fs)
    process.kill(signal.SIGSTOP)
    process.kill(signal.SIGCONT)
    process.kill()
    process.wait(3)


def test_killed_while_all_that_waits_is_looked_at_anew(fs: Filesystem) -> None:
    """Between two tables, and held once more: the kernel's only announcement comes at any moment."""
    waiting_ones = [fs.run((fs.path / f"none{i}").exists) for i in range(30)]
    fs.wait_held(1)
    ended = threading.Event()

    def change() -> None:
        with FilesystemClient(fs.socket_path, 20) as client:
            while not ended.is_set():
                client.set_rules([Rule("delay", seconds=0.001)])
                client.set_rules([])

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(20):
            process = fs.run(partial(os.stat, fs.path / "f"))
            wait_until(lambda: fs.client.held(pids=[process.pid]), 10)
            process.kill()
            process.wait(10)
    finally:
        ended.set()
        changing.join()
    assert {item.pid for item in waiting(fs)} <= {process.pid for process in waiting_ones}
    fs.proxy()
    assert [process.result() for process in waiting_ones] == [False] * 30


def test_a_killed_process_leaves_no_handle(fs: Filesystem) -> None:
    fs.client.mode("restore")

    def hold_and_wait() -> None:
        with open(fs.path / "f", "r+") as file:
            file.write("x")
            signal.pause()

    process = fs.run(hold_and_wait)
    wait_until(lambda: len(fs.client.handles()) == 1 and process_state(process.pid) == "S", 5)
    fs.client.mode("stub")
    process.kill()
    process.wait(3)
    fs.proxy()
    wait_until(lambda: not fs.client.handles() and not fs.client.held(), 5)
