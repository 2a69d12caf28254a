"""Attributes that come with a name are believed by the kernel for a moment: never beyond what makes them untrue."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from typing import Iterator

import pytest
from stubfs_kit import Filesystem, as_user, mounted, wait_until

from stubfs import protocol, syscalls
from stubfs.rules import Rule

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
ROUNDS = 20  # what is wrong shows only within two ticks of the kernel's clock after a lookup: 8 ms at 250 Hz
ALICE = 1500


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path) as filesystem:
        (filesystem.path / "f").write_bytes(b"staging")
        (filesystem.real / "f").write_bytes(b"the real one")
        yield filesystem


def mode_alone(fd: int) -> int:
    """Whoever asks for times, too, gets all of it from us after any change: the kernel knows that those change."""
    found = syscalls.statx(fd, b"", syscalls.AT_EMPTY_PATH, 2)  # STATX_MODE
    return stat.S_IMODE(protocol.STATX.unpack_from(found)[6])


def test_none_of_the_former_mode_is_seen(fs: Filesystem) -> None:
    with open(fs.path / "f") as file:
        for _ in range(ROUNDS):
            assert os.stat(fs.path / "f").st_size == 7
            fs.proxy()
            assert os.fstat(file.fileno()).st_size == 12
            assert os.stat(fs.path / "f").st_size == 12
            fs.client.mode("restore")
            assert os.fstat(file.fileno()).st_size == 7


def test_nobody_gets_them_in_stub_mode(fs: Filesystem) -> None:
    with open(fs.path / "f") as file:
        for _ in range(5):
            read, write = os.pipe()
            asking = fs.run(lambda: os.read(read, 1) and os.fstat(file.fileno()).st_size)
            os.stat(fs.path / "f")
            fs.client.mode("stub")
            os.write(write, b"x")
            os.close(read)
            os.close(write)
            fs.wait_held()
            fs.client.mode("restore")
            assert asking.result() == 7


def test_nobody_gets_those_of_an_exempt_process(fs: Filesystem) -> None:
    with open(fs.path / "f") as file:
        for _ in range(5):
            read, write = os.pipe()
            asking = fs.run(lambda: os.read(read, 1) and os.fstat(file.fileno()).st_size)
            fs.client.mode("stub", exempt=[os.getpid()])
            os.stat(fs.path / "f")
            os.write(write, b"x")
            os.close(read)
            os.close(write)
            fs.wait_held()
            fs.proxy()
            assert asking.result() == 12
            fs.client.mode("restore")


def test_rules_for_them_are_in_force_at_once(fs: Filesystem) -> None:
    with open(fs.path / "f") as file:
        for _ in range(ROUNDS):
            os.stat(fs.path / "f")
            fs.client.set_rules([Rule("fail", operations=["getattr"], errno=errno.EDQUOT)])
            with pytest.raises(OSError) as caught:
                os.fstat(file.fileno())
            assert caught.value.errno == errno.EDQUOT
            with pytest.raises(OSError):
                os.stat(fs.path / "f")  # not with what the lookup has brought
            fs.client.set_rules([])


def test_an_acl_changes_the_mode_at_once(fs: Filesystem) -> None:
    nobody = 0xFFFFFFFF
    with open(fs.path / "f") as file:
        for i in range(ROUNDS):
            bits = 4 if i % 2 else 6
            entries = ((1, bits, nobody), (4, bits, nobody), (0x20, bits, nobody))
            os.stat(fs.path / "f")
            os.setxattr(
                file.fileno(), "system.posix_acl_access",
                struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries),
            )  # fmt: skip
            assert mode_alone(file.fileno()) == bits * 0o111


def test_a_write_takes_set_id_bits_at_once(fs: Filesystem) -> None:
    with open(fs.path / "f", "r+b") as file:
        directory = os.open(fs.path, os.O_RDONLY | os.O_DIRECTORY)

        def write() -> int:
            os.stat("f", dir_fd=directory)
            os.pwrite(file.fileno(), b"x", 0)
            return mode_alone(file.fileno())

        try:
            for _ in range(5):
                os.chmod(file.fileno(), 0o4777)
                assert fs.run(as_user(ALICE, ALICE, [], write)).result() == 0o777
        finally:
            os.close(directory)


def test_what_others_change_is_seen_at_once_by_name_and_soon_by_descriptor(fs: Filesystem) -> None:
    fs.proxy()
    real = fs.real / "f"
    with open(fs.path / "f") as file:
        for size in range(1, ROUNDS):
            os.stat(fs.path / "f")
            os.truncate(real, size)
            wait_until(lambda: os.fstat(file.fileno()).st_size == size, 1)
            os.truncate(real, 100 + size)
            assert os.stat(fs.path / "f").st_size == 100 + size


def test_who_reads_what_was_shorter_gets_all_of_it(fs: Filesystem) -> None:
    """The kernel dismisses attributes that were asked for before it was told to forget them, and would believe the
    former file's size."""
    for _ in range(ROUNDS):
        (fs.path / "f").write_bytes(b"")
        with open(fs.path / "f", "rb", buffering=0) as file:
            os.stat(fs.path / "f")
            fs.client.mode("stub")
            reading = fs.run(lambda: file.read(100))
            fs.wait_held()
            fs.proxy()
            assert reading.result() == b"the real one"
        fs.client.mode("restore")
