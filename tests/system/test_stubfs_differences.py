"""What docs/filesystem.md says is different from a native directory is so, and no more than it says.

Each is the kernel's doing. If one of these fails with a newer kernel, that is good news, and the page is to be changed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from stubfs_kit import Filesystem, as_user, mounted, outcome

from stubfs import syscalls

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
ALICE = 1500
FS_APPEND_FL, FS_IOC_SETFLAGS, FIBMAP, FICLONE = 0x20, 0x40086602, 1, 0x40049409  # linux/fs.h
RWF_NOAPPEND = 0x20  # linux/fs.h, from 6.9 on


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path, "proxy") as filesystem:
        (filesystem.path / "file").write_bytes(b"0123456789")
        yield filesystem


def as_alice(fs: Filesystem, action: Callable[[], Any]) -> Any:
    """In the top of the mount, to which she may not find the way."""

    def enter() -> Any:
        os.chdir(fs.path)
        return as_user(ALICE, ALICE, [], lambda: outcome(action))()

    return fs.run(enter).result()


def test_the_mode_of_a_fifo_does_not_count_but_that_of_its_directory(fs: Filesystem) -> None:
    for name in ("fifo", "closed/fifo"):
        (fs.path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(fs.path / name)
        (fs.path / name).chmod(0)
    (fs.path / "closed").chmod(0o700)
    assert as_alice(fs, lambda: os.close(os.open("fifo", os.O_RDONLY | os.O_NONBLOCK))) is None
    assert as_alice(fs, lambda: os.open("closed/fifo", os.O_RDONLY | os.O_NONBLOCK)) == "EACCES"


def test_dots_are_not_looked_up(fs: Filesystem) -> None:
    (fs.path / "closed").mkdir(0o600)
    assert as_alice(fs, lambda: os.stat("closed/..").st_nlink > 0)
    assert as_alice(fs, lambda: os.stat("closed/.").st_nlink > 0)
    assert as_alice(fs, lambda: os.stat("closed/./no")) == "EACCES"


def test_a_refused_name_is_forgotten_until_it_is_looked_up(fs: Filesystem) -> None:
    (fs.path / "closed" / "d").mkdir(parents=True)
    (fs.path / "closed").chmod(0o700)
    fd = os.open(fs.path / "closed" / "d", os.O_RDONLY)
    try:
        link = f"/proc/self/fd/{fd}"
        assert os.readlink(link) == str(fs.path / "closed" / "d")
        assert as_alice(fs, lambda: os.stat("closed/d")) == "EACCES"
        assert os.readlink(link) == str(fs.path / "closed" / "d") + " (deleted)"
        os.mkdir("still", dir_fd=fd)
        os.stat(fs.path / "closed" / "d")
        assert os.readlink(link) == str(fs.path / "closed" / "d") and os.listdir(fd) == ["still"]
    finally:
        os.close(fd)


def test_what_was_appended_behind_others_counts_from_where_the_kernel_was(fs: Filesystem) -> None:
    with open(fs.path / "file", "ab", buffering=0) as file:
        with open(fs.real / "file", "ab") as behind:
            behind.write(b"behind")
        file.write(b"own")
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 13
    assert (fs.real / "file").read_bytes() == b"0123456789behindown"


def test_appending_cannot_be_left_out_for_one_write(fs: Filesystem) -> None:
    with open(fs.path / "file", "ab", buffering=0) as file:
        done = outcome(lambda: os.pwritev(file.fileno(), [b"XY"], 2, RWF_NOAPPEND))
    assert (done, (fs.path / "file").read_bytes()) in ((2, b"0123456789XY"), ("EOPNOTSUPP", b"0123456789"))


def test_files_can_be_waited_for(fs: Filesystem) -> None:
    with open(fs.path / "file", "r+b") as file, open("/etc/passwd") as native, select.epoll() as epoll:
        epoll.register(file, select.EPOLLIN)
        assert [events for _, events in epoll.poll(5)] == [select.EPOLLIN]
        assert outcome(lambda: epoll.register(native, select.EPOLLIN)) == "EPERM"


def test_what_the_kernel_answers_itself(fs: Filesystem) -> None:
    with open(fs.path / "file", "r+b") as file, open(fs.path / "other", "w+b") as other:
        assert fcntl.ioctl(file, FIBMAP, struct.pack("i", 1)) == struct.pack("i", 0)
        assert outcome(lambda: fcntl.ioctl(other, FICLONE, file.fileno())) == "ENOTSUP"
        assert outcome(lambda: syscalls.fallocate(file.fileno(), 0x08, 0, 4096)) == "ENOTSUP"  # COLLAPSE_RANGE
        assert outcome(lambda: syscalls.fallocate(file.fileno(), 0x20, 0, 4096)) == "ENOTSUP"  # INSERT_RANGE


def test_what_a_file_is_marked_as_is_known_behind_alone(fs: Filesystem) -> None:
    with open(fs.path / "file", "r+b", buffering=0) as file:
        if outcome(lambda: fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("Q", FS_APPEND_FL))) == "ENOTSUP":
            pytest.skip("the file system of the temporary directory has no append-only files")
        try:
            assert outcome(lambda: os.open(fs.path / "file", os.O_RDWR)) == "EPERM"
            with mmap.mmap(file.fileno(), 10) as mapping:
                mapping[0:1] = b"X"
            assert os.pread(file.fileno(), 1, 0) == b"X"
            with open(fs.real / "file", "ab") as native:
                assert outcome(lambda: mmap.mmap(native.fileno(), 10)) == "EACCES"
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
            assert outcome(lambda: file.write(b"more")) == 4
        finally:
            fcntl.ioctl(file, FS_IOC_SETFLAGS, bytes(8))
