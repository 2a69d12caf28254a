"""No page of one mode is seen in the next, and none is written to the wrong side."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
from pathlib import Path
from typing import Iterator, Set

import pytest
from stubfs_kit import Filesystem, mounted, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
PAGES = 64
SIZE = PAGES * mmap.PAGESIZE


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path) as filesystem:
        (filesystem.path / "f").write_bytes(b"S" * SIZE)
        (filesystem.real / "f").write_bytes(b"R" * SIZE)
        yield filesystem


def first_bytes(mapping: mmap.mmap) -> bytes:
    return mapping[:: mmap.PAGESIZE]


def test_a_mapping_shows_the_real_contents(fs: Filesystem) -> None:
    with open(fs.path / "f", "r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapping:
        assert first_bytes(mapping) == b"S" * PAGES
        fs.client.mode("stub")
        reader = fs.run(lambda: first_bytes(mapping))
        wait_until(fs.client.held, 5)  # on nobody's behalf: a readahead
        assert not reader.finished()
        fs.proxy()
        assert reader.result() == b"R" * PAGES
        assert first_bytes(mapping) == b"R" * PAGES


def test_readers_at_full_speed_across_the_change(fs: Filesystem) -> None:
    """Between "stub is in force" and the end no staging byte is seen, by maps and by reads."""
    children = [fs.run(lambda kind=kind: watch(fs, kind)) for kind in ("map", "read", "map", "read")]
    wait_until(lambda: all((fs.base / f"running-{child.pid}").exists() for child in children), 10)
    fs.client.mode("stub")
    (fs.base / "in-force").touch()
    fs.proxy()
    (fs.base / "stop").touch()
    for child in children:
        early, late = child.result()
        assert early and set(early) <= {"S", "R"}
        assert set(late) <= {"R"}, "a staging byte after the change"


def watch(fs: Filesystem, kind: str) -> "tuple[str, str]":
    """(bytes seen before, bytes seen after) the file "in-force" was there, until "stop" is."""
    early: Set[int] = set()
    late: Set[int] = set()
    with open(fs.path / "f", "rb", buffering=0) as file:
        mapping = mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ)
        while True:
            stopping = (fs.base / "stop").exists()
            in_force = (fs.base / "in-force").exists()  # before the look
            data = first_bytes(mapping) if kind == "map" else os.pread(file.fileno(), SIZE, 0)
            (late if in_force else early).update(data)
            (fs.base / f"running-{os.getpid()}").touch()
            if stopping:
                break
        mapping.close()
    return "".join(map(chr, early)), "".join(map(chr, late))


def test_a_dirty_mapping_never_reaches_the_real_file(fs: Filesystem) -> None:
    with open(fs.path / "f", "r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapping:
        mapping[0 : 3 * mmap.PAGESIZE] = b"D" * (3 * mmap.PAGESIZE)
        fs.client.mode("stub")
        staging = fs.client.staging()
        try:
            fd = os.open("f", os.O_RDONLY, dir_fd=staging)
            assert os.pread(fd, 4, 0) == b"DDDD"  # written back to where it belongs
            os.close(fd)
        finally:
            os.close(staging)
        fs.proxy()
        assert first_bytes(mapping) == b"R" * PAGES
        mapping[5 * mmap.PAGESIZE] = ord("P")
        mapping.flush()
    real = (fs.real / "f").read_bytes()
    assert real.count(b"R") == SIZE - 1 and real[5 * mmap.PAGESIZE] == ord("P")


def write_for_ever(fs: Filesystem) -> None:
    with open(fs.path / "f", "r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapping:
        (fs.base / f"running-{os.getpid()}").touch()
        while not (fs.base / "in-force").exists():
            for page in range(0, SIZE, mmap.PAGESIZE):
                mapping[page] = ord("D")


def test_writers_at_full_speed_across_the_change(fs: Filesystem) -> None:
    """They write until stub mode is in force; a write that still waits then belongs to the real side: one page each."""
    writers = [fs.run(lambda: write_for_ever(fs)) for _ in range(3)]
    wait_until(lambda: all((fs.base / f"running-{writer.pid}").exists() for writer in writers), 10)
    fs.client.mode("stub")
    (fs.base / "in-force").touch()
    fs.proxy()
    for writer in writers:
        writer.result()
    real = (fs.real / "f").read_bytes()
    assert set(real) <= {ord("R"), ord("D")}, "a staging page reached the real file"
    for page in range(0, SIZE, mmap.PAGESIZE):
        assert real[page + 1 : page + mmap.PAGESIZE] == b"R" * (mmap.PAGESIZE - 1)


@pytest.mark.parametrize("before", ["restore", "proxy"])  # what was opened in proxy mode is written back by its close
def test_a_process_with_dirty_pages_dies_in_stub_mode(fs: Filesystem, before: str) -> None:
    if before == "proxy":
        fs.proxy()

    def dirty() -> None:
        with open(fs.path / "f", "r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapping:
            mapping[0:5] = b"dirty"
            (fs.base / "dirty").touch()
            mapping[3 * mmap.PAGESIZE]
            os.stat(fs.path / "f")
            while True:
                os.stat(fs.path / "f")

    process = fs.run(dirty)
    wait_until((fs.base / "dirty").exists, 10)
    fs.client.mode("stub")
    fs.wait_held()
    process.kill()
    process.wait(3)


def test_the_same_for_two_real_directories(fs: Filesystem, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "f").write_bytes(b"O" * SIZE)
    fs.proxy()
    with open(fs.path / "f", "r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapping:
        assert first_bytes(mapping) == b"R" * PAGES
        mapping[0] = ord("W")
        fs.proxy(other)
        assert first_bytes(mapping) == b"O" * PAGES
    assert (fs.real / "f").read_bytes()[:2] == b"WR" and (other / "f").read_bytes() == b"O" * SIZE


def test_what_was_appended_is_cached_where_it_went(fs: Filesystem) -> None:
    """The kernel believes that the file ends where it did when it was last asked for its size."""
    (fs.path / "log").write_bytes(b"")
    (fs.real / "log").write_bytes(b"R" * SIZE)
    with open(fs.path / "log", "r+b", buffering=0) as file:
        fd = file.fileno()
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        fs.client.mode("stub")
        writer = fs.run(lambda: os.write(fd, b"A" * SIZE))
        fs.wait_held()
        fs.proxy()
        assert writer.result() == SIZE
        # Within what the kernel takes for the file: it does not ask for the size then.
        wait_until(lambda: os.pread(fd, SIZE, 0) == b"R" * SIZE, 5)
        assert os.fstat(fd).st_size == 2 * SIZE
        with open(fs.real / "log", "ab") as behind:
            behind.write(b"O" * SIZE)
        assert os.write(fd, b"B" * SIZE) == SIZE
        wait_until(lambda: os.pread(fd, SIZE, 2 * SIZE) == b"O" * SIZE, 5)
        assert os.fstat(fd).st_size == 4 * SIZE
        with mmap.mmap(fd, 4 * SIZE, prot=mmap.PROT_READ) as mapping:
            assert first_bytes(mapping) == b"R" * PAGES + b"A" * PAGES + b"O" * PAGES + b"B" * PAGES


def test_names_and_attributes(fs: Filesystem) -> None:
    """Known, listed, looked up in vain, opened: after the change all of it is as on the real side."""
    for top, size in ((fs.path, 10), (fs.real, 20)):
        (top / "both").write_bytes(b"x" * size)
        (top / f"only-{size}").mkdir()
        (top / "kind").mkdir() if size == 10 else (top / "kind").write_text("a file")
        os.symlink(str(size), top / "link")
    (fs.real / "late").touch()
    directory = os.open(fs.path, os.O_RDONLY)
    file = open(fs.path / "both", "rb")
    place = os.open(fs.path / "only-10", os.O_PATH)
    os.chmod(fs.real / "both", 0o751)
    try:
        assert sorted(os.listdir(directory)) == ["both", "f", "kind", "link", "only-10"]
        assert os.fstat(file.fileno()).st_size == 10 and not (fs.path / "late").exists()
        assert (fs.path / "kind").is_dir() and os.readlink(fs.path / "link") == "10"
        fs.client.mode("stub")
        waiting = [
            fs.run(lambda: os.fstat(file.fileno()).st_size), fs.run(lambda: (fs.path / "late").exists()),
            fs.run(lambda: (fs.path / "kind").is_file()), fs.run(lambda: os.readlink(fs.path / "link")),
            fs.run(lambda: sorted(os.listdir(fs.path))), fs.run(lambda: sorted(os.listdir(directory))),
        ]  # fmt: skip
        fs.wait_held(6)
        fs.proxy()
        names = ["both", "f", "kind", "late", "link", "only-20"]
        os.lseek(directory, 0, os.SEEK_SET)
        assert [process.result() for process in waiting[:-1]] == [20, True, True, "20", names]
        # Its position was in a directory that is not there any more; from the beginning on it is the real one.
        assert set(waiting[-1].result()) <= set(names) and sorted(os.listdir(directory)) == names
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o751
        for gone in (lambda: os.stat(fs.path / "only-10"), lambda: os.stat("x", dir_fd=place)):
            with pytest.raises(OSError) as caught:
                gone()
            assert caught.value.errno in (errno.ENOENT, errno.ESTALE)
    finally:
        os.close(directory)
        os.close(place)
        file.close()


def test_a_program_runs_from_the_real_side(fs: Filesystem) -> None:
    """Executed before and after: the pages of the first are not those of the second."""
    for top, text in ((fs.path, "staging"), (fs.real, "real")):
        (top / "program").write_text(f"#!/bin/sh\necho {text}\n")
        (top / "program").chmod(0o755)
    assert subprocess.check_output([str(fs.path / "program")]) == b"staging\n"
    fs.client.mode("stub")
    process = fs.run(lambda: subprocess.check_output([str(fs.path / "program")]))
    fs.wait_held(1)
    fs.proxy()
    assert process.result() == b"real\n"


@pytest.mark.parametrize("modes", [("proxy",), ("stub", "proxy"), ("stub", "restore", "proxy")])
def test_dirty_pages_by_every_way_out_of_restore_mode(fs: Filesystem, modes: "tuple[str, ...]") -> None:
    """Written at full speed by maps and by writes until stub or proxy mode is in force; none comes to the real file."""
    mapped = [fs.run(lambda: write_for_ever(fs)) for _ in range(2)]
    wait_until(lambda: all((fs.base / f"running-{writer.pid}").exists() for writer in mapped), 10)
    other = fs.path / "written"
    other.write_bytes(b"")
    (fs.real / "written").write_bytes(b"R" * SIZE)
    with open(other, "r+b", buffering=0) as file:
        assert file.write(b"D" * SIZE) == SIZE
        for mode in modes:
            if mode == "stub":
                (fs.base / "in-force").touch()
                for writer in mapped:
                    writer.kill()
            fs.proxy() if mode == "proxy" else fs.client.mode(mode)
        (fs.base / "in-force").touch()
        for writer in mapped:
            writer.kill()
            writer.wait()
        assert os.pread(file.fileno(), SIZE, 0) == b"R" * SIZE
    assert (fs.real / "written").read_bytes() == b"R" * SIZE
    # What was written by a map after the change belongs to the real side, one byte per page.
    real = (fs.real / "f").read_bytes()
    for page in range(0, SIZE, mmap.PAGESIZE):
        assert real[page + 1 : page + mmap.PAGESIZE] == b"R" * (mmap.PAGESIZE - 1)
