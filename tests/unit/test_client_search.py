"""Which manager is meant when none is named."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from spfs import client
from spfs.errors import SpfsError


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(client, "_PLACES", (f"{tmp_path}/spfs-manager*/*.sock", f"{tmp_path}/spfs-manager/*/*.sock"))
    monkeypatch.delenv(client.SOCKET_VARIABLE, raising=False)
    return tmp_path


def listening(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(str(path))
    sock.listen(5)
    return sock


def test_the_one_that_is_named(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.SOCKET_VARIABLE, "/by/environment")
    assert client.find_manager("/by/option") == "/by/option"
    assert client.find_manager() == "/by/environment"


def test_the_only_one_that_runs(run_directory: Path) -> None:
    listening(run_directory / "spfs-manager-1" / "spfs-manager.sock").close()  # a dead one
    with listening(run_directory / "spfs-manager-2" / "fs-1.sock"):  # a file system's, which is no manager
        with listening(run_directory / "spfs-manager" / "77" / "control.sock") as sock:
            assert client.find_manager() == sock.getsockname()


def test_none_and_several(run_directory: Path) -> None:
    with pytest.raises(SpfsError, match="none is running.*spfs-manager -d"):
        client.find_manager()
    paths = [run_directory / f"spfs-manager-{number}" / "spfs-manager.sock" for number in (1, 2)]
    with listening(paths[0]), listening(paths[1]):
        with pytest.raises(SpfsError, match="2 are running.*--socket-path") as caught:
            client.find_manager()
        assert str(paths[0]) in str(caught.value) and str(paths[1]) in str(caught.value)
