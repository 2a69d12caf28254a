"""The one who makes connections anew is killed in the middle: lost is what is said to be, and asked again it goes."""

from __future__ import annotations

import errno
import os
import signal
import stat
from typing import Any, Callable

import pytest
from surgery_kit import Mounts, Victim, mounts, tasks_stopped, victim
from test_surgery_connections import client, everywhere, meet, server, talks
from test_surgery_death import die
from test_surgery_sockets import can_be_listed, covered, over

from spfs.surgery import execution, operation, socketpairs, socketqueue

__all__ = ["can_be_listed", "client", "covered", "mounts", "server", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


def killed_at(covered: Mounts, owner: Any, name: str, replacement: Callable[..., Any], **options: Any) -> None:
    """A switch by a process that kills itself there."""
    pid = os.fork()
    if pid == 0:
        try:
            setattr(owner, name, replacement)
            covered.switch(exclude={os.getppid()}, **options)
        finally:
            os._exit(1)  # not killed
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def names(mounts: Mounts) -> "list[str]":
    return sorted(os.listdir(mounts.new))


@pytest.mark.parametrize("where", ["_listen", "_connect", "_accept", "_complete"])
def test_while_connections_are_made(covered: Mounts, client: Victim, server: Victim, where: str) -> None:
    """The old ones are whole, but the name is hidden. Asked again it is back, with its permissions and nothing else."""
    meet(covered, server, client)
    server.run(f"os.chmod({str(covered.old / 'bound')!r}, 0o640)")
    covered.keep_roots()
    over(covered)()
    killed_at(covered, socketpairs, where, die)
    assert tasks_stopped(client.pid) == tasks_stopped(server.pid) == []
    assert talks(server, client) and len(names(covered)) == 1
    assert everywhere(covered.switch(), 2) and talks(server, client)
    assert names(covered) == ["bound"] and covered.users() == []
    client.run(f"other = socket.socket(socket.AF_UNIX); other.connect({str(covered.old / 'bound')!r})")
    server.run("other = listener.accept()[0]; other.send(b'right')")
    assert client.run("other.recv(9)") == b"right"


def test_while_one_is_made_by_the_name_of_a_listener_that_has_gone_before(
    covered: Mounts, client: Victim, server: Victim
) -> None:
    """Its node is the one that is hidden: another one in its place would lead to nobody."""
    meet(covered, server, client)
    client.run("end.send(b'!', socket.MSG_OOB)")
    left = covered.switch(when_stopped=over(covered)).left
    assert ["urgent byte" in one.reason for one in left] == [True] and names(covered) == ["bound"]
    (covered.new / "bound").chmod(0o600)
    server.run("end.recv(1, socket.MSG_OOB)")
    killed_at(covered, socketpairs, "_connect", die)
    assert names(covered) != ["bound"] and len(names(covered)) == 1
    assert everywhere(covered.switch(), 1) and talks(server, client)
    assert names(covered) == ["bound"] and stat.S_IMODE((covered.new / "bound").stat().st_mode) == 0o600
    client.run(f"other = socket.socket(socket.AF_UNIX); other.connect({str(covered.old / 'bound')!r})")
    server.run("other = listener.accept()[0]; other.send(b'right')")
    assert client.run("other.recv(9)") == b"right"


def test_when_one_has_his_new_end_and_the_other_has_not(covered: Mounts, client: Victim, server: Victim) -> None:
    """The connection ends for both, as if each had been left by the other."""
    meet(covered, server, client)
    client.run("end.settimeout(9); file = open('/dev/null')")
    server.run("end.settimeout(9)")
    covered.keep_roots()
    over(covered)()
    operate = execution.operate

    def only_one(theatre: Any, works: Any, *given: Any) -> None:
        whole = any(isinstance(work, operation.Operation) for work in works)
        operate(theatre, works[:1] if whole else works, *given)  # errands before that are done as ever
        if whole:
            die()

    killed_at(covered, execution, "operate", only_one)
    assert tasks_stopped(client.pid) == tasks_stopped(server.pid) == []
    read = "try:\n got = end.recv(9)\nexcept OSError as error:\n got = error.errno\ngot"
    assert all(one.run(read) in (b"", errno.ECONNRESET) for one in (server, client))
    report = covered.switch()
    assert [one for one in report.left if "closed" not in one.reason and "nobody" not in one.reason] == []
    for one in (server, client):
        one.run("end.close()")
    assert covered.switch().left == [] and covered.users() == [] and names(covered) == ["bound"]
    assert client.run("file.read()") == ""


def test_between_sending_and_taking_what_was_in_flight(covered: Mounts, client: Victim, server: Victim) -> None:
    """It is read twice; the second time with what it is to be."""
    covered.file("f")
    server.run("here, there = socket.socketpair()")
    server.run(f"fd = os.open({str(covered.old / 'f')!r}, os.O_RDONLY); socket.send_fds(here, [b'take'], [fd])")
    server.run("os.close(fd)")
    covered.keep_roots()
    over(covered)()
    killed_at(covered, socketqueue, "_take", die)
    assert tasks_stopped(server.pid) == []
    got = server.run("[(m, os.pread(f[0], 3, 0)) for m, f, _, _ in (socket.recv_fds(there, 4, 1) for _ in range(2))]")
    assert got == [(b"take", b"old"), (b"take", b"new")]
    assert server.run("there.setblocking(False)") is None
