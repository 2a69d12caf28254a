"""Pages that are not simply there: swapped out, merged with others of the same contents, or huge."""

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


HUGE = 2 << 20  # bytes of a huge page, with pages of 4096 bytes
MAPPED = f"""
fd = os.open({{!r}}, os.O_RDWR)
shared, private = mmap.mmap(fd, 2 * {HUGE}), mmap.mmap(fd, 2 * {HUGE}, mmap.MAP_PRIVATE); os.close(fd)
sum(private[at] for at in (0, {HUGE})); private[{HUGE} + 5:{HUGE} + 9] = b'mine'; shared[:4] = b'ours'
def seen():
    return bytes(shared[:4]), bytes(private[:4]), bytes(private[{HUGE} + 5:{HUGE} + 10])
"""


def test_transparent_huge_pages(mounts: Mounts, victim: Victim) -> None:
    """Of tmpfs with huge=always: mapped as one, and one of them written to in a private mapping."""
    for root in (mounts.old, mounts.new):
        done = subprocess.run(["mount", "-o", "remount,huge=always", str(root)], stderr=subprocess.DEVNULL)
        if done.returncode != 0:
            pytest.skip("this kernel has no huge pages of tmpfs")
    path = mounts.file("f", b"o" * 2 * HUGE, b"n" * 2 * HUGE)
    victim.run(MAPPED.format(path))
    mapped = [line.split()[1] for line in Path(f"/proc/{victim.pid}/smaps").read_text().splitlines() if "Pmd" in line]
    if not any(int(size) for size in mapped):
        pytest.skip("the kernel has no huge page to give just now")
    assert victim.run("seen()") == (b"ours", b"ours", b"mineo")
    report = mounts.switch()
    assert report.left == [] and mounts.users() == []
    assert report.moved == {"file": 2, "shared mapping": 1, "private mapping": 1}
    assert victim.run("seen()") == (b"nnnn", b"nnnn", b"mineo")


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Mounts]:
    """Two of them, and pages for them."""
    number = Path("/proc/sys/vm/nr_hugepages")
    before = number.read_text() if number.exists() else "none"
    with ExitStack() as stack:
        if number.exists():
            stack.callback(number.write_text, before)
            number.write_text(str(int(before) + 12))
        if not number.exists() or int(number.read_text()) < int(before) + 12:
            pytest.skip("this machine has no huge pages to spare")
        mounts = Mounts(tmp_path, "hugetlbfs", f"pagesize={HUGE}")
        stack.callback(mounts.close)
        yield mounts


def test_hugetlbfs(hugetlbfs: Mounts, victim: Victim) -> None:
    hugetlbfs.both(lambda root: (root / "f").touch())
    hugetlbfs.both(lambda root: os.truncate(root / "f", 2 * HUGE))
    victim.run(MAPPED.format(str(hugetlbfs.old / "f")))
    report = hugetlbfs.switch()
    assert report.left == [] and hugetlbfs.users() == []
    assert report.moved == {"file": 2, "shared mapping": 1, "private mapping": 1}
    assert victim.run("seen()") == (bytes(4), bytes(4), b"mine\0")
    assert victim.run("shared[:1] = b's'; private[:1] = b'p'; seen()")[:2] == (b"s" + bytes(3), b"p" + bytes(3))
