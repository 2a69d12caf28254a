"""Files without a name, in use: alone, shared, mapped, never named; carried from mount to mount."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from replace_kit import Scene, scene
from surgery_kit import Mounts, Victim, compile_c, mounts, victim

__all__ = ["mounts", "scene", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


def without_name(path: Path) -> bool:
    """Nothing that this project made for a moment is left in a directory."""
    return not [name for name in os.listdir(path) if name.startswith(".spfs")]


@pytest.mark.parametrize("has_tmpfile", [True, False])
def test_contents_permissions_and_holes(
    mounts: Mounts, victim: Victim, has_tmpfile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_tmpfile:
        # What is left of the flag where it is not known: a directory is opened for writing (EISDIR, open(2)).
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    path = mounts.file("gone", new=None)
    victim.run(
        f"""
g = os.open({path!r}, os.O_RDWR); os.fchmod(g, 0o640); os.fchown(g, 12, 34); os.unlink({path!r})
os.pwrite(g, b'far', 5 << 20); os.lseek(g, 4, 0)
"""
    )
    report = mounts.switch()
    assert (report.moved, report.left, mounts.users()) == ({"file": 1}, [], [])
    assert victim.run("os.read(g, 8), os.pread(g, 9, 5 << 20)") == (b"contents", b"far")
    mode, uid, gid, links, size, blocks = victim.run(
        "s = os.fstat(g); s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_size, s.st_blocks"
    )
    assert (stat.S_IMODE(mode), uid, gid, links, size) == (0o640, 12, 34, 0, (5 << 20) + 3)
    assert blocks * 512 < 1 << 20 and without_name(mounts.new)


def test_one_file_for_all_who_have_it(mounts: Mounts, victim: Victim) -> None:
    """Several descriptions of it, two processes, and mappings: what one writes the others read."""
    path = mounts.file("gone", b"o" * 8192, new=b"another file of that name")
    other = Victim()
    try:
        other.run(f"import os, mmap; r = os.open({path!r}, os.O_RDONLY); m = mmap.mmap(r, 8192, prot=1)")
        victim.run(f"a, b = os.open({path!r}, os.O_RDWR), os.open({path!r}, os.O_WRONLY | os.O_APPEND)")
        victim.run(f"m = mmap.mmap(a, 8192); m[5000:5004] = b'here'; os.unlink({path!r})")
        report = mounts.switch()
        assert report.left == [] and report.moved == {"file": 5, "shared mapping": 2} and mounts.users() == []
        victim.run("os.pwrite(a, b'written', 10); os.write(b, b'end'); m[20:22] = b'by'")
        assert other.run("os.pread(r, 7, 10), os.pread(r, 9, 8192)") == (b"written", b"end")
        assert other.run("m[20:22], m[5000:5004]") == (b"by", b"here")
        assert (mounts.new / "gone").read_bytes() == b"another file of that name"
    finally:
        other.close()


def test_private_mapping(mounts: Mounts, victim: Victim) -> None:
    """No descriptor of it is left: the contents come by way of the mapping."""
    path = mounts.file("gone", b"o" * 8192)
    victim.run(
        f"""
libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p; libc.mmap.argtypes = [ctypes.c_size_t] * 6
fd = os.open({path!r}, os.O_RDONLY); at = libc.mmap(0, 8192, 3, 2, fd, 0); os.close(fd); os.unlink({path!r})
ctypes.memmove(at, b'mine', 4)
"""
    )
    report = mounts.switch()
    assert report.moved == {"private mapping": 1} and report.left == [] and mounts.users() == []
    assert victim.run("ctypes.string_at(at, 6), ctypes.string_at(at + 4096, 2)") == (b"mineoo", b"oo")


def test_never_named(mounts: Mounts, victim: Victim) -> None:
    """O_TMPFILE; it can still be given a name afterwards."""
    victim.run(f"t = os.open({str(mounts.old)!r}, os.O_TMPFILE | os.O_RDWR, 0o600); os.write(t, b'unnamed')")
    assert mounts.switch().moved == {"file": 1}
    victim.run(f"os.link(f'/proc/self/fd/{{t}}', {str(mounts.new / 'named')!r}, src_dir_fd=0, follow_symlinks=True)")
    assert (mounts.new / "named").read_bytes() == b"unnamed"


def test_hard_linked_elsewhere(mounts: Mounts, victim: Victim) -> None:
    """It has another name: it is that file, and no copy."""
    path = mounts.file("gone")
    os.link(path, mounts.old / "kept")
    os.link(mounts.new / "gone", mounts.new / "kept")
    victim.run(f"g = os.open({path!r}, os.O_RDWR); os.unlink({path!r})")
    assert mounts.switch().moved == {"file": 1}
    victim.run("os.pwrite(g, b'NEW', 0)")
    assert (mounts.new / "kept").read_bytes() == b"NEW contents"


def test_fifo_and_directories(mounts: Mounts, victim: Victim) -> None:
    fifo, directory = mounts.old / "fifo", mounts.old / "d"
    os.mkfifo(fifo)
    directory.mkdir()
    victim.run(
        f"""
r, w = os.open({str(fifo)!r}, os.O_RDONLY | os.O_NONBLOCK), os.open({str(fifo)!r}, os.O_WRONLY); os.write(w, b'12')
d = os.open({str(directory)!r}, os.O_RDONLY); os.chdir(d); os.unlink({str(fifo)!r}); os.rmdir({str(directory)!r})
"""
    )
    report = mounts.switch()
    assert report.moved == {"fifo": 2, "directory": 1, "cwd": 1} and report.left == [] and mounts.users() == []
    assert victim.run("os.write(w, b'3'), os.read(r, 9), os.listdir(d), os.listdir('.')") == (1, b"123", [], [])
    assert victim.run("os.fstat(d).st_ino == os.stat('.').st_ino, os.fstat(d).st_nlink") == (True, 0)
    assert os.listdir(mounts.new) == []


def test_locks_and_offsets(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("gone", new=None)
    victim.run(f"g = os.open({path!r}, os.O_RDWR); os.unlink({path!r}); fcntl.lockf(g, 2, 5); fcntl.flock(g, 1)")
    assert mounts.switch().moved == {"file": 1}
    info = victim.run("open(f'/proc/self/fdinfo/{g}').read()")
    assert info.count("lock:") == 2 and "POSIX  ADVISORY  WRITE" in info and "FLOCK  ADVISORY  READ" in info


def test_all_users_or_none(mounts: Mounts, victim: Victim) -> None:
    """One user cannot be operated on: if the others went, they would not see what it writes."""
    path = mounts.file("gone")
    tracer = Victim()
    other = Victim()
    try:
        for one in (victim, other):
            one.run(f"import os; g = os.open({path!r}, os.O_RDWR)")
        os.unlink(path)
        tracer.run(f"import ctypes; libc = ctypes.CDLL(None); libc.ptrace(0x4206, {other.pid}, 0, 0)")
        report = mounts.switch()
        reasons = {left.pid: left.reason for left in report.left}
        assert "traced" in reasons[other.pid] and f"process {other.pid} " in reasons[victim.pid]
        assert report.moved == {}
        other.run("os.pwrite(g, b'seen', 0)")
        assert victim.run("os.pread(g, 4, 0)") == b"seen"
    finally:
        tracer.close()
        other.close()
    assert mounts.switch().moved == {"file": 1}


PROGRAM = r"""
#include <stdio.h>
#include <unistd.h>
static int counter = 41;
int main(void)
{
    char byte;
    counter++;
    if (write(1, "ready\n", 6) != 6 || read(0, &byte, 1) != 1)
        return 1;
    printf("%d\n", counter);
    return 0;
}
"""


def test_running_program(mounts: Mounts, tmp_path: Path) -> None:
    """Removed, as by an update, while it runs: its text, its data, and the link to it."""
    program = compile_c(tmp_path, PROGRAM, "-static")
    shutil.copy(program, mounts.old / "program")
    with subprocess.Popen(
        [str(mounts.old / "program")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        (mounts.old / "program").unlink()
        report = mounts.switch()
        assert report.left == [] and report.moved["exe"] == 1 and mounts.users() == []
        assert Path(f"/proc/{process.pid}/exe").read_bytes() == Path(program).read_bytes()
        process.stdin.write(b"x")
        assert process.stdout.read() == b"42\n" and process.wait(5) == 0


def test_path_descriptor(mounts: Mounts, victim: Victim) -> None:
    """O_PATH alone keeps the contents."""
    path = mounts.file("gone")
    victim.run(f"p = os.open({path!r}, os.O_PATH); os.unlink({path!r})")
    assert mounts.switch().moved == {"path": 1}
    assert victim.run("os.read(os.open(f'/proc/self/fd/{p}', os.O_RDONLY), 20)") == b"old contents"


@pytest.mark.needs_fuse
def test_from_a_delayed_mount(scene: Scene) -> None:
    """As a restorer makes them: written and removed while the real file system is not there."""
    victim = scene.victim()
    scene.delay()
    victim.run(
        f"""
import os, mmap
path = {str(scene.mnt / 'ghost')!r}
g = os.open(path, os.O_RDWR | os.O_CREAT, 0o600); os.write(g, b'g' * 5000); m = mmap.mmap(g, 5000)
m[4500:4504] = b'page'; os.unlink(path); os.lseek(g, 3, 0)
"""
    )
    scene.client.mode("stub")
    report = scene.replace()
    assert report["left"] == [] and report["ended"]
    assert victim.run("os.read(g, 2), os.pread(g, 4, 4500), m[4499:4505], os.fstat(g).st_nlink") == (
        b"gg",
        b"page",
        b"gpageg",
        0,
    )
    victim.run("m[0:1] = b'x'")
    assert victim.run("os.pread(g, 1, 0)") == b"x" and without_name(scene.mnt)


@pytest.mark.needs_fuse
def test_removed_through_the_proxy(scene: Scene) -> None:
    """The file system has the real file open: that very file is what it becomes."""
    victim = scene.victim()
    os.link(scene.real_file("f"), scene.export / "other name")
    scene.delay()
    scene.client.mode("proxy", proxy_dir=str(scene.export))
    victim.run(f"import os; path = {str(scene.mnt / 'f')!r}; g = os.open(path, os.O_RDWR); os.unlink(path)")
    report = scene.replace()
    assert report["left"] == [] and report["ended"]
    victim.run("os.pwrite(g, b'REAL', 0)")
    assert (scene.export / "other name").read_bytes() == b"REAL contents"
