"""chattr, lsattr and their kind reach the file behind; ioctls that cannot be passed on are refused."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest
from stubfs_kit import Filesystem, as_user, mounted

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
GETFLAGS, SETFLAGS, FSGETXATTR, GETVERSION = 0x80086601, 0x40086602, 0x801C581F, 0x80087601  # linux/fs.h
GETVERSION_32 = 0x80047601
FICLONE, FITRIM, FSGETLABEL = 0x40049409, 0xC0185879, 0x81009431
IMMUTABLE, NODUMP = 0x10, 0x40
ALICE = 1001


@pytest.fixture(params=["restore", "proxy"])
def fs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    with mounted(tmp_path, request.param) as filesystem:
        yield filesystem
        assert "ERROR" not in filesystem.log.read_text()


def ioctl(path: Path, command: int, argument: bytes) -> Any:
    """What is in the caller's memory afterwards, or the name of the error."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return fcntl.ioctl(fd, command, argument)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(fd)


def flags(path: Path) -> int:
    return struct.unpack("=I", ioctl(path, GETFLAGS, bytes(8))[:4])[0] & (IMMUTABLE | NODUMP)


def test_flags_of_a_file_and_of_a_directory(fs: Filesystem) -> None:
    (fs.path / "file").write_text("text")
    (fs.path / "dir").mkdir()
    for name in ("file", "dir"):
        path = fs.path / name
        assert flags(path) == 0
        assert ioctl(path, SETFLAGS, struct.pack("=Q", NODUMP)) != "ENOTTY"
        assert flags(path) == NODUMP
        assert struct.unpack_from("=I", ioctl(path, FSGETXATTR, bytes(28)))[0] & 0x80  # FS_XFLAG_NODUMP
    if fs.client.status().mode == "proxy":
        assert flags(fs.real / "file") == flags(fs.real / "dir") == NODUMP


@pytest.mark.parametrize("fs", ["restore"], indirect=True)  # on a tmpfs: ext4 refuses it
def test_what_is_open_can_be_written_to_when_it_is_immutable(fs: Filesystem) -> None:
    """Also if the way of writing changes: appending switched on or off, or by a mapping, which does not append."""
    for name, opened, switched in (("plain", 0, os.O_APPEND), ("appending", os.O_APPEND, 0)):
        path = fs.path / name
        path.write_bytes(b"0123456789")
        fd = os.open(path, os.O_RDWR | opened)
        try:
            ioctl(path, SETFLAGS, struct.pack("=Q", IMMUTABLE))
            with mmap.mmap(fd, 10) as mapping:
                mapping[0:1] = b"M"
                mapping.flush()
            fcntl.fcntl(fd, fcntl.F_SETFL, switched)
            os.pwrite(fd, b"W", 5)
            assert path.read_bytes() == (b"M123456789W" if switched else b"M1234W6789")
        finally:
            os.close(fd)
            ioctl(path, SETFLAGS, bytes(8))


def test_immutable_is_immutable(fs: Filesystem) -> None:
    path = fs.path / "file"
    path.write_text("text")
    ioctl(path, SETFLAGS, struct.pack("=Q", IMMUTABLE))
    try:
        for change in (lambda: path.write_text("x"), path.unlink, lambda: path.chmod(0)):
            with pytest.raises(PermissionError):
                change()
        assert path.read_text() == "text"
    finally:
        ioctl(path, SETFLAGS, bytes(8))
    path.unlink()


def test_only_the_owner_may_and_only_root_what_root_may(fs: Filesystem) -> None:
    fs.path.chmod(0o755)
    for name, owner in (("roots", 0), ("hers", ALICE)):
        (fs.path / name).touch()
        os.chown(fs.path / name, owner, owner)
    top = os.open(fs.path, os.O_PATH)

    def attempt() -> Any:
        os.fchdir(top)
        set_flags = [
            ioctl(Path(name), SETFLAGS, struct.pack("=Q", wanted))
            for name, wanted in (("roots", NODUMP), ("hers", IMMUTABLE), ("hers", NODUMP))
        ]
        return set_flags, flags(Path("hers"))

    try:
        enter = fs.run(lambda: as_user(ALICE, ALICE, [], attempt)())
        assert enter.result() == (["EPERM", "EPERM", struct.pack("=Q", NODUMP)], NODUMP)
    finally:
        os.close(top)
    assert flags(fs.path / "roots") == 0


@pytest.mark.parametrize("command", [GETVERSION, GETVERSION_32])
def test_no_more_is_written_than_the_caller_has_room_for(tmp_path: Path, command: int) -> None:
    """The number says 8 bytes, programs give 4."""
    with mounted(tmp_path, "proxy") as fs:
        (fs.real / "file").touch()
        native = ioctl(fs.real / "file", GETVERSION, b"\xaa" * 8)
        assert ioctl(fs.path / "file", command, b"\xaa" * 8) == native


def test_what_is_not_passed_on(fs: Filesystem) -> None:
    for name in ("file", "other"):
        (fs.path / name).write_text("text")
    assert ioctl(fs.path / "file", FITRIM, bytes(24)) == "ENOTTY"
    assert ioctl(fs.path / "file", FSGETLABEL, bytes(256)) == "ENOTTY"
    with open(fs.path / "file", "rb") as source, open(fs.path / "other", "r+b") as target:
        with pytest.raises(OSError) as caught:
            fcntl.ioctl(target, FICLONE, source.fileno())
        assert caught.value.errno == errno.EOPNOTSUPP  # cp --reflink=auto goes on without


def test_chattr_and_lsattr(fs: Filesystem) -> None:
    chattr, lsattr = shutil.which("chattr"), shutil.which("lsattr")
    if chattr is None or lsattr is None:
        pytest.skip("chattr and lsattr are not installed: apt install e2fsprogs")
    path = fs.path / "file"
    path.touch()
    subprocess.run([chattr, "+dA", path], check=True, capture_output=True)
    listed = subprocess.run([lsattr, path], check=True, capture_output=True, text=True).stdout.split()[0]
    assert set(listed) - set("-e") == {"d", "A"}


def test_held_in_stub_mode(tmp_path: Path) -> None:
    with mounted(tmp_path, "proxy") as fs:
        (fs.path / "file").touch()
        fd = os.open(fs.path / "file", os.O_RDONLY)
        try:
            fs.client.mode("stub")
            asking = fs.run(lambda: fcntl.ioctl(fd, GETVERSION, bytes(8)))
            fs.wait_held()
            assert [held.operation for held in fs.client.held() if held.tid] == ["ioctl"]
            assert not asking.finished()
            native = ioctl(fs.real / "file", GETVERSION, bytes(8))
            fs.proxy()
            if isinstance(native, bytes):
                assert asking.result() == native
            else:
                assert asking.finished(20)
        finally:
            os.close(fd)
