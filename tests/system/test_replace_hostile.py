"""Everything at once, against a replace: other replaces and switches, mode changes, storms of processes and threads."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from manager_kit import alive, run
from replace_kit import FREEZERS, TIMEOUT, Scene, paused_at, scene, scene_at, standing_still
from surgery_kit import Victim

from spfs.errors import SpfsError
from spfs.testing import process_state, wait_until

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]

CONTENTS = b"real contents"


@pytest.fixture
def scenes(tmp_path: Path) -> Iterator[List[Scene]]:
    """Three delayed mounts, each with a manager of its own."""
    with ExitStack() as stack:
        made = []
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            made.append(stack.enter_context(scene_at(tmp_path / str(number))))
        yield made


@pytest.mark.parametrize("kind", FREEZERS)
def test_mounts_of_several_managers_with_the_same_users(scenes: "List[Scene]", kind: str) -> None:
    """Replaced at once, and strictly: each waits until the others have let go of the processes and of their cgroup."""
    users = [scenes[0].victim() for _ in range(3)]
    group = scenes[0].cgroup(kind, *(user.pid for user in users))
    for user in users:
        user.run("import os; held = []")
    for one in scenes:
        one.delay()
        path = one.file("file", CONTENTS)
        for user in users:
            user.run(f"held.append(os.open({path!r}, os.O_RDONLY))")
        one.client.mode("stub")
    for one in scenes:
        one.ask(freeze_cgroup=group, strict=True)
    for one in scenes:
        report = one.wait()
        assert (report["moved"], report["left"]) == ({"file": 3}, [])
        one.replaced()
    for user in users:
        assert user.run("[os.pread(fd, 99, 0) for fd in held]") == 3 * [CONTENTS]


def in_use(scene: Scene, **options: Any) -> Victim:
    """A process with a file and a directory of the mount, which is in stub mode."""
    scene.delay(**options)
    scene.file("file", CONTENTS)
    user = scene.victim(cwd=scene.mnt)
    user.run("import os, threading; file = os.open('file', os.O_RDONLY); here = os.open('.', os.O_RDONLY)")
    scene.client.mode("stub")
    return user


def complete(scene: Scene, user: Victim, **options: Any) -> None:
    assert scene.replace(**options)["left"] == []
    assert user.run("os.pread(file, 99, 0)") == CONTENTS
    scene.replaced()


@paused_at("prepared", "stopped", "operated")
def test_asked_twice_and_a_switch_from_the_same_mount(scene: Scene, tmp_path: Path) -> None:
    """A second replace is the one that is at work, or refused. The switch of another command waits for its turn; what
    it finds then goes where it says."""
    user = in_use(scene)
    scene.ask()
    scene.manager.reached()
    scene.ask()
    with pytest.raises(SpfsError, match="a replace is running") as caught:
        scene.ask(strict=True)
    assert caught.value.errno == errno.EBUSY
    elsewhere = scene.mount("-t", "tmpfs", "elsewhere", str(_made(tmp_path / "elsewhere")))
    (elsewhere / "file").write_bytes(b"elsewhere")
    with ThreadPoolExecutor(1) as pool:
        command = ["switch", "--json", "--pid", str(user.pid), "--source", str(scene.mnt), "--target", str(elsewhere)]
        told = pool.submit(run, "spfs.cli.spfs", *command)
        scene.manager.no_more()
        scene.manager.go()
        assert scene.wait()["left"] == []
        said = told.result(60)
    assert "Traceback" not in said.stderr
    assert user.run("os.pread(file, 99, 0)") in (CONTENTS, b"elsewhere")
    scene.replaced()


def _made(path: Path) -> Path:
    path.mkdir()
    return path


@paused_at("begun", "proxy", "stopped", "switched")
@pytest.mark.parametrize("mode", ["stub", "proxy", "restore"])
def test_mode_changes_that_are_asked_meanwhile(scene: Scene, mode: str) -> None:
    """Refused, or done when the replace has ended: never in its middle."""
    user = in_use(scene)
    scene.ask()
    scene.manager.reached()
    options = {"proxy_dir": str(scene.export)} if mode == "proxy" else {}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(scene.manager.client(TIMEOUT).mode, mode, **options)
        # Whatever has become of it by then, the answer is the same.
        scene.client.status()
        scene.manager.no_more()
        scene.manager.go()
        error = asked.exception(TIMEOUT)
    assert error is None or isinstance(error, SpfsError) and "cannot" in error.message, error
    assert scene.wait()["left"] == []
    assert user.run("os.pread(file, 99, 0)") == CONTENTS
    scene.replaced()


# What goes on in the processes while they are moved: references are made as fast as can be, on an old directory's
# descriptor, for as long as it is let. What is read must be right, and in the end nobody may have the old.
STORMS = {
    "forks": """
def storm():
    while not over.is_set():
        child = os.fork()
        if not child:
            grandchild = os.fork()
            os._exit(os.pread(file, 99, 0) != b"real contents")
        count.append(os.waitpid(child, 0)[1])
""",
    "threads": """
def storm():
    def look():
        wrong.extend([] if os.pread(file, 99, 0) == b"real contents" else ["read"])
    while not over.is_set():
        threads = [threading.Thread(target=look) for _ in range(20)]
        [t.start() for t in threads]; [t.join() for t in threads]
        count.append(0)
""",
    "openat": """
def storm():
    kept = []
    while not over.is_set():
        kept.append(os.open("file", os.O_RDONLY, dir_fd=here))
        wrong.extend([] if os.pread(kept[-1], 99, 0) == b"real contents" else ["read"])
        if len(kept) > 50:
            os.close(kept.pop(0))
        count.append(0)
    [os.close(fd) for fd in kept]
""",
    "passing": """
import socket
def storm():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while not over.is_set():
        fd = os.dup(file); socket.send_fds(one, [b"x"], [fd]); os.close(fd)
        fd = socket.recv_fds(other, 1, 1)[1][0]
        wrong.extend([] if os.pread(fd, 99, 0) == b"real contents" else ["read"])
        os.close(fd); count.append(0)
    one.close(); other.close()
""",
    "mapping": """
import mmap
def storm():
    while not over.is_set():
        maps = [mmap.mmap(file, 0, prot=mmap.PROT_READ) for _ in range(10)]
        wrong.extend([] if all(one[:4] == b"real" for one in maps) else ["read"])
        [one.close() for one in maps]; count.append(0)
""",
    "chdir": """
def storm():
    while not over.is_set():
        os.fchdir(here); wrong.extend([] if os.listdir(".") == ["file"] else ["list"])
        os.chdir("/"); count.append(0)
""",
}


@pytest.mark.parametrize("kind", FREEZERS)
@pytest.mark.parametrize("storm", sorted(STORMS))
def test_storms(scene: Scene, storm: str, kind: str) -> None:
    """Whatever the last round did not find is said to be left, and goes when it is asked for again."""
    user = in_use(scene)
    user.run("over, count, wrong = threading.Event(), [], []")
    user.run(STORMS[storm])
    group = scene.cgroup(kind, user.pid)
    user.run("stormer = threading.Thread(target=storm); stormer.start()")
    scene.ask(freeze_cgroup=group)
    report = scene.wait()
    done = user.run("len(count)")
    wait_until(lambda: user.run("len(count)") > done, what="the storm to go on")
    user.run("over.set(); stormer.join()")
    assert user.run("wrong") == [] and set(user.run("set(count)")) == {0}
    if report["left"]:
        assert all(one["reason"] for one in report["left"])
        assert scene.replace(freeze_cgroup=group)["left"] == []
    assert user.run("os.pread(file, 99, 0)") == CONTENTS
    scene.replaced()


@paused_at("begun", "prepared", "proxy")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", FREEZERS[1:])
def test_the_cgroup_is_removed_or_made_anew_in_between(scene: Scene, kind: str, again: bool) -> None:
    """Its processes have gone elsewhere. An error, or done without it; nobody is left frozen."""
    user = in_use(scene)
    group = scene.cgroup(kind, user.pid)
    assert group is not None
    scene.ask(freeze_cgroup=group)
    scene.manager.reached()
    (Path(group).parent / "cgroup.procs").write_text(str(user.pid))
    Path(group).rmdir()
    if again:
        Path(group).mkdir()
        (Path(group) / "cgroup.procs").write_text(str(user.pid))
    scene.manager.no_more()
    scene.manager.go()
    try:
        assert scene.wait()["left"] == []
    except SpfsError as error:
        assert not again and "cgroup" in error.message, error
        assert scene.types() == ["fuse.stubfs"]
        complete(scene, user)
    if not again:
        Path(group).mkdir()  # for what takes the scene down
    assert user.run("os.pread(file, 99, 0)") == CONTENTS
    scene.replaced()


@paused_at("prepared", "proxy")
def test_a_surgeon_that_is_stopped_before_stops_nobody(scene: Scene) -> None:
    """And goes on when it is let."""
    user = in_use(scene)
    scene.ask()
    job = scene.manager.reached()
    os.kill(job, signal.SIGSTOP)
    scene.manager.no_more()
    scene.manager.go()
    wait_until(lambda: process_state(job) == "T")
    assert not scene.problems() and scene.row()["replace"]["phase"] == "running"
    os.kill(job, signal.SIGCONT)
    assert scene.wait()["left"] == []
    assert user.run("os.pread(file, 99, 0)") == CONTENTS
    scene.replaced()


@paused_at("stuck")
def test_a_surgeon_that_is_stopped_in_the_blackout_is_killed(scene: Scene) -> None:
    """By its guard, which it cannot keep from it."""
    user = in_use(scene)
    group = scene.cgroup("v1", user.pid)
    scene.ask(freeze_cgroup=group)
    job = scene.manager.reached()
    os.kill(job, signal.SIGSTOP)
    with pytest.raises(SpfsError, match="was killed"):
        scene.wait()
    wait_until(lambda: not scene.problems(), 5, "everybody to run")
    scene.manager.no_more()
    complete(scene, user, freeze_cgroup=group)


@paused_at("begun", "proxy", "stopped", "operated")
@pytest.mark.parametrize("killed", [False, True])
def test_the_work_directory_is_taken_away(scene: Scene, killed: bool) -> None:
    """What is at work comes to its end, or fails with a reason. Nothing can be asked for until it is back."""
    user = in_use(scene)
    scene.ask()
    job = scene.manager.reached()
    work = scene.manager.work
    kept = work.rename(work.with_name("kept"))
    try:
        if killed:
            os.kill(job, signal.SIGKILL)
        scene.manager.no_more()
        if not killed:
            scene.manager.go()
        if killed or scene.manager.where == "begun":  # from then on it knows the file system
            with pytest.raises(SpfsError, match="was killed" if killed else "cannot reach a file system"):
                scene.wait()
            with pytest.raises(SpfsError, match="cannot save the state"):
                scene.ask()
            wait_until(lambda: not scene.problems(), 5, "everybody to run")
        else:
            assert scene.wait()["left"] == []
    finally:
        kept.rename(work)
    if alive(scene.filesystem):
        complete(scene, user)
    assert user.run("os.pread(file, 99, 0)") == CONTENTS
    scene.replaced()
    if os.path.exists(scene.control):
        os.unlink(scene.control)  # it was not where its file system looked for it in the end


@pytest.mark.parametrize("kind", FREEZERS)
def test_programs_that_execute_themselves_all_the_time(scene: Scene, kind: str) -> None:
    """A process has another memory each time that it is looked at."""
    user = in_use(scene)
    script = scene.base / "again"
    script.write_text('read line <&7; [ "$line" = "real contents" ] || exit 1; exec sh "$0" 7<file\n')
    (scene.export / "file").write_bytes(CONTENTS + b"\n")
    loops = [subprocess.Popen(["sh", "-c", f"exec 7<file; exec sh {script}"], cwd=scene.mnt) for _ in range(3)]
    try:
        scene.held_by(*(one.pid for one in loops))
        group = scene.cgroup(kind, *(one.pid for one in loops))
        report = scene.replace(freeze_cgroup=group)
        if report["left"]:
            assert {one["pid"] for one in report["left"]} <= {one.pid for one in loops}
            assert scene.replace(freeze_cgroup=group)["left"] == []
        assert [one.poll() for one in loops] == [None] * 3
        assert not [state for one in loops for state in standing_still(one.pid)]
        assert user.run("os.pread(file, 13, 0)") == CONTENTS
        scene.replaced()
    finally:
        for one in loops:
            one.kill()
            one.wait()


@paused_at("stopped", "exchanged", "operated")
@pytest.mark.parametrize("which", ["first", "another", "all"])
def test_tasks_that_are_killed_in_the_blackout(scene: Scene, which: str) -> None:
    """A thread cannot be killed alone, but its process: the others go on, and nobody waits for it."""
    user, other = in_use(scene), scene.victim(cwd=scene.mnt)
    user.run("over = threading.Event(); threads = [threading.Thread(target=over.wait) for _ in range(3)]")
    user.run("[one.start() for one in threads]")
    scene.ask(freeze_cgroup=scene.cgroup("v1", user.pid, other.pid))
    scene.manager.reached()
    tasks = sorted(int(name) for name in os.listdir(f"/proc/{user.pid}/task"))
    for tid in {"first": tasks[:1], "another": tasks[2:3], "all": [*tasks, other.pid]}[which]:
        os.kill(tid, signal.SIGKILL)
    scene.manager.no_more()
    scene.manager.go()
    report = scene.wait()
    assert [one for one in report["left"] if one["pid"] == other.pid] == []
    assert user.process.wait(TIMEOUT) == -signal.SIGKILL
    if which != "all":
        assert other.run("1 + 1") == 2 and standing_still(other.pid) == []
    wait_until(lambda: not alive(scene.filesystem), what="the file system process to end")
    assert scene.types() == ["tmpfs"]
