"""Where mounts propagate to other namespaces, as to those of services: their processes come to what is on the path."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from replace_kit import Scene, scene
from surgery_kit import Victim

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]

# As service managers do it: what is mounted outside is seen within, but not the other way; and shared further on.
SERVICE = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", 'mount --make-rshared / && exec "$@"', "sh"]


def mount_ids(victim: Victim, *names: str) -> "set[int]":
    """Of the victim's descriptors, by those of its variables."""
    found = set()
    for name in names:
        info = victim.run(f"open('/proc/self/fdinfo/%d' % {name}).read()")
        found.add(int(re.search(r"mnt_id:\s*(\d+)", info)[1]))  # type: ignore[index]
    return found


@pytest.fixture
def shared(scene: Scene) -> Scene:
    """The delayed mount lies in a shared mount."""
    parent = scene.base / "shared"
    parent.mkdir()
    scene.mount("-t", "tmpfs", "shared", str(parent))
    subprocess.run(["mount", "--make-shared", str(parent)], check=True)
    scene.mnt = parent / "mnt"
    scene.mnt.mkdir()
    return scene


@pytest.mark.parametrize("kind", ["none", "v1"])
def test_service_namespace(shared: Scene, kind: str) -> None:
    within, deeper = shared.victim(SERVICE), shared.victim(SERVICE)
    outside = shared.victim()
    shared.delay()
    shared.both("directory", stat.S_IFDIR)
    shared.file("file")
    shared.both("fifo", stat.S_IFIFO)
    users = (within, deeper, outside)
    for victim in users:
        victim.run(
            f"""
import mmap, os
os.chdir({str(shared.mnt / 'directory')!r})
file = os.open('../file', os.O_RDWR | os.O_APPEND)
os.lseek(file, 5, os.SEEK_SET)
other = os.dup(file)
listing = os.open('.', os.O_RDONLY)
place = os.open('../file', os.O_PATH)
fifo = os.open('../fifo', os.O_RDWR | os.O_NONBLOCK)
mapping = mmap.mmap(file, 13, mmap.MAP_SHARED)
"""
        )
    within.run("os.write(fifo, b'queued')")
    shared.client.mode("stub")
    report = shared.replace(freeze_cgroup=shared.cgroup(kind, *(victim.pid for victim in users)))
    assert report["left"] == [] and report["mounts_left"] == [] and report["mounts"] == 3
    for victim in users:
        assert victim.run("os.getcwd(), os.readlink('/proc/self/cwd')") == (str(shared.mnt / "directory"),) * 2
        links = victim.run("[os.readlink(f'/proc/self/fd/{fd}') for fd in (file, other, listing, place, fifo)]")
        names = ("file", "file", "directory", "file", "fifo")
        assert links == [str(shared.mnt / name) for name in names]
        on_path = victim.run("path = os.open('.', os.O_PATH); os.stat('..').st_dev")
        assert on_path == os.stat(shared.export).st_dev
        assert len(mount_ids(victim, "file", "other", "listing", "place", "fifo", "path")) == 1
        table = Path(f"/proc/{victim.pid}/mountinfo").read_text().splitlines()
        (here,) = [line.split() for line in table if line.split()[4] == str(shared.mnt)]
        assert mount_ids(victim, "file") == {int(here[0])}
        # Nothing of what the descriptors were got lost on the way.
        assert victim.run("os.read(file, 8), os.get_blocking(fifo), mapping[:]") == (
            b"contents",
            False,
            b"real contents",
        )
        assert victim.run("os.lseek(other, 0, os.SEEK_CUR)") == 13
    assert outside.run("os.read(fifo, 10)") == b"queued"
    assert within.run("os.write(file, b'!')") == 1 and (shared.export / "file").read_bytes() == b"real contents!"
    shared.replaced()
