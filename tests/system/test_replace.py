"""The whole replace by a real manager: what processes hold is the real file system's afterwards, and FUSE is gone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from replace_kit import FREEZERS, Scene, scene, statements

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]

OPEN_MANY = """
import mmap, os, fcntl
os.chdir("dir")
place = os.open(".", os.O_RDONLY)
plain = os.open("../plain", os.O_RDONLY)
os.lseek(plain, 5, os.SEEK_SET)
append = os.open("../log", os.O_RDWR | os.O_APPEND | os.O_NONBLOCK)
private = os.open("../plain", os.O_RDWR | os.O_CLOEXEC)
os.set_inheritable(plain, True)
copy = os.dup(plain)
path = os.open("../plain", os.O_PATH)
queue = os.open("../queue", os.O_RDWR)
os.write(queue, b"not read yet")
shared = mmap.mmap(private, 8192)
own = mmap.mmap(private, 8192, mmap.MAP_PRIVATE)
own[0:4] = b"MINE"
"""


def standard(scene: Scene) -> bytes:
    """Directory, files and a fifo; the contents of "plain"."""
    contents = bytes(range(256)) * 40
    scene.delay()
    scene.both("dir", stat.S_IFDIR)
    scene.file("dir/inner", b"inner")
    scene.file("plain", contents)
    scene.file("log", b"first\n")
    scene.both("queue", stat.S_IFIFO)
    return contents


@pytest.mark.parametrize("kind", FREEZERS)
def test_everything_a_process_holds_is_moved(scene: Scene, kind: str) -> None:
    contents = standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run(OPEN_MANY)
    scene.client.mode("stub")
    report = scene.replace(freeze_cgroup=scene.cgroup(kind, victim.pid))
    scene.replaced()

    assert report["left"] == [] and report["mounts_left"] == [] and report["ended"] and report["notes"] == []
    assert [one["pid"] for one in report["processes"]] == [victim.pid]
    moved = report["moved"]
    assert moved == {  # two of the files by the mmap objects, which keep descriptors of their own
        "file": 6, "directory": 1, "path": 1, "fifo": 1, "cwd": 1, "shared mapping": 1, "private mapping": 1
    }
    assert 0 < report["blackout"] < 5
    assert victim.run("os.getcwd()") == str(scene.mnt / "dir")
    assert victim.run("os.listdir(place)") == ["inner"]
    assert victim.run("os.read(plain, 3)") == contents[5:8]
    assert victim.run("os.lseek(copy, 0, os.SEEK_CUR)") == 8
    assert victim.run("[os.get_inheritable(fd) for fd in (plain, private)]") == [True, False]
    assert victim.run("bool(fcntl.fcntl(append, fcntl.F_GETFL) & os.O_NONBLOCK)")
    victim.run("os.write(append, b'second')")
    assert (scene.export / "log").read_bytes() == b"first\nsecond"
    assert victim.run("os.fstat(path).st_ino") == (scene.export / "plain").stat().st_ino
    assert victim.run("os.read(queue, 100)") == b"not read yet"
    # A page that was written to is the process's own, as it was in the restore; the next one is the file's.
    assert victim.run("own[0:10] + own[4096:8192]") == b"MINE" + bytes(6) + contents[4096:8192]
    assert victim.run("shared[0:8192]") == contents[:8192]
    victim.run("shared[100:104] = b'both'")
    assert (scene.export / "plain").read_bytes()[100:104] == b"both"


@pytest.mark.parametrize("kind", FREEZERS)
def test_threads_and_what_they_have_of_their_own(scene: Scene, kind: str) -> None:
    """One thread has its own working directory, one its own descriptors; all work on while they are moved."""
    contents = standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run(
        statements(
            """
            import ctypes, os, threading
            libc = ctypes.CDLL(None, use_errno=True)
            shared = os.open("plain", os.O_RDONLY)
            go, stop, ready = threading.Event(), threading.Event(), threading.Barrier(5)
            seen, wrong = [0] * 4, []
            CLONE_FS, CLONE_FILES = 0x200, 0x400

            def work(number):
                if number == 0:
                    assert libc.unshare(CLONE_FS) == 0
                    os.chdir("dir")
                mine = shared
                if number == 1:
                    assert libc.unshare(CLONE_FILES) == 0
                    mine = os.open("plain", os.O_RDONLY)
                ready.wait()
                go.wait()
                while not stop.is_set():
                    try:
                        place = seen[number] * 7 % 9000
                        if os.pread(mine, 16, place) != CONTENTS[place:place + 16]:
                            wrong.append((number, place))
                        if number == 0 and open("inner", "rb").read() != b"inner":
                            wrong.append("inner")
                    except OSError as error:
                        wrong.append(repr(error))
                        break
                    seen[number] += 1
                    stop.wait(0.0005)
            """
        )
    )
    victim.run(f"CONTENTS = bytes(range(256)) * {len(contents) // 256}")
    victim.run("threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]")
    victim.run("for thread in threads: thread.start()\nready.wait()")
    scene.client.mode("stub")
    victim.run("go.set()")
    scene.client.status()
    report = scene.replace(freeze_cgroup=scene.cgroup(kind, victim.pid))
    before = victim.run("list(seen)")
    victim.run("while not all(now > then + 5 for now, then in zip(seen, %r)): stop.wait(0.001)" % (before,))
    victim.run("stop.set()\nfor thread in threads: thread.join()")
    assert victim.run("wrong") == []
    assert report["left"] == [] and report["moved"]["cwd"] == 2 and report["moved"]["file"] >= 3
    scene.replaced()


@pytest.mark.parametrize("kind", FREEZERS)
def test_forked_processes_go_on_sharing_one_description(scene: Scene, kind: str) -> None:
    contents = standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    child = victim.run(
        statements(
            """
            import os
            file = os.open("plain", os.O_RDONLY)
            alone = os.open("plain", os.O_RDONLY)
            ask, answer = os.pipe(), os.pipe()
            child = os.fork()
            if child == 0:
                os.close(ask[1])  # so that the parent's end is its end
                while os.read(ask[0], 1):
                    os.write(answer[1], os.read(file, 10))
                os._exit(0)
            child
            """
        )
    )
    scene.client.mode("stub")
    report = scene.replace(freeze_cgroup=scene.cgroup(kind, victim.pid, child))
    scene.replaced()
    assert report["left"] == [] and {one["pid"] for one in report["processes"]} == {victim.pid, child}
    seen = [victim.run("os.read(file, 10)")]
    seen.append(victim.run("os.write(ask[1], b'x'); os.read(answer[0], 10)"))
    seen.append(victim.run("os.read(file, 10)"))
    assert b"".join(seen) == contents[:30]
    assert victim.run("os.read(alone, 10)") == contents[:10]


def test_a_process_that_is_not_root(scene: Scene) -> None:
    contents = standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    # By relative paths: the way to the mount is not open to everybody.
    victim.run("import fcntl, mmap, os\nos.setgroups([])")
    victim.run("os.setresgid(65534, 65534, 65534)\nos.setresuid(65534, 65534, 65534)")
    victim.run(OPEN_MANY)
    scene.client.mode("stub")
    report = scene.replace(freeze_cgroup=scene.cgroup("v1", victim.pid))
    scene.replaced()
    assert report["left"] == []
    assert victim.run("os.read(plain, 3)") == contents[5:8] and victim.run("os.getresuid()") == (65534,) * 3
    victim.run("made = os.open('../made', os.O_CREAT | os.O_WRONLY)")
    assert (scene.export / "made").stat().st_uid == 65534


def test_two_processes_without_a_cgroup_and_one_that_has_nothing_to_do_with_it(scene: Scene) -> None:
    standard(scene)
    users = [scene.victim(cwd=scene.mnt) for _ in range(2)]
    other = scene.victim(cwd=scene.base)
    for user in users:
        user.run("import os\nfile = os.open('plain', os.O_RDONLY)")
    scene.client.mode("stub")
    report = scene.replace()
    scene.replaced()
    assert {one["pid"] for one in report["processes"]} == {user.pid for user in users}
    assert other.run("1 + 1") == 2


def test_processes_of_the_cgroup_without_a_reference_and_users_outside_of_it(scene: Scene) -> None:
    standard(scene)
    inside, outside = scene.victim(cwd=scene.base), scene.victim(cwd=scene.mnt)
    scene.client.mode("stub")
    report = scene.replace(freeze_cgroup=scene.cgroup("v2", inside.pid))
    scene.replaced()
    assert [one["pid"] for one in report["processes"]] == [outside.pid] and report["moved"] == {"cwd": 1}
    assert inside.run("__import__('os').getcwd()") == str(scene.base)


def test_a_mount_that_nobody_uses(scene: Scene) -> None:
    standard(scene)
    report = scene.replace(freeze_cgroup=scene.cgroup("v1"))
    scene.replaced()
    assert report["processes"] == [] and report["moved"] == {} and report["ended"]
    assert Path(scene.mnt, "log").read_bytes() == b"first\n"
    assert os.listdir(scene.mnt / "dir") == ["inner"]
