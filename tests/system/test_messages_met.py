"""Messages that no other test meets: each is provoked as a user would, or by the smallest stand-in for what is rare."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from manager_kit import Manager, run

from spfs import protocol
from spfs.cli import spfs as command
from spfs.cli import timeline
from spfs.client import ManagerClient
from spfs.errors import SpfsError, UsageError
from spfs.state import WorkDirectory
from stubfs import wire


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[socket.socket]:
    """A listener that says nothing by itself."""
    with wire.listen(str(tmp_path / "s")) as listener:
        yield listener


def failure(*arguments: str, code: int = 1) -> str:
    done = run("spfs.cli.spfs", *arguments)
    assert done.returncode == code and done.stderr.startswith("spfs: cannot "), done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    return done.stderr


@pytest.mark.needs_root
@pytest.mark.needs_fuse
def test_commands_that_contradict_themselves(manager: Manager) -> None:
    where = ("--socket-path", str(manager.socket))
    both = failure("rules", "a", "--rule", "hold", "--none", *where, code=2)
    assert "--rule and --none contradict each other (give one of them)" in both
    half = failure("replace", "a", "--source", "x", *where, code=2)
    assert "an id, --source and --type are needed together (give all three)" in half


@pytest.mark.needs_root
@pytest.mark.needs_fuse
def test_a_record_that_somebody_has_removed(manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    manager.client().mount("a", str(tmp_path / "mnt"))
    os.unlink(manager.row("a")["record"])
    said = failure("timeline", "a", "--socket-path", str(manager.socket))
    assert "cannot read the record" in said and "No such file or directory (name a mount, or a record's file)" in said


def test_a_timeline_of_what_is_neither_file_nor_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Any) -> str:
        raise SpfsError("cannot find a manager: none is running below /run", "start one", errno.ENOENT)

    monkeypatch.setattr(timeline, "find_manager", nobody)
    options = argparse.Namespace(mounts=["ghost.jsonl"], format=None, json=False, output=None, socket_path=None)
    with pytest.raises(SpfsError, match="^cannot find ghost.jsonl: there is no such file, and cannot find a manager"):
        timeline.run(options)


@pytest.mark.needs_root
def test_processes_that_are_not_there(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    said = failure("switch", "--pid", str(process.pid), "--source", "/dev", "--target", str(tmp_path))
    assert f"cannot switch process {process.pid}: there is none" in said


@pytest.mark.needs_root
def test_a_work_directory_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    os.chown(tmp_path / "w", 12345, -1)
    with pytest.raises(SpfsError, match="it belongs to uid 12345 .choose another: --work-dir"):
        WorkDirectory(str(tmp_path / "w"))
    done = run("spfs.cli.manager", "--work-dir", str(tmp_path / "w"))
    assert done.returncode in (1, 3) and "belongs to uid 12345" in done.stderr


class Partly:
    """A manager one of whose file systems does not answer."""

    def request(self, name: str, **keys: Any) -> Dict[str, Any]:
        found: List[Dict[str, Any]] = []
        return {"held": found, "not_answering": ["a", "b"]}


def test_a_list_that_is_not_complete_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    options = command.parser().parse_args(["held"])
    with pytest.raises(SpfsError, match="cannot list all held requests: a, b: not answering .see status") as caught:
        options.run(options, Partly())
    assert caught.value.errno == errno.ETIMEDOUT and "no request is held" in capsys.readouterr().out


def test_a_manager_that_takes_too_long(silent: socket.socket, tmp_path: Path) -> None:
    with ManagerClient(str(tmp_path / "s"), timeout=0.1) as client:
        with pytest.raises(SpfsError, match="it took too long .it goes on with what it was asked: see status") as late:
            client.status()
    assert late.value.errno == errno.ETIMEDOUT


def test_a_socket_of_something_else(silent: socket.socket, tmp_path: Path) -> None:
    def babble() -> None:
        sock, _ = silent.accept()
        with sock:
            sock.recv(1000)
            sock.send(b"\0\0\0\0[1]")

    thread = threading.Thread(target=babble)
    thread.start()
    with ManagerClient(str(tmp_path / "s"), timeout=10) as client:
        with pytest.raises(SpfsError, match="cannot get an answer from the manager: .*must be an object") as caught:
            client.status()
    thread.join()
    assert caught.value.errno == errno.EPROTO


def test_a_directory_for_a_mode_that_has_none() -> None:
    with pytest.raises(UsageError, match="key proxy_dir is for mode=proxy alone"):
        protocol.parse(b"mode;all;mode=stub;proxy_dir=/x\0")
