"""The page: the picture, the figures that matter, and tables; one file that opens offline and is printed as it is."""

from __future__ import annotations

from typing import Iterable, List, Sequence, Tuple

from spfs.timeline import picture
from spfs.timeline.picture import clock, text
from spfs.timeline.story import Replace, Story, blocked, seconds

_STYLE = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2733; --soft: #64748b; --line: #e2e8f0; --card: #f8fafc;
  --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f172a; --ink: #e2e8f0; --soft: #94a3b8; --line: #334155;
  --card: #172033; --good: #4ade80; --bad: #f87171; } }
body { margin: 0 auto; padding: 24px 28px 48px; max-width: 1180px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 28px 0 8px; }
header { overflow-wrap: anywhere; } header p { margin: 2px 0 0; color: var(--soft); }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
section + section { border-top: 2px solid var(--line); margin-top: 48px; padding-top: 24px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px;
  min-width: 120px; }
.cards b { display: block; font-size: 20px; } .cards span { color: var(--soft); font-size: 13px; }
figure, .table { margin: 0; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 860px; height: auto; }
table { border-collapse: collapse; width: 100%; min-width: 640px; font-size: 13px; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } td.n, th.n { text-align: right; } th, td.n { white-space: nowrap; }
.none { color: var(--soft); }
"""
_LISTED = 200  # rows of a table
_COMMAND = 140  # characters


def draw(stories: Sequence[Story]) -> str:
    """One HTML document for all of them."""
    names = ", ".join(story.id for story in stories)
    sections = "\n".join(_section(story) for story in stories)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched and nothing runs, whatever the names in the record may hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>Delayed mount {text(names)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{sections}\n"
        "</body>\n</html>\n"
    )


def _section(story: Story) -> str:
    parts = [
        f"<header><h1>{text(story.id)} <code>{text(story.mountpoint)}</code></h1>",
        f"<p>{_outcome(story)}</p><p>{clock(story.begin)}, {seconds(story.end - story.begin)}</p></header>",
        '<div class="cards">' + "".join(_card(*card) for card in _cards(story)) + "</div>",
        f"<figure>{picture.draw(story)}</figure>",
        *_waits(story),
        *_attempts(story),
        *_left(story),
    ]
    return '<section>\n' + "\n".join(parts) + "\n</section>"


def _outcome(story: Story) -> str:
    if story.dead:
        return f'<b class="bad">Dead: {text(story.dead)}</b>'
    replace = story.replace
    if replace is None:
        return text(f"Gone: {story.why}" if story.why else "There; no replace was asked for")
    what = f"by {replace.fstype} {replace.source}"
    if replace.phase == "done":
        names = {"left": "reference", "mounts_left": "mount"}
        counts = {name: len(replace.report.get(key, ())) for key, name in names.items()}
        left = " and ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)
        if left:
            return f'<b class="bad">Replaced {text(what)}; {left} left on the stand-in</b>'
        return f'<b class="good">Replaced {text(what)}</b>'
    if replace.end is not None:
        return f'<b class="bad">Replace {text(what)} {text(replace.phase)}: {text(replace.error)}</b>'
    return text(f"To be replaced {what}")


def _cards(story: Story) -> Iterable[Tuple[str, str]]:
    rows = story.by_process()
    requests = len(story.waits) + sum(int(one["count"]) for one in story.sums.values())
    yield str(requests), "requests were held"
    if rows:
        who, waits = rows[0]
        yield seconds(blocked(waits)), f"the longest: {who[:30]}"
        yield str(len([who for who, waits in rows if waits[0].pid])), "processes waited"
    replace = story.replace
    if replace is None:
        return
    yield str(sum(len(one.attempts) for one in story.replaces)), "attempts to mount"
    if replace.blackout is not None:
        yield seconds(replace.blackout), "blackout"
    moved = replace.report.get("moved")
    if moved is not None:
        yield str(sum(moved.values())), "references moved" + _kinds(replace)


def _kinds(replace: Replace) -> str:
    kinds = [f"{count} {kind}" for kind, count in replace.report["moved"].items() if count]
    return f": {', '.join(kinds)}" if kinds else ""


def _card(value: str, label: str) -> str:
    return f"<div><b>{text(value)}</b><span>{text(label)}</span></div>"


def _waits(story: Story) -> List[str]:
    rows = []
    for who, waits in story.by_process():
        longest = max(waits, key=lambda wait: wait.seconds)
        ends = {how: len([wait for wait in waits if wait.how == how]) for how in sorted({wait.how for wait in waits})}
        called = who if len(who) <= _COMMAND else who[: _COMMAND - 1] + "…"
        ended = ", ".join(f"{count} {how}" for how, count in ends.items())
        what = f"{longest.name} {longest.path}"
        rows.append([called, seconds(blocked(waits)), str(len(waits)), what, seconds(longest.seconds), ended])
    for operation, one in sorted(story.sums.items()):
        longest_of_all = seconds(one["longest"])
        rows.append(["others, not listed one by one", "", str(int(one["count"])), operation, longest_of_all, ""])
    columns = ["Process", "#Stood still", "#Requests", "Longest wait for", "#It took", "They ended"]
    return [f"<h2>Who waited, and for what</h2>{_table(columns, rows)}"]


def _attempts(story: Story) -> List[str]:
    parts = []
    for replace in story.replaces:
        if any(attempt.error for attempt in replace.attempts):
            rows = [[str(attempt.number), f"+{seconds(attempt.time - story.begin)}", attempt.error or "mounted"]
                    for attempt in replace.attempts]  # fmt: skip
            parts.append(f"<h2>Attempts to mount {text(replace.source)}</h2>")
            parts.append(_table(["#Attempt", "#When", "Result"], rows))
    return parts


def _left(story: Story) -> List[str]:
    replace = story.replace
    report = replace.report if replace is not None else {}
    parts = []
    if report.get("left"):
        rows = [[str(one.get(key) or "") for key in ("pid", "command", "what", "path", "reason")]
                for one in report["left"]]  # fmt: skip
        parts.append("<h2>Left on the stand-in</h2>" + _table(["#Pid", "Command", "What", "Path", "Why"], rows))
    if report.get("mounts_left"):
        rows = [[str(one["mount"]), str(one["reason"])] for one in report["mounts_left"]]
        parts.append("<h2>Mounts that are left</h2>" + _table(["Mount", "Why"], rows))
    if report.get("notes"):
        parts.append("<h2>Notes</h2>" + _table(["Note"], [[str(note)] for note in report["notes"]]))
    return parts


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A column whose name begins with # holds numbers."""
    if not rows:
        return '<p class="none">Nobody.</p>'
    styles = [' class="n"' if column.startswith("#") else "" for column in columns]
    head = "".join(f"<th{style}>{text(name.lstrip('#'))}</th>" for name, style in zip(columns, styles))
    body = "\n".join(
        "<tr>" + "".join(f"<td{style}>{text(cell)}</td>" for cell, style in zip(row, styles)) + "</tr>"
        for row in rows[:_LISTED]
    )
    more = f'<p class="none">And {len(rows) - _LISTED} more.</p>' if len(rows) > _LISTED else ""
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>{more}'
