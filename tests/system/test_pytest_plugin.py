"""The plugin in runs of pytest by themselves: with real mounts, in parallel, killed, failing, and without FUSE."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest
from testing_kit import TOP, leftovers, unprivileged

from spfs.testing import wait_until

pytest_plugins = ["pytester"]
pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
LIMIT = 30.0
WAITS = """
    import subprocess

    def wait_and_go_on(mount):
        mount.create_file("f", "contents")
        mount.stub()
        process = subprocess.Popen(["cat", mount.path / "f"], stdout=subprocess.PIPE, text=True)
        (held,) = mount.wait_held(1, 20)
        assert held.pid == process.pid
        mount.release()
        assert process.communicate()[0] == "contents"
"""


@pytest.fixture(autouse=True)
def own_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the runs put their mounts; nothing may be left there."""
    base = tmp_path_factory.mktemp("t")
    monkeypatch.setenv("TMPDIR", str(base))
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    yield base
    wait_until(lambda: not leftovers(base), LIMIT, f"left: {leftovers(base)}")


def test_several_mounts_and_those_of_the_session(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        WAITS
        + """
    import os, pytest

    def test_several(delayed_mount):
        first, second = delayed_mount(), delayed_mount()
        wait_and_go_on(first)
        wait_and_go_on(second)

    paths = []

    @pytest.fixture(scope="session")
    def shared(delayed_mount_session):
        return delayed_mount_session()

    def test_first(shared, delayed_mount):
        wait_and_go_on(shared)
        paths.append(delayed_mount().path)

    def test_second(shared):
        assert os.listdir(shared.path) == ["f"] and not paths[0].exists()
    """
    )
    result = pytester.runpytest_subprocess("-W", "error", "--strict-markers", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3)


def test_the_report_of_a_failing_test_says_who_waits(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
    import subprocess, pytest

    @pytest.fixture
    def process():
        started = []
        yield started
        started[0].kill()
        started[0].wait()

    def test_fails(delayed_mount, process):
        mount = delayed_mount()
        mount.fail("EROFS", ["write"], "*.db")
        mount.stub()
        process.append(subprocess.Popen(["cat", mount.path / "some name"]))
        mount.wait_held(1, 20)
        assert not "that the program is done"

    def test_without(tmp_path):
        assert False
    """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "*- delayed mount */mnt -*",
            "mode stub, requests held: 1, files open: 0",
            "rule: fail operations=write 'path=[*].db' errno=EROFS",
            "held: lookup of some name by process * (cat), for *",
            "log: * mode stub*",
        ]
    )
    assert str(result.stdout).count("- delayed mount ") == 1


def test_workers_in_parallel(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        WAITS
        + """
    import os, pytest

    @pytest.mark.parametrize("number", range(8))
    def test_it(delayed_mount, number):
        wait_and_go_on(delayed_mount())
        print("WORKER", os.environ["PYTEST_XDIST_WORKER"])
    """
    )
    result = pytester.runpytest_subprocess("-n", "2", "-rP")
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines_random(["WORKER gw0", "WORKER gw1"])


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_run_that_is_killed_leaves_nothing(
    pytester: pytest.Pytester, own_directory: Path, workers: "tuple[str, ...]"
) -> None:
    pytester.makepyfile(
        """
    import os

    def test_it(delayed_mount):
        mount = delayed_mount(own_limit=None)
        mount.stub()
        with open("pids", "w") as file:
            print(os.getpid(), mount.status().pid, file=file)
        os.rename("pids", "ready")
        os.stat(mount.path / "hangs")
    """
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:timeout", *workers]
    with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.DEVNULL) as process:
        wait_until((pytester.path / "ready").exists, LIMIT)
        pytest_pid, filesystem = map(int, (pytester.path / "ready").read_text().split())
        assert leftovers(own_directory)
        os.kill(pytest_pid, signal.SIGKILL)
        if workers:
            process.kill()
    wait_until(lambda: not leftovers(own_directory) and not os.path.exists(f"/proc/{filesystem}"), LIMIT)


MISSING = """
    import pytest

    def test_it(delayed_mount):
        delayed_mount()

    @pytest.mark.delayed_mount(missing="fail")
    def test_that_needs_it(delayed_mount):
        delayed_mount()
"""


class TestWithoutFuse:
    @pytest.fixture(autouse=True)
    def no_libfuse(self, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> None:
        monkeypatch.setenv("FUSE_LIBRARY_PATH", "/nowhere/libfuse.so")
        pytester.makepyfile(MISSING)

    def test_skips_with_the_reason_or_as_the_mark_says(self, pytester: pytest.Pytester) -> None:
        result = pytester.runpytest_subprocess("-rs")
        result.assert_outcomes(skipped=1, failed=1)
        result.stdout.fnmatch_lines(["SKIPPED * delayed mounts cannot be had here: cannot load libfuse: /nowhere/*"])

    def test_fails_if_told_so(self, pytester: pytest.Pytester) -> None:
        pytester.makeini("[pytest]\ndelayed_mount_missing = fail")
        pytester.runpytest_subprocess().assert_outcomes(failed=2)
        pytester.runpytest_subprocess("--delayed-mount-missing=skip").assert_outcomes(skipped=2)

    def test_wrong_settings(self, pytester: pytest.Pytester) -> None:
        pytester.makeini("[pytest]\ndelayed_mount_missing = perhaps")
        result = pytester.runpytest_subprocess()
        result.stdout.fnmatch_lines(["*delayed_mount_missing: perhaps: not one of skip, fail"])


def test_the_own_limit_is_an_ini_option(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ndelayed_mount_own_limit = 0.2")
    pytester.makepyfile(
        """
    import os

    def test_it(delayed_mount):
        mount = delayed_mount()
        mount.stub()
        os.stat(mount.path / "f")
    """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*TimeoutError: *"])


def test_as_an_ordinary_user() -> None:
    with unprivileged() as user:
        (user.home / "test_it.py").write_text(
            "\n".join(line[4:] for line in WAITS.splitlines())
            + "\n\ndef test_it(delayed_mount):\n    for _ in range(2):\n        wait_and_go_on(delayed_mount())\n"
        )
        done = user.python("-m", "pytest", "-p", "no:cacheprovider", "test_it.py")
        assert " 1 passed" in done.stdout, done.stdout
        assert [name for name in os.listdir(user.home) if name.startswith("spfs-")] == []


def test_costs_nothing_who_does_not_use_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
    import sys

    def test_it():
        ours = {name for name in sys.modules if name.split(".")[0] in ("spfs", "stubfs", "fuse", "ctypes", "psutil")}
        assert ours <= {"spfs", "stubfs", "spfs.pytest_plugin", "ctypes"}, ours
    """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


class TestPage:
    """What docs/testing.md shows works."""

    @staticmethod
    def _blocks(language: str) -> "list[str]":
        return re.findall(rf"^```{language}\n(.*?)^```", (TOP / "docs" / "testing.md").read_text(), re.M | re.S)

    def test_python(self, pytester: pytest.Pytester) -> None:
        tests, script = self._blocks("python")[:-1], self._blocks("python")[-1]
        pytester.makepyfile("\n".join(tests))
        pytester.runpytest_subprocess().assert_outcomes(passed=2)
        assert pytester.runpython_c(script).ret == 0

    def test_shell(self, own_directory: Path) -> None:
        (script,) = self._blocks("sh")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-euc", script], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True, timeout=60
        )
        assert done.returncode == 0 and done.stdout.startswith("fsync of file by process")
        assert os.listdir(own_directory) == []
