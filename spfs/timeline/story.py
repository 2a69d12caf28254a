"""A record's entries put together: modes, replaces with their stages and attempts, who waited for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

STAGES = {
    "begun": "mounting the real file system",
    "mounted": "examining processes",
    "prepared": "prepared",
    "proxy": "letting requests through",
    "frozen": "freezing again",
    "switched": "verifying",
    "verified": "cleaning up",
}
"""What is done from a stage on, until the next one."""


@dataclass(frozen=True)
class Span:
    """Times: seconds since the epoch."""

    begin: float
    end: float
    name: str

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Wait(Span):
    """A request that was held: ``name`` is its operation. ``how`` it ended; "waiting": it has not."""

    path: str
    pid: int
    tid: int
    command: str
    uid: int
    how: str


@dataclass(frozen=True)
class Attempt:
    time: float
    number: int
    error: str  # "" for the one that succeeded


@dataclass
class Replace:
    """One try to put ``source`` in the mount's place. ``end`` is None while it is at work."""

    asked: float
    source: str
    fstype: str
    end: Optional[float] = None
    phase: str = ""
    error: str = ""
    steps: List[Tuple[float, str]] = field(default_factory=list)  # when what was begun
    attempts: List[Attempt] = field(default_factory=list)
    switched: Optional[float] = None
    report: Dict[str, Any] = field(default_factory=dict)

    @property
    def blackout(self) -> Optional[float]:
        """Seconds for which the processes stood still."""
        value = self.report.get("blackout")
        return float(value) if value is not None else None

    @property
    def blackout_began(self) -> Optional[float]:
        """The clock's time; of a record that does not have it, about."""
        told = self.report.get("blackout_began")
        if told is not None:
            return float(told)
        return self.switched - self.blackout if self.switched is not None and self.blackout is not None else None

    @property
    def blackout_stages(self) -> List[Tuple[str, float]]:
        """In their order, with what was spent between them as the last one."""
        stages = [(str(name), float(seconds)) for name, seconds in self.report.get("stages", {}).items()]
        rest = (self.blackout or 0.0) - sum(seconds for _, seconds in stages)
        return stages + ([("between", rest)] if stages and rest > 0 else [])


@dataclass
class Story:
    """One mount's. ``end``: when it was gone, or the moment of looking; ``why`` it is gone, or "". ``last``: when
    something happened for the last time, or somebody still waits."""

    id: str
    mountpoint: str
    begin: float
    end: float
    last: float
    why: str = ""
    dead: str = ""
    modes: List[Span] = field(default_factory=list)
    replaces: List[Replace] = field(default_factory=list)
    waits: List[Wait] = field(default_factory=list)
    sums: Dict[str, Dict[str, float]] = field(default_factory=dict)  # of waits that are not listed, by operation
    managers: List[Tuple[float, int]] = field(default_factory=list)  # when which one (its pid) began to look after it

    @property
    def replace(self) -> Optional[Replace]:
        """The last one."""
        return self.replaces[-1] if self.replaces else None

    def by_process(self) -> List[Tuple[str, List[Wait]]]:
        """(who, his waits); who stood still longest first."""
        found: Dict[Tuple[int, str], List[Wait]] = {}
        for wait in self.waits:
            found.setdefault((wait.pid, wait.command), []).append(wait)
        rows = [(_who(pid, command), waits) for (pid, command), waits in found.items()]
        return sorted(rows, key=lambda row: (-blocked(row[1]), row[0]))


def _who(pid: int, command: str) -> str:
    """Short: without the directories of the program."""
    program, space, arguments = command.partition(" ")
    called = f"{pid} {program.rpartition('/')[2]}{space}{arguments}".rstrip()
    return called if pid else "the kernel (readahead, writeback)"


def blocked(waits: Iterable[Span]) -> float:
    """Seconds for which at least one of the requests waited."""
    total, reached = 0.0, float("-inf")
    for span in sorted(waits, key=lambda one: one.begin):
        total += max(0.0, span.end - max(span.begin, reached))
        reached = max(reached, span.end)
    return total


def tell(entries: Sequence[Mapping[str, Any]], now: float, held: Iterable[Mapping[str, Any]] = ()) -> Story:
    """The story of a record's ``entries``, up to ``now`` if the mount is there still.

    ``held``: what waits at this moment, as a manager lists it. ValueError if they are no mount's.
    """
    first = next((entry for entry in entries if entry["event"] in ("mount", "taken-over")), None)
    if first is None:
        raise ValueError("it does not say which mount it is about")
    story = Story(str(first["id"]), str(first["mountpoint"]), float(first["time"]), now, now)
    story.begin = min([story.begin, *(float(entry.get("since", story.begin)) for entry in entries)])
    mode = Span(story.begin, story.begin, "mounting")
    for entry in entries:
        when, event = float(entry["time"]), entry["event"]
        if event in ("mounted", "mode"):
            story.modes.append(Span(mode.begin, when, mode.name))
            mode = Span(when, when, str(entry["mode"]))
        elif event in ("mount", "taken-over"):
            story.managers.append((when, int(entry["manager"])))
        elif event == "gone":
            story.end, story.why = when, str(entry["why"])
        elif event == "failed":
            story.dead = str(entry["why"])
        elif event == "wait":
            story.waits.append(_wait(entry, float(entry["since"]), when, str(entry["how"])))
        elif event == "waits":
            _add_sums(story.sums, entry["operations"])
        else:
            _replace(story.replaces, when, event, entry)
    story.last = max(float(entry["time"]) for entry in entries)
    story.end = max(story.end, story.last)
    story.modes.append(Span(mode.begin, story.end, mode.name))
    if not story.why:
        waiting = [_wait(entry, now - float(entry["age"]), now, "waiting") for entry in held]
        story.waits += waiting
        going_on = story.replace is not None and story.replace.end is None
        story.last = story.end if waiting or going_on else story.last
    return story


def _wait(entry: Mapping[str, Any], begin: float, end: float, how: str) -> Wait:
    parts = [part for part in (entry.get("path"), entry.get("name")) if part]
    called = entry.get("command_line") or entry.get("command") or ""
    return Wait(
        begin, end, str(entry["operation"]), "/".join(parts) or "/", int(entry["pid"]), int(entry["tid"]),
        str(called), int(entry["uid"]), how,
    )  # fmt: skip


def _add_sums(sums: Dict[str, Dict[str, float]], more: Mapping[str, Mapping[str, float]]) -> None:
    for operation, one in more.items():
        known = sums.setdefault(operation, {"count": 0, "seconds": 0.0, "longest": 0.0})
        known["count"] += one["count"]
        known["seconds"] += one["seconds"]
        known["longest"] = max(known["longest"], one["longest"])


def _replace(replaces: List[Replace], when: float, event: str, entry: Mapping[str, Any]) -> None:
    if event == "replace-asked":
        replaces.append(Replace(when, str(entry["source"]), str(entry["type"])))
        replaces[-1].steps.append((when, "held" if entry.get("mode") == "hold" else "waiting for its turn"))
        return
    if not replaces:
        return  # the beginning was lost
    last = replaces[-1]
    if event in ("replace-hold", "replace-release") and last.end is not None:
        replaces.append(Replace(when, last.source, last.fstype))
        last = replaces[-1]
    if event == "replace-hold":
        last.steps.append((when, "held"))
    elif event == "replace-release":
        last.steps.append((when, "waiting for its turn"))
    elif event == "waiting":
        last.steps.append((when, str(entry["waiting"])))
    elif event == "attempt":
        if last.steps[-1][1] != STAGES["begun"]:
            last.steps.append((when, STAGES["begun"]))
        last.attempts.append(Attempt(when, int(entry["attempt"]), str(entry["error"])))
    elif event == "stage":
        stage = str(entry["stage"])
        last.steps.append((when, STAGES.get(stage, stage)))
        if stage == "mounted":
            last.attempts.append(Attempt(when, len(last.attempts) + 1, ""))
        elif stage == "switched":
            last.switched = when
            last.report.update({key: entry[key] for key in ("blackout", "blackout_began") if key in entry})
    elif event == "replace-ended":
        last.end, last.phase = when, str(entry["phase"])
        last.error = str((entry["error"] or {}).get("message", ""))
        last.report.update(entry["report"] or {})


def steps(replace: Replace, until: float) -> List[Span]:
    """What the replace did, one after the other."""
    ends = [when for when, _ in replace.steps[1:]] + [replace.end if replace.end is not None else until]
    return [Span(begin, max(begin, end), name) for (begin, name), end in zip(replace.steps, ends) if end > begin]


def seconds(value: float) -> str:
    """A duration for people."""
    for limit, unit, factor in ((1e-3, "µs", 1e6), (1, "ms", 1e3), (60, "s", 1)):
        if value < limit:
            return f"{value * factor:.3g} {unit}" if value * factor < 100 else f"{value * factor:.0f} {unit}"
    minutes, rest = divmod(int(value + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
