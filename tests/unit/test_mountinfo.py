"""mountinfo: parsed from bytes, also from odd ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spfs.linux.mountinfo import MountTable, parse, parse_line, unescape

LINE = rb"36 35 98:0 /mnt1\040x /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue"


def test_every_field() -> None:
    mount = parse_line(LINE)
    assert (mount.mount_id, mount.parent_id, mount.device) == (36, 35, (98, 0))
    assert (mount.root, mount.mountpoint, mount.options) == ("/mnt1 x", "/mnt2", ("rw", "noatime"))
    assert (mount.group("master"), mount.group("shared"), mount.group("propagate_from")) == (1, 7, None)
    assert (mount.fstype, mount.source, mount.super_options) == ("ext3", "/dev/root", "rw,errors=continue")
    assert mount.st_dev == os.makedev(98, 0)


def test_no_tags_empty_source_and_a_lone_dash_as_mountpoint() -> None:
    mount = parse_line(b"1 0 0:5 / /- rw - tmpfs  rw")
    assert (mount.mountpoint, mount.propagation, mount.source, mount.super_options) == ("/-", (), "", "rw")
    assert parse_line(b"1 0 0:5 / / rw unbindable - tmpfs x rw").group("unbindable") == 0


def test_a_broken_line_is_refused() -> None:
    with pytest.raises(ValueError):
        parse_line(b"36 35 98:0 / /mnt rw")


@given(st.binary(min_size=1, max_size=50).filter(lambda raw: b"\0" not in raw))
def test_paths_of_any_bytes(path: bytes) -> None:
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in path)
    assert os.fsencode(unescape(escaped)) == path


def test_table_knows_what_is_on_what() -> None:
    table = MountTable(
        parse(
            b"1 1 0:1 / / rw - rootfs rootfs rw\n"
            b"2 1 0:2 / /a rw - tmpfs a rw\n"
            b"3 2 0:3 / /a/b rw - tmpfs b rw\n"
            b"4 3 0:4 / /a/b rw - tmpfs over rw\n"
            b"5 2 0:5 / /a/c rw - tmpfs c rw\n"
        )
    )
    assert [mount.mount_id for mount in table.beneath(2)] == [3, 4, 5]
    top = table.top_at("/a/b")
    assert top is not None and top.mount_id == 4
    assert table.top_at("/nothing") is None
    assert [mount.mount_id for mount in table.children(1)] == [2]  # and not the root itself, its own parent


def test_this_machines_own() -> None:
    table = MountTable.from_bytes(Path("/proc/self/mountinfo").read_bytes())
    root = table.top_at("/")
    assert root is not None and root.st_dev == os.stat("/").st_dev
