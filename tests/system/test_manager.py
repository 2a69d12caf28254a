"""What a manager does for its clients, with real file systems: mounts, modes, files, unmounts; and bad requests."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

import pytest
from manager_kit import ENVIRONMENT, Manager, alive, end, manager_in, reading

from spfs.client import ManagerClient
from spfs.errors import SpfsError
from spfs.testing import process_state, wait_until
from stubfs.rules import Rule

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    return directory(tmp_path, "mnt")


def directory(base: Path, name: str) -> Path:
    path = base / name
    path.mkdir()
    return path


def mounted_at(path: Path, pid: object = "self") -> List[str]:
    """The file system types mounted at ``path``, as ``pid`` sees it, by mountinfo alone."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line.split(" - ")[1].split()[0] for line in lines if line.split()[4] == str(path)]


def mounts_below(path: Path) -> List[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {path}/" in line]


@contextmanager
def refused(number: int, words: str) -> Iterator[None]:
    with pytest.raises(SpfsError, match=words) as caught:
        yield
    assert caught.value.errno == number


def test_mount_use_and_unmount(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    answer = client.mount("a", str(mnt))
    assert mounted_at(mnt) == ["fuse.stubfs"]
    (mnt / "file").write_text("x")
    row = manager.row("a")
    assert (row["state"], row["mode"], row["mountpoint"]) == ("mounted", "restore", str(mnt))
    assert row["device"] == os.stat(mnt).st_dev and row["pid"] == answer["pid"] and row["answering"]
    assert client.unmount("a")["ended"]
    assert mounted_at(mnt) == [] and not alive(answer["pid"])
    assert not os.path.exists(answer["control"])
    assert client.status()["mounts"] == [] and manager.row("a")["end"] == "unmounted"
    client.mount("a", str(mnt))  # the id is free again


def test_the_modes(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    real = directory(tmp_path, "real")
    (real / "file").write_text("real")
    client = manager.client()
    client.mount("a", str(mnt))
    assert client.mode("stub", "a") == ["a"]
    with reading(mnt / "file") as reader:
        wait_until(lambda: client.held())
        (held,) = client.held("a")
        assert (held["id"], held["pid"], held["command"], held["name"]) == ("a", reader.pid, "cat", "file")
        assert manager.row("a")["held"] == 1
        with refused(errno.EBUSY, "1 held requests"):
            client.unmount("a")
        client.mode("proxy", "a", proxy_dir=str(real))
        assert reader.communicate(timeout=10)[0] == b"real"
    assert manager.row("a")["mode"] == "proxy"


def test_options_of_stub_mode_and_rules(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    (mnt / "file").write_text("x")
    client.mode("stub", "a", timeout=0.1, errno="ENODATA", exempt=[os.getpid()])
    assert (mnt / "file").read_text() == "x"
    with reading(mnt / "file") as reader:
        assert os.strerror(errno.ENODATA).encode() in reader.communicate(timeout=10)[1]
    assert client.set_rules([Rule("fail", operations=["unlink"])], "a") == ["a"]
    assert client.rules() == {"a": [Rule("fail", operations=["unlink"])]}
    with refused(errno.ESRCH, "cannot change the mode"):
        client.mode("stub", "a", exempt=[2**22])
    assert (mnt / "file").read_text() == "x", "nothing has changed"
    client.mode("restore", "a")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mnt / "file").unlink()
    client.set_rules([])
    (mnt / "file").unlink()


def test_a_forced_unmount_lets_those_who_wait_go_with_an_error(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    with reading(mnt / "file") as reader:
        wait_until(lambda: client.held())
        assert client.unmount("a", force=True)["ended"]
        assert b"error" in reader.communicate(timeout=10)[1].lower() and reader.returncode == 1
    assert mounted_at(mnt) == []


def test_what_is_open_keeps_the_process_after_an_unmount(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    pid = client.mount("a", str(mnt))["pid"]
    with open(mnt / "file", "w") as file:
        with refused(errno.EBUSY, "1 open files"):
            client.unmount("a")
        assert mounted_at(mnt) == ["fuse.stubfs"]
        file.write("x")
    wait_until(lambda: manager.row("a")["handles"] == 0)
    with subprocess.Popen(["sleep", "60"], cwd=mnt) as user:  # a reference that is no open file
        assert client.unmount("a")["ended"] is False
        assert mounted_at(mnt) == [] and alive(pid) and manager.row("a")["state"] == "unmounting"
        with refused(errno.EBUSY, "it is being unmounted"):
            client.mode("stub", "a")
        user.kill()
    wait_until(lambda: not manager.client().status()["mounts"])


def test_all_modes_at_once_and_all_unmounted(manager: Manager, tmp_path: Path) -> None:
    client = manager.client()
    for name in "abc":
        client.mount(name, str(directory(tmp_path, name)))
    assert client.mode("stub") == ["a", "b", "c"]
    assert {row["mode"] for row in client.status()["mounts"]} == {"stub"}
    assert client.unmount()["mounts"] == ["a", "b", "c"]
    assert client.status()["mounts"] == []


def test_mode_all_without_mounts_is_fine(manager: Manager) -> None:
    assert manager.client().request_text("mode;all;mode=stub") == (0, {"mode": "stub", "mounts": []})


def test_files_in_bulk_and_by_the_staging_directory(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    files = [{"path": f"d{number}/file", "mode": 0o100640, "size": 1 << 33} for number in range(50)]
    assert client.create("a", [*files, {"path": "fifo", "mode": stat.S_IFIFO | 0o600}]) == 51
    status = os.stat(mnt / "d49" / "file")
    assert (status.st_size, stat.S_IMODE(status.st_mode), status.st_blocks) == (1 << 33, 0o640, 0)
    assert stat.S_ISFIFO(os.stat(mnt / "fifo").st_mode)
    staging = client.staging("a")
    try:
        assert sorted(os.listdir(staging)) == sorted(os.listdir(mnt))
    finally:
        os.close(staging)
    with refused(errno.ENOTSUP, "a fifo with a size"):
        client.create("a", [{"path": "x", "mode": 0o100644}, {"path": "y", "mode": stat.S_IFIFO, "size": 1}])
    assert not (mnt / "x").exists()
    with refused(errno.EINVAL, "unknown key 'colour'"):
        client.create("a", [{"path": "x", "mode": 0o100644, "colour": 1}])
    with refused(errno.EINVAL, "key owner: 1 is no list"):
        client.create("a", [{"path": "x", "mode": 0o100644, "owner": 1}])
    with refused(errno.EINVAL, "key owner: .* is not .uid, gid."):
        client.create("a", [{"path": "x", "mode": 0o100644, "owner": [1]}])


def test_bad_mounts_change_nothing(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    file = tmp_path / "file"
    file.write_text("")
    other = directory(tmp_path, "other")
    before = mounts_below(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for number, words, keys in [
        (errno.EEXIST, "id 'a' is in use", {"id": "a", "mountpoint": str(other)}),
        (errno.EBUSY, "mount 'a' is there already", {"id": "b", "mountpoint": str(mnt)}),
        (errno.EBUSY, "mount 'a' is there already", {"id": "b", "mountpoint": f"{mnt}/../mnt/"}),
        (errno.ENOENT, "No such file", {"id": "b", "mountpoint": str(tmp_path / "none")}),
        (errno.ENOTDIR, "Not a directory", {"id": "b", "mountpoint": str(file)}),
        (errno.ESRCH, "no such process", {"id": "b", "mountpoint": str(other), "ns_pid": dead.pid}),
        (errno.EINVAL, "proxy_dir is missing", {"id": "b", "mountpoint": str(other), "mode": "proxy"}),
    ]:
        with refused(number, words):
            client.request("mount", **{"mode": "restore", **keys})
    with pytest.raises(SpfsError, match="cannot start the file system.*none"):
        client.mount("b", str(other), "proxy", proxy_dir=str(tmp_path / "none"))
    with pytest.raises(SpfsError, match="cannot mount: -o colour=blue: no such option"):
        client.mount("b", str(other), options="colour=blue")
    assert mounts_below(tmp_path) == before
    assert [row["id"] for row in client.status()["mounts"]] == ["a"]
    assert sorted(path.name for path in manager.work.glob("*-[2-9][.-]*")) == []


def test_unknown_ids(manager: Manager) -> None:
    client = manager.client()
    for command, keys in [
        ("mode", {"mode": "stub"}),
        ("replace", {"source": "s", "type": "tmpfs", "flags": 0}),
        ("replace", {"mode": "release"}),
        ("status", {}),
        ("held", {}),
        ("wait", {}),
        ("abort", {}),
        ("unmount", {}),
        ("staging", {}),
        ("create", {"files": []}),
    ]:
        with refused(errno.ENOENT, "unknown id"):
            client.request(command, id="ghost", **keys)


def test_a_proxy_directory_that_is_none(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    with refused(errno.ENOENT, "cannot use the proxy directory"):
        client.mode("proxy", "a", proxy_dir=str(tmp_path / "none"))
    with refused(errno.ENOTDIR, "cannot use the proxy directory"):
        client.mode("proxy", "a", proxy_dir="/etc/passwd")
    with pytest.raises(SpfsError):
        client.mode("proxy", "a", proxy_dir=str(mnt))  # itself
    assert manager.row("a")["mode"] == "restore"


def test_nothing_to_abort_or_to_release(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    with refused(errno.EINVAL, "nothing is pending"):
        client.abort("a")
    with refused(errno.EINVAL, "none was asked for"):
        client.begin("release", "a")
    assert client.abort() == [] and client.begin("release") == []
    assert client.wait("a")["replace"] is None


# The socket


def reply(sock: socket.socket) -> int:
    (status,) = struct.unpack("=i", sock.recv(4))
    return int(status)


def test_garbage_of_all_sizes_is_answered(manager: Manager) -> None:
    with manager.raw() as sock:
        for packet in (b"\0", b"\xff" * 1000, b"{" * 1000, b"mount;" * 1000, os.urandom(150_000), b"x" * 150_000):
            sock.send(packet)
            assert reply(sock) == -errno.EINVAL
        sock.send(b"")
        assert reply(sock) == -errno.EINVAL
        sock.send(b"mode;all;mode=stub\0", socket.MSG_EOR)
        assert reply(sock) == 0


def test_a_packet_of_the_largest_size(manager: Manager) -> None:
    with manager.raw() as sock:
        size = 1 << 22
        while True:
            try:
                sock.send(b"mode;all;mode=stub;" + b";" * size)
            except OSError as error:
                assert error.errno == errno.EMSGSIZE
                size -= size // 8
            else:
                break
        assert size > 100_000 and reply(sock) == 0


def test_larger_requests_and_answers_travel_in_a_memfd(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    files = [{"path": f"{'x' * 200}/{number}", "mode": 0o100644} for number in range(3000)]
    assert len(json.dumps(files)) > 600_000
    assert client.create("a", files) == 3000


def test_a_memfd_that_is_not_sealed_is_refused(manager: Manager) -> None:
    memfd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(memfd, b"mode;all;mode=stub")
        with manager.raw() as sock:
            socket.send_fds(sock, [b'{"memfd": 18}'], [memfd])
            assert reply(sock) == -errno.EPROTO
            sock.send(b'{"memfd": 18}')
            assert reply(sock) == -errno.EPROTO
    finally:
        os.close(memfd)


def test_descriptors_that_nobody_asked_for_are_closed(manager: Manager) -> None:
    before = len(os.listdir(f"/proc/{manager.pid}/fd"))
    with manager.raw() as sock:
        socket.send_fds(sock, [b"mode;all;mode=stub"], [0, 1, 2])
        assert reply(sock) == 0
        assert len(os.listdir(f"/proc/{manager.pid}/fd")) == before + 1


def test_clients_that_are_gone_before_the_reply(manager: Manager, mnt: Path) -> None:
    before = len(os.listdir(f"/proc/{manager.pid}/fd"))
    for request in (b"mode;all;mode=stub\0", b'{"command": "status"}', b"garbage", b""):
        with manager.raw() as sock:
            sock.send(request)
    with manager.raw() as sock:
        sock.send(f"mount;id=a;mode=restore;mountpoint={mnt}\0".encode())
    client = manager.client()
    wait_until(lambda: [row["state"] for row in client.status()["mounts"]] == ["mounted"])
    client.replace("a", "none", "tmpfs", begin="hold")
    with manager.raw() as sock:
        sock.send(b'{"command": "wait", "id": "a"}')
    wait_until(lambda: len(os.listdir(f"/proc/{manager.pid}/fd")) <= before + 3)  # client, process, pinned target
    assert manager.row("a")["state"] == "mounted"


def test_several_requests_are_answered_in_their_order(manager: Manager, mnt: Path) -> None:
    with manager.raw() as sock:
        sock.send(f"mount;id=a;mode=restore;mountpoint={mnt}\0".encode())
        sock.send(f"mount;id=a;mode=restore;mountpoint={mnt}\0".encode())
        sock.send(b"mode;all;mode=stub\0")
        sock.send(b"nonsense")
        assert [reply(sock) for _ in range(4)] == [0, -errno.EEXIST, 0, -errno.EINVAL]


def test_hundreds_of_clients(manager: Manager) -> None:
    before = len(os.listdir(f"/proc/{manager.pid}/fd"))
    clients = [manager.raw() for _ in range(400)]
    try:
        for sock in clients:
            sock.send(b'{"command": "status"}')
        for sock in clients:
            assert reply(sock) == 0
    finally:
        for sock in clients:
            sock.close()
    wait_until(lambda: len(os.listdir(f"/proc/{manager.pid}/fd")) == before)


def test_a_client_that_does_not_read_delays_nobody(manager: Manager) -> None:
    with manager.raw() as deaf:
        for _ in range(200):
            try:
                deaf.send(b'{"command": "status"}', socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
        assert manager.client(timeout=5).status()["mounts"] == []


# The ends


def test_shutdown_is_refused_while_there_are_mounts(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    pid = client.mount("a", str(mnt))["pid"]
    with refused(errno.EBUSY, "still mounted: a"):
        client.shutdown()
    client.shutdown(unmount=True)
    manager.wait_ended()
    assert mounted_at(mnt) == [] and not alive(pid)
    assert [path.name for path in manager.work.iterdir()] == ["spfs-manager.log"]


def test_exit_with_spfs(mnt: Path, tmp_path: Path) -> None:
    with manager_in(tmp_path) as manager:
        manager.start("--exit-with-spfs")
        client = manager.client()
        client.mount("a", str(mnt))
        client.mount("b", str(directory(tmp_path, "b")))
        client.unmount("a")
        assert alive(manager.pid)
        client.unmount("b")
        manager.wait_ended()
        assert not manager.socket.exists()


def test_an_unmount_by_somebody_else_is_noticed(manager: Manager, mnt: Path) -> None:
    pid = manager.client().mount("a", str(mnt))["pid"]
    subprocess.run(["umount", str(mnt)], check=True)
    wait_until(lambda: not manager.client().status()["mounts"])
    assert manager.row("a")["end"] == "unmounted" and not alive(pid)


def test_a_killed_file_system_is_reported_and_cleaned_by_unmount(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    pid = client.mount("a", str(mnt))["pid"]
    client.replace("a", "none", "tmpfs", begin="hold")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: manager.row("a")["state"] == "failed")
    row = manager.row("a")
    assert row["end"] == f"its file system process {pid} has ended (signal 9)"
    assert row["replace"]["phase"] == "failed"
    with pytest.raises(OSError) as caught:
        os.listdir(mnt)
    assert caught.value.errno == errno.ENOTCONN
    with refused(errno.ENOTCONN, "signal 9"):
        client.mode("stub", "a")
    with refused(errno.ENOTCONN, "signal 9"):
        client.wait("a")
    assert client.unmount("a")["ended"]
    assert mounted_at(mnt) == [] and os.listdir(mnt) == []


def test_an_unmount_does_not_mind_that_the_manager_looks_what_became_of_a_killed_one(
    manager: Manager, mnt: Path
) -> None:
    client = manager.client()
    for _ in range(8):  # one of them comes while it looks
        os.kill(client.mount("a", str(mnt))["pid"], signal.SIGKILL)
        assert client.unmount("a")["ended"]
        wait_until(lambda: not client.status()["mounts"])
    assert mounted_at(mnt) == []


def test_a_killed_unmount_can_be_asked_for_again(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    pid = client.mount("a", str(mnt))["pid"]
    os.kill(pid, signal.SIGSTOP)  # so that the unmount has something to wait for
    try:
        unmounting = manager.client()
        children = Path(f"/proc/{manager.pid}/task/{manager.pid}/children")
        before = set(children.read_text().split())
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(unmounting.unmount, "a", True)
            wait_until(lambda: set(children.read_text().split()) - before)
            (job,) = set(children.read_text().split()) - before
            os.kill(int(job), signal.SIGKILL)
            with refused(errno.ECONNABORTED, "the process that did it was killed"):
                asked.result(20)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert client.unmount("a", force=True)["ended"]
    wait_until(lambda: mounted_at(mnt) == [] and not alive(pid))


def test_a_file_system_that_hangs_delays_nobody(manager: Manager, tmp_path: Path) -> None:
    client = manager.client()
    pids = {name: client.mount(name, str(directory(tmp_path, name)))["pid"] for name in "ab"}
    os.kill(pids["a"], signal.SIGSTOP)
    wait_until(lambda: process_state(pids["a"]) == "T")
    try:
        client.mode("stub", "b")
        rows = {row["id"]: row["answering"] for row in client.status()["mounts"]}
        assert rows == {"a": False, "b": True}
    finally:
        os.kill(pids["a"], signal.SIGCONT)


def test_a_file_system_that_hangs_can_be_unmounted_by_force(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    pid = client.mount("a", str(mnt))["pid"]
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: process_state(pid) == "T")
    assert client.unmount("a", force=True)["ended"]
    assert mounted_at(mnt) == [] and not alive(pid)


def test_logs_in_a_directory_of_their_own(mnt: Path, tmp_path: Path) -> None:
    with manager_in(tmp_path) as manager:
        manager.start("--log-dir", str(tmp_path / "logs"), "--log", "manager.log")
        manager.client().mount("a", str(mnt))
        names = sorted(path.name for path in (tmp_path / "logs").iterdir())
        assert names == ["manager.log", Path(manager.row("a")["record"]).name, "stubfs-1.log"]
        manager.client().shutdown(unmount=True)
        manager.wait_ended()
        assert not manager.work.exists() and "mounted a on" in (tmp_path / "logs" / "manager.log").read_text()


def test_no_zombies_and_no_descriptors_pile_up(manager: Manager, mnt: Path) -> None:
    client = manager.client()

    def children() -> str:
        return Path(f"/proc/{manager.pid}/task/{manager.pid}/children").read_text()

    client.status()  # so that it has been accepted
    before = len(os.listdir(f"/proc/{manager.pid}/fd"))
    for _ in range(3):
        client.mount("a", str(mnt))
        client.unmount("a")
    wait_until(lambda: not children())
    wait_until(lambda: len(os.listdir(f"/proc/{manager.pid}/fd")) == before)


# Namespaces


@pytest.fixture
def container() -> Iterator["subprocess.Popen[bytes]"]:
    with running_container() as outer:
        yield outer


@contextmanager
def running_container() -> Iterator["subprocess.Popen[bytes]"]:
    """A process in mount, pid, net and user namespaces of its own, whose parent we are."""
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--user", "--map-root-user"]
    with subprocess.Popen([*command, "sh", "-c", "echo $$; exec sleep 600"], stdout=subprocess.PIPE) as outer:
        assert outer.stdout is not None and outer.stdout.readline() == b"1\n"
        try:
            yield outer
        finally:
            outer.kill()


def inner(outer: "subprocess.Popen[bytes]") -> int:
    return int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())


@pytest.mark.parametrize("force", [False, True])
def test_a_container_with_a_copy_of_the_mount_does_not_hold_up_an_unmount(
    manager: Manager, mnt: Path, force: bool
) -> None:
    client = manager.client()
    pid = client.mount("a", str(mnt))["pid"]
    with running_container() as outer:
        namespace = os.stat(f"/proc/{inner(outer)}/ns/mnt").st_ino
        answer = client.unmount("a", force=force)
        assert {"mountpoint": str(mnt), "namespace": namespace} in answer["left"]  # locked there by the kernel
        assert mounted_at(mnt) == [] and mounted_at(mnt, inner(outer)) == ["fuse.stubfs"]
        assert answer["ended"] is force and alive(pid) is not force
        outer.kill()
    wait_until(lambda: not client.status()["mounts"], what="it goes with the last copy")
    assert not alive(pid)


@pytest.mark.parametrize("ns_list", [None, ["user", "net", "mnt"]])
def test_a_mount_in_a_container_goes_with_it(
    manager: Manager, mnt: Path, container: "subprocess.Popen[bytes]", ns_list: "list[str] | None"
) -> None:
    client = manager.client()
    target = inner(container)
    pid = client.mount("a", str(mnt), ns_pid=target, ns_list=ns_list)["pid"]
    assert mounted_at(mnt, target) == ["fuse.stubfs"] and mounted_at(mnt) == []
    Path(f"/proc/{target}/root{mnt}/file").write_text("x")
    container.kill()
    wait_until(lambda: not client.status()["mounts"], what="the mount goes with its namespace")
    assert manager.row("a")["end"] == "unmounted" and not alive(pid)


def test_a_mountpoint_beneath_a_root_and_seen_elsewhere(manager: Manager, tmp_path: Path) -> None:
    root = directory(tmp_path, "root")
    data = directory(root, "data")
    client = manager.client()
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            text = f"mount;id=87;mode=restore;mountpoint=/data;ns_pid={process.pid};ns_list=user,net,mnt;root={root}"
            assert client.request_text(text).status == 0
            assert mounted_at(data) == ["fuse.stubfs"]
            client.unmount("87")
            text = f"mount;id=87;mode=restore;mountpoint={data};ns_mountpoint=/data;ns_pid={process.pid}"
            assert client.request_text(text).status == 0
            assert manager.row("87")["mountpoint"] == "/data" and mounted_at(data) == ["fuse.stubfs"]
            client.unmount("87")
            with refused(errno.ENOENT, "root"):
                client.mount("x", "/data", ns_pid=process.pid, root=str(tmp_path / "none"))
        finally:
            process.kill()


def test_a_proxy_directory_in_a_container(
    manager: Manager, mnt: Path, tmp_path: Path, container: "subprocess.Popen[bytes]"
) -> None:
    real = directory(tmp_path, "real")
    target = inner(container)
    enter = ["nsenter", f"--target={target}", "--mount", "--user"]
    subprocess.run([*enter, "mount", "-t", "tmpfs", "x", real], check=True)
    Path(f"/proc/{target}/root{real}/file").write_text("inside")
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.mode("proxy", "a", proxy_dir=str(real), ns_pid=target)
    assert (mnt / "file").read_text() == "inside"


def test_the_bytes_of_the_existing_c_client(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    source = Path(__file__).with_name("old_client.c")
    program = tmp_path / "old_client"
    subprocess.run(["cc", "-Wall", "-Wno-format-security", "-o", program, source], check=True)
    done = subprocess.run(
        [program, str(manager.socket), str(mnt), str(os.getpid())], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stderr) == (0, "")
    statuses = dict(re.findall(r"^(\w+) (-?\d+)$", done.stdout, re.MULTILINE))
    assert statuses == {"mount": "0", "again": str(-errno.EEXIST), "replace": "0", "hold": "0"}
    row = manager.row("87")
    assert row["mountpoint"] == str(mnt) and row["replace"]["type"] == "tmpfs"


def test_start_up_reports_a_missing_libfuse(mnt: Path, tmp_path: Path) -> None:
    with manager_in(tmp_path) as manager:
        manager.start(environment={"FUSE_LIBRARY_PATH": "/nonexistent/libfuse.so.2"})
        with pytest.raises(SpfsError, match="cannot start the file system.*libfuse"):
            manager.client().mount("a", str(mnt))
        assert mounted_at(mnt) == []


def test_ctrl_c_in_the_foreground_leaves_the_mounts(mnt: Path, tmp_path: Path) -> None:
    with manager_in(tmp_path) as manager:
        command = [sys.executable, "-m", "spfs.cli.manager", "--work-dir", str(manager.work)]
        with subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}) as process:
            wait_until(manager.socket.exists)
            with ManagerClient(str(manager.socket), 10) as client:
                pid = client.mount("a", str(mnt))["pid"]
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
        assert mounted_at(mnt) == ["fuse.stubfs"] and alive(pid) and not manager.socket.exists()
        manager.start()  # takes over, and so can clean up
        end(manager.pid, signal.SIGTERM)
        manager.start()
        assert manager.row("a")["pid"] == pid
