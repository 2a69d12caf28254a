"""The story as lines of text, in the order in which things happened."""

from __future__ import annotations

from typing import Iterator, List, Tuple

from spfs.timeline.picture import clock
from spfs.timeline.story import Replace, Story, blocked, seconds
from stubfs.errors import printable

_LISTED = 50  # processes
_COMMAND = 80  # characters


def draw(story: Story) -> str:
    lines = [f"{story.id} on {story.mountpoint}, from {clock(story.begin)}"]
    happened = sorted(_happened(story), key=lambda one: one[0])
    lines += [f"{'+' + seconds(when - story.begin):>12}  {what}" for when, what in happened]
    rows = story.by_process()
    if rows:
        lines += ["", "who waited:"]
    for who, waits in rows[:_LISTED]:
        longest = max(waits, key=lambda wait: wait.seconds)
        called = who if len(who) <= _COMMAND else who[: _COMMAND - 3] + "..."
        what = f"{longest.name} {longest.path}, {seconds(longest.seconds)}"
        lines.append(f"{seconds(blocked(waits)):>12}  {called}: {len(waits)} requests, the longest: {what}")
    if len(rows) > _LISTED:
        lines.append(f"{'':>12}  and {len(rows) - _LISTED} more processes")
    for operation, one in sorted(story.sums.items()):
        lines.append(f"{seconds(one['longest']):>12}  the longest of {int(one['count'])} more: {operation}")
    return "\n".join(printable(line) for line in lines) + "\n"


def _happened(story: Story) -> Iterator[Tuple[float, str]]:
    for span in story.modes:
        yield span.begin, f"{span.name} mode" if span.name != "mounting" else "mounting"
    for when, pid in story.managers[1:]:
        yield when, f"taken over by manager {pid}"
    for replace in story.replaces:
        yield from _replace(replace)
    if story.dead:
        yield story.end, f"dead: {story.dead}"
    if story.why:
        yield story.end, f"gone: {story.why}"


def _replace(replace: Replace) -> Iterator[Tuple[float, str]]:
    yield replace.asked, f"replace by {replace.fstype} {replace.source} asked for"
    yield from replace.steps
    for attempt in replace.attempts:
        if attempt.error:
            yield attempt.time, f"attempt {attempt.number}: {attempt.error}"
    if replace.blackout_began is not None and replace.blackout is not None:
        stages: List[str] = [f"{name} {seconds(share)}" for name, share in replace.blackout_stages]
        yield replace.blackout_began, f"blackout of {seconds(replace.blackout)}: {', '.join(stages)}"
    if replace.end is not None:
        yield replace.end, f"replace {replace.phase}{': ' + replace.error if replace.error else ''}"
