"""A copy that is under way when the server goes: it waits, and is complete when the server has come back.

Run it with: pytest examples/testing/test_server_comes_back.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Callable

from spfs.testing import DelayedMount


def test_a_copy_goes_on(delayed_mount: Callable[..., DelayedMount], tmp_path: Path) -> None:
    server, target = tmp_path / "server", tmp_path / "target"
    server.mkdir()
    for number in range(20):
        (server / f"file{number}").write_text(f"contents {number}")
    mount = delayed_mount(server)

    mount.hang(["open"], "file1?")  # gone in the middle of it
    copy = subprocess.Popen(["cp", "-r", str(mount.path), str(target)], stderr=subprocess.PIPE, text=True)
    mount.wait_held()
    mount.stub()  # and now for everything
    (server / "file19").write_text("written meanwhile by somebody else")
    assert copy.poll() is None

    mount.release()
    assert copy.communicate()[1] == "" and copy.returncode == 0
    copied = {path.name: path.read_text() for path in target.iterdir()}
    assert copied == {path.name: path.read_text() for path in server.iterdir()} and len(copied) == 20
