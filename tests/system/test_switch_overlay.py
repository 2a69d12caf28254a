"""``spfs switch`` to and from overlayfs, which is what containers have."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest
from manager_kit import run
from surgery_kit import Mounts, Victim, mounts, victim

from spfs.instances import instances
from spfs.linknames import with_other_devices
from spfs.linux import mountapi, procfs

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

NAMES = ("lower", "upper", "directory/inner")


@pytest.fixture
def overlay(mounts: Mounts, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounts]:
    """``new`` is an overlay, its layers on one file system, or on two; the same names are on ``old``."""
    lower, upper, merged = mounts.new / "lower", mounts.new / "upper", tmp_path / "merged"
    for path in (lower, upper, mounts.new / "work", merged, tmp_path / "second"):
        path.mkdir()
    if request.param == "two":
        subprocess.run(["mount", "-t", "tmpfs", "second", str(tmp_path / "second")], check=True)
        upper, work = tmp_path / "second/upper", tmp_path / "second/work"
        upper.mkdir()
        work.mkdir()
    else:
        work = mounts.new / "work"
    for top, name in ((lower, "lower"), (upper, "upper"), (lower, "directory/inner")):
        for root, contents in ((top, b"new " * 2048), (mounts.old, b"old " * 2048)):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(contents)
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", str(merged)], check=True)
    mounts.new, beneath = merged, mounts.new
    try:
        yield mounts
    finally:
        for path in (merged, tmp_path / "second"):
            if os.path.ismount(path):
                mountapi.umount2(str(path), mountapi.MNT_DETACH)
        mounts.new = beneath


def switch(source: Path, target: Path, victim: Victim) -> Dict[str, Any]:
    done = run(
        "spfs.cli.spfs", "switch", "--json", "--pid", str(victim.pid), "--source", str(source), "--target", str(target)
    )
    assert done.returncode == 0, done.stderr
    answer: Dict[str, Any] = json.loads(done.stdout)
    return answer


def hold(victim: Victim, top: Path) -> None:
    victim.run(
        f"""
os.chdir({str(top / "directory")!r})
fds = [os.open('../' + name, os.O_RDWR) for name in ('lower', 'upper')]
fds.append(os.open('inner', os.O_RDONLY))
os.lseek(fds[1], 5, os.SEEK_SET)
fcntl.flock(fds[0], fcntl.LOCK_EX)
fcntl.lockf(fds[1], fcntl.LOCK_EX, 3)
private = mmap.mmap(fds[2], 8192, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
private[4096:4100] = b'mine'
shared = mmap.mmap(fds[0], 8192)
listing = os.open('.', os.O_RDONLY)
"""
    )


# A mapping of Python's has a descriptor of its own.
HELD = {"cwd": 1, "file": 5, "directory": 1, "private mapping": 1, "shared mapping": 1}


def works(victim: Victim, top: Path, contents: bytes) -> None:
    word = contents.decode()
    assert victim.run("os.getcwd()") == str(top / "directory")
    assert victim.run("[os.pread(fd, 3, 0) for fd in fds], os.read(fds[1], 2)") == ([contents] * 3, contents[1:])
    assert victim.run("private[:3], private[4096:4100], shared[:3]") == (contents, b"mine", contents)
    victim.run("os.lseek(fds[1], 5, os.SEEK_SET); shared[4:8] = b'SEEN'; shared.flush()")
    assert (top / "lower").read_bytes()[:8] == f"{word} SEEN".encode()
    locks = victim.run("[open(f'/proc/self/fdinfo/{fd}').read().count('lock:') for fd in fds]")
    assert locks == [1, 1, 0]
    assert victim.run("os.listdir(listing)") == ["inner"]


@pytest.mark.parametrize("overlay", ["one", "two"], indirect=True)
def test_to_an_overlay(overlay: Mounts, victim: Victim) -> None:
    hold(victim, overlay.old)
    answer = switch(overlay.old, overlay.new, victim)
    assert answer["left"] == [] and answer["moved"] == HELD and overlay.users() == []
    works(victim, overlay.new, b"new")


@pytest.mark.parametrize("overlay", ["one"], indirect=True)
def test_from_an_overlay(overlay: Mounts, victim: Victim) -> None:
    """Also what has been copied up while it was open."""
    hold(victim, overlay.new)
    victim.run("before = os.open('../directory/inner', os.O_RDONLY)")
    with open(overlay.new / "directory/inner", "r+b") as file:
        file.write(b"over")
    answer = switch(overlay.new, overlay.old, victim)
    assert answer["left"] == [] and answer["moved"] == {**HELD, "file": 6}
    works(victim, overlay.old, b"old")


@pytest.mark.parametrize("overlay", ["two"], indirect=True)
def test_from_an_overlay_of_two_file_systems(overlay: Mounts, victim: Victim) -> None:
    """Its files have device numbers of their own, and mappings and locks those of others: refused, not passed over."""
    victim.run(f"fd = os.open({str(overlay.new / 'upper')!r}, os.O_RDONLY)")
    for more in ([], ["--dry-run"]):
        done = run(
            "spfs.cli.spfs", "switch", "--all", "--source", str(overlay.new), "--target", str(overlay.old), *more
        )
        assert done.returncode == 1 and "another device number" in done.stderr and "overlay" in done.stderr
        assert str(overlay.new / "upper") in done.stderr
    assert victim.run("os.read(fd, 3)") == b"new"


@pytest.mark.parametrize("overlay", ["one"], indirect=True)
def test_mappings_that_are_shown_with_the_number_of_a_layer(
    overlay: Mounts, victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kernels did before Linux 6.8 or so: what cannot be recognized is told, too."""
    hold(victim, overlay.new)
    device = os.stat(overlay.new).st_dev
    found = instances(device)
    assert list(with_other_devices(device, found)) == []
    read, shown = procfs.read, procfs.device_text(device)
    monkeypatch.setattr(procfs, "read", lambda path: read(path).replace(shown, procfs.device_text(device + 1)))
    links = list(with_other_devices(device, found))
    assert len(links) == 2 and all(link.startswith(f"/proc/{victim.pid}/map_files/") for link in links)
