"""Files created beneath a directory for a restore, whatever their kind; and what of it is refused."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Iterator, Optional

import pytest

from spfs.errors import SpfsError, UsageError
from spfs.restore import FileSpec, create_file, create_files, set_env


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "root").mkdir()
    fd = os.open(tmp_path / "root", os.O_RDONLY | os.O_DIRECTORY)
    before = set(os.listdir("/proc/self/fd"))
    yield fd
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(fd)


@pytest.mark.parametrize("umask", [0o022, 0o777])
@pytest.mark.parametrize(
    "mode, kind, permissions",
    [
        (stat.S_IFREG | 0o640, stat.S_ISREG, 0o640),
        (stat.S_IFREG, stat.S_ISREG, 0o777),
        (stat.S_IFREG | 0o4755, stat.S_ISREG, 0o4755),
        (stat.S_IFDIR | 0o1777, stat.S_ISDIR, 0o1777),
        (stat.S_IFIFO | 0o600, stat.S_ISFIFO, 0o600),
        (stat.S_IFSOCK | 0o700, stat.S_ISSOCK, 0o700),
    ],
)
def test_each_kind_with_its_permissions(root: int, mode: int, kind: object, permissions: int, umask: int) -> None:
    old = os.umask(umask)
    try:
        create_file(root, "deep/down/it", mode)
    finally:
        os.umask(old)
    status = os.stat("deep/down/it", dir_fd=root)
    assert callable(kind) and kind(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == permissions
    assert stat.S_IMODE(os.stat("deep/down", dir_fd=root).st_mode) == 0o777


def test_sizes_are_holes(root: int) -> None:
    create_file(root, "file", stat.S_IFREG | 0o600, 1 << 34)
    status = os.stat("file", dir_fd=root)
    assert (status.st_size, status.st_blocks) == (1 << 34, 0)


def test_symbolic_links_are_made_not_followed(root: int) -> None:
    create_file(root, "link", stat.S_IFLNK | 0o777, target="/etc/passwd")
    create_file(root, "link", stat.S_IFREG | 0o600, 1)
    assert os.readlink("link", dir_fd=root) == "/etc/passwd"


def test_what_exists_is_fine_and_stays(root: int) -> None:
    create_file(root, "file", stat.S_IFREG | 0o600, 5)
    create_file(root, "file", stat.S_IFREG | 0o644, 9)
    create_file(root, "file", stat.S_IFDIR)
    create_file(root, "/", stat.S_IFDIR)
    status = os.stat("file", dir_fd=root)
    assert (status.st_size, stat.S_IMODE(status.st_mode)) == (5, 0o600)


def test_slashes_and_dots_mean_nothing(root: int) -> None:
    create_file(root, "//a/./b//c", stat.S_IFREG | 0o600)
    assert os.stat("a/b/c", dir_fd=root)


def test_names_are_bytes(root: int) -> None:
    create_file(root, "d\udcff/f\udc80", stat.S_IFREG | 0o600)
    assert os.stat(b"d\xff/f\x80", dir_fd=root)


@pytest.mark.parametrize(
    "spec, number, words",
    [
        (FileSpec("x", None), errno.EINVAL, "it has no mode"),
        (FileSpec("x", 0o644), errno.EINVAL, "unknown type in mode 0o644"),
        (FileSpec("x", 0o170644), errno.EINVAL, "unknown type"),
        (FileSpec("x", 1 << 20 | stat.S_IFREG), errno.EINVAL, "is no st_mode"),
        (FileSpec("x", stat.S_IFBLK | 0o600), errno.EINVAL, "a device number is for devices, and they need one"),
        (FileSpec("x", stat.S_IFREG | 0o600, device=5), errno.EINVAL, "a device number is for devices"),
        (FileSpec("x", stat.S_IFCHR | 0o600, device=1 << 32), errno.EINVAL, "no device number"),
        (FileSpec("x", stat.S_IFIFO | 0o600, 1), errno.ENOTSUP, "a fifo with a size"),
        (FileSpec("x", stat.S_IFREG, -1), errno.EINVAL, "negative size"),
        (FileSpec("x", stat.S_IFLNK), errno.EINVAL, "target"),
        (FileSpec("x", stat.S_IFREG, target="y"), errno.EINVAL, "target"),
        (FileSpec("../x", stat.S_IFREG), errno.EXDEV, "leads out of the directory"),
        (FileSpec("", stat.S_IFREG), errno.EINVAL, "root directory itself"),
        (FileSpec("a\0b", stat.S_IFREG), errno.EINVAL, "NUL"),
        (FileSpec("y" * 300, stat.S_IFREG), errno.ENAMETOOLONG, "File name too long"),
    ],
)
def test_what_cannot_be_made_is_refused(root: int, spec: FileSpec, number: int, words: str) -> None:
    with pytest.raises(SpfsError, match=words) as caught:
        create_files(root, [spec])
    assert caught.value.errno == number and "cannot create" in str(caught.value)


def test_nothing_is_made_if_one_is_bad(root: int) -> None:
    with pytest.raises(SpfsError):
        create_files(root, [FileSpec("good", stat.S_IFREG), FileSpec("bad", stat.S_IFCHR)])
    assert os.listdir(root) == []


@pytest.mark.parametrize("target", ["/tmp", "..", "../outside"])
def test_no_symbolic_link_leads_out(root: int, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").mkdir()
    os.symlink(target, "link", dir_fd=root)
    with pytest.raises(SpfsError, match="symbolic link in the path") as caught:
        create_file(root, "link/x/y", stat.S_IFREG)
    assert caught.value.errno == errno.ELOOP
    assert os.listdir(tmp_path / "outside") == []


def test_a_file_in_the_way_of_a_parent(root: int) -> None:
    create_file(root, "file", stat.S_IFREG | 0o600)
    with pytest.raises(SpfsError, match="a parent of it is no directory") as caught:
        create_file(root, "file/below", stat.S_IFREG)
    assert caught.value.errno == errno.ENOTDIR


def test_more_directories_than_are_kept_open(root: int) -> None:
    create_files(root, [FileSpec(f"d{number % 200}/e/f{number}", stat.S_IFREG | 0o600) for number in range(600)])
    assert len(os.listdir(root)) == 200


@pytest.mark.parametrize(
    "record, words",
    [
        ({}, "key path is missing"),
        ({"path": "x", "uid": 1}, "unknown key 'uid'"),
        ({"path": 3}, "key path: 3 is no str"),
        ({"path": "x", "mode": "0644"}, "is no int"),
        ({"path": "x", "mode": True}, "is no int"),
    ],
)
def test_records_of_something_else(record: "dict[str, object]", words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FileSpec.from_json(record)


@pytest.mark.parametrize("mode, expected", [(None, "stub"), ("proxy", "proxy")])
def test_the_environment_of_action_scripts(mode: Optional[str], expected: str) -> None:
    environment: "dict[str, str]" = {}
    set_env("/run/sock", *([mode] if mode else []), environment=environment)
    assert environment == {"SPFS_MODE": expected, "SPFS_MANAGER_SOCK": "/run/sock"}


@pytest.mark.parametrize("path, mode, maker", [
    ("fifo", stat.S_IFIFO | 0o666, "mknod"), ("directory", stat.S_IFDIR | 0o777, "mkdir"),
    ("parent/file", stat.S_IFREG | 0o666, "mkdir"),
])  # fmt: skip
def test_a_user_who_puts_a_link_in_its_place_gets_no_permissions(
    path: str, mode: int, maker: str, root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is that of a mount which others use already."""
    victim = tmp_path / "shadow"
    victim.touch(0o600)
    make = getattr(os, maker)

    def make_and_lose(name: bytes, mode: int, *device: int, dir_fd: int) -> None:
        make(name, mode, *device, dir_fd=dir_fd)
        os.rename(name, name + b".away", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        os.symlink(victim, name, dir_fd=dir_fd)

    monkeypatch.setattr(os, maker, make_and_lose)
    with pytest.raises(SpfsError, match="cannot create .*symbolic link"):
        create_file(root, path, mode)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
