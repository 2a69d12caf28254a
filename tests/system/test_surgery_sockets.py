"""Unix sockets bound on the old mount: those that wait for others are bound anew, the others are reported."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
from typing import Callable, Iterator

import pytest
from replace_kit import Scene, scene
from surgery_kit import Mounts, Victim, mounts, victim

from spfs.errors import SpfsError
from spfs.linux import sockdiag
from spfs.testing import wait_until

__all__ = ["mounts", "scene", "victim"]

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
        sockdiag.unix_sockets()
    except OSError as error:
        pytest.skip(f"this kernel does not list unix sockets (unix_diag): {error}")


def over(mounts: Mounts) -> Callable[[], None]:
    """What takes the new mount to where the old one is seen, as a replacement does."""

    def mount() -> None:
        mounts.keep_roots()
        subprocess.run(["mount", "--bind", str(mounts.new), str(mounts.old)], check=True)

    return mount


@pytest.fixture
def covered(mounts: Mounts) -> Iterator[Mounts]:
    yield mounts
    subprocess.run(["umount", "-l", str(mounts.old)], check=False)


def numbers(victim: Victim, *names: str) -> "set[str]":
    return {f"fd {number}" for number in victim.run(f"[one.fileno() for one in ({', '.join(names)},)]")}


@pytest.mark.parametrize("kind", ["STREAM", "SEQPACKET"])
def test_listening(covered: Mounts, victim: Victim, kind: str) -> None:
    """Who connects after the move is accepted, and sees the credentials of the one who listens."""
    path = covered.old / "bound"
    victim.run(
        f"""
os.umask(0o027)
one = socket.socket(socket.AF_UNIX, socket.SOCK_{kind}); one.bind({str(path)!r}); one.listen(7)
one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1); one.setblocking(False)
"""
    )
    inode = victim.run("os.fstat(one.fileno()).st_ino")
    report = covered.switch(when_stopped=over(covered))
    assert (report.moved, report.left, covered.users()) == ({"socket": 1}, [], [])
    assert victim.run("os.fstat(one.fileno()).st_ino, one.getsockname()") != (inode, str(path))
    assert victim.run("one.getsockname(), one.getsockopt(1, socket.SO_PASSCRED), one.getblocking()") == (
        str(path),
        1,
        False,
    )
    found = os.stat(covered.new / "bound")
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o750
    with socket.socket(socket.AF_UNIX, getattr(socket, f"SOCK_{kind}")) as client:
        client.connect(str(path))
        peer = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        assert peer[0] == victim.pid
        client.send(b"hello")
        assert victim.run("got, _ = one.accept(); got.recv(9)") == b"hello"
    there = [one for one in sockdiag.unix_sockets() if (one.device, one.inode) == (found.st_dev, found.st_ino)]
    (listed,) = [one for one in there if one.state == sockdiag.LISTENING]
    assert listed.limit == 7 and not [name for name in os.listdir(covered.new) if name.startswith(".spfs")]


def test_accepting_and_polling(covered: Mounts, victim: Victim) -> None:
    """One thread is blocked in accept(2), one waits for the socket by epoll."""
    victim.run(
        f"""
one, two = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
one.bind({str(covered.old / 'one')!r}); two.bind({str(covered.old / 'two')!r}); one.listen(); two.listen()
e = select.epoll(); e.register(two, select.EPOLLIN | select.EPOLLET)
accepted, ready = [], []
threads = [threading.Thread(target=lambda: accepted.append(one.accept())),
           threading.Thread(target=lambda: ready.append(e.poll(20)))]
[t.start() for t in threads]
"""
    )
    states = "[open(f'/proc/self/task/{t.native_id}/stat').read().split()[2] for t in threads]"
    wait_until(lambda: victim.run(states) == ["S", "S"])
    assert covered.switch(when_stopped=over(covered)).moved == {"socket": 2}
    clients = []
    for name in ("one", "two"):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(covered.old / name))
        clients.append(client)
    assert victim.run("[t.join(10) for t in threads]; len(accepted), ready == [[(two.fileno(), 1)]]") == (1, True)
    for client in clients:
        client.close()


def test_registered_by_a_number_that_was_closed(covered: Mounts, victim: Victim) -> None:
    """epoll(7), Q6: a duplicate keeps the socket, and who connects is announced."""
    path = str(covered.old / "bound")
    victim.run(
        f"""
one = socket.socket(socket.AF_UNIX); one.bind({path!r}); one.listen()
e = select.epoll(); e.register(one, select.EPOLLIN); number = one.fileno(); two = one.dup(); one.close()
"""
    )
    report = covered.switch(when_stopped=over(covered))
    assert (report.moved, report.left) == ({"socket": 1}, [])
    with socket.socket(socket.AF_UNIX) as client:
        assert victim.run("e.poll(0)") == []
        client.connect(path)
        assert victim.run("e.poll(5) == [(number, select.EPOLLIN)]")


def test_shared_by_workers(covered: Mounts, victim: Victim) -> None:
    """A server that has forked: all of them have the new one, by whichever descriptor."""
    victim.run(
        f"""
one = socket.socket(socket.AF_UNIX); one.bind({str(covered.old / 'bound')!r}); one.listen(); again = one.dup()
(r, w), (back, answer) = os.pipe(), os.pipe()
child = os.fork()
if not child:
    os.read(r, 1); got, _ = one.accept(); os.write(answer, got.recv(9)); os._exit(0)
"""
    )
    assert covered.switch(when_stopped=over(covered)).moved == {"socket": 4}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(covered.old / "bound"))
        client.send(b"worker")
        assert victim.run("os.write(w, b'x'); os.read(back, 9)") == b"worker"
        victim.run("os.waitpid(child, 0)")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(covered.old / "bound"))
        assert victim.run("again.accept() is not None")


def test_datagrams(covered: Mounts, victim: Victim) -> None:
    """By a relative address, whose beginning the process has left, over the socket that is left on the real side."""
    for root in (covered.old, covered.new):
        (root / "d").mkdir()
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    stale.bind(str(covered.new / "d" / "bound"))
    stale.close()
    os.chmod(covered.new / "d" / "bound", 0o606)
    os.chown(covered.new / "d" / "bound", 12, 34)
    victim.run("one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)")
    victim.run(f"os.chdir({str(covered.old)!r}); one.bind('d/bound'); os.chdir('/')")
    assert covered.switch(when_stopped=over(covered)).moved == {"socket": 1}
    found = os.stat(covered.new / "d" / "bound")
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o606, 12, 34)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.sendto(b"mail", str(covered.old / "d" / "bound"))
    assert victim.run("one.recv(9), one.getsockname()") == (b"mail", "d/bound")
    assert os.listdir(covered.new / "d") == ["bound"]


def test_what_waits_in_it_is_not_lost(covered: Mounts, victim: Victim) -> None:
    """A backlog, a queued message: it stays until they are gone."""
    victim.run(
        f"""
one = socket.socket(socket.AF_UNIX); one.bind({str(covered.old / 'one')!r}); one.listen()
two = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); two.bind({str(covered.old / 'two')!r})
"""
    )
    client, sender = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with client, sender:
        client.connect(str(covered.old / "one"))
        sender.sendto(b"message", str(covered.old / "two"))
        report = covered.switch()
        reasons = {left.path: left.reason for left in report.left}
        assert "connections wait" in reasons["one"] and "messages wait" in reasons["two"] and report.moved == {}
        assert victim.run("two.recv(9), one.accept()[1]") == (b"message", "")
    assert covered.switch(when_stopped=over(covered)).moved == {"socket": 2}


def test_what_does_not_lead_to_the_new_mount_stays(mounts: Mounts, victim: Victim) -> None:
    """And nobody is led away from it. They work on."""
    victim.run(BOUND.format(str(mounts.old)))
    victim.run("sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)")
    victim.run(f"sender.connect({str(mounts.old / 'datagram')!r})")
    report = mounts.switch()
    reasons = {left.what: left.reason for left in report.left}
    (accepted,), (datagram,), (listener,) = (numbers(victim, one) for one in ("accepted", "datagram", "listener"))
    assert reasons.keys() == {accepted, datagram, listener}
    assert "does not lead to the new mount" in reasons[accepted] and "not lead to the new" in reasons[datagram]
    assert "does not lead to the new mount" in reasons[listener]
    victim.run("client.send(b'still'); sender.send(b'there')")
    assert victim.run("accepted.recv(5) + datagram.recv(5)") == b"stillthere"


def test_socket_of_another_one_there(covered: Mounts, victim: Victim) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(covered.new / "bound"))
        other.listen()
        victim.run(f"one = socket.socket(socket.AF_UNIX); one.bind({str(covered.old / 'bound')!r}); one.listen()")
        (left,) = covered.switch(when_stopped=over(covered)).left
        assert "another socket is bound there" in left.reason
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(covered.new / "bound"))
            other.accept()[0].close()


def test_in_another_network_namespace(covered: Mounts) -> None:
    victim = Victim(["unshare", "--net"])
    try:
        victim.run(f"import os, socket; one = socket.socket(socket.AF_UNIX); one.bind({str(covered.old / 'bound')!r})")
        victim.run("one.listen()")
        assert covered.switch(when_stopped=over(covered)).moved == {"socket": 1}
        assert victim.run("import fcntl; ns = fcntl.ioctl(one, 0x894C); os.fstat(ns).st_ino") == os.stat(
            f"/proc/{victim.pid}/ns/net"
        ).st_ino
    finally:
        victim.close()


def test_sockets_that_come_between(covered: Mounts, victim: Victim) -> None:
    path = covered.file("f")
    victim.run(f"fd = os.open({path!r}, 0)")
    _, report = covered.prepared_switch(
        between=lambda: victim.run(BOUND.format(str(covered.old))), when_stopped=over(covered)
    )
    assert (report.moved, report.left) == ({"file": 1, "socket": 3}, [])


@pytest.mark.needs_fuse
def test_on_a_delayed_mount(scene: Scene) -> None:
    """A restorer binds it while the real file system is not there; strict refuses what cannot go, in stub mode."""
    victim = scene.victim()
    scene.delay()
    path = str(scene.mnt / "bound")
    connect = f"client = socket.socket(socket.AF_UNIX); client.connect({path!r}); got = one.accept()[0]"
    victim.run(f"import socket; one = socket.socket(socket.AF_UNIX); one.bind({path!r}); one.listen()")
    victim.run(connect + "; client.send(b'!', socket.MSG_OOB)")
    scene.client.mode("stub")
    with pytest.raises(SpfsError, match=r"fd \d+ \(bound\) of process \d+ .* an urgent byte waits"):
        scene.replace(strict=True)
    assert scene.client.held(scene.id) == []
    scene.untouched()
    victim.run("got.recv(1, socket.MSG_OOB); client.send(b'kept')")
    report = scene.replace(strict=True)
    assert report["moved"] == {"socket": 2} and report["ended"]
    assert victim.run("got.recv(9)") == b"kept"
    victim.run(connect)
    assert victim.run("client.send(b'x'); got.recv(1)") == b"x" and scene.export.joinpath("bound").is_socket()
