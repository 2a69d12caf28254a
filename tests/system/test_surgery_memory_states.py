"""Pages of private mappings that are not simply there: swapped out, or merged with others of the same contents."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import pytest
from surgery_kit import Mounts, Victim, mounts, victim
from test_surgery_memory import HELPERS

from spfs.testing import wait_until

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

PAGES = 256
SIZE = PAGES * os.sysconf("SC_PAGESIZE")
KSM = Path("/sys/kernel/mm/ksm")
ZRAM = Path("/sys/class/zram-control")


@pytest.fixture
def swap() -> Iterator[None]:
    """Somewhere to swap to: compressed memory."""
    if not ZRAM.exists() and subprocess.run(["modprobe", "zram"], capture_output=True).returncode != 0:
        pytest.skip("this kernel has no zram")
    number = (ZRAM / "hot_add").read_text().strip()
    with ExitStack() as stack:
        stack.callback((ZRAM / "hot_remove").write_text, number)
        Path(f"/sys/block/zram{number}/disksize").write_text("64M")
        subprocess.run(["mkswap", f"/dev/zram{number}"], check=True, capture_output=True)
        subprocess.run(["swapon", f"/dev/zram{number}"], check=True)
        stack.callback(subprocess.run, ["swapoff", f"/dev/zram{number}"], check=True)
        yield


@pytest.fixture
def merging() -> Iterator[None]:
    """The kernel looks for equal pages, fast."""
    settings = {"run": "1", "pages_to_scan": "10000", "sleep_millisecs": "1"}
    if not (KSM / "run").exists():
        pytest.skip("this kernel has no KSM")
    former = {name: (KSM / name).read_text() for name in settings}
    try:
        for name, value in settings.items():
            (KSM / name).write_text(value)
        yield
    finally:
        for name, value in former.items():
            (KSM / name).write_text(value)


def swapped(pid: int, name: str) -> int:
    """KiB of the mapping of the file that are swapped out."""
    found, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            ours = line.endswith(name)
        elif ours and line.startswith("Swap:"):
            found += int(line.split()[1])
    return found


DIFFERENT = f"b''.join(bytes([number % 251 + 1]) * 4096 for number in range({PAGES}))"


def test_swapped_out(swap: None, mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f", b"o" * SIZE, b"n" * SIZE)
    victim.run(HELPERS)
    victim.run(f"at = mapped({path!r}, {SIZE}, READ | WRITE, PRIVATE); written = {DIFFERENT}")
    victim.run(f"ctypes.memmove(at, written[:{SIZE // 2}], {SIZE // 2})")  # the other half is the file's
    assert victim.run(f"libc.madvise(at, {SIZE}, 21)") == 0  # MADV_PAGEOUT
    wait_until(lambda: swapped(victim.pid, "/old/f") >= SIZE // 2048 - 64, what="the pages to be swapped out")
    assert mounts.switch().moved == {"private mapping": 1} and mounts.users() == []
    assert victim.run(f"ctypes.string_at(at, {SIZE}) == written[:{SIZE // 2}] + b'n' * {SIZE // 2}, len(lines())") == (
        True,
        1,
    )


def test_merged(merging: None, mounts: Mounts, victim: Victim) -> None:
    """Equal pages, here and in a child, are one for the kernel; written to afterwards, each is the writer's own."""
    path = mounts.file("f", b"o" * SIZE, b"n" * SIZE)
    victim.run(HELPERS)
    victim.run(f"at = mapped({path!r}, {SIZE}, READ | WRITE, PRIVATE); libc.madvise(at, {SIZE}, 12)")
    victim.run(f"ctypes.memset(at, ord('a'), {SIZE})")
    merged = Path(f"/proc/{victim.pid}/ksm_merging_pages")
    wait_until(lambda: int(merged.read_text()) >= PAGES // 2, 20, "the pages to be merged")
    before = victim.run("flags()")
    assert mounts.switch().moved == {"private mapping": 1} and mounts.users() == []
    victim.run("ctypes.memset(at + 8192, ord('b'), 1)")
    assert victim.run(f"ctypes.string_at(at, {SIZE}) == b'a' * 8192 + b'b' + b'a' * ({SIZE} - 8193)")
    assert victim.run("flags()") == before and "mg" in before[0]
    wait_until(lambda: int(merged.read_text()) >= PAGES // 2, 20, "the new pages to be merged as well")
