"""The page map by its ioctl and by its entries: the same."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile

import pytest

from spfs.linux.pagemap import PageMap, Runs

PAGE = mmap.PAGESIZE
PAGES = 4500


@pytest.mark.parametrize("by_entry", [False, True])
def test_pages_of_a_private_mapping(by_entry: bool) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(PAGES * PAGE))
        file.flush()
        memory = mmap.mmap(file.fileno(), PAGES * PAGE, flags=mmap.MAP_PRIVATE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        written = {1, 2, PAGES - 1, *range(10, 20), *range(100, 3400, 2)}
        assert memory[50 * PAGE] == 0 and memory[:PAGE] == bytes(PAGE)  # there, but the file's
        for page in written:
            memory[page * PAGE] = 1
        with PageMap(os.getpid(), by_entry) as page_map:
            own, guards = map(list, page_map.pages(start, start + PAGES * PAGE))
            assert [*map(len, page_map.pages(start + 30 * PAGE, start + 40 * PAGE))] == [0, 0]
        pages = [(address - start) // PAGE for run in own for address in range(run.start, run.end, PAGE)]
        assert pages == sorted(written)
        assert all(first.end < second.start for first, second in zip(own, own[1:])) and guards == []


@pytest.mark.parametrize("by_entry", [False, True])
def test_guards(by_entry: bool) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[0] = memory[6 * PAGE] = 1
    if madvise(start + 2 * PAGE, 3 * PAGE, 102) != 0:
        pytest.skip("this kernel has no MADV_GUARD_INSTALL (Linux 6.13)")
    with PageMap(os.getpid(), by_entry) as page_map:
        own, guards = map(list, page_map.pages(start, start + 8 * PAGE))
    assert guards == [(start + 2 * PAGE, start + 5 * PAGE)]
    assert own == [(start, start + PAGE), (start + 6 * PAGE, start + 7 * PAGE)]


def test_parts_of_runs() -> None:
    runs = Runs([0, 20, 40, 60], [10, 30, 50, 90])
    taken, following = runs.part(0, 2, 100)
    assert (list(taken), following) == ([(0, 10), (20, 30)], 2)
    taken, following = runs.part(2, 9, 10)  # as much as fits, up to the end of one
    assert (list(taken), following) == ([(40, 50)], 3)
    taken, following = runs.part(3, 9, 12)  # one that is cut in two
    assert (list(taken), following, list(runs)[3]) == ([(60, 72)], 3, (72, 90))
    taken, following = runs.part(3, 9, 18)
    assert (list(taken), following) == ([(72, 90)], 4)
    joined = Runs()
    for start, end in ((0, 2), (2, 4), (6, 8)):
        joined.append(start, end)
    assert list(joined) == [(0, 4), (6, 8)] and list(joined.lengths()) == [4, 2]


def test_a_process_that_has_ended() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(ProcessLookupError), PageMap(pid) as page_map:
            page_map.pages(0, 1 << 20)
    finally:
        os.waitpid(pid, 0)
