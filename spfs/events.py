"""What happens to mounts, in the manager: counted, written into each mount's record, told to those who wait for it.

The registry and the supervisor tell; docs/reference/records.md says what an event is called, and what it says.
"""

from __future__ import annotations

import itertools
import os
from typing import Any, Callable, Dict, Mapping, Optional

from spfs import __version__
from spfs.registry import Managed
from stubfs import record
from stubfs.record import Record

FREQUENT = ("attempt", "waiting")  # what a late server causes again and again
LISTED = 200  # references, processes and notes of a report that are kept in a record

Listener = Callable[[Managed, str, Mapping[str, Any]], None]


class Events:
    """``number`` counts them since the manager's start; ``listener`` gets each."""

    def __init__(self, listener: Optional[Listener] = None) -> None:
        self.number = 0
        self._listener = listener
        self._waiting: Dict[int, Callable[[], None]] = {}
        self._keys = itertools.count()
        self._records: Dict[int, Record] = {}

    def tell(self, managed: Managed, event: str, details: Mapping[str, Any], when: Optional[float] = None) -> None:
        self.number += 1
        if managed.record:
            self._write(managed, event, details, when)
        if self._listener is not None:
            self._listener(managed, event, details)
        for key in list(self._waiting):
            callback = self._waiting.pop(key, None)
            if callback is not None:
                callback()

    def _write(self, managed: Managed, event: str, details: Mapping[str, Any], when: Optional[float]) -> None:
        kept = self._records.get(managed.number)
        if kept is None:
            kept = self._records[managed.number] = Record(managed.record)
        if "report" in details:
            details = {**details, "report": shortened(details["report"])}
        limit = record.FREQUENT if event in FREQUENT else record.LAST if event == "gone" else record.ORDINARY
        kept.write(record.line(event, details, when), limit)
        if event == "gone":
            del self._records[managed.number]

    def forget(self, managed: Managed) -> None:
        """Nothing more will be told about it."""
        self._records.pop(managed.number, None)

    def once(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back at the next event, unless the function that is returned was called before."""
        key = next(self._keys)
        self._waiting[key] = callback
        return lambda: self._waiting.pop(key, None) and None


def introduction(managed: Managed) -> Dict[str, Any]:
    """The first entry of a record: what the others are about, and who writes them."""
    return {
        "version": record.VERSION,
        "id": managed.id,
        "mountpoint": managed.mountpoint,
        "mode": managed.mode,
        "manager": os.getpid(),
        "manager_version": __version__,
    }


def shortened(report: Optional[Mapping[str, Any]]) -> Optional[Dict[str, Any]]:
    """A replace's report for a record, whose lines must not grow with the number of processes."""
    if report is None:
        return None
    kept = dict(report)
    for key, value in report.items():
        if isinstance(value, list) and len(value) > LISTED:
            kept[key], kept[f"{key}_count"] = value[:LISTED], len(value)
    return kept
