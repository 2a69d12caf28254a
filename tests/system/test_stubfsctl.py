"""``stubfsctl`` as scripts use it: exit codes, JSON, waiting for an event."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List

import pytest
from stubfs_kit import Filesystem, command, environment, mounted, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path, "proxy") as filesystem:
        (filesystem.real / "f").write_text("real")
        yield filesystem


def ctl(*words: object) -> "subprocess.CompletedProcess[str]":
    script = [sys.executable, "-c", "import sys; from stubfs.ctl import main; sys.exit(main())"]
    return subprocess.run(
        [*script, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        timeout=60,
    )  # fmt: skip


def test_what_waits_and_how_it_goes_on(fs: Filesystem) -> None:
    done = ctl(fs.socket_path, "rules", "--rule", "hold operations=open path=f")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert ctl(fs.socket_path, "rules").stdout == "hold operations=open path=f\n"
    process = fs.run(lambda: (fs.path / "f").read_text())
    done = ctl(fs.socket_path, "wait-held", "--timeout", "20", "--pid", process.pid, "--json")
    (held,) = json.loads(done.stdout)
    assert done.returncode == 0 and (held["operation"], held["path"], held["pid"]) == ("open", "f", process.pid)
    listed = ctl(fs.socket_path, "held", "--operations", "open,read", "--path", "f").stdout
    assert listed.startswith(f"open of f by process {process.pid} (") and listed.endswith(" s\n")
    assert ctl(fs.socket_path, "held", "--path", "g").stdout == ""
    assert json.loads(ctl(fs.socket_path, "rules", "--none", "--json").stdout) == []
    assert process.result() == "real"


def test_modes(fs: Filesystem, tmp_path: Path) -> None:
    assert ctl(fs.socket_path, "mode", "stub", "--timeout", "0.05", "--errno", "EHOSTDOWN").returncode == 0
    with pytest.raises(OSError, match="Host is down"):
        os.stat(fs.path / "f")
    assert json.loads(ctl(fs.socket_path, "status", "--json").stdout)["mode"] == "stub"
    assert ctl(fs.socket_path, "mode", "proxy", "--proxy-dir", fs.real).returncode == 0
    assert "mode: proxy\n" in ctl(fs.socket_path, "status").stdout and (fs.path / "f").read_text() == "real"
    assert ctl(fs.socket_path, "quit").returncode == 0
    assert fs.daemon.wait(20) == 0 and os.listdir(fs.path) == []


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["wait-held", "3", "--timeout", "0.05"], 4, "cannot wait longer for 3 held requests: 0 after 0.05 s"),
        (["rules", "--rule", "hang"], 2, "cannot use a rule: hang: no such action"),
        (["mode", "proxy"], 2, "--proxy-dir goes with proxy"),
        (["mode", "proxy", "--proxy-dir", "/nowhere"], 2, "cannot use /nowhere: No such file or directory"),
        (["frobnicate"], 2, "cannot understand the command line"),
        (["held", "--operations", "frob"], 2, "frob: no such operation; one of: "),
    ],
)
def test_what_fails_says_why(fs: Filesystem, words: List[str], code: int, message: str) -> None:
    done = ctl(fs.socket_path, *words)
    assert done.returncode == code and message in done.stderr and done.stdout == "", done.stderr
    assert len(done.stderr.splitlines()) == 1 and fs.client.status().mode == "proxy" and fs.client.rules() == []


def test_nobody_there(tmp_path: Path) -> None:
    done = ctl(tmp_path / "sock", "status")
    assert done.returncode == 1 and "cannot reach a file system" in done.stderr


def test_the_file_system_ends_with_a_process(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with subprocess.Popen(["sleep", "1000"]) as owner:
        try:
            arguments = command(str(tmp_path / "mnt"), "--mode", "stub", "--exit-with-pid", str(owner.pid))
            arguments += ["--socket-path", str(tmp_path / "sock")]
            assert subprocess.run(arguments, env=environment(), timeout=60).returncode == 0
            reader = subprocess.Popen(["ls", str(tmp_path / "mnt")], stderr=subprocess.DEVNULL)
            assert ctl(tmp_path / "sock", "wait-held", "--timeout", "20", "--pid", reader.pid).returncode == 0
        finally:
            owner.kill()
    assert reader.wait(20) != 0
    wait_until(lambda: not os.path.ismount(tmp_path / "mnt"), 20)
    done = subprocess.run(
        command(str(tmp_path / "mnt"), "--exit-with-pid", str(owner.pid)), env=environment(),
        stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and f"cannot end with process {owner.pid}: No such process" in done.stderr
