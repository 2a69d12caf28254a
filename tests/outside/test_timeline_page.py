"""The page of a timeline in a real browser: it opens offline, nothing is cut off or drawn over, it is not blank."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from html import unescape
from pathlib import Path
from typing import Any, Dict, List

import pytest

from spfs.timeline import page
from spfs.timeline.story import tell

MEASURE = """
<script>
const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const svg = document.querySelector("svg");
document.title = JSON.stringify({
  width: document.documentElement.scrollWidth, window: window.innerWidth, svg: box(svg),
  texts: [...svg.querySelectorAll("text")].map(e => [e.lastChild.textContent, box(e)]),
  bars: [...svg.querySelectorAll("rect.wait")].map(e => [e.querySelector("title").textContent, box(e)]),
  paper: getComputedStyle(document.body).backgroundColor, bar: getComputedStyle(svg.querySelector("rect.m2")).fill,
  headings: [...document.querySelectorAll("h1, h2")].map(e => e.textContent),
});
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium-headless-shell, no chromium: install one of these Debian packages")
    return found


def run(browser: str, home: Path, *arguments: str) -> str:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}", *arguments]
    environment = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def entries() -> List[Dict[str, Any]]:
    stages = {"stop": 0.0004, "compare": 0.0006, "mounts": 0.004, "operate": 0.002, "detach": 0.0001}
    report = {"blackout": 0.0072, "stages": stages, "moved": {"file": 12, "cwd": 2}, "left": [], "notes": []}
    told: List[Dict[str, Any]] = [
        {"time": 0.0, "event": "mount", "version": 1, "id": "web", "mountpoint": "/data", "manager": 7},
        {"time": 0.2, "event": "mounted", "mode": "restore"},
        {"time": 3.0, "event": "mode", "mode": "stub", "former": "restore"},
        {"time": 4.0, "event": "replace-asked", "source": "server:/export", "type": "nfs4", "mode": None},
        {"time": 4.1, "event": "stage", "stage": "begun"},
        *({"time": 4.2 + number, "event": "attempt", "attempt": number + 1, "error": "Connection refused"}
          for number in range(9)),
        {"time": 14.0, "event": "stage", "stage": "mounted"},
        {"time": 14.2, "event": "stage", "stage": "proxy"},
        {"time": 14.2, "event": "mode", "mode": "proxy", "former": "stub"},
        {"time": 14.5, "event": "stage", "stage": "switched", "blackout": 0.0072},
        {"time": 15.0, "event": "replace-ended", "phase": "done", "report": report, "error": None},
        {"time": 15.0, "event": "gone", "why": "replaced"},
    ]  # fmt: skip
    for number in range(60):
        told.append({
            "event": "wait", "time": 14.2, "since": 3.0 + number / 10,
            "operation": ("lookup", "open", "read")[number % 3],
            "path": "a/long/path/to/some", "name": f"file-{number}.txt", "pid": 1000 + number // 2,
            "tid": 1000 + number, "uid": 0,
            "command": "worker", "command_line": f"/usr/bin/worker --with --many --arguments {number // 2}",
            "how": "interrupted" if number % 7 == 0 else "answered",
        })  # fmt: skip
    return told


def long_story() -> List[Dict[str, Any]]:
    """Two replaces, the first of which has failed; hundreds of waits; much that is left, and days of quiet after it."""
    left = [{"pid": 3000 + number, "command": "java -jar application.jar", "kind": "socket", "what": f"fd {number}",
             "path": f"run/sock{number}", "reason": "connections cannot be moved"} for number in range(30)]  # fmt: skip
    stages = {"stop": 0.01, "compare": 0.004, "mounts": 0.006, "transfer": 0.003, "operate": 0.04, "detach": 0.006}
    report = {"blackout": 0.0731, "blackout_began": 422.042, "stages": stages, "moved": {"file": 812, "cwd": 60},
              "left": left, "mounts_left": [{"mount": "/srv/other", "reason": "locked"}], "notes": []}  # fmt: skip
    told: List[Dict[str, Any]] = [
        {"time": 0.0, "event": "mount", "version": 1, "id": "projects", "mountpoint": "/srv/" + "long/" * 30,
         "manager": 7},
        {"time": 0.2, "event": "mounted", "mode": "restore"},
        {"time": 20.0, "event": "mode", "mode": "stub", "former": "restore"},
        {"time": 25.0, "event": "replace-asked", "source": "//files.example.org/share", "type": "cifs", "mode": None},
        *({"time": 26.0 + 5 * number, "event": "attempt", "attempt": number + 1, "error": "Connection refused"}
          for number in range(60)),
        {"time": 330.0, "event": "replace-ended", "phase": "failed", "report": None, "error": {"message": "no share"}},
        {"time": 340.0, "event": "taken-over", "id": "projects", "mountpoint": "/srv", "manager": 8},
        {"time": 400.0, "event": "replace-asked", "source": "//files.example.org/share", "type": "cifs", "mode": None},
        {"time": 410.0, "event": "stage", "stage": "begun"},
        {"time": 420.0, "event": "stage", "stage": "mounted"},
        {"time": 421.5, "event": "stage", "stage": "proxy"},
        {"time": 421.5, "event": "mode", "mode": "proxy", "former": "stub"},
        {"time": 422.2, "event": "stage", "stage": "switched", "blackout": 0.0731},
        {"time": 422.5, "event": "replace-ended", "phase": "done", "report": report, "error": None},
    ]  # fmt: skip
    for number in range(600):
        told.append({
            "event": "wait", "time": 421.5 - number % 50, "since": 20.0 + number / 2, "operation": "read",
            "path": "a/deep/directory", "name": f"file-{number}", "pid": 1000 + number % 90, "tid": 1000 + number % 90,
            "uid": 0, "command": "worker", "command_line": "/usr/bin/worker " + "--option " * 30, "how": "answered",
        })  # fmt: skip
    return told


@pytest.fixture(scope="module")
def measured(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    return measure(browser, tmp_path_factory.mktemp("browser"), page.draw([tell(entries(), 15.0)]))


def measure(browser: str, home: Path, document: str, width: int = 1280, *settings: str) -> Dict[str, Any]:
    # The page runs nothing. What measures it does, so the measured copy is without that rule.
    document = re.sub(r"<meta http-equiv=[^>]*>", "", document).replace("</body>", MEASURE + "</body>")
    path = home / "measured.html"
    path.write_text(document, encoding="utf-8")
    dom = run(browser, home, *settings, f"--window-size={width},1600", "--dump-dom", f"file://{path}")
    title = re.search(r"<title>(\{.*?\})</title>", dom, re.DOTALL)
    assert title is not None, dom[:2000]
    found: Dict[str, Any] = json.loads(unescape(title.group(1)))
    return found


def test_the_page_fits_into_the_window(measured: Dict[str, Any]) -> None:
    assert measured["width"] <= measured["window"]
    assert measured["headings"][0].split() == ["web", "/data"] and "Who waited, and for what" in measured["headings"]


def test_no_text_is_outside_the_picture_or_over_another(measured: Dict[str, Any]) -> None:
    left, top, right, bottom = measured["svg"]
    texts = measured["texts"]
    assert len(texts) > 60
    for shown, (x1, y1, x2, y2) in texts:
        assert left - 1 <= x1 and x2 <= right + 1 and top - 1 <= y1 and y2 <= bottom + 1, shown
    for number, (shown, a) in enumerate(texts):
        for other, b in texts[number + 1 :]:
            width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            assert width <= 1 or height <= 3, (shown, other)


@pytest.mark.parametrize("width", [1280, 500])
def test_a_long_story(browser: str, tmp_path: Path, width: int) -> None:
    document = page.draw([tell(long_story(), 1e6)])
    found = measure(browser, tmp_path, document, width)
    assert found["window"] == width and found["width"] <= width  # what is wider scrolls within the page
    assert found["svg"][2] - found["svg"][0] >= 860  # and can still be read
    test_no_text_is_outside_the_picture_or_over_another(found)
    texts = dict(found["texts"])
    assert any(shown.startswith("and so for 277 h") for shown in texts) and "and 50 more processes" in texts
    # The days in which nothing happened take a tenth of what is before them.
    waits = [place for shown, place in found["bars"] if "file-" in shown]
    begin, end = min(place[0] for place in waits), max(place[2] for place in waits)
    assert end - begin > 0.6 * (found["svg"][2] - found["svg"][0])
    assert "30 references and 1 mount left" in document and "<b>61</b>" in document


def test_on_a_dark_screen(browser: str, tmp_path: Path) -> None:
    dark = "--blink-settings=preferredColorScheme=0"
    found = measure(browser, tmp_path, page.draw([tell(entries(), 15.0)]), 1280, dark)
    assert found["paper"] == "rgb(15, 23, 42)" and found["bar"] == "rgb(161, 98, 7)"


def test_bars_are_where_their_times_are(measured: Dict[str, Any]) -> None:
    waits = {shown.split(":")[0]: place for shown, place in measured["bars"] if "file-" in shown}
    first, last = waits["lookup a/long/path/to/some/file-0.txt"], waits["read a/long/path/to/some/file-59.txt"]
    assert len(waits) == 60 and first[0] < last[0] and first[2] == pytest.approx(last[2], abs=0.5)
    scale = (first[2] - first[0]) / (14.2 - 3.0)  # pixels a second
    assert last[2] - last[0] == pytest.approx(scale * (14.2 - 8.9), abs=1.0)
    stages = [place for shown, place in measured["bars"] if "file-" not in shown]
    widths = [place[2] - place[0] for place in stages]
    assert widths[2] / widths[0] == pytest.approx(10, rel=0.05)  # 4 ms of mounts, 0.4 ms of stop


def test_it_is_drawn_in_colours(measured: Dict[str, Any], browser: str, tmp_path: Path) -> None:
    assert measured["paper"] == "rgb(255, 255, 255)" and measured["bar"] == "rgb(252, 211, 77)"
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(page.draw([tell(entries(), 15.0)]), encoding="utf-8")
    run(browser, tmp_path, "--window-size=1280,1600", "--hide-scrollbars", f"--screenshot={shot}", f"file://{path}")
    colours = pixels(shot.read_bytes())
    assert len(colours) > 30
    # Of the stub band and of a wait: they cover something, not a few points.
    assert colours[(252, 211, 77)] > 5000 and sum(count for colour, count in colours.items() if is_blue(colour)) > 5000


def is_blue(colour: "tuple[int, ...]") -> bool:
    red, green, blue = colour
    return blue > 200 and red < 160 and green < 190


def pixels(png: bytes) -> "Dict[tuple[int, ...], int]":
    """How often each colour occurs, of a PNG with 8 bits a channel."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, form = struct.unpack(">IIBB", png[16:26])
    assert (width, height, depth) == (1280, 1600, 8) and form in (2, 6)
    channels, position, data = {2: 3, 6: 4}[form], 8, b""
    while position < len(png):
        length, name = struct.unpack(">I4s", png[position : position + 8])
        data += png[position + 8 : position + 8 + length] if name == b"IDAT" else b""
        position += 12 + length
    raw, stride = zlib.decompress(data), width * channels
    former, counts = bytearray(stride), {}  # type: ignore[var-annotated]
    for row in range(height):
        start = row * (stride + 1)
        line = unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + stride]), former, channels)
        for x in range(0, stride, channels):
            colour = (line[x], line[x + 1], line[x + 2])
            counts[colour] = counts.get(colour, 0) + 1
        former = line
    return counts


def unfiltered(kind: int, line: bytearray, former: bytearray, channels: int) -> bytearray:
    """PNG's filters: each byte was stored as a difference to its neighbours."""
    for x in range(len(line)):
        left = line[x - channels] if x >= channels else 0
        up, corner = former[x], former[x - channels] if x >= channels else 0
        if kind == 4:
            guess = left + up - corner
            nearest = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
        else:
            nearest = (0, left, up, (left + up) // 2)[kind]
        line[x] = (line[x] + nearest) & 0xFF
    return line
