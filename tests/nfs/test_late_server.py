"""The delayed mount against a real NFS server that is late, goes away again, or does not trust root."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import psutil
import pytest
from nfs_kit import PATIENCE, NfsScene
from replace_kit import statements
from test_replace import OPEN_MANY

from spfs.errors import SpfsError
from spfs.testing import wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.timeout(400)]

versions = pytest.mark.parametrize("scene", [4, 3], indirect=True, ids=["nfs4", "nfs3"])
CONTENTS = bytes(range(256)) * 40


def standard(scene: NfsScene) -> None:
    scene.delay()
    scene.both("dir", stat.S_IFDIR)
    scene.file("dir/inner", b"inner")
    scene.file("plain", CONTENTS)
    scene.file("log", b"first\n")
    scene.both("queue", stat.S_IFIFO)


@versions
@pytest.mark.parametrize("absence", ["stopped", "silent"])
def test_a_server_that_is_late(scene: NfsScene, absence: str) -> None:
    """What is blocked goes on with the server's contents, and what the process holds is NFS's, written and read."""
    standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run(OPEN_MANY)
    scene.client.mode("stub")
    scene.server.stop() if absence == "stopped" else scene.server.block()
    scene.ask(freeze_cgroup=scene.cgroup("v2", victim.pid))
    victim.start("os.pread(plain, 3, 5)")
    scene.held_by(victim.pid)
    # An attempt fails at once (version 4 whose connection is refused) or waits within the kernel for an answer.
    wait_until(lambda: scene.attempts() >= 2 or in_nfs_mount(scene), PATIENCE, "attempts to mount")
    scene.server.start() if absence == "stopped" else scene.server.unblock()
    report = scene.wait()
    assert victim.result() == CONTENTS[5:8]
    scene.replaced()

    assert report["left"] == [] and report["mounts_left"] == [] and report["ended"] and report["notes"] == []
    assert victim.run("os.getcwd()") == str(scene.mnt / "dir")
    assert victim.run("os.listdir(place)") == ["inner"]
    assert victim.run("os.read(plain, 3)") == CONTENTS[5:8] and victim.run("os.lseek(copy, 0, os.SEEK_CUR)") == 8
    assert victim.run("os.read(queue, 100)") == b"not read yet"
    assert victim.run("own[0:10] + own[4096:8192]") == b"MINE" + bytes(6) + CONTENTS[4096:8192]
    victim.run("os.write(append, b'second')\nos.fsync(append)\nshared[100:104] = b'both'\nshared.flush()")
    with scene.elsewhere() as other:
        assert (other / "log").read_bytes() == b"first\nsecond"
        assert (other / "plain").read_bytes()[100:104] == b"both"


def test_a_server_that_never_comes_is_given_up(scene: NfsScene) -> None:
    """The abort ends an attempt that hangs within the kernel; everything is as it was, and the next one works."""
    standard(scene)
    scene.client.mode("stub")
    scene.server.block()
    scene.ask()
    wait_until(lambda: in_nfs_mount(scene), PATIENCE, "the attempt to hang")
    assert scene.client.abort(scene.id) == [scene.id]
    with pytest.raises(SpfsError, match="aborted"):
        scene.wait()
    scene.untouched()
    scene.server.unblock()
    scene.replace()
    scene.replaced()


def in_nfs_mount(scene: NfsScene) -> bool:
    """Does a process beneath the manager wait, within the kernel, for the server's first answer?"""
    assert scene.manager.pid
    for process in psutil.Process(scene.manager.pid).children(recursive=True):
        try:
            if "rpc_" in Path(f"/proc/{process.pid}/stack").read_text():
                return True
        except OSError:
            pass
    return False


@versions
def test_the_server_goes_away_in_proxy_mode(scene: NfsScene) -> None:
    """Who waits for it waits; the rest of the file system answers; when it is back all is done, once."""
    standard(scene)
    for number in range(4):
        scene.file(f"log{number}", b"first\n")
    with scene.elsewhere() as real:
        victims = [scene.victim(cwd=scene.mnt) for _ in range(4)]
        for number, victim in enumerate(victims):
            victim.run(f"import os\nlog = os.open('log{number}', os.O_RDWR | os.O_APPEND)")
        scene.client.mode("proxy", scene.id, proxy_dir=str(real))
        for victim in victims:
            victim.run("os.write(log, b'before\\n'); os.fsync(log)")
        scene.server.block()
        for victim in victims:
            victim.start("os.write(log, b'while\\n'); os.fsync(log)")
        for victim in victims:
            victim.blocked()
        # Neither the manager nor the file system's own socket waits with them.
        assert scene.row()["mode"] == "proxy"
        assert scene.client.held(scene.id) == []
        scene.server.unblock()
        for victim in victims:
            victim.result()
        for number in range(4):
            assert (real / f"log{number}").read_text() == "first\nbefore\nwhile\n"
        for victim in victims:
            victim.close()
        scene.client.unmount(scene.id)


def test_root_is_nobody_on_the_server(scene: NfsScene) -> None:
    """What an ordinary process holds in places that only its user may enter is found and moved all the same."""
    scene.delay()
    private = scene.export / "private"
    scene.both("private", stat.S_IFDIR)
    scene.file("private/file", b"secret")
    for path in (private, private / "file"):
        os.chown(path, 4711, 4711)
    private.chmod(0o700)
    (private / "file").chmod(0o600)
    scene.server.squash_root()
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os\nos.setgroups([])\nos.setresgid(4711, 4711, 4711)\nos.setresuid(4711, 4711, 4711)")
    victim.run("os.chdir('private')\nfile = os.open('file', os.O_RDWR)")
    scene.client.mode("stub")
    victim.start("os.pread(file, 100, 0)")
    scene.held_by(victim.pid)
    report = scene.replace()
    assert victim.result() == b"secret"
    assert report["left"] == []
    scene.replaced()
    assert victim.run("os.getcwd()") == str(scene.mnt / "private")
    victim.run("os.pwrite(file, b'SECRET', 0)\nos.fsync(file)\nmade = os.open('made', os.O_CREAT | os.O_WRONLY, 0o600)")
    assert (private / "file").read_bytes() == b"SECRET"
    assert ((private / "made").stat().st_uid, (private / "made").stat().st_gid) == (4711, 4711)


@versions
def test_locks_are_the_servers(scene: NfsScene) -> None:
    """Locks of both kinds are the server's afterwards: another client cannot have them, until they are let go."""
    standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run(
        statements(
            """
            import fcntl, os
            record, whole = os.open("plain", os.O_RDWR), os.open("log", os.O_RDWR)
            fcntl.lockf(record, fcntl.LOCK_EX, 10, 100)
            fcntl.flock(whole, fcntl.LOCK_EX)
            """
        )
    )
    scene.client.mode("stub")
    report = scene.replace()
    assert report["left"] == []
    scene.replaced()
    with scene.elsewhere() as other:
        assert not locked(other / "plain", "lockf", 0, 100)
        assert locked(other / "plain", "lockf", 105, 1)
        assert locked(other / "log", "flock")
        victim.run("fcntl.lockf(record, fcntl.LOCK_UN, 10, 100)\nfcntl.flock(whole, fcntl.LOCK_UN)")
        assert not locked(other / "plain", "lockf", 105, 1)
        assert not locked(other / "log", "flock")


def locked(path: Path, kind: str, start: int = 0, length: int = 0) -> bool:
    """Is it somebody else's? Asked by a process of its own, which has no lock that could be lost by a close."""
    call = f"fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, {length}, {start})"
    if kind == "flock":
        call = "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    code = f"import errno, fcntl\nf = open({str(path)!r}, 'r+')\n"
    code += f"try: {call}\nexcept OSError as error: print(errno.errorcode[error.errno])"
    done = subprocess.run(["python3", "-c", code], check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() in ("", "EAGAIN", "EACCES"), done.stdout
    return bool(done.stdout)


@versions
def test_a_lock_that_somebody_else_has_on_the_server(scene: NfsScene) -> None:
    """On the stand-in locks were this machine's alone: the file stays there, locked as it was, until it can be had."""
    standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import fcntl, os\nfile = os.open('plain', os.O_RDWR)\nfcntl.lockf(file, fcntl.LOCK_EX, 10, 100)")
    with scene.elsewhere() as other, holding(other / "plain", 105) as holder:
        scene.client.mode("stub")
        report = scene.replace()
        (left,) = report["left"]
        assert left["path"] == "plain" and "lock" in left["reason"]
        assert victim.run("os.pread(file, 4, 0)") == CONTENTS[:4]
        assert "POSIX" in victim.run("open(f'/proc/self/fdinfo/{file}').read()")
        holder.communicate("\n", timeout=PATIENCE)
        assert scene.replace()["left"] == []
        scene.replaced()
        assert locked(other / "plain", "lockf", 105, 1)


@versions
def test_a_lock_that_another_client_tries_to_get_all_the_time(scene: NfsScene) -> None:
    """It gets it in the gap between two calls, and that is said; or it does not get it."""
    standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import fcntl, os\nfile = os.open('plain', os.O_RDWR)\nfcntl.lockf(file, fcntl.LOCK_EX, 10, 100)")
    scene.client.mode("stub")
    for_it = victim.run("open(f'/proc/self/fdinfo/{file}').read().count('POSIX')")
    with scene.elsewhere() as other, holding(other / "plain", 200) as rival:
        # What it has tells nothing yet; from here on it wants the victim's bytes, too.
        assert rival.stdin is not None and rival.stdout is not None
        rival.stdin.write("105\n")
        rival.stdin.flush()
        report = scene.replace()
        lost = [left for left in report["left"] if "lock" in left["reason"]]
        held = victim.run("open(f'/proc/self/fdinfo/{file}').read().count('POSIX')")
        rival.kill()
        rival.wait()
        if lost:
            assert lost[0]["path"] == "plain"
        else:
            assert report["left"] == [] and held == for_it == 1
            assert locked(other / "plain", "lockf", 105, 1)
            scene.replaced()


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
wanted = sys.stdin.readline().strip()
while wanted:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(wanted))
        wanted = sys.stdin.readline()
    except OSError:
        pass
"""


@contextmanager
def holding(path: Path, start: int) -> "Iterator[subprocess.Popen[str]]":
    """A process that has locked a byte of the file; told a number, it tries to get that byte until it has it."""
    command = [sys.executable, "-c", HOLDER, str(path), str(start)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@versions
def test_unlinked_after_the_replace(scene: NfsScene) -> None:
    """A file that was opened on the stand-in is unlinked on NFS: renamed silly while it is open, and then gone."""
    standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os\nfile = os.open('plain', os.O_RDWR)")
    scene.client.mode("stub")
    assert scene.replace()["left"] == []
    scene.replaced()
    victim.run("os.unlink('plain')")
    assert victim.run("os.pread(file, 4, 0)") == CONTENTS[:4]
    silly = [name for name in scene.names() if name.startswith(".nfs")]
    assert len(silly) == (1 if scene.version == 3 else len(silly)) and "plain" not in scene.names()
    victim.run("os.close(file)")
    wait_until(lambda: not [name for name in scene.names() if name.startswith(".nfs")], PATIENCE, "silly names to go")


@versions
def test_unlinked_before_the_replace(scene: NfsScene) -> None:
    """A file without a name stays where it is, or is moved without one: its contents are kept, no name is left."""
    standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os\nfile = os.open('gone', os.O_CREAT | os.O_RDWR)\nos.write(file, b'kept')\nos.unlink('gone')")
    scene.client.mode("stub")
    report = scene.replace()
    assert victim.run("os.pread(file, 10, 0)") == b"kept"
    victim.run("os.pwrite(file, b'KEPT', 0)")
    assert victim.run("os.pread(file, 10, 0)") == b"KEPT"
    if not report["left"]:
        scene.replaced()
    victim.run("os.close(file)")
    expected = ["dir", "dir/inner", "log", "plain", "queue"]
    wait_until(lambda: scene.names() == expected, PATIENCE, "nothing but the files that were there")
    wait_until(lambda: not scene.users(), PATIENCE, "nobody to hold anything of the stand-in")


@versions
def test_unlinked_and_shared_before_the_replace(scene: NfsScene) -> None:
    """Two processes with one description and a mapping of it: what one writes the other one sees, wherever it is."""
    standard(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run(
        statements(
            """
            import mmap, os
            file = os.open("gone", os.O_CREAT | os.O_RDWR)
            os.write(file, b"kept" * 1024)
            shared = mmap.mmap(file, 4096)
            os.unlink("gone")
            down, up = os.pipe(), os.pipe()
            if not os.fork():
                os.close(down[1])
                while os.read(down[0], 1):
                    os.write(up[1], os.pread(file, 4, 0) + shared[:4] + b"%d" % os.lseek(file, 1, os.SEEK_CUR))
            def ask():
                os.write(down[1], b"x")
                return os.read(up[0], 100)
            """
        )
    )
    assert victim.run("ask()") == b"keptkept4097"
    scene.client.mode("stub")
    report = scene.replace()
    assert len({left["reason"] for left in report["left"]}) <= 1
    if not report["left"]:
        scene.replaced()
    victim.run("os.pwrite(file, b'KEPT', 0)\nshared.flush()")
    assert victim.run("ask(), os.lseek(file, 0, os.SEEK_CUR)") == (b"KEPTKEPT4098", 4098)
    victim.close()
    expected = ["dir", "dir/inner", "log", "plain", "queue"]
    wait_until(lambda: scene.names() == expected, PATIENCE, "nothing but the files that were there")


def test_a_target_in_its_own_namespaces(scene: NfsScene) -> None:
    """User, mount and pid namespace of its own: NFS is not mounted by a user namespace, and need not be."""
    scene.real_file("plain", b"real")
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "sleep", "1000"]
    )
    scene.cleanup(lambda: (holder.kill(), holder.wait()))
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    wait_until(lambda: children.read_text().split(), PATIENCE, "the namespaces")
    inside = int(children.read_text().split()[0])
    wait_until(lambda: Path(f"/proc/{inside}/comm").read_text() == "sleep\n", PATIENCE, "the target")
    answer = scene.client.mount(scene.id, str(scene.mnt), "restore", ns_pid=inside)
    scene.filesystem, scene.device = answer["pid"], answer["device"]
    scene.client.create(scene.id, [{"path": "plain", "mode": stat.S_IFREG | 0o666, "size": 4}])
    victim = scene.victim(("nsenter", "-t", str(inside), "-U", "-m", "--preserve-credentials", "--"))
    victim.run(f"import os\nos.chdir({str(scene.mnt)!r})\nfile = os.open('plain', os.O_RDONLY)")
    scene.client.mode("stub")
    victim.start("os.pread(file, 10, 0)")
    scene.held_by(victim.pid)
    report = scene.replace()
    assert victim.result() == b"real" and report["left"] == []
    mounted = Path(f"/proc/{inside}/mountinfo").read_text()
    there = [line for line in mounted.splitlines() if f" {scene.mnt} " in line]
    assert [line.partition(" - ")[2].split()[0] for line in there] == ["nfs4"]
    assert scene.types() == []
    assert victim.run("os.pread(file, 10, 0)") == b"real" and victim.run("os.getcwd()") == str(scene.mnt)


def test_what_is_mounted_on_it_stays_on_it(scene: NfsScene) -> None:
    standard(scene)
    inner = scene.mount("-t", "tmpfs", "inner", str(scene.mnt / "dir"))
    (inner / "of-the-inner").write_text("x")
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os\nfile, other = os.open('plain', os.O_RDONLY), os.open('dir/of-the-inner', os.O_RDONLY)")
    scene.client.mode("stub")
    assert scene.replace()["left"] == []
    scene.replaced()
    assert scene.types(inner) == ["tmpfs"] and os.listdir(inner) == ["of-the-inner"]
    assert victim.run("os.pread(other, 5, 0)") == b"x"
    assert sorted(os.listdir(scene.mnt)) == ["dir", "log", "plain", "queue"]


@versions
def test_what_the_server_does_not_have(scene: NfsScene) -> None:
    """A wrong export is refused at once and for good; nothing has changed."""
    standard(scene)
    scene.client.mode("stub")
    with pytest.raises(SpfsError, match="No such file|not exported|denied") as caught:
        scene.replace(source=scene.source + "-nonesuch")
    assert caught.value.hint
    scene.untouched()
