"""What people watch: status with who waits, live status and progress on a terminal, and the record that is left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from manager_kit import ENVIRONMENT, Manager, manager_in, reading, run

from spfs.errors import SpfsError
from spfs.testing import wait_until
from stubfs import record
from stubfs.client import FilesystemClient

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
BIND = 4096  # MS_BIND


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    places = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for fields in places:  # a stat() could wait
        if fields[4] == str(path) and "fuse.stubfs" not in fields:  # the real one, which is ours
            subprocess.run(["umount", path], check=True)


def spfs(manager: Manager, *arguments: str) -> str:
    done = run("spfs.cli.spfs", *arguments, environment={"SPFS_MANAGER_SOCK": str(manager.socket)})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class Terminal:
    """A command on a terminal of its own; ``shown`` is all that it has written."""

    def __init__(
        self, manager: Manager, *arguments: str, columns: int = 200, lines: int = 50, kind: str = "xterm"
    ) -> None:
        self.shown = ""
        self._end, terminal = pty.openpty()
        environment = {**os.environ, **ENVIRONMENT, "SPFS_MANAGER_SOCK": str(manager.socket), "TERM": kind}
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spfs.cli.spfs", *arguments],
            stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(terminal)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, pattern: str, timeout: float = 15.0, as_sent: bool = False) -> None:
        """Until what it shows, without the terminal's own codes unless ``as_sent``, matches."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.shown if as_sent else re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown)):
            assert select.select([self._end], [], [], max(0.0, deadline - time.monotonic()))[0], self.shown
            try:
                self.shown += os.read(self._end, 65536).decode(errors="replace")
            except OSError as error:  # EIO: it has ended
                assert error.errno == errno.EIO
                raise AssertionError(f"{pattern!r} not in {self.shown}") from error

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._end)


@contextmanager
def terminal(manager: Manager, *arguments: str, **settings: Any) -> Iterator[Terminal]:
    made = Terminal(manager, *arguments, **settings)
    try:
        yield made
    finally:
        made.close()


def test_status_says_who_waits_for_what(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    with reading(mnt / "one") as reader:
        wait_until(lambda: client.held())
        (line,) = [line for line in spfs(manager, "status").splitlines() if f" {reader.pid} " in line]
        assert re.match(rf"a +{reader.pid} +cat /.* lookup +1 +\d\S* s +one", line), line
        answer = json.loads(spfs(manager, "status", "--json"))
        (group,) = answer["waiting"]
        assert (group["id"], group["pid"], group["count"], group["path"]) == ("a", reader.pid, 1, "one")
        assert answer["mounts"][0]["busy"] is False and 0 < group["oldest"] < 20


def test_a_change_is_waited_for(manager: Manager, mnt: Path) -> None:
    client, other = manager.client(), manager.client()
    now = client.status()["changes"]
    assert client.changes(now, 0.05) == now  # nothing happened
    assert client.changes(now + 1000) == now  # another manager's count
    client.mount("a", str(mnt))
    begun = client.status()["changes"]
    assert begun > now and client.changes(now) == begun
    with subprocess.Popen([sys.executable, "-c", CHANGE_SOON, str(manager.socket)], env={**os.environ, **ENVIRONMENT}):
        assert client.changes(begun, 15) > begun
    with pytest.raises(SpfsError, match="since.*must be a decimal number"):
        other.request("changes", since=-1)
    assert other.status("a")["mounts"][0]["mode"] == "stub"


CHANGE_SOON = """
import sys
from spfs.client import ManagerClient
with ManagerClient(sys.argv[1], 10) as client:
    client.mode("stub", "a")
"""


def test_who_waits_for_a_change_is_told_that_the_manager_ends(manager: Manager) -> None:
    arguments = ["status", "--watch", "--json", "--socket-path", str(manager.socket)]
    with subprocess.Popen(
        [sys.executable, "-m", "spfs.cli.spfs", *arguments], env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as watcher:  # fmt: skip
        assert watcher.stdout is not None and watcher.stderr is not None
        assert json.loads(watcher.stdout.readline())["mounts"] == []
        manager.stop()
        assert watcher.wait(10) == 1
        said = watcher.stderr.read()  # it was waiting at the manager, or between two questions
        assert re.match("spfs: cannot (wait longer: the manager is ending|get an answer .*: it has ended) ", said), said


def test_watching_as_json_lines(manager: Manager, mnt: Path) -> None:
    arguments = ["status", "--watch", "--json", "--socket-path", str(manager.socket)]
    with subprocess.Popen(
        [sys.executable, "-m", "spfs.cli.spfs", *arguments], env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE, text=True,
    ) as watcher:  # fmt: skip
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["mounts"] == []
        manager.client().mount("a", str(mnt), "stub")
        for line in watcher.stdout:
            if [row["mode"] for row in json.loads(line)["mounts"] if row["state"] == "mounted"] == ["stub"]:
                break
        with reading(mnt / "file") as reader:
            manager.client().mode("stub", "a")  # an event that changes nothing would be none: ages come by themselves
            wait_until(lambda: manager.client().held())
            manager.client().replace("a", "none", "tmpfs", begin="hold")
            for line in watcher.stdout:
                if [group["pid"] for group in json.loads(line)["waiting"]] == [reader.pid]:
                    break
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(10) == 0


def test_watching_on_a_terminal(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    with terminal(manager, "status", "--watch") as shown:
        shown.until("no mounts")
        client.mount("a", str(mnt), "stub")
        shown.until(rf"a +{mnt} +mounted +stub")
        with reading(mnt / "file") as reader:
            shown.until(rf"a +{reader.pid} +cat /\S+ +lookup +1 ")
            client.replace("a", str(tmp_path / "real"), "none", BIND, begin="release")
            shown.until(r"attempts \(last: No such file or directory\)")
            shown.until(r"REPLACE OF +STAGE +SINCE +ATTEMPTS +ERROR\s+a +mounting +\S+ s +\d+ +No such file")
            (tmp_path / "real").mkdir()
            client.wait("a")
            shown.until("gone: replaced")
            assert reader.wait(10) == 1  # there is no such file on the real side
        os.kill(shown.process.pid, signal.SIGINT)
        assert shown.process.wait(10) == 0


def test_many_mounts_with_long_names_on_a_small_screen(manager: Manager, tmp_path: Path) -> None:
    client = manager.client()
    for number in range(8):
        mountpoint = tmp_path / f"a-directory-with-a-name-that-is-long-{number}"
        mountpoint.mkdir()
        client.mount(f"a-mount-with-a-name-that-is-long-{number}", str(mountpoint), "stub")
    with reading(mountpoint / "file") as reader, terminal(manager, "status", "--watch", columns=80, lines=12) as shown:
        # Who waits is seen although there are more mounts than lines; ends of names tell them from each other.
        shown.until(r"a-mou\S*…\S*g-0 +/\S*…\S+-0 +mounted +stub ")
        shown.until(rf"and \d more\s+WAITS ON +PID.*\s+a-\S*…\S*-7 +{reader.pid} +cat .* lookup +1 ")
        shown.shown = ""
        shown.resize(200, 50)
        shown.until(r"a-mount-with-a-name-that-is-long-7 +\S+long-7 +mounted +stub ")
        os.kill(shown.process.pid, signal.SIGINT)
        # What was seen last stays, where it was called.
        shown.until(r"\x1b\[\?1049l", as_sent=True)
        shown.shown = shown.shown.rpartition("\x1b[?1049l")[2]
        shown.until(r"Ctrl-C: end\r\n")
        assert "long-7" in shown.shown and shown.process.wait(10) == 0
    client.unmount(force=True)


def test_a_terminal_that_cannot_be_drawn_on(manager: Manager) -> None:
    with terminal(manager, "status", "--watch", kind="dumb") as shown:
        shown.until("no mounts")
        os.kill(shown.process.pid, signal.SIGINT)
        assert shown.process.wait(10) == 0 and "\x1b" not in shown.shown


def test_waiting_with_a_bar(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", str(tmp_path / "real"), "none", BIND, begin="hold")
    with terminal(manager, "wait", "a", columns=40) as shown:
        shown.until(r"━ 0:00:\d\d  a: held")  # a narrow one cuts the text, not the bar
    with terminal(manager, "wait", "a") as shown:
        shown.until("a: held until it is released")
        client.begin("release", "a")
        shown.until(r"a: attempt \d+ to mount .*/real: No such file or directory")
        (tmp_path / "real").mkdir()
        shown.until(r"a on \S+: done: none \S+/real.*moved nothing; blackout")
        assert shown.process.wait(10) == 0


def test_the_bar_is_not_in_the_way_of_errors(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", "none", "tmpfs", begin="hold")
    with terminal(manager, "wait", "a", "--timeout", "0.3") as shown:
        shown.until("cannot wait longer for mount 'a': not done in 0.3 s")
        assert shown.process.wait(10) == 4
    with terminal(manager, "wait", "ghost") as shown:
        shown.until("cannot find mount 'ghost': unknown id")
        assert shown.process.wait(10) == 1


def entries(manager: Manager, id: str = "a") -> List[Dict[str, Any]]:
    return record.read(manager.row(id)["record"])


def test_every_mount_leaves_a_record(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    (mnt / "file").write_text("0123")
    client.mode("stub", "a")
    with reading(mnt / "file") as reader, reading(mnt / "other") as killed:
        wait_until(lambda: len(client.held()) == 2)
        client.replace("a", str(tmp_path / "real"), "none", BIND, begin="release")
        wait_until(lambda: manager.row("a")["replace"]["attempts"] > 1)
        killed.kill()
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "file").write_text("real")
        client.wait("a")
        assert reader.communicate(timeout=10)[0] == b"real"
    wait_until(lambda: manager.row("a")["end"] == "replaced")
    found = entries(manager)
    names = [entry["event"] for entry in found if entry["event"] not in ("wait", "attempt", "waiting")]
    assert names[:6] == ["mount", "mounted", "mode", "replace-asked", "replace-started", "stage"]
    assert names[-2:] == ["replace-ended", "gone"]
    assert [entry["mode"] for entry in found if entry["event"] == "mode"] == ["stub", "proxy"]
    stages = [entry["stage"] for entry in found if entry["event"] == "stage"]
    assert stages == ["begun", "mounted", "prepared", "proxy", "switched", "verified"]
    assert {"attempt": 1, "error": "No such file or directory"}.items() <= next(
        entry for entry in found if entry["event"] == "attempt"
    ).items()
    waits = {entry["pid"]: entry for entry in found if entry["event"] == "wait"}
    assert waits[reader.pid]["how"] == "answered" and waits[killed.pid]["how"] == "interrupted"
    assert waits[reader.pid]["command_line"] == f"cat {mnt}/file"
    proxied = next(entry["time"] for entry in found if entry.get("stage") == "proxy")
    assert waits[killed.pid]["time"] < proxied and waits[reader.pid]["time"] > proxied - 0.5


def test_the_timeline_of_what_goes_on(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    assert "the manager has no mount" in failure(manager, "timeline")
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    with reading(mnt / "one") as reader:
        wait_until(lambda: client.held())
        shown = spfs(manager, "timeline")
        assert f"a on {mnt}, from " in shown and f"{reader.pid} cat /" in shown and "stub mode" in shown
        assert "waits still" in spfs(manager, "timeline", "a", "--format", "svg")
        client.unmount("a", force=True)
    wait_until(lambda: not client.status()["mounts"])
    assert "gone: unmounted" in spfs(manager, "timeline", "a")
    spfs(manager, "timeline", "a", "--output", str(tmp_path / "page.html"))
    assert f"{reader.pid} cat" in (tmp_path / "page.html").read_text()
    assert "cannot find mount 'ghost'" in failure(manager, "timeline", "ghost")


def failure(manager: Manager, *arguments: str) -> str:
    done = run("spfs.cli.spfs", *arguments, environment={"SPFS_MANAGER_SOCK": str(manager.socket)})
    assert done.returncode == 1 and done.stderr.startswith("spfs: cannot ") and done.stderr.count("\n") == 1
    return done.stderr


def test_a_record_goes_on_with_the_next_manager(manager: Manager, mnt: Path) -> None:
    client = manager.client()
    control = client.mount("a", str(mnt), "stub")["control"]
    client.replace("a", "//srv/share", "cifs", options="username=u,password=secret", begin="hold")
    assert "secret" not in Path(manager.row("a")["record"]).read_text()
    manager.kill()
    with reading(mnt / "file") as reader, FilesystemClient(control, 10) as filesystem:
        pid = reader.pid
        wait_until(filesystem.held)
    manager.start()
    wait_until(lambda: "taken-over" in [entry["event"] for entry in entries(manager)])
    manager.client().unmount("a", force=True)
    wait_until(lambda: manager.row("a")["state"] == "gone")
    found = entries(manager)
    assert [entry["event"] for entry in found][-1] == "gone"
    assert [entry["how"] for entry in found if entry.get("pid") == pid and entry["event"] == "wait"] == ["interrupted"]


def test_records_go_with_the_work_directory_and_stay_in_a_log_directory(mnt: Path, tmp_path: Path) -> None:
    with manager_in(tmp_path) as manager:
        manager.start("--log-dir", str(tmp_path / "logs"))
        manager.client().mount("a", str(mnt))
        kept = Path(manager.row("a")["record"])
        with pytest.raises(SpfsError):
            manager.client().mount("b", str(tmp_path / "none"))
        manager.client().shutdown(unmount=True)
        manager.wait_ended()
        assert list(manager.work.glob("*.jsonl")) == []
        assert list((tmp_path / "logs").glob("*.jsonl")) == [kept]
        assert record.read(str(kept))[-1]["event"] == "gone"
    with manager_in(tmp_path) as manager:
        manager.start()
        manager.client().mount("a", str(mnt))
        assert Path(manager.row("a")["record"]).parent == manager.work
        manager.client().shutdown(unmount=True)
        manager.wait_ended()
        assert list(manager.work.glob("*.jsonl")) == []
