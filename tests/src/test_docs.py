"""What the documents say about the tree is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from spfs.connection import MAX_REQUEST
from spfs.protocol import MAX_ID, TEXT_KEYS
from spfs.requests import COMMANDS

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


def test_the_reference_of_the_socket_has_every_command_with_its_keys() -> None:
    page = (TOP / "docs" / "reference" / "socket.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", page, re.MULTILINE)
    assert {name for name, _ in rows} >= COMMANDS.keys()
    for name, kind in COMMANDS.items():
        documented = set(re.findall(r"`(\w+)`", next(keys for found, keys in rows if found == name)))
        assert documented - {"all"} == {field.name for field in fields(kind)}, name
    new = re.search(r"C implementation: not ([^.]*)\.", page)
    assert new is not None and len(new[1]) > 20
    assert set(re.findall(r"`(\w+)`", new[1])).isdisjoint(TEXT_KEYS)
    assert f"{MAX_REQUEST >> 20} MiB" in page and f"{MAX_ID} printable" in page
