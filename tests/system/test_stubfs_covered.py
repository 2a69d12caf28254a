"""Directories that were covered by mounts on a mount that is gone: who comes there by a path starts anew."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Callable, Iterator

import pytest
from stubfs_kit import Filesystem, mounted

from stubfs.errors import StubfsError

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

NOBODYS = os.makedev(0, (1 << 20) - 1)  # of no mount: as if ours were not mounted where the caller is


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path) as filesystem:
        (filesystem.path / "a").mkdir()
        (filesystem.path / "a" / "covered").mkdir()
        (filesystem.path / "a" / "covered" / "name").touch()
        (filesystem.path / "single").touch()
        yield filesystem


def estale(action: Callable[[], object]) -> bool:
    try:
        action()
    except OSError as error:
        assert error.errno == errno.ESTALE
        return True
    return False


def refused(fs: Filesystem) -> "set[str]":
    top = fs.path
    actions = {
        "look up": lambda: os.stat(top / "a/covered/name"),
        "make": lambda: os.mkdir(top / "a/covered/new"),
        "stat": lambda: os.stat(top / "a/covered"),
        "list": lambda: os.listdir(top / "a/covered"),
        "change": lambda: os.chmod(top / "a/covered", 0o755),
        "open": lambda: os.close(os.open(top / "single", os.O_RDONLY)),
        "beside": lambda: os.stat(top / "a"),
        "list beside": lambda: os.listdir(top / "a"),
    }
    return {name for name, action in actions.items() if estale(action)}


def test_only_what_was_covered(fs: Filesystem) -> None:
    fd = os.open(fs.path / "single", os.O_RDWR)
    fs.client.cover(["a/covered", "single"], NOBODYS)
    assert refused(fs) == {"look up", "make", "stat", "list", "change", "open"}
    assert os.write(fd, b"open before") == 11 and os.pread(fd, 11, 0) == b"open before"
    os.close(fd)
    fs.client.cover([], NOBODYS)
    assert refused(fs) == set()


def test_whoever_still_has_the_mount_is_served(fs: Filesystem) -> None:
    fs.client.cover(["a/covered", "single"], os.stat(fs.path).st_dev)
    assert refused(fs) == set()


def test_until_the_mode_changes(fs: Filesystem) -> None:
    fs.client.cover(["a/covered"], NOBODYS)
    fs.client.mode("stub")
    fs.client.mode("restore")
    assert refused(fs) == set()


@pytest.mark.parametrize("keys", [
    {"paths": "a", "device": 1}, {"paths": [1], "device": 1}, {"device": 1}, {"paths": ["a"]},
    {"paths": ["a"], "device": -1}, {"paths": ["a"], "device": True}, {"paths": ["a"] * 1001, "device": 1},
])  # fmt: skip
def test_bad_input_changes_nothing(fs: Filesystem, keys: "dict[str, object]") -> None:
    with pytest.raises(StubfsError, match="cannot cover mountpoints: (paths|device): ") as caught:
        fs.client._ask("cover", **keys)
    assert caught.value.errno == errno.EINVAL
    assert refused(fs) == set()
