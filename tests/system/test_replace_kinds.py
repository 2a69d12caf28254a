"""Everything that descriptors can hold of a delayed mount, at once: set up by a restorer, replaced in stub mode."""

from __future__ import annotations

import os
import stat

import pytest
from replace_kit import Scene, scene, statements

from spfs.linux import procfs

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]

LIBRARY = """
import ctypes, fcntl, os, select, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def lock(kind, start, length):
    return struct.pack('hhqqi4x', kind, 0, start, length, 0)
def names(fd):
    buffer, found = ctypes.create_string_buffer(200), []
    length, at = libc.getdents64(fd, buffer, 200), 0
    while at < length:
        size, = struct.unpack_from('H', buffer, at + 16)
        found.append(buffer.raw[at + 19:at + size].split(bytes(1))[0].decode())
        at += size
    return found
def rest(fd):
    part = names(fd)
    return part + rest(fd) if part else []
"""


@pytest.mark.parametrize("strict", [False, True])
def test_everything_at_once(scene: Scene, strict: bool) -> None:
    scene.delay()
    for name in ("locked", "watched", "directory/a"):
        if "/" in name:
            scene.both("directory", stat.S_IFDIR)
        scene.file(name)
    fifo = scene.both("fifo", stat.S_IFIFO)
    others = [f"entry {number}" for number in range(20)]
    for name in others:
        scene.file(f"directory/{name}")
    victim, waiter = scene.victim(), scene.victim()
    for one in (victim, waiter):
        one.run(LIBRARY)
    victim.run(f"os.chdir({str(scene.mnt)!r})")
    victim.run(
        statements(
            f"""
            locked = os.open('locked', os.O_RDWR)
            fcntl.lockf(locked, fcntl.LOCK_EX, 10, 0); fcntl.flock(locked, fcntl.LOCK_SH)
            fcntl.fcntl(locked, 37, lock(fcntl.F_WRLCK, 100, 5))
            i = libc.inotify_init1(os.O_NONBLOCK); w = libc.inotify_add_watch(i, b'watched', 2)
            r = os.open({fifo!r}, os.O_RDWR); os.write(r, b'in the pipe')
            e = select.epoll(); e.register(r, select.EPOLLIN)
            s = socket.socket(socket.AF_UNIX); s.bind('socket'); s.listen()
            g = os.open('ghost', os.O_RDWR | os.O_CREAT, 0o600); os.write(g, b'ghost'); os.unlink('ghost')
            d = os.open('directory', os.O_RDONLY); first = names(d)
            """
        )
    )
    waiter.run(f"fd = os.open({str(scene.mnt / 'locked')!r}, os.O_RDWR)")
    waiter.start("fcntl.lockf(fd, fcntl.LOCK_EX, 1, 5); 'have it'")
    waiter.blocked()
    scene.client.mode("stub")
    report = scene.replace(strict=strict)
    left = {one["kind"] for one in report["left"]}
    assert left <= {"directory"}  # the staging directory may list its entries in another order
    waiter.blocked()
    contents = victim.run("os.pread(locked, 4, 0), os.pread(g, 9, 0), os.read(r, 99)")
    assert contents == (b"real", b"ghost", b"in the pipe")
    assert sorted(victim.run("first + rest(d)")) == sorted([".", "..", "a", *others])
    (scene.export / "watched").write_bytes(b"changed")
    assert victim.run("e.poll(0), struct.unpack_from('iI', os.read(i, 999)) == (w, 2)") == ([], True)
    assert victim.run("c = socket.socket(socket.AF_UNIX); c.connect('socket'); s.accept() is not None")
    found = os.stat(scene.export / "locked")
    lines = procfs.locks_on(procfs.read("/proc/locks"), found.st_dev)[found.st_ino]
    # A set: what is listed in parts can be listed twice when somebody else takes a lock meanwhile.
    assert sorted(line.split()[0] for line in set(lines)) == [b"->", b"FLOCK", b"OFDLCK", b"POSIX"]
    victim.run("fcntl.lockf(locked, fcntl.LOCK_UN)")
    assert waiter.result() == "have it"
    assert report["ended"] or left
