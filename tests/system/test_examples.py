"""The examples, run as a user would run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "delayed_mount.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
    )


@pytest.mark.parametrize(
    "freezer",
    [
        pytest.param("v1", marks=pytest.mark.needs_cgroup1),
        pytest.param("v2", marks=pytest.mark.needs_cgroup2),
        "none",
    ],
)
def test_a_delayed_mount_from_end_to_end(freezer: str) -> None:
    done = run("--freezer", freezer)
    assert done.returncode == 0, done.stdout
    for words in (
        r"restore: a FUSE mount is on",
        r"stub: they work, and wait: \d+ requests are held",
        r"the server is late: \d+ attempts have failed",
        r"moved: 1 mount, and of [789] processes: .*cwd, .*fifo, .*file, .*private mapping, .*shared mapping",
        r"blackout: [\d.]+ ms",
        r"FUSE is gone: on \S+ is tmpfs; its process has ended: True",
        r"nothing is left behind",
    ):
        assert re.search(words, done.stdout), (words, done.stdout)
    roles = re.findall(r"^ +(\w+) +(\d+) operations, .*: nothing wrong$", done.stdout, re.MULTILINE)
    assert len(roles) == 5 and all(int(count) > 100 for _, count in roles), done.stdout


@pytest.mark.parametrize("role", ["reader", "mapper"])
def test_the_workload_notices_what_is_wrong(role: str, tmp_path: Path) -> None:
    """Else the example would prove nothing."""
    assert run("--prepare", str(tmp_path)).returncode == 0
    top = tmp_path / "application"
    data = bytearray((top / "records").read_bytes())
    (top / "records").write_bytes(bytes(byte ^ 1 for byte in data))  # whichever record it looks at first
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "workload.py"), role, str(top)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        report = json.loads(process.communicate("stop\n", timeout=30)[0])
    assert any("instead of" in wrong for wrong in report["wrong"])


def test_wrong_arguments() -> None:
    done = run("--source", "server:/export")
    assert done.returncode == 2 and "--source and --type go together" in done.stdout


class InOwnDirectory:
    """Examples that are run with a temporary directory of their own, in which nothing may be left."""

    where: Path

    @pytest.fixture(autouse=True)
    def environment(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        base = tmp_path_factory.mktemp("t")
        monkeypatch.setenv("TMPDIR", str(base))
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield
        assert [entry.name for entry in base.iterdir() if not entry.name.startswith("pytest-of-")] == []

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


class TestInAShell(InOwnDirectory):
    where = EXAMPLES

    def test_a_delayed_mount(self) -> None:
        lines = self.run("sh", "delayed_mount.sh").splitlines()
        assert re.match(r"twice: spfs: cannot mount \S+/data: id 'data' is in use for .* \(choose another", lines[0])
        assert lines[1:3] == [
            "a lookup of input waits, a lookup of log waits",
            "the server is late: No such file or directory",
        ]
        assert re.fullmatch(r"done, a blackout of \d+\.\d ms, 0 left", lines[3])
        assert lines[4:] == [
            "both programs went on without an error, on the real file system",
            "timeline: gone: replaced",
        ]


class TestOfTesting(InOwnDirectory):
    where = EXAMPLES / "testing"

    @pytest.mark.parametrize("name", sorted(path.name for path in (EXAMPLES / "testing").glob("test_*.py")))
    def test_with_pytest(self, name: str) -> None:
        assert " 1 passed" in self.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", name)

    def test_a_service_without_pytest(self) -> None:
        lines = self.run(sys.executable, "late_service.py").splitlines()
        assert lines == [
            "the mount is late, and the service waits: lookup of service.conf",
            "the mount is there: running with version 1",
            "the mount is late, and the service waits: lookup of service.conf",
            "the mount is there: running with version 2",
        ]

    def test_tools_in_a_shell(self) -> None:
        if shutil.which("lsfd") is None:
            pytest.skip("there is no lsfd: apt-get install util-linux-extra")
        lines = self.run("sh", "hung_mount.sh").splitlines()
        assert lines[0] == "findmnt: answers" and lines[2].startswith("df: hangs, in: opendir of the root by process")
        assert lines[1] == "lsfd: answers" or lines[1].startswith("lsfd: hangs, in: getattr of file by process")
        assert lines[3:] == ["the server is back: df has ended, and the open file can be read"]
