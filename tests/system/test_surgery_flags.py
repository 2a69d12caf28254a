"""What belongs to an open file besides its contents: flags, owners of signals, hints. And what is nobody's business."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from replace_kit import Scene, scene
from surgery_kit import Mounts, Victim, mounts, victim

__all__ = ["mounts", "scene", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

FLAGS = ["0", "os.O_APPEND", "os.O_NONBLOCK", "os.O_NOATIME", "os.O_DSYNC", "os.O_SYNC", "os.O_NOFOLLOW", "0o100000"]


@pytest.mark.parametrize("mode", ["os.O_RDONLY", "os.O_WRONLY", "os.O_RDWR"])
def test_flags_of_opening(mounts: Mounts, victim: Victim, mode: str) -> None:
    """Each by itself and all at once; also those that were changed by F_SETFL."""
    path = mounts.file("f")
    flags = ", ".join(f"{mode} | {flag}" for flag in [*FLAGS, " | ".join(FLAGS)])
    victim.run(f"fds = [os.open({path!r}, flags) for flags in ({flags})]; fcntl.fcntl(fds[0], 4, os.O_APPEND)")
    before = victim.run("[fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds]")
    assert len(set(before)) >= 6
    assert mounts.switch().moved == {"file": len(FLAGS) + 1}
    assert victim.run("[fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds]") == before


def test_direct(mounts: Mounts, victim: Victim) -> None:
    """O_DIRECT, where both file systems have it."""
    path = mounts.file("f", b"o" * 8192, b"n" * 8192)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"this kernel's tmpfs has no O_DIRECT: {error}")
    victim.run(f"fd = os.open({path!r}, os.O_RDONLY | os.O_DIRECT); m = mmap.mmap(-1, 4096)")
    assert mounts.switch().moved == {"file": 1}
    assert victim.run("os.preadv(fd, [m], 4096), m[:2], fcntl.fcntl(fd, 3) & os.O_DIRECT > 0") == (4096, b"nn", True)


def test_owners_of_signals(mounts: Mounts, victim: Victim) -> None:
    """F_SETOWN of a process and a group, F_SETOWN_EX of a thread, F_SETSIG, O_ASYNC of a fifo, which signals."""
    path = mounts.file("f")
    mounts.both(lambda root: os.mkfifo(root / "fifo"))
    victim.run(
        f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGIO])
process, group, thread = [os.open({path!r}, os.O_RDWR) for _ in range(3)]
fcntl.fcntl(process, fcntl.F_SETOWN, os.getppid()); fcntl.fcntl(group, fcntl.F_SETOWN, -os.getpgrp())
fcntl.fcntl(thread, 15, struct.pack('ii', 0, threading.get_native_id())); fcntl.fcntl(thread, fcntl.F_SETSIG, 40)
both = os.open({str(mounts.old / 'fifo')!r}, os.O_RDWR | os.O_NONBLOCK)
fcntl.fcntl(both, fcntl.F_SETOWN, os.getpid()); fcntl.fcntl(both, fcntl.F_SETSIG, signal.SIGUSR1)
fcntl.fcntl(both, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
def state():
    return [(fcntl.fcntl(fd, 16, bytes(8)), fcntl.fcntl(fd, fcntl.F_GETSIG)) for fd in (process, group, thread, both)]
"""
    )
    before = victim.run("state()")
    assert mounts.switch().moved == {"file": 3, "fifo": 1}
    assert victim.run("state()") == before and len(set(before)) == 4
    victim.run("signal.sigtimedwait([signal.SIGUSR1], 0)")
    victim.run("os.write(both, b'x')")
    assert victim.run("signal.sigtimedwait([signal.SIGUSR1], 10).si_signo == signal.SIGUSR1")


def test_signals_are_sent_in_the_name_of_who_asked_for_them(mounts: Mounts, victim: Victim) -> None:
    """Whom F_SETOWN may have signalled goes by who called it: not by us, who are root."""
    mounts.both(lambda root: os.mkfifo(root / "fifo"))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as roots:
        victim.run(
            f"""
fd = os.open({str(mounts.old / 'fifo')!r}, os.O_RDWR | os.O_NONBLOCK)
os.setresuid(1234, 1235, 1235)
fcntl.fcntl(fd, fcntl.F_SETOWN, {roots.pid}); fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK); os.write(fd, b'x')
def asked():
    return struct.unpack('II', fcntl.fcntl(fd, 17, bytes(8)))  # F_GETOWNER_UIDS
"""
        )
        assert victim.run("asked()") == (1234, 1235)
        assert mounts.switch().moved == {"fifo": 1}
        assert victim.run("asked(), os.write(fd, b'y'), os.read(fd, 9)") == ((1234, 1235), 1, b"xy")
        assert roots.communicate(b"alive", timeout=10) == (b"alive", None) and roots.returncode == 0


def test_hints(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    victim.run(f"fd = os.open({path!r}, os.O_RDWR)")
    try:
        victim.run("fcntl.fcntl(fd, 1036, struct.pack('Q', 4))")  # F_SET_RW_HINT, RWH_WRITE_LIFE_LONG
    except AssertionError as error:
        pytest.skip(f"this kernel takes no hints: {error}")
    assert mounts.switch().moved == {"file": 1}
    assert victim.run("struct.unpack('Q', fcntl.fcntl(fd, 1035, bytes(8)))") == (4,)


def test_no_seals(mounts: Mounts, victim: Victim) -> None:
    """Only memfd_create(2) makes files that can be sealed: what is on a mount has none to be kept."""
    path = mounts.file("f")
    victim.run(f"fd = os.open({path!r}, os.O_RDWR)")
    seals = "fcntl.fcntl(fd, fcntl.F_GET_SEALS)"
    assert victim.run(seals) == 1  # F_SEAL_SEAL: it can have no others
    assert mounts.switch().moved == {"file": 1}
    assert victim.run(seals) == 1


def test_what_is_not_on_the_mount(mounts: Mounts, victim: Victim, tmp_path: Path) -> None:
    """A file system mounted beneath, another file system of the same kind, pipes, sockets, memory: the very same."""
    path = mounts.file("f")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "f").write_text("elsewhere")
    (mounts.old / "beneath").mkdir()
    subprocess.run(["mount", "--bind", str(elsewhere), str(mounts.old / "beneath")], check=True)
    try:
        victim.run(
            f"""
fd, other = os.open({path!r}, os.O_RDONLY), os.open({str(mounts.old / 'beneath' / 'f')!r}, os.O_RDWR)
os.chdir({str(mounts.old / 'beneath')!r}); fcntl.flock(other, fcntl.LOCK_EX); fcntl.lockf(other, fcntl.LOCK_EX, 3)
m = mmap.mmap(other, 9); memory = os.memfd_create('m'); (r, w), pair = os.pipe(), socket.socketpair()
def state():
    fds = (other, memory, r, w, pair[0].fileno(), pair[1].fileno(), 0, 1, 2)
    return [open(f'/proc/self/fdinfo/{{n}}').read() for n in fds], [os.readlink(f'/proc/self/fd/{{n}}') for n in fds]
"""
        )
        before = victim.run("state()")
        mapped = [line for line in Path(f"/proc/{victim.pid}/maps").read_text().splitlines() if "f" in line[73:]]
        report = mounts.switch()
        assert (report.moved, report.left) == ({"file": 1}, [])
        assert victim.run("state()") == before
        assert set(mapped) <= set(Path(f"/proc/{victim.pid}/maps").read_text().splitlines())
        assert victim.run("os.getcwd()") == str(mounts.old / "beneath")
        assert victim.run("os.read(fd, 3), m[:]") == (b"new", b"elsewhere")
    finally:
        subprocess.run(["umount", "-l", str(mounts.old / "beneath")], check=True)


@pytest.mark.needs_fuse
def test_another_delayed_mount(scene: Scene) -> None:
    """Of two, one is replaced: what is on the other one stays there, and is held as before."""
    second = scene.base / "second"
    second.mkdir()
    scene.delay()
    path = scene.file("f")
    scene.expect_mount(second)
    scene.client.mount("second", str(second), "restore")
    scene.client.create("second", [{"path": "g", "mode": 0o100666, "size": 6}])
    victim = scene.victim()
    victim.run(f"import os; f, g = os.open({path!r}, os.O_RDONLY), os.open({str(second / 'g')!r}, os.O_RDONLY)")
    scene.client.mode("stub", id=scene.id)
    report = scene.replace()
    assert report["left"] == [] and report["moved"] == {"file": 1}
    assert victim.run("os.read(f, 4), os.read(g, 6)") == (b"real", bytes(6))
    assert os.stat(second).st_dev != os.stat(scene.mnt).st_dev
    victim.run("os.close(g)")
    scene.client.unmount("second")
