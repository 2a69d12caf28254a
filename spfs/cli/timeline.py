"""spfs timeline: a mount's record drawn, whether there still is a manager, or only the file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence

from spfs.client import ManagerClient, find_manager
from spfs.errors import SpfsError, UsageError, reason

if TYPE_CHECKING:
    from spfs.timeline.story import Story

FORMATS = ("text", "html", "svg", "trace", "json")
_BY_SUFFIX = {".html": "html", ".htm": "html", ".svg": "svg", ".json": "trace", ".jsonl": "json", ".txt": "text"}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "mounts", nargs="*", metavar="ID|FILE",
        help="mounts of the manager, also past ones, or record files (*.jsonl); default: all of the manager's",
    )  # fmt: skip
    command.add_argument(
        "-f", "--format", choices=FORMATS,
        help="html: one page for a browser; svg: the picture alone; trace: for chrome://tracing and Perfetto; json: "
             "the entries of the record, one per line; default: by the suffix of --output, else text",
    )  # fmt: skip
    command.add_argument("-o", "--output", metavar="FILE", help="write to FILE (default: standard output)")


def run(options: argparse.Namespace) -> None:
    form = options.format or ("json" if options.json else None) or _form_of(options.output)
    records = _records(options)
    if not records:
        raise SpfsError("cannot draw a timeline: the manager has no mount, nor had one", "name a record's file")
    data = _draw(records, form).encode(errors="replace")
    if options.output is None:
        sys.stdout.buffer.write(data)
        return
    try:
        with open(options.output, "wb") as file:
            file.write(data)
    except OSError as error:
        raise SpfsError(
            f"cannot write the timeline: {options.output}: {reason(error)}", "name another: --output", error.errno or 0
        ) from error


def _form_of(output: Any) -> str:
    return _BY_SUFFIX.get(os.path.splitext(output or "")[1], "text")


class _Record:
    def __init__(self, path: str, held: List[Dict[str, Any]]) -> None:
        from stubfs import record

        try:
            self.entries = record.read(path)
        except OSError as error:
            raise SpfsError(
                f"cannot read the record {path}: {reason(error)}", "name a mount, or a record's file", error.errno or 0
            ) from error
        self._path = path
        self._held = held

    def story(self) -> "Story":
        from spfs.timeline import story

        try:
            return story.tell(self.entries, time.time(), self._held)
        except (ValueError, KeyError, TypeError) as error:
            raise SpfsError(
                f"cannot draw {self._path}: it is no record of a mount: {error}", "name a file mount-*.jsonl"
            ) from error


def _records(options: argparse.Namespace) -> List[_Record]:
    # An id may look like a path, but a manager's mounts are asked for first by those who name no file.
    files = [name for name in options.mounts if os.path.isfile(name)]
    ids = [name for name in options.mounts if name not in files]
    found = [_Record(path, []) for path in files]
    if ids or not options.mounts:
        try:
            path = find_manager(options.socket_path)
        except SpfsError as error:
            if not ids:
                raise
            raise SpfsError(
                f"cannot find {ids[0]}: there is no such file, and {error.message}", error.hint, error.errno
            ) from error
        with ManagerClient(path) as client:
            found += _of_manager(client, ids)
    return found


def _of_manager(client: ManagerClient, ids: List[str]) -> List[_Record]:
    if ids:
        rows = []
        for id in ids:
            answer = client.status(id)
            rows.append((answer["mounts"] or answer["finished"])[0])
    else:
        answer = client.status()
        rows = answer["mounts"] + answer["finished"]
    held: Dict[str, List[Dict[str, Any]]] = {}
    for row in rows:
        if row.get("held"):
            held[row["id"]] = called(client.held(row["id"]))
    return [_Record(row["record"], held.get(row["id"], []) if row["state"] != "gone" else []) for row in rows]


def called(held: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """Held requests with the command lines of who waits."""
    from stubfs.callers import command_line

    lines = {pid: command_line(pid) for pid in {entry["pid"] for entry in held}}
    return [{**entry, "command_line": lines[entry["pid"]]} for entry in held]


def _draw(records: List[_Record], form: str) -> str:
    if form == "json":
        return "".join(json.dumps(entry) + "\n" for record in records for entry in record.entries)
    stories = [record.story() for record in records]
    if form == "html":
        from spfs.timeline import page

        return page.draw(stories)
    if form == "trace":
        from spfs.timeline import trace

        return json.dumps(trace.draw(stories)) + "\n"
    if form == "svg":
        from spfs.timeline import picture

        if len(stories) != 1:
            what = f"cannot draw one picture: of {len(stories)} mounts"
            raise UsageError(what, "name one, or use --format html")
        return '<?xml version="1.0" encoding="UTF-8"?>\n' + picture.draw(stories[0]) + "\n"
    from spfs.timeline import lines

    return "\n".join(lines.draw(story) for story in stories)
