"""The log of what went wrong in calls of the action script, one line each: through its RPC CRIU shows nobody."""

from __future__ import annotations

import time

LOG = "/run/spfs-criu.log"


def log(message: str) -> None:
    try:
        with open(LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
    except OSError:
        pass  # it has been said on standard error, too
