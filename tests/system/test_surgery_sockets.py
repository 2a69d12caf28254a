"""Unix sockets bound on the old mount: reported, with whose and where, and no file system is asked for that."""

from __future__ import annotations

import pytest
from replace_kit import Scene, scene
from surgery_kit import Mounts, Victim, mounts

from spfs.errors import SpfsError
from spfs.linux import sockdiag

__all__ = ["mounts", "scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

BOUND = """
import os, socket
listener = socket.socket(socket.AF_UNIX)
listener.bind({0!r} + '/stream')
listener.listen()
client = socket.socket(socket.AF_UNIX)
client.connect({0!r} + '/stream')
accepted, _ = listener.accept()
datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
datagram.bind({0!r} + '/datagram')
abstract = socket.socket(socket.AF_UNIX)
abstract.bind('\\0spfs-test-%d' % os.getpid())
pair = socket.socketpair()
"""


@pytest.fixture(autouse=True)
def can_be_listed() -> None:
    try:
        sockdiag.bound_sockets()
    except OSError as error:
        pytest.skip(f"this kernel does not list unix sockets (unix_diag): {error}")


@pytest.mark.parametrize("prefix", [[], ["unshare", "--net"]], ids=["here", "other namespace"])
def test_bound_sockets(mounts: Mounts, prefix: "list[str]") -> None:
    victim, bystander = Victim(prefix), Victim()
    try:
        victim.run(BOUND.format(str(mounts.old)))
        bystander.run("import socket; pair = socket.socketpair()")
        preparation, report = mounts.prepared_switch()
        numbers = victim.run("{'stream': (listener.fileno(), accepted.fileno()), 'datagram': (datagram.fileno(),)}")
        expected = {(path, f"fd {number}") for path, some in numbers.items() for number in some}
        assert {(one.path, one.what) for one in report.left} == expected
        assert {(one.pid, one.kind) for one in report.left} == {(victim.pid, "socket")}
        assert all("not moved" in one.reason for one in report.left)
        assert preparation.left == report.left and preparation.processes.keys() == {victim.pid}
        # They work on.
        assert victim.run("client.send(b'still'); accepted.recv(5)") == b"still"
        victim.run("[one.close() for one in (listener, accepted, datagram)]")
        assert mounts.switch().left == []
    finally:
        victim.close()
        bystander.close()


def test_sockets_that_come_between(mounts: Mounts) -> None:
    victim = Victim()
    try:
        path = mounts.file("f")
        victim.run(f"fd = __import__('os').open({path!r}, 0)")
        _, report = mounts.prepared_switch(between=lambda: victim.run(BOUND.format(str(mounts.old))))
        assert report.moved == {"file": 1} and len(report.left) == 3
    finally:
        victim.close()


@pytest.mark.needs_fuse
def test_the_file_system_is_not_asked(scene: Scene) -> None:
    """In stub mode, where a request would wait for ever; with strict that is where it ends."""
    victim = scene.victim()
    scene.delay()
    victim.run(f"import socket; one = socket.socket(socket.AF_UNIX); one.bind({str(scene.mnt / 'bound')!r})")
    scene.client.mode("stub")
    with pytest.raises(SpfsError, match=r"fd \d+ \(bound\) of process \d+ .* sockets are not moved"):
        scene.replace(strict=True)
    assert scene.client.held(scene.id) == []
    scene.untouched()
