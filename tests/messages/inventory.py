"""The messages that a user can meet, found in the source, and which of them the tests have met.

``python tests/messages/inventory.py FILE`` takes what a run with SPFS_MESSAGES=FILE has written. It fails if there is
a message that no test has met and that is not listed below with the reason why, or one that is listed is none any more.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Set, Tuple

TOP = Path(__file__).parents[2]
CLASSES = ("StubfsError", "SpfsError", "UsageError", "MissingFeatureError", "BadRequest", "RequestFailed")

UNMET: Dict[str, str] = {}
"""Message as in the source -> why no test meets it."""


@dataclass(frozen=True)
class Message:
    """``text``: the literal, as in the source without its prefix and quotes; "" if it is put together elsewhere."""

    file: str
    first: int
    last: int
    text: str
    hint: Optional[str]


def messages() -> Iterator[Message]:
    for package in ("stubfs", "spfs"):
        for path in sorted((TOP / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and _name(node.func) in CLASSES and node.args:
                    file = str(path.relative_to(TOP))
                    hint = _text(node.args[1]) if len(node.args) > 1 else None
                    yield Message(file, node.lineno, node.end_lineno or node.lineno, _text(node.args[0]) or "", hint)


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else ""


def _text(node: ast.expr) -> Optional[str]:
    """A literal with {} for what is put in; None if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def unmet(lines: Set[Tuple[str, int]]) -> List[Message]:
    return [
        message for message in messages()
        if not any((message.file, line) in lines for line in range(message.first, message.last + 1))
    ]  # fmt: skip


def main(path: str) -> int:
    places = (line.rpartition(":") for line in set(Path(path).read_text().splitlines()))
    missing = unmet({(file, int(line)) for file, _, line in places})
    new = [message for message in missing if message.text not in UNMET]
    for message in new:
        print(f"{message.file}:{message.first}: no test has met: {message.text or '(put together elsewhere)'}")
    for text in sorted(set(UNMET) - {message.text for message in missing}):
        print(f"was met this time, although listed: {text}")  # one that hangs on a race is met now and then
    stale = set(UNMET) - {message.text for message in messages()}
    for text in sorted(stale):
        print(f"is no message any more, strike it off the list: {text}")
    print(f"{len(list(messages()))} messages, {len(missing)} not met, {len(new)} of them without a reason")
    return 1 if new or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
