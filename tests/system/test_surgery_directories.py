"""Directories in the middle of being read, moved between two mounts."""

from __future__ import annotations

import pytest
from surgery_kit import Mounts, Victim, mounts, victim

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

READ = """
libc = ctypes.CDLL(None, use_errno=True)
def some(fd, size=200):
    buffer = ctypes.create_string_buffer(size)
    length, names, at = libc.getdents64(fd, buffer, size), [], 0
    assert length >= 0, ctypes.get_errno()
    while at < length:
        size, = struct.unpack_from('H', buffer, at + 16)
        names.append(buffer.raw[at + 19:at + size].split(bytes(1))[0].decode())
        at += size
    return names
def rest(fd):
    found = []
    while True:
        part = some(fd)
        if not part: return found
        found += part
"""

NAMES = [f"entry {number}" for number in range(30)]


def make(mounts: Mounts, order: "list[str]", backwards: bool = False) -> None:
    mounts.both(lambda root: (root / "d").mkdir())
    for name in order:
        (mounts.old / "d" / name).touch()
    for name in reversed(order) if backwards else order:
        (mounts.new / "d" / name).touch()


def test_reading_goes_on(mounts: Mounts, victim: Victim) -> None:
    """Every name once, and what came on the new side is there as well."""
    make(mounts, NAMES)
    victim.run(READ + f"d = os.open({str(mounts.old / 'd')!r}, os.O_RDONLY)")
    first = victim.run("some(d)")
    assert 2 < len(first) < 20
    assert mounts.switch().moved == {"directory": 1} and mounts.users() == []
    assert sorted(first + victim.run("rest(d)")) == sorted([".", "..", *NAMES])
    assert sorted(victim.run("os.lseek(d, 0, 0); rest(d)")) == sorted([".", "..", *NAMES])


def test_reading_by_parent_and_child(mounts: Mounts, victim: Victim) -> None:
    """They share the position before and afterwards."""
    make(mounts, NAMES)
    victim.run(
        READ
        + f"""
d = os.open({str(mounts.old / 'd')!r}, os.O_RDONLY); first = some(d)
(r, w), (back, answer) = os.pipe(), os.pipe()
child = os.fork()
if not child:
    os.read(r, 1); os.write(answer, repr(some(d)).encode()); os._exit(0)
"""
    )
    assert mounts.switch().moved == {"directory": 2}
    names = victim.run("os.write(w, b'x'); second = eval(os.read(back, 9999)); first + second + rest(d)")
    assert sorted(names) == sorted([".", "..", *NAMES])
    victim.run("os.waitpid(child, 0)")


def test_read_to_the_end(mounts: Mounts, victim: Victim) -> None:
    """Whatever the other side has: at the end is at the end."""
    make(mounts, NAMES, backwards=True)
    (mounts.new / "d" / "more").touch()
    victim.run(READ + f"d = os.open({str(mounts.old / 'd')!r}, os.O_RDONLY); rest(d)")
    assert mounts.switch().moved == {"directory": 1}
    assert victim.run("rest(d), os.lseek(d, 0, 0), len(rest(d))") == ([], 0, 33)


def test_other_order(mounts: Mounts, victim: Victim) -> None:
    """There is no position that would do: it stays, is read to its end, and goes when asked again."""
    make(mounts, NAMES, backwards=True)
    victim.run(READ + f"d = os.open({str(mounts.old / 'd')!r}, os.O_RDONLY)")
    first = victim.run("some(d)")
    (left,) = mounts.switch().left
    assert left.path == "d" and "another order" in left.reason
    assert sorted(first + victim.run("rest(d)")) == sorted([".", "..", *NAMES])
    assert mounts.switch().moved == {"directory": 1}


def test_begun_after_the_preparation(mounts: Mounts, victim: Victim) -> None:
    make(mounts, NAMES)
    victim.run(READ + f"d = os.open({str(mounts.old / 'd')!r}, os.O_RDONLY)")
    _, report = mounts.prepared_switch(between=lambda: victim.run("first = some(d)"))
    assert report.moved == {"directory": 1}
    assert sorted(victim.run("first + rest(d)")) == sorted([".", "..", *NAMES])


def test_what_was_delivered_last_is_gone(mounts: Mounts, victim: Victim) -> None:
    make(mounts, NAMES)
    victim.run(READ + f"d = os.open({str(mounts.old / 'd')!r}, os.O_RDONLY)")
    first = victim.run("some(d)")
    mounts.both(lambda root: (root / "d" / first[-1]).unlink())
    report = mounts.switch()
    # The offset may be another entry's now, or nobody's: then it stays.
    assert report.moved == {"directory": 1} or "is being read" in report.left[0].reason
    assert sorted(first + victim.run("rest(d)")) == sorted([".", "..", *NAMES])


def test_directory_with_notifications(mounts: Mounts, victim: Victim) -> None:
    """F_NOTIFY: what is asked for cannot be found out, only that something may be."""
    make(mounts, NAMES)
    victim.run(
        f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
d = os.open({str(mounts.old / 'd')!r}, os.O_RDONLY); fcntl.fcntl(d, fcntl.F_NOTIFY, fcntl.DN_CREATE)
"""
    )
    (left,) = mounts.switch().left
    assert "F_NOTIFY" in left.reason
    (mounts.old / "d" / "made").touch()
    assert victim.run("signal.sigtimedwait([signal.SIGIO], 10).si_signo == signal.SIGIO")
