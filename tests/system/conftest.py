"""Fixtures that many of the tests use: a manager that runs, and an empty directory for a mount."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Iterator

import pytest

if TYPE_CHECKING:
    from manager_kit import Manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    from manager_kit import manager_in  # not before the run has set its environment, which that takes a copy of

    with manager_in(tmp_path) as made:
        yield made.start()


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path
