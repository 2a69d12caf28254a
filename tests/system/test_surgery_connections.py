"""Connections of unix sockets one end of which has a name on the old mount: made anew, with all that they are."""

from __future__ import annotations

import os
import resource
import socket
import struct
from typing import Iterator, List

import pytest
from replace_kit import Scene, scene
from surgery_kit import Mounts, Victim, mounts, victim
from test_surgery_sockets import can_be_listed, covered, over

from spfs.switch import SwitchReport
from spfs.testing import process_state, wait_until

__all__ = ["can_be_listed", "covered", "mounts", "scene", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

IMPORTS = "import array, ctypes, fcntl, os, select, signal, socket, struct, sys, termios, threading, time"


@pytest.fixture
def client() -> Iterator[Victim]:
    client = Victim()
    client.run(IMPORTS)
    yield client
    client.close()


@pytest.fixture
def server(covered: Mounts) -> Iterator[Victim]:
    server = Victim()
    server.run(IMPORTS)
    yield server
    server.close()


def meet(covered: Mounts, server: Victim, client: Victim, kind: str = "STREAM") -> None:
    """``listener`` and ``end`` in the server, ``end`` in the client."""
    path = str(covered.old / "bound")
    server.run(f"listener = socket.socket(socket.AF_UNIX, socket.SOCK_{kind}); listener.bind({path!r})")
    server.run("listener.listen(5)")
    client.run(f"end = socket.socket(socket.AF_UNIX, socket.SOCK_{kind}); end.connect({path!r})")
    server.run("end = listener.accept()[0]")


FACTS = """
def facts(end):
    peer = end.getsockopt(1, socket.SO_PEERCRED, 12), end.getsockopt(1, 59, 1024)
    options = [end.getsockopt(1, number) for number in (7, 8, 12, 16, 18, 34, 42)]
    times = end.getsockopt(1, 20, 16), end.getsockopt(1, 21, 16)
    flags = fcntl.fcntl(end, fcntl.F_GETFL), fcntl.fcntl(end, fcntl.F_GETOWN), fcntl.fcntl(end, fcntl.F_GETFD)
    found = os.fstat(end.fileno())
    return (end.getsockname(), end.getpeername(), peer, options, times, flags, found.st_uid, found.st_mode,
            array.array('i', fcntl.ioctl(end, termios.FIONREAD, bytes(4)))[0])
"""


@pytest.mark.parametrize("kind", ["STREAM", "SEQPACKET"])
def test_connection(covered: Mounts, server: Victim, client: Victim, kind: str) -> None:
    """Between two processes, with contents in both directions and everything set that can be set."""
    meet(covered, server, client, kind)
    server.run("end.setsockopt(1, 7, 50000); end.setsockopt(1, 8, 60000); end.setsockopt(1, 12, 3)")
    server.run("end.setsockopt(1, 20, struct.pack('qq', 7, 500000)); os.fchown(end.fileno(), 12, 34)")
    client.run("fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid()); end.setblocking(False)")
    client.run("os.set_inheritable(end.fileno(), True)")
    server.run("end.send(b'one'); end.send(b'two ' * 2000)")
    client.run("end.send(b'three'); end.send(b'four'); again = end.dup()")
    for one in (server, client):
        one.run(FACTS)
    before = server.run("facts(end)"), client.run("facts(end)")
    numbers = server.run("os.fstat(end.fileno()).st_ino"), client.run("os.fstat(end.fileno()).st_ino")
    report = covered.switch(when_stopped=over(covered))
    assert (report.moved, report.left, covered.users()) == ({"socket": 2}, [], [])
    assert (server.run("facts(end)"), client.run("facts(end)")) == before
    now = server.run("os.fstat(end.fileno()).st_ino"), client.run("os.fstat(end.fileno()).st_ino")
    assert not set(now) & set(numbers) and client.run("os.fstat(again.fileno()).st_ino") == now[1]
    whole = [b"one", b"two " * 2000], [b"three", b"four"]
    if kind == "STREAM":
        whole = [b"".join(whole[0])], [b"".join(whole[1])]
    assert [client.run("end.recv(100000)") for _ in whole[0]] == whole[0]
    assert [server.run("end.recv(100000)") for _ in whole[1]] == whole[1]
    client.run("again.send(b'later')")
    assert server.run("end.recv(9)") == b"later"
    client.run("end.close(); again.close()")
    assert server.run("end.recv(9)") == b""
    assert sorted(os.listdir(covered.new)) == ["bound"]
    with socket.socket(socket.AF_UNIX, getattr(socket, f"SOCK_{kind}")) as another:
        another.connect(str(covered.old / "bound"))
        assert struct.unpack("3i", another.getsockopt(1, socket.SO_PEERCRED, 12))[0] == server.pid
        server.run("other = listener.accept()[0]; other.send(b'welcome')")
        assert another.recv(9) == b"welcome"


def everywhere(report: SwitchReport, count: int) -> bool:
    assert (report.moved, [(one.what, one.reason) for one in report.left]) == ({"socket": count}, [])
    return True


def test_forked_server_with_epoll(covered: Mounts, client: Victim, server: Victim) -> None:
    """Workers that share the listener and an edge-triggered epoll instance; one sleeps in it, the client in recv."""
    meet(covered, server, client)
    server.run(
        """
e = select.epoll(); e.register(listener, 1); e.register(end, select.EPOLLIN | select.EPOLLET)
child = os.fork()
if not child:
    listener.close()
    while True:
        for number, _ in e.poll():
            if number == end.fileno():
                end.send(b'child ' + end.recv(100)); os._exit(0)
"""
    )
    client.start("end.recv(100)")
    client.blocked()
    assert everywhere(covered.switch(when_stopped=over(covered)), 3) and covered.users() == []
    server.run("end.send(b'awake')")
    assert client.result() == b"awake"
    assert client.run("end.send(b'work'); end.recv(100)") == b"child work"
    server.run("os.waitpid(child, 0)")


def test_in_one_process_and_many(covered: Mounts, client: Victim, server: Victim) -> None:
    """Several listeners, both ends in one process, some in another, the numbers of both full to the limit."""
    for name in ("a", "b"):
        server.run(f"{name} = socket.socket(socket.AF_UNIX); {name}.bind({str(covered.old / name)!r})")
        server.run(f"{name}.listen(99)")
    connect = """
ends = [socket.socket(socket.AF_UNIX) for _ in range(40)]
[end.connect({0!r} + '/' + 'ab'[index % 2]) for index, end in enumerate(ends)]
"""
    for one in (server, client):
        one.run(connect.format(str(covered.old)))
    server.run("got = [(a, b)[index % 2].accept()[0] for index in range(80)]")
    server.run("[end.send(b'%d' % index) for index, end in enumerate(got)]")
    client.run("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1, 4096))")
    assert everywhere(covered.switch(when_stopped=over(covered)), 82)
    seen = server.run("[end.recv(9) for end in ends]") + client.run("[end.recv(9) for end in ends]")
    assert sorted(seen) == sorted(b"%d" % index for index in range(80))
    client.run("[end.send(end.getsockname().encode() or b'%d' % index) for index, end in enumerate(ends)]")
    assert server.run("sorted(int(end.recv(9)) for end in got[40:])") == list(range(40))
    assert sorted(os.listdir(covered.new)) == ["a", "b"]


def left(report: SwitchReport) -> str:
    """Why the one connection was left; nothing else was."""
    (one,) = report.left
    assert (one.kind, one.path) == ("socket", "bound")
    return one.reason


def talks(server: Victim, client: Victim) -> bool:
    """Whether the connection works in both directions; it is empty then."""
    client.run("end.send(b'ping')")
    server.run("assert end.recv(9) == b'ping'; end.send(b'pong')")
    return bool(client.run("end.recv(9)") == b"pong")


def test_peer_that_is_not_chosen(covered: Mounts, client: Victim, server: Victim) -> None:
    """It is left, whole, and goes when it is asked for with both."""
    meet(covered, server, client)
    client.run("end.send(b'kept')")
    report = covered.switch(when_stopped=over(covered), chosen={server.pid})
    assert report.moved == {"socket": 1} and f"process {client.pid} (" in left(report)
    assert "is not among the processes to be moved" in left(report)
    assert server.run("end.recv(9)") == b"kept" and talks(server, client) and covered.users() == []
    client.run("end.send(b'later')")
    assert everywhere(covered.switch(chosen={server.pid, client.pid}), 1)
    assert server.run("end.recv(9)") == b"later" and talks(server, client)


def test_peer_that_cannot_be_stopped(covered: Mounts, server: Victim) -> None:
    """Here, the one who moves."""
    with socket.socket(socket.AF_UNIX) as end:
        server.run(f"listener = socket.socket(socket.AF_UNIX); listener.bind({str(covered.old / 'bound')!r})")
        server.run("listener.listen()")
        end.connect(str(covered.old / "bound"))
        server.run("end = listener.accept()[0]")
        report = covered.switch(when_stopped=over(covered))
        assert report.moved == {"socket": 1} and "found with nobody who can be stopped" in left(report)
        end.send(b"still")
        assert server.run("end.recv(9)") == b"still"
    assert "its other end is closed" in left(covered.switch())
    assert server.run("end.recv(9)") == b""


@pytest.mark.parametrize("how", ["WR", "RD", "RDWR"])
@pytest.mark.parametrize("kind", ["STREAM", "SEQPACKET"])
def test_shut_down(covered: Mounts, client: Victim, server: Victim, how: str, kind: str) -> None:
    """What was sent before can be read; then its end is seen."""
    meet(covered, server, client, kind)
    client.run(f"end.send(b'first'); end.shutdown(socket.SHUT_{how})")
    for one in (server, client):
        one.run("p = select.poll(); p.register(end, 0x2007)")  # POLLIN, POLLPRI, POLLOUT, POLLRDHUP
    before = server.run("p.poll(0)"), client.run("p.poll(0)")
    assert everywhere(covered.switch(when_stopped=over(covered)), 2)
    assert (server.run("p.poll(0)"), client.run("p.poll(0)")) == before
    assert server.run("end.recv(99)") == b"first"
    if "WR" in how:
        assert server.run("end.recv(99)") == b""
    for one, closed in ((client, "WR" in how), (server, "RD" in how)):
        one.run("def send():\n try: return end.send(b'more')\n except BrokenPipeError: return 'broken'")
        assert one.run("send()") == ("broken" if closed else 4)


@pytest.mark.parametrize("kind", ["STREAM", "SEQPACKET"])
def test_credentials_in_the_queue(covered: Mounts, client: Victim, server: Victim, kind: str) -> None:
    """Of several writers. One who has ended nobody can name again: it is left until that was read."""
    meet(covered, server, client, kind)
    server.run("end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)")
    client.run(
        """
child = os.fork()
if not child:
    end.send(b'child'); os._exit(0)
os.waitpid(child, 0)
"""
    )
    report = covered.switch(when_stopped=over(covered))
    assert report.moved == {"socket": 1} and "No such process" in left(report)
    receive = "data, more, _, _ = end.recvmsg(99, 99); (data, struct.unpack('iII', more[0][2]))"
    assert server.run(receive)[0] == b"child"
    client.run("end.send(b'one'); end.send(b'two')")
    client.run("credentials = struct.pack('iII', os.getpid(), 77, 88)")
    client.run("end.sendmsg([b'three'], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])")
    assert everywhere(covered.switch(), 1)
    for data in [b"onetwo"] if kind == "STREAM" else [b"one", b"two"]:
        assert server.run(receive) == (data, (client.pid, 0, 0))
    assert server.run(receive) == (b"three", (client.pid, 77, 88))


SEND = "end.sendmsg([{!r}], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', {}))])"
RECEIVE = """
numbers_seen = []
def receive(length):
    data, more, _, _ = end.recvmsg(length, 4096)
    numbers = array.array('i')
    [numbers.frombytes(content) for _, _, content in more]
    numbers_seen.extend(numbers)
    return data, [os.readlink(f'/proc/self/fd/{number}') for number in numbers]
"""


@pytest.mark.parametrize("kind", ["STREAM", "SEQPACKET"])
def test_descriptors_in_the_queue(covered: Mounts, client: Victim, server: Victim, kind: str) -> None:
    """Those that are not on the mount: where they come, and what they are."""
    meet(covered, server, client, kind)
    client.run("r, w = os.pipe(); null = os.open('/dev/null', 0); names = [os.readlink(f'/proc/self/fd/{r}')]")
    client.run("end.send(b'one'); end.send(b'two')")
    client.run(SEND.format(b"three", "[r, null]") + ";" + SEND.format(b"four", "[null]") + "; end.send(b'five')")
    client.run("os.close(r)")
    assert everywhere(covered.switch(when_stopped=over(covered)), 2)
    server.run(RECEIVE)
    pipe = client.run("names[0]")
    if kind == "STREAM":
        assert [server.run(f"receive({length})") for length in (4, 100, 100, 2, 100)] == [
            (b"onet", []),
            (b"wothree", [pipe, "/dev/null"]),
            (b"four", ["/dev/null"]),
            (b"fi", []),
            (b"ve", []),
        ]
    else:
        assert [server.run("receive(100)") for _ in range(5)] == [
            (b"one", []),
            (b"two", []),
            (b"three", [pipe, "/dev/null"]),
            (b"four", ["/dev/null"]),
            (b"five", []),
        ]
    assert talks(server, client)


def test_empty_messages(covered: Mounts, client: Victim, server: Victim) -> None:
    """They are messages, too. One that somebody has peeked at would not be seen any more: it is left."""
    meet(covered, server, client, "SEQPACKET")
    client.run("end.send(b''); end.send(b'two'); end.send(b'')")
    server.run("assert end.recv(9, socket.MSG_PEEK) == b''")
    assert "not all messages" in left(covered.switch(when_stopped=over(covered)))
    assert [server.run("end.recv(9)") for _ in range(3)] == [b"", b"two", b""]
    client.run("end.send(b'one'); end.send(b''); end.send(b'three'); end.send(b'')")
    assert everywhere(covered.switch(), 1)
    assert [server.run("end.recv(9)") for _ in range(4)] == [b"one", b"", b"three", b""]


def test_end_in_flight_itself(covered: Mounts, client: Victim, server: Victim) -> None:
    """Whoever receives it would have the old one: it is left, and goes when it was received."""
    meet(covered, server, client)
    server.run("a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [end.fileno()])")
    report = covered.switch(when_stopped=over(covered))
    assert "in flight in a socket itself" in left(report)
    server.run("other = socket.socket(fileno=socket.recv_fds(b, 9, 9)[1][0])")
    assert everywhere(covered.switch(), 2)
    client.run("end.send(b'both')")
    assert server.run("other.recv(2) + end.recv(2)") == b"both"


def test_what_cannot_be_made_again(covered: Mounts, client: Victim, server: Victim) -> None:
    """With an urgent byte, or a filter; it works on."""
    meet(covered, server, client)
    client.run("end.send(b'!', socket.MSG_OOB)")
    assert "urgent byte" in left(covered.switch(when_stopped=over(covered)))
    server.run("assert end.recv(1, socket.MSG_OOB) == b'!'")
    server.run(
        """
code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0xffffffff), 8)
end.setsockopt(1, 26, struct.pack('HxxxxxxP', 1, ctypes.addressof(code)))
"""
    )
    assert "packet filter" in left(covered.switch()) and talks(server, client)
    server.run("end.setsockopt(1, 27, 0)")
    assert everywhere(covered.switch(), 1) and talks(server, client)


def test_privileges_given_up(covered: Mounts, client: Victim, server: Victim) -> None:
    """The client connected as root, and is somebody else by now: nobody could be shown to be root in its place."""
    meet(covered, server, client)
    client.run("os.setgroups([12]); os.setgid(34); os.setuid(56)")
    report = covered.switch(when_stopped=over(covered))
    assert report.moved == {"socket": 1} and "has other ones by now" in left(report)
    assert talks(server, client) and covered.users() == []
    peer = server.run("struct.unpack('iII', end.getsockopt(1, socket.SO_PEERCRED, 12))")
    assert peer == (client.pid, 0, 0)


def test_as_another_user(covered: Mounts, client: Victim, server: Victim) -> None:
    """A client that may not connect any more, with groups; a server that may not bind."""
    server.run("os.umask(0)")
    path = str(covered.old / "bound")
    client.run(f"os.chdir({str(covered.old)!r}); os.setgroups([12, 13]); os.setgid(34); os.setuid(56)")
    server.run(f"listener = socket.socket(socket.AF_UNIX); listener.bind({path!r})")
    server.run("os.setgid(77); os.setuid(78); listener.listen(5)")
    client.run("end = socket.socket(socket.AF_UNIX); end.connect('bound'); os.chdir('/')")
    server.run("end = listener.accept()[0]")
    os.chmod(path, 0)
    assert everywhere(covered.switch(when_stopped=over(covered)), 2)
    assert server.run("struct.unpack('iII', end.getsockopt(1, socket.SO_PEERCRED, 12))") == (client.pid, 56, 34)
    assert server.run("struct.unpack('II', end.getsockopt(1, 59, 8))") == (12, 13)
    assert client.run("struct.unpack('iII', end.getsockopt(1, socket.SO_PEERCRED, 12))") == (server.pid, 78, 77)
    assert talks(server, client)


def test_one_who_cannot_be_operated_on(covered: Mounts, client: Victim, server: Victim) -> None:
    """Noticed when the others have their new ends already: they get the old ones back, with all that lies in them."""
    meet(covered, server, client)
    server.run(
        """
e = select.epoll(); e.register(end, select.EPOLLIN); (r, w) = os.pipe()
child = os.fork()
if not child:
    os.read(r, 1); os.write(end.fileno(), b'child'); os._exit(0)
"""
    )
    wait_until(lambda: process_state(server.run("child")) == "S")
    client.run("end.send(b'kept'); os.set_inheritable(end.fileno(), True)")
    before = server.run("os.fstat(end.fileno()).st_ino"), client.run("os.fstat(end.fileno()).st_ino")
    child = server.run("child")

    def leave_no_room() -> None:
        over(covered)()
        resource.prlimit(child, resource.RLIMIT_AS, (4096, 4096))  # that was not known ahead

    report = covered.switch(when_stopped=leave_no_room)
    assert {one.pid for one in report.left} == {server.pid, child}
    now = server.run("os.fstat(end.fileno()).st_ino"), client.run("os.fstat(end.fileno()).st_ino")
    assert now == before and client.run("os.get_inheritable(end.fileno())") is True
    assert server.run("e.poll(9) == [(end.fileno(), 1)] and end.recv(9)") == b"kept"
    server.run("os.write(w, b'x'); os.waitpid(child, 0)")
    assert client.run("end.recv(9)") == b"child" and talks(server, client)
    assert everywhere(covered.switch(), 1)
    client.run("end.send(b'more')")
    assert server.run("e.poll(9) == [(end.fileno(), 1)] and end.recv(9)") == b"more"


def test_one_who_is_killed(covered: Mounts, client: Victim, server: Victim) -> None:
    """While it stands still: the other one has the new end, reads what was sent, and sees the end."""
    meet(covered, server, client)
    client.run("end.send(b'last words')")

    def kill() -> None:
        over(covered)()
        client.process.kill()
        wait_until(lambda: process_state(client.pid) == "Z")

    report = covered.switch(when_stopped=kill)
    assert report.moved.get("socket", 0) >= 1
    assert server.run("end.recv(99)") == b"last words" and server.run("end.recv(99)") == b""
    assert not [name for name in os.listdir(covered.new) if name != "bound"]


def test_connected_datagram_sockets(covered: Mounts, client: Victim, server: Victim) -> None:
    """As loggers have them: each stays the socket it was, and sends to the new one; one sleeps in recv meanwhile."""
    path = str(covered.old / "bound")
    bind = "log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); log.bind({!r})"
    server.run(bind.format(path))
    for one in (client, server):
        one.run(f"end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); end.connect({path!r})")
    client.run("end.bind('\\0spfs-test-%d' % os.getpid())")
    number = client.run("os.fstat(end.fileno()).st_ino")
    server.start("log.recv(99)")
    server.blocked()
    assert everywhere(covered.switch(when_stopped=over(covered)), 1) and covered.users() == []
    assert client.run("os.fstat(end.fileno()).st_ino, end.getpeername()") == (number, path)
    client.run("end.send(b'one')")
    assert server.result() == b"one"
    server.run("end.send(b'two')")
    assert server.run("log.recv(99)") == b"two"
    client.run("end.send(b'three')")
    assert server.run("log.recvfrom(99)") == (b"three", b"\0spfs-test-%d" % client.pid)


def test_connected_datagram_sockets_out_of_reach(covered: Mounts, client: Victim, server: Victim) -> None:
    """What waits in one of them would be lost, and who is not stopped would go on sending to the old one."""
    path, back = str(covered.old / "bound"), str(covered.new.parent / "back")
    server.run(f"log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); log.bind({path!r})")
    client.run("end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)")
    client.run(f"end.bind({back!r}); end.connect({path!r})")
    server.run(f"log.sendto(b'answer', {back!r})")
    assert "messages wait in a socket" in left(covered.switch(when_stopped=over(covered)))
    assert client.run("end.recv(99)") == b"answer"
    assert "is not among the processes to be moved" in left(covered.switch(chosen={server.pid}))
    client.run("end.send(b'still')")
    assert server.run("log.recv(99)") == b"still"
    assert everywhere(covered.switch(), 1)
    client.run("end.send(b'new')")
    assert server.run("log.recv(99)") == b"new"


def test_one_that_the_mover_has(covered: Mounts, server: Victim) -> None:
    path = str(covered.old / "bound")
    server.run(f"log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); log.bind({path!r})")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.connect(path)
        assert "found with nobody who can be stopped" in left(covered.switch(when_stopped=over(covered)))
        end.send(b"still")
        assert server.run("log.recv(99)") == b"still"
    assert everywhere(covered.switch(), 1)


@pytest.mark.parametrize("kind", ["STREAM", "SEQPACKET"])
def test_files_of_the_mount_in_the_queue(covered: Mounts, client: Victim, server: Victim, kind: str) -> None:
    """The connection and what is in flight in it, at once."""
    path = covered.file("f", b"0123456789", b"abcdefghij")
    meet(covered, server, client, kind)
    client.run(f"fd = os.open({path!r}, 0); os.lseek(fd, 4, 0); end.send(b'one')")
    client.run(SEND.format(b"two", "[fd]") + "; os.close(fd); end.send(b'three')")
    report = covered.switch(when_stopped=over(covered))
    assert (report.moved, report.left, covered.users()) == ({"socket": 2, "descriptor in flight": 1}, [], [])
    server.run(RECEIVE + "got = [receive(3), receive(3), receive(5)]")
    assert server.run("[data for data, _ in got], got[1][1]") == ([b"one", b"two", b"three"], [str(covered.new / "f")])
    assert server.run("os.read(numbers_seen[0], 3)") == b"efg" and talks(server, client)


NAMESPACES = [
    ["unshare", "--mount"],
    ["unshare", "--net"],
    ["unshare", "--user", "--map-root-user", "--mount"],
    ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"],
]


@pytest.mark.parametrize("prefix", NAMESPACES, ids=lambda prefix: "".join(prefix[1:]))
def test_client_in_other_namespaces(covered: Mounts, server: Victim, prefix: List[str]) -> None:
    """It has connected before the mounts were switched, and does not see the name any more."""
    path = str(covered.old / "bound")
    client = Victim(prefix)
    try:
        client.run(IMPORTS)
        server.run(f"listener = socket.socket(socket.AF_UNIX); listener.bind({path!r}); listener.listen(5)")
        client.run(f"end = socket.socket(socket.AF_UNIX); end.connect({path!r}); end.send(b'kept')")
        server.run("end = listener.accept()[0]")
        for one in (server, client):
            one.run(FACTS)
        before = server.run("facts(end)"), client.run("facts(end)")
        assert everywhere(covered.switch(when_stopped=over(covered)), 2) and covered.users() == []
        assert (server.run("facts(end)"), client.run("facts(end)")) == before
        assert server.run("end.recv(9)") == b"kept" and talks(server, client)
    finally:
        client.close()


def test_listener_that_is_closed(covered: Mounts, client: Victim, server: Victim) -> None:
    """Nobody accepts any more; the name is there as it was, and leads to nobody."""
    meet(covered, server, client)
    server.run("listener.close()")
    client.run("end.send(b'kept')")
    assert everywhere(covered.switch(when_stopped=over(covered)), 1) and covered.users() == []
    assert server.run("end.recv(9)") == b"kept" and talks(server, client)
    assert client.run("end.getpeername()") == str(covered.old / "bound") and os.listdir(covered.new) == ["bound"]
    with socket.socket(socket.AF_UNIX) as other, pytest.raises(ConnectionRefusedError):
        other.connect(str(covered.old / "bound"))


def test_listener_with_a_backlog(covered: Mounts, client: Victim, server: Victim) -> None:
    """Who waits to be accepted cannot be handed over: nor can a connection by that name be made; later both can."""
    meet(covered, server, client)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(covered.old / "bound"))
        reasons = sorted(one.reason for one in covered.switch(when_stopped=over(covered)).left)
        assert "connections wait in it" in reasons[0] and "the socket that listens by its name" in reasons[1]
        server.run("other = listener.accept()[0]; other.close()")
    assert talks(server, client)
    assert everywhere(covered.switch(), 2) and talks(server, client)


def test_both_ends_have_names_there(covered: Mounts, client: Victim, server: Victim) -> None:
    path, mine = str(covered.old / "bound"), str(covered.old / "client")
    server.run(f"listener = socket.socket(socket.AF_UNIX); listener.bind({path!r}); listener.listen(5)")
    client.run(f"end = socket.socket(socket.AF_UNIX); end.bind({mine!r}); end.connect({path!r})")
    server.run("end, address = listener.accept()")
    assert server.run("address") == mine
    assert everywhere(covered.switch(when_stopped=over(covered)), 3) and covered.users() == []
    assert server.run("end.getpeername(), end.getsockname()") == (mine, path)
    assert client.run("end.getpeername(), end.getsockname()") == (path, mine) and talks(server, client)
    assert sorted(os.listdir(covered.new)) == ["bound", "client"]


def test_name_elsewhere(covered: Mounts, client: Victim, server: Victim) -> None:
    path, mine = str(covered.old / "bound"), "\0spfs-test-%d" % client.pid
    server.run(f"listener = socket.socket(socket.AF_UNIX); listener.bind({path!r}); listener.listen(5)")
    client.run(f"end = socket.socket(socket.AF_UNIX); end.bind({mine!r}); end.connect({path!r})")
    server.run("end = listener.accept()[0]")
    report = covered.switch(when_stopped=over(covered))
    assert report.moved == {"socket": 1} and "name of its own" in left(report) and talks(server, client)


def test_other_connections_by_the_same_numbers(covered: Mounts, client: Victim, server: Victim) -> None:
    """Between the examination and the standstill: closed and accepted again, passed on, forked."""
    meet(covered, server, client)
    path = str(covered.old / "bound")

    def between() -> None:
        number, other = server.run("end.fileno()"), client.run("end.fileno()")
        server.run("end.close()")
        client.run(f"end.close(); end = socket.socket(socket.AF_UNIX); end.connect({path!r})")
        server.run("end = listener.accept()[0]; again = end.dup()")
        assert (server.run("end.fileno()"), client.run("end.fileno()")) == (number, other)
        client.run("r, w = os.pipe(); child = os.fork()\nif not child:\n    os.read(r, 1); os._exit(0)")

    report = covered.prepared_switch(between=between, when_stopped=over(covered))[1]
    assert everywhere(report, 3) and covered.users() == []
    assert talks(server, client) and server.run("again.send(b'x')") == 1 and client.run("end.recv(9)") == b"x"
    client.run("end.close(); os.write(w, b'x'); os.waitpid(child, 0)")
    assert server.run("end.recv(9)") == b""


@pytest.mark.needs_fuse
def test_on_a_delayed_mount(scene: Scene, client: Victim) -> None:
    """The client holds nothing of the mount; strict is content, and the file system's process ends."""
    server = scene.victim()
    server.run(IMPORTS)
    scene.delay()
    path = str(scene.mnt / "bound")
    server.run(f"listener = socket.socket(socket.AF_UNIX); listener.bind({path!r}); listener.listen()")
    client.run(f"end = socket.socket(socket.AF_UNIX); end.connect({path!r}); end.send(b'kept')")
    server.run("end = listener.accept()[0]")
    scene.client.mode("stub")
    report = scene.replace(strict=True)
    assert report["moved"] == {"socket": 2} and report["left"] == [] and report["ended"]
    assert server.run("end.recv(9)") == b"kept" and talks(server, client)
    assert os.listdir(scene.export) == ["bound"]
