"""Processes that stub mode does not hold: they are served as before, whoever else waits, and spoil nothing for them."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from stubfs_kit import Filesystem, Process, mounted, wait_until

from stubfs.errors import StubfsError

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
LIMIT = 10.0
PAGES = 8
SIZE = PAGES * mmap.PAGESIZE


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path) as filesystem:
        for top, byte in ((filesystem.path, b"S"), (filesystem.real, b"R")):
            (top / "d").mkdir()
            for name in ("f", "g", "d/f"):
                (top / name).write_bytes(byte * SIZE)
        yield filesystem


def on_command(fs: Filesystem, action: Callable[[], object]) -> Process:
    """A process that begins when the file ``go`` is there, and gives what ``action`` does."""
    return fs.run(lambda: (wait_until((fs.base / "go").exists, LIMIT), action())[1])


def go(fs: Filesystem) -> None:
    (fs.base / "go").touch()


def clean_up(fs: Filesystem) -> List[str]:
    """All that a restorer may still have to do."""
    top = fs.path
    (top / "new").write_bytes(b"new")
    assert (top / "new").read_bytes() == b"new"
    (top / "d/sub").mkdir()
    os.rename(top / "new", top / "d/sub/moved")
    os.symlink("f", top / "link")
    os.chmod(top / "d/f", 0o600)
    os.unlink(top / "g")
    with open(top / "d/f", "r+b") as file:
        assert file.read() == b"S" * SIZE
        file.truncate(5)
        os.fsync(file.fileno())
    found = sorted(os.listdir(top))
    os.unlink(top / "d/sub/moved")
    os.rmdir(top / "d/sub")
    return found


def test_served_as_before_while_all_others_wait(fs: Filesystem) -> None:
    files = [open(fs.path / "f", "rb") for _ in range(40)]  # before: their reads alone wait
    exempt = on_command(fs, lambda: clean_up(fs))
    fs.client.mode("stub", exempt=[exempt.pid])
    waiting = [fs.run(file.read) for file in files]
    waiting += [fs.run((fs.path / "f").stat) for _ in range(20)]
    waiting += [fs.run((fs.path / "d/f").read_bytes) for _ in range(20)]
    fs.client.wait_held(len(waiting) - len(files) + 1, LIMIT)
    go(fs)
    assert exempt.result() == ["d", "f", "link"]
    assert not any(process.finished() for process in waiting)
    assert exempt.pid not in {item.pid for item in fs.client.held()}
    fs.proxy()
    results = [process.result() for process in waiting]
    assert results[: len(files)] == [b"R" * SIZE] * len(files) and results[-1] == b"R" * SIZE
    for file in files:
        file.close()
    assert (fs.real / "g").exists() and (fs.real / "d/f").stat().st_size == SIZE, "it was the staging directory"


def test_all_of_its_threads(fs: Filesystem) -> None:
    fs.client.mode("stub", exempt=[os.getpid()])
    found: List[bytes] = []
    threads = [threading.Thread(target=lambda: found.append((fs.path / "f").read_bytes())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert found == [b"S" * SIZE] * 5
    child = fs.run((fs.path / "f").read_bytes)  # another process
    fs.client.wait_held(1, LIMIT)
    fs.proxy()
    assert child.result() == b"R" * SIZE


def test_changed_while_they_wait(fs: Filesystem) -> None:
    fs.client.mode("stub")
    since = fs.client.status().since
    process, other = fs.run((fs.path / "f").read_bytes), fs.run((fs.path / "f").read_bytes)
    fs.client.wait_held(2, LIMIT)
    fs.client.mode("stub", exempt=[process.pid])
    assert process.result() == b"S" * SIZE and not other.finished()
    assert fs.client.status().since == since
    fs.client.mode("stub")
    assert not other.finished(0.1)
    fs.proxy()
    assert other.result() == b"R" * SIZE


def test_of_the_directory_that_was_in_force(fs: Filesystem) -> None:
    fs.proxy()
    fs.client.mode("stub", exempt=[os.getpid()])
    assert (fs.path / "f").read_bytes() == b"R" * SIZE


def test_nobody_else_finds_what_it_reads_in_the_page_cache(fs: Filesystem) -> None:
    file = open(fs.path / "f", "rb", buffering=0)
    fs.client.mode("stub", exempt=[os.getpid()])
    assert (fs.path / "f").read_bytes() == b"S" * SIZE
    reader = fs.run(lambda: file.read(SIZE))
    fs.client.wait_held(1, LIMIT, operations=["read"])
    assert not reader.finished(0.1)
    fs.proxy()
    assert reader.result() == b"R" * SIZE
    file.close()


def test_what_it_has_read_by_an_old_descriptor_is_not_seen_afterwards(fs: Filesystem) -> None:
    with open(fs.path / "f", "r+b", buffering=0) as file, mmap.mmap(file.fileno(), SIZE) as mapping:
        fs.client.mode("stub", exempt=[os.getpid()])
        assert mapping[0] == ord("S") and file.read(SIZE) == b"S" * SIZE
        mapping[1] = ord("D")
        fs.proxy()
        assert mapping[:: mmap.PAGESIZE] == b"R" * PAGES
        file.seek(0)
        assert file.read(SIZE) == b"R" * SIZE
    assert (fs.real / "f").read_bytes() == b"R" * SIZE


@pytest.mark.parametrize("look", ["stat", "open", "write"])
def test_who_waited_meanwhile_goes_by_the_real_size(fs: Filesystem, look: str) -> None:
    """The kernel dismisses attributes that it asked for before it was told others: those of the exempt one."""
    names = [f"empty{i}" for i in range(5)]
    for name in names:
        (fs.path / name).write_bytes(b"")
        (fs.real / name).write_bytes(b"the real one")
    old = [os.open(fs.path / name, os.O_RDWR) for name in names]

    def waiting(name: str, action: Callable[[int], object]) -> Process:
        fd = os.open(fs.path / name, os.O_RDONLY)
        try:
            return on_command(fs, lambda: action(fd))
        finally:
            os.close(fd)

    processes = [waiting(name, lambda fd: os.read(fd, 100)) for name in names]
    if look != "write":  # who would wait behind it, for the file's lock
        processes.append(waiting(names[0], lambda fd: os.lseek(fd, 0, os.SEEK_END)))
    fs.client.mode("stub", exempt=[os.getpid()])
    go(fs)
    fs.client.wait_held(len(processes), LIMIT, operations=["getattr"])
    for name, fd in zip(names, old):
        if look == "stat":
            assert (fs.path / name).stat().st_size == 0
        elif look == "open":
            assert (fs.path / name).read_bytes() == b""
        else:
            os.pwrite(fd, b"S", 0)
    fs.proxy()
    results = [process.result() for process in processes]
    assert results[: len(names)] == [b"the real one"] * len(names) and set(results[len(names) :]) <= {12}
    for fd in old:
        os.close(fd)


def test_exempt_no_more_before_the_end_of_stub_mode(fs: Filesystem) -> None:
    """What it left in the page cache does not outlive the mode either, though nobody was exempt at its end."""
    with open(fs.path / "f", "rb", buffering=0) as file:
        fs.client.mode("stub", exempt=[os.getpid()])
        assert file.read(SIZE) == b"S" * SIZE
        fs.client.mode("stub")
        fs.proxy()
        file.seek(0)
        assert file.read(SIZE) == b"R" * SIZE


def test_a_process_that_is_not_there(fs: Filesystem) -> None:
    gone = fs.run(lambda: None)
    gone.wait()
    with pytest.raises(StubfsError) as caught:
        fs.client.mode("stub", exempt=[gone.pid])
    assert caught.value.errno == errno.ESRCH and fs.client.status().mode == "restore"


def test_readers_wait_for_their_own_pages_alone(fs: Filesystem) -> None:
    """More readaheads than the kernel's usual limit for what is under way in the background."""
    count = 100
    for i in range(count):
        (fs.path / f"n{i}").write_bytes(b"S" * (1 << 20))
        (fs.real / f"n{i}").write_bytes(b"R" * (1 << 20))
    files = [open(fs.path / f"n{i}", "rb", buffering=0) for i in range(count)]
    fs.client.mode("stub", exempt=[os.getpid()])
    processes = [fs.run(lambda file=file: len(file.read(1 << 20))) for file in files]
    fs.client.wait_held(count, LIMIT, operations=["read"])
    assert (fs.path / "f").read_bytes() == b"S" * SIZE
    fs.proxy()
    assert [process.result() for process in processes] == [1 << 20] * count
    for file in files:
        file.close()
