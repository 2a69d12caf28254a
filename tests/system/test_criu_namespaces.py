"""Restores in mount namespaces of their own, with mounts of one file system at several places and others on them."""

from __future__ import annotations

import os
import socket
from typing import Optional

import pytest
from criu_kit import World, world

from spfs.criu.delayed import Wish
from spfs.criu.observe import Observed
from spfs.linux.mountapi import MS

__all__ = ["world"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_criu]


def delayed(world: World, path: str, key: str = "data") -> str:
    return f"{key}={path},type=none,source={world.export},flags={int(MS.BIND)}"


OPEN = """
import os
fds = [os.open(path, os.O_RDWR) for path in ("/mnt/file", "/srv/inner")]
nested = os.open("/mnt/nested/own", os.O_RDWR | os.O_CREAT); os.write(nested, b"of the nested one")
os.chdir("/mnt/sub")
"""
MOUNTS = "sorted(line.split()[4] + ' ' + line.split(' - ')[1].split()[0] for line in open('/proc/self/mountinfo'))[1:]"
REPORT = """
([os.read(fd, 100) for fd in fds], os.pread(nested, 100, 0), open("/mnt/nested/own").read(), os.getcwd(),
 os.listdir("."), open("/srv/inner").read())
"""


def test_a_mount_namespace_with_two_views_and_a_nested_mount(world: World) -> None:
    (world.export / "sub").mkdir()
    (world.export / "nested").mkdir()
    (world.export / "file").write_bytes(b"of the server")
    (world.export / "sub/inner").write_bytes(b"further down")
    subject = world.container(
        "subject",
        {"/mnt": world.export, "/srv": world.export / "sub"},
        setup="mount -t tmpfs nested mnt/nested",
    )
    subject.run(OPEN)
    world.dump_container(subject, "--delayed", delayed(world, "/mnt"))
    world.server_goes()
    world.restore_container(subject)
    assert world.types() == []  # on no path of ours
    subject.start(REPORT)
    world.somebody_waits()
    world.server_comes()
    reports = world.wait()
    contents, nested, again, here, listed, inner = subject.result()
    assert (contents, nested, again) == ([b"of the server", b"further down"], b"of the nested one", nested.decode())
    assert (here, listed, inner) == ("/mnt/sub", ["inner"], "further down")
    mounts = ["/media tmpfs", "/mnt tmpfs", "/mnt/nested tmpfs", "/proc proc", "/srv tmpfs"]
    assert subject.run(MOUNTS) == mounts
    assert reports["data"]["left"] == [] and reports["data"]["ended"]


def test_restored_dumped_and_restored_again(world: World) -> None:
    """The images of the second dump know nothing of the first restore."""
    (world.export / "file").write_bytes(b"0123456789")
    subject = world.container("subject", {"/mnt": world.export})
    subject.run("import os; fd = os.open('/mnt/file', os.O_RDWR)")
    for round in range(2):
        world.dump_container(subject, "--delayed", delayed(world, "/mnt"))
        world.server_goes()
        world.restore_container(subject)
        subject.start("os.read(fd, 3)")
        world.somebody_waits()
        world.server_comes()
        assert subject.result() == [b"012", b"345"][round]
        assert world.wait()["data"]["left"] == []
        world.new_images()
    assert subject.run(MOUNTS) == ["/media tmpfs", "/mnt tmpfs", "/proc proc"]


def test_two_delayed_mounts_whose_servers_come_one_after_the_other(world: World) -> None:
    other = world.real / "other"
    other.mkdir()
    (other / "file").write_bytes(b"of the other")
    (world.export / "file").write_bytes(b"of the one")
    world.mount_tmpfs(world.base / "second")
    subject = world.container("subject", {"/mnt": world.export, "/srv": world.base / "second"})
    subject.run("import os; fds = [os.open(path, os.O_RDWR | os.O_CREAT) for path in ('/mnt/file', '/srv/file')]")
    late = world.real / "late"
    world.dump_container(
        subject,
        "--delayed", delayed(world, "/mnt", "one"),
        "--delayed", f"other=/srv,type=none,source={late},flags={int(MS.BIND)}",
    )  # fmt: skip
    world.restore_container(subject)
    client = world.client()
    ids = {row["id"].partition("@")[0]: row["id"] for row in world.rows()}
    assert client.wait(ids["one"], 20)["replace"]["report"]["left"] == []
    assert subject.run("os.read(fds[0], 100)") == b"of the one"
    subject.start("os.read(fds[1], 100)")
    world.somebody_waits()
    other.rename(late)
    assert subject.result() == b"of the other"
    assert client.wait(ids["other"], 20)["replace"]["report"]["left"] == []


@pytest.mark.parametrize("user", [None, 0, 100000], ids=["no user namespace", "the same ids", "shifted ids"])
def test_in_other_namespaces(world: World, user: Optional[int]) -> None:
    (world.export / "file").write_bytes(b"contents")
    (world.export / "file").chmod(0o600)
    for path in (world.export, world.export / "file"):
        os.chown(path, user or 0, user or 0)
    # CRIU 4.1 cannot restore the network's sysctls within a user namespace.
    others = ["--uts", "--ipc"] if user is not None else ["--uts", "--ipc", "--net"]
    subject = world.container("subject", {"/mnt": world.export}, *others, user=user)
    subject.run("import os; fd = os.open('/mnt/file', os.O_RDWR); gone = os.open('/mnt/g', os.O_RDWR | os.O_CREAT)")
    subject.run("os.write(gone, b'ghost'); os.unlink('/mnt/g')")
    network = ["--network-lock", "skip"]  # there is no connection
    world.dump_container(subject, "--delayed", delayed(world, "/mnt"), *network)
    world.server_goes()
    world.restore_container(subject, *network)
    subject.start("(os.read(fd, 100), os.pread(gone, 100, 0), os.stat('/mnt/file').st_uid)")
    world.somebody_waits()
    world.server_comes()
    assert subject.result() == (b"contents", b"ghost", 0)
    assert world.wait()["data"]["mounts_left"] == []
    assert set(subject.run(MOUNTS)) == {"/media tmpfs", "/mnt tmpfs", "/proc proc"}


@pytest.mark.parametrize("network", ["host", "container"])
def test_the_network_that_the_real_mount_is_made_in(world: World, network: str) -> None:
    """sysfs shows the interfaces of the network namespace that it was mounted in."""
    ours = sorted(name for _, name in socket.if_nameindex())
    if ours == ["lo"]:
        pytest.skip("needs a network interface beside lo, by which two network namespaces can be told apart")
    subject = world.container("subject", {"/mnt": world.export}, "--net")
    subject.run("import os; os.chdir('/mnt')")
    lock = ["--network-lock", "skip"]
    world.dump_container(subject, "--delayed", f"data=/mnt,type=sysfs,source=sysfs,network={network}", *lock)
    world.restore_container(subject, *lock)
    interfaces = subject.run("sorted(os.listdir('class/net'))")
    assert world.wait()["data"]["left"] == []
    assert interfaces == (ours if network == "host" else ["lo"])


def test_who_has_mounted_it_decides_about_the_network(world: World) -> None:
    """A volume was mounted by the host; what the host does not have, the container has mounted itself."""
    binds = {"/mnt": world.export}
    subject = world.container("subject", binds, "--net", setup="mount -t tmpfs own srv")
    wishes = [Wish("volume", "/mnt", "none", "/x", 4096), Wish("own", "/srv", "nfs4", "server:/")]
    with Observed(subject.pid, wishes) as observed:
        assert {mount.key: mount.network for mount in observed.mounts} == {"volume": "host", "own": "container"}
    same = world.container("same", binds, setup="mount -t tmpfs own srv")
    with Observed(same.pid, wishes) as observed:
        assert {mount.network for mount in observed.mounts} == {"host"}
