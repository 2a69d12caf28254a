"""What a replace meets that it cannot do: it says so, nothing is broken, and it can be asked for again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest
from manager_kit import alive, reading
from replace_kit import FREEZERS, TIMEOUT, Scene, paused_at, scene
from surgery_kit import Victim, compile_c

from spfs.errors import SpfsError
from spfs.linux import procfs
from spfs.linux.mountapi import MS
from spfs.testing import process_state, wait_until

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]


def in_stub(scene: Scene) -> Victim:
    """A process that holds "file" of the mount, which is in stub mode."""
    scene.delay()
    scene.file("file", b"real contents")
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os\nfile = os.open('file', os.O_RDONLY)")
    scene.client.mode("stub")
    return victim


def refused(scene: Scene, number: int, match: str, **options: object) -> None:
    """The replace ends with that error, a process that waits goes on waiting, and then it can be done."""
    with reading(scene.mnt / "file") as reader:
        scene.held_by(reader.pid)
        scene.ask(**options)
        with pytest.raises(SpfsError, match=match) as caught:
            scene.wait()
        assert caught.value.errno == number, caught.value
        scene.untouched()
        assert reader.poll() is None and [one["pid"] for one in scene.client.held()] == [reader.pid]
        assert scene.replace()["left"] == []
        assert reader.communicate(timeout=TIMEOUT) == (b"real contents", b"")
    scene.replaced()


# What is asked for cannot be


@pytest.mark.parametrize("top", ["/sys/fs/cgroup/freezer", "/nowhere"])
def test_the_freezer_cgroup_does_not_exist(scene: Scene, top: str) -> None:
    in_stub(scene)
    refused(scene, errno.ENOENT, "cannot use freezer cgroup.*make it first", freeze_cgroup=f"{top}/no-such-group")


def test_the_freezer_cgroup_is_none(scene: Scene) -> None:
    in_stub(scene)
    refused(scene, errno.EINVAL, "not a cgroup that can be frozen", freeze_cgroup=str(scene.base))


@pytest.mark.parametrize("who", ["manager", "filesystem"])
@pytest.mark.parametrize("kind", FREEZERS[1:])
def test_the_freezer_cgroup_contains_who_is_needed_to_thaw_it(scene: Scene, kind: str, who: str) -> None:
    victim = in_stub(scene)
    group = scene.cgroup(kind, victim.pid, scene.manager.pid if who == "manager" else scene.filesystem)
    refused(scene, errno.EBUSY, "which is needed to thaw it", freeze_cgroup=group)
    # What was started by the manager is in its cgroup; it all ends with the scene.
    assert group is not None
    top = Path(group).parent
    for pid in Path(group, "cgroup.procs").read_text().split():
        Path(top, "cgroup.procs").write_text(pid)


@pytest.mark.parametrize(
    "number, match, options",
    [
        (errno.ENODEV, "no file system type", {"fstype": "nosuchfs", "flags": 0}),
        (errno.EINVAL, "no_such_option", {"fstype": "tmpfs", "flags": 0, "options": "no_such_option=1"}),
        (errno.EINVAL, "MS_REMOUNT", {"fstype": "tmpfs", "flags": int(MS.REMOUNT)}),
        (errno.ENOENT, "/nowhere/image", {"source": "/nowhere/image", "fstype": "ext4", "flags": 0}),
    ],
    ids=["type", "option", "flag", "source"],
)
def test_the_real_mount_cannot_be_made(scene: Scene, number: int, match: str, options: "dict[str, object]") -> None:
    in_stub(scene)
    try:
        refused(scene, number, match, **options)
    except SpfsError as error:  # refused at once
        assert error.errno == number
        scene.untouched()


def test_the_root_of_the_real_mount_is_no_directory(scene: Scene) -> None:
    in_stub(scene)
    refused(scene, errno.ENOTDIR, "root is not a directory", source=str(scene.real_file("plain")))


def test_the_source_is_on_the_delayed_mount_itself(scene: Scene) -> None:
    """It would wait for what waits for it: until it is aborted, or its time is over."""
    scene.delay()
    scene.both("directory", stat.S_IFDIR)
    scene.file("file", b"real contents")
    scene.client.mode("stub")
    scene.ask(source=str(scene.mnt / "directory"))
    wait_until(lambda: scene.client.held(), what="it to wait for itself")
    assert scene.client.abort(scene.id) == [scene.id]
    wait_until(lambda: not scene.client.held(), what="nobody to wait any more")
    refused(scene, errno.ETIMEDOUT, "cannot mount", source=str(scene.mnt / "directory"), timeout=0.3)


def test_the_source_never_comes_and_is_given_up(scene: Scene) -> None:
    victim = in_stub(scene)
    group = scene.cgroup("v1", victim.pid)
    with reading(scene.mnt / "file") as reader:
        scene.held_by(reader.pid)
        scene.ask(source=str(scene.real / "late"), freeze_cgroup=group)
        wait_until(lambda: scene.row()["replace"]["attempts"] >= 3, what="three attempts")
        last = scene.row()["replace"]["last_attempts"][-1]
        assert last["errno"] == errno.ENOENT and last["error"] == "No such file or directory"
        assert scene.client.abort(scene.id) == [scene.id]
        with pytest.raises(SpfsError, match="aborted") as caught:
            scene.wait()
        assert caught.value.errno == errno.ECANCELED
        scene.untouched()
        assert reader.poll() is None
    assert scene.replace(freeze_cgroup=group)["left"] == []
    scene.replaced()


def test_the_source_does_not_come_in_time(scene: Scene) -> None:
    in_stub(scene)
    refused(scene, errno.ETIMEDOUT, "not within 0.3 s", source=str(scene.real / "late"), timeout=0.3)


def test_the_source_comes_late(scene: Scene) -> None:
    victim = in_stub(scene)
    scene.ask(source=str(scene.real / "late"))
    wait_until(lambda: scene.row()["replace"]["attempts"] >= 2, what="two attempts")
    scene.export.rename(scene.real / "late")
    assert scene.wait()["left"] == []
    assert victim.run("os.read(file, 100)") == b"real contents"
    scene.replaced()


# What the real side lacks


def test_a_file_that_the_real_side_lacks_stays_until_it_has_it(scene: Scene) -> None:
    victim = in_stub(scene)
    scene.client.mode("restore")
    scene.scaffold(missing=100, gone__deep=10)
    victim.run("missing, deep = os.open('missing', os.O_RDWR), os.open('gone/deep', os.O_RDONLY)")
    scene.client.mode("stub")
    group = scene.cgroup("v1", victim.pid)
    report = scene.replace(freeze_cgroup=group)
    left = {one["path"]: one for one in report["left"]}
    assert left.keys() == {"missing", "gone/deep"} and not report["ended"]
    assert {one["pid"] for one in left.values()} == {victim.pid} and "python" in left["missing"]["command"]
    assert left["missing"]["what"] == f"fd {victim.run('missing')}" and "no such file" in left["missing"]["reason"]
    # The rest is where it should be, and the mount, too.
    assert scene.types() == ["tmpfs"] and victim.run("os.read(file, 100)") == b"real contents"
    victim.run("try: os.read(missing, 1)\nexcept OSError as error: number = error.errno")
    assert victim.run("number") == errno.ESTALE
    assert alive(scene.filesystem) and scene.users().keys() == {victim.pid}

    scene.real_file("missing", b"here at last")
    report = scene.replace(freeze_cgroup=group)
    assert [one["path"] for one in report["left"]] == ["gone/deep"]
    assert victim.run("os.read(missing, 100)") == b"here at last"
    scene.real_file("gone/deep", b"too")
    assert scene.replace(freeze_cgroup=group)["left"] == []
    assert victim.run("os.read(deep, 100)") == b"too"
    scene.replaced()


def test_another_type_on_the_real_side(scene: Scene) -> None:
    scene.delay()
    scene.scaffold(file=10, directory=None, fifo=-1)
    victim = scene.victim(cwd=scene.mnt / "directory")
    victim.run("import os\nfile, fifo = os.open('../file', os.O_RDONLY), os.open('../fifo', os.O_RDWR)")
    (scene.export / "file").mkdir()
    scene.real_file("directory", b"a file")
    scene.real_file("fifo", b"a file, too")
    scene.client.mode("stub")
    report = scene.replace()
    assert {one["path"] for one in report["left"]} == {"file", "directory", "fifo"} and report["moved"] == {}
    assert all(one["reason"] for one in report["left"]) and not report["ended"]
    for name in ("file", "directory", "fifo"):
        path = scene.export / name
        path.rmdir() if path.is_dir() else path.unlink()
    (scene.export / "directory").mkdir()
    os.mkfifo(scene.export / "fifo")
    scene.real_file("file", b"right")
    assert scene.replace()["left"] == []
    assert victim.run("os.read(file, 10)") == b"right"
    scene.replaced()


def test_strict_refuses_what_would_be_left(scene: Scene) -> None:
    victim = in_stub(scene)
    scene.client.mode("restore")
    scene.scaffold(missing=10)
    victim.run("missing = os.open('missing', os.O_RDONLY)")
    scene.client.mode("stub")
    scene.ask(strict=True, freeze_cgroup=scene.cgroup("v1", victim.pid))
    with pytest.raises(SpfsError, match=f"missing.* of process {victim.pid}"):
        scene.wait()
    scene.untouched()
    scene.real_file("missing", b"now")
    assert scene.replace(strict=True)["left"] == []
    assert victim.run("os.read(missing, 10)") == b"now"
    scene.replaced()


# The processes


@pytest.mark.parametrize("kind", FREEZERS)
@paused_at("proxy")
def test_strict_refuses_what_comes_in_the_last_moment(scene: Scene, tracer: "Tracers", kind: str) -> None:
    """What could not be known before the requests were let through: then they are held again."""
    victim = in_stub(scene)
    scene.may_be_traced.append(victim.pid)
    group = scene.cgroup(kind, victim.pid)
    scene.ask(strict=True, freeze_cgroup=group)
    scene.manager.reached()
    debugger = tracer.seize(victim.pid)
    scene.manager.no_more()
    scene.manager.go()
    with pytest.raises(SpfsError, match=f"is traced by process {debugger.pid}"):
        scene.wait()
    scene.untouched()
    with reading(scene.mnt / "file") as reader:
        scene.held_by(reader.pid)
        tracer.let_go()
        scene.may_be_traced.clear()
        assert scene.replace(strict=True, freeze_cgroup=group)["left"] == []
        assert reader.communicate(timeout=TIMEOUT) == (b"real contents", b"")
    assert victim.run("os.read(file, 100)") == b"real contents"
    scene.replaced()


TRACER = """
import sys, ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
pid = int(sys.argv[1])
if libc.ptrace(0x4206, pid, None, None) != 0:  # PTRACE_SEIZE
    sys.exit(os.strerror(ctypes.get_errno()))
print("seized", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def tracer() -> "Iterator[Tracers]":
    made = Tracers()
    try:
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.communicate()


class Tracers:
    """Debuggers, as it were: they seize a process and let it go when they are told."""

    def __init__(self) -> None:
        self.processes: "list[subprocess.Popen[str]]" = []

    def seize(self, pid: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", TRACER, str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "seized\n"
        return process

    def strace(self, pid: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(["strace", "-f", "-qq", "-o", os.devnull, "-p", str(pid)], text=True)
        self.processes.append(process)
        wait_until(lambda: procfs.parse_status(procfs.read(f"/proc/{pid}/status")).tracer == process.pid)
        return process

    def let_go(self) -> None:
        for process in self.processes:
            if process.stdin is None:
                process.send_signal(signal.SIGINT)
            process.communicate(process.stdin and "\n", timeout=TIMEOUT)


@pytest.mark.parametrize("kind", FREEZERS)
def test_who_is_traced_by_somebody_else_stays_and_can_be_moved_later(
    scene: Scene, tracer: Tracers, kind: str
) -> None:
    traced, other = in_stub(scene), scene.victim(cwd=scene.mnt)
    scene.may_be_traced.append(traced.pid)
    debugger = tracer.seize(traced.pid)
    group = scene.cgroup(kind, traced.pid, other.pid)
    report = scene.replace(freeze_cgroup=group)
    assert {one["pid"] for one in report["left"]} == {traced.pid} and not report["ended"]
    assert all(f"traced by process {debugger.pid}" in one["reason"] for one in report["left"])
    # It works on, through the proxy.
    assert traced.run("os.read(file, 4)") == b"real" and scene.types() == ["tmpfs"]
    tracer.let_go()
    scene.may_be_traced.clear()
    assert scene.replace(freeze_cgroup=group)["left"] == []
    assert traced.run("os.read(file, 100)") == b" contents"
    scene.replaced()


@pytest.mark.parametrize("kind", FREEZERS)
@paused_at("prepared", "stopped")
def test_who_ends_in_between(scene: Scene, kind: str) -> None:
    ends, other = in_stub(scene), scene.victim(cwd=scene.mnt)
    scene.ask(freeze_cgroup=scene.cgroup(kind, ends.pid, other.pid))
    scene.manager.reached()
    ends.process.kill()
    wait_until(lambda: process_state(ends.pid) in ("", "Z"))
    scene.manager.no_more()
    scene.manager.go()
    assert scene.wait()["left"] == []
    assert other.run("__import__('os').listdir('.')") == ["file"]
    scene.replaced()


@pytest.mark.parametrize("kind", FREEZERS)
@paused_at("prepared", "proxy")
def test_who_comes_and_what_is_opened_in_between(scene: Scene, kind: str) -> None:
    """References that were not there when they were looked for are moved all the same."""
    victim = in_stub(scene)
    scene.real_file("second", b"second")
    group = scene.cgroup(kind, victim.pid)
    scene.ask(freeze_cgroup=group)
    scene.manager.reached()
    if scene.manager.where == "proxy":
        victim.run("second = os.open('second', os.O_RDONLY)\nos.close(file)\nfile = os.open('file', os.O_RDONLY)")
    victim.run("copy = os.dup(file)")
    late = scene.victim(cwd=scene.mnt)
    if group is not None:
        Path(group, "cgroup.procs").write_text(str(late.pid))
    scene.manager.no_more()
    scene.manager.go()
    report = scene.wait()
    assert report["left"] == [] and {one["pid"] for one in report["processes"]} == {victim.pid, late.pid}
    assert victim.run("os.read(copy, 4) + os.read(file, 100)") == b"real contents"
    if scene.manager.where == "proxy":
        assert victim.run("os.read(second, 100)") == b"second"
    assert late.run("__import__('os').getcwd()") == str(scene.mnt)
    scene.replaced()


REUSE = r"""
#define _GNU_SOURCE
#include <linux/sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* program PID: a child of just that pid, which lives until this process is killed */
int main(int argc, char **argv)
{
    pid_t wanted = atoi(argv[1]);
    struct clone_args arguments = { .exit_signal = SIGCHLD, .set_tid = (uintptr_t)&wanted, .set_tid_size = 1 };
    long pid = syscall(SYS_clone3, &arguments, sizeof arguments);
    if (pid < 0) {
        perror("clone3");
        return 1;
    }
    if (pid == 0) {
        char byte;
        return read(0, &byte, 1) != 0;
    }
    puts("reused");
    fflush(stdout);
    return waitpid(pid, NULL, 0) < 0;
}
"""


@pytest.mark.parametrize("with_restart", [False, True])
def test_the_process_that_named_the_namespaces_has_died_and_its_pid_is_another_s(
    scene: Scene, tmp_path: Path, with_restart: bool
) -> None:
    first = scene.victim(["unshare", "-m", "--propagation", "private"])
    first.run("import os")
    keeper = scene.victim(["nsenter", "-t", str(first.pid), "-m"])
    keeper.run("import os")
    scene.expect_mount(scene.mnt)
    scene.delay(ns_pid=first.pid)
    scene.file("file", b"real contents")
    keeper.run(f"file = os.open('{scene.mnt}/file', os.O_RDONLY)")
    scene.client.mode("stub")
    first.close()
    program = compile_c(tmp_path, REUSE)
    reused = subprocess.Popen([program, str(first.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert reused.stdout is not None and reused.stdout.readline() == "reused\n"
        if with_restart:
            scene.manager.kill()
            scene.manager.start()
            scene.client = scene.manager.client(TIMEOUT)
        report = scene.replace()
        assert report["left"] == [] and report["mounts_left"] == [] and report["mounts"] == 1
        assert keeper.run("os.read(file, 100)") == b"real contents"
        assert keeper.run(f"os.listdir('{scene.mnt}')") == ["file"]
        assert scene.types() == [] and os.listdir(scene.mnt) == []
    finally:
        reused.communicate()
    wait_until(lambda: not alive(scene.filesystem))


# The mount table


@paused_at("prepared", "proxy")
def test_a_bind_mount_is_made_in_between(scene: Scene) -> None:
    victim = in_stub(scene)
    (scene.base / "late").mkdir()
    scene.ask()
    scene.manager.reached()
    scene.mount("--bind", str(scene.mnt), str(scene.base / "late"))
    scene.manager.no_more()
    scene.manager.go()
    report = scene.wait()
    assert report["left"] == [] and report["mounts_left"] == []
    assert scene.types(scene.base / "late") == ["tmpfs"]
    assert (scene.base / "late/file").read_bytes() == b"real contents"
    assert victim.run("os.read(file, 100)") == b"real contents"
    scene.replaced()


def test_the_mount_was_unmounted_lazily_before(scene: Scene) -> None:
    """There is no mount to switch, but the processes that hold something of it are moved."""
    victim = in_stub(scene)
    subprocess.run(["umount", "-l", str(scene.mnt)], check=True)
    report = scene.replace(freeze_cgroup=scene.cgroup("v1", victim.pid))
    assert report["left"] == [] and report["mounts"] == 0
    assert victim.run("os.read(file, 100)") == b"real contents" and victim.run("os.listdir('.')") == ["file"]
    assert scene.types() == []
    wait_until(lambda: not alive(scene.filesystem))


@paused_at("begun", "prepared", "proxy", "stopped")
def test_the_mount_is_unmounted_lazily_in_between(scene: Scene) -> None:
    victim = in_stub(scene)
    scene.ask(freeze_cgroup=scene.cgroup("v1", victim.pid))
    scene.manager.reached()
    subprocess.run(["umount", "-l", str(scene.mnt)], check=True)
    scene.manager.no_more()
    scene.manager.go()
    # Whether what somebody took away is then there again is all the same: the processes are on the real side.
    try:
        assert scene.wait()["left"] == []
    except SpfsError as error:
        assert "switched" in error.message or "mount" in error.message
        assert scene.row()["state"] == "mounted"
        assert scene.replace()["left"] == []
    assert victim.run("os.read(file, 100)") == b"real contents"
    assert set(scene.types()) <= {"tmpfs"}
    wait_until(lambda: not alive(scene.filesystem))


@paused_at("switched")
def test_the_real_mount_is_unmounted_as_soon_as_it_is_there(scene: Scene) -> None:
    victim = in_stub(scene)
    scene.ask(freeze_cgroup=scene.cgroup("v1", victim.pid))
    scene.manager.reached()
    subprocess.run(["umount", "-l", str(scene.mnt)], check=True)
    scene.manager.go()
    with pytest.raises(SpfsError, match="the mounts were switched, but.*instead of the real one"):
        scene.wait()
    assert victim.run("os.read(file, 100)") == b"real contents" and scene.types() == []
    wait_until(lambda: not scene.client.status()["mounts"])


@paused_at("prepared")
def test_another_mount_covers_it_in_between(scene: Scene) -> None:
    victim = in_stub(scene)
    scene.ask()
    scene.manager.reached()
    scene.mount("-t", "tmpfs", "-o", "mode=700", "cover", str(scene.mnt))
    (scene.mnt / "of-the-cover").touch()
    scene.manager.no_more()
    scene.manager.go()
    report = scene.wait()
    assert report["left"] == [] and victim.run("os.read(file, 100)") == b"real contents"
    # The cover is somebody's: it stays, and what is below it is said to be left.
    assert os.listdir(scene.mnt) == ["of-the-cover"]
    assert len(report["mounts_left"]) == 1 and str(scene.mnt) in report["mounts_left"][0]["mount"]
    subprocess.run(["umount", str(scene.mnt)], check=True)


# The real side hangs


@pytest.mark.parametrize("kind", FREEZERS[1:])
@paused_at("prepared")
def test_the_real_file_system_hangs_when_it_is_asked_first(scene: Scene, kind: str) -> None:
    """Who waits for it cannot be frozen: the attempt is given up, everybody runs, and it is tried again."""
    if shutil.which("bindfs") is None:
        pytest.skip("bindfs is not installed")
    victim = in_stub(scene)
    slow = scene.base / "slow"
    slow.mkdir()
    server = subprocess.Popen(["bindfs", "-f", str(scene.export), str(slow)], start_new_session=True)
    try:
        wait_until(lambda: scene.types(slow) == ["fuse"], what="the real file system to be there")
        scene.expect_mount(slow)
        victim.start("os.pread(file, 100, 0)")
        scene.held_by(victim.pid)
        group = scene.cgroup(kind, victim.pid)
        scene.ask(source=str(slow), freeze_cgroup=group)
        scene.manager.reached()
        server.send_signal(signal.SIGSTOP)
        scene.manager.no_more()
        scene.manager.go()
        wait_until(lambda: scene.row()["replace"]["stage"] == "frozen", what="an attempt to freeze to fail")
        assert "not frozen in" in scene.row()["replace"]["stages"][-1]["error"]
        wait_until(lambda: not scene.problems(), 5, "everybody to run again")
        server.send_signal(signal.SIGCONT)
        assert scene.wait()["left"] == []
        assert victim.result() == b"real contents"
        assert victim.run("os.read(file, 100)") == b"real contents"
        assert scene.types() == ["fuse"] and os.stat(scene.mnt).st_dev == os.stat(slow).st_dev
        wait_until(lambda: not alive(scene.filesystem))
    finally:
        server.kill()
        server.wait()
