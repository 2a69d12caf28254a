"""When a replace begins, and that one that takes its time delays neither another one nor the manager."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Iterator, List

import pytest
from manager_kit import alive, reading
from replace_kit import TIMEOUT, Scene, paused_at, scene, scene_at
from surgery_kit import Victim
from test_replace_faults import Tracers, tracer
from test_surgery_programs import needs

from spfs.errors import SpfsError
from spfs.linux import procfs
from spfs.linux.mountapi import MS
from spfs.testing import wait_until

__all__ = ["scene", "tracer"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]


def user(scene: Scene) -> Victim:
    scene.delay()
    scene.file("file", b"real contents")
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os\nfile = os.open('file', os.O_RDONLY)")
    return victim


def phase(scene: Scene) -> str:
    return str(scene.row()["replace"]["phase"])


def test_hold_until_it_is_released(scene: Scene) -> None:
    victim = user(scene)
    assert scene.ask(begin="hold") == "held"
    scene.client.mode("stub")
    with reading(scene.mnt / "file") as reader:
        scene.held_by(reader.pid)
        assert phase(scene) == "held" and reader.poll() is None
        scene.untouched()
        assert scene.client.begin("release", scene.id) == [scene.id]
        assert scene.wait()["left"] == []
        assert reader.communicate(timeout=TIMEOUT) == (b"real contents", b"")
    assert victim.run("os.read(file, 100)") == b"real contents"
    scene.replaced()


def test_release_at_once_out_of_restore_mode(scene: Scene) -> None:
    """What was written to the scaffold is not the real file's contents, and is seen by nobody afterwards."""
    victim = user(scene)
    victim.run("writes = os.open('file', os.O_RDWR)\nos.write(writes, b'SCAFFOLD')")
    assert scene.replace()["left"] == []
    assert victim.run("os.read(file, 100)") == b"real contents" == (scene.export / "file").read_bytes()
    scene.replaced()


@pytest.mark.parametrize("by", ["restorer", pytest.param("strace", marks=needs("strace"))])
def test_by_itself_when_restore_mode_is_over_and_nobody_is_traced(scene: Scene, tracer: Tracers, by: str) -> None:
    """As with a restorer: it asks first, restores with ptrace, goes to stub mode, and lets go at last."""
    victim = user(scene)
    scene.may_be_traced.append(victim.pid)
    group = scene.cgroup("v1", victim.pid)
    assert scene.ask(begin=None, freeze_cgroup=group) == "waiting"
    debugger = tracer.strace(victim.pid) if by == "strace" else tracer.seize(victim.pid)
    scene.client.mode("stub")
    waiting = f"process {victim.pid} is traced by {debugger.pid}"
    wait_until(lambda: waiting in str(scene.row()["replace"]["last_attempts"]), what="it to wait for the tracer")
    scene.untouched()
    tracer.let_go()
    report = scene.wait()
    scene.may_be_traced.clear()
    assert report["left"] == [] and victim.run("os.read(file, 100)") == b"real contents"
    scene.replaced()


def test_by_itself_without_a_tracer(scene: Scene) -> None:
    victim = user(scene)
    scene.ask(begin=None, freeze_cgroup=scene.cgroup("v1", victim.pid))
    assert phase(scene) == "waiting"
    scene.client.mode("stub")
    assert scene.wait()["left"] == [] and victim.run("os.read(file, 100)") == b"real contents"
    scene.replaced()


# A mount helper that takes its time, as one does whose server hangs: until somebody writes to the fifo.
HELPER = """#!/bin/sh
echo begun > {place}/begun
read line < {place}/go
test "$line" = ok || {{ echo "mount.spfsslow: Connection refused" >&2; exit 32; }}
exec mount --bind "$1" "$2"
"""


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Scene]:
    """A manager with a mount helper for the type "spfsslow", which nobody else sees."""
    place = tmp_path / "helper"
    place.mkdir()
    (place / "mount.spfsslow").write_text(HELPER.format(place=place))
    (place / "mount.spfsslow").chmod(0o755)
    for name in ("begun", "go"):
        os.mkfifo(place / name)
    command = f'mount --bind {place} /usr/local/sbin && exec "$@"'
    with scene_at(tmp_path, "", ["unshare", "-m", "--propagation", "private", "sh", "-c", command, "sh"]) as made:
        yield made


def test_one_that_is_slow_delays_neither_the_other_nor_the_socket(slow: Scene, tmp_path: Path) -> None:
    # Its own mount namespace is not ours, so that the target must be named.
    slow.delay(ns_pid=os.getpid(), ns_list=["mnt"])
    slow.file("file", b"real contents")
    other = tmp_path / "other"
    other.mkdir()
    slow.expect_mount(other)
    second = slow.client.mount("second", str(other), ns_pid=os.getpid(), ns_list=["mnt"])
    user, other_user = slow.victim(cwd=slow.mnt), slow.victim(cwd=other)
    slow.client.mode("stub")
    slow.ask(fstype="spfsslow", flags=0)
    (tmp_path / "helper/begun").read_text()
    slow.client.replace("second", str(slow.export), "none", int(MS.BIND), begin="release")
    assert slow.client.wait("second", TIMEOUT)["replace"]["report"]["left"] == []
    assert other_user.run("__import__('os').listdir('.')") == ["file"]
    wait_until(lambda: not alive(second["pid"]))
    begun = time.monotonic()
    for _ in range(20):
        slow.client.status()
    assert time.monotonic() - begun < 2 and phase(slow) == "running"

    # The server refuses, and is asked again; then it is there.
    (tmp_path / "helper/go").write_text("no\n")
    (tmp_path / "helper/begun").read_text()
    assert slow.row()["replace"]["last_attempts"][-1]["errno"] == 111
    (tmp_path / "helper/go").write_text("ok\n")
    assert slow.wait()["left"] == []
    assert user.run("open('file', 'rb').read()") == b"real contents"
    slow.replaced()


def test_a_mount_helper_that_hangs_is_given_up_with_the_replace(slow: Scene, tmp_path: Path) -> None:
    slow.delay("stub", ns_pid=os.getpid(), ns_list=["mnt"])
    slow.ask(fstype="spfsslow", flags=0)
    (tmp_path / "helper/begun").read_text()
    (helper,) = helpers(tmp_path)
    directory = Path(os.fsdecode(Path(f"/proc/{helper}/cmdline").read_bytes().split(b"\0")[3]))
    assert directory.is_dir()
    assert slow.client.abort(slow.id) == [slow.id]
    with pytest.raises(SpfsError, match="aborted"):
        slow.wait()
    slow.untouched()
    assert helpers(tmp_path) == [] and not directory.exists()


def helpers(place: Path) -> List[int]:
    """The mount helpers at work for the scene there; their environment is clean, so that no mark finds them."""
    found = []
    for pid in procfs.processes():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"/usr/local/sbin/mount.spfsslow" in words and os.fsencode(place / "real/export") in words:
            found.append(pid)
    return found


@pytest.mark.parametrize("with_manager", [False, True])
def test_a_mount_helper_ends_with_the_job_that_is_killed(slow: Scene, tmp_path: Path, with_manager: bool) -> None:
    slow.delay("stub", ns_pid=os.getpid(), ns_list=["mnt"])
    slow.ask(fstype="spfsslow", flags=0)
    (tmp_path / "helper/begun").read_text()
    (helper,) = helpers(tmp_path)
    job = parent(parent(helper))
    directory = Path(os.fsdecode(Path(f"/proc/{helper}/cmdline").read_bytes().split(b"\0")[3]))
    assert parent(job) == slow.manager.pid
    if with_manager:
        slow.manager.kill()
    os.kill(job, signal.SIGKILL)
    wait_until(lambda: helpers(tmp_path) == [], what="the helper to end")
    if with_manager:
        assert directory.is_dir()
        slow.manager.start()
        slow.client = slow.manager.client(TIMEOUT)
        (tmp_path / "helper/begun").read_text()  # the new one goes on by itself
        assert slow.client.abort(slow.id) == [slow.id]
    else:
        with pytest.raises(SpfsError, match="was killed"):
            slow.wait()
    assert not directory.exists()
    slow.untouched()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@paused_at("exchanged")
def test_the_socket_answers_within_the_blackout(scene: Scene) -> None:
    victim = user(scene)
    scene.ask(freeze_cgroup=scene.cgroup("v1", victim.pid))
    scene.manager.reached()
    assert scene.row()["replace"]["phase"] == "running" and scene.client.status()["manager"]["pid"] == scene.manager.pid
    for mode in ("stub", "restore"):
        with pytest.raises(SpfsError, match="a replace is running"):
            scene.client.mode(mode, scene.id)
    scene.manager.go()
    assert scene.wait()["left"] == []
    assert victim.run("os.read(file, 100)") == b"real contents"
    scene.replaced()


@pytest.mark.needs_cgroup1
@pytest.mark.parametrize("how", ["auto", "hold"])
def test_a_c_restorer_with_and_without_hold_and_release(scene: Scene, how: str) -> None:
    """Both byte streams give the same: blocked until the real side is there, then on it."""
    program = scene.base / "old_restorer"
    source = Path(__file__).with_name("old_restorer.c")
    subprocess.run(["cc", "-Wall", "-Werror", "-o", str(program), str(source)], check=True)
    scene.real_file("dir/file", b"0123456789")
    os.mkfifo(scene.export / "fifo")
    late = scene.export.rename(scene.real / "late")
    cgroup = scene.cgroup("v1")
    assert cgroup is not None
    scene.expect_mount(scene.mnt)
    arguments = [str(scene.manager.socket), str(scene.mnt), str(scene.export), cgroup, how]
    with subprocess.Popen(
        ["sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec "$@"', cgroup, str(program), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "SPFS_MODE": "stub"},
    ) as process:  # fmt: skip
        scene.cleanup(process.kill)
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "blocked\n"
        wait_until(lambda: scene.client.held("412"), TIMEOUT, "the read to be held")
        assert scene.types() == ["fuse.stubfs"] and process.poll() is None
        late.rename(scene.export)
        assert process.stdout.readline() == "3456789\n"
        report = scene.client.wait("412", TIMEOUT)["replace"]["report"]
        assert report["left"] == [] and report["moved"]["file"] == 1
        process.stdin.write("x")
        process.stdin.close()
        assert process.stdout.readline() == "10\n"
        assert process.wait(TIMEOUT) == 0
    assert scene.types() == ["tmpfs"]
