"""What a process sees of its mappings after they were exchanged: contents, protection, advice, locks, ends of files."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
from pathlib import Path
from typing import Callable, Iterator

import pytest
from stubfs_kit import mounted
from surgery_kit import Mounts, Tree, Victim, mounts

from spfs.freezer import NoFreezer
from spfs.references import MountRoot
from spfs.surgery import maps
from spfs.switch import Switch
from spfs.testing import wait_until

__all__ = ["mounts"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

MIB = 1 << 20

HELPERS = """
import ctypes, hashlib, mmap, os, signal
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
NONE, READ, WRITE, EXEC = 0, 1, 2, 4
SHARED, PRIVATE = 1, 2

def mapped(path, length, protection, how):
    fd = os.open(path, os.O_RDWR)
    address = libc.mmap(None, length, protection, how, fd, 0)
    os.close(fd)
    assert address not in (None, 2**64 - 1)
    return address

def lines(name='/f'):
    return [line.split()[:2] for line in open('/proc/self/maps') if line.rstrip().endswith(name)]

def flags(name='/f'):
    found, ours = [], False
    for line in open('/proc/self/smaps'):
        if line[0] in '0123456789abcdef':
            ours = line.rstrip().endswith(name)
        elif line.startswith('VmFlags:') and ours:
            found.append(sorted(set(line.split()[1:]) - {'sd'}))  # soft-dirty: any new mapping is
    return found

def digest(address, length):
    return hashlib.sha256(ctypes.string_at(address, length)).hexdigest()

def dies_of(action):
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
"""


@pytest.fixture
def victim() -> Iterator[Victim]:
    victim = Victim()
    victim.run(HELPERS)
    yield victim
    victim.close()


def test_more_pages_than_are_copied_at_once(mounts: Mounts, victim: Victim) -> None:
    """Runs that are longer than a piece, shorter ones, single pages: all there, and still one mapping."""
    size = 5 * maps.COPIED
    path = mounts.file("f", b"o" * size, b"n" * size)
    victim.run(
        f"""
at = mapped({path!r}, {size}, READ | WRITE, PRIVATE)
ctypes.memset(at + 4096, ord('a'), {2 * maps.COPIED + 4096})
for page in range({3 * maps.COPIED}, {4 * maps.COPIED}, 8192): ctypes.memset(at + page, ord('b'), 5)
ctypes.memset(at + {size} - 1, ord('c'), 1)
"""
    )
    before = victim.run("lines()")
    assert mounts.switch().moved == {"private mapping": 1} and mounts.users() == []
    assert victim.run("lines()") == before and len(before) == 1
    expected = bytearray(b"n" * size)
    expected[4096 : 2 * maps.COPIED + 8192] = b"a" * (2 * maps.COPIED + 4096)
    for page in range(3 * maps.COPIED, 4 * maps.COPIED, 8192):
        expected[page : page + 4096] = b"bbbbb" + b"o" * 4091
    expected[-4096:] = b"o" * 4095 + b"c"
    assert victim.run(f"digest(at, {size})") == hashlib.sha256(expected).hexdigest()
    # Of several mappings, even adjacent ones, mremap(2) would make none (EFAULT).
    assert victim.run(f"at = libc.mremap(at, {size}, {2 * size}, 1); ctypes.string_at(at, 1)") == b"n"
    assert (mounts.new / "f").read_bytes() == b"n" * size


@pytest.mark.parametrize("protection", ["NONE", "READ", "WRITE", "READ | EXEC"])
@pytest.mark.parametrize("written", [False, True], ids=["clean", "written"])
def test_protection(mounts: Mounts, victim: Victim, protection: str, written: bool) -> None:
    """Of a private mapping that was writable once, and can be again."""
    size = 2 * maps.COPIED
    path = mounts.file("f", b"o" * size, b"n" * size)
    victim.run(
        f"""
at = mapped({path!r}, {size}, READ | WRITE, PRIVATE)
if {written}: ctypes.memset(at + 4096, ord('a'), {size} - 8192)
assert libc.mprotect(at, {size}, {protection}) == 0
"""
    )
    before = victim.run("lines(), flags()")
    assert mounts.switch().moved == {"private mapping": 1} and mounts.users() == []
    assert victim.run("lines(), flags()") == before
    assert victim.run(f"libc.mprotect(at, {size}, READ | WRITE), ctypes.string_at(at + 4096, 2)") == (
        0,
        b"aa" if written else b"nn",
    )


@pytest.mark.parametrize("how", ["SHARED", "PRIVATE"])
def test_advice(mounts: Mounts, victim: Victim, how: str) -> None:
    """A page for each, and some written to."""
    path = mounts.file("f", b"o" * 65536, b"n" * 65536)
    victim.run(
        f"""
at = mapped({path!r}, 65536, READ | WRITE, {how})
if {how} == PRIVATE: ctypes.memset(at, ord('a'), 20000)
names = ['DONTFORK', 'DONTDUMP', 'RANDOM', 'SEQUENTIAL', 'HUGEPAGE', 'NOHUGEPAGE', 'MERGEABLE']
advised = [libc.madvise(at + 4096 * n, 4096, getattr(mmap, 'MADV_' + name)) for n, name in enumerate(names)]
"""
    )
    before = victim.run("lines(), flags()")
    assert victim.run("advised[:4]") == [0, 0, 0, 0] and len(before[1]) >= 5  # the others are options of the kernel
    report = mounts.switch()
    assert report.left == [] and mounts.users() == []
    assert victim.run("lines(), flags()") == before
    assert victim.run("ctypes.string_at(at + 19999, 2)") == (b"ao" if how == "PRIVATE" else b"nn")


@pytest.mark.parametrize("how", ["SHARED", "PRIVATE"])
@pytest.mark.parametrize("on_fault", [0, 1], ids=["now", "on fault"])
def test_locked_in_memory(mounts: Mounts, victim: Victim, how: str, on_fault: int) -> None:
    path = mounts.file("f", b"o" * 65536, b"n" * 65536)
    locked = "[line for line in open('/proc/self/status') if line.startswith('VmLck')]"
    victim.run(f"at = mapped({path!r}, 65536, READ | WRITE, {how})")
    victim.run(f"assert libc.mlock2(at, 65536, {on_fault}) == 0")
    before = victim.run(f"lines(), flags(), {locked}")
    assert mounts.switch().left == [] and mounts.users() == []
    assert victim.run(f"lines(), flags(), {locked}") == before and "lo" in before[1][0]


def test_all_memory_locked(mounts: Mounts, victim: Victim) -> None:
    """mlockall(2) for what comes later, too: the scratch memory is locked as well, and gone afterwards."""
    path = mounts.file("f", b"o" * 65536, b"n" * 65536)
    victim.run(f"at = mapped({path!r}, 65536, READ | WRITE, PRIVATE); fd = os.open({path!r}, 0)")
    victim.run("assert libc.mlockall(3) == 0; ctypes.memset(at, ord('a'), 1)")
    locked = "[line for line in open('/proc/self/status') if line.startswith('VmLck')]"
    before = victim.run(f"flags(), {locked}")
    assert mounts.switch().moved == {"private mapping": 1, "file": 1}
    assert victim.run(f"flags(), {locked}") == before and victim.run("ctypes.string_at(at, 2)") == b"ao"


@pytest.mark.parametrize("how", ["SHARED", "PRIVATE"])
def test_guards(mounts: Mounts, victim: Victim, how: str) -> None:
    """Pages that kill who touches them (MADV_GUARD_INSTALL), which show in no flag of the mapping."""
    path = mounts.file("f", b"o" * 65536, b"n" * 65536)
    victim.run(f"at = mapped({path!r}, 65536, READ | WRITE, {how})")
    if victim.run("libc.madvise(at + 8192, 8192, 102)") != 0:
        pytest.skip("no guards in mappings of files before Linux 6.15")
    victim.run(f"if {how} == PRIVATE: ctypes.memset(at + 20000, ord('a'), 1)")
    assert mounts.switch().left == [] and mounts.users() == []
    touch = "[dies_of(lambda: ctypes.string_at(at + 4096 * page, 1)) for page in range(6)]"
    assert victim.run(touch) == [0, 0, 11, 11, 0, 0]
    assert victim.run("ctypes.string_at(at + 19999, 2)") == (b"oa" if how == "PRIVATE" else b"nn")


@pytest.mark.parametrize("how", ["SHARED", "PRIVATE"])
def test_beyond_the_end_of_the_file(mounts: Mounts, victim: Victim, how: str) -> None:
    """SIGBUS there, as before; and no more when the file grows."""
    path = mounts.file("f", b"o" * 5000, b"n" * 5000)
    victim.run(f"at = mapped({path!r}, 16384, READ | WRITE, {how}); ctypes.memset(at + 10, ord('n'), 1)")
    touch = "[dies_of(lambda: ctypes.string_at(at + 4096 * page, 1)) for page in range(4)]"
    assert victim.run(touch) == [0, 0, 7, 7]
    assert mounts.switch().left == []
    assert victim.run(touch) == [0, 0, 7, 7]
    os.truncate(mounts.new / "f", 16384)
    assert victim.run(touch) == [0, 0, 0, 0] and victim.run("ctypes.string_at(at + 10, 2)")[1:] in (b"n", b"o")


def test_huge_address_space_that_is_hardly_used(mounts: Mounts, victim: Victim) -> None:
    """A terabyte, of which three pages are there, and for which no memory is reserved."""
    for root in (mounts.old, mounts.new):
        (root / "f").touch()
        os.truncate(root / "f", 1 << 40)
    victim.run(
        f"""
at = mapped({str(mounts.old / 'f')!r}, 1 << 40, READ | WRITE, PRIVATE | 0x4000)
for place in (0, 1 << 35, (1 << 40) - 1): ctypes.memset(at + place, ord('a'), 1)
"""
    )
    report = mounts.switch()
    if report.left and "6.7" in report.left[0].reason:
        pytest.skip(report.left[0].reason)
    assert report.moved == {"private mapping": 1} and mounts.users() == []
    there = "[ctypes.string_at(at + place, 1) for place in (0, 1, 1 << 35, (1 << 40) - 1)]"
    assert victim.run(there) == [b"a", b"\0", b"a", b"a"]


FIXED = {
    "is sealed": "libc.syscall(462, ctypes.c_void_p(address), ctypes.c_size_t(8192), 0)",
    "is registered with userfaultfd": f"""
u = libc.syscall({323 if os.uname().machine == "x86_64" else 282}, 0)
if u >= 0:
    fcntl.ioctl(u, 0xC018AA3F, bytearray(struct.pack('QQQ', 0xAA, 0, 0)))  # UFFDIO_API
    fcntl.ioctl(u, 0xC020AA00, bytearray(struct.pack('QQQQ', address, 8192, 1, 0)))  # UFFDIO_REGISTER
min(u, 0)
""",
}


@pytest.mark.parametrize("why", list(FIXED))
def test_mapping_that_cannot_be_exchanged(mounts: Mounts, victim: Victim, why: str) -> None:
    path = mounts.file("f", b"o" * 8192, b"n" * 8192)
    victim.run(
        f"""
import ctypes, fcntl, mmap, os, struct
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open({path!r}, os.O_RDWR); m = mmap.mmap(fd, 8192); m[:1] = b'm'
address = ctypes.addressof(ctypes.c_char.from_buffer(m))
"""
    )
    if victim.run(FIXED[why]) != 0:
        pytest.skip(f"the kernel cannot have a mapping that {why}: error {victim.run('ctypes.get_errno()')}")
    report = mounts.switch()
    (left,) = report.left
    assert (left.kind, report.moved) == ("shared mapping", {"file": 2}) and why in left.reason
    assert victim.run("m[:2], os.read(fd, 1)") == (b"mo", b"n")


def test_no_room_for_a_second_mapping(mounts: Mounts, victim: Victim) -> None:
    """RLIMIT_AS: it stays, as it was, and is told."""
    path = mounts.file("f", b"o" * 64 * MIB, b"n" * 64 * MIB)
    victim.run(f"at = mapped({path!r}, {64 * MIB}, READ | WRITE, PRIVATE); ctypes.memset(at, ord('a'), 1)")
    (size,) = [
        int(line.split()[1]) << 10
        for line in Path(f"/proc/{victim.pid}/status").read_text().splitlines()
        if line.startswith("VmSize:")
    ]
    resource.prlimit(victim.pid, resource.RLIMIT_AS, (size + 32 * MIB, resource.RLIM_INFINITY))
    (left,) = mounts.switch().left
    assert left.kind == "private mapping" and "cannot be mapped" in left.reason
    assert victim.run("ctypes.string_at(at, 2), lines()[0][1], len(lines())") == (b"ao", "rw-p", 1)
    resource.prlimit(victim.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert mounts.switch().left == [] and victim.run("ctypes.string_at(at, 2)") == b"ao"


@pytest.mark.parametrize("written", [False, True], ids=["clean", "written"])
def test_new_mount_without_execution(mounts: Mounts, victim: Victim, written: bool) -> None:
    """What may not be executed there stays where it may be."""
    path = mounts.file("f", b"o" * 8192, b"n" * 8192)
    victim.run(
        f"""
at = mapped({path!r}, 8192, READ | WRITE, PRIVATE)
if {written}: ctypes.memset(at, ord('a'), 1)
assert libc.mprotect(at, 8192, READ | EXEC) == 0
"""
    )
    subprocess.run(["mount", "-o", "remount,noexec", str(mounts.new)], check=True)
    before = victim.run("lines()")
    (left,) = mounts.switch().left
    assert left.kind == "private mapping" and "Permission denied" in left.reason
    assert victim.run("lines(), ctypes.string_at(at + 1, 1)") == (before, b"o")


def test_what_is_copied_at_once_ends_where_a_mapping_ends(mounts: Mounts, victim: Victim) -> None:
    """The next mapping begins with a part of its own, also at once with pages to be copied."""
    size = maps.COPIED
    path = mounts.file("f", b"o" * size, b"n" * size)
    victim.run("ats = []")
    for _ in range(3):
        victim.run(f"ats.append(mapped({path!r}, {size}, READ | WRITE, PRIVATE)); ctypes.memset(ats[-1], 97, {size})")
    report = mounts.switch()
    assert report.left == [] and report.moved == {"private mapping": 3} and mounts.users() == []
    assert victim.run(f"all(ctypes.string_at(at, {size}) == b'a' * {size} for at in ats)")


MEMORY_CGROUPS = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))


@pytest.fixture
def memory_limit() -> Iterator[Callable[[int, int], None]]:
    """A function that puts a process into a cgroup with so many bytes, all told."""
    there = [(Path(top), file) for top, file in MEMORY_CGROUPS if Path(top, "cgroup.procs").exists()]
    if not there:
        pytest.skip("there is no memory controller")
    top, file = there[0]
    if file == "memory.max":
        (top / "cgroup.subtree_control").write_text("+memory")
    path = top / f"spfs-test-{os.getpid()}-memory"
    path.mkdir()

    def limit(pid: int, size: int) -> None:
        (path / file).write_text(str(size))
        (path / "cgroup.procs").write_text(str(pid))

    try:
        yield limit
    finally:
        wait_until(lambda: not (path / "cgroup.procs").read_text(), 5)
        path.rmdir()


def test_at_its_memory_limit(mounts: Mounts, memory_limit: Callable[[int, int], None]) -> None:
    """What is copied does not need twice the memory: that would be the process's end."""
    size = 8 * maps.COPIED
    path = mounts.file("f", b"o" * size, b"n" * size)
    victim = Victim()
    try:
        victim.run(HELPERS)
        memory_limit(victim.pid, size + 3 * maps.COPIED)
        victim.run(f"at = mapped({path!r}, {size}, READ | WRITE, PRIVATE); ctypes.memset(at, ord('a'), {size})")
        assert mounts.switch().moved == {"private mapping": 1} and mounts.users() == []
        wrong = f"[place for place in range(0, {size}, 65536) if ctypes.string_at(at + place, 65536) != b'a' * 65536]"
        assert victim.run(f"{wrong}, len(lines())") == ([], 1)
    finally:
        victim.close()


@pytest.mark.parametrize("spare", [6 << 20, 2 << 20])
def test_close_to_its_memory_limit(mounts: Mounts, memory_limit: Callable[[int, int], None], spare: int) -> None:
    """The kernel would kill it for what is copied at once elsewhere: less is. A second one shares what there is."""
    size = 32 << 20
    path = mounts.file("f", b"o" * size, b"n" * size)
    victims = [Victim(), Victim()]
    try:
        for victim in victims:
            victim.run(HELPERS)
            memory_limit(victim.pid, 2 * size + spare)
        for victim in victims:
            victim.run(f"at = mapped({path!r}, {size}, READ | WRITE, PRIVATE); ctypes.memset(at, ord('a'), {size})")
        assert mounts.switch().moved == {"private mapping": 2} and mounts.users() == []
        for victim in victims:
            assert victim.run(f"{whole(size)}, len(lines())") == (True, 1)
    finally:
        for victim in victims:
            victim.close()


def test_at_its_memory_limit_with_nothing_to_spare(
    mounts: Mounts, memory_limit: Callable[[int, int], None]
) -> None:
    """Left, said why, and moved when there is more."""
    size = 16 << 20
    path = mounts.file("f", b"o" * size, b"n" * size)
    victim = Victim()
    try:
        victim.run(HELPERS)
        memory_limit(victim.pid, size + (512 << 10))
        victim.run(f"at = mapped({path!r}, {size}, READ | WRITE, PRIVATE); ctypes.memset(at, ord('a'), {size})")
        report = mounts.switch()
        (left,) = report.left
        assert left.kind == "private mapping" and "KiB from its limit" in left.reason and report.moved == {}
        assert victim.run(f"{whole(size)}, len(lines())") == (True, 1)
        memory_limit(victim.pid, 2 * size)
        assert mounts.switch().moved == {"private mapping": 1} and mounts.users() == []
        assert victim.run(f"{whole(size)}, len(lines())") == (True, 1)
    finally:
        victim.close()


def whole(size: int) -> str:
    """Says whether all of the mapping is still what was written to it; takes no memory for it."""
    return f"all(ctypes.string_at(at + place, 65536) == b'a' * 65536 for place in range(0, {size}, 65536))"


@pytest.mark.needs_fuse
def test_not_yet_written_back(tmp_path: Path, victim: Victim) -> None:
    """Pages that the old file system has not got yet reach the file, and the new mapping shows them."""
    with mounted(tmp_path, mode="proxy") as filesystem:
        (filesystem.real / "f").write_bytes(b"o" * 65536)
        victim.run(f"at = mapped({str(filesystem.path / 'f')!r}, 65536, READ | WRITE, SHARED)")
        victim.run("ctypes.memset(at + 5000, ord('d'), 20000)")
        assert b"d" not in (filesystem.real / "f").read_bytes()
        new = os.open(filesystem.real, os.O_PATH)
        try:
            device = os.stat(filesystem.path).st_dev
            resolver = Tree(filesystem.path)
            exclude = {filesystem.daemon.pid}
            with Switch(device, resolver, lambda mount: MountRoot(new), NoFreezer(), exclude=exclude) as switch:
                assert switch.prepare().left == []
                assert switch.execute(lambda: None).moved == {"shared mapping": 1}
        finally:
            os.close(new)
        expected = b"o" * 5000 + b"d" * 20000 + b"o" * 40536
        assert (filesystem.real / "f").read_bytes() == expected
        assert victim.run("ctypes.string_at(at, 65536)") == expected
        victim.run("ctypes.memset(at, ord('e'), 1)")
        assert (filesystem.real / "f").read_bytes()[:2] == b"eo"


def test_memory_that_may_not_be_written_and_executed(mounts: Mounts, victim: Victim) -> None:
    """prctl(PR_SET_MDWE): what is injected abides by it."""
    path = mounts.file("f", b"o" * 8192, b"n" * 8192)
    victim.run(f"at = mapped({path!r}, 8192, READ | WRITE, PRIVATE); ctypes.memset(at, ord('a'), 1)")
    victim.run(f"fd = os.open({path!r}, 0)")
    if victim.run("libc.prctl(65, 1, 0, 0, 0)") != 0:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    before = victim.run("len(open('/proc/self/maps').readlines())")
    assert mounts.switch().moved == {"private mapping": 1, "file": 1}
    assert victim.run("ctypes.string_at(at, 2), os.read(fd, 1)") == (b"ao", b"n")
    assert victim.run("len(open('/proc/self/maps').readlines())") == before


def test_truncated_in_between(mounts: Mounts, victim: Victim) -> None:
    """The new file has become too short for the pages that must be copied: nothing is lost, it stays."""
    path = mounts.file("f", b"o" * 65536, b"n" * 65536)
    victim.run(f"at = mapped({path!r}, 65536, READ | WRITE, PRIVATE); ctypes.memset(at + 60000, ord('a'), 1)")
    report = mounts.switch(when_stopped=lambda: os.truncate(mounts.new / "f", 100))
    assert ["cannot be copied" in left.reason for left in report.left] == [True]
    assert victim.run("ctypes.string_at(at + 59999, 2), len(lines())") == (b"oa", 1)
