"""The drawing: one SVG without scripts, fonts or anything else from outside, which follows light and dark screens."""

from __future__ import annotations

import time
from html import escape
from typing import Iterator, List, Sequence, Tuple

from spfs.timeline.story import Replace, Span, Story, Wait, blocked, seconds, steps
from stubfs.errors import printable

WIDTH = 1180  # pixels
LABEL = 270  # of them, for who or what a row is about
RIGHT = 24
ROW, GAP = 22, 8
MAX_ROWS = 40  # processes, those that waited longest
MAX_BARS = 400  # requests of one process
_CHARACTER = 6.4  # pixels of the small font, about
_LETTER = 7.2  # of the ordinary one
_QUIET = 0.1  # of what is before the last event is drawn after it, if nothing happens any more
MAX_LANES = 4  # requests of one process at the same time that are drawn beside each other
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600,
          7200, 14400, 28800, 86400, 172800, 604800)  # fmt: skip  # seconds

MODE_CLASSES = {"mounting": "m0", "restore": "m1", "stub": "m2", "proxy": "m3"}
_COLOURS = 10
KINDS = ("lookup", "open", "read", "write", "getattr", "create", "readdir")  # each has a colour, the rest share one

STYLE = """\
svg { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); background: var(--paper);
  --paper: #ffffff; --ink: #1c2733; --soft: #64748b; --line: #e2e8f0; --band: #f8fafc;
  --m0: #cbd5e1; --m1: #93c5fd; --m2: #fcd34d; --m3: #86efac; --step: #c7d2fe; --good: #16a34a; --bad: #dc2626;
  --k0: #6366f1; --k1: #0ea5e9; --k2: #f59e0b; --k3: #ef4444; --k4: #14b8a6; --k5: #d946ef; --k6: #84cc16;
  --k7: #94a3b8; --k8: #fb7185; --k9: #a78bfa; }
@media (prefers-color-scheme: dark) { svg { --paper: #0f172a; --ink: #e2e8f0; --soft: #94a3b8; --line: #334155;
  --band: #172033; --m0: #475569; --m1: #1d4ed8; --m2: #a16207; --m3: #15803d; --step: #4338ca; } }
.soft { fill: var(--soft); } .small { font-size: 11px; } .head { font-weight: 600; } .end { text-anchor: end; }
.mid { text-anchor: middle; } .grid { stroke: var(--line); } .band { fill: var(--band); }
.m0 { fill: var(--m0); } .m1 { fill: var(--m1); } .m2 { fill: var(--m2); } .m3 { fill: var(--m3); }
.step { fill: var(--step); } .good { fill: var(--good); } .bad { fill: var(--bad); }
.cut { stroke: var(--bad); stroke-dasharray: 3 3; } .lens { fill: var(--bad); opacity: .08; }
.k0 { fill: var(--k0); } .k1 { fill: var(--k1); } .k2 { fill: var(--k2); } .k3 { fill: var(--k3); }
.k4 { fill: var(--k4); } .k5 { fill: var(--k5); } .k6 { fill: var(--k6); } .k7 { fill: var(--k7); }
.k8 { fill: var(--k8); } .k9 { fill: var(--k9); }
.wait { opacity: .8; } .wait:hover { opacity: 1; } .gaveup { stroke: var(--bad); stroke-width: 2; }
"""


def text(value: str) -> str:
    """Fit for a document: names may hold anything."""
    return escape(printable(value))


def kind(operation: str) -> str:
    return f"k{KINDS.index(operation) if operation in KINDS else len(KINDS)}"


def fit(value: str, width: float, character: float = _CHARACTER) -> str:
    """As much of it as ``width`` pixels hold."""
    room = int(width / character)
    return value if len(value) <= room else value[: max(0, room - 1)] + "…" if room > 3 else ""


class _Canvas:
    """Rows from top to bottom, on one axis of time."""

    def __init__(self, begin: float, end: float) -> None:
        self.begin = begin
        self.span = max(end - begin, 1e-3)
        self.y = 0.0
        self.parts: List[str] = []

    def x(self, when: float) -> float:
        share = min(1.0, max(0.0, (when - self.begin) / self.span))
        return LABEL + share * (WIDTH - LABEL - RIGHT)

    def add(self, part: str) -> None:
        self.parts.append(part)

    def write(self, x: float, y: float, value: str, style: str = "", title: str = "") -> None:
        hint = f"<title>{text(title)}</title>" if title else ""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{hint}{text(value)}</text>')

    def bar(self, span: Span, style: str, title: str, label: str = "", lane: int = 0, lanes: int = 1) -> None:
        """At least a pixel, so that the shortest can be seen; in one of the ``lanes`` that share the row."""
        left, height = self.x(span.begin), ROW / lanes
        width = max(1.0, self.x(span.end) - left)
        self.add(
            f'<rect x="{left:.1f}" y="{self.y + lane * height + 0.5:.1f}" width="{width:.1f}" height="{height - 1:.1f}"'
            f' rx="2" class="{style}"><title>{text(title)}</title></rect>'
        )
        shown = fit(label, width - 8) if lanes == 1 else ""
        if shown:
            self.write(left + 5, self.y + 15, shown, "small", title)

    def row(self, label: str, title: str = "", note: str = "") -> None:
        room = LABEL - 16 - (_CHARACTER * len(note) + 10 if note else 0)
        self.write(0, self.y + 15, fit(label, room, _LETTER), "", title)
        if note:
            self.write(LABEL - 12, self.y + 15, note, "soft small end")

    def next(self, gap: float = GAP) -> None:
        self.y += ROW + gap

    def swatch(self, x: float, y: float, style: str, label: str) -> None:
        """What a colour means."""
        self.add(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" rx="2" class="{style}"/>')
        self.write(x + 14, y, label, "soft small")

    def heading(self, value: str, note: str = "") -> None:
        self.y += 10
        self.write(0, self.y + 15, value, "head")
        if note:
            self.write(LABEL, self.y + 15, note, "soft small")
        self.next(2)


def draw(story: Story) -> str:
    """The picture of one mount."""
    # A mount that is left as it is would have all that happened on the first pixels, some days later.
    quiet = max(1.0, _QUIET * (story.last - story.begin))
    canvas = _Canvas(story.begin, min(story.end, story.last + quiet))
    canvas.y = 26
    _modes(canvas, story)
    for number, replace in enumerate(story.replaces, 1):
        _replace(canvas, story, replace, f"replace {number}" if len(story.replaces) > 1 else "replace")
    _waits(canvas, story)
    bottom = canvas.y
    grid = list(_axis(canvas, bottom))
    _cuts(canvas, story, bottom)
    for replace in story.replaces:
        if replace.blackout is not None:
            _blackout(canvas, replace, bottom)
            bottom = canvas.y
    label = f"Timeline of the delayed mount {story.id} on {story.mountpoint}"
    parts = "\n".join(grid + canvas.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {canvas.y + 8:.0f}" width="{WIDTH}"'
        f' role="img" aria-label="{text(label)}">\n<style>{STYLE}</style>\n{parts}\n</svg>'
    )


def _axis(canvas: _Canvas, bottom: float) -> Iterator[str]:
    step = next((step for step in _TICKS if canvas.span / step <= 10), _TICKS[-1])
    # In so many steps that a record of months has no more lines than can be seen.
    while canvas.span / step > 20:
        step *= 2
    for number in range(int(canvas.span / step + 1e-9) + 1):
        x = canvas.x(canvas.begin + number * step)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom:.1f}" class="grid"/>'
        label = "0" if not number else f"+{seconds(number * step)}"
        yield f'<text x="{x:.1f}" y="12" class="soft small mid">{label}</text>'


def _modes(canvas: _Canvas, story: Story) -> None:
    canvas.row("mode")
    x = 60.0
    for mode in ("restore", "stub", "proxy"):
        canvas.swatch(x, canvas.y + 15, MODE_CLASSES[mode], mode)
        x += 20 + _CHARACTER * len(mode)
    for span in story.modes:
        lasted = f"{span.name}: {seconds(span.seconds)}"
        canvas.bar(span, MODE_CLASSES.get(span.name, "m0"), lasted, span.name)
    canvas.next()
    if story.end > canvas.begin + canvas.span:
        canvas.y -= GAP
        quiet = f"and so for {seconds(story.end - story.last)} more, in which nothing happened"
        canvas.write(WIDTH - RIGHT, canvas.y + 11, quiet, "soft small end")
        canvas.next(0)
    taken_over = story.managers[1:]
    if taken_over:
        canvas.row("manager")
        for when, pid in taken_over:
            x = canvas.x(when)
            canvas.add(f'<path d="M{x:.1f} {canvas.y + 4:.1f} l6 14 h-12 z" class="step">'
                       f"<title>taken over by manager {pid}</title></path>")  # fmt: skip
        canvas.next()


def _replace(canvas: _Canvas, story: Story, replace: Replace, name: str) -> None:
    canvas.row(name, f"{replace.fstype} {replace.source}")
    for span in steps(replace, story.end):
        canvas.bar(span, "step", f"{span.name}: {seconds(span.seconds)}", span.name)
    if replace.end is not None:
        x, good = canvas.x(replace.end), replace.phase == "done"
        canvas.add(
            f'<circle cx="{x:.1f}" cy="{canvas.y + ROW / 2:.1f}" r="5" class="{"good" if good else "bad"}">'
            f"<title>{text(replace.phase)}{text(': ' + replace.error if replace.error else '')}</title></circle>"
        )
    canvas.next()
    if replace.attempts:
        failed = [attempt for attempt in replace.attempts if attempt.error]
        canvas.row("mount attempts", note=f"{len(failed)} failed" if failed else "")
        for attempt in replace.attempts:
            outcome = attempt.error or "mounted"
            canvas.add(
                f'<circle cx="{canvas.x(attempt.time):.1f}" cy="{canvas.y + ROW / 2:.1f}" r="4"'
                f' class="{"bad" if attempt.error else "good"}"><title>{text(f"attempt {attempt.number}: {outcome}")}'
                f" (+{seconds(attempt.time - canvas.begin)})</title></circle>"
            )
        canvas.next()


def _waits(canvas: _Canvas, story: Story) -> None:
    rows = story.by_process()
    if not rows:
        canvas.heading("who waited", "nobody")
        return
    canvas.heading("who waited", "")
    _legend(canvas, sorted({kind(wait.name) for wait in story.waits}), story.waits)
    for who, waits in rows[:MAX_ROWS]:
        _row(canvas, who, waits)
    if len(rows) > MAX_ROWS:
        canvas.row(f"and {len(rows) - MAX_ROWS} more processes")
        canvas.next(2)


def _legend(canvas: _Canvas, kinds: Sequence[str], waits: Sequence[Wait]) -> None:
    x, y = float(LABEL), canvas.y - ROW + 13
    for style in kinds:
        names = sorted({wait.name for wait in waits if kind(wait.name) == style})
        label = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
        canvas.swatch(x, y, style, label)
        x += 15 + _CHARACTER * len(label) + 18


def _row(canvas: _Canvas, who: str, waits: Sequence[Wait]) -> None:
    canvas.row(who, who, seconds(blocked(waits)))
    lanes: List[float] = []  # until when each is taken
    placed: List[Tuple[Wait, int]] = []
    for wait in sorted(sorted(waits, key=lambda one: -one.seconds)[:MAX_BARS], key=lambda one: one.begin):
        free = [number for number, until in enumerate(lanes) if until <= wait.begin]
        if not free and len(lanes) < MAX_LANES:
            lanes.append(0.0)
            free = [len(lanes) - 1]
        lane = free[0] if free else len(placed) % MAX_LANES
        lanes[lane] = max(lanes[lane], wait.end)
        placed.append((wait, lane))
    for wait, lane in placed:
        style = f"wait {kind(wait.name)}" + ("" if wait.how in ("answered", "waiting") else " gaveup")
        canvas.bar(wait, style, describe(wait), f"{wait.name} {wait.path}", lane, len(lanes))
    canvas.next(2)


def describe(wait: Wait) -> str:
    who = f"thread {wait.tid} of process {wait.pid}" if wait.tid != wait.pid else f"process {wait.pid}"
    how = {"waiting": "waits still", "answered": "then answered"}.get(wait.how, wait.how)
    return f"{wait.name} {wait.path}: {seconds(wait.seconds)}, {how} ({who}, uid {wait.uid}: {wait.command})"


def _cuts(canvas: _Canvas, story: Story, bottom: float) -> None:
    for replace in story.replaces:
        if replace.blackout_began is not None:
            x = canvas.x(replace.blackout_began)
            canvas.add(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom:.1f}" class="cut"/>')


def _blackout(canvas: _Canvas, replace: Replace, top: float) -> None:
    """The milliseconds in which everything stood still, under a lens."""
    assert replace.blackout is not None
    canvas.y = top + 34
    left, right = float(LABEL), float(WIDTH - RIGHT)
    began = replace.blackout_began
    if began is not None:
        x = canvas.x(began)
        canvas.add(f'<path d="M{x:.1f} {top:.1f} L{left:.1f} {canvas.y:.1f} H{right:.1f} Z" class="lens"/>')
    canvas.row("blackout", "from the first process's stop to the last one's going on", seconds(replace.blackout))
    legend: List[Tuple[str, str]] = []
    x, total = left, max(replace.blackout, sum(share for _, share in replace.blackout_stages), 1e-9)
    for number, (name, share) in enumerate(replace.blackout_stages):
        width = share / total * (right - left)
        style = f"k{number % _COLOURS}"
        label = f"{name} {seconds(share)}"
        canvas.add(f'<rect x="{x:.2f}" y="{canvas.y:.1f}" width="{width:.2f}" height="{ROW}" class="wait {style}">'
                   f"<title>{text(label)}</title></rect>")  # fmt: skip
        shown = fit(label, width - 8)
        if shown:
            canvas.write(x + 5, canvas.y + 15, shown, "small", label)
        legend.append((style, label))
        x += width
    canvas.next(4)
    x = left
    for style, label in legend:
        width = 15 + _CHARACTER * len(label) + 16
        if x + width > WIDTH:
            x = left
            canvas.y += 18
        canvas.swatch(x, canvas.y + 9, style, label)
        x += width
    canvas.y += 18
    if began is not None:
        canvas.write(left, canvas.y + 9, f"began {clock(began, 3)}, {began - canvas.begin:.3f} s after 0", "soft small")
        canvas.y += 18


def clock(when: float, digits: int = 0) -> str:
    """Local time, with so many digits of the second."""
    rounded = round(when, digits) if digits else float(int(when))
    fraction = f"{rounded % 1:.{digits}f}"[1:] if digits else ""
    return time.strftime(f"%Y-%m-%d %H:%M:%S{fraction} %z", time.localtime(rounded))
