"""Children inside namespaces: what they return, raise, leave, and how they are ended."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest
from mount_kit import Places, places  # noqa: F401

from spfs import nschild
from spfs.errors import MissingFeatureError, SpfsError
from spfs.linux import namespaces
from spfs.nschild import Answer, Helper
from spfs.target import Target
from spfs.testing import process_state, wait_until

pytestmark = pytest.mark.needs_root


def stuck() -> Answer:
    signal.pause()
    return None, []


def test_all_namespaces_are_joined_and_the_child_is_root_there(places: Places) -> None:  # noqa: F811
    pid = places.namespace("-m", "-n", "-U", "-r", "-p", "-f", "-u", "-i", "-C")
    wanted = {name: namespaces.inode(pid, name) for name in namespaces.NAMESPACES}

    def look() -> Answer:
        return [{name: namespaces.inode("self", name) for name in wanted}, os.getuid(), os.getgid(), os.getpid()], []

    with Target.pin(pid) as target, nschild.run(look, target) as result:
        seen, uid, gid, inner = result.value
    assert (seen, uid, gid) == (wanted, 0, 0)
    assert inner < 10  # numbered by the new pid namespace


def test_only_those_asked_for_are_joined(places: Places) -> None:  # noqa: F811
    pid = places.namespace("-m", "-n")
    with Target.pin(pid) as target:
        with nschild.run(lambda: (namespaces.inode("self", "mnt"), []), target, ("net",)) as result:
            assert result.value == namespaces.inode("self", "mnt")


def test_descriptors_come_back_and_are_owned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")

    def opened() -> Answer:
        return "value", [os.open(tmp_path / "file", os.O_RDONLY) for _ in range(3)]

    with nschild.call(opened) as result:
        fd = result.steal(1)
        assert result.value == "value"
        assert not os.get_inheritable(fd)
    assert os.read(fd, 9) == b"text"
    os.close(fd)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOTDIR, "Not a directory", "/x"),
        OSError(errno.EIO, "with words of its own"),
        SpfsError("cannot do it", "do another", errno.EBUSY),
        MissingFeatureError("no fuse", "install it", errno.ENOSYS),
    ],
)
def test_what_is_raised_there_is_raised_here(error: Exception) -> None:
    def fail() -> Answer:
        raise error

    with pytest.raises(type(error)) as caught:
        nschild.call(fail)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "errno") == getattr(error, "errno")


def test_an_unexpected_exception_brings_its_traceback() -> None:
    def fail() -> Answer:
        return {}["missing"], []

    with pytest.raises(RuntimeError, match="KeyError: 'missing'"):
        nschild.call(fail)


def test_a_child_that_dies_is_noticed() -> None:
    def die() -> Answer:
        os.kill(os.getpid(), signal.SIGKILL)
        return None, []

    with pytest.raises(ChildProcessError):
        nschild.call(die)


def test_a_stuck_child_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def fork_and_hang() -> Answer:
        if os.fork() == 0:
            note.write_text(str(os.getpid()))
        return stuck()

    with pytest.raises(TimeoutError):
        nschild.call(fork_and_hang, 0.2, group=True)
    grandchild = int(wait_until(lambda: note.exists() and note.read_text()))
    wait_until(lambda: process_state(grandchild) in ("", "Z"))


def test_nothing_of_the_parents_cleanup_runs_in_the_child(tmp_path: Path) -> None:
    try:
        with pytest.raises(RuntimeError, match="SystemExit"):
            nschild.call(lambda: exec("raise SystemExit(3)"))  # type: ignore[arg-type, return-value]
    finally:
        with open(tmp_path / "count", "a") as file:
            file.write("x")
    assert (tmp_path / "count").read_text() == "x"


def test_a_helper_answers_in_order_and_takes_descriptors(places: Places) -> None:  # noqa: F811
    def echo(argument: Any, fds: List[int]) -> Answer:
        return [argument, namespaces.inode("self", "mnt"), len(fds)], list(fds)

    def fail(argument: Any, fds: List[int]) -> Answer:
        raise OSError(errno.EBUSY, "busy", argument)

    pid = places.namespace("-m")
    ends = os.pipe()
    with Target.pin(pid) as target, Helper({"echo": echo, "fail": fail}, target) as helper:
        inode = target.mount_namespace
        helper.send("echo", 1, [ends[0]])
        helper.send("fail", "/x")
        helper.send("echo", {"a": [None]})
        with helper.receive(5) as result:
            assert result.value == [1, inode, 1]
            assert len(result.fds) == 1
        with pytest.raises(OSError, match="busy") as caught:
            helper.receive(5)
        assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, "/x")
        assert helper.receive(5).value == [{"a": [None]}, inode, 0]
        assert helper.call("echo", timeout=5).value == [None, inode, 0]
        kept = set(os.listdir(f"/proc/{helper.pid}/fd"))
        assert str(ends[1]) not in kept  # it holds nothing of ours that it was not told to
    for fd in ends:
        os.close(fd)


def test_a_helper_that_cannot_join_says_why() -> None:
    with Target(None, -1, {"mnt": os.open("/dev/null", os.O_RDONLY)}, -1, None) as target:
        with pytest.raises(OSError) as caught:
            Helper({}, target)
    assert caught.value.errno == errno.EINVAL


def test_answers_that_nobody_waited_for_are_dropped() -> None:
    def slow(argument: Any, fds: List[int]) -> Answer:
        time.sleep(0.1)
        raise OSError(errno.ETIMEDOUT, "of its own")

    commands: Dict[str, nschild.Command] = {"slow": slow, "echo": lambda argument, fds: (argument, fds)}
    with Target.pin() as target, Helper(commands, target) as helper:
        with pytest.raises(TimeoutError, match="has not answered"):
            helper.call("slow", timeout=0.01)
        with pytest.raises(TimeoutError, match="has not answered"):
            helper.drain(0.01)
        helper.drain(5)
        assert helper.call("echo", "fresh", timeout=5).value == "fresh"


def test_a_stuck_helper_is_ended() -> None:
    with Target.pin() as target:
        helper = Helper({"hang": lambda argument, fds: stuck()}, target)
        pid = helper.pid
        with pytest.raises(TimeoutError):
            helper.call("hang", timeout=0.05)
        helper.close()
        assert process_state(pid) == ""


def test_children_end_with_their_parent() -> None:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        helper = Helper({}, Target.pin())
        os.write(theirs, str(helper.pid).encode())
        time.sleep(1000)
        os._exit(0)
    helper_pid = int(os.read(ours, 20))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: process_state(helper_pid) in ("", "Z"))
    for fd in (ours, theirs):
        os.close(fd)


def test_what_a_signal_handler_raises_ends_the_child_too(tmp_path: Path) -> None:
    class Cancelled(Exception):
        pass

    def cancel(number: int, frame: object) -> None:
        raise Cancelled

    def note_and_hang() -> Answer:
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGUSR1)
        return stuck()

    old = signal.signal(signal.SIGUSR1, cancel)
    try:
        with pytest.raises(Cancelled):
            nschild.call(note_and_hang)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert process_state(int((tmp_path / "pid").read_text())) == ""


def test_a_large_answer_and_many_descriptors() -> None:
    text = "x" * 1_000_000
    with nschild.call(lambda: (text, [os.open("/dev/null", os.O_RDONLY) for _ in range(200)])) as result:
        assert result.value == text
        assert len(result.fds) == 200


def test_nothing_is_imported_from_another_root(places: Places, tmp_path: Path) -> None:  # noqa: F811
    """What is first imported in a container would be the container's code, run by root of the host."""
    places.base()
    pid = places.namespace("-m")
    library = os.path.dirname(os.__file__)
    evil = tmp_path / "evil"
    evil.mkdir()
    for name in ("colorsys", "sndhdr", "encodings/punycode"):
        (evil / f"{name}.py").parent.mkdir(exist_ok=True)
        (evil / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    script = f"mount --bind {evil} {library} && ls {library}/colorsys.py"
    subprocess.run(["nsenter", "-t", str(pid), "-m", "sh", "-c", script], check=True)

    def careless() -> Answer:
        try:
            import colorsys  # noqa: F401

            return "imported", []
        except ImportError:
            pass
        try:
            b"x".decode("punycode")
        except LookupError:
            return "refused", []
        return "decoded", []

    def defect() -> Answer:
        raise AssertionError("a defect")  # its traceback is put together there

    with Target.pin(pid) as target:
        with nschild.run(careless, target, ("mnt",)) as result:
            assert result.value == "refused"
        with Helper({"careless": lambda argument, fds: careless()}, target) as helper:
            with helper.call("careless") as result:
                assert result.value == "refused"
        with pytest.raises(RuntimeError, match="a defect"):
            nschild.run(defect, target, ("mnt",))
    assert not (tmp_path / "ran").exists()
