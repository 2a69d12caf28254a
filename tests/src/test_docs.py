"""What the documents say about the tree is so."""

from __future__ import annotations

import re
from pathlib import Path

TOP = Path(__file__).parents[2]


def test_every_module_has_its_place_in_the_architecture_page() -> None:
    words = set(re.findall(r"\w+", (TOP / "docs" / "architecture.md").read_text()))
    modules = [path for package in ("stubfs", "spfs") for path in (TOP / package).rglob("*.py")]
    assert [str(path) for path in modules if path.stem not in words and path.stem != "__init__"] == []


def test_files_that_are_named_exist() -> None:
    for page in (TOP / "README.md", TOP / "docs" / "architecture.md"):
        for name in re.findall(r"`((?:stubfs|spfs|examples|tests|docs)/[\w/]+\.(?:py|md))`", page.read_text()):
            assert (TOP / name).exists(), (page.name, name)
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
