"""The form of the messages that users can meet; and that the recorder of those that tests have met works."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[2]
INVENTORY = runpy.run_path(str(TOP / "tests" / "messages" / "inventory.py"))
OTHERWISE = {
    "{}, in {}",  # another message, and where
    "the mounts were switched, but: {}",  # nothing failed that could be undone
}


def test_messages_say_first_what_failed() -> None:
    for message in INVENTORY["messages"]():
        where = f"{message.file}:{message.first}"
        if message.text and message.text not in OTHERWISE:
            assert message.text.startswith("cannot "), where
        assert not message.text.endswith((".", "!", " ")), where


def test_hints_say_what_to_do_in_a_few_words() -> None:
    for message in INVENTORY["messages"]():
        if message.hint:
            where = f"{message.file}:{message.first}"
            assert not message.hint.endswith(("!", " ")) and not message.hint.startswith("("), where
            assert not message.hint.endswith(".") or message.hint.endswith("..."), where


def test_the_recorder_notes_the_place_of_each_message(tmp_path: Path) -> None:
    noted = tmp_path / "met"
    environment = {**os.environ, "PYTHONPATH": f"{TOP / 'tests' / 'messages'}:{TOP}", "SPFS_MESSAGES": str(noted)}
    for _ in range(2):
        command = [sys.executable, "-m", "spfs.cli.spfs", "status", "--socket-path", "/nonexistent/s"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "cannot reach the manager: /nonexistent/s" in done.stderr
    places = {(file, int(line)) for file, _, line in (text.rpartition(":") for text in noted.read_text().split())}
    assert [file for file, _ in places] == ["spfs/client.py"]
    every = list(INVENTORY["messages"]())
    unmet = INVENTORY["unmet"](places)
    (met,) = [message for message in every if message not in unmet]
    assert met.text == "cannot reach the manager: {}: {}" and len(every) > 150
