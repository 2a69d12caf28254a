"""A real manager for tests: started as users start it, and ended whatever became of the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from spfs.client import ManagerClient
from spfs.errors import SpfsError
from spfs.testing import wait_until

TOP = Path(__file__).parents[2]
# With what is there already: the recorder of messages, if there is one.
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH")]))}
TIMEOUT = 20.0


def run(
    module: str, *arguments: str, environment: Optional[Dict[str, str]] = None
) -> "subprocess.CompletedProcess[str]":
    """A command of the package, by its module."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


class Manager:
    """A daemon on a work directory below ``base``. ``clients`` opened by client() are closed with it."""

    def __init__(self, base: Path) -> None:
        self.work = base / "m"
        self.socket = self.work / "spfs-manager.sock"
        self.pid = 0
        self._clients: List[ManagerClient] = []

    def start(self, *arguments: str, environment: Optional[Dict[str, str]] = None) -> "Manager":
        done = run("spfs.cli.manager", "-d", "-vv", "--work-dir", str(self.work), *arguments, environment=environment)
        assert done.returncode == 0, done.stderr
        assert (done.stdout, done.stderr) == ("", "")
        self.pid = self.client().status()["manager"]["pid"]
        return self

    def client(self, timeout: float = TIMEOUT) -> ManagerClient:
        client = ManagerClient(str(self.socket), timeout)
        self._clients.append(client)
        return client

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(self.socket))  # before the timeout is set: a non-blocking one does not wait for its turn
        sock.settimeout(TIMEOUT)
        return sock

    def row(self, id: str) -> Dict[str, Any]:
        with ManagerClient(str(self.socket), TIMEOUT) as client:
            status = client.status(id)
        return dict((status["mounts"] or status["finished"])[0])

    def kill(self) -> None:
        """As the kernel would: no clean-up."""
        self._close_clients()
        pid, self.pid = self.pid, 0
        end(pid, signal.SIGKILL)

    def stop(self) -> None:
        """As an administrator would: mounts stay."""
        self._close_clients()
        pid, self.pid = self.pid, 0
        end(pid, signal.SIGTERM)

    def wait_ended(self) -> None:
        self._close_clients()
        pid, self.pid = self.pid, 0
        wait_until(lambda: not alive(pid), TIMEOUT, "the manager ends")

    def clean_up(self) -> None:
        self._close_clients()
        if self.pid and alive(self.pid):
            try:
                with ManagerClient(str(self.socket), TIMEOUT) as client:
                    client.shutdown(unmount=True, force=True)
                wait_until(lambda: not alive(self.pid), TIMEOUT)
            except (SpfsError, TimeoutError):
                end(self.pid, signal.SIGKILL)
                raise

    def _close_clients(self) -> None:
        while self._clients:
            self._clients.pop().close()

    def log(self) -> str:
        path = self.work / "spfs-manager.log"
        return path.read_text() if path.exists() else ""


def alive(pid: int) -> bool:
    """Is it there, and not merely a zombie?"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] not in (b"Z", b"X")


def end(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    wait_until(lambda: not alive(pid), TIMEOUT, f"process {pid} ends")


@contextmanager
def reading(path: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A cat of the file, which is killed if it still waits at the end."""
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        try:
            yield reader
        finally:
            reader.kill()


@contextmanager
def manager_in(base: Path) -> Iterator[Manager]:
    manager = Manager(base)
    try:
        yield manager
    finally:
        manager.clean_up()
        left = manager.log()
        # Whatever a test provokes, the manager has an answer for it: a traceback is always a defect.
        assert "Traceback" not in left, left
