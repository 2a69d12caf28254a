"""Fixtures that many of the tests use: a manager that runs, and an empty directory for a mount."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest
from manager_kit import Manager, manager_in


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with manager_in(tmp_path) as made:
        yield made.start()


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path
