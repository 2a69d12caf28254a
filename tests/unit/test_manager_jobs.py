"""Jobs in forked children, and the loop that waits for them: results, errors, cancels, deaths."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from spfs import jobs
from spfs.errors import SpfsError
from spfs.eventloop import EventLoop
from spfs.jobs import Context, Outcome


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    before = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGUSR1)}
    made = EventLoop()
    yield made
    made.close()
    for number, handler in before.items():
        signal.signal(number, handler)


def finish(
    loop: EventLoop,
    work: Callable[[Context], None],
    during: Callable[[jobs.Job, str], None] = lambda job, stage: None,
    **keywords: Any,
) -> Tuple[Outcome, List[str]]:
    """Run the loop until a job with ``work`` has ended. ``during`` is called with each stage."""
    stages: List[str] = []
    outcomes: List[Outcome] = []

    def progress(stage: str, details: Dict[str, Any], when: float) -> None:
        stages.append(stage)
        during(job, stage)

    def ended(code: object) -> None:
        loop.stop()

    job = jobs.start("test", work, progress, **keywords)
    loop.watch(job.sock.fileno(), lambda: None if job.read() else loop.unwatch(job.sock.fileno()))
    loop.later(10, loop.stop)

    def before() -> None:
        loop.unwatch(job.sock.fileno())
        outcomes.append(job.finish())

    loop.on_process_end(job.pid, job.pidfd, ended, before)
    loop.run()
    (outcome,) = outcomes
    with pytest.raises(ProcessLookupError):
        os.kill(job.pid, 0)
    return outcome, stages


def test_a_result_with_descriptors(loop: EventLoop, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")

    def work(context: Context) -> None:
        context.progress("one", {"a": 1})
        context.deliver({"answer": 42}, [os.open(tmp_path / "file", os.O_RDONLY)])

    outcome, stages = finish(loop, work)
    assert (outcome.value, outcome.error, stages) == ({"answer": 42}, None, ["one"])
    with outcome.fds as fds:
        assert os.pread(fd := fds.steal(0), 10, 0) == b"here"
        os.close(fd)


def test_a_job_has_only_the_descriptors_that_it_is_given(loop: EventLoop) -> None:
    kept, other = socket.socketpair()

    def work(context: Context) -> None:
        context.deliver({"fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))})

    outcome, _ = finish(loop, work, keep=[kept.fileno()])
    assert kept.fileno() in outcome.value["fds"] and other.fileno() not in outcome.value["fds"]
    assert len(outcome.value["fds"]) < len(os.listdir("/proc/self/fd"))
    kept.close()
    other.close()


@pytest.mark.parametrize(
    "error, number, words",
    [
        (SpfsError("cannot x", "do y", errno.ENODEV), errno.ENODEV, "cannot x (do y)"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), errno.ENOENT, "cannot do the test: /x: No such file"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), errno.ECONNREFUSED, "refused"),
        (KeyError("k"), errno.EIO, "KeyError('k')"),
    ],
)
def test_errors_arrive_with_errno_and_words(loop: EventLoop, error: Exception, number: int, words: str) -> None:
    def work(context: Context) -> None:
        raise error

    outcome, _ = finish(loop, work)
    assert outcome.error is not None and not outcome.died and not outcome.cancelled
    assert outcome.error.errno == number and words in str(outcome.error)


def test_a_cancelled_job_cleans_up(loop: EventLoop, tmp_path: Path) -> None:
    def work(context: Context) -> None:
        (tmp_path / "made").touch()
        try:
            context.progress("working")
            time.sleep(60)
        finally:
            (tmp_path / "made").unlink()

    outcome, _ = finish(loop, work, lambda job, stage: job.cancel())
    assert outcome.cancelled and outcome.error is not None and outcome.error.errno == errno.ECANCELED
    assert list(tmp_path.iterdir()) == []


def test_a_cancel_that_comes_at_once_is_not_a_death(loop: EventLoop) -> None:
    job = jobs.start("test", lambda context: time.sleep(60))
    job.cancel()
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)
    outcome = job.finish()
    os.waitpid(job.pid, 0)
    assert outcome.cancelled and not outcome.died


def test_a_second_cancel_does_not_disturb_the_clean_up(loop: EventLoop, tmp_path: Path) -> None:
    def work(context: Context) -> None:
        (tmp_path / "made").touch()
        try:
            context.progress("working")
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "made").unlink()

    outcome, _ = finish(loop, work, lambda job, stage: job.cancel())
    assert outcome.cancelled and list(tmp_path.iterdir()) == []


def test_a_killed_job_takes_its_helpers_along(loop: EventLoop) -> None:
    def work(context: Context) -> None:
        helper = os.fork()
        if helper == 0:
            signal.pause()
        context.progress(str(helper))
        signal.pause()

    outcome, stages = finish(loop, work, lambda job, stage: job.kill())
    assert outcome.died and outcome.error is not None and "was killed" in str(outcome.error)
    helper = int(stages[0])
    deadline = time.monotonic() + 5
    while Path(f"/proc/{helper}").exists() and "Z" not in Path(f"/proc/{helper}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_job_without_a_manager_leaves_its_result_in_a_file(tmp_path: Path) -> None:
    result = tmp_path / "result"

    def work(context: Context) -> None:
        os.read(gate, 1)
        context.progress("prepared")  # nobody listens, but it is too late to give up
        context.deliver({"done": True})

    gate, opener = os.pipe()
    job = jobs.start("test", work, keep=[gate], result_file=str(result))
    job.sock.close()
    os.close(opener)
    os.waitpid(job.pid, 0)
    os.close(gate)
    os.close(job.pidfd)
    assert result.read_text() == '{"result": {"done": true}}'
    assert result.stat().st_mode & 0o777 == 0o600


def test_a_job_without_a_manager_gives_up_what_has_changed_nothing(tmp_path: Path) -> None:
    result = tmp_path / "result"

    def work(context: Context) -> None:
        while True:
            context.progress(jobs.UNCHANGED)
            time.sleep(0.005)

    job = jobs.start("test", work, result_file=str(result))
    job.sock.close()
    os.waitpid(job.pid, 0)
    os.close(job.pidfd)
    outcome = jobs.outcome_of(json.loads(result.read_text()), "test")
    assert outcome.cancelled


def test_timers_run_in_order_and_can_be_cancelled(loop: EventLoop) -> None:
    called: List[str] = []
    loop.later(0.02, lambda: called.append("second"))
    loop.later(0.01, lambda: called.append("first"))
    loop.later(0.015, lambda: called.append("never")).cancel()
    loop.later(0.03, loop.stop)
    loop.run()
    assert called == ["first", "second"]


def test_signals_are_told_from_the_loop(loop: EventLoop) -> None:
    called: List[str] = []

    def told() -> None:
        called.append("usr1")
        loop.stop()

    loop.on_signal(signal.SIGUSR1, told)
    loop.soon(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    loop.later(5, loop.stop)
    loop.run()
    assert called == ["usr1"]


def test_signals_that_come_together_are_all_told(loop: EventLoop) -> None:
    called: List[int] = []
    for number in (signal.SIGUSR1, signal.SIGCHLD):
        loop.on_signal(number, functools.partial(called.append, number))

    def send() -> None:
        for number in (signal.SIGUSR1, signal.SIGCHLD, signal.SIGUSR1):
            os.kill(os.getpid(), number)

    loop.soon(send)
    loop.later(0.05, loop.stop)
    loop.run()
    assert sorted(called) == sorted([signal.SIGUSR1, signal.SIGCHLD])


def test_what_an_earlier_callback_has_unwatched_is_not_called(loop: EventLoop) -> None:
    """Both are ready in the same round; the number may be another file's by now."""
    called: List[int] = []
    pipes = [os.pipe() for _ in range(2)]

    def first_come(own: int, other: int) -> None:
        called.append(own)
        loop.unwatch(other)
        loop.watch(other, lambda: called.append(-1))
        loop.unwatch(own)
        loop.soon(loop.stop)

    for (read, write), (other, _) in zip(pipes, reversed(pipes)):
        os.write(write, b"x")
        loop.watch(read, functools.partial(first_come, read, other))
    loop.run()
    assert len(called) == 1 and called[0] > 0
    for pipe in pipes:
        loop.unwatch(pipe[0])
        os.close(pipe[0])
        os.close(pipe[1])


def test_cancelled_timers_do_not_pile_up(loop: EventLoop) -> None:
    for _ in range(10_000):
        loop.later(1e6, loop.stop).cancel()
    assert len(loop._timers) < 1000


def test_a_callback_that_fails_does_not_end_the_loop(loop: EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a defect")

    loop.soon(fail)
    loop.later(0.01, loop.stop)
    loop.run()
    assert "a defect" in caplog.text
