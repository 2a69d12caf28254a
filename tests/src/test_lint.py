"""Style and types of the tree: what the linters say is a test result like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
CHECKS = {
    "mypy": ["mypy"],
    "flake8": ["flake8", "stubfs", "spfs", "tests", "examples", "benchmarks"],
    "isort": ["isort", "--check-only", "--quiet", "stubfs", "spfs", "tests", "examples", "benchmarks"],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CHECKS)
def test_linter_has_nothing_to_say(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *CHECKS[name]], cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
