"""Parsers of /proc files, against what kernels print and against ourselves."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from spfs.linux import procfs, statx
from spfs.references import MountRoot

MAPS = b"""\
55d0c0a00000-55d0c0a01000 r--p 00000000 00:2d 5                          /mnt/a b (deleted)
55d0c0a01000-55d0c0a02000 rw-s 00003000 00:2d 18446744073709551615       /mnt/x
7ffe0d9f0000-7ffe0da11000 rw-p 00000000 00:00 0                          [stack]
7ffe0dbd4000-7ffe0dbd6000 r-xp 00000000 00:00 0                          [vdso]
7f0000000000-7f0000001000 r--p 00000000 08:2d 5                          /other
"""

DATA = Path(__file__).parents[1] / "data"


def test_lines_of_a_device() -> None:
    lines = procfs.lines_of_device(MAPS, os.makedev(0, 0x2D))
    first, second = map(procfs.parse_mapping, lines)
    assert first == procfs.Mapping(0x55D0C0A00000, 0x55D0C0A01000, "r--p", 0, 5, "/mnt/a b (deleted)")
    assert second.shared and second.offset == 0x3000 and second.inode == 2**64 - 1
    assert procfs.lines_of_device(MAPS, os.makedev(0, 0x2E)) == []


def test_vdso() -> None:
    assert procfs.find_vdso(MAPS) == (0x7FFE0DBD4000, 0x7FFE0DBD6000)
    assert procfs.find_vdso(MAPS.replace(b"[vdso]", b"")) is None


def test_not_a_line_of_maps() -> None:
    with pytest.raises(ValueError, match="not a line of maps"):
        procfs.parse_mapping(b"Rss: 4 kB")


@pytest.mark.parametrize("command", [b"sh", b"a) R 1 (b", b"((", b"tab\there"])
def test_command_with_parentheses(command: bytes) -> None:
    fields = b"S 17 " + b" ".join(b"%d" % n for n in range(5, 53))
    parsed = procfs.parse_stat(b"42 (" + command + b") " + fields)
    assert (parsed.command, parsed.state, parsed.parent, parsed.start) == (command.decode(), "S", 17, 22)


def test_status_of_ourselves() -> None:
    status = procfs.parse_status(Path("/proc/self/status").read_bytes())
    assert (status.uid, status.gid, status.groups) == (os.geteuid(), os.getegid(), tuple(os.getgroups()))
    assert not status.kernel_thread and status.seccomp == 0


def test_status_of_a_kernel_thread() -> None:
    assert procfs.parse_status((DATA / "status-kernel-thread").read_bytes()).kernel_thread


FDINFO = b"""\
pos:\t7
flags:\t02102002
mnt_id:\t162
ino:\t2
lock:\t1: FLOCK  ADVISORY  WRITE 4445 00:38:2 0 EOF
lock:\t2: LEASE  BREAKING  READ  4445 00:38:2 0 EOF
tfd:        5 events:       19 data:                5  pos:0 ino:61 sdev:d
"""


def test_fdinfo() -> None:
    info = procfs.parse_fdinfo(FDINFO)
    assert (info.position, info.mount_id) == (7, 162)
    assert info.flags == os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | 0o100000
    assert [lock[:3] for lock in info.locks] == [("FLOCK", "ADVISORY", "WRITE"), ("LEASE", "BREAKING", "READ")]
    assert info.lines[-1].startswith("tfd:")


def test_locks_on_a_device() -> None:
    text = b"1: FLOCK  ADVISORY  WRITE 4445 00:38:2 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 9 00:38:2 0 EOF\n"
    text += b"2: POSIX  ADVISORY  READ 4445 08:38:2 0 EOF\n"
    found = procfs.locks_on(text, os.makedev(0, 0x38))
    assert list(found) == [2] and len(found[2]) == 2
    assert procfs.locks_on(text, os.makedev(0, 0x3)) == {}


def test_own_lock_is_seen() -> None:
    with tempfile.TemporaryFile() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        info = procfs.parse_fdinfo(procfs.read(f"/proc/self/fdinfo/{file.fileno()}"))
    assert info.locks == (procfs.Lock("FLOCK", "ADVISORY", "READ", 0, None),)


def test_flags_of_mappings() -> None:
    with mmap.mmap(-1, 8192) as memory:
        memory.madvise(mmap.MADV_DONTFORK)
        flags = procfs.parse_vm_flags(procfs.read("/proc/self/smaps"))
    assert any("dc" in found for found in flags.values()) and all("pkey" not in found for found in flags.values())
    keyed = b"7f00-7f01 rw-p 00 00:00 0\nProtectionKey:         3\nVmFlags: rd wr\n"
    keyed += b"7f01-7f02 r--p 00 00:00 0\nVmFlags: rd\n"
    assert procfs.parse_vm_flags(keyed) == {0x7F00: {"rd", "wr", "pkey"}, 0x7F01: {"rd"}}


def test_vm_flags_of_some_mappings() -> None:
    """Up to the last one asked for, wherever it lies; what lies behind is not read."""
    # Another process', one that does nothing: our own mappings change while we look.
    with subprocess.Popen(["sh", "-c", "echo; read x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        path = f"/proc/{process.pid}/smaps"
        everything = procfs.parse_vm_flags(procfs.read(path))
        starts = sorted(everything)
        for index in (0, len(starts) // 2, len(starts) - 1):
            some = procfs.read_vm_flags(path, [starts[0], starts[index]])
            assert all(some[start] == everything[start] for start in (starts[0], starts[index]))
        assert procfs.read_vm_flags(path, [1]).keys() == everything.keys()  # gone meanwhile
        process.communicate(b"\n")
    with mmap.mmap(-1, 1 << 16):  # ours are many, more than one read of the file gives
        ours = procfs.parse_vm_flags(procfs.read("/proc/self/smaps"))
        assert len(procfs.read_vm_flags("/proc/self/smaps", [min(ours)])) < len(ours)


def test_statx_agrees_with_stat(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    (tmp_path / "l").symlink_to("f")
    for name, flags in (("f", 0), ("l", 0), ("l", statx.AT_SYMLINK_NOFOLLOW), (".", 0)):
        found = statx.examine(str(tmp_path / name), flags=flags)
        expected = os.stat(tmp_path / name, follow_symlinks=not flags)
        assert (found.device, found.inode, found.mode, found.size) == (
            expected.st_dev,
            expected.st_ino,
            expected.st_mode,
            expected.st_size,
        )
        assert found.mount_id > 0
    with pytest.raises(FileNotFoundError):
        statx.examine(str(tmp_path / "missing"))


def test_paths_beneath_a_root() -> None:
    assert MountRoot(-1).relative("a/b") == "a/b"
    root = MountRoot(-1, "a/b")
    assert [root.relative(path) for path in ("a/b", "a/b/c", "a/bc", "a", "")] == ["", "c", None, None, None]
