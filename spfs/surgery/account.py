"""What was moved and why the rest was not, over all rounds of a switch: what the final report is made of."""

from __future__ import annotations

from typing import Dict, Iterable, List, Tuple

from spfs.references import LeftReference
from spfs.surgery import report
from spfs.surgery.records import Process
from spfs.surgery.theatre import CANNOT_STOP

Identity = Tuple[int, int]
"""pid and start time: names a process for ever."""


class Account:
    """``moved``: how many references of each kind."""

    def __init__(self) -> None:
        self.moved: Dict[str, int] = {}
        self._reasons: Dict[Tuple[int, int, str], str] = {}
        self._lost: List[LeftReference] = []

    def add(self, processes: Iterable[Process]) -> List[Identity]:
        """After a round: count, and remember the reasons. The processes that could not be stopped."""
        stuck: List[Identity] = []
        for process in processes:
            if process.problem is not None and CANNOT_STOP in process.problem:
                stuck.append((process.pid, process.start))
            self._lost += report.lost(process)
            for kind, what in report.moved(process):
                self.moved[kind] = self.moved.get(kind, 0) + 1
            for kind, what, _, problem in report.entries(process):
                why = process.problem or problem
                if why is not None:
                    self._reasons[process.pid, process.start, what] = why
        return stuck

    def forget(self, process: Identity) -> None:
        """It is worth another try: what was known of it is not true any more."""
        self._reasons = {key: why for key, why in self._reasons.items() if key[:2] != process}

    def has_untried(self, processes: Iterable[Process]) -> bool:
        """Is there anything that was not tried yet, and could be moved?"""
        return any(
            problem is None and process.problem is None and (process.pid, process.start, what) not in self._reasons
            for process in processes
            for _, what, _, problem in report.entries(process)
        )

    def left(self, processes: Iterable[Process]) -> List[LeftReference]:
        """What the processes still hold, with the reasons that are known, and what was lost."""
        left = list(self._lost)
        for process in processes:
            for kind, what, path, problem in report.entries(process):
                known = self._reasons.get((process.pid, process.start, what))
                # What was met when it was tried says more than what is seen from outside.
                why = known or process.problem or problem or "it came while the processes were moved"
                left.append(LeftReference(process.pid, process.command, kind, what, path, why))
        return left
