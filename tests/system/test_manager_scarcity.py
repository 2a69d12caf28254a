"""Managers and file systems that lack something: descriptors, disk space, standard ones, a reader of the log."""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

import pytest
from manager_kit import ENVIRONMENT, TIMEOUT, Manager, alive, manager_in, run
from stubfs_kit import command, environment, mount_new

from spfs.client import ManagerClient
from spfs.errors import SpfsError
from spfs.testing import wait_until
from stubfs import syscalls
from stubfs.client import FilesystemClient

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with manager_in(tmp_path) as made:
        yield made


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A tmpfs of 64 KiB, on a new directory."""
    path.mkdir()
    mount_new("tmpfs", path, size="64k", mode="700")
    try:
        yield path
    finally:
        syscalls.umount2(os.fsencode(path), syscalls.MNT_DETACH)


def fill(directory: Path) -> None:
    with open(directory / "fill", "wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))


def close_standard() -> None:
    os.closerange(0, 3)


def connected(path: str, count: int) -> List[socket.socket]:
    """Clients that may have to wait until they are accepted."""
    clients = []
    for _ in range(count):
        clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        clients[-1].connect(path)
    return clients


def test_what_cannot_be_saved_is_refused(manager: Manager, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with small_disk(manager.work):
        try:
            client = manager.start().client()
            client.mount("one", str(tmp_path / "one"))
            fill(manager.work)
            with pytest.raises(SpfsError, match="cannot save the state of mount 'two'.*No space left") as caught:
                client.mount("two", str(tmp_path / "two"))
            assert caught.value.errno == errno.ENOSPC and "make room" in caught.value.hint
            with pytest.raises(SpfsError, match="cannot save the state of mount 'one'"):
                client.replace("one", "none", "tmpfs", begin="hold")
            assert client.mode("stub") == ["one"]
            (row,) = client.status()["mounts"]
            assert (row["id"], row["mode"], row["replace"]) == ("one", "stub", None)
            names = os.listdir(manager.work)
            assert not [name for name in names if name.endswith(".new") or re.search(r"-2[.-]", name)]
            (manager.work / "fill").unlink()
            client.mount("two", str(tmp_path / "two"))
        finally:
            manager.clean_up()
            manager.pid = 0


def test_a_full_work_directory_from_the_start(tmp_path: Path) -> None:
    with small_disk(tmp_path / "m") as work:
        fill(work)
        done = run("spfs.cli.manager", "-d", "--work-dir", str(work))
        assert done.returncode == 1 and "No space left on device (choose another" in done.stderr
        assert done.stderr.count("\n") == 1 and os.listdir(work) == ["fill"]


def test_a_manager_with_few_descriptors_works_whatever_its_clients_hold(manager: Manager, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spfs.cli.manager", "-d", "--work-dir", str(manager.work)],
        env={**os.environ, **ENVIRONMENT}, timeout=TIMEOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )  # fmt: skip
    assert done.returncode == 0
    client = manager.client()
    manager.pid = client.status()["manager"]["pid"]
    clients = connected(str(manager.socket), 100)
    try:
        wait_until(lambda: "no more clients for now: there are 32" in manager.log())
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            client.mount(name, str(tmp_path / name))
        assert client.mode("stub") == ["a", "b"]
        os.close(client.staging("a"))
        client.replace("a", "none", "tmpfs")
        assert client.wait("a")["replace"]["phase"] == "done"
        # Who waits until there is room is served when there is.
        for sock in clients[:50]:
            sock.close()
        clients[-1].settimeout(TIMEOUT)
        clients[-1].send(b'{"command": "status"}')
        for sock in clients[50:80]:
            sock.close()
        assert clients[-1].recv(4) == bytes(4)
        assert manager.log().count("no more clients for now") < 20  # and not for every attempt
    finally:
        for sock in clients:
            sock.close()
    subprocess.run(["umount", str(tmp_path / "a")], check=True)


def test_a_file_system_out_of_descriptors_goes_on_when_there_are_some(tmp_path: Path) -> None:
    path, sock, log = tmp_path / "mnt", str(tmp_path / "sock"), tmp_path / "log"
    path.mkdir()
    subprocess.run(
        command(str(path), "--socket-path", sock, "--log", str(log)),
        env=environment(), preexec_fn=few_descriptors, check=True, timeout=TIMEOUT,
    )  # fmt: skip
    with FilesystemClient(sock, TIMEOUT) as client:
        try:
            clients = connected(sock, 40)
            wait_until(lambda: "cannot accept a control client" in log.read_text())
            for one in clients:
                one.close()
            with FilesystemClient(sock, TIMEOUT) as another:
                assert another.status().mode == "restore"
            assert len(log.read_text().splitlines()) == 1  # and no line for every attempt
        finally:
            client.quit()


def test_closed_standard_descriptors(manager: Manager, tmp_path: Path) -> None:
    """What is opened in their place must not be taken for them: the file system would lose its device, or its pipe."""
    path, sock = tmp_path / "mnt", str(tmp_path / "sock")
    path.mkdir()
    subprocess.run(
        command(str(path), "--socket-path", sock), env=environment(), preexec_fn=close_standard, check=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    with FilesystemClient(sock, TIMEOUT) as client:
        (path / "file").write_text("served")
        assert (path / "file").read_text() == "served"
        client.quit()
    subprocess.run(
        [sys.executable, "-m", "spfs.cli.manager", "-d", "--work-dir", str(manager.work)],
        env={**os.environ, **ENVIRONMENT}, preexec_fn=close_standard, check=True, timeout=TIMEOUT,
    )  # fmt: skip
    with ManagerClient(str(manager.socket), TIMEOUT) as client_of_manager:
        manager.pid = client_of_manager.status()["manager"]["pid"]
        client_of_manager.mount("a", str(path))
        (path / "file").write_text("served")
    for fd in (0, 1, 2):
        assert os.readlink(f"/proc/{manager.pid}/fd/{fd}") == os.devnull


def test_a_log_that_nobody_reads_delays_nobody(manager: Manager) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "spfs.cli.manager", "-vv", "--work-dir", str(manager.work)],
        env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr is not None and b"listening" in process.stderr.readline()
        client = manager.client()
        for _ in range(2000):  # more than a pipe takes
            client.status()
        client.shutdown()
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.communicate()


def test_whoever_waits_is_told_that_the_manager_ends(manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    manager.start().client().mount("a", str(tmp_path / "mnt"))
    manager.client().replace("a", "none", "tmpfs", begin="hold")
    waiting, told = manager.client(), []

    def wait() -> None:
        try:
            waiting.wait("a")
        except SpfsError as error:
            told.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: "Wait(id='a'" in manager.log())
    pid, before = manager.pid, time.monotonic()
    os.kill(pid, 15)
    thread.join(TIMEOUT)
    wait_until(lambda: not alive(pid), TIMEOUT)
    assert time.monotonic() - before < 3 and [error.errno for error in told] == [errno.ESHUTDOWN]
    manager.start()


def test_names_that_are_hard_to_print(manager: Manager, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"with space\n\\and\xff")
    path.mkdir()
    client = manager.start().client()
    client.mount("a", str(path))
    client.replace("a", "none", "tmpfs", begin="hold")
    spfs = {"SPFS_MANAGER_SOCK": str(manager.socket)}
    done = run("spfs.cli.spfs", "status", environment=spfs)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2 and r"with space\n\and\udcff" in done.stdout
    done = run("spfs.cli.spfs", "mount", "b", str(path), environment=spfs)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and r"with space\n" in done.stderr
    client.abort("a")
    done = run("spfs.cli.spfs", "wait", "a", environment=spfs)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    client.mode("stub", "a")
    with subprocess.Popen([sys.executable, "-c", "import os, sys; os.stat(sys.argv[1])", path / "x"]) as blocked:
        try:
            wait_until(client.held)
            done = run("spfs.cli.spfs", "held", environment=spfs)
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("a ")]
            assert re.match(rf"a +{blocked.pid} +\S+ -c 'import os, sys; os", line)
        finally:
            blocked.kill()


@pytest.mark.parametrize("target", ["/dev/full", "closed pipe"])
def test_output_that_cannot_be_written(manager: Manager, target: str) -> None:
    manager.start()
    read, write = os.pipe()
    os.close(read)
    with open(target, "wb") if target.startswith("/") else open(write, "wb", closefd=False) as output:
        done = subprocess.run(
            [sys.executable, "-m", "spfs.cli.spfs", "status", "--socket-path", str(manager.socket)],
            env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT,
        )  # fmt: skip
    os.close(write)
    assert done.returncode == 1
    wanted = "spfs: cannot print the answer: No space left on device\n" if target.startswith("/") else ""
    assert done.stderr == wanted


@pytest.mark.parametrize("module", ["manager", "client", "spfs"])
def test_command_lines_that_cannot_be_understood(module: str) -> None:
    done = run(f"spfs.cli.{module}", "--bogus")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "cannot understand the command line: " in done.stderr and "--help)" in done.stderr
