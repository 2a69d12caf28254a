"""The story of a mount out of its record, and its drawings as a document, a trace and text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List
from xml.etree import ElementTree

import pytest

from spfs.timeline import lines, page, picture, trace
from spfs.timeline.story import Span, Story, Wait, blocked, seconds, steps, tell

TOP = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<script>alert("x")</script>&\n\udce9'


def wait(begin: float, end: float, pid: int, tid: int, name: str, how: str = "answered", **more: Any) -> Dict[str, Any]:
    return {
        "event": "wait", "time": end, "since": begin, "operation": "lookup", "path": "", "name": name, "pid": pid,
        "tid": tid, "command": "cat", "command_line": f"/bin/cat {name}", "uid": 0, "how": how, **more,
    }  # fmt: skip


def entries() -> List[Dict[str, Any]]:
    report = {
        "blackout": 0.005, "stages": {"stop": 0.001, "mounts": 0.003}, "moved": {"file": 3, "cwd": 0},
        "left": [{"pid": 9, "command": "x", "kind": "socket", "what": "fd 3", "path": "s", "reason": NASTY}],
        "mounts_left": [], "notes": ["a note"],
    }  # fmt: skip
    return [
        {"time": 100.0, "event": "mount", "version": 1, "id": "web", "mountpoint": "/data", "manager": 7},
        {"time": 100.2, "event": "mounted", "mode": "restore"},
        {"time": 101.0, "event": "mode", "mode": "stub", "former": "restore"},
        {"time": 102.0, "event": "replace-asked", "source": "srv:/x", "type": "nfs4", "mode": "hold"},
        {"time": 103.0, "event": "replace-release"},
        {"time": 103.1, "event": "stage", "stage": "begun"},
        {"time": 103.2, "event": "attempt", "attempt": 1, "errno": 111, "error": "Connection refused", "next": 1},
        {"time": 103.3, "event": "taken-over", "id": "web", "mountpoint": "/data", "manager": 8},
        {"time": 105.0, "event": "stage", "stage": "mounted"},
        {"time": 105.1, "event": "stage", "stage": "prepared", "processes": 2, "references": {"file": 3}},
        {"time": 105.2, "event": "stage", "stage": "proxy"},
        {"time": 105.2, "event": "mode", "mode": "proxy", "former": "stub"},
        wait(101.5, 105.2, 20, 20, "one"),
        wait(102.5, 103.5, 20, 21, NASTY, "interrupted"),
        wait(101.2, 105.2, 30, 30, "two"),
        wait(104.0, 105.2, 0, 0, "", command="", command_line="", operation="read"),
        {"time": 105.3, "event": "waits", "operations": {"read": {"count": 9, "seconds": 4.5, "longest": 1.5}}},
        {"time": 105.4, "event": "stage", "stage": "switched", "blackout": 0.005, "blackout_began": 105.29125,
         "moved": {"file": 3}},
        {"time": 105.5, "event": "stage", "stage": "verified"},
        {"time": 105.6, "event": "replace-ended", "phase": "done", "report": report, "error": None},
        {"time": 105.7, "event": "gone", "why": "replaced"},
    ]


def story() -> Story:
    return tell(entries(), 200.0)


def test_the_story_of_a_mount() -> None:
    told = story()
    assert (told.id, told.mountpoint, told.begin, told.end, told.why) == ("web", "/data", 100.0, 105.7, "replaced")
    assert [(span.name, span.begin, span.end) for span in told.modes] == [
        ("mounting", 100.0, 100.2), ("restore", 100.2, 101.0), ("stub", 101.0, 105.2), ("proxy", 105.2, 105.7),
    ]  # fmt: skip
    replace = told.replace
    assert replace is not None and (replace.phase, replace.source, replace.end) == ("done", "srv:/x", 105.6)
    assert [(attempt.number, attempt.error) for attempt in replace.attempts] == [(1, "Connection refused"), (2, "")]
    assert [span.name for span in steps(replace, told.end)] == [
        "held", "waiting for its turn", "mounting the real file system", "examining processes", "prepared",
        "letting requests through", "verifying", "cleaning up",
    ]  # fmt: skip
    stages = replace.blackout_stages
    assert [name for name, _ in stages] == ["stop", "mounts", "between"]
    assert sum(share for _, share in stages) == pytest.approx(0.005)
    assert told.managers == [(100.0, 7), (103.3, 8)]
    assert [(who, len(waits)) for who, waits in told.by_process()][0] == ("30 cat two", 1)


def test_time_is_counted_once_for_several_threads() -> None:
    assert blocked([Span(0, 4, ""), Span(1, 2, ""), Span(3, 6, ""), Span(8, 9, "")]) == 7
    assert blocked([]) == 0


def test_who_still_waits_is_in_the_story_of_a_mount_that_is_there() -> None:
    held = {"age": 3.0, "operation": "open", "path": "d", "name": None, "pid": 5, "tid": 6, "command": "sh", "uid": 1}
    told = tell(entries()[:3], 110.0, [held])
    (waiting,) = told.waits
    assert waiting == Wait(107.0, 110.0, "open", "d", 5, 6, "sh", 1, "waiting") and told.end == 110.0
    assert tell(entries(), 200.0, [held]).waits == story().waits  # it is gone: that was another mount of this name
    assert "waits still" in picture.draw(told)


def test_a_replace_that_is_asked_for_again_is_a_second_one() -> None:
    failed = {"phase": "failed", "report": None, "error": {"message": "cannot mount: no route", "hint": "", "errno": 1}}
    first = entries()[:6] + [{"time": 104.0, "event": "replace-ended", **failed}]
    told = tell([*first, {"time": 104.5, "event": "replace-release"}], 106.0)
    assert [(replace.phase, replace.asked) for replace in told.replaces] == [("failed", 102.0), ("", 104.5)]
    assert told.replaces[1].source == "srv:/x" and "cannot mount: no route" in lines.draw(told)


def test_what_is_no_record_is_said() -> None:
    with pytest.raises(ValueError, match="which mount"):
        tell([{"time": 1.0, "event": "mode", "mode": "stub"}], 2.0)
    lost = tell([{"time": 1.0, "event": "taken-over", "id": "a", "mountpoint": "/m", "manager": 1},
                 {"time": 2.0, "event": "attempt", "attempt": 1, "error": "x"}], 3.0)  # fmt: skip
    assert lost.replaces == [] and picture.draw(lost)


@pytest.mark.parametrize("value, shown", [
    (0, "0 µs"), (4.69e-6, "4.69 µs"), (0.00498, "4.98 ms"), (0.599, "599 ms"), (4.056, "4.06 s"), (61, "1 min 01 s"),
    (3600 * 26, "26 h 00 min"),
])  # fmt: skip
def test_durations(value: float, shown: str) -> None:
    assert seconds(value) == shown


def test_the_picture_is_a_document_by_itself_with_every_wait() -> None:
    drawn = picture.draw(story())
    root = ElementTree.fromstring(drawn)
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    for expected in ("lookup one: 3.7 s, then answered (process 20", "attempt 1: Connection refused", "stub: 4.2 s",
                     "(thread 21 of process 20", "taken over by manager 8", "mounts 3 ms"):  # fmt: skip
        assert any(expected in title for title in titles), expected
    # A bar is where its time is: the first wait begins after the mode it waits in.
    assert "script" not in {element.tag for element in root.iter()}
    assert not re.search(r"(href|src)=|url\(|@import|<script", drawn)


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    drawn = page.draw([story(), story()])
    assert drawn.count("<svg") == 2 and "default-src 'none'" in drawn
    assert "<script" not in drawn and not re.search(r"(href|src)\s*=|url\(|@import", drawn)
    assert "&lt;script&gt;" in drawn and "\\udce9" in drawn
    assert "Replaced by nfs4 srv:/x; 1 reference left on the stand-in" in drawn
    assert "Connection refused" in drawn and "a note" in drawn
    drawn.encode()  # no lone surrogates


def test_the_page_of_a_long_life_stays_small() -> None:
    many = entries()[:12]
    for number in range(2000):
        many.append(wait(101.0 + number / 1000, 105.0, 1000 + number % 900, number, f"f{number % 900}"))
    drawn = page.draw([tell(many, 86400 * 90.0)])
    assert len(drawn) < 1_000_000 and "and 860 more processes" in drawn and "And 700 more." in drawn
    assert drawn.count('class="grid"') <= 21


def test_the_trace_is_what_chrome_reads() -> None:
    drawn = json.loads(json.dumps(trace.draw([story()])))
    events = drawn["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "i", "b", "e"}
    for event in events:
        assert {"name", "ph", "pid", "tid"} <= event.keys()
        assert event["ph"] == "M" or (isinstance(event["ts"], int) and event.get("dur", 1) >= 1)
    (blackout,) = [event for event in events if event["name"] == "blackout" and event["ph"] == "X"]
    assert (blackout["ts"], blackout["dur"]) == (105_291_250, 5000)
    assert re.fullmatch(r"1970-01-0[12] \d\d:\d\d:45\.291250 [+-]\d{4}", blackout["args"]["began"])
    stop = next(event for event in events if event["name"] == "stop")
    assert (stop["ts"], stop["dur"]) == (105_291_250, 1000)
    # Spans of one thread lie one after the other, or within each other.
    for pid, tid in {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}:
        spans = sorted((event["ts"], -event["dur"]) for event in events
                       if event["ph"] == "X" and (event["pid"], event["tid"]) == (pid, tid))  # fmt: skip
        open_until: List[int] = []
        for begin, length in spans:
            while open_until and open_until[-1] <= begin + 1:
                open_until.pop()
            assert not open_until or begin - length <= open_until[-1] + 1
            open_until.append(begin - length)


def test_when_the_blackout_began() -> None:
    """By the clock; a record of an earlier version has its end alone."""
    drawn = picture.draw(story())
    assert re.search(r"began 1970-01-0[12] \d\d:\d\d:45\.291 [+-]\d{4}, 5\.291 s after 0<", drawn)
    assert re.search(r"\+5\.29\d* s +.*blackout of 5 ms", lines.draw(story()))
    older = [{key: value for key, value in entry.items() if key != "blackout_began"} for entry in entries()]
    replace = tell(older, 200.0).replace
    assert replace is not None and replace.blackout_began == pytest.approx(105.395)


def test_the_text_is_in_order() -> None:
    drawn = lines.draw(story())
    told = [line for line in drawn.splitlines() if line.lstrip().startswith("+")]
    assert told[0].endswith("mounting") and told[-1].endswith("gone: replaced")
    assert "blackout of 5 ms: stop 1 ms, mounts 3 ms, between 1 ms" in drawn and "the longest of 9 more: read" in drawn
    assert drawn.isascii() or "µ" in drawn


# The command, with files alone: no manager is asked.


def spfs(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "spfs.cli.spfs", "timeline", *arguments], cwd=TOP, capture_output=True, text=True,
        timeout=30, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture
def record(tmp_path: Path) -> str:
    path = tmp_path / "mount-1.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries()))
    return str(path)


def test_formats_of_the_command(record: str, tmp_path: Path) -> None:
    assert spfs(record).startswith("web on /data, from ")
    assert [json.loads(line)["event"] for line in spfs(record, "--json").splitlines()][0] == "mount"
    for name, beginning in (("a.html", "<!DOCTYPE html>"), ("a.svg", "<?xml"), ("a.json", '{"displayTimeUnit"')):
        assert spfs(record, "-o", str(tmp_path / name)) == ""
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(beginning)
    assert spfs(record, record, "--format", "html").count("<svg") == 2


def test_errors_of_the_command(record: str, tmp_path: Path) -> None:
    assert "cannot draw one picture: of 2 mounts (name one" in spfs(record, record, "--format", "svg", code=2)
    (tmp_path / "other").write_text("hello\n")
    assert "it is no record of a mount" in spfs(str(tmp_path / "other"), code=1)
    missing = str(tmp_path / "none.jsonl")
    assert "cannot write the timeline" in spfs(record, "-o", str(tmp_path / "no" / "x.html"), code=1)
    done = spfs(missing, "--socket-path", str(tmp_path / "s"), code=1)
    assert "cannot reach the manager" in done
