"""What is shown while it changes: the status of mounts, and the progress of a replace that is waited for.

The manager says when something has happened. What only the file systems know, who waits and since when, is asked for
about every second. rich is imported only when something is drawn.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Dict, Iterator, Mapping, Optional

from spfs.cli import tables
from spfs.cli.layout import Line, screenful
from spfs.client import ManagerClient
from spfs.errors import SpfsError
from stubfs.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.progress import Progress, TaskID
    from rich.text import Text

_REFRESH = 1.0  # seconds, without an event
_SHORTEST = 0.1  # seconds from one picture to the next
_SHARE = 5  # times what a picture took is waited before the next one: a list of thousands takes a while
_STAGES = ("begun", "mounting", "mounted", "prepared", "proxy", "switched", "verified")


def full_status(client: ManagerClient, id: Optional[str]) -> Dict[str, Any]:
    """The manager's status, and ``waiting``: who waits, by process and operation."""
    answer = client.status(id)
    held = []
    if any(row.get("held") for row in answer["mounts"]):
        try:
            held = client.held(id)
        except SpfsError:
            pass  # the mount has gone meanwhile
    return {**answer, "waiting": tables.waiting(held)}


def watch(client: ManagerClient, id: Optional[str], as_json: bool) -> None:
    """Show the status until interrupted. SpfsError when the manager ends."""
    try:
        if as_json:
            for answer in _statuses(client, id):
                print(json.dumps(answer), flush=True)
        elif sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            _draw(client, id)
        else:
            for answer in _statuses(client, id):
                tables.status(answer)
                print(flush=True)
    except KeyboardInterrupt:
        pass  # the way to end it


def _draw(client: ManagerClient, id: Optional[str]) -> None:
    """On a screen of its own, as top(1), and what it showed last where it was called."""
    from rich.console import Console
    from rich.live import Live

    console, shown = Console(), None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for answer in _statuses(client, id):
                shown = _Picture(answer)
                live.update(shown, refresh=True)
    finally:
        if shown is not None:
            console.print(shown)


class _Picture:
    """Laid out when it is drawn, for the screen as it is then."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self._answer = answer
        self._time = time.strftime("%H:%M:%S")

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator["Text"]:
        from rich.text import Text

        answer, width, height = self._answer, options.max_width, options.size.height
        if answer["mounts"] or answer["finished"]:
            lines = screenful(tables.status_tables(answer), width, height - 2)
        else:
            lines = [Line(tables.no_mounts(answer))]
        about = Line(f"{self._time}  manager {answer['manager']['pid']}  Ctrl-C: end")
        for line in (*lines, Line(""), about):
            # Text: names may hold what rich would take for markup.
            style = "bold" if line.heading else "dim" if line is about else ""
            yield Text(line.text, style, no_wrap=True, overflow="ellipsis")


def _statuses(client: ManagerClient, id: Optional[str]) -> Iterator[Dict[str, Any]]:
    while True:
        begun = time.monotonic()
        answer = full_status(client, id)
        yield answer
        pause = max(_SHORTEST, _SHARE * (time.monotonic() - begun))
        time.sleep(pause)  # however much happens, people cannot look faster
        moving = answer["waiting"] or any(row["busy"] for row in answer["mounts"])
        client.changes(answer["changes"], _REFRESH if moving or sys.stdout.isatty() else None)


def wait(client: ManagerClient, id: str, timeout: Optional[float]) -> Dict[str, Any]:
    """As client.wait(); on a terminal with a bar that shows how far it is."""
    with _bar(client.socket_path, id):
        return client.wait(id, timeout)


@contextmanager
def _bar(socket_path: str, id: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    ended = threading.Event()
    # The text last: what does not fit is cut from it, not from the bar.
    columns = (
        BarColumn(20, table_column=Column(width=20)),
        TimeElapsedColumn(table_column=Column(width=8)),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as progress:
        task = progress.add_task(id, total=len(_STAGES))
        # What is waited for is the answer on the caller's connection; this one is for the eye alone.
        thread = threading.Thread(target=_follow, args=(socket_path, id, progress, task, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _follow(socket_path: str, id: str, progress: "Progress", task: "TaskID", ended: threading.Event) -> None:
    try:
        with ManagerClient(socket_path, timeout=_REFRESH * 5) as client:
            while not ended.is_set():
                answer = client.status(id)
                for row in answer["mounts"]:
                    progress.update(task, description=printable(f"{id}: {describe(row)}"), completed=_completed(row))
                if not ended.wait(_SHORTEST):
                    client.changes(answer["changes"], _REFRESH / 2)
    except SpfsError:
        pass  # who waits is told why


def _completed(row: Mapping[str, Any]) -> int:
    wanted = row["replace"]
    reached = [_STAGES.index(stage["stage"]) + 1 for stage in (wanted or {}).get("stages", ())
               if stage["stage"] in _STAGES]  # fmt: skip
    return max(reached, default=0)


def describe(row: Mapping[str, Any]) -> str:
    """What a mount's replace, or its change of mode, is at."""
    wanted = row["replace"]
    if wanted is None or wanted["phase"] not in ("held", "waiting", "running"):
        return f"{row['mode']} mode"
    if wanted["phase"] != "running":
        return "held until it is released" if wanted["phase"] == "held" else "waits for the end of restore mode"
    last = wanted["last_attempts"][-1] if wanted["last_attempts"] else {}
    stages = {stage["stage"]: stage for stage in wanted["stages"]}
    if "prepared" in stages:
        found = stages["prepared"]
        return f"{wanted['stage']}: {found['processes']} processes, {tables.kinds(found['references'])}"
    if "waiting" in last:
        return str(last["waiting"])
    if "error" in last:
        return f"attempt {last['attempt']} to mount {wanted['source']}: {last['error']}"
    return f"mounting {wanted['source']}"
