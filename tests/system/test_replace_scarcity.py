"""What the processes, or the real file system, lack when their turn comes: they work on, and it can be done again."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Iterator

import pytest
from manager_kit import alive
from mount_kit import daemons
from replace_kit import TIMEOUT, Scene, paused_at, scene
from surgery_kit import Victim

from spfs.errors import SpfsError
from spfs.testing import wait_until

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_cgroup1]

CONTENTS = b"real contents"


@pytest.fixture
def user(scene: Scene) -> Victim:
    scene.delay()
    scene.file("file", CONTENTS)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import mmap, os, resource\nfile = os.open('file', os.O_RDWR)\nshared = mmap.mmap(file, 13)")
    scene.client.mode("stub")
    return victim


def test_a_process_without_a_free_descriptor(scene: Scene, user: Victim) -> None:
    other = scene.victim(cwd=scene.mnt)
    user.run("resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))")
    user.run("full = []\ntry:\n    while True: full.append(os.dup(0))\nexcept OSError as error: number = error.errno")
    assert user.run("number") == errno.EMFILE
    group = scene.cgroup("v1", user.pid, other.pid)
    report = scene.replace(freeze_cgroup=group)
    assert {one["pid"] for one in report["left"]} == {user.pid}
    assert all("open files" in one["reason"] for one in report["left"]), report["left"]
    assert user.run("os.pread(file, 100, 0)") == CONTENTS and user.run("os.stat('file').st_size") == 13
    assert user.run("len(full)") == len(set(user.run("full"))) and alive(scene.filesystem)
    user.run("for fd in full: os.close(fd)")
    assert scene.replace(freeze_cgroup=group)["left"] == []
    assert user.run("os.pread(file, 100, 0)") == CONTENTS
    scene.replaced()


def test_a_process_without_memory(scene: Scene, user: Victim) -> None:
    pages = int(Path(f"/proc/{user.pid}/statm").read_text().split()[0])
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(user.pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
    group = scene.cgroup("v1", user.pid)
    report = scene.replace(freeze_cgroup=group)
    assert {one["pid"] for one in report["left"]} == {user.pid}
    assert all("Cannot allocate memory" in one["reason"] for one in report["left"]), report["left"]
    resource.prlimit(user.pid, resource.RLIMIT_AS, unlimited)
    assert user.run("os.pread(file, 100, 0)") == CONTENTS and user.run("shared[:]") == CONTENTS
    assert scene.replace(freeze_cgroup=group)["left"] == []
    assert user.run("os.pread(file, 100, 0)") == CONTENTS and user.run("shared[:]") == CONTENTS
    scene.replaced()


# The real file system goes away


@pytest.fixture
def server(scene: Scene) -> "Iterator[Server]":
    made = Server(scene)
    scene.cleanup(made.end)
    yield made


class Server:
    """The real side served by a process, which can be killed; ``path`` is what to bind."""

    def __init__(self, scene: Scene) -> None:
        self.path = scene.base / "served"
        self._export = scene.export
        self.path.mkdir()
        scene.expect_mount(self.path)
        self.start()

    def start(self) -> None:
        self._command = f"bindfs {self._export} {self.path}"
        subprocess.run(self._command.split(), check=True, timeout=TIMEOUT)

    def end(self) -> None:
        for pid in daemons(self._command):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not daemons(self._command))


@paused_at("begun", "prepared", "proxy", "frozen", "stopped", "exchanged", "operated")
def test_the_real_file_system_dies_in_the_middle(scene: Scene, server: Server, user: Victim) -> None:
    """As with any file system that dies, its users get errors; nobody stands still, and the replace comes to an end."""
    group = scene.cgroup("v1", user.pid)
    scene.ask(source=str(server.path), freeze_cgroup=group)
    scene.manager.reached()
    server.end()
    scene.manager.no_more()
    scene.manager.go()
    try:
        scene.wait()
    except SpfsError as error:
        assert error.errno == errno.ENOTCONN, error
        if scene.manager.where == "begun":
            scene.untouched()
            subprocess.run(["umount", "-l", str(server.path)], check=True)
            server.start()
            assert scene.replace(source=str(server.path), freeze_cgroup=group)["left"] == []
            assert user.run("os.pread(file, 100, 0)") == CONTENTS
    else:
        assert scene.manager.where != "begun"
        user.run("try: os.pread(file, 100, 0)\nexcept OSError as error: number = error.errno")
        assert user.run("number") == errno.ENOTCONN
    wait_until(lambda: not scene.problems(), 5, "everybody to run")
    assert user.run("1 + 1") == 2 and len(scene.types()) == 1
