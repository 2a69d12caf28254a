"""Inodes on a real mount: hard links are one file, numbers stay, files without a name are files."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import Iterator

import pytest
from stubfs_kit import Filesystem, mounted

from spfs.restore import FileSpec, create_files

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture(params=["restore", "proxy"])
def fs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    with mounted(tmp_path, request.param) as filesystem:
        yield filesystem


def link_open_file(fd: int, path: Path) -> None:
    # With a directory fd, even an unused one, Python uses linkat(2), which alone can follow the link.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def test_a_hard_link_is_one_file(fs: Filesystem) -> None:
    (fs.path / "a").write_bytes(b"x" * 4096)
    os.link(fs.path / "a", fs.path / "b")
    first, second = os.stat(fs.path / "a"), os.stat(fs.path / "b")
    assert os.path.samestat(first, second) and first.st_nlink == 2
    with open(fs.path / "a", "r+b") as one, open(fs.path / "b", "r+b") as other:
        with mmap.mmap(one.fileno(), 4096) as written, mmap.mmap(other.fileno(), 4096) as read:
            written[:5] = b"hello"
            assert read[:5] == b"hello"
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(fs.path / "a", fs.path / "b")  # rename(2): nothing happens
    assert sorted(os.listdir(fs.path)) == ["a", "b"]
    with open(fs.path / "b", "rb") as other:
        os.unlink(fs.path / "a")
        os.unlink(fs.path / "b")
        assert os.fstat(other.fileno()).st_nlink == 0 and other.read(5) == b"hello"
    assert os.listdir(fs.path) == []


def test_a_hard_link_that_was_made_behind_it(tmp_path: Path) -> None:
    with mounted(tmp_path, "proxy") as fs:
        (fs.real / "a").write_text("a")
        (fs.real / "d").mkdir()
        os.link(fs.real / "a", fs.real / "d" / "b")
        assert os.stat(fs.path / "d" / "b").st_ino == os.stat(fs.path / "a").st_ino == os.stat(fs.real / "a").st_ino
        # The name that was looked up last goes away behind it: the other one serves.
        os.stat(fs.path / "a")
        with open(fs.path / "a") as file:
            os.unlink(fs.real / "a")
            os.chmod(file.fileno(), 0o600)
            assert (fs.real / "d" / "b").stat().st_mode & 0o777 == 0o600
            assert os.stat(fs.path / "d" / "b").st_nlink == 1


def test_a_file_that_was_replaced_behind_it_is_another_one(tmp_path: Path) -> None:
    with mounted(tmp_path, "proxy") as fs:
        (fs.real / "a").write_text("old")
        with open(fs.path / "a") as old:
            (fs.real / "new").write_text("new")
            os.rename(fs.real / "new", fs.real / "a")
            assert (fs.path / "a").read_text() == "new"
            assert os.stat(fs.path / "a").st_ino != os.fstat(old.fileno()).st_ino
            assert old.read() == "old" and os.fstat(old.fileno()).st_nlink == 0


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_has_taken_a_files_place_is_left_alone(tmp_path: Path, kind: str) -> None:
    """Who holds on to a file by its name alone does nothing to another one that somebody has put there."""
    with mounted(tmp_path, "proxy") as fs:
        (fs.real / "f").write_text("one")
        fd = os.open(fs.path / "f", os.O_PATH)
        try:
            other = fs.real / "other"  # made before the first one goes: with a number of its own
            other.write_text("other") if kind == "file" else other.mkdir()
            other.chmod(0o640)
            os.unlink(fs.real / "f")
            os.rename(other, fs.real / "f")
            link = f"/proc/self/fd/{fd}"
            for action in (
                lambda: os.chmod(link, 0o777), lambda: os.open(link, os.O_RDONLY), lambda: os.truncate(link, 0),
                lambda: os.setxattr(link, "trusted.x", b""), lambda: os.listxattr(link),
                lambda: os.chown(link, 1, 1), lambda: os.utime(link, (1, 1)),
            ):  # fmt: skip
                with pytest.raises(OSError) as caught:
                    action()
                assert caught.value.errno == errno.ESTALE
            found = os.stat(fs.real / "f")
            assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_mtime > 1) == (0o640, 0, True)
            assert os.listxattr(fs.real / "f") == [] and os.path.isdir(fs.path / "f") == (kind == "directory")
            assert os.stat(fs.path / "f").st_ino == found.st_ino
        finally:
            os.close(fd)


def test_directory_entries_have_the_inode_numbers_of_stat(fs: Filesystem) -> None:
    for number in range(50):
        (fs.path / str(number)).write_text("")
    os.link(fs.path / "0", fs.path / "link")
    (fs.path / "d").mkdir()
    with os.scandir(fs.path) as entries:
        listed = {entry.name: entry.inode() for entry in entries}
    assert listed == {name: os.lstat(fs.path / name).st_ino for name in os.listdir(fs.path)}


def test_numbers_stay_from_restore_to_proxy(tmp_path: Path) -> None:
    with mounted(tmp_path) as fs:
        for top in (fs.path, fs.real):
            (top / "a").write_text(str(top))
            (top / "b").write_text("")
        with open(fs.path / "a") as file:
            number = os.fstat(file.fileno()).st_ino
            fs.proxy()
            assert os.fstat(file.fileno()).st_ino == os.stat(fs.path / "a").st_ino == number
            assert file.read() == str(fs.real)
        (fs.real / "c").write_text("")
        numbers = {os.stat(fs.path / name).st_ino for name in "abc"}
        assert len(numbers) == 3


def test_two_links_that_are_two_files_on_the_real_side(tmp_path: Path) -> None:
    with mounted(tmp_path) as fs:
        (fs.path / "a").write_text("")
        os.link(fs.path / "a", fs.path / "b")
        for name in "ab":
            (fs.real / name).write_text(name)
        fs.proxy()
        assert [(fs.path / name).read_text() for name in "abba"] == ["a", "b", "b", "a"]
        assert not os.path.samefile(fs.path / "a", fs.path / "b")


def test_a_file_without_a_name(fs: Filesystem) -> None:
    fd = os.open(fs.path, os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        os.write(fd, b"text")
        os.fchmod(fd, 0o600)
        status = os.fstat(fd)
        assert (status.st_nlink, status.st_mode & 0o777, status.st_size) == (0, 0o600, 4)
        assert os.listdir(fs.path) == []
        link_open_file(fd, fs.path / "named")
        assert os.stat(fs.path / "named").st_ino == status.st_ino and (fs.path / "named").read_text() == "text"
        assert os.fstat(fd).st_nlink == 1
    finally:
        os.close(fd)
    fd = os.open(fs.path, os.O_TMPFILE | os.O_WRONLY | os.O_EXCL, 0o600)
    try:
        with pytest.raises(OSError) as caught:  # O_EXCL: never to be linked
            link_open_file(fd, fs.path / "never")
        assert caught.value.errno == errno.ENOENT
    finally:
        os.close(fd)


def test_an_unlinked_file_is_not_linked_again(fs: Filesystem) -> None:
    with open(fs.path / "a", "w") as file:
        os.unlink(fs.path / "a")
        with pytest.raises(FileNotFoundError):
            link_open_file(file.fileno(), fs.path / "b")


def test_a_name_that_is_reused_while_the_former_file_is_open(fs: Filesystem) -> None:
    with open(fs.path / "a", "w+") as former:
        former.write("former")
        former.flush()
        os.unlink(fs.path / "a")
        (fs.path / "a").write_text("new")
        os.fchmod(former.fileno(), 0o600)
        os.ftruncate(former.fileno(), 3)
        former.seek(0)
        assert former.read() == "for" and (fs.path / "a").read_text() == "new"
        assert os.fstat(former.fileno()).st_ino != os.stat(fs.path / "a").st_ino


def test_a_link_remap_keeps_its_name_for_who_has_it_open(tmp_path: Path) -> None:
    """What a restorer does with one: link, open, remove both names; the real side has it only by the second one."""
    with mounted(tmp_path) as filesystem:
        staging = filesystem.client.staging()
        try:
            create_files(staging, [FileSpec("d/link_remap.7", stat.S_IFREG | 0o644, 4, link_remap=True)])
        finally:
            os.close(staging)
        remap, name = filesystem.path / "d/link_remap.7", filesystem.path / "name"
        os.link(remap, name)
        fd = os.open(name, os.O_RDWR)
        try:
            name.unlink()
            assert not name.exists()
            remap.unlink()
            (filesystem.real / "d").mkdir()
            (filesystem.real / "d/link_remap.7").write_bytes(b"real")
            filesystem.proxy()
            assert os.pread(fd, 10, 0) == b"real"
            remap.unlink()  # there it can be removed
            assert not (filesystem.real / "d/link_remap.7").exists()
        finally:
            os.close(fd)
