"""Tests that need a machine of their own: they stop its NFS server and drop its packets. ``tests/in-vm`` has one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Iterator

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))  # the kits

from nfs_kit import COMMANDS, NfsScene, Server  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing and items:
        pytest.exit(
            f"cannot run tests/nfs here: there is no {missing[0]}:"
            " only in the virtual machine (tests/in-vm python3 -m pytest tests/nfs)",
            4,
        )


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    try:
        yield made
    finally:
        made.restore()


@pytest.fixture
def scene(tmp_path: Path, server: Server, request: pytest.FixtureRequest) -> Iterator[NfsScene]:
    """Its parameter is the version of NFS; default 4."""
    made = NfsScene(tmp_path, server, getattr(request, "param", 4))
    try:
        yield made
    finally:
        server.restore()
        made.close()
