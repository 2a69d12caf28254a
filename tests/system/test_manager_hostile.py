"""Clients that do what no client should: the manager answers or drops them, and neither blocks, leaks nor changes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from manager_kit import ENVIRONMENT, TIMEOUT, TOP, Manager, manager_in, reading, run
from mount_kit import Places, places, read_in  # noqa: F401

from spfs import connection, requests
from spfs.client import ManagerClient
from spfs.errors import SpfsError
from spfs.testing import wait_until
from stubfs import wire
from stubfs.rules import Rule

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


def descriptors(manager: Manager) -> int:
    return len(os.listdir(f"/proc/{manager.pid}/fd"))


def clients_of(client: ManagerClient) -> int:
    """Besides ``client`` itself and the kit's first one."""
    return int(client.status()["manager"]["clients"]) - 2


def accepts(manager: Manager) -> bool:
    try:
        wire.connect(str(manager.socket)).close()
    except OSError:
        return False
    return True


def answer(sock: socket.socket) -> Optional[int]:
    """The status of the next answer; None at the end of the connection."""
    data = sock.recv(1 << 20)
    return struct.unpack("=i", data[:4])[0] if data else None


def test_a_client_that_has_said_all_gets_its_answers(manager: Manager, mnt: Path) -> None:
    """As "socat - UNIX-CONNECT:PATH,type=5" with a request on its standard input."""
    with manager.raw() as sock:
        for packet in (f"mount;id=a;mode=restore;mountpoint={mnt}\0".encode(), b'{"command": "status"}', b"nonsense"):
            sock.send(packet)
        sock.shutdown(socket.SHUT_WR)
        assert [answer(sock) for _ in range(4)] == [0, 0, -errno.EINVAL, None]
    assert manager.row("a")["state"] == "mounted"


def test_who_waits_and_dies_with_a_request_unread_leaves_nothing(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    client.replace("a", "none", "tmpfs", begin="hold")
    before = descriptors(manager)
    for _ in range(3):
        with manager.raw() as sock:
            sock.send(b'{"command": "wait", "id": "a"}')
            sock.send(b'{"command": "wait", "id": "a"}')
            wait_until(lambda: clients_of(client) == 1)
        wait_until(lambda: clients_of(client) == 0)
    assert descriptors(manager) == before


def test_two_who_want_the_same_place_at_the_same_time(manager: Manager, mnt: Path) -> None:
    with manager.raw() as one, manager.raw() as other:
        one.send(f"mount;id=a;mode=restore;mountpoint={mnt}\0".encode())
        other.send(f"mount;id=b;mode=restore;mountpoint={mnt}/\0".encode())
        assert [answer(one), answer(other)] == [0, -errno.EBUSY]
    client = manager.client()
    assert [row["id"] for row in client.status()["mounts"]] == ["a"]
    client.unmount("a")
    client.mount("b", str(mnt))
    # Not in the way of one that could not be mounted.
    with pytest.raises(SpfsError):
        client.mount("c", f"{mnt}/nonesuch")
    (mnt / "nonesuch").mkdir()
    client.mount("c", f"{mnt}/nonesuch")


def test_a_time_limit_of_years(manager: Manager, mnt: Path) -> None:
    """Longer than epoll_wait(2) can wait."""
    client = manager.client()
    client.mount("a", str(mnt))
    client.replace("a", "none", "tmpfs", begin="hold")
    with manager.raw() as waiting, manager.raw() as changes:
        waiting.send(b'{"command": "wait", "id": "a", "timeout": 999999999}')
        number = client.status()["changes"]
        changes.send(json.dumps({"command": "changes", "since": number, "timeout": 999999999}).encode())
        wait_until(lambda: clients_of(client) == 2)
        client.abort("a")
        assert (answer(waiting), answer(changes)) == (-errno.ECANCELED, 0)
    client.replace("a", "none", "tmpfs", begin="release", timeout=999999999)
    assert client.wait("a")["replace"]["phase"] == "done"
    subprocess.run(["umount", str(mnt)], check=True)


def test_a_cgroup_that_is_on_a_file_system_that_hangs(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    (mnt / "group").mkdir()
    client.mode("stub")
    with manager.raw() as sock:
        request = {"command": "switch", "source": str(tmp_path), "target": "/", "freeze_cgroup": str(mnt / "group")}
        sock.send(json.dumps(request).encode())
        wait_until(lambda: len(client.held()) == 1)
        assert client.status("a")["mounts"][0]["answering"]
        client.unmount("a", force=True)
        assert answer(sock) not in (0, None)


@pytest.mark.parametrize("path", ["group", "../mnt/group", "none/../group"])
def test_a_replace_whose_cgroup_is_on_a_file_system_that_hangs(manager: Manager, mnt: Path, path: str) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    (mnt / "group").mkdir()
    client.mode("stub")
    client.replace("a", "none", "tmpfs", freeze_cgroup=f"{mnt}/{path}", begin="hold")
    assert client.status("a")["mounts"][0]["answering"] and client.held() == []
    client.abort("a")


def test_what_holds_no_request(manager: Manager) -> None:
    before = descriptors(manager)
    with manager.raw() as sock:
        for packet in (b'{"memfd": ' + b"[" * 50_000, b'{"memfd": true}', b'{"memfd": -1}', b'{"memfd"'):
            sock.send(packet)
            assert answer(sock) == -errno.EPROTO
        memfd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            size = connection.MAX_REQUEST + 1
            os.truncate(memfd, size)
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
            socket.send_fds(sock, [b'{"memfd": %d}' % size], [memfd] * 250)
            assert answer(sock) == -errno.EMSGSIZE
        finally:
            os.close(memfd)
        socket.send_fds(sock, [b"mode;all;mode=stub"], [0] * 253)
        assert answer(sock) == 0
        assert descriptors(manager) == before + 1


def test_a_thousand_clients_that_never_say_anything(manager: Manager, mnt: Path) -> None:
    before = descriptors(manager)
    clients: List[socket.socket] = []
    try:
        for _ in range(1000):
            clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            clients[-1].connect(str(manager.socket))
        client = manager.client()
        client.mount("a", str(mnt))
        assert clients_of(client) == 1000
        client.unmount("a")
    finally:
        for sock in clients:
            sock.close()
    wait_until(lambda: clients_of(client) == 0)
    assert descriptors(manager) == before + 1


def test_a_connection_that_another_process_goes_on_with(manager: Manager) -> None:
    """Who may speak is asked once, when it connects; and a connection lives as long as anybody holds it."""
    with manager.raw() as sock:
        child = subprocess.run(
            [sys.executable, "-c", "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]));"
             "s.send(b'mode;all;mode=stub'); s.detach()", str(sock.fileno())],
            pass_fds=[sock.fileno()], timeout=TIMEOUT,
        )  # fmt: skip
        assert child.returncode == 0 and answer(sock) == 0


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 1 << 65), st.floats(), st.just(10**400),
    st.sampled_from(
        ["", "a", "b", "/", "/proc/self/fd/0", "/../..", "//x", "/nonesuch", "(null)", "a/../b", "\n\x1b[31m", "\ud800",
         "/" + "x" * 5000, "stub", "proxy", "restore", "hold", "tmpfs", "0", "-1", "EIO"]
    ),
    st.lists(st.sampled_from(["mnt", "net", "/a", "", "..", "x" * 300, 7, None, {"path": "../x", "mode": 0o100644}])),
)  # fmt: skip
# "a" is the mount of the test; what would really do something to it, or wait for ever, is left out.
HARMFUL = {"shutdown", "unmount", "wait", "changes", "replace", "mode", "rules", "switch"}
HARMLESS = sorted(set(requests.COMMANDS) - HARMFUL)
KEYS = st.sampled_from(
    ["id", "all", "mode", "mountpoint", "proxy_dir", "ns_pid", "ns_list", "root", "ns_mountpoint", "options", "files",
     "since", "timeout", "nonesuch"]
)  # fmt: skip
JSON = st.builds(
    lambda command, values: json.dumps({"command": command, **values}).encode(),
    st.sampled_from(HARMLESS) | st.text(max_size=5),
    st.dictionaries(KEYS, VALUES, max_size=5),
)
TEXT = st.builds(
    lambda words, tail: ";".join(words).encode(errors="surrogatepass") + tail,
    st.lists(st.sampled_from(
        ["mount", "replace", "switch", "status", "id=zz", "id=", "=x", "mountpoint=/nonesuch", "mountpoint=relative",
         "ns_pid=1", "ns_pid=99999999", "ns_list=mnt,,", "source=s", "type=t", "flags=-1", "flags=99999999999999999999",
         "bindmounts=(null)", "freeze_cgroup=/sys/fs/cgroup/freezer/(null)", "root=(null)", "all", "device=0"]
    ), max_size=8),
    st.sampled_from([b"", b"\0", b"\0\0", b"\0rw\0", b"\0a\0b\0", b"\xff"]),
)  # fmt: skip


@given(packets=st.lists(JSON | TEXT | st.binary(max_size=50) | st.binary(max_size=20).map(b"{".__add__), max_size=6),
       leave=st.booleans(), fds=st.integers(0, 3))  # fmt: skip
@settings(
    max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_whatever_is_sent_changes_nothing(
    fuzzed: Manager, packets: "List[bytes]", leave: bool, fds: int
) -> None:
    with ManagerClient(str(fuzzed.socket), TIMEOUT) as client:
        with fuzzed.raw() as sock:
            for packet in packets:
                socket.send_fds(sock, [packet], [0] * fds)
            if not leave:
                for packet in packets:
                    status = answer(sock)
                    assert status is not None and status <= 0, packet
        wait_until(lambda: clients_of(client) == 1, TIMEOUT)  # the fixture's
        (row,) = client.status()["mounts"]
        assert {key: row[key] for key in UNCHANGED} == UNCHANGED


UNCHANGED: Dict[str, Any] = {"id": "a", "state": "mounted", "mode": "restore", "replace": None, "answering": True}


@pytest.fixture
def fuzzed(manager: Manager, mnt: Path) -> Iterator[Manager]:
    with ManagerClient(str(manager.socket), TIMEOUT) as client:
        client.mount("a", str(mnt))
    remaining = manager.client()
    wait_until(lambda: clients_of(remaining) == 0, TIMEOUT)
    before = descriptors(manager)
    yield manager
    wait_until(lambda: descriptors(manager) == before)


def test_a_file_systems_clients(manager: Manager, mnt: Path) -> None:
    """On its own socket: who will send no more waits on, who is gone does not, and nonsense is answered."""
    client = manager.client()
    pid = client.mount("a", str(mnt))["pid"]
    client.mode("stub")
    path = str(manager.work / "fs-1.sock")

    def sockets() -> int:
        found = 0
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found += os.readlink(fd).startswith("socket:")
        return found

    wait_until(lambda: sockets() == 1)  # which it listens on; the manager's connection is gone
    with wire.connect(path, TIMEOUT) as waits, wire.connect(path, TIMEOUT) as talks:
        waits.send(b'{"command": "wait_held"}')
        waits.shutdown(socket.SHUT_WR)
        for packet in (b"\0", b"{", b"[]", b'{"command": []}', b'{"memfd": ' + b"[" * 50_000, b'{"command": "mode"}',
                       b'{"command": "wait_held", "count": -1}', b'{"command": "nodes", "nodes": [1.5]}'):  # fmt: skip
            socket.send_fds(talks, [packet], [0, 0])
            assert (answer(talks) or 0) < 0, packet
        assert client.status("a")["mounts"][0]["mode"] == "stub"
        with reading(mnt / "file"):
            assert answer(waits) == 0
    with wire.connect(path, TIMEOUT) as gone:
        gone.send(b'{"command": "wait_held", "count": 1000}')
        wait_until(lambda: sockets() == 2)
    wait_until(lambda: sockets() == 1)


def test_what_a_terminal_would_obey_is_not_printed(manager: Manager, mnt: Path) -> None:
    orders = "\x1b[2J\x9b31m\r\nfake line"
    client = manager.client()
    client.mount("a", str(mnt))
    path = f"{orders}/x"
    client.set_rules([Rule("hold", path=path)], "a")
    rules = run("spfs.cli.client", "rules", "--socket-path", str(manager.work / "fs-1.sock")).stdout
    client.replace("a", orders, "tmpfs", begin="release")
    shown = [run("spfs.cli.spfs", "wait", "a", "--socket-path", str(manager.socket)).stdout]
    shown += [run("spfs.cli.spfs", "status", "--socket-path", str(manager.socket)).stdout]
    shown += [rules, manager.log()]
    subprocess.run(["umount", str(mnt)], check=True)
    for text in shown:
        assert text.replace("\n", "").isprintable() and "\nfake" not in text, text
        assert "fake line" in text
    assert r"\x1b[2J\x9b31m\r\nfake line" in shown[0]


# Containers


def test_nothing_that_a_container_has_prepared_is_run_or_believed(
    manager: Manager, places: Places, tmp_path: Path  # noqa: F811
) -> None:
    """Its own Python library, our package, programs, /proc, and a link for a mountpoint."""
    for name in ("evil", "mnt", "elsewhere", "proc"):
        (tmp_path / name).mkdir()
    ran = tmp_path / "ran"
    library = Path(os.__file__).parent
    for place in (library, TOP / "spfs", TOP / "stubfs"):
        for path in [*place.glob("*.py"), *place.glob("*/__init__.py"), *place.glob("linux/*.py")]:
            copy = tmp_path / "evil" / path.relative_to(place)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(f"open({str(ran)!r}, 'a').write(__file__)\n")
    for name in ("mount.tmpfs", "mount.fuse", "fusermount", "umount", "mount"):
        (tmp_path / "evil" / name).write_text(f"#!/bin/sh\necho $0 >> {ran}\n")
        (tmp_path / "evil" / name).chmod(0o755)
    pid = places.namespace("-m", "-p", "-f", "--mount-proc")
    (tmp_path / "link").symlink_to(tmp_path / "mnt")
    script = [f"mount -t tmpfs none {tmp_path}/proc", f"mkdir -p {tmp_path}/proc/self/ns",
              f"echo '1 1 0:1 / / rw - fake fake rw' > {tmp_path}/proc/self/mountinfo",
              *(f"mount --bind {tmp_path}/evil {path}" for path in [library, TOP / "spfs", TOP / "stubfs"]),
              f"mount --bind {tmp_path}/proc /proc", f"mount --bind {tmp_path}/evil /usr/sbin"]  # fmt: skip
    subprocess.run(["nsenter", "-t", str(pid), "-m", "/bin/sh", "-c", " && ".join(script)], check=True)
    client = manager.client()
    client.mount("a", str(tmp_path / "link"), ns_pid=pid)
    client.create("a", [{"path": "file", "mode": 0o100644}])
    assert read_in(pid, f"{tmp_path}/mnt/file") == ""
    client.mode("stub")
    client.replace("a", "none", "tmpfs", options="size=1m", begin="release")
    report = client.wait("a")["replace"]["report"]
    assert report["mounts_left"] == [] and not Path(f"/proc/{pid}/root{tmp_path}/mnt/file").exists()
    client.mount("b", str(tmp_path / "elsewhere"), ns_pid=pid)
    client.unmount("b")
    wait_until(lambda: client.status()["mounts"] == [])
    assert not ran.exists(), ran.read_text()


# Where it works


def test_the_current_directory_is_no_place_for_modules(tmp_path: Path, mnt: Path) -> None:
    """A manager in the foreground, started in somebody else's directory: what lies there would be run by root."""
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("argparse", "stubfs", "logging", "fuse"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code = "import sys; sys.path[0] = '/'; from spfs.cli.manager import main; main(sys.argv[1:])"
    with manager_in(tmp_path) as manager:
        with subprocess.Popen(
            # -I -c, as a console script does: it does not look in the current directory itself.
            [sys.executable, "-c", code, "--work-dir", str(manager.work)], cwd=hostile,
            env={**os.environ, **ENVIRONMENT, "PYTHONSAFEPATH": ""}, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                wait_until(lambda: accepts(manager))
                with ManagerClient(str(manager.socket), TIMEOUT) as client:
                    manager.pid = client.status()["manager"]["pid"]
                    client.mount("a", str(mnt))
                    client.shutdown(unmount=True, force=True)
                assert process.wait(TIMEOUT) == 0
                manager.pid = 0
            finally:
                process.kill()
    assert not (tmp_path / "ran").exists()


def test_what_else_is_in_the_work_directory_stays(tmp_path: Path) -> None:
    with manager_in(tmp_path) as manager:
        manager.work.mkdir(0o700)
        foreign = {"package.json": '{"version": 1}', "data.jsonl": "{}", "empty.log": "", "x.json.new": "",
                   "mount-a.json": "{}", "lock.json": "{}"}  # fmt: skip
        for name, text in foreign.items():
            (manager.work / name).write_text(text)
        manager.start()
        manager.client().shutdown()
        manager.wait_ended()
        assert "cannot" not in manager.log()
        (manager.work / "spfs-manager.log").unlink()
        assert {path.name: path.read_text() for path in manager.work.iterdir()} == foreign


def test_a_socket_that_another_manager_has_made_meanwhile_stays(tmp_path: Path) -> None:
    """As when a cleaner of temporary files has removed the first one's."""
    with manager_in(tmp_path) as manager:
        manager.start()
        manager.socket.unlink()
        other = wire.listen(str(manager.socket))
        try:
            manager.stop()
            assert manager.socket.is_socket()
        finally:
            other.close()
            manager.socket.unlink()
