"""What the manager has counted since it was started, for metrics; numbers only, no form of presentation."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Tuple

from spfs.registry import Managed

BLACKOUT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds


class Counters:
    """count() is told every event of the manager; data() is what has come together."""

    def __init__(self) -> None:
        self._events: Dict[str, int] = {}
        self._replaces: Dict[str, int] = {}
        self._stages: Dict[str, float] = {}
        self._moved: Dict[str, int] = {}
        self._left = 0
        self._blackouts = [0] * (len(BLACKOUT_BOUNDS) + 1)
        self._blackout = 0.0

    def count(self, managed: Managed, event: str, details: Mapping[str, Any]) -> None:
        self._events[event] = self._events.get(event, 0) + 1
        if event == "replace-ended":
            phase = details["phase"]
            self._replaces[phase] = self._replaces.get(phase, 0) + 1
            self._report(details["report"])

    def _report(self, report: Optional[Mapping[str, Any]]) -> None:
        if report is None:
            return
        pairs: Tuple[Tuple[Dict[str, Any], str], ...] = ((self._moved, "moved"), (self._stages, "stages"))
        for sums, name in pairs:
            for key, value in report.get(name, {}).items():
                sums[key] = sums.get(key, 0) + value
        self._left += len(report.get("left", ()))
        blackout = report.get("blackout")
        if blackout is not None:
            self._blackout += blackout
            self._blackouts[sum(bound < blackout for bound in BLACKOUT_BOUNDS)] += 1

    def data(self) -> Dict[str, Any]:
        """``events`` by name; ``replaces`` that ended by phase; references ``moved`` by kind, and ``left``;
        ``blackout``: how many were as long as each bound and longer than the one before (the last: longer than all),
        their ``sum`` and the sums of their ``stages``, in seconds."""
        return {
            "events": self._events,
            "replaces": self._replaces,
            "moved": self._moved,
            "left": self._left,
            "blackout": {
                "bounds": BLACKOUT_BOUNDS, "counts": self._blackouts, "sum": self._blackout, "stages": self._stages,
            },
        }  # fmt: skip
