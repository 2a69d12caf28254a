"""Records: lines from several writers, their limits, and who waited, as the file system writes it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import List, Tuple

import pytest

from spfs.events import LISTED, Events
from spfs.registry import Managed
from stubfs import record, waits
from stubfs.held import HeldTable
from stubfs.protocol import IN_HEADER, Opcode
from stubfs.record import Record
from stubfs.request import Device, Request


def test_lines_of_two_writers_in_order_of_time(tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    assert Record(path).write(record.line("second", {"what": "caf\udce9"}, 2.0))
    assert Record(path).write(record.line("first", {}, 1.0))
    assert [entry["event"] for entry in record.read(path)] == ["first", "second"]
    assert record.read(path)[1]["what"] == "caf\udce9"
    assert os.stat(path).st_mode & 0o077 == 0


def test_what_was_not_written_to_its_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(b'{"time":1,"event":"a"}\n{"time":2,"ev\nnull\n{"event":"b"}\n{"time":"x","event":"c"}\n\xff\n')
    assert [entry["event"] for entry in record.read(str(path))] == ["a"]


def test_a_record_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with open(path, "wb") as file:
        file.truncate(record.FREQUENT - 10)
    kept = Record(str(path))
    assert not kept.write(record.line("attempt", {}), record.FREQUENT)
    assert kept.write(record.line("mode", {}))
    with open(path, "wb") as file:
        file.truncate(record.ORDINARY)
    assert not kept.write(record.line("mode", {})) and kept.write(record.line("gone", {}), record.LAST)


def test_a_record_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Record(str(tmp_path / "none" / "r"))
    assert [kept.write(b"x\n"), kept.write(b"x\n")] == [False, False]
    assert caplog.messages == [f"cannot write the record {kept.path}: No such file or directory"]
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")
    assert not Record(str(tmp_path / "link")).write(b"x\n") and not (tmp_path / "elsewhere").exists()


def test_long_reports_are_shortened_and_attempts_limited(tmp_path: Path) -> None:
    told: List[Tuple[str, int]] = []
    events = Events(lambda managed, event, details: told.append((event, events.number)))
    path = tmp_path / "r"
    managed = Managed(1, "a", "/m", "/m", "stub", 0.0, record=str(path))
    left = [{"pid": number} for number in range(LISTED + 5)]
    events.tell(managed, "replace-ended", {"phase": "done", "report": {"left": left}, "error": None})
    (entry,) = record.read(str(path))
    assert len(entry["report"]["left"]) == LISTED and entry["report"]["left_count"] == LISTED + 5
    path.write_bytes(b"\n" * record.FREQUENT)
    events.tell(managed, "attempt", {"attempt": 1})
    assert record.read(str(path)) == []
    events.tell(managed, "gone", {"why": "unmounted"}, 5.0)
    assert [(entry["time"], entry["event"]) for entry in record.read(str(path))] == [(5.0, "gone")]
    assert told == [("replace-ended", 1), ("attempt", 2), ("gone", 3)]


def test_who_waits_for_an_event_is_told_once() -> None:
    events, calls = Events(), []
    managed = Managed(1, "a", "/m", "/m", "stub", 0.0)
    events.once(lambda: calls.append("kept"))
    forget = events.once(lambda: calls.append("dropped"))
    forget()
    forget()
    events.tell(managed, "mode", {})
    events.tell(managed, "mode", {})
    assert calls == ["kept"]


class Nowhere(Device):
    """Takes every answer."""

    def __init__(self) -> None:
        super().__init__(-1)

    def reply(self, unique: int, error: int, payload: bytes = b"") -> bool:
        return True


def request(unique: int, tid: int, opcode: int = Opcode.LOOKUP, body: bytes = b"name\0") -> Request:
    header = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, 1, 7, 0, tid, 0, 0)
    made = Request(Nowhere(), header + body)
    made.parse(len(header + body))
    return made


def recorded(path: Path) -> Tuple[HeldTable, waits.WaitRecorder]:
    table = HeldTable()
    table.recorder = waits.WaitRecorder(Record(str(path)), lambda request: (b"dir", b"caf\xe9"))
    return table, table.recorder


def test_each_wait_is_written_with_who_what_and_how_long(tmp_path: Path) -> None:
    table, recorder = recorded(tmp_path / "r")
    begun = time.time()
    with subprocess.Popen(["sleep", "600"]) as process:
        stub = object()
        table.enter(stub)
        table.add(request(1, process.pid), stub)
        table.add(request(2, 0, Opcode.READ), stub)
        table.add(request(3, process.pid), stub)
        assert table.take(3) is not None
        table.enter(object())
        table.reconsider()
        first, second = table.next(), table.next()
        assert first is not None and second is not None and (first.unique, second.unique) == (1, 2)
        table.add(first, stub)  # something else holds it now: that is no second wait
        table.served(first)
        table.served(second)
        first = table.next()
        assert first is not None and first.unique == 1
        table.served(first)
        table.add(request(4, os.getpid()), stub)
        table.end()
        recorder.close()
        process.kill()
    entries = {entry["how"]: entry for entry in record.read(str(tmp_path / "r")) if entry["operation"] == "lookup"}
    assert set(entries) == {"answered", "interrupted", "failed"}
    wait = entries["answered"]
    assert (wait["pid"], wait["command"], wait["command_line"]) == (process.pid, "sleep", "sleep 600")
    assert (wait["path"], wait["name"], wait["uid"]) == ("dir", "caf\udce9", 7)
    assert begun - 0.1 <= wait["since"] <= wait["time"] <= time.time() + 0.1
    (readahead,) = [entry for entry in record.read(str(tmp_path / "r")) if entry["operation"] == "read"]
    assert (readahead["pid"], readahead["command"]) == (0, "")


def test_of_very_many_waits_only_sums_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "IN_DETAIL", 3)
    table, recorder = recorded(tmp_path / "r")
    stub = object()
    table.enter(stub)
    for unique in range(1, 11):
        table.add(request(unique, os.getpid()), stub)
    for unique in range(1, 11):
        assert table.take(unique) is not None and table.take(unique) is None
    recorder.close()
    entries = record.read(str(tmp_path / "r"))
    assert [entry["event"] for entry in entries].count("wait") == 3
    (sums,) = [entry["operations"] for entry in entries if entry["event"] == "waits"]
    assert sums["lookup"]["count"] == 7 and 0 <= sums["lookup"]["longest"] <= sums["lookup"]["seconds"]


def test_a_mount_on_which_nobody_waits_has_no_thread(tmp_path: Path) -> None:
    table, recorder = recorded(tmp_path / "r")
    recorder.close()
    assert recorder._thread is None and not (tmp_path / "r").exists()
    table.end()
    table.add(request(1, os.getpid()), object())  # answered at once
    assert recorder._thread is None
