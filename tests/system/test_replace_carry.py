"""What restore mode has and the real side lacks is carried there before the processes are moved, if asked for."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest
from replace_kit import Scene, scene

from spfs.errors import SpfsError

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]

OPEN = """
import mmap, os
os.makedirs("made/deep")
made = os.open("made/deep/file", os.O_RDWR | os.O_CREAT, 0o640)
os.write(made, b"written in restore mode")
mapping = mmap.mmap(os.open("both", os.O_RDWR), 4096)
os.chdir("made")
"""


@pytest.mark.parametrize("mode", ["restore", "stub"])
def test_carried_and_moved(scene: Scene, mode: str) -> None:
    scene.delay()
    scene.file("both", b"R" * 4096)
    (scene.mnt / "both").write_bytes(b"S" * 4096)
    victim = scene.victim(cwd=scene.mnt)
    victim.run(OPEN)
    os.chown(scene.mnt / "made/deep/file", 12, 34)
    scene.client.mode(mode)
    report = scene.replace(missing="carry", strict=True)
    scene.replaced()
    assert report["left"] == [] and report["carried"] == ["made", "made/deep", "made/deep/file"]
    assert victim.run("os.pread(made, 100, 0)") == b"written in restore mode"
    assert victim.run("os.getcwd()") == str(scene.mnt / "made") and victim.run("mapping[0]") == ord("R")
    victim.run("os.write(made, b', and after it')")
    carried = scene.export / "made/deep/file"
    assert carried.read_text() == "written in restore mode, and after it"
    assert (carried.stat().st_uid, carried.stat().st_gid) == (12, 34)
    assert stat.S_IMODE(carried.stat().st_mode) == 0o640 and (scene.export / "both").read_bytes() == b"R" * 4096


def test_not_unless_asked_for(scene: Scene) -> None:
    scene.delay()
    scene.scaffold(made=5)
    scene.client.mode("stub")
    assert scene.replace()["carried"] == [] and os.listdir(scene.export) == []


@pytest.mark.parametrize("mode", ["restore", "stub"])
def test_refused_by_the_real_side(scene: Scene, mode: str) -> None:
    """Nothing has changed, on either side; when it is mended, the same again."""
    scene.delay()
    scene.scaffold(a=5, dir=None, dir__file=5)
    (scene.export / "dir").mkdir()
    immutable(scene.export / "dir", "+i")
    try:
        scene.client.mode(mode)
        with pytest.raises(SpfsError, match="cannot carry dir/file of restore mode") as caught:
            scene.replace(missing="carry")
        assert caught.value.errno == errno.EPERM
        assert os.listdir(scene.export) == ["dir"]
        scene.untouched(mode)
    finally:
        immutable(scene.export / "dir", "-i")
    assert scene.replace(missing="carry")["carried"] == ["a", "dir/file"]
    scene.replaced()


def test_undone_if_the_replace_fails_later(scene: Scene) -> None:
    scene.delay()
    scene.scaffold(dir=None, dir__file=5)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os, socket\nlistener = socket.socket(socket.AF_UNIX)\nlistener.bind('dir/socket')")
    # A name that its counterpart cannot get: strict ends it before anything has been let through.
    (scene.export / "dir").mkdir()
    (scene.export / "dir/socket").write_text("in the way")
    scene.client.mode("stub")
    with pytest.raises(SpfsError):
        scene.replace(missing="carry", strict=True)
    scene.untouched()
    assert os.listdir(scene.export / "dir") == ["socket"]


def immutable(path: Path, change: str) -> None:
    subprocess.run(["chattr", change, str(path)], check=True)
