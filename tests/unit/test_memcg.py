"""What is left beneath a memory cgroup's limit, from files as both versions show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from spfs.linux.memcg import MemoryCgroup

MIB = 1 << 20
FILES = {
    2: ("memory.max", "memory.current", "inactive_file {}\nactive_file {}\nfile_dirty {}\nfile_writeback 0\n"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes",
        "inactive_file 1\ntotal_inactive_file {}\ntotal_active_file {}\ntotal_dirty {}\ntotal_writeback 0\n"),
}  # fmt: skip


def cgroup(directory: Path, version: int, limit: str) -> MemoryCgroup:
    names = FILES[version]
    for name, text in zip(names, (limit, str(90 * MIB))):
        (directory / name).write_text(text + "\n")
    (directory / "memory.stat").write_text(names[2].format(8 * MIB, 4 * MIB, 2 * MIB))
    return MemoryCgroup(str(directory), version)


@pytest.mark.parametrize("version", [1, 2])
def test_room(tmp_path: Path, version: int) -> None:
    limited = cgroup(tmp_path, version, str(100 * MIB))
    assert limited.room(9 * MIB) == 10 * MIB  # without a look at what could be reclaimed
    assert limited.room(50 * MIB) == (10 + 8 + 4 - 2) * MIB
    assert cgroup(tmp_path, version, str(50 * MIB)).room(MIB) == 0
    unlimited = cgroup(tmp_path, version, "max" if version == 2 else "9223372036854771712")
    assert unlimited.limit() is None and unlimited.room(MIB) == MIB
    assert MemoryCgroup(str(tmp_path / "gone"), version).room(MIB) == MIB
