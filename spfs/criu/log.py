"""The log of what went wrong in calls of the action script, one line each: through its RPC CRIU shows nobody."""

from __future__ import annotations

import time
from typing import List

LOG = "/run/spfs-criu.log"


def log(message: str, token: str = "-") -> None:
    """``token``: which restoration it is about."""
    try:
        with open(LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {token} {message}\n")
    except OSError:
        pass  # it has been said on standard error, too


def said(token: str) -> List[str]:
    """What was logged about a restoration; ``token`` is like no other as long as the machine runs."""
    try:
        with open(LOG, encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip("\n").split(" ", 3) for line in file]
    except OSError:
        return []
    return [words[3] for words in lines if len(words) == 4 and words[2] == token]
