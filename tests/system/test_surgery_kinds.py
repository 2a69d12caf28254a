"""Fifos with what lies in them, mappings of every sort, executables: moved between two mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from surgery_kit import Mounts, Victim, compile_c, mounts, traced, victim

from spfs.testing import process_state, wait_until

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


@pytest.fixture
def fifo(mounts: Mounts) -> str:
    mounts.both(lambda root: os.mkfifo(root / "fifo"))
    return str(mounts.old / "fifo")


# -- fifos


def test_fifo_with_data_and_both_ends(mounts: Mounts, victim: Victim, fifo: str) -> None:
    victim.run(
        f"""
both = os.open({fifo!r}, os.O_RDWR)
r, w = os.open({fifo!r}, os.O_RDONLY | os.O_NONBLOCK), os.open({fifo!r}, os.O_WRONLY)
fcntl.fcntl(r, 1031, 1 << 17)
for part in (b'first,', b'x' * 70000, b',last'): os.write(w, part)
os.close(both)
"""
    )
    report = mounts.switch()
    assert report.moved == {"fifo": 2} and mounts.users() == []
    assert victim.run("os.write(w, b'!'); os.read(r, 100000) == b'first,' + b'x' * 70000 + b',last!'")
    assert victim.run("fcntl.fcntl(r, fcntl.F_GETFL) & os.O_NONBLOCK > 0, fcntl.fcntl(r, 1032)") == (True, 1 << 17)
    assert victim.run("fcntl.fcntl(w, fcntl.F_GETFL) & os.O_NONBLOCK") == 0
    assert victim.run("os.close(w); os.read(r, 1)") == b""  # the end of file is seen: nobody else holds an end


@pytest.mark.parametrize(
    "wait", ["os.read(r, 9)", "select.select([r], [], [], 10) and os.read(r, 9)", "poll.poll(9000) and os.read(r, 9)"]
)
def test_blocked_on_a_fifo(mounts: Mounts, victim: Victim, fifo: str, wait: str) -> None:
    """One process waits for what another one writes afterwards."""
    writer = Victim()
    try:
        victim.start(f"r = os.open({fifo!r}, os.O_RDONLY); poll = select.poll(); poll.register(r)")
        writer.run(f"import os; w = os.open({fifo!r}, os.O_WRONLY)")
        victim.result()
        victim.run("poll.modify(r, select.POLLIN)")
        victim.start(wait)
        victim.blocked()
        assert mounts.switch().moved == {"fifo": 2}
        writer.run("os.write(w, b'hello')")
        assert victim.result() == b"hello"
        assert victim.run("os.set_blocking(r, False)") is None
    finally:
        writer.close()


def test_writer_of_a_full_fifo(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """A stop ends a write that has written a part already with a short count (pipe(7)), as SIGSTOP does: no byte is
    lost or written twice."""
    reader = Victim()
    try:
        reader.run(f"import os; r = os.open({fifo!r}, os.O_RDONLY | os.O_NONBLOCK)")
        victim.run(f"w = os.open({fifo!r}, os.O_WRONLY)")
        victim.start("data = bytes(range(250)) * 400\nwhile data: data = data[os.write(w, data):]")
        victim.blocked()
        assert mounts.switch().moved == {"fifo": 2}
        reader.run("os.set_blocking(r, True); data = b''")
        reader.run("while len(data) < 100000: data += os.read(r, 65536)")
        assert victim.result() is None
        assert reader.run("data == bytes(range(250)) * 400")
    finally:
        reader.close()


def test_blocked_in_opening_a_fifo(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """It holds nothing yet; its open is restarted by path, which here still leads to the old mount."""
    victim.run(f"os.chdir({str(mounts.old)!r})")
    victim.start("r = os.open('fifo', os.O_RDONLY)")
    victim.blocked()
    assert mounts.switch().moved == {"cwd": 1}
    fd = os.open(mounts.new / "fifo", os.O_WRONLY)
    os.write(fd, b"new")
    os.close(fd)
    victim.result()
    assert victim.run("os.read(r, 3)") == b"new"


def test_epoll_registration_of_a_fifo(mounts: Mounts, victim: Victim, fifo: str) -> None:
    victim.run(
        f"""
r = os.open({fifo!r}, os.O_RDWR); e = select.epoll(); e.register(r, select.EPOLLIN | select.EPOLLET)
"""
    )
    assert mounts.switch().moved == {"fifo": 1}
    assert victim.run("e.poll(0)") == []
    assert victim.run("os.write(r, b'x'); e.poll(5) == [(r, select.EPOLLIN)], e.poll(0)") == (True, [])
    assert mounts.users() == []


@pytest.mark.parametrize("flags", ["os.O_RDONLY | os.O_NONBLOCK", "os.O_RDWR", "os.O_PATH"])
def test_one_end_alone(mounts: Mounts, victim: Victim, fifo: str, flags: str) -> None:
    """Nobody else has it open: who comes to the new one finds it."""
    victim.run(f"f = os.open({fifo!r}, {flags})")
    kind = "path" if "PATH" in flags else "fifo"
    assert mounts.switch().moved == {kind: 1} and mounts.users() == []
    if kind == "path":
        victim.run("f = os.open(f'/proc/self/fd/{f}', os.O_RDONLY | os.O_NONBLOCK)")
    fd = os.open(mounts.new / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, b"found")
    os.close(fd)
    assert victim.run("os.read(f, 9)") == b"found"


def test_writer_alone(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """The reader has gone: writing fails as before, and goes on with the next reader; the bytes wait."""
    victim.run(f"r = os.open({fifo!r}, os.O_RDONLY | os.O_NONBLOCK); w = os.open({fifo!r}, os.O_WRONLY)")
    victim.run("os.write(w, b'waits'); os.close(r)")
    assert mounts.switch().moved == {"fifo": 1}
    with pytest.raises(AssertionError, match="BrokenPipe"):
        victim.run("os.write(w, b'x')")
    fd = os.open(mounts.new / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    victim.run("os.write(w, b'heard')")
    assert os.read(fd, 99) == b"waitsheard"
    os.close(fd)


def test_several_readers_and_writers(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """Three readers are blocked; each gets one of the messages of two writers, and the end when both have closed."""
    readers = [Victim() for _ in range(3)]
    try:
        victim.start(f"w, v = os.open({fifo!r}, os.O_WRONLY), os.open({fifo!r}, os.O_WRONLY)")
        for reader in readers:
            reader.run(f"import os; r = os.open({fifo!r}, os.O_RDONLY)")
        victim.result()
        for reader in readers:
            reader.start("os.read(r, 1)")
            reader.blocked()
        assert mounts.switch().moved == {"fifo": 5} and mounts.users() == []
        victim.run("os.write(w, b'a'), os.write(v, b'b'), os.write(w, b'c')")
        assert sorted(reader.result() for reader in readers) == [b"a", b"b", b"c"]
        victim.run("os.close(w)")
        readers[0].start("os.read(r, 1)")
        readers[0].blocked()
        victim.run("os.close(v)")
        assert readers[0].result() == b""
    finally:
        for reader in readers:
            reader.close()


def test_waiting_by_epoll(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """A thread is in epoll_wait(2): what is written afterwards wakes it, once."""
    victim.run(f"r = os.open({fifo!r}, os.O_RDWR); e = select.epoll(); e.register(r, select.EPOLLIN | select.EPOLLET)")
    victim.start("e.poll(30), e.poll(0)")
    victim.blocked()
    assert mounts.switch().moved == {"fifo": 1}
    fd = os.open(mounts.new / "fifo", os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)
    found = victim.result()
    assert found == ([(victim.run("r"), 1)], []) and victim.run("os.read(r, 9)") == b"x"


def test_registered_after_the_preparation(mounts: Mounts, victim: Victim, fifo: str) -> None:
    victim.run(f"r = os.open({fifo!r}, os.O_RDWR); e = select.epoll()")
    mounts.prepared_switch(between=lambda: victim.run("e.register(r, select.EPOLLIN)"))
    assert victim.run("os.write(r, b'x'); e.poll(5) == [(r, select.EPOLLIN)]")


def test_epoll_in_epoll(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """The inner instance is not exchanged, and so the outer one is told of what it has."""
    victim.run(
        f"""
r = os.open({fifo!r}, os.O_RDWR)
inner, outer = select.epoll(), select.epoll()
inner.register(r, select.EPOLLIN | select.EPOLLET); outer.register(inner, select.EPOLLIN | select.EPOLLET)
"""
    )
    assert mounts.switch().moved == {"fifo": 1} and victim.run("outer.poll(0), inner.poll(0)") == ([], [])
    victim.start("[number == inner.fileno() for number, _ in outer.poll(30)], inner.poll(0) == [(r, select.EPOLLIN)]")
    victim.blocked()
    assert mounts.switch().moved == {}
    fd = os.open(mounts.new / "fifo", os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)
    assert victim.result() == ([True], True)


def test_registration_that_has_fired(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """EPOLLONESHOT: it stays silent until it is armed again."""
    victim.run(
        f"""
r = os.open({fifo!r}, os.O_RDWR); e = select.epoll(); e.register(r, select.EPOLLIN | select.EPOLLONESHOT)
os.write(r, b'x')
"""
    )
    assert victim.run("e.poll(5) == [(r, select.EPOLLIN)], e.poll(0)") == (True, [])
    assert mounts.switch().moved == {"fifo": 1}
    assert victim.run("e.poll(0)") == []
    assert victim.run("e.modify(r, select.EPOLLIN); e.poll(5) == [(r, select.EPOLLIN)]")


def test_fifo_stays_whole(mounts: Mounts, victim: Victim) -> None:
    """Without a counterpart both ends stay, and go on working."""
    path = mounts.old / "only old"
    os.mkfifo(path)
    victim.run(f"b = os.open({str(path)!r}, os.O_RDWR); r = os.open({str(path)!r}, os.O_RDONLY); os.write(b, b'12')")
    assert len(mounts.switch().left) == 2
    assert victim.run("os.read(r, 2)") == b"12"


# -- mappings


def test_shared_mapping(mounts: Mounts, victim: Victim) -> None:
    """Two processes write to each other through the mapping, before and after; what is written reaches the file."""
    path = mounts.file("f", b"o" * 8192, b"n" * 8192)
    other = Victim()
    try:
        mapping = f"import os, mmap; m = mmap.mmap(os.open({path!r}, os.O_RDWR), 8192)"
        victim.run(mapping)
        other.run(mapping)
        report = mounts.switch()
        assert report.moved == {"shared mapping": 2, "file": 4} and report.left == []  # mmap keeps a duplicate
        assert victim.run("m[4096:4100]") == b"nnnn"
        victim.run("m[5000:5005] = b'hello'")
        assert other.run("m[5000:5005]") == b"hello"
        assert (mounts.new / "f").read_bytes()[5000:5005] == b"hello"
        assert victim.run("m.close()") is None and (mounts.old / "f").read_bytes() == b"o" * 8192
    finally:
        other.close()


def test_private_mapping_keeps_what_was_written(mounts: Mounts, victim: Victim) -> None:
    """Own pages are copied, the others come from the new file; none is mixed."""
    path = mounts.file("f", b"o" * 40960, b"n" * 40960)
    victim.run(
        f"""
fd = os.open({path!r}, os.O_RDONLY)
m = mmap.mmap(fd, 40960, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
os.close(fd)
m[0]; m[4096:4099] = b'own'; m[8 * 4096 + 7] = 33
"""
    )
    report = mounts.switch()
    assert report.moved == {"private mapping": 1, "file": 1} and mounts.users() == []
    assert victim.run("m[0:2], m[4096:4101], m[8190:8194], m[8 * 4096 + 6:8 * 4096 + 9]") == (
        b"nn",
        b"ownoo",
        b"oonn",
        b"o!o",
    )
    victim.run("m[20000] = 34")
    assert victim.run("m[20000]") == 34 and (mounts.new / "f").read_bytes() == b"n" * 40960


LIBC = """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = libc.mprotect.argtypes
def permissions():
    lines = open('/proc/self/maps').read().splitlines()
    return [l.split()[1] for l in lines if l.split()[-1].endswith('/f')]
"""


def test_split_and_protected_mappings(mounts: Mounts, victim: Victim) -> None:
    """PROT_NONE, read-only after write, executable: the protections stay, and the pages under them."""
    path = mounts.file("f", b"o" * 16384, b"n" * 16384)
    victim.run(
        LIBC
        + f"""
fd = os.open({path!r}, os.O_RDONLY)
at = libc.mmap(0, 16384, 3, 2, fd, 0); os.close(fd)
ctypes.memmove(at + 4096, b'own', 3); ctypes.memmove(at + 8192, b'OWN', 3)
assert libc.mprotect(at + 4096, 4096, 0) == libc.mprotect(at + 8192, 4096, 1) == libc.mprotect(at + 12288, 4096, 5) == 0
assert libc.madvise(at, 4096, 10) == 0
"""
    )
    before = victim.run("permissions()")
    assert before == ["rw-p", "---p", "r--p", "r-xp"]
    report = mounts.switch()
    assert report.moved == {"private mapping": 4} and report.left == [] and mounts.users() == []
    assert victim.run("permissions()") == before
    assert victim.run("libc.mprotect(at + 4096, 4096, 1), ctypes.string_at(at + 4096, 4)") == (0, b"owno")
    assert victim.run("ctypes.string_at(at + 8192, 4), ctypes.string_at(at + 12288, 4)") == (b"OWNo", b"nnnn")
    flags = "[l.split() for l in open('/proc/self/smaps') if l.startswith('VmFlags')]"
    assert victim.run(f"sum('dc' in f for f in {flags})") >= 1


def test_shared_mapping_of_a_file_opened_for_reading(mounts: Mounts, victim: Victim) -> None:
    """Neither the old nor the new mapping can be made writable."""
    path = mounts.file("f", b"o" * 4096, b"n" * 4096)
    victim.run(LIBC + f"fd = os.open({path!r}, os.O_RDONLY); at = libc.mmap(0, 4096, 1, 1, fd, 0); os.close(fd)")
    assert mounts.switch().moved == {"shared mapping": 1}
    assert victim.run("libc.mprotect(at, 4096, 3), ctypes.string_at(at, 3)") == (-1, b"nnn")


def test_mapping_longer_than_the_new_file(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f", b"o" * 12288, b"n" * 100)
    victim.run(f"m = mmap.mmap(os.open({path!r}, os.O_RDONLY), 12288, prot=mmap.PROT_READ)")
    (left,) = [left for left in mounts.switch().left if left.kind == "shared mapping"]
    assert "too short" in left.reason and victim.run("m[12000]") == ord("o")


def test_mapping_beyond_the_end_of_both(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f", b"o" * 100, b"n" * 100)
    victim.run(LIBC + f"fd = os.open({path!r}, os.O_RDWR); at = libc.mmap(0, 12288, 3, 1, fd, 0); os.close(fd)")
    assert mounts.switch().moved == {"shared mapping": 1}
    assert victim.run("ctypes.string_at(at, 2)") == b"nn"


def test_memory_shared_by_fork(mounts: Mounts, victim: Victim) -> None:
    """Parent and child each keep what they wrote to their private mapping."""
    path = mounts.file("f", b"o" * 8192, b"n" * 8192)
    child = victim.run(
        LIBC
        + f"""
fd = os.open({path!r}, os.O_RDONLY); at = libc.mmap(0, 8192, 3, 2, fd, 0); os.close(fd)
ctypes.memmove(at, b'before', 6)
(r, w), (back, answer) = os.pipe(), os.pipe()
child = os.fork()
if not child:
    ctypes.memmove(at, b'CHILD', 5); os.write(answer, b'.'); os.read(r, 1)
    os.write(answer, ctypes.string_at(at, 7) + ctypes.string_at(at + 4096, 2)); os._exit(0)
os.read(back, 1); child"""
    )
    report = mounts.switch()
    assert report.moved == {"private mapping": 2} and child in report.processes
    assert victim.run("ctypes.string_at(at, 7), os.write(w, b'x'), os.read(back, 9)") == (b"beforeo", 1, b"CHILDeonn")
    victim.run("os.waitpid(child, 0)")


# -- executables


PROGRAM = r"""
#include <stdio.h>
#include <unistd.h>
static int counter = 41;
int main(void)
{
    char byte;
    counter++;
    write(1, "ready\n", 6);
    read(0, &byte, 1);
    printf("%d\n", counter);
    return 0;
}
"""


@pytest.mark.parametrize("flags", [["-static"], ["-static-pie"], ["-pie"]])
def test_executable(mounts: Mounts, tmp_path: Path, flags: "list[str]") -> None:
    """A program that runs from the mount: its text, its data and the link to it."""
    program = compile_c(tmp_path, PROGRAM, "-fPIE" if "pie" in flags[0] else "-fno-pie", "-Wno-unused-result", *flags)
    mounts.both(lambda root: shutil.copy(program, root / "program"))
    with subprocess.Popen(
        [str(mounts.old / "program")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        report = mounts.switch()
        assert report.left == [] and report.moved["exe"] == 1 and mounts.users() == []
        assert os.readlink(f"/proc/{process.pid}/exe") == str(mounts.new / "program")
        process.stdin.write(b"x")
        assert process.stdout.read() == b"42\n" and process.wait(5) == 0


def test_executable_of_an_unprivileged_process(mounts: Mounts, tmp_path: Path) -> None:
    """Its mappings are moved; the link, which it may not change, is reported, and the process runs on."""
    program = compile_c(tmp_path, PROGRAM, "-Wno-unused-result", "-static")
    mounts.both(lambda root: shutil.copy(program, root / "program"))
    with subprocess.Popen(
        ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "./program"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=mounts.old,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        report = mounts.switch()
        (left,) = report.left
        assert left.kind == "exe" and "may not" in left.reason and report.moved["private mapping"] >= 3
        process.stdin.write(b"x")
        assert process.stdout.read() == b"42\n" and process.wait(5) == 0
    assert process_state(process.pid) == ""
    wait_until(lambda: mounts.users() == [])


def test_registration_for_a_descriptor_that_was_closed(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """A duplicate keeps it alive (epoll(7), Q6)."""
    victim.run(
        f"""
r, other = os.open({fifo!r}, os.O_RDWR), os.open({fifo!r}, os.O_RDWR)
e = select.epoll(); e.register(r, select.EPOLLIN | select.EPOLLET)
high = fcntl.fcntl(other, 0, 900); e.register(high, select.EPOLLIN); os.close(high)
d = os.dup(r); os.close(r)
"""
    )
    preparation, report = mounts.prepared_switch()
    assert report.left == preparation.left == [] and report.moved == {"fifo": 2}
    assert victim.run("e.poll(0)") == []
    victim.run("os.write(other, b'x')")
    assert victim.run("sorted(e.poll(5)) == [(r, select.EPOLLIN), (high, select.EPOLLIN)]")
    assert victim.run("e.poll(0) == [(high, select.EPOLLIN)], os.read(d, 1), e.poll(0)") == (True, b"x", [])


def test_registration_that_is_in_two_processes(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """One has the instance alone, and sleeps in it; the other one the descriptor that it was registered by."""
    victim.run(
        f"""
r = os.open({fifo!r}, os.O_RDWR); e = select.epoll(); e.register(r, select.EPOLLIN)
here, there = os.pipe()
child = os.fork()
if not child:
    os.close(r); os.write(there, repr(e.poll(30)).encode()); os._exit(0)
e.close()
"""
    )
    child = victim.run("child")
    wait_until(lambda: "epoll" in Path(f"/proc/{child}/wchan").read_text(), what="the child to wait")
    report = mounts.switch()
    assert (report.moved, report.left) == ({"fifo": 1}, [])
    assert victim.run("os.write(r, b'x'), os.read(here, 100) == repr([(r, 1)]).encode()") == (1, True)
    victim.run("os.waitpid(child, 0)")


def test_registration_that_nobody_can_change(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """What it was made for is in a process that must stay: so does it, and goes on working; both go later."""
    victim.run(
        f"""
r = os.open({fifo!r}, os.O_RDWR); e = select.epoll(); e.register(r, select.EPOLLIN)
start, go = os.pipe()
child = os.fork()
if not child:
    e.close(); os.read(start, 1); os.write(r, b'x'); os.read(start, 1); os._exit(0)
os.close(r)
"""
    )
    with traced(victim.run("child")):
        (left,) = mounts.switch().left
        assert left.kind == "fifo" and left.pid == victim.run("child")
    assert mounts.switch().moved == {"fifo": 1}
    assert victim.run("os.write(go, b'x'), e.poll(10) == [(r, select.EPOLLIN)]") == (1, True)
    victim.run("os.write(go, b'x'); os.waitpid(child, 0)")


def test_registration_of_what_is_out_of_reach(mounts: Mounts, victim: Victim, fifo: str) -> None:
    """The fifo lies in a queue, and stays there: nothing is done, and it is reported; received, it goes."""
    victim.run(
        f"""
r = os.open({fifo!r}, os.O_RDWR); e = select.epoll(); e.register(r, select.EPOLLIN)
a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [r]); os.close(r)
"""
    )
    reasons = {left.kind: left.reason for left in mounts.switch().left}
    assert reasons.keys() == {"epoll registration", "descriptor in flight"}
    assert "out of reach" in reasons["epoll registration"]
    victim.run("_, (d,), _, _ = socket.recv_fds(b, 1, 1)")
    report = mounts.switch()
    assert (report.moved, report.left) == ({"fifo": 1}, [])
    assert victim.run("os.write(d, b'x'), e.poll(5) == [(r, select.EPOLLIN)]") == (1, True)
