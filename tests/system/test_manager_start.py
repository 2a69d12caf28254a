"""How the manager starts, and how it says that it cannot: one line, with what to do."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

import pytest
from manager_kit import ENVIRONMENT, Manager, alive, manager_in, run
from testing_kit import let_others_in

from spfs.client import ManagerClient
from spfs.errors import SpfsError
from spfs.testing import wait_until

pytestmark = pytest.mark.needs_root


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with manager_in(tmp_path) as made:
        yield made


def refused(*arguments: str, **environment: str) -> str:
    """What a manager that cannot start says, in one line."""
    done = run("spfs.cli.manager", *arguments, environment=environment)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("spfs-manager: cannot ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_it_accepts_when_the_command_returns_and_leaves_nothing(manager: Manager, tmp_path: Path) -> None:
    manager.start()
    assert stat.S_IMODE(manager.work.stat().st_mode) == 0o700
    assert stat.S_IMODE(manager.socket.stat().st_mode) == 0o600
    manager.client().shutdown()
    manager.wait_ended()
    assert "ended" in manager.log()
    (manager.work / "spfs-manager.log").unlink()
    assert list(manager.work.iterdir()) == []


def test_without_anything_to_log_the_work_directory_goes_with_it(manager: Manager) -> None:
    assert run("spfs.cli.manager", "-d", "--work-dir", str(manager.work)).returncode == 0
    with ManagerClient(str(manager.socket)) as client:
        manager.pid = client.status()["manager"]["pid"]
        client.shutdown()
    manager.wait_ended()
    assert not manager.work.exists()


def test_it_does_as_criu_asks(manager: Manager, tmp_path: Path) -> None:
    base = tmp_path / "run" / "4711"
    path = base / "control.sock"
    arguments = ["-vvvv", "-d", "--socket-path", str(path), "--work-dir", str(base), "--exit-with-spfs"]
    assert run("spfs.cli.manager", *arguments).returncode == 0
    manager.work, manager.socket = base, path
    with ManagerClient(str(path)) as client:
        manager.pid = client.status()["manager"]["pid"]
    # Nothing was ever mounted, so there is no last mount that could be gone.
    assert alive(manager.pid)


def test_a_restorer_that_mounted_nothing_leaves_no_manager(manager: Manager) -> None:
    script = "from spfs import controller; controller.UNUSED_AFTER = 0.3; from spfs.cli import manager; manager.main()"
    command = [sys.executable, "-c", script, "-d", "--work-dir", str(manager.work), "--exit-with-spfs"]
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)
    with ManagerClient(str(manager.socket)) as first:
        pid = first.status()["manager"]["pid"]
        ManagerClient(str(manager.socket)).close()
        with pytest.raises(SpfsError):
            first.mount("a", str(manager.work / "missing"))
        time.sleep(0.5)  # the other client's leaving must not count while there is one
        assert alive(pid) and first.status()["mounts"] == []
    wait_until(lambda: not alive(pid))
    assert [path.name for path in manager.work.iterdir()] == ["spfs-manager.log"]  # which says what was refused


def test_a_daemon_keeps_nothing_of_the_terminal(manager: Manager) -> None:
    manager.start()
    assert os.readlink(f"/proc/{manager.pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{manager.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert os.getsid(manager.pid) != os.getsid(0)


def test_a_socket_file_of_a_dead_manager_is_replaced(manager: Manager) -> None:
    manager.start()
    manager.kill()
    assert manager.socket.exists()
    manager.start()


def test_a_second_manager_on_the_work_directory_is_refused(manager: Manager) -> None:
    manager.start()
    text = refused("-d", "--work-dir", str(manager.work), "--socket-path", str(manager.work / "other.sock"))
    assert f"the manager with pid {manager.pid} works in it" in text
    assert manager.client().status()["mounts"] == []


def test_a_second_manager_on_the_socket_is_refused(manager: Manager, tmp_path: Path) -> None:
    manager.start()
    text = refused("-d", "--work-dir", str(tmp_path / "other"), "--socket-path", str(manager.socket))
    assert "another manager listens there" in text and not (tmp_path / "other").exists()


def test_another_kind_of_file_at_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    refused("-d", "--work-dir", str(tmp_path / "m"), "--socket-path", str(file))
    assert file.read_text() == "precious"


@pytest.mark.parametrize("option", ["--socket-path", "--work-dir"])
def test_a_path_too_long_for_a_socket(option: str, tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 100))
    text = refused("-d", option, long, *(["--work-dir", str(tmp_path / "m")] if option == "--socket-path" else []))
    assert "longer than 107 bytes" in text and option in text
    assert not (tmp_path / "m").exists()


def test_a_work_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot use the work directory" in refused("-d", "--work-dir", str(tmp_path / "file"))
    assert "cannot use the work directory" in refused("-d", "--work-dir", str(tmp_path / "file" / "below"))


def test_a_work_directory_that_others_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "others may write to it (chmod go-w" in refused("-d", "--work-dir", str(tmp_path / "open"))


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    text = refused("-d", "--work-dir", str(tmp_path / "m"), "--log", "/proc/none/log")
    assert "cannot write the log" in text
    assert "cannot write logs to" in refused("-d", "--work-dir", str(tmp_path / "m"), "--log-dir", "/proc/none")
    assert not (tmp_path / "m").exists()


def test_without_root(tmp_path: Path) -> None:
    # In a user namespace that maps nobody: not root, but able to read this interpreter wherever it is installed.
    command = ["unshare", "--user", sys.executable, "-m", "spfs.cli.manager", "-d", "--work-dir", str(tmp_path / "m")]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("spfs-manager: cannot start the manager: running as user")


def test_without_the_fuse_device(tmp_path: Path) -> None:
    script = f"mount -t tmpfs none /dev && exec {sys.executable} -m spfs.cli.manager -d --work-dir {tmp_path}/m"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 3 and "modprobe fuse" in done.stderr
    assert done.stderr.startswith("spfs-manager: cannot start the manager: No such file")
    assert not (tmp_path / "m").exists()


def test_options_that_do_not_exist() -> None:
    done = run("spfs.cli.manager", "--work-directory=/x", "--colour")
    assert done.returncode == 2 and "--colour" in done.stderr


def test_another_users_client_is_refused(manager: Manager) -> None:
    manager.start()
    let_others_in(manager.work)
    os.chmod(manager.socket, 0o666)  # as if an administrator had
    script = (
        "import os, socket, struct, sys; os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n"
        "print(struct.unpack('=i', s.recv(4096)[:4])[0])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(manager.socket)], capture_output=True, text=True)
    assert done.stdout == f"{-errno.EPERM}\n", done.stderr
    assert manager.client().status()["mounts"] == []


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(SpfsError) as caught:
        ManagerClient(str(tmp_path / "none.sock"))
    assert caught.value.errno == errno.ENOENT and "spfs-manager -d" in caught.value.hint
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(tmp_path / "stale.sock"))
    stale.close()
    with pytest.raises(SpfsError) as caught:
        ManagerClient(str(tmp_path / "stale.sock"))
    assert caught.value.errno == errno.ECONNREFUSED
