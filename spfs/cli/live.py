"""What is shown while it changes: the status of mounts, and the progress of a replace that is waited for.

The manager says when something has happened. What only the file systems know, who waits and since when, is asked for
about every second. rich is imported only when something is drawn.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence

from spfs.cli import tables
from spfs.client import ManagerClient
from spfs.errors import SpfsError
from stubfs.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

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
        elif sys.stdout.isatty():
            _draw(client, id)
        else:
            for answer in _statuses(client, id):
                tables.status(answer)
                print(flush=True)
    except KeyboardInterrupt:
        pass  # the way to end it


def _draw(client: ManagerClient, id: Optional[str]) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(Text("asking the manager"), auto_refresh=False, vertical_overflow="crop") as picture:
        for answer in _statuses(client, id):
            parts: List["RenderableType"] = []
            if answer["mounts"] or answer["finished"]:
                for columns, rows in tables.status_tables(answer):
                    parts += [_table(columns, rows), Text()]
            else:
                parts += [Text(tables.no_mounts(answer)), Text()]
            parts.append(Text(f"{time.strftime('%H:%M:%S')}  manager {answer['manager']['pid']}  Ctrl-C: end", "dim"))
            picture.update(Group(*parts), refresh=True)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text: names may hold what rich would take for markup.
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


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

    ended = threading.Event()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
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
                    progress.update(task, description=f"{id}: {describe(row)}", completed=_completed(row))
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
