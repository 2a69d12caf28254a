"""inotify and fanotify watches of a mount that is exchanged."""

from __future__ import annotations

import pytest
from surgery_kit import Mounts, Victim, mounts, victim

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

WATCHER = """
libc = ctypes.CDLL(None, use_errno=True)
i = libc.inotify_init1(os.O_NONBLOCK)
def watch(path, mask):
    found = libc.inotify_add_watch(i, os.fsencode(path), mask)
    assert found > 0, os.strerror(ctypes.get_errno())
    return found
def events(fd=None):
    found = []
    try:
        data = os.read(i if fd is None else fd, 1 << 16)
    except BlockingIOError:
        return []
    while data:
        wd, mask, cookie, length = struct.unpack_from('iIII', data)
        found.append((wd, mask, data[16:16 + length].split(bytes(1))[0].decode()))
        data = data[16 + length:]
    return found
"""
MODIFY, CREATE, DELETE = 0x2, 0x100, 0x200


def test_inotify(mounts: Mounts, victim: Victim) -> None:
    """The same watch descriptors, masks and instance; nothing is told of the move; elsewhere, watches go on."""
    path = mounts.file("f")
    mounts.both(lambda root: (root / "d").mkdir())
    elsewhere = mounts.old.parent
    victim.run(
        WATCHER
        + f"""
watch('/', {CREATE}); gone = watch('/etc', {CREATE}); libc.inotify_rm_watch(i, gone); events()
f, other = watch({path!r}, {MODIFY}), watch({str(elsewhere)!r}, {CREATE})
d = watch({str(mounts.old / 'd')!r}, 0x80000300)
fd = os.open({path!r}, os.O_RDWR)
"""
    )
    watched = "sorted(l.split()[1] for l in open(f'/proc/self/fdinfo/{i}') if l.startswith('inotify'))"
    before = victim.run(watched)
    report = mounts.switch()
    assert (report.moved, report.left) == ({"inotify watch": 2, "file": 1}, [])
    assert victim.run("events()") == []
    assert victim.run(watched) == before
    (mounts.new / "f").write_bytes(b"changed")
    (mounts.new / "d" / "made").touch()
    (mounts.new / "d" / "not told").touch()  # IN_ONESHOT
    (elsewhere / "made too").touch()
    (mounts.old / "f").write_bytes(b"nobody looks")
    told = victim.run("events()")
    f, other, d = victim.run("f, other, d")
    assert {(f, MODIFY, ""), (d, CREATE, "made"), (other, CREATE, "made too")} <= set(told)
    assert {wd for wd, _, _ in told} == {f, other, d} and (d, CREATE, "not told") not in told
    assert victim.run(f"watch('/etc', {CREATE})") > d


def test_inotify_with_many_watches(mounts: Mounts, victim: Victim) -> None:
    """Descriptors of more than one digit, which the kernel tells in hexadecimal ones."""
    for number in range(20):
        mounts.both(lambda root: (root / f"d{number}").mkdir())
    victim.run(WATCHER + f"wds = [watch({str(mounts.old)!r} + '/d%d' % n, {CREATE}) for n in range(20)]")
    report = mounts.switch()
    assert (report.moved, report.left) == ({"inotify watch": 20}, [])
    for number in (0, 9, 10, 19):
        (mounts.new / f"d{number}" / "made").touch()
    expected = [(wd, CREATE, "made") for wd in victim.run("[wds[n] for n in (0, 9, 10, 19)]")]
    assert victim.run("events()") == expected


def test_inotify_with_unread_events(mounts: Mounts, victim: Victim) -> None:
    """They would come before the end of the watch, which must not be told: it stays until they are read."""
    path = mounts.file("f")
    victim.run(WATCHER + f"f = watch({path!r}, {MODIFY})")
    (mounts.old / "f").write_bytes(b"changed")
    (left,) = mounts.switch().left
    assert left.kind == "inotify watch" and left.path == "f" and "not read yet" in left.reason
    assert victim.run("set(events()) == {(f, 2, '')}")
    assert mounts.switch().moved == {"inotify watch": 1}
    (mounts.new / "f").write_bytes(b"changed")
    assert victim.run("set(events()) == {(f, 2, '')}")


def test_inotify_shared_and_waited_for(mounts: Mounts, victim: Victim) -> None:
    """Parent and child have the instance; a thread waits in read(2), another one by epoll."""
    path = mounts.file("f")
    victim.run(
        WATCHER
        + f"""
f = watch({path!r}, {MODIFY}); os.set_blocking(i, True)
e = select.epoll(); e.register(i, select.EPOLLIN)
child = os.fork()
if not child: signal.pause()
"""
    )
    victim.start("e.poll(20) and events() == [(f, 2, '')]")
    victim.blocked()
    assert mounts.switch().moved == {"inotify watch": 2}
    victim.blocked()
    with open(mounts.new / "f", "ab") as file:
        file.write(b"more")
    assert victim.result() is True
    victim.run("os.kill(child, 9); os.waitpid(child, 0)")


def test_inotify_watch_that_comes_between(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f"), mounts.file("g")
    victim.run(WATCHER + f"f = watch({path[0]!r}, {MODIFY})")
    _, report = mounts.prepared_switch(
        between=lambda: victim.run(f"libc.inotify_rm_watch(i, f); events(); g = watch({path[1]!r}, {DELETE})")
    )
    assert report.moved == {"inotify watch": 1} and report.left == []
    assert victim.run("events()") == []


def test_inotify_without_counterpart(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f", new=None)
    victim.run(WATCHER + f"f = watch({path!r}, {MODIFY})")
    (left,) = mounts.switch().left
    assert "No such file" in left.reason
    (mounts.old / "f").write_bytes(b"changed")
    assert victim.run("set(events()) == {(f, 2, '')}")


FANOTIFY = """
libc = ctypes.CDLL(None, use_errno=True)
libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]
i = libc.fanotify_init(2, os.O_RDONLY)  # FAN_NONBLOCK
assert i >= 0, ctypes.get_errno()
def mark(flags, mask, path):
    assert libc.fanotify_mark(i, 1 | flags, mask, -100, os.fsencode(path)) == 0, os.strerror(ctypes.get_errno())
def events():
    found = []
    try:
        data = os.read(i, 1 << 16)
    except BlockingIOError:
        return []
    while data:
        length, _, _, _, mask, fd, pid = struct.unpack_from('IBBHQii', data)
        found.append((os.path.basename(os.readlink(f'/proc/self/fd/{fd}')), mask)); os.close(fd)
        data = data[length:]
    return found
"""


def test_fanotify_events_not_read(mounts: Mounts, victim: Victim) -> None:
    """They bring descriptors of the old mount, which work; asking again moves them."""
    path = mounts.file("f")
    victim.run(FANOTIFY + f"mark(0, {MODIFY}, {path!r})")
    with open(path, "ab") as file:
        file.write(b"more")
    assert mounts.switch().moved == {"fanotify watch": 1} and mounts.users() == []
    victim.run("data = os.read(i, 1000); fd = struct.unpack_from('IBBHQii', data)[5]")
    assert victim.run("os.pread(fd, 3, 0)") == b"old"
    assert mounts.switch().moved["file"] == 1 and mounts.users() == []
    assert victim.run("os.pread(fd, 3, 0)") == b"new"


@pytest.mark.parametrize("scope", [0, 0x10, 0x100], ids=["file", "mount", "file system"])
def test_fanotify(mounts: Mounts, victim: Victim, scope: int) -> None:
    path = mounts.file("f")
    victim.run(FANOTIFY + f"mark({scope}, {MODIFY}, {path!r})")
    report = mounts.switch()
    assert (report.moved, report.left) == ({"fanotify watch": 1}, [])
    victim.run("events()")
    with open(mounts.new / "f", "ab") as file:
        file.write(b"more")
    assert ("f", MODIFY) in victim.run("events()")
