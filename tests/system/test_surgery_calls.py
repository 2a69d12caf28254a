"""Whatever system call a process waits in, it goes on: no early return, no time lost, signals as without us."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Dict, Iterable, Iterator, Tuple

import pytest
from surgery_kit import Mounts, compile_c

from spfs.freezer import open_freezer
from spfs.surgery import waits
from spfs.testing import process_state, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

SOURCE = Path(__file__).with_name("blocker.c").read_text()

TIMED = {  # what each gives when its time is over: result and errno
    "nanosleep": (0, 0),
    "clock_nanosleep": (0, 0),
    "select": (0, 0),
    "ppoll": (0, 0),
    "futex": (-1, 110),
    "epoll_pwait": (0, 0),
    "epoll_pwait2": (0, 0),
    "sigtimedwait": (-1, 11),
    "semtimedop": (-1, 11),
    "io_getevents": (0, 0),
    "io_pgetevents": (0, 0),
    "io_uring_enter": (-1, 62),
}
ENDLESS = [
    *("read", "write", "eventfd", "recvfrom", "accept4", "wait4", "waitid", "flock", "fcntl", "msgrcv", "semop"),
    *("semtimedop", "mq_timedreceive", "sigtimedwait", "select", "select_mask", "ppoll", "ppoll_mask"),
    *("epoll_pwait", "epoll_pwait2", "futex", "io_getevents", "io_pgetevents", "io_uring_enter"),
    *("msgsnd", "recvmmsg", "sendto", "connect"),
]
if os.uname().machine == "x86_64":
    TIMED.update({"poll": (0, 0), "epoll_wait": (0, 0), "old select": (0, 0)})
    ENDLESS += ["poll", "epoll_wait", "old select"]
# With SO_RCVTIMEO and SO_SNDTIMEO.
SOCKETS = [f"timed {call}" for call in ("recvfrom", "recvmmsg", "read", "accept4", "sendto", "connect")]
UNTIL_SIGNALLED = ["pause", "sigsuspend"] if os.uname().machine == "x86_64" else ["sigsuspend"]

# Calls that a handler with SA_RESTART lets go on (signal(7)).
RESTARTED = ["read", "write", "eventfd", "recvfrom", "accept4", "wait4", "waitid", "flock", "fcntl", "futex"]
RESTARTED += ["mq_timedreceive"]

EINTR = 4
TIME = 3000  # ms that the timed calls wait
HELD = 2.0  # s of it during which the processes stand still


@dataclass(frozen=True)
class Outcome:
    """How a call has ended, by the program's own account."""

    result: int
    errno: int
    handled: int
    milliseconds: int
    contents: str


class Blocked:
    """The program, which waits in ``call`` for ``milliseconds`` (-1: endlessly)."""

    def __init__(self, program: str, mounts: Mounts, call: str, milliseconds: int = -1, restart: bool = False) -> None:
        self.process = subprocess.Popen(
            [program, str(mounts.old / "f"), call, str(int(restart)), str(milliseconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        self.is_known = words[0] == "ready"
        if self.is_known:
            wait_until(lambda: self._waits_in(words[1]), what=f"{call} to block")

    def _waits_in(self, number: str) -> bool:
        call = Path(f"/proc/{self.process.pid}/syscall").read_text().split()
        return call[0] == number and process_state(self.process.pid) == "S"

    def end(self, byte: bool = False) -> Outcome:
        """Let it end, by itself or with what it waits for, and what it then says."""
        if byte:
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):  # a signal was the end of it already
                os.write(self.process.stdin.fileno(), b"x")
        assert self.process.stdout is not None
        result, number, handled, spent, contents = self.process.stdout.readline().split()
        assert self.process.wait(10) == 0
        return Outcome(int(result), int(number), int(handled), int(spent), contents)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_c(tmp_path_factory.mktemp("blocker"), SOURCE, "-Wno-unused-result")


@pytest.fixture(scope="module")
def static_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_c(tmp_path_factory.mktemp("static"), SOURCE, "-Wno-unused-result", "-static")


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    mounts.file("f")
    yield mounts
    mounts.close()


@pytest.fixture
def blocked(mounts: Mounts) -> "Iterator[Start]":
    with ExitStack() as stack:
        yield Start(mounts, stack)


class Start:
    """Starts programs, one for each call; the test's end is theirs."""

    def __init__(self, mounts: Mounts, stack: ExitStack) -> None:
        self._mounts, self._stack = mounts, stack

    def __call__(
        self, program: str, calls: Iterable[str], milliseconds: int = -1, restart: bool = False
    ) -> Dict[str, Blocked]:
        found = {}
        for call in calls:
            one = Blocked(program, self._mounts, call, milliseconds, restart)
            self._stack.callback(one.close)
            if one.is_known:  # io_uring, for one, can be switched off
                found[call] = one
        assert len(found) > 0
        return found


def check_times(mounts: Mounts, processes: Dict[str, Blocked], **options: object) -> None:
    # The time that must not be lost, nor shorten the wait.
    report = mounts.switch(when_stopped=partial(time.sleep, HELD), **options)
    assert report.moved == {"file": len(processes)} and report.left == []
    outcomes = {call: process.end() for call, process in processes.items()}
    for call, outcome in outcomes.items():
        assert (call, outcome.result, outcome.errno) == (call, *TIMED[call])
        assert (outcome.handled, outcome.contents) == (0, "new")
        assert outcome.milliseconds >= TIME - 1, call
        assert outcome.milliseconds < TIME + 1000 * HELD - 100, (call, "the standstill was added to its time")


def test_timed_calls_take_their_time(mounts: Mounts, blocked: Start, program: str) -> None:
    check_times(mounts, blocked(program, TIMED, TIME))


@pytest.mark.parametrize(
    "top", [pytest.param(top, marks=getattr(pytest.mark, mark)) for top, mark in (
        ("/sys/fs/cgroup/freezer", "needs_cgroup1"),
        ("/sys/fs/cgroup/unified" if os.path.isdir("/sys/fs/cgroup/unified") else "/sys/fs/cgroup", "needs_cgroup2"),
    )], ids=["v1", "v2"],
)  # fmt: skip
def test_timed_calls_of_frozen_processes(mounts: Mounts, blocked: Start, program: str, top: str) -> None:
    """The freezer itself ends those calls, before we come."""
    path = Path(top, f"spfs-test-{os.getpid()}-calls")
    path.mkdir()
    try:
        processes = blocked(program, TIMED, TIME)
        for process in processes.values():
            (path / "cgroup.procs").write_text(str(process.process.pid))
        with open_freezer(str(path)) as freezer:
            check_times(mounts, processes, freezer=freezer)
    finally:
        for process in processes.values():
            process.close()
        wait_until(lambda: not (path / "cgroup.procs").read_text(), 5)
        path.rmdir()


def test_timed_calls_of_threads_that_do_nothing_for_us(mounts: Mounts, tmp_path: Path) -> None:
    """Of a process only one task is operated on; the others are stopped all the same."""
    program = compile_c(tmp_path, THREADS, "-pthread", "-Wno-unused-result")
    with subprocess.Popen([program, str(mounts.old / "f")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        wait_until(lambda: all(process_state(int(tid)) == "S" for tid in os.listdir(f"/proc/{process.pid}/task")))
        assert mounts.switch(when_stopped=lambda: time.sleep(0.3)).moved == {"file": 1}
        assert process.stdout.read() == "new 0 early 0 interrupted\n"
        assert process.wait(10) == 0


THREADS = r"""
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

static int early, interrupted;
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }

static void *wait_for_time(void *which)
{
    struct epoll_event event;
    struct timespec limit = { 1, 0 };
    sigset_t set;
    double begin = now();
    int result;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    if (which) result = epoll_wait(epoll_create1(0), &event, 1, 1000);
    else result = sigtimedwait(&set, NULL, &limit);
    if (result < 0 && errno == EINTR) __atomic_fetch_add(&interrupted, 1, __ATOMIC_SEQ_CST);
    if (now() - begin < 1) __atomic_fetch_add(&early, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[10];
    char contents[4] = "";
    int fd = open(argv[1], O_RDONLY);
    puts("ready");
    fflush(stdout);
    for (long i = 0; i < 10; i++) pthread_create(&threads[i], NULL, wait_for_time, (void *)(i % 2));
    for (int i = 0; i < 10; i++) pthread_join(threads[i], NULL);
    read(fd, contents, 3);
    printf("%s %d early %d interrupted\n", contents, early, interrupted);
    return 0;
}
"""


def test_timed_calls_whose_begin_is_not_known(
    mounts: Mounts, blocked: Start, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the scheduler does not tell, they end as after any stop: at least not as if their time was over."""

    def nothing(path: str) -> Tuple[int, int]:
        raise ValueError(path)

    monkeypatch.setattr(waits, "_schedule", nothing)
    calls = ["epoll_pwait", "sigtimedwait", "semtimedop", "futex"]
    processes = blocked(program, calls, TIME)
    mounts.switch()
    assert {call: process.end().errno for call, process in processes.items()} == {
        **dict.fromkeys(calls, EINTR),
        "futex": 110,  # the kernel's own business
    }


def test_endless_calls_go_on(mounts: Mounts, blocked: Start, program: str) -> None:
    processes = blocked(program, ENDLESS)
    for _ in range(2):
        mounts.switch()
    assert [call for call, process in processes.items() if process.process.poll() is not None] == []
    for call, process in processes.items():
        outcome = process.end(byte=True)
        assert outcome.result >= 0 and (call, outcome.errno, outcome.handled) == (call, 0, 0)
        assert outcome.contents == "new"


def signalled(mounts: Mounts, processes: Dict[str, Blocked]) -> Dict[str, Tuple[int, int]]:
    """Send a signal to all during the blackout: errno and runs of the handler by call."""

    def send() -> None:
        for process in processes.values():
            os.kill(process.process.pid, signal.SIGUSR1)

    report = mounts.switch(when_stopped=send)
    assert report.left == [] and mounts.users() == []
    found = {}
    for call, process in processes.items():
        outcome = process.end(byte=True)
        assert outcome.contents == "new" and outcome.milliseconds < 500000
        found[call] = outcome.errno, outcome.handled
    return found


def test_signal_during_the_blackout(mounts: Mounts, blocked: Start, program: str) -> None:
    """Its handler runs once, and the call ends as it does without us: with EINTR."""
    processes = blocked(program, [*UNTIL_SIGNALLED, *ENDLESS])
    assert signalled(mounts, processes) == {call: (EINTR, 1) for call in processes}


def test_signal_during_the_blackout_of_a_timed_call(mounts: Mounts, blocked: Start, program: str) -> None:
    processes = blocked(program, TIMED, 600000)
    assert signalled(mounts, processes) == {call: (EINTR, 1) for call in processes}


def test_restarted_after_a_signal(mounts: Mounts, blocked: Start, program: str) -> None:
    processes = blocked(program, RESTARTED, restart=True)
    assert signalled(mounts, processes) == {call: (0, 1) for call in processes}


def test_static_program(mounts: Mounts, blocked: Start, static_program: str) -> None:
    processes = blocked(static_program, ENDLESS)
    assert mounts.switch().moved == {"file": len(processes)}
    assert {call: process.end(byte=True).contents for call, process in processes.items()} == dict.fromkeys(
        processes, "new"
    )


def test_sockets_with_a_time_limit_of_their_own(mounts: Mounts, blocked: Start, program: str) -> None:
    """They go on, and wait for what they waited for."""
    processes = blocked(program, SOCKETS, 600000)
    for _ in range(2):
        mounts.switch()
    outcomes = {call: process.end(byte=True) for call, process in processes.items()}
    assert {call: (outcome.errno, outcome.handled) for call, outcome in outcomes.items()} == dict.fromkeys(
        SOCKETS, (0, 0)
    )


def test_time_limit_of_a_socket(mounts: Mounts, blocked: Start, program: str) -> None:
    """It is kept, and counts anew from the standstill."""
    processes = blocked(program, SOCKETS, TIME)
    mounts.switch()
    for call, process in processes.items():
        outcome = process.end()
        assert (call, outcome.errno, outcome.contents) == (call, 11, "new")
        assert outcome.milliseconds >= TIME - 1


def test_signal_during_the_blackout_of_a_socket(mounts: Mounts, blocked: Start, program: str) -> None:
    """Never restarted, whatever the handler's SA_RESTART says (signal(7))."""
    processes = blocked(program, SOCKETS, 600000, restart=True)
    assert signalled(mounts, processes) == {call: (EINTR, 1) for call in processes}
