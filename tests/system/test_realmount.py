"""The real mount: by each of its ways, detached, in the target's namespaces, and everything that can be wrong."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Iterator, List

import pytest
from mount_kit import Places, daemons, mounts_at, places  # noqa: F401

from spfs import mounts, realmount
from spfs.errors import SpfsError
from spfs.linux.mountapi import MS
from spfs.realmount import Retry, RetryPolicy
from spfs.target import Target
from spfs.testing import wait_until

pytestmark = pytest.mark.needs_root


@pytest.fixture
def here() -> Iterator[Target]:
    with Target.pin() as target:
        yield target


def attached_options(mount_fd: int, places: Places) -> List[str]:  # noqa: F811
    """mountinfo's per-mount and super block options of a detached mount, seen by attaching it."""
    places.base()
    os.mkdir(places.path("mnt"))
    with Target.pin() as target:
        mounts.attach(mount_fd, target, places.path("mnt"))
    line = mounts_at("self", places.path("mnt"))[0]
    return sorted({*line[5].split(","), *line[-1].split(",")})


def make(target: Target, fstype: str, flags: int = 0, options: str = "", source: str = "src", **more: float) -> int:
    return realmount.make(source, fstype, flags, options, target, **more)  # type: ignore[arg-type]


def test_flags_and_options_arrive(places: Places, here: Target) -> None:  # noqa: F811
    fd = make(here, "tmpfs", int(MS.RDONLY | MS.NOSUID | MS.NOATIME), "size=1m,nodev,mode=0711")
    found = attached_options(fd, places)
    os.close(fd)
    assert {"ro", "nosuid", "nodev", "noatime", "size=1024k", "mode=711"} <= set(found)


def test_it_is_on_no_path_and_gone_with_its_descriptor(here: Target) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    fd = make(here, "tmpfs")
    assert mounts.instances(os.fstat(fd).st_dev) == []
    assert Path("/proc/self/mountinfo").read_text() == before
    os.close(fd)


def test_made_by_mount(places: Places, here: Target, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(realmount, "_ONE_STRING", ("tmpfs",))
    fd = make(here, "tmpfs", int(MS.NOEXEC), "size=2m")
    found = attached_options(fd, places)
    os.close(fd)
    assert {"noexec", "size=2048k"} <= set(found)


def test_made_by_mount_in_a_container(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Its /proc numbers other processes, or is what the container says that it is."""
    monkeypatch.setattr(realmount, "_ONE_STRING", ("tmpfs",))
    pid = places.namespace("-m", "-p", "-f", "--mount-proc")
    with Target.pin(pid) as target:
        os.close(make(target, "tmpfs", options="size=2m"))
        subprocess.run(["nsenter", "-t", str(pid), "-m", "mount", "-t", "tmpfs", "none", "/proc"], check=True)
        os.close(make(target, "tmpfs", options="size=2m"))


def test_overlay_with_escapes_and_quotes(places: Places, here: Target) -> None:  # noqa: F811
    places.base()
    for name in ("low,er", "lower"):
        os.mkdir(places.path(name))
        Path(places.path(name), name).touch()
    for options in (
        f"lowerdir={places.path('low')}\\,er:{places.path('lower')}",
        f'lowerdir="{places.path("lower")}:/etc/opt"',
    ):
        fd = make(here, "overlay", options=options)
        inner = os.open(".", os.O_RDONLY, dir_fd=fd)
        assert "lower" in os.listdir(inner)
        os.close(inner)
        os.close(fd)


@pytest.mark.parametrize(
    ("fstype", "source", "options", "number", "words"),
    [
        ("nonesuch", "src", "", errno.ENODEV, "no file system type nonesuch"),
        ("fuse.nonesuch", "src", "", errno.ENODEV, "nonesuch: not found"),
        ("tmpfs", "src", "bogus=1", errno.EINVAL, "Unknown parameter 'bogus'"),
        ("ext4", "/dev/nonesuch", "", errno.ENOENT, "/dev/nonesuch"),
        ("ext4", "/etc/passwd", "", errno.ENOTBLK, "Block device required"),
    ],
)
def test_failures_say_what_is_wrong(
    here: Target, fstype: str, source: str, options: str, number: int, words: str
) -> None:
    with pytest.raises(OSError, match=words) as caught:
        make(here, fstype, options=options, source=source)
    assert caught.value.errno == number
    assert not [name for name in os.listdir("/tmp") if name.startswith("spfs-mount-")]


def test_an_unknown_type_is_not_tried_again(here: Target) -> None:
    reports: List[object] = []
    with pytest.raises(SpfsError, match="cannot mount x: the kernel has no file system type nonesuch") as caught:
        Retry(report=reports.append).run(lambda left: make(here, "nonesuch", source="x"), "x")
    assert (caught.value.errno, reports) == (errno.ENODEV, [])
    assert "module" in caught.value.hint


@pytest.mark.needs_fuse
def test_a_fuse_type_by_its_helper(tmp_path: Path, here: Target) -> None:
    (tmp_path / "file").write_text("through bindfs")
    fd = make(here, "fuse.bindfs", int(MS.RDONLY), source=str(tmp_path))
    assert Path(f"/proc/self/fd/{fd}/file").read_text() == "through bindfs"
    with pytest.raises(OSError) as caught:
        Path(f"/proc/self/fd/{fd}/file").write_text("x")
    assert caught.value.errno == errno.EROFS
    os.close(fd)
    wait_until(lambda: not daemons(f"bindfs {tmp_path}"), what="bindfs ends")


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mount helper /…/mount.testfs to be written by the test."""
    monkeypatch.setattr(realmount, "_HELPER_PLACES", (str(tmp_path),))
    script = tmp_path / "mount.testfs"
    script.touch(0o755)
    return script


def test_a_helper_is_given_source_place_and_options(helper: Path, here: Target) -> None:
    check = '[ "$3 $4" = "-o ro,noatime,a=b" ] || exit 1'
    helper.write_text(f'#!/bin/sh\n{check}\nmount -t tmpfs "$1" "$2"; touch "$2/made"\n')
    fd = make(here, "testfs", int(MS.RDONLY), "noatime,a=b")
    inner = os.open(".", os.O_RDONLY, dir_fd=fd)
    assert os.listdir(inner) == ["made"]
    os.close(inner)
    os.close(fd)


@pytest.mark.parametrize(
    ("script", "number", "words"),
    [
        ("echo 'testfs: Connection refused' >&2; exit 32", errno.ECONNREFUSED, "testfs: Connection refused"),
        ("exit 32", errno.EIO, "ended with status 32"),
        ("exit 0", errno.EIO, "nothing is mounted"),
        ("kill -9 $$", errno.EIO, "status -9"),
    ],
)
def test_a_helper_that_fails(helper: Path, here: Target, script: str, number: int, words: str) -> None:
    helper.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(OSError, match=words) as caught:
        make(here, "testfs")
    assert caught.value.errno == number


def test_a_helper_that_cannot_be_executed(helper: Path, here: Target) -> None:
    helper.write_text("#!/nonesuch\n")
    with pytest.raises(OSError, match="cannot start mount helper"):
        make(here, "testfs")


def test_a_helper_that_hangs_is_killed(helper: Path, here: Target) -> None:
    helper.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {helper}.pid; wait\n")
    with pytest.raises(TimeoutError):
        make(here, "testfs", timeout=0.5)
    pid = Path(f"{helper}.pid").read_text().strip()
    wait_until(lambda: not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def test_a_source_that_comes_late(helper: Path, here: Target, tmp_path: Path) -> None:
    check = f'[ -e {tmp_path}/up ] || {{ echo "No route to host" >&2; exit 32; }}'
    helper.write_text(f'#!/bin/sh\n{check}\nmount -t tmpfs x "$2"\n')
    seen: List[int] = []

    def report(attempt: realmount.Attempt) -> None:
        seen.append(attempt.errno)
        if attempt.number == 3:
            (tmp_path / "up").touch()

    retry = Retry(RetryPolicy(first=0.001, limit=0.01), report=report)
    os.close(retry.run(lambda left: make(here, "testfs"), "src (testfs)"))
    assert seen == [errno.EHOSTUNREACH] * 3


def test_paths_are_the_targets(places: Places) -> None:  # noqa: F811
    pid = places.namespace("-m", "-n")
    private = places.path("only there")
    os.mkdir(private)
    subprocess.run(["nsenter", "-t", str(pid), "-m", "mount", "-t", "tmpfs", "x", private], check=True)
    subprocess.run(["nsenter", "-t", str(pid), "-m", "touch", f"{private}/seen"], check=True)
    with Target.pin(pid) as target:
        fd = make(target, "overlay", options=f"lowerdir={private}:/etc/opt")
    inner = os.open(".", os.O_RDONLY, dir_fd=fd)
    assert "seen" in os.listdir(inner)
    os.close(inner)
    os.close(fd)


def test_a_user_namespace_only_where_the_type_allows_it(places: Places) -> None:  # noqa: F811
    pid = places.namespace("-m", "-U", "-r")
    with Target.pin(pid) as target:
        os.close(make(target, "tmpfs", user_namespace=True))
        # debugfs may be mounted in the initial user namespace only: done there, at once.
        os.close(make(target, "debugfs", source="none", user_namespace=True))
