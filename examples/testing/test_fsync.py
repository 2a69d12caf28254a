"""What becomes of a transaction whose fsync hangs, or fails, while everything else works.

Run it with: pytest examples/testing/test_fsync.py
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Callable

from spfs.testing import DelayedMount

INSERT = """
import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as database:
    database.execute("INSERT INTO entries VALUES (?)", [sys.argv[2]])
"""


def insert(path: Path, text: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", INSERT, str(path), text], stderr=subprocess.PIPE, text=True)


def entries(path: Path) -> "list[str]":
    database = sqlite3.connect(path)
    try:
        return [text for (text,) in database.execute("SELECT * FROM entries")]
    finally:
        database.close()


def test_a_commit_waits_for_its_fsync(delayed_mount: Callable[..., DelayedMount], tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "data.db")
    database.execute("CREATE TABLE entries (text)")
    database.close()
    mount = delayed_mount(tmp_path)
    path = mount.path / "data.db"

    with mount.hang(["fsync"]):
        process = insert(path, "first")
        (held,) = mount.wait_held(operations=["fsync"])
        assert held.pid == process.pid and process.poll() is None  # nobody is told that it is safe
    assert process.communicate()[1] == "" and entries(path) == ["first"]

    with mount.fail("EIO", ["fsync"]):
        process = insert(path, "second")
        assert "disk I/O error" in process.communicate()[1]
    assert entries(path) == ["first"]
