"""The replace's process, and the manager with it, killed at random moments: the applications notice nothing, ever."""

from __future__ import annotations

import mmap
import os
import random
import signal
import stat
import threading
import time
from typing import Callable, List

import pytest
from manager_kit import alive
from replace_kit import TIMEOUT, Scene, paused_at, scene
from surgery_kit import Victim

from spfs.errors import SpfsError
from spfs.linux import mountapi
from spfs.testing import wait_until

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_cgroup1]

CONTENTS = bytes(range(256)) * (mmap.PAGESIZE // 256)
MOMENTS = 50

# Two threads: one does what it is told, the other one reads all the time, also by a path to what is mounted on the
# mount, and notes whatever is not as it should be.
USER = """
import mmap, os, threading
file, other = os.open("file", os.O_RDWR), os.open("other", os.O_RDONLY)
os.lseek(file, 100, os.SEEK_SET)
shared = mmap.mmap(file, 4096)
wrong, reads, stop = [], [], threading.Event()
def read():
    while not stop.wait(0.001):
        try:
            data = os.pread(file, 256, 0) + os.pread(other, 5, 0)
            with open(nested + "/own"): pass
            reads.append(len(data))
            if data != bytes(range(256)) + b"other":
                wrong.append(data)
        except OSError as error:
            wrong.append(error)
reader = threading.Thread(target=read)
"""
OVER = """
stop.set(); reader.join()
shared.close(); os.close(file); os.close(other); os.chdir("/")
"""


@pytest.fixture
def users(scene: Scene) -> List[Victim]:
    return [scene.victim() for _ in range(3)]


def begin(scene: Scene, users: List[Victim]) -> None:
    """A delayed mount in stub mode, with users who have just begun to read."""
    scene.delay()
    scene.file("file", CONTENTS)
    scene.file("other", b"other")
    scene.both("nested", stat.S_IFDIR)
    (scene.mount("-t", "tmpfs", "nested", str(scene.mnt / "nested")) / "own").touch()
    for user in users:
        user.run(f"import os; os.chdir({str(scene.mnt)!r})")
        user.run(f"nested = {str(scene.mnt / 'nested')!r}")
        user.run(USER)
    scene.client.mode("stub")
    for user in users:
        user.run("reader.start()")


def end(scene: Scene, users: List[Victim]) -> None:
    """Everything is as after a replace that nobody has disturbed; the users let go of it."""
    wait_until(lambda: not scene.problems(), 5, "everybody to run")
    scene.replaced()
    for user in users:
        count = user.run("len(reads)")
        wait_until(lambda: user.run("len(reads)") > count)
        assert user.run("[repr(one) for one in wrong]") == []
        assert user.run("os.read(file, 4)") == CONTENTS[100:104] and user.run("shared[:8]") == CONTENTS[:8]
        assert user.run("sorted(os.listdir('.'))") == ["file", "nested", "other"]
        assert user.run("os.stat('file').st_ino == os.fstat(file).st_ino")
        user.run(OVER)
    wait_until(lambda: not scene.client.status()["mounts"])
    while scene.types(scene.mnt / "nested"):
        mountapi.umount2(str(scene.mnt / "nested"), 0)  # nobody uses what is mounted there, copies and all
    mountapi.umount2(str(scene.mnt), mountapi.MNT_DETACH)
    assert scene.types() == []
    for name in os.listdir(scene.export):
        (scene.export / name).rmdir() if name == "nested" else (scene.export / name).unlink()


def go_on(scene: Scene, until: Callable[[], bool]) -> None:
    """Let jobs go on from their beginning, where they wait, until the condition is met."""
    done = threading.Event()

    def let_go() -> None:
        while not done.is_set():
            try:
                scene.manager.reached(0.2)
            except TimeoutError:
                continue
            scene.manager.go()

    thread = threading.Thread(target=let_go)
    thread.start()
    try:
        wait_until(until, TIMEOUT)
    finally:
        done.set()
        thread.join()


def undisturbed(scene: Scene, users: List[Victim], group: str) -> float:
    """Seconds that a replace takes."""
    begin(scene, users)
    scene.ask(freeze_cgroup=group)
    job = scene.manager.reached()
    start = time.monotonic()
    scene.manager.go()
    wait_until(lambda: not alive(job))
    took = time.monotonic() - start
    end(scene, users)
    return took


@paused_at("begun")
@pytest.mark.parametrize("with_manager", [False, True])
@pytest.mark.timeout(400)
def test_killed_at_random_moments(scene: Scene, users: List[Victim], with_manager: bool) -> None:
    group = scene.cgroup("v1", *(user.pid for user in users[1:]))
    assert group is not None
    took = min(undisturbed(scene, users, group) for _ in range(3))
    chance = random.Random(4711 + with_manager)
    for number in range(MOMENTS):
        moment = chance.random() * took
        begin(scene, users)
        scene.ask(freeze_cgroup=group)
        job = scene.manager.reached()
        scene.manager.go()
        time.sleep(moment)  # what is tested is that it does not matter how long
        if with_manager:
            os.kill(scene.manager.pid, signal.SIGKILL)
        os.kill(job, signal.SIGKILL) if alive(job) else None
        wait_until(lambda: not scene.problems(), 5, f"everybody to run after {moment} s ({number})")
        if with_manager:
            scene.manager.kill()
            scene.manager.start()
            scene.client = scene.manager.client(TIMEOUT)
        complete(scene, group)
        end(scene, users)


def complete(scene: Scene, group: str) -> None:
    """Have it done, by whoever is there: it may have been done, a new manager may be at it, or it must be asked for."""

    def over() -> bool:
        mounts = scene.client.status()["mounts"]
        if not mounts:
            return True
        wanted = mounts[0]["replace"]
        if wanted["phase"] == "failed":
            try:
                scene.ask(freeze_cgroup=group)
            except SpfsError:  # it has just ended
                pass
        return False

    go_on(scene, over)
