"""The Trace Event Format of Chrome, which chrome://tracing and Perfetto show; times in microseconds of the epoch."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Sequence

from spfs.timeline.picture import clock, describe
from spfs.timeline.story import Story, steps

_MODES, _REPLACE, _BLACKOUT = 1, 2, 3  # "threads" of a mount, which is a "process" with a number no process has
_FIRST_MOUNT = 1 << 23  # above PID_MAX_LIMIT


def draw(stories: Sequence[Story]) -> Dict[str, Any]:
    """The whole trace, for JSON."""
    events: List[Dict[str, Any]] = []
    for number, story in enumerate(stories):
        events += _mount(story, _FIRST_MOUNT + number)
        events += _waits(story, number)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _micro(when: float) -> int:
    return round(when * 1e6)


def _span(
    name: str, category: str, pid: int, tid: int, begin: float, end: float, **arguments: object
) -> Dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": _micro(begin),
        "dur": max(1, _micro(end) - _micro(begin)), "args": arguments,
    }  # fmt: skip


def _name(kind: str, pid: int, tid: int, name: str) -> Dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _mount(story: Story, pid: int) -> Iterator[Dict[str, Any]]:
    yield _name("process_name", pid, 0, f"mount {story.id} on {story.mountpoint}")
    for tid, name in ((_MODES, "mode"), (_REPLACE, "replace"), (_BLACKOUT, "blackout")):
        yield _name("thread_name", pid, tid, name)
    for span in story.modes:
        yield _span(span.name, "mode", pid, _MODES, span.begin, span.end)
    for replace in story.replaces:
        for span in steps(replace, story.end):
            yield _span(span.name, "replace", pid, _REPLACE, span.begin, span.end, source=replace.source)
        for attempt in replace.attempts:
            yield {
                "ph": "i", "s": "t", "name": f"attempt {attempt.number}: {attempt.error or 'mounted'}",
                "cat": "attempt", "pid": pid, "tid": _REPLACE, "ts": _micro(attempt.time),
            }  # fmt: skip
        begin = replace.blackout_began
        if replace.blackout is not None and begin is not None:
            yield _span("blackout", "blackout", pid, _BLACKOUT, begin, begin + replace.blackout, began=clock(begin, 6))
            for name, share in replace.blackout_stages:
                yield _span(name, "blackout", pid, _BLACKOUT, begin, begin + share)
                begin += share


def _waits(story: Story, mount: int) -> Iterator[Dict[str, Any]]:
    for pid, command in sorted({(wait.pid, wait.command) for wait in story.waits if wait.pid}):
        yield _name("process_name", pid, 0, command)
    for number, wait in enumerate(story.waits):
        if wait.tid:
            yield _span(wait.name, "wait", wait.pid, wait.tid, wait.begin, wait.end, path=wait.path, how=wait.how)
            continue
        # On nobody's behalf: many at once, which one thread's spans could not be.
        ends = {"b": wait.begin, "e": wait.end}
        for phase, when in ends.items():
            yield {
                "ph": phase, "name": wait.name, "cat": "wait", "id": f"{mount}-{number}", "pid": _FIRST_MOUNT + mount,
                "tid": 0, "ts": _micro(when), "args": {"what": describe(wait)},
            }  # fmt: skip
