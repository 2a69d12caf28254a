"""Gating by features, and the check that no system test leaves anything behind."""

from __future__ import annotations

import os
import runpy
import signal
import tempfile
import uuid
from pathlib import Path
from typing import Iterator

import pytest

from spfs import features, workshop
from spfs.testing import MARK, Snapshot, snapshot, wait_until

RUN = uuid.uuid4().hex
REQUIRED = os.environ.get("SPFS_REQUIRE_FEATURES") == "1"
MARKERS = {
    "needs_root": ("root",),
    "needs_fuse": ("fuse", "libfuse"),
    "needs_ptrace": ("ptrace",),
    "needs_cgroup1": ("freezer1",),
    "needs_cgroup2": ("freezer2",),
    "needs_criu": ("criu", "pycriu"),
    "needs_runc": ("runc",),
    "needs_podman": ("podman",),
}


def pytest_configure(config: pytest.Config) -> None:
    os.environ[MARK] = RUN  # inherited by every process that a test starts
    if os.environ.get("SPFS_MESSAGES"):
        _record_messages(config)
    if features.probe("root").available:
        # Whoever clones the mount namespace of a test, for a container, say, or in other tests that run at the same
        # time, gets copies of the mounts that are there just then, and keeps their file systems alive.
        workshop.private_namespace()


def _record_messages(config: pytest.Config) -> None:
    """The places of all messages, to what $SPFS_MESSAGES names; at the end, as not every user may write there."""
    asked = os.path.abspath(os.environ["SPFS_MESSAGES"])
    fd, noted = tempfile.mkstemp(prefix="spfs-messages-", dir="/tmp")
    os.fchmod(fd, 0o666)
    os.close(fd)
    os.environ["SPFS_MESSAGES"] = noted
    recorder = str(Path(__file__).with_name("messages"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [recorder, os.environ.get("PYTHONPATH")]))
    runpy.run_path(f"{recorder}/sitecustomize.py")  # for this process, which has started without it

    def collect() -> None:
        with open(asked, "a") as file:
            file.write(Path(noted).read_text())
        os.unlink(noted)

    config.add_cleanup(collect)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, names in MARKERS.items():
        if item.get_closest_marker(marker) is None:
            continue
        for name in names:
            feature = features.probe(name)
            if not feature.available:
                text = f"{name}: {feature.reason}"
                pytest.fail(text) if REQUIRED else pytest.skip(text)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        # A skip that hides a failure is a defect: where features are required, everything runs.
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"
    return report


def cgroups_of_tests() -> list[str]:
    found = []
    prefix = f"spfs-test-{os.getpid()}-"
    for top in ("/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        if os.path.isdir(top):
            found += [entry.path for entry in os.scandir(top) if entry.name.startswith(prefix)]
    return found


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After each system test: no process, mount, frozen cgroup, cgroup or fd that was not there before."""
    if "system" not in Path(request.node.path).parts:
        yield
        return
    base = str(tmp_path_factory.getbasetemp())
    before, groups = snapshot(base, RUN, cgroups_of_tests), set(cgroups_of_tests())
    yield
    left: list[str] = []

    def none_left() -> bool:
        now = snapshot(base, RUN, cgroups_of_tests)
        left[:] = now.added_since(before) + [f"cgroup: {path}" for path in set(cgroups_of_tests()) - groups]
        return not left

    try:
        wait_until(none_left, 5)
    except TimeoutError:
        _clean(snapshot(base, RUN, cgroups_of_tests), before)
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


def _clean(now: Snapshot, before: Snapshot) -> None:
    """So that one leak does not fail the tests after it."""
    for path in now.frozen - before.frozen:
        for name, thaw in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            if os.path.exists(f"{path}/{name}"):
                Path(path, name).write_text(thaw)
    for pid in now.processes.keys() - before.processes.keys():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    from stubfs import syscalls

    for line in sorted(now.mounts - before.mounts, key=len, reverse=True):
        try:
            syscalls.umount2(line.split(" ")[4].encode().decode("unicode_escape").encode("latin-1"), 2)  # MNT_DETACH
        except OSError:
            pass
