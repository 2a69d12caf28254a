"""Locks and leases of real processes: held, contended and waited for, before and after the move."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path
from typing import Iterator, List

import pytest
from surgery_kit import Mounts, Victim, mounts, victim

from spfs.linux import procfs
from spfs.linux.machine import call_numbers

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

OFD_SETLK = 37
LEASE, NOTHING = 1024, fcntl.F_UNLCK
PREPARED = """
def flock(kind, start=0, length=0):
    return struct.pack('hhqqi4x', kind, 0, start, length, 0)
def ofd(fd, kind, start=0, length=0):
    return fcntl.fcntl(fd, 37, flock(kind, start, length))
"""


@pytest.fixture
def other() -> Iterator[Victim]:
    other = Victim()
    other.run("import fcntl, os, struct, time")
    other.run(PREPARED)
    yield other
    other.close()


def locks_of(path: Path) -> List[str]:
    """Kind, mode and range of every lock on a file, sorted."""
    found = path.stat()
    # A set: what is listed in parts can be listed twice when somebody else takes a lock meanwhile.
    lines = set(procfs.locks_on(procfs.read("/proc/locks"), found.st_dev).get(found.st_ino, []))
    return sorted(" ".join([*words[:1], words[2], *words[-2:]]) for words in (line.decode().split() for line in lines))


def can_lock(path: Path, start: int, length: int, mode: int = fcntl.LOCK_EX) -> bool:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(fd, mode | fcntl.LOCK_NB, length, start)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def test_flock_goes_along(mounts: Mounts, victim: Victim) -> None:
    """Also one that is taken after the preparation; it is the description's, shared or not."""
    paths = mounts.file("ex"), mounts.file("sh")
    victim.run(f"a, b = [os.open(p, os.O_RDWR) for p in {paths!r}]; c = os.dup(a); fcntl.flock(a, fcntl.LOCK_EX)")
    _, report = mounts.prepared_switch(between=lambda: victim.run("fcntl.flock(b, fcntl.LOCK_SH)"))
    assert report.moved == {"file": 3} and report.left == []
    for name, mode, free in (("ex", fcntl.LOCK_SH, False), ("sh", fcntl.LOCK_SH, True), ("sh", fcntl.LOCK_EX, False)):
        with open(mounts.new / name) as file:
            if free:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
                continue
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, mode | fcntl.LOCK_NB)
    victim.run("os.close(a); os.close(c)")
    with open(mounts.new / "ex") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_flock_that_cannot_be_had(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    victim.run(f"a = os.open({path!r}, os.O_RDWR); fcntl.flock(a, fcntl.LOCK_EX)")
    with open(mounts.new / "f") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (left,) = mounts.switch().left
        assert "lock cannot be had" in left.reason and victim.run("os.pread(a, 3, 0)") == b"old"
    assert mounts.switch().moved == {"file": 1}


def test_lock_that_stays_holds_for_all(mounts: Mounts, victim: Victim, other: Victim) -> None:
    """It cannot be had on the new mount, and who waits for it would get it there some day, while it is held here."""
    path = mounts.file("f")
    victim.run(f"a = os.open({path!r}, os.O_RDWR); fcntl.flock(a, fcntl.LOCK_EX)")
    other.run(f"a = os.open({path!r}, os.O_RDONLY)")
    other.start("fcntl.flock(a, fcntl.LOCK_EX)")
    other.blocked()
    with open(mounts.new / "f") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reasons = {left.pid: left.reason for left in mounts.switch().left}
        assert "lock cannot be had" in reasons[victim.pid] and "its file is locked" in reasons[other.pid]
    other.blocked()
    victim.run("fcntl.flock(a, fcntl.LOCK_UN)")
    other.result()
    report = mounts.switch()
    assert (report.moved, report.left) == ({"file": 2}, []) and locks_of(mounts.new / "f") == ["FLOCK WRITE 0 EOF"]


def test_locks_of_who_is_not_to_be_moved(mounts: Mounts, victim: Victim, other: Victim) -> None:
    """One program is taken to another place: that another one has the file locked here is no hindrance."""
    path = mounts.file("f")
    victim.run(f"a = os.open({path!r}, os.O_RDWR)")
    other.run(f"a = os.open({path!r}, os.O_RDWR); fcntl.flock(a, fcntl.LOCK_SH); fcntl.lockf(a, fcntl.LOCK_EX)")
    report = mounts.switch(chosen=[victim.pid])
    assert (report.moved, report.left) == ({"file": 1}, [])
    assert sorted(locks_of(mounts.old / "f")) == ["FLOCK READ 0 EOF", "POSIX WRITE 0 EOF"]


def test_posix_locks_of_a_process(mounts: Mounts, victim: Victim) -> None:
    """Several ranges, set by several descriptors of the file, one of which shares its description."""
    path = mounts.file("f", new=b"n" * 100)
    victim.run(
        f"""
a, b, r = os.open({path!r}, os.O_RDWR), os.open({path!r}, os.O_RDWR), os.open({path!r}, os.O_RDONLY)
c = os.dup(a)
fcntl.lockf(a, fcntl.LOCK_EX, 10, 5); fcntl.lockf(c, fcntl.LOCK_EX, 5, 40); fcntl.lockf(r, fcntl.LOCK_SH, 0, 90)
"""
    )
    before = locks_of(mounts.old / "f")
    report = mounts.switch()
    assert report.moved == {"file": 4} and report.left == [] and mounts.users() == []
    assert locks_of(mounts.new / "f") == before == ["POSIX READ 90 EOF", "POSIX WRITE 40 44", "POSIX WRITE 5 14"]
    assert not can_lock(mounts.new / "f", 14, 1) and can_lock(mounts.new / "f", 15, 25)
    victim.run("os.close(b)")  # of any descriptor: that drops them all
    assert locks_of(mounts.new / "f") == []


def test_posix_locks_of_parent_and_child(mounts: Mounts, victim: Victim) -> None:
    """They share the description, and each has its own locks."""
    path = mounts.file("f", new=b"n" * 100)
    child = victim.run(
        f"""
a = os.open({path!r}, os.O_RDWR)
(r, w), (back, answer) = os.pipe(), os.pipe()
child = os.fork()
if not child:
    fcntl.lockf(a, fcntl.LOCK_EX, 10, 20); os.write(answer, b'.'); os.read(r, 1); os._exit(0)
fcntl.lockf(a, fcntl.LOCK_EX, 10, 0); os.read(back, 1); child"""
    )
    report = mounts.switch()
    assert report.moved == {"file": 2} and child in report.processes and report.left == []
    assert locks_of(mounts.new / "f") == ["POSIX WRITE 0 9", "POSIX WRITE 20 29"]
    victim.run("os.write(w, b'x'); os.waitpid(child, 0)")
    assert locks_of(mounts.new / "f") == ["POSIX WRITE 0 9"]


def test_lock_taken_after_the_preparation(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    victim.run(f"a, b = os.open({path!r}, os.O_RDWR), os.open({path!r}, os.O_RDWR)")
    _, report = mounts.prepared_switch(between=lambda: victim.run("fcntl.lockf(a, fcntl.LOCK_EX)"))
    assert report.moved == {"file": 2} and locks_of(mounts.new / "f") == ["POSIX WRITE 0 EOF"]


def test_lock_given_up_after_the_preparation(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    victim.run(PREPARED + f"a = os.open({path!r}, os.O_RDWR); fcntl.lockf(a, fcntl.LOCK_EX); fcntl.flock(a, 2)")
    between = "fcntl.lockf(a, fcntl.LOCK_UN); fcntl.flock(a, fcntl.LOCK_UN)"
    _, report = mounts.prepared_switch(between=lambda: victim.run(between))
    assert report.moved == {"file": 1} and locks_of(mounts.new / "f") == []


def test_ofd_locks(mounts: Mounts, victim: Victim) -> None:
    """They are the description's: held until its last descriptor is closed, in whichever process."""
    path = mounts.file("f", new=b"n" * 100)
    victim.run(PREPARED + f"a = os.open({path!r}, os.O_RDWR); b = os.dup(a); ofd(a, fcntl.F_WRLCK, 3, 4)")
    victim.run("ofd(a, fcntl.F_RDLCK, 50)")
    assert mounts.switch().moved == {"file": 2}
    assert locks_of(mounts.new / "f") == ["OFDLCK READ 50 EOF", "OFDLCK WRITE 3 6"]
    victim.run("os.close(a)")
    assert len(locks_of(mounts.new / "f")) == 2
    victim.run("os.close(b)")
    assert locks_of(mounts.new / "f") == []


def test_all_kinds_of_locks_on_one_description(mounts: Mounts, victim: Victim) -> None:
    """Where a POSIX and an OFD lock cover the same bytes, both are there afterwards."""
    path = mounts.file("f", new=b"n" * 100)
    victim.run(
        PREPARED
        + f"a = os.open({path!r}, os.O_RDWR); ofd(a, fcntl.F_RDLCK, 0, 50); fcntl.flock(a, 1)\n"
        + "fcntl.lockf(a, fcntl.LOCK_SH, 30, 20); ofd(a, fcntl.F_WRLCK, 90, 5)"
    )
    before = locks_of(mounts.old / "f")
    assert mounts.switch().left == [] and len(before) == 4
    assert locks_of(mounts.new / "f") == before


@pytest.mark.parametrize(
    "lock",
    ["fcntl.flock(a, 2 | {0})", "fcntl.lockf(a, 2 | {0}, 10, 0)", "fcntl.fcntl(a, 38 - {0} // 4, flock(1, 0, 10))"],
    ids=["flock", "posix", "ofd"],
)
def test_waiting_for_a_lock(mounts: Mounts, victim: Victim, other: Victim, lock: str) -> None:
    """Who waits on the old mount goes on waiting on the new one, and gets the lock there."""
    path = mounts.file("f", new=b"n" * 100)
    for one in (victim, other):
        one.run(PREPARED + f"a = os.open({path!r}, os.O_RDWR)")
    victim.run(lock.format(4))
    other.start(lock.format(0) + "; 'have it'")
    other.blocked()
    report = mounts.switch()
    assert report.moved == {"file": 2} and report.left == []
    other.blocked()
    assert [line.split()[0] for line in locks_of(mounts.new / "f")].count("->") == 1
    victim.run("os.close(a)")
    assert other.result() == "have it"
    assert len(locks_of(mounts.new / "f")) == 1 and locks_of(mounts.old / "f") == []


@pytest.mark.parametrize("lock", ["fcntl.lockf(a, fcntl.LOCK_EX, 10, 0)", "ofd(a, fcntl.F_WRLCK, 0, 10)"])
def test_lock_that_somebody_else_has(mounts: Mounts, victim: Victim, other: Victim, lock: str) -> None:
    """On the new mount: the file stays where it is, with its lock, and all that belongs to it; later it goes."""
    path = mounts.file("f", new=b"n" * 100)
    free = mounts.file("free")
    victim.run(PREPARED + f"a, b, c = [os.open(p, os.O_RDWR) for p in {(path, path, free)!r}]; {lock}")
    before = locks_of(mounts.old / "f")
    other.run(f"fd = os.open({str(mounts.new / 'f')!r}, os.O_RDWR); ofd(fd, fcntl.F_RDLCK, 9, 1)")
    report = mounts.switch()
    assert report.moved == {"file": 1}
    reasons = {left.what: left.reason for left in report.left}
    assert "lock cannot be had" in reasons.pop("fd " + str(victim.run("a"))) and len(reasons) == 1
    assert locks_of(mounts.old / "f") == before and locks_of(mounts.new / "f") == ["OFDLCK READ 9 9"]
    assert victim.run("os.pread(a, 3, 0)") == b"old"
    other.run("os.close(fd)")
    assert mounts.switch().left == []
    assert locks_of(mounts.new / "f") == before


def test_posix_lock_keeps_the_descriptors_of_its_file_together(mounts: Mounts, victim: Victim) -> None:
    """One of them cannot go (the new file cannot be written to), so none does: closing one would drop the lock."""
    path = mounts.file("f")
    victim.run(f"a, b = os.open({path!r}, os.O_RDWR), os.open({path!r}, os.O_RDONLY); fcntl.lockf(b, fcntl.LOCK_SH)")
    subprocess.run(["mount", "-o", "remount,ro", str(mounts.new)], check=True)
    report = mounts.switch()
    assert len(report.left) == 2 and any("(POSIX) without another" in left.reason for left in report.left)
    assert locks_of(mounts.old / "f") == ["POSIX READ 0 EOF"]
    subprocess.run(["mount", "-o", "remount,rw", str(mounts.new)], check=True)
    assert mounts.switch().moved == {"file": 2}
    assert locks_of(mounts.new / "f") == ["POSIX READ 0 EOF"]


def test_lease(mounts: Mounts, victim: Victim, other: Victim) -> None:
    """It goes along, and when it is broken the signal names its descriptor."""
    path = mounts.file("f")
    victim.run(
        f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.open('/dev/null', 0); fd = os.open({path!r}, os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGUSR1); fcntl.fcntl(fd, 1024, fcntl.F_WRLCK)
libc = ctypes.CDLL(None)
"""
    )
    assert mounts.switch().moved == {"file": 1}
    assert locks_of(mounts.new / "f") == ["LEASE WRITE 0 EOF"]
    assert victim.run("fcntl.fcntl(fd, 1025)") == fcntl.F_WRLCK
    other.start(f"os.close(os.open({str(mounts.new / 'f')!r}, os.O_RDONLY))")
    # struct siginfo: si_fd lies behind si_band
    taken = "info = ctypes.create_string_buffer(128); mask = struct.pack('Q', 1 << signal.SIGUSR1 - 1)"
    victim.run(f"{taken}; number = libc.syscall({call_numbers()['rt_sigtimedwait']}, mask, info, None, 8)")
    assert victim.run("number == signal.SIGUSR1, struct.unpack_from('i', info.raw, 24)[0] == fd") == (True, True)
    victim.run(f"fcntl.fcntl(fd, {LEASE}, {NOTHING})")
    assert other.result() is None


def test_lease_that_is_being_broken_stays(mounts: Mounts, victim: Victim, other: Victim) -> None:
    path = mounts.file("f")
    victim.run(
        f"signal.signal(signal.SIGIO, signal.SIG_IGN); fd = os.open({path!r}, os.O_RDWR); fcntl.fcntl(fd, 1024, 1)"
    )
    other.start(f"os.open({path!r}, os.O_RDONLY)")
    other.blocked()
    (left,) = mounts.switch().left
    assert "LEASE BREAKING" in left.reason and left.what == f"fd {victim.run('fd')}"
    victim.run(f"fcntl.fcntl(fd, {LEASE}, {NOTHING})")
    assert other.result() is not None
    assert mounts.switch().moved == {"file": 2}
