"""The direction of the dependencies: stubfs knows nothing of spfs, ctypes and exits stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, Set, Tuple

TOP = Path(__file__).parents[2]
MAY_USE_CTYPES = {"stubfs/libc.py", "stubfs/libfuse.py", "stubfs/syscalls.py"}


def modules() -> Iterator[Tuple[str, ast.Module]]:
    for package in ("stubfs", "spfs"):
        for path in sorted((TOP / package).rglob("*.py")):
            yield str(path.relative_to(TOP)), ast.parse(path.read_text(), str(path))


def imported(tree: ast.Module) -> Set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_file_system_never_imports_the_controller_side() -> None:
    offenders = [
        (name, used)
        for name, tree in modules()
        if name.startswith("stubfs/")
        for used in imported(tree)
        if used.split(".")[0] == "spfs"
    ]
    assert offenders == []


def test_ctypes_only_in_the_wrappers_of_system_calls() -> None:
    users = {name for name, tree in modules() if "ctypes" in {used.split(".")[0] for used in imported(tree)}}
    assert {name for name in users if not name.startswith("spfs/linux/")} <= MAY_USE_CTYPES


def test_the_wrappers_import_nothing_above_them() -> None:
    for name, tree in modules():
        if name.startswith("spfs/linux/"):
            above = {used for used in imported(tree) if used.startswith("spfs.") and not used.startswith("spfs.linux")}
            assert not above, name


def exits(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return (node.value.id, node.attr) == ("sys", "exit")
    return isinstance(node, ast.Name) and node.id == "SystemExit"


def test_only_the_command_line_exits() -> None:
    allowed = ("stubfs/cli.py", "stubfs/__main__.py", "spfs/cli/")
    users = {name for name, tree in modules() if any(map(exits, ast.walk(tree)))}
    assert {name for name in users if not name.startswith(allowed)} == set()


def test_every_module_says_what_lives_in_it() -> None:
    missing = [name for name, tree in modules() if tree.body and not ast.get_docstring(tree)]
    assert missing == []
