"""Mappings of files compared by PROCMAP_QUERY: what is the same, and each way in which it is not."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from spfs.linux import mapquery, procfs
from spfs.linux.calls import CallTable, run_local

pytestmark = pytest.mark.skipif(not mapquery.supported(), reason="no PROCMAP_QUERY (Linux 6.11)")


def is_same(maps: bytes) -> bool:
    mappings = mapquery.FileMappings(os.getpid(), maps)
    try:
        calls = CallTable()
        mappings.add(calls)
        return mappings.same(run_local(calls))
    finally:
        mappings.close()


def test_changes_of_files_alone_are_seen(tmp_path: Path) -> None:
    run_local(CallTable())  # maps its code, once
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    before = procfs.read("/proc/self/maps")
    assert is_same(before)
    with mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as anonymous:
        anonymous[0] = 1
        assert is_same(before)
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
            assert not is_same(before)
            assert is_same(procfs.read("/proc/self/maps"))
            mapping[0] = 1
            assert is_same(procfs.read("/proc/self/maps"))
        assert is_same(before)


@pytest.mark.parametrize("old, new", [(b"r-xp", b"rwxp"), (b"r-xp", b"r-xs"), (b" 00000000 ", b" 00001000 ")])
def test_what_a_line_says_counts(old: bytes, new: bytes) -> None:
    lines = procfs.read("/proc/self/maps").splitlines()
    index = next(i for i, line in enumerate(lines) if old in line and b" 00:00 0" not in line)
    lines[index] = lines[index].replace(old, new)
    assert not is_same(b"\n".join(lines))
