"""One file, read and written in every way at random places, and compared with what it must hold, byte by byte.

In the manner of fsx, the file system exerciser. Longer, by hand: STUBFS_OPERATIONS=100000 python -m pytest …
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
from stubfs_kit import Filesystem, mounted

from stubfs import syscalls
from stubfs.client import FilesystemClient

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
OPERATIONS = int(os.environ.get("STUBFS_OPERATIONS", "1500"))
LARGEST = 300_000  # bytes
BLOCK = 4096
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # linux/falloc.h
_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL)


@pytest.fixture(params=["restore", "proxy"])
def fs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    with mounted(tmp_path, request.param) as filesystem:
        yield filesystem
        assert "ERROR" not in filesystem.log.read_text()


class Exerciser:
    """Owns three descriptors and a mapping of the file, and knows what must be in it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.source = random.Random(seed)
        self.expected = bytearray()
        self.history: List[str] = []
        self.open()

    def open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT
        self.fd, self.other = (os.open(self.path, flags, 0o600) for _ in range(2))
        self.direct = os.open(self.path, flags | os.O_DIRECT)
        self.area = mmap.mmap(self.fd, len(self.expected)) if self.expected else None
        self.aligned = mmap.mmap(-1, LARGEST + BLOCK)

    def close(self) -> None:
        if self.area is not None:
            self.area.close()
        for fd in (self.fd, self.other, self.direct):
            os.close(fd)

    def place(self) -> Tuple[int, int]:
        start = self.source.choice([0, BLOCK, self.source.randrange(LARGEST), self.source.randrange(LARGEST)])
        return start, min(self.source.choice([1, 100, BLOCK, self.source.randrange(1, 70_000)]), LARGEST - start)

    def inside(self) -> Tuple[int, int]:
        start, length = self.place()
        start %= max(1, len(self.expected))
        return start, min(length, len(self.expected) - start)

    def put(self, start: int, data: bytes) -> None:
        self.expected.extend(bytes(max(0, start - len(self.expected))))
        self.expected[start : start + len(data)] = data

    def compare(self, start: int, found: bytes, length: int) -> None:
        wanted = bytes(self.expected[start : start + length])
        if found != wanted:
            first = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
            raise AssertionError(
                f"{len(found)} bytes at {start}, {len(wanted)} expected, the first difference at {start + first}; "
                f"after {self.history[-12:]}"
            )

    # --- the operations

    def read(self) -> None:
        start, length = self.place()
        self.compare(start, os.pread(self.source.choice([self.fd, self.other]), length, start), length)

    def write(self) -> None:
        start, length = self.place()
        data = self.source.randbytes(length)
        assert os.pwrite(self.source.choice([self.fd, self.other]), data, start) == length
        self.put(start, data)

    def read_direct(self) -> None:
        start, length = (number // BLOCK * BLOCK for number in self.place())
        if length:
            found = os.preadv(self.direct, [memoryview(self.aligned)[:length]], start)
            self.compare(start, self.aligned[:found], length)

    def write_direct(self) -> None:
        start, length = (number // BLOCK * BLOCK for number in self.place())
        data = self.source.randbytes(length)
        self.aligned[:length] = data
        if length:
            assert os.pwritev(self.direct, [memoryview(self.aligned)[:length]], start) == length
            self.put(start, data)

    def truncate(self) -> None:
        size, _ = self.place()
        os.ftruncate(self.fd, size) if self.source.random() < 0.5 else os.truncate(self.path, size)
        self.expected.extend(bytes(max(0, size - len(self.expected))))
        del self.expected[size:]

    def append(self) -> None:
        data = self.source.randbytes(min(self.place()[1], LARGEST - len(self.expected)))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)
        self.expected.extend(data)

    def allocate(self) -> None:
        start, length = self.place()
        mode = self.source.choice([0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
        try:
            syscalls.fallocate(self.fd, mode, start, length)
        except OSError as error:
            if error.errno in _UNKNOWN and mode & ZERO_RANGE:
                return  # tmpfs knows none
            raise
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            end = min(start + length, len(self.expected))
            self.expected[start:end] = bytes(max(0, end - start))
        if not mode & KEEP_SIZE:
            self.expected.extend(bytes(max(0, start + length - len(self.expected))))

    def copy(self) -> None:
        start, length = self.inside()
        to = self.place()[0]
        length = min(length, LARGEST - to)
        if length and (to + length <= start or start + length <= to):
            copied = os.copy_file_range(self.fd, self.other, length, start, to)
            self.put(to, bytes(self.expected[start : start + copied]))

    def mapped(self) -> Tuple[int, int]:
        """What is both in the mapping, which stays as it is, and in the file."""
        start, length = self.inside()
        return start, max(0, min(length, len(self.area or b"") - start))

    def read_mapped(self) -> None:
        start, length = self.mapped()
        if self.area is not None and length:
            self.compare(start, self.area[start : start + length], length)

    def write_mapped(self) -> None:
        start, length = self.mapped()
        data = self.source.randbytes(length)
        if self.area is not None and length:
            self.area[start : start + length] = data
            self.put(start, data)
            if self.source.random() < 0.3:
                self.area.flush()

    def synchronize(self) -> None:
        os.fsync(self.fd) if self.source.random() < 0.5 else os.fdatasync(self.other)

    def reopen(self) -> None:
        self.close()
        self.open()

    def size(self) -> None:
        for status in (os.fstat(self.other), os.stat(self.path)):
            assert status.st_size == len(self.expected), self.history[-12:]

    def holes(self) -> None:
        """What SEEK_DATA leaves out reads as zeros."""
        start, _ = self.inside()
        if not self.expected:
            return
        try:
            first = os.lseek(self.fd, start, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            first = len(self.expected)
        assert not any(self.expected[start:first]), self.history[-12:]

    def run(self, count: int) -> bytes:
        operations: Dict[str, Callable[[], None]] = {
            name: getattr(self, name)
            for name in (
                "read", "write", "read_direct", "write_direct", "truncate", "append", "allocate", "copy", "read_mapped",
                "write_mapped", "synchronize", "reopen", "size", "holes",
            )
        }  # fmt: skip
        weights = [8, 8, 3, 3, 3, 2, 4, 3, 8, 8, 1, 1, 2, 2]
        for name in self.source.choices(list(operations), weights, k=count):
            self.history.append(f"{name}@{len(self.expected)}")
            operations[name]()
        self.close()
        return bytes(self.expected)


def test_what_is_stored_through_a_mapping_is_no_hole(fs: Filesystem) -> None:
    """Before anybody has synchronized it: cp(1) would leave it out."""

    def work() -> Tuple[int, int]:
        fd = os.open(fs.path / "file", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, 100 * BLOCK)
        with mmap.mmap(fd, 100 * BLOCK) as area:
            area[50 * BLOCK] = 1
            reading = os.open(fs.path / "file", os.O_RDONLY)
            return os.lseek(reading, 0, os.SEEK_DATA), os.lseek(reading, 0, os.SEEK_HOLE)

    data, hole = fs.run(work).result()
    assert 0 < data <= 50 * BLOCK and hole == 0


@pytest.mark.timeout(60 + OPERATIONS // 50)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_file_holds_what_was_written(fs: Filesystem, seed: int) -> None:
    process = fs.run(lambda: Exerciser(fs.path / "file", seed).run(OPERATIONS))
    expected = process.result(30 + OPERATIONS / 50)
    assert (fs.path / "file").read_bytes() == expected
    if fs.client.status().mode == "proxy":
        assert (fs.real / "file").read_bytes() == expected


@pytest.mark.timeout(60 + OPERATIONS // 50)
def test_whatever_mode_is_changed_to_meanwhile(tmp_path: Path) -> None:
    with mounted(tmp_path, "proxy") as fs:
        ended = threading.Event()
        changes = 0

        def change() -> None:
            nonlocal changes
            with FilesystemClient(fs.socket_path, 20) as client:
                while not ended.wait(0.01):
                    client.mode("stub")
                    fd = os.open(fs.real, os.O_PATH | os.O_DIRECTORY)
                    try:
                        client.mode("proxy", fd)
                    finally:
                        os.close(fd)
                    changes += 1

        process = fs.run(lambda: Exerciser(fs.path / "file", 3).run(OPERATIONS))
        thread = threading.Thread(target=change)
        thread.start()
        try:
            expected = process.result(30 + OPERATIONS / 50)
        finally:
            ended.set()
            thread.join()
        assert changes > 10
        assert (fs.path / "file").read_bytes() == (fs.real / "file").read_bytes() == expected
