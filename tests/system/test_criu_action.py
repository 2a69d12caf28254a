"""The action script: by CRIU alone, called once or twice, and what is left when a restore fails: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any, Dict

import pytest
from criu_kit import STATE, WORK_DIR, Subject, World, criu, spfs_criu, world
from manager_kit import ENVIRONMENT, TOP

from spfs.linux.mountapi import MS
from spfs.testing import process_state, wait_until

__all__ = ["world"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_criu]


def script(world: World, name: str = "action", text: str = "") -> str:
    """The path of an executable file; by default of our script, as an administrator installs it."""
    path = world.base / name
    path.write_text(text or spfs_criu("action", "--script"))
    path.chmod(0o755)
    return str(path)


def plain(world: World) -> str:
    """As the script, by the command alone: CRIU starts a file, without arguments."""
    command = f"{sys.executable} -m spfs.cli.criu action"
    return script(world, "plain", f"#!/bin/sh\nexport PYTHONPATH={TOP}\nexec {command}\n")


def dumped(world: World, *options: str) -> Subject:
    (world.export / "file").write_bytes(b"contents")
    world.bind()
    subject = world.subject()
    subject.run(f"import os; fd = os.open({str(world.mnt / 'file')!r}, os.O_RDWR)")
    world.dump(subject, "--delayed", world.delayed, *options)
    world.unbind()
    world.server_goes()
    return subject


def nothing_is_left(world: World, subject: Subject) -> None:
    assert process_state(subject.pid) in ("", "Z")
    wait_until(lambda: not os.path.isdir(STATE) or os.listdir(STATE) == [], what="the state of the restore to go")
    assert world.types() == []
    assert world.rows() == []


def goes_on(world: World, subject: Subject) -> None:
    subject.start("os.read(fd, 100)")
    world.somebody_waits()
    world.server_comes()
    assert subject.result() == b"contents"
    assert world.wait()["data"]["left"] == []
    world.replaced()


@pytest.mark.parametrize("times", [1, 2])
def test_criu_itself_with_the_script(world: World, times: int) -> None:
    """Through its RPC CRIU 4.1 calls a script twice at each stage."""
    subject = dumped(world)
    scripts = ["--action-script", script(world)] + ["--action-script", plain(world)] * (times - 1)
    done = criu("restore", "-d", "-D", str(world.images), "-o", "restore.log", *scripts)
    assert done.returncode == 0, done.stderr
    goes_on(world, subject)


def test_a_dump_by_criu_itself_writes_the_record(world: World) -> None:
    """What is delayed is said by the administrator's file; the restore finds it beside the images."""
    (world.export / "file").write_bytes(b"contents")
    world.bind()
    subject = world.subject()
    subject.run(f"import os; fd = os.open({str(world.mnt / 'file')!r}, os.O_RDWR)")
    mount: Dict[str, Any] = {"key": "data", "type": "none", "source": str(world.export), "flags": int(MS.BIND)}
    configuration = world.base / "criu.json"
    mount["places"] = [{"mountpoint": str(world.mnt)}]
    configuration.write_text(json.dumps({"version": 1, "mounts": [mount]}))
    environment = {"SPFS_CRIU_CONFIG": str(configuration)}
    arguments = ["-D", str(world.images), "--action-script", script(world)]
    done = criu("dump", "-t", str(subject.pid), *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    subject.reap()
    (listed,) = json.loads(spfs_criu("files", str(world.images), "--json"))
    assert [file["path"] for file in listed["files"]] == ["file"]
    world.unbind()
    world.server_goes()
    assert criu("restore", "-d", *arguments).returncode == 0
    goes_on(world, subject)


def test_images_without_a_record(world: World) -> None:
    """The files are then read from the images."""
    subject = dumped(world)
    (world.images / "spfs-criu.json").unlink()
    said = world.restore(status=2)
    assert "none is written beside the images" in said
    listed = spfs_criu("files", str(world.images), str(world.mnt))
    assert "file" in listed and f"fd 3 of {subject.pid}" in listed
    world.restore("--delayed", world.delayed)
    goes_on(world, subject)


@pytest.mark.parametrize("how", ["a file is missing", "vetoed", "nothing to mount on"])
def test_a_restore_that_fails_leaves_nothing(world: World, how: str) -> None:
    subject = dumped(world)
    options = []
    if how == "a file is missing":
        (subject.directory / "output").unlink()
    elif how == "vetoed":
        veto = script(world, "veto", '#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]\n')
        options = ["--action-script", veto]
    else:
        world.mnt.rmdir()
    said = world.restore(*options, status=1)
    assert "cannot restore: " in said and "criu ended with status 1" in said
    nothing_is_left(world, subject)
    if how == "nothing to mount on":
        assert f"cannot mount on {world.mnt}" in said
        world.mnt.mkdir()


@pytest.mark.parametrize("stage", ["pre-restore", "post-restore"])
def test_criu_is_killed_and_the_guard_cleans_up(world: World, stage: str) -> None:
    subject = dumped(world)
    # Its parent is CRIU. Waits until it is gone: nothing of what comes after a script's end may happen.
    kill = script(world, "kill", f"""#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = {stage} ] || exit 0
criu=$PPID
kill -9 $criu
while [ -e /proc/$criu/exe ]; do :; done
""")
    # CRIU calls the last one first.
    done = criu("restore", "-d", "-D", str(world.images), "--action-script", kill, "--action-script", script(world))
    assert done.returncode == -signal.SIGKILL
    if stage == "pre-restore":
        return nothing_is_left(world, subject)
    # The process is there, though it waits for ever for CRIU: what it holds is no longer kept from the real mount.
    wait_until(lambda: os.listdir(STATE) == [], what="the guard to have done its work")
    assert world.rows()[0]["replace"]["phase"] in ("waiting", "running")
    os.kill(subject.pid, signal.SIGKILL)
    world.server_comes()
    world.wait()
    world.replaced()


def killer(world: World, stage: str, whom: str) -> str:
    """A script that kills one of ours when that stage is done: CRIU calls ours first. ``whom``: what of the status."""
    code = f"""if True:
        import os, select, signal
        from spfs.client import ManagerClient
        pid = ManagerClient("{WORK_DIR}/control.sock").status(){whom}["pid"]
        end = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([end], [], [], 10)
    """
    text = f"#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = {stage} ] || exit 0\nexport PYTHONPATH={TOP}\n"
    return script(world, "killer", f"{text}exec {sys.executable} -c '{code}'\n")


@pytest.mark.parametrize("stage", ["pre-restore", "post-restore", "pre-resume"])
def test_the_manager_is_killed_and_another_one_goes_on(world: World, stage: str) -> None:
    subject = dumped(world)
    world.restore("--action-script", killer(world, stage, '["manager"]'))
    goes_on(world, subject)


@pytest.mark.parametrize("stage", ["pre-restore", "pre-resume"])
def test_the_file_system_is_killed_and_it_is_said(world: World, stage: str) -> None:
    subject = dumped(world)
    said = world.restore("--action-script", killer(world, stage, '["mounts"][0]'), status=1)
    if stage == "pre-restore":
        assert "criu ended with status 1" in said
        return nothing_is_left(world, subject)
    assert "cannot let what was restored go on: " in said and "has ended (signal 9)" in said
    assert "ENOTCONN: end them, spfs unmount" in said
    assert os.listdir(STATE) == []
    os.kill(subject.pid, signal.SIGKILL)
    world.client().unmount(world.rows()[0]["id"])
    assert world.types() == []


def test_in_the_foreground_with_progress(world: World) -> None:
    subject = dumped(world)
    arguments = ["restore", "-D", str(world.images), "-o", "restore.log", "--wait"]
    with subprocess.Popen(
        [sys.executable, "-m", "spfs.cli.criu", *arguments], stdin=subprocess.DEVNULL, text=True,
        env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        world.stack.callback(process.kill)
        wait_until(lambda: world.types() == ["fuse.stubfs"], 20)
        assert process.stderr is not None and process.stdout is not None
        told = process.stderr.readline()
        while "No such file or directory" not in told:
            assert told.startswith("spfs-criu: data@"), told
            told = process.stderr.readline()
        world.server_comes()
        assert "done" in process.stdout.readline()
        assert process.poll() is None  # as criu restore without -d
        assert subject.run("os.read(fd, 100)") == b"contents"
        os.kill(subject.pid, signal.SIGKILL)
        process.communicate(timeout=20)
        assert process.returncode == 0


def test_two_restores_of_one_set_of_images_at_a_time_are_kept_apart(world: World) -> None:
    subject = dumped(world)
    world.restore()
    (row,) = world.rows()
    assert row["id"].startswith("data@") and row["mode"] == "stub"
    said = world.restore(status=1)  # the pid is taken, and the path
    assert "criu ended with status 1" in said
    assert [one["id"] for one in world.rows()] == [row["id"]]
    goes_on(world, subject)
