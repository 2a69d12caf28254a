"""Attaching, finding and unmounting, in our own and in other namespaces."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from mount_kit import Places, mounts_at, places, read_in  # noqa: F401

from spfs import mounts
from spfs.errors import SpfsError
from spfs.target import Target

pytestmark = pytest.mark.needs_root

NAMESPACES = [
    (),
    ("-m",),
    ("-m", "-U", "-r"),
    ("-m", "-n", "-p", "-f"),
    ("-m", "-n", "-p", "-f", "-U", "-r", "--mount-proc"),
]


@pytest.mark.parametrize("arguments", NAMESPACES, ids=" ".join)
def test_attached_found_and_unmounted(places: Places, arguments: "tuple[str, ...]") -> None:  # noqa: F811
    places.base()
    os.mkdir(places.path("mnt"))
    mount_fd = places.tmpfs(who="REAL")
    device = os.fstat(mount_fd).st_dev
    pid = places.namespace(*arguments) if arguments else os.getpid()
    with Target.pin(pid if arguments else None) as target:
        mounts.attach(mount_fd, target, places.path("mnt"))
        assert read_in(pid, places.path("mnt/who")) == "REAL"
        (found,) = mounts.instances(device)
        assert (found.mountpoint, found.root, found.namespace) == (places.path("mnt"), "", target.mount_namespace)
        assert found.pid is not None and found.nested == ()
        assert len(mounts_at("self", places.path("mnt"))) == (0 if arguments else 1)
        assert mounts.instances(device, source="spfs:a:1") == mounts.unmount(device, source="spfs:a:1") == []
        assert mounts.instances(device) == [found]  # of another name it was not touched
        assert mounts.unmount(device, source=found.mount.source) == []
        assert mounts.instances(device) == []


def test_beneath_a_root(places: Places) -> None:  # noqa: F811
    places.base()
    os.makedirs(places.path("tree/data"))
    mount_fd = places.tmpfs(who="REAL")
    pid = places.namespace("-m")
    with Target.pin(pid, root=places.path("tree")) as target:
        mounts.attach(mount_fd, target, "/data")
    assert read_in(pid, places.path("tree/data/who")) == "REAL"


@pytest.mark.parametrize("in_namespace", [False, True])
def test_bad_mountpoints(places: Places, in_namespace: bool) -> None:  # noqa: F811
    mount_fd = places.tmpfs()
    Path(places.path("file")).touch()
    with Target.pin(places.namespace("-m") if in_namespace else None) as target:
        for path, number, words in [
            (places.path("nonesuch"), errno.ENOENT, "make the directory first"),
            (places.path("file"), errno.ENOTDIR, "must be a directory"),
            ("relative", errno.EINVAL, "not an absolute path"),
        ]:
            with pytest.raises(SpfsError, match=f"cannot mount on .*{words}") as caught:
                mounts.attach(mount_fd, target, path)
            assert caught.value.errno == number
    assert mounts.instances(os.fstat(mount_fd).st_dev) == []


def test_the_target_died_and_only_the_pin_is_left(places: Places) -> None:  # noqa: F811
    places.base()
    os.mkdir(places.path("mnt"))
    mount_fd = places.tmpfs()
    device = os.fstat(mount_fd).st_dev
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", "echo; read x"], stdout=-1, stdin=-1)
    assert process.stdout is not None and process.stdout.readline()
    with Target.pin(process.pid) as target:
        process.kill()
        process.communicate()
        mounts.attach(mount_fd, target, places.path("mnt"))
        assert mounts.instances(device) == []  # nobody is in there
        (found,) = mounts.instances(device, [target])
        assert found.pid is None
        assert mounts.unmount(device, [target]) == []


def test_bind_mounts_copies_and_what_is_on_them(places: Places) -> None:  # noqa: F811
    places.base("shared")
    mount_fd = places.tmpfs("a/b")
    device = os.fstat(mount_fd).st_dev
    os.mkdir(places.path("mnt"))
    with Target.pin() as target:
        mounts.attach(mount_fd, target, places.path("mnt"))
    places.mount("--bind", places.path("mnt/a"), places.path("sub dir"))
    places.mount("-t", "tmpfs", "nested", places.path("mnt/a/b"))
    places.namespace("-m", "--propagation", "unchanged")
    found = mounts.instances(device)
    # The nested one is under both, as all is shared, and all is there twice.
    assert sorted((one.mountpoint[len(str(places.directory)) :], one.root, len(one.nested)) for one in found) == [
        ("/mnt", "", 1),
        ("/mnt", "", 1),
        ("/sub dir", "a", 1),
        ("/sub dir", "a", 1),
    ]
    assert len({one.namespace for one in found}) == 2 and len({one.mount_id for one in found}) == 4
    assert mounts.unmount(device) == []


def test_a_locked_mount_cannot_be_unmounted_and_is_returned(places: Places) -> None:  # noqa: F811
    places.base()
    os.mkdir(places.path("mnt"))
    mount_fd = places.tmpfs()
    with Target.pin() as target:
        mounts.attach(mount_fd, target, places.path("mnt"))
    pid = places.namespace("-m", "-U", "-r")  # a copy in a less privileged namespace: locked there
    (left,) = mounts.unmount(os.fstat(mount_fd).st_dev)
    assert left.pid == pid


def test_a_covered_mount_is_found_and_unmounted(places: Places) -> None:  # noqa: F811
    places.base()
    os.mkdir(places.path("mnt"))
    mount_fd = places.tmpfs()
    with Target.pin() as target:
        mounts.attach(mount_fd, target, places.path("mnt"))
    places.mount("-t", "tmpfs", "over", places.path("mnt"))
    (found,) = mounts.instances(os.fstat(mount_fd).st_dev)
    assert found.covered
    assert mounts.unmount(os.fstat(mount_fd).st_dev) == [found]  # its path leads to the other one, which is not ours
    assert mounts_at("self", places.path("mnt"))[-1][-2] == "over"
