"""The one who operates is killed, at each stage; who is operated on is killed or ends: nobody stays behind."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from surgery_kit import Mounts, Victim, compile_c, tasks_stopped, traced

from spfs.linux import ptrace
from spfs.linux.x86_64 import X86_64
from spfs.surgery import compare, execution, operation, theatre
from spfs.testing import process_state, wait_until
from spfs.tracee import Tracee

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    for number in range(20):
        mounts.file(f"f{number}")
    yield mounts
    mounts.close()


@pytest.fixture
def victim(mounts: Mounts) -> Iterator[Victim]:
    victim = Victim()
    victim.run(
        f"""
import os, signal, threading, time
os.chdir({str(mounts.old)!r})
fds = [os.open(f'f{{n}}', os.O_RDONLY) for n in range(20)]
go, ticks = threading.Event(), []
def tick():
    while not go.is_set():
        ticks.append(os.pread(fds[0], 3, 0)); time.sleep(0.001)
threads = [threading.Thread(target=go.wait), threading.Thread(target=tick)]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
[t.start() for t in threads]
def masks():
    return [l for l in open('/proc/self/task/%d/status' % os.getpid()) if l.startswith(('SigBlk', 'SigCgt'))]
"""
    )
    yield victim
    victim.run("go.set(); [t.join() for t in threads]")
    victim.close()


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_after_start(run: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(self: Tracee, *arguments: Any, **options: Any) -> Any:
        script = run(self, *arguments, **options)
        yield next(script)  # the table is being run, and its end has not been heard of
        die()

    return replacement


def dies_at(wait: int) -> Callable[..., Any]:
    """A replacement of Tracee._until that kills at its n-th call: within the calls made by borrowed instructions."""
    until, count = Tracee._until, [0]

    def replacement(self: Tracee, expected: Any) -> Any:
        count[0] += 1
        if count[0] == wait:
            die()
        yield from until(self, expected)
        if count[0] == wait - 20:
            die()

    return replacement


STAGES: Dict[str, Callable[[], Dict[str, Any]]] = {
    "seized": lambda: {"patch": (theatre.Theatre, "wait", die)},
    "stopped": lambda: {"patch": (compare.Comparison, "stale", die)},
    "mounts": lambda: {"when_stopped": die},
    "captured": lambda: {"patch": (Tracee, "open", die)},
    "running": lambda: {"patch": (Tracee, "run", dies_after_start(Tracee.run))},
    "done": lambda: {"patch": (operation.Operation, "_collect", die)},
    "closing": lambda: {"patch": (Tracee, "close", die)},
    # two for mmap, one behind socketpair, one at the end, two for munmap: before each stop, and after it
    **{f"wait {n}": lambda n=n: {"patch": (Tracee, "_until", dies_at(n))} for n in (*range(1, 7), *range(21, 27))},
    "restored": lambda: {"patch": (theatre.Theatre, "release", die)},
}


# Of a process that has handlers for what it could stop itself by: two for each of mmap, socketpair, close and munmap,
# one for the interrupt.
MORE_STAGES = {
    f"wait {n}": lambda n=n: {"patch": (Tracee, "_until", dies_at(n))} for n in (*range(1, 10), *range(21, 30))
}


def killed_surgeon(mounts: Mounts, stage: str) -> None:
    """Run a switch in a process that kills itself at ``stage``."""
    how = {**MORE_STAGES, **STAGES}[stage]()
    pid = os.fork()
    if pid == 0:
        try:
            patch = how.pop("patch", None)
            if patch is not None:
                setattr(*patch)
            mounts.switch(exclude={os.getppid()}, **how)  # which has the mounts' roots open
        finally:
            os._exit(1)  # not killed: the stage was not reached
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("stage", list(STAGES))
def test_killed_surgeon(mounts: Mounts, victim: Victim, stage: str) -> None:
    before = victim.run("masks()")
    victim.start("time.sleep(0.3)")  # blocked in a system call, as most processes are
    victim.blocked()
    killed_surgeon(mounts, stage)
    check_survivor(mounts, victim, before)


@pytest.mark.parametrize("stage", list(MORE_STAGES))
def test_killed_surgeon_of_one_with_handlers(mounts: Mounts, victim: Victim, stage: str) -> None:
    victim.run(
        "called = []\nfor number in (signal.SIGURG, signal.SIGWINCH):\n"
        " signal.signal(number, lambda *a: called.append(a))"
    )
    before = victim.run("masks()")
    victim.start("time.sleep(0.3)")
    victim.blocked()
    killed_surgeon(mounts, stage)
    check_survivor(mounts, victim, before)
    assert victim.run("called") == []


def check_survivor(mounts: Mounts, victim: Victim, before: List[str]) -> None:
    victim.result()
    assert tasks_stopped(victim.pid) == []
    assert victim.run("open('/proc/self/status').read().split('TracerPid:')[1].split()[0]") == "0"
    assert victim.run("masks()") == before
    count = victim.run("len(ticks)")
    wait_until(lambda: victim.run("len(ticks)") > count)
    contents: List[bytes] = victim.run("[os.pread(fd, 3, 0) for fd in fds]")
    assert len(set(contents)) == 1 and contents[0] in (b"old", b"new")
    report = mounts.switch()  # asked again, it completes
    assert report.left == [] and mounts.users() == []
    assert victim.run("set(os.pread(fd, 3, 0) for fd in fds), os.getcwd()") == ({b"new"}, str(mounts.new))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the registers of another architecture")
@pytest.mark.parametrize("stage", ["running", "wait 3"])
def test_killed_surgeon_without_xsave(
    mounts: Mounts, victim: Victim, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The frame of an old processor, which every processor takes; floating point numbers survive."""
    victim.run("stop = False\ndef add():\n total = 0.0\n while not stop: total += 1.5\n return total % 1.5")
    victim.run("sums = []\nadder = threading.Thread(target=lambda: sums.append(add()))\nadder.start()")
    read = ptrace.read_registers

    def without_xsave(tid: int, size: int, kind: int = 1) -> bytes:
        if kind == X86_64.state_kinds[0]:
            raise OSError(errno.ENODEV, "No such device")
        return read(tid, size, kind)

    monkeypatch.setattr(ptrace, "read_registers", without_xsave)
    killed_surgeon(mounts, stage)
    assert tasks_stopped(victim.pid) == []
    assert victim.run("stop = True; adder.join(); sums") == [0.0]
    assert mounts.switch().left == [] and mounts.users() == []


def test_killed_at_random_moments(mounts: Mounts, victim: Victim) -> None:
    """Thirty times while it operates on several processes at once: all of them live on, and the next one completes."""
    others = [Victim() for _ in range(5)]
    operate = execution.operate
    moments = random.Random(7)
    try:
        for other in others:
            other.run(f"import os; os.chdir({str(mounts.old)!r}); fds = [os.open(f'f{{n}}', 0) for n in range(20)]")
        for _ in range(30):
            moment = 0.0001 + 0.003 * moments.random()

            def timed(*arguments: Any) -> None:
                signal.setitimer(signal.ITIMER_REAL, moment)
                operate(*arguments)

            pid = os.fork()
            if pid == 0:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    setattr(execution, "operate", timed)
                    mounts.switch(exclude={os.getppid()})
                    signal.pause()
                finally:
                    os._exit(1)
            assert os.waitpid(pid, 0)[1] == signal.SIGALRM
            for process in (victim, *others):
                assert len(process.run("{os.pread(fd, 3, 0) for fd in fds}")) == 1
                assert tasks_stopped(process.pid) == []
            assert mounts.switch().left == [] and mounts.users() == []
            mounts.reverse()
    finally:
        for other in others:
            other.close()


def test_victim_killed_during_the_blackout(mounts: Mounts, victim: Victim) -> None:
    other = Victim()
    try:
        other.run(f"import os, signal; fd = os.open({str(mounts.old / 'f1')!r}, 0)")

        def kill() -> None:
            os.kill(other.pid, signal.SIGKILL)
            wait_until(lambda: process_state(other.pid) in ("Z", ""), 5)

        report = mounts.switch(when_stopped=kill)
        assert report.moved == {"file": 20, "cwd": 1} and report.left == []
        assert other.process.wait(5) == -signal.SIGKILL
        assert victim.run("os.pread(fds[3], 3, 0)") == b"new"
    finally:
        other.close()


def test_victim_killed_while_it_is_operated_on(
    mounts: Mounts, victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Victim()
    other.run(f"import os; fd = os.open({str(mounts.old / 'f1')!r}, 0)")
    run = Tracee.run

    def killing(self: Tracee, *arguments: Any, **options: Any) -> Any:
        if self.pid == other.pid:
            os.kill(other.pid, signal.SIGKILL)
        return run(self, *arguments, **options)

    monkeypatch.setattr(Tracee, "run", killing)
    try:
        report = mounts.switch()
        assert report.moved["file"] >= 20 and report.left == []
        assert other.process.wait(5) == -signal.SIGKILL
    finally:
        other.close()


def test_victim_ends_between(mounts: Mounts, victim: Victim) -> None:
    other = Victim()
    other.run(f"import os; fd = os.open({str(mounts.old / 'f1')!r}, 0)")
    _, report = mounts.prepared_switch(between=other.close)
    assert report.moved == {"file": 20, "cwd": 1} and report.left == []


def test_traced_by_somebody_else(mounts: Mounts, victim: Victim) -> None:
    """Left, with the tracer's name; moved when it is no longer traced."""
    with traced(victim.pid) as tracer:
        report = mounts.switch()
        assert report.moved == {} and len(report.left) == 21
        assert f"is traced by process {tracer} (python" in report.left[0].reason
        assert victim.run("os.pread(fds[0], 3, 0)") == b"old"
    assert mounts.switch().left == []


def test_files_of_one_who_cannot_go(mounts: Mounts, victim: Victim) -> None:
    """A file that is written or locked, or memory shared by it, stays whole; what both only read does not matter."""
    for name in ("f30", "f31", "f32", "f33"):
        mounts.file(name, b"old contents", b"new contents")
    paths = [str(mounts.old / name) for name in ("f30", "f31", "f32", "f33")]
    opening = f"""
read, written, locked, mapped = [os.open(path, flags) for path, flags in zip({paths!r}, [{{}}])]
memory = mmap.mmap(mapped, 12, prot={{}}); os.close(mapped)
"""
    other = Victim()
    try:
        other.run("import fcntl, mmap, os" + opening.format("0, 0, 0, 0", "mmap.PROT_READ"))
        victim.run("import fcntl, mmap" + opening.format("0, os.O_RDWR, 0, os.O_RDWR", "3"))
        victim.run("fcntl.flock(locked, fcntl.LOCK_SH)")
        with traced(victim.pid):
            report = mounts.switch()
            assert report.moved == {"file": 1}
            reasons = [left.reason for left in report.left if left.pid == other.pid]
            # The mapping, its descriptor that Python keeps, and two more.
            assert len(reasons) == 4 and all(f"process {victim.pid} " in why for why in reasons)
            assert other.run("os.read(read, 3), os.read(written, 3), memory[:3]") == (b"new", b"old", b"old")
            victim.run("memory[:3] = b'now'")
            assert other.run("memory[:3]") == b"now"
        # Who stood in the way when all was looked at may be gone when they stand still.
        with ExitStack() as stack:
            stack.enter_context(traced(victim.pid))
            _, report = mounts.prepared_switch(between=stack.close)
        assert report.left == [] and mounts.users() == []
        assert other.run("os.read(written, 3), memory[:3]") == (b" co", b"new")
    finally:
        other.close()


def fails_behind(run: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(self: Tracee, *arguments: Any, **options: Any) -> Any:
        yield from run(self, *arguments, **options)
        raise OSError(errno.EIO, "Input/output error")

    return replacement


def fails_before(run: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(self: Tracee, *arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")
        yield

    return replacement


def sends_nothing(run: Callable[..., Any]) -> Callable[..., Any]:
    """It waits for descriptors that do not come."""

    def replacement(self: Tracee, table: int, count: int, fds: Any = (), last: bool = False) -> Any:
        yield from run(self, table, count, (), last)

    return replacement


@pytest.mark.parametrize("how, moved, why", [
    (fails_behind, 20, ""),
    (fails_before, 0, "the process cannot be operated on: Input/output error"),
    (sends_nothing, 0, "the process cannot be operated on: the process did not get on"),
])  # fmt: skip
def test_failure_in_the_middle(
    mounts: Mounts,
    victim: Victim,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[..., Any],
    moved: int,
    why: str,
) -> None:
    """What was done is counted, what was not is reported, and asking again does the rest."""
    before = victim.run("masks()")
    with monkeypatch.context() as patch:
        patch.setattr(execution, "STEP_TIMEOUT", 0.3)
        patch.setattr(Tracee, "run", how(Tracee.run))
        report = mounts.switch()
    assert report.moved == ({"file": moved, "cwd": 1} if moved else {})
    assert len(report.left) == (0 if moved else 21) and {one.reason for one in report.left} <= {why}
    assert victim.run("sum(os.pread(fd, 3, 0) == b'new' for fd in fds)") == moved
    assert tasks_stopped(victim.pid) == [] and victim.run("masks()") == before
    report = mounts.switch()
    assert report.moved == ({} if moved else {"file": 20, "cwd": 1}) and report.left == []


def test_failure_of_the_mounts_changes_nothing(mounts: Mounts, victim: Victim) -> None:
    def fail() -> None:
        raise RuntimeError("no mount today")

    with pytest.raises(RuntimeError, match="no mount today"):
        mounts.switch(when_stopped=fail)
    assert tasks_stopped(victim.pid) == [] and victim.run("os.pread(fds[0], 3, 0)") == b"old"


VFORK = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    int fd = open(argv[1], O_RDONLY);
    char buffer[4] = "";
    write(1, "ready\n", 6);
    pid_t child = vfork();
    if (!child) { read(0, buffer, 1); _exit(0); }
    waitpid(child, NULL, 0);
    read(0, buffer, 1);
    pread(fd, buffer, 3, 0);
    write(1, buffer, 3);
    return 0;
}
"""
VFORK_FLAGS = ["-Wno-unused-result", "-Wno-deprecated-declarations"]


def test_vfork_parent(mounts: Mounts, tmp_path: Path) -> None:
    """A parent in vfork() cannot be stopped before its child lets go: reported, not waited for, and so is what the
    child shares with it; later it can."""
    program = compile_c(tmp_path, VFORK, *VFORK_FLAGS)
    with subprocess.Popen(
        [program, str(mounts.old / "f0")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        wait_until(lambda: process_state(process.pid) == "D")
        report = mounts.switch()
        assert report.moved == {}
        left, childs = sorted(report.left, key=lambda one: one.pid != process.pid)
        assert left.pid == process.pid and left.reason.startswith("it cannot be stopped")
        assert childs.reason.startswith(f"it is shared with process {process.pid} ")
        process.stdin.write(b"x")
        wait_until(lambda: process_state(process.pid) == "S")
        assert mounts.switch().moved == {"file": 1}
        assert mounts.users() == []
        process.stdin.write(b"x")
        assert process.stdout.read() == b"new" and process.wait(5) == 0


def test_vfork_parent_whose_child_goes_on(mounts: Mounts, tmp_path: Path) -> None:
    """The usual case: the child calls execve soon, and the parent is moved in the next round."""
    program = compile_c(tmp_path, VFORK, *VFORK_FLAGS)
    with subprocess.Popen(
        [program, str(mounts.old / "f0")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        wait_until(lambda: process_state(process.pid) == "D")
        report = mounts.switch(when_stopped=lambda: process.stdin.write(b"x") and None)
        assert report.left == [] and report.rounds == 2 and mounts.users() == []
        process.stdin.write(b"x")
        assert process.stdout.read() == b"new" and process.wait(5) == 0


def test_vfork_parent_that_is_killed(mounts: Mounts, victim: Victim, tmp_path: Path) -> None:
    """What another process had to keep for its sake goes in the next round."""
    program = compile_c(tmp_path, VFORK, *VFORK_FLAGS)
    path = mounts.file("f30")
    victim.run(f"written = os.open({path!r}, os.O_RDWR)")
    with subprocess.Popen(
        [program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        wait_until(lambda: process_state(process.pid) == "D")

        def kill() -> None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        report = mounts.switch(when_stopped=kill)
    assert report.left == [] and report.rounds == 2 and mounts.users() == []
    assert victim.run("os.read(written, 3)") == b"new"


def test_zombies_are_no_obstacle(mounts: Mounts, victim: Victim) -> None:
    zombie = victim.run("pid = os.fork()\nif not pid: os._exit(0)\npid")
    wait_until(lambda: process_state(zombie) == "Z")
    assert mounts.switch().left == []
    assert victim.run("os.waitpid(pid, 0)[1]") == 0
