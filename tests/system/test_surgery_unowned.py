"""What the kernel has open for itself is no process's: it is reported, and left alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Iterator

import pytest
from replace_kit import Scene, scene
from surgery_kit import Mounts, Victim, mounts, victim

from spfs.errors import SpfsError
from spfs.references import LeftReference
from spfs.surgery import unowned
from spfs.switch import Refused

__all__ = ["mounts", "scene", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


def attach(path: Path) -> str:
    """A loop device for the file; its path."""
    done = subprocess.run(["losetup", "--find", "--show", "--read-only", str(path)], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        pytest.skip("no loop device can be had here (losetup fails)")
    return done.stdout.strip()


@pytest.fixture
def loop(mounts: Mounts) -> Iterator[str]:
    mounts.both(lambda root: (root / "dir").mkdir())
    mounts.file("dir/image", b"old".ljust(1 << 20), b"new".ljust(1 << 20))
    device = attach(mounts.old / "dir/image")
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_loop_device(mounts: Mounts, victim: Victim, loop: str) -> None:
    victim.run(f"fd = os.open({str(mounts.old / 'dir/image')!r}, 0)")
    with pytest.raises(Refused, match=f"{loop} .dir/image. of process 0"):
        mounts.switch(strict=True)
    preparation, report = mounts.prepared_switch()
    assert preparation.left == report.left and report.moved == {"file": 1}
    (left,) = report.left
    assert (left.pid, left.kind, left.what, left.path) == (0, "loop device", loop, "dir/image")
    assert Path(loop).read_bytes()[:3] == b"old" and victim.run("os.read(fd, 3)") == b"new"


def test_loop_device_of_who_was_not_asked_for(mounts: Mounts, victim: Victim, loop: str) -> None:
    victim.run(f"fd = os.open({str(mounts.old / 'dir/image')!r}, 0)")
    report = mounts.switch(chosen=[victim.pid])
    assert (report.moved, report.left) == ({"file": 1}, [])


def test_layer_of_an_overlay(mounts: Mounts, victim: Victim, tmp_path: Path) -> None:
    """Its name has what separates others in it. What the overlay shows of it stays, too, and is no affair of ours."""
    mounts.both(lambda root: (root / "low:er,one").mkdir())
    path = mounts.file("low:er,one/f")
    for name in ("upper", "work", "merged", "another"):
        (tmp_path / name).mkdir()
    layer = str(mounts.old / "low:er,one").replace(":", "\\:").replace(",", "\\,")
    options = f"lowerdir={layer}:{tmp_path / 'another'},upperdir={tmp_path / 'upper'},workdir={tmp_path / 'work'}"
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(merged)], check=True)
    try:
        victim.run(f"a, b = os.open({path!r}, 0), os.open({str(merged / 'f')!r}, 0)")
        report = mounts.switch()
        (left,) = report.left
        assert (left.pid, left.kind, left.path) == (0, "overlay layer", "low:er,one") and str(merged) in left.what
        assert report.moved == {"file": 1} and victim.run("os.read(a, 3), os.read(b, 3)") == (b"new", b"old")
        victim.run("os.close(b)")
    finally:
        subprocess.run(["umount", str(merged)], check=True)
    assert mounts.switch().left == []


def test_loop_device_of_a_delayed_mount(scene: Scene) -> None:
    """It has what the real file has, by way of the proxy, as long as it is attached; then the file system ends."""
    scene.delay()
    path = scene.file("image", b"real".ljust(1 << 20))
    device = attach(Path(path))
    try:
        scene.client.mode("stub")
        with pytest.raises(SpfsError, match=f"{device} .image. of process 0 .kernel."):
            scene.replace(strict=True)
        scene.untouched()
        report = scene.replace()
        (left,) = report["left"]
        assert (left["pid"], left["kind"], left["what"], left["path"]) == (0, "loop device", device, "image")
        assert not report["ended"] and scene.types() == ["tmpfs"]
        assert Path(device).read_bytes()[:5] == b"real "
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    scene.replaced()


def test_swap_file(tmp_path: Path) -> None:
    """Beneath another mount than the file system of its neighbours, which does not have it."""
    image, place = tmp_path / "image", tmp_path / "a place"
    image.write_bytes(bytes(8 << 20))
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        (place / "swap").write_bytes(bytes(1 << 20))
        (place / "swap").chmod(0o600)
        subprocess.run(["mkswap", "--quiet", str(place / "swap")], check=True)
        subprocess.run(["swapon", "--priority", "0", str(place / "swap")], check=True)
        try:
            (left,) = unowned.held(os.stat(place).st_dev)
            assert (left.kind, left.path) == ("swap file", "swap")
            (left,) = [one for one in unowned.held(os.stat(tmp_path).st_dev) if _is_of(one, image)]
            assert left.kind == "loop device"
        finally:
            subprocess.run(["swapoff", str(place / "swap")], check=True)
        assert unowned.held(os.stat(place).st_dev) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _is_of(one: LeftReference, image: Path) -> bool:
    return one.path is not None and str(image).endswith(one.path)
