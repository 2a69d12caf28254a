"""What the answers of a manager look like to people: aligned columns, a line each."""

from __future__ import annotations

import os
import shlex
import stat
import time
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from spfs.cli.layout import Table, aligned
from stubfs.errors import printable
from stubfs.rules import Rule

_COMMAND_WIDTH = 60  # characters of a command line
_COMMAND_BYTES = 1024  # of it that are looked at


_GROUPS = 20  # processes that wait, shown with a status
_FINISHED = 5  # mounts that are gone, shown with a status of all


def status(answer: Mapping[str, Any]) -> None:
    if answer["mounts"] or answer["finished"]:
        for number, table in enumerate(status_tables(answer)):
            if number:
                print()
            _print(table)
    else:
        print(no_mounts(answer))


def no_mounts(answer: Mapping[str, Any]) -> str:
    manager = answer["manager"]
    return f"no mounts (manager {manager['pid']}, {manager['socket']})"


def status_tables(answer: Mapping[str, Any]) -> List[Table]:
    """The mounts; who waits on them (if ``waiting`` was added to the answer); how far their replaces are."""
    gone = answer["finished"]
    rows = [_status_row(row) for row in [*answer["mounts"], *gone[:_FINISHED]]]
    columns = ["ID", "MOUNTPOINT", "STATE", "MODE", "SINCE", "HELD", "OPEN", "REPLACE"]
    found = [Table(columns, rows, len(gone[_FINISHED:]))]
    replaces = [_replace_row(row) for row in answer["mounts"] if row["replace"] and row["replace"]["stages"]]
    if replaces:
        columns = ["REPLACE OF", "STAGE", "SINCE", "ATTEMPTS", "PROCESSES", "REFERENCES", "MOVED", "LEFT", "BLACKOUT",
                   "ERROR"]  # fmt: skip
        found.append(_without_empty(Table(columns, replaces)))
    groups = answer.get("waiting", [])
    if groups:
        columns = ["WAITS ON", "PID", "COMMAND", "OPERATION", "REQUESTS", "OLDEST", "PATH"]
        found.append(Table(columns, [_group_row(group) for group in groups[:_GROUPS]], len(groups[_GROUPS:])))
    return found


def waiting(entries: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """Held requests by process and operation, who waits longest first; ``path`` is the oldest one's."""
    groups: Dict[Tuple[str, int, str], Dict[str, Any]] = {}
    for entry in entries:
        group = groups.setdefault(
            (entry["id"], entry["pid"], entry["operation"]),
            {**{key: entry[key] for key in ("id", "pid", "command", "operation")}, "count": 0, "oldest": -1.0},
        )
        group["count"] += 1
        if entry["age"] > group["oldest"]:
            group["oldest"], group["path"] = entry["age"], _place(entry)
    # Not finer: the file systems are asked one after the other, and those that came together would change places.
    return sorted(groups.values(), key=lambda group: (-int(group["oldest"]), group["id"], group["pid"]))


def _group_row(group: Mapping[str, Any]) -> List[str]:
    called = command_line(group["pid"], group["command"])
    count, oldest = str(group["count"]), _seconds(group["oldest"])
    return [group["id"], str(group["pid"] or "-"), called or "-", group["operation"], count, oldest, group["path"]]


def _replace_row(row: Mapping[str, Any]) -> List[str]:
    wanted = row["replace"]
    stages = {stage["stage"]: stage for stage in wanted["stages"]}
    prepared, report = stages.get("prepared", {}), wanted["report"] or {}
    moved = report.get("moved", stages.get("switched", {}).get("moved"))
    blackout = report.get("blackout", stages.get("switched", {}).get("blackout"))
    return [
        row["id"],
        wanted["phase"] if wanted["phase"] != "running" else wanted["stage"],
        ago(wanted["stages"][-1]["time"]),
        str(wanted["attempts"]),
        _known(prepared.get("processes")),
        kinds(prepared.get("references")),
        kinds(moved),
        _known(len(report["left"]) if "left" in report else None),
        "-" if blackout is None else f"{blackout * 1000:.1f} ms",
        _error(wanted),
    ]


def _error(wanted: Mapping[str, Any]) -> str:
    """Why it has failed, or the last attempt."""
    if wanted["error"]:
        return str(wanted["error"]["message"])
    if wanted["phase"] == "done" or not wanted["last_attempts"]:
        return "-"
    return str(wanted["last_attempts"][-1].get("error") or "-")


def _without_empty(table: Table) -> Table:
    """Without the columns of which nothing is known yet."""
    kept = [index for index, cells in enumerate(zip(*table.rows)) if any(cell != "-" for cell in cells)]
    return Table([table.columns[index] for index in kept], [[row[index] for index in kept] for row in table.rows])


def _known(value: object) -> str:
    return "-" if value is None else str(value)


def kinds(counts: Any) -> str:
    """So many references of each kind."""
    if counts is None:
        return "-"
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "nothing"


def _status_row(row: Mapping[str, Any]) -> List[str]:
    state = row["state"]
    if row["end"]:
        state += f": {row['end']}"
    elif row.get("answering") is False:
        state += ": not answering"
    held, handles = (_count(row[key]) if key in row else "-" for key in ("held", "handles"))
    return [row["id"], row["mountpoint"], state, row["mode"], ago(row["since"]), held, handles, replace(row["replace"])]


def _count(value: object) -> str:
    return str(len(value)) if isinstance(value, (list, dict)) else str(value)


def replace(wanted: Any) -> str:
    """One line about a replace: how far it is, with what it was last seen at."""
    if wanted is None:
        return "-"
    text = f"{wanted['phase']}: {wanted['type']} {wanted['source']}"
    if wanted["phase"] == "running" and wanted["stage"]:
        text += f", {wanted['stage']}"
    if wanted["attempts"]:
        text += f", {wanted['attempts']} attempts"
        last = wanted["last_attempts"][-1].get("error")
        text += f" (last: {last})" if last and wanted["phase"] != "done" else ""
    if wanted["error"]:
        text += f": {wanted['error']['message']}"
    if wanted["report"]:
        text += f": {summary(wanted['report'])}"
    return text


def summary(report: Mapping[str, Any]) -> str:
    """What a replace's report says in one line."""
    parts = []
    moved = report.get("moved")
    if isinstance(moved, dict):
        parts.append(f"moved {kinds(moved)}")
    if isinstance(report.get("blackout"), (int, float)):
        parts.append(f"blackout {report['blackout'] * 1000:.1f} ms")
    if report.get("left"):
        parts.append(f"{len(report['left'])} references left")
    return "; ".join(parts) or "done"


def held(entries: Sequence[Mapping[str, Any]]) -> None:
    if not entries:
        print("no request is held")
        return
    names = {entry["pid"]: entry["command"] for entry in entries}
    commands = {pid: command_line(pid, name) for pid, name in names.items()}
    rows = [
        [
            entry["id"],
            str(entry.get("pid", "")),
            commands[entry["pid"]],
            str(entry.get("operation", "")),
            _place(entry),
            str(entry.get("uid", "")),
            _seconds(float(entry.get("age", 0))),
        ]
        for entry in entries
    ]
    _print(Table(["ID", "PID", "COMMAND", "OPERATION", "PATH", "UID", "AGE"], rows))


def rules(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    rows = [[mount, str(Rule.from_json(rule))] for mount, rules in found.items() for rule in rules]
    if not rows:
        print("no rules")
        return
    _print(Table(["ID", "RULE"], rows))


def command_line(pid: int, name: str) -> str:
    """How the process was called, cut where it is long; its ``name`` if that cannot be told."""
    try:
        # Not by psutil, which looks at four times as much: there may be thousands.
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            line = os.fsdecode(file.read(_COMMAND_BYTES))
    except OSError:  # it has ended, or is another user's, or nobody's
        line = ""
    text = printable(shlex.join(filter(None, line.split("\0")))) or name
    return text if len(text) <= _COMMAND_WIDTH else text[: _COMMAND_WIDTH - 3] + "..."


def _place(entry: Mapping[str, Any]) -> str:
    path, name = entry.get("path"), entry.get("name")
    parts = [part for part in (path, name) if part]
    return "/".join(str(part) for part in parts) or "/"


def report(row: Mapping[str, Any]) -> None:
    """The outcome of a wait."""
    wanted = row["replace"]
    how = row["mode"] if wanted is None else replace(wanted)
    print(printable(f"{row['id']} on {row['mountpoint']}: {how}"))
    left(((wanted or {}).get("report") or {}).get("left") or [])


def switched(answer: Mapping[str, Any]) -> None:
    """The outcome of a switch."""
    print(summary(answer))
    left(answer["left"])


def left(references: Sequence[Mapping[str, Any]]) -> None:
    if references:
        rows = [_reference(item, "pid", "command", "kind", "what", "path", "reason") for item in references]
        _print(Table(["PID", "COMMAND", "KIND", "WHAT", "PATH", "WHY IT WAS LEFT"], rows))


def references(found: Sequence[Mapping[str, Any]]) -> None:
    """What a switch would move, and what not."""
    if not found:
        print("none of these processes holds anything there")
        return
    rows = []
    for item in found:
        verdict = "moves" if item["reason"] is None else f"stays: {item['reason']}"
        rows.append([*_reference(item, "pid", "command", "kind", "what", "path"), verdict])
    _print(Table(["PID", "COMMAND", "KIND", "WHAT", "PATH", "VERDICT"], rows))


def _reference(item: Mapping[str, Any], *keys: str) -> List[str]:
    """The cells of a row. A path of "" is the file system's root, None that of what has no name."""
    names = {"path": {"": ".", None: "(no name)"}}
    return [str(names.get(key, {}).get(item.get(key), item.get(key))) for key in keys]


def ago(when: float) -> str:
    return _seconds(max(0.0, time.time() - when))


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _print(table: Table) -> None:
    print("\n".join(line.text for line in aligned(table)))


def planned(mounts: Sequence[Any]) -> None:
    """What delayed mounts must hold at a restore."""
    rows = []
    for mount in mounts:
        for file in mount.files or ():
            kind = _KINDS.get(stat.S_IFMT(file.mode), "?")
            size = "" if file.size is None else str(file.size)
            why = "; ".join(file.uses)
            if file.original is not None:
                why = f"was {file.original}, removed while open: {why}" if why else f"was {file.original}"
            rows.append([mount.key, file.path or ".", kind, f"{stat.S_IMODE(file.mode):04o}", size, why])
    if not rows:
        print("nothing: no file of the processes is there")
        return
    _print(Table(["MOUNT", "PATH", "TYPE", "MODE", "SIZE", "WHAT FOR"], rows))


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "fifo",
    stat.S_IFLNK: "symlink",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
