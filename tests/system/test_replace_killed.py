"""Whoever takes part in a replace may be killed at any stage: the processes run on, and it can be done again."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from manager_kit import alive, reading
from replace_kit import PAUSES, TIMEOUT, Scene, paused_at, scene
from surgery_kit import Victim

from spfs.errors import SpfsError
from spfs.linux import procfs
from spfs.testing import wait_until

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_cgroup1]

CONTENTS = bytes(range(256)) * 8
# From here on nothing refers to the old file system any more but the job itself: with it, the file system is gone.
DONE = ("operated", "switched", "verified")


@pytest.fixture
def user(scene: Scene) -> Victim:
    """A process that holds a file with an offset, a mapping and the working directory of a mount in stub mode."""
    scene.delay()
    scene.file("file", CONTENTS)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import mmap, os\nfile = os.open('file', os.O_RDWR)\nos.lseek(file, 100, os.SEEK_SET)")
    victim.run("shared = mmap.mmap(file, 2048)")
    scene.client.mode("stub")
    return victim


def works(scene: Scene, victim: Victim) -> None:
    """What the process holds is the real file, offset and all, and it can go on from there."""
    assert victim.run("os.read(file, 4)") == CONTENTS[100:104]
    assert victim.run("os.pread(file, 4, 8)") == CONTENTS[8:12] and victim.run("shared[4:8]") == CONTENTS[4:8]
    assert victim.run("os.listdir('.')") == ["file"]
    assert victim.run("os.stat('file').st_ino == os.fstat(file).st_ino")


def runs(scene: Scene) -> None:
    """Nobody is stopped, traced or frozen, and no mount is anywhere that does not belong there."""
    wait_until(lambda: not scene.problems(), 5, "everybody to run again")


def kill_job(scene: Scene, job: int, with_manager: bool) -> None:
    if with_manager:
        os.kill(scene.manager.pid, signal.SIGSTOP)  # so that it is the next one that cleans up
    os.kill(job, signal.SIGKILL)
    wait_until(lambda: not alive(job))
    scene.manager.no_more()
    if with_manager:
        scene.manager.kill()
        scene.manager.start()
        scene.client = scene.manager.client(TIMEOUT)


@pytest.mark.parametrize("kind", ["v1", pytest.param("v2", marks=pytest.mark.needs_cgroup2)])
@paused_at(*PAUSES)
def test_the_job_is_killed(scene: Scene, user: Victim, kind: str) -> None:
    with reading(scene.mnt / "file") as reader:
        scene.held_by(reader.pid)
        group = scene.cgroup(kind, user.pid)
        scene.ask(freeze_cgroup=group)
        kill_job(scene, scene.manager.reached(), with_manager=False)
        with pytest.raises(SpfsError, match="was killed") as caught:
            scene.wait()
        assert caught.value.errno == errno.ECONNABORTED
        runs(scene)
        if scene.manager.where in ("begun", "prepared"):
            scene.untouched()
            assert reader.poll() is None
        else:
            assert reader.communicate(timeout=TIMEOUT) == (CONTENTS, b"")
        if scene.manager.where not in DONE:
            assert scene.replace(freeze_cgroup=group)["left"] == []
        assert reader.communicate(timeout=TIMEOUT) == (CONTENTS, b"")
    works(scene, user)
    scene.replaced()


@paused_at(*PAUSES)
def test_the_job_and_the_manager_are_killed(scene: Scene, user: Victim) -> None:
    """The manager that is started next on the work directory goes on by itself."""
    with reading(scene.mnt / "file") as reader:
        scene.held_by(reader.pid)
        scene.ask(freeze_cgroup=scene.cgroup("v1", user.pid))
        kill_job(scene, scene.manager.reached(), with_manager=True)
        if scene.manager.where not in DONE:
            assert scene.wait()["left"] == []
        assert reader.communicate(timeout=TIMEOUT) == (CONTENTS, b"")
    runs(scene)
    works(scene, user)
    scene.replaced()
    wait_until(lambda: not scene.client.status()["mounts"])
    row = scene.row()
    assert (row["end"], row["replace"]["phase"]) == ("replaced", "done")
    assert row["replace"]["report"]["left"] == []


@pytest.mark.parametrize("kind", ["v1", pytest.param("v2", marks=pytest.mark.needs_cgroup2)])
@paused_at("frozen")
def test_all_are_killed_and_nobody_is_started_again(scene: Scene, user: Victim, kind: str) -> None:
    """While a cgroup is frozen, somebody is there who thaws it, whoever is killed."""
    other = scene.victim(cwd=scene.real)
    group = scene.cgroup(kind, user.pid, other.pid)
    scene.ask(freeze_cgroup=group)
    job = scene.manager.reached()
    for pid in (scene.manager.pid, job):
        os.kill(pid, signal.SIGKILL)
    runs(scene)
    assert other.run("1 + 1") == 2
    works(scene, user)
    scene.manager.no_more()
    scene.manager.kill()
    scene.manager.start()
    scene.client = scene.manager.client(TIMEOUT)
    assert scene.wait()["left"] == []
    scene.replaced()


@paused_at("frozen")
def test_a_cgroup_that_was_frozen_before_is_given_back_frozen(scene: Scene, user: Victim) -> None:
    group = scene.cgroup("v1", user.pid)
    assert group is not None
    state = Path(group, "freezer.state")
    state.write_text("FROZEN")
    scene.ask(freeze_cgroup=group)
    job = scene.manager.reached()
    os.kill(job, signal.SIGKILL)
    wait_until(lambda: not alive(job))
    with pytest.raises(SpfsError, match="was killed"):
        scene.wait()
    assert state.read_text() == "FROZEN\n"
    scene.manager.no_more()
    assert scene.replace(freeze_cgroup=group)["left"] == []
    assert state.read_text() == "FROZEN\n"
    state.write_text("THAWED")
    works(scene, user)
    scene.replaced()


@paused_at("stuck")
def test_a_blackout_that_does_not_end_is_ended(scene: Scene, user: Victim) -> None:
    group = scene.cgroup("v1", user.pid)
    scene.ask(freeze_cgroup=group)
    job = scene.manager.reached()
    with pytest.raises(SpfsError, match="was killed"):
        scene.wait()
    assert not alive(job)
    runs(scene)
    assert user.run("os.listdir('.')") == ["file"]
    scene.manager.no_more()
    assert scene.replace(freeze_cgroup=group)["left"] == []
    works(scene, user)
    scene.replaced()


@paused_at("bare")
@pytest.mark.parametrize("with_manager", [False, True])
def test_the_job_is_killed_when_nothing_is_on_the_path(scene: Scene, user: Victim, with_manager: bool) -> None:
    """Before Linux 6.5 there is such a moment; asked again, the real file system is put there all the same."""
    scene.ask(freeze_cgroup=scene.cgroup("v1", user.pid))
    helper = scene.manager.reached()
    assert scene.types() == []
    kill_job(scene, procfs.parse_stat(procfs.read(f"/proc/{helper}/stat")).parent, with_manager)
    runs(scene)
    assert user.run("os.listdir('.')") == ["file"]  # its references are as good as before
    if with_manager:
        report = scene.wait()
    else:
        with pytest.raises(SpfsError, match="was killed"):
            scene.wait()
        report = scene.replace()
    assert report["left"] == [] and any("nothing was mounted there any more" in note for note in report["notes"])
    works(scene, user)
    scene.replaced()


@paused_at("prepared", "stopped", "exchanged", "verified")
def test_the_manager_alone_is_killed_and_the_job_goes_on(scene: Scene, user: Victim) -> None:
    scene.ask(freeze_cgroup=scene.cgroup("v1", user.pid))
    scene.manager.reached()
    scene.manager.kill()
    scene.manager.no_more()
    scene.manager.go()
    scene.manager.start()
    scene.client = scene.manager.client(TIMEOUT)
    assert scene.wait()["left"] == []
    works(scene, user)
    scene.replaced()


@paused_at("begun", "prepared", "proxy", "stopped")
def test_an_aborted_replace_can_be_done_again(scene: Scene, user: Victim) -> None:
    """Up to the moment when the mounts are switched, everything is as before but for the mode; then it is too late."""
    scene.ask(freeze_cgroup=scene.cgroup("v1", user.pid))
    scene.manager.reached()
    with scene.manager.raw() as sock:
        sock.send(f"replace;id={scene.id};mode=release\0".encode())  # a client in between does no harm
        sock.recv(4)
    scene.manager.no_more()
    if scene.manager.where == "stopped":
        # What is being done there is a thread's, which is not interrupted but asked.
        with scene.manager.raw() as sock:
            sock.send(b'{"command": "abort", "id": "%s"}' % scene.id.encode())
            scene.manager.go()
            assert sock.recv(4) == b"\0\0\0\0"
    else:
        assert scene.client.abort(scene.id) == [scene.id]
    runs(scene)
    if scene.manager.where == "stopped":
        assert scene.wait()["left"] == []
    else:
        scene.untouched("proxy" if scene.manager.where == "proxy" else "stub")
        assert scene.replace()["left"] == []
    works(scene, user)
    scene.replaced()


# The file system process


def test_the_file_system_is_killed_before(scene: Scene, user: Victim) -> None:
    with reading(scene.mnt / "file") as reader:
        scene.held_by(reader.pid)
        os.kill(scene.filesystem, signal.SIGKILL)
        assert b"not connected" in reader.communicate(timeout=TIMEOUT)[1] or reader.returncode == 1
    wait_until(lambda: scene.row()["state"] == "failed")
    with pytest.raises(SpfsError, match="has ended") as caught:
        scene.ask()
    assert caught.value.errno == errno.ENOTCONN
    runs(scene)


@paused_at("begun", "prepared", "proxy", "stopped", "exchanged", "operated", "switched")
def test_the_file_system_is_killed_during_the_replace(scene: Scene, user: Victim) -> None:
    """It ends, with an error or with what could be done without the file system; never does it hang."""
    scene.ask(freeze_cgroup=scene.cgroup("v1", user.pid))
    scene.manager.reached()
    os.kill(scene.filesystem, signal.SIGKILL)
    wait_until(lambda: not alive(scene.filesystem))
    scene.manager.no_more()
    scene.manager.go()
    if scene.manager.where in ("begun", "prepared"):
        with pytest.raises(SpfsError, match="has ended") as caught:
            scene.wait()
        assert caught.value.errno == errno.ENOTCONN
    else:
        # All that was needed of it had been asked ahead of time. What was written to a mapping since then is lost.
        left = scene.wait()["left"]
        assert {one["kind"] for one in left} <= {"shared mapping"}, left
        if not left:
            works(scene, user)
            scene.replaced()
    runs(scene)
    assert user.run("1 + 1") == 2


def test_the_file_system_is_killed_after_it_was_left_with_a_reference(scene: Scene, user: Victim) -> None:
    scene.client.mode("restore")
    scene.scaffold(only_here=10)
    user.run("here = os.open('only_here', os.O_RDONLY)")
    scene.client.mode("stub")
    report = scene.replace()
    assert [one["what"] for one in report["left"]] == [f"fd {user.run('here')}"] and not report["ended"]
    os.kill(scene.filesystem, signal.SIGKILL)
    wait_until(lambda: not scene.client.status()["mounts"], what="the mount to be gone")
    assert scene.types() == ["tmpfs"]
    works(scene, user)
    assert user.run("try: os.read(here, 1)\nexcept OSError as error: number = error.errno") is None
    assert user.run("number") in (errno.ENOTCONN, errno.ECONNABORTED)


@paused_at("begun", "mounted")
def test_what_was_left_is_let_go_while_it_is_asked_for_again(scene: Scene, user: Victim) -> None:
    """The file system ends under the second replace, which finds that nothing is left to be done."""
    scene.client.mode("restore")
    scene.scaffold(only_here=10)
    user.run("here = os.open('only_here', os.O_RDONLY)")
    scene.client.mode("stub")
    for expected in (1, 0):
        scene.ask(freeze_cgroup=scene.cgroup("v1", user.pid))
        scene.manager.reached()
        if not expected:
            user.run("os.close(here)")
            wait_until(lambda: not alive(scene.filesystem))
        scene.manager.go()
        report = scene.wait()
        assert len(report["left"]) == expected and report["ended"] is not bool(expected)
    assert any("an earlier replace had done it" in note for note in report["notes"])
    works(scene, user)
    scene.replaced()
    wait_until(lambda: not scene.client.status()["mounts"])
    assert scene.row()["end"] == "replaced"


@paused_at("mounted")
def test_a_file_system_that_is_killed_when_something_was_left_is_an_error(scene: Scene, user: Victim) -> None:
    """Though nothing of it is on any path, somebody holds something of it."""
    scene.client.mode("restore")
    scene.scaffold(only_here=10)
    user.run("here = os.open('only_here', os.O_RDONLY)")
    scene.client.mode("stub")
    scene.ask()
    scene.manager.reached()
    scene.manager.go()
    assert len(scene.wait()["left"]) == 1
    scene.ask()
    scene.manager.reached()
    os.kill(scene.filesystem, signal.SIGKILL)
    wait_until(lambda: not alive(scene.filesystem))
    scene.manager.go()
    with pytest.raises(SpfsError, match="has ended"):
        scene.wait()
    runs(scene)
    works(scene, user)
