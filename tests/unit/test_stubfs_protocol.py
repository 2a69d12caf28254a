"""The wire structures against the C compiler's, and the packing of attributes and directory entries."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from stubfs import protocol, syscalls

STRUCTURES = {
    "fuse_in_header": protocol.IN_HEADER, "fuse_out_header": protocol.OUT_HEADER, "fuse_attr": protocol.ATTR,
    "fuse_open_out": protocol.OPEN_OUT, "fuse_init_out": protocol.INIT_OUT, "fuse_forget_one": protocol.FORGET_ONE,
    "fuse_getattr_in": protocol.GETATTR_IN, "fuse_setattr_in": protocol.SETATTR_IN, "fuse_open_in": protocol.OPEN_IN,
    "fuse_create_in": protocol.CREATE_IN, "fuse_release_in": protocol.RELEASE_IN, "fuse_read_in": protocol.READ_IN,
    "fuse_write_in": protocol.WRITE_IN, "fuse_fsync_in": protocol.FSYNC_IN, "fuse_lseek_in": protocol.LSEEK_IN,
    "fuse_fallocate_in": protocol.FALLOCATE_IN, "fuse_rename_in": protocol.RENAME_IN,
    "fuse_rename2_in": protocol.RENAME2_IN, "fuse_getxattr_in": protocol.GETXATTR_IN,
    "fuse_getxattr_out": protocol.GETXATTR_OUT, "fuse_statfs_out": protocol.STATFS_OUT,
    "fuse_ioctl_in": protocol.IOCTL_IN, "fuse_ioctl_out": protocol.IOCTL_OUT,
    "fuse_copy_file_range_in": protocol.COPY_FILE_RANGE_IN,
    "fuse_write_out": protocol.WRITE_OUT, "fuse_notify_inval_inode_out": protocol.INVAL_INODE_OUT,
}  # fmt: skip


@pytest.mark.skipif(
    not shutil.which("cc") or not Path("/usr/include/linux/fuse.h").exists(),
    reason="needs a C compiler and linux/fuse.h (apt install gcc linux-libc-dev)",
)
def test_sizes_are_the_compilers(tmp_path: Path) -> None:
    lines = "".join(f'printf("{name} %zu\\n", sizeof(struct {name}));' for name in STRUCTURES)
    lines += 'printf("entry %zu\\n", offsetof(struct fuse_entry_out, attr));'
    lines += 'printf("attr %zu\\n", offsetof(struct fuse_attr_out, attr));'
    lines += 'printf("dirent %zu\\n", offsetof(struct fuse_dirent, name));'
    source = tmp_path / "sizes.c"
    source.write_text(
        f"#include <linux/fuse.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{ {lines} }}\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "sizes", source], check=True)
    output = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    sizes = {name: int(size) for name, size in map(str.split, output.splitlines())}
    expected = {name: structure.size for name, structure in STRUCTURES.items()}
    expected |= {"entry": protocol.ENTRY.size, "attr": protocol.ATTR_OUT.size, "dirent": protocol.DIRENT.size}
    assert sizes == expected


def test_attributes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    os.utime(path, ns=(-1_500_000_000, 7_000_000_009))
    packed = protocol.ATTR.unpack(protocol.attr(42, path.stat()))
    assert packed[0:2] == (42, 5)
    assert packed[3] == -2 and packed[6] == 500_000_000
    assert (packed[4], packed[7]) == (7, 9)
    assert packed[9] == path.stat().st_mode


@pytest.mark.parametrize("major, minor", [(0, 0), (8, 1), (259, 70_000), (4095, 255)])
def test_device_numbers_as_the_kernel_encodes_them(major: int, minor: int) -> None:
    encoded = protocol.encode_device(os.makedev(major, minor))
    # new_decode_dev(), include/linux/kdev_t.h
    assert ((encoded & 0xFFF00) >> 8, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00)) == (major, minor)


def test_directory_entries_are_padded() -> None:
    for name in (b"a", b"12345678", b"n" * 255):
        entry = protocol.PACK_DIRENT[len(name)](7, 99, len(name), 4, name)
        assert len(entry) % 8 == 0
        assert protocol.DIRENT.unpack_from(entry) == (7, 99, len(name), 4)
        assert entry[protocol.DIRENT.size :].rstrip(b"\0") == name


def test_native_entries() -> None:
    def native(offset: int, name: bytes) -> bytes:
        size = (protocol.NATIVE_DIRENT.size + len(name) + 1 + 7) & ~7
        return (protocol.NATIVE_DIRENT.pack(1, offset, size, 8) + name).ljust(size, b"\0")

    data = native(5, b"x") + native(-3, b"\xff" * 255)
    assert list(protocol.native_dirents(data)) == [(5, 1, 8, b"x"), (-3, 1, 8, b"\xff" * 255)]


def test_names() -> None:
    assert protocol.text_at(b"..name\0rest", 2, 11) == b"name"
    assert protocol.text_at(memoryview(b"no end"), 3, 6) == b"end"
    assert protocol.opcode_name(protocol.Opcode.READ) == "read"
    assert protocol.opcode_name(4711) == "opcode 4711"


def test_the_same_by_stat_and_statx(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    os.utime(path, ns=(-5, 7))
    found = syscalls.statx(syscalls.AT_FDCWD, bytes(path), 0, 0x7FF)
    made = protocol.basic_statx(os.stat(path))
    size = protocol.STATX.size
    ours, theirs = list(protocol.STATX.unpack_from(made)), list(protocol.STATX.unpack_from(found))
    ours[2] = theirs[2] = ours[11] = theirs[11] = ours[0] = theirs[0] = 0  # attributes, and the masks
    assert ours == theirs and len(made) == len(found) == 256
    atime, ctime = slice(size, size + 16), slice(size + 32, size + 64)
    assert made[atime] == found[atime] and made[ctime] == found[ctime]
