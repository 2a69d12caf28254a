"""The record of one mount: what became of it, as JSON lines at the end of a file.

Several processes may append to one record: the manager says what happened to the mount, the file system process who
waited. A record is for people; nothing that is done depends on it, so what cannot be written is dropped.
"""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional

_log = logging.getLogger(__name__)

VERSION = 1
ORDINARY = 4 << 20  # bytes; what comes when a record has grown so far is dropped
FREQUENT = 1 << 20  # bytes; the same for what comes again and again by itself
LAST = 5 << 20  # bytes; the same for how it all ended


def line(event: str, details: Mapping[str, Any], when: Optional[float] = None) -> bytes:
    """One entry; ``when`` in seconds since the epoch (None: now)."""
    entry = {"time": time.time() if when is None else when, "event": event, **details}
    # ASCII with escapes: a file name's undecodable bytes are lone surrogates, which UTF-8 cannot carry.
    return json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n"


class Record:
    """The file at ``path``, made when there is something to say. It is open only while something is written."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._complained = False

    def write(self, lines: bytes, limit: int = ORDINARY) -> bool:
        """Append whole lines; False if the record is full, or cannot be written."""
        try:
            # O_APPEND: what another process has written meanwhile is not overwritten.
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if os.fstat(fd).st_size + len(lines) > limit:
                    return False
                os.write(fd, lines)
            finally:
                os.close(fd)
        except OSError as error:
            if not self._complained:
                _log.warning("cannot write the record %s: %s", self.path, error.strerror)
            self._complained = True
            return False
        return True


def read(path: str) -> List[Dict[str, Any]]:
    """The entries in the order of their times. OSError; a line that was not written to its end is left out."""
    with open(path, "rb") as file:
        return sorted(_entries(file.read()), key=lambda entry: float(entry["time"]))


def _entries(data: bytes) -> Iterator[Dict[str, Any]]:
    for text in data.splitlines():
        try:
            entry = json.loads(text)
            if isinstance(entry, dict) and isinstance(entry["event"], str) and float(entry["time"]) >= 0:
                yield entry
        except (ValueError, KeyError, TypeError):
            continue
