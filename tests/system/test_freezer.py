"""Both freezers on real cgroups: frozen and thawed, and given back as found whatever fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Iterator, List

import pytest
from mount_kit import Places, daemons, places  # noqa: F401

from spfs.errors import SpfsError
from spfs.freezer import FreezerV1, FreezerV2, NoFreezer, is_there, open_freezer
from spfs.linux import mountinfo
from spfs.testing import wait_until

pytestmark = pytest.mark.needs_root


class Cgroup:
    """A cgroup of the test's own, with processes put into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.processes: List["subprocess.Popen[bytes]"] = []
        path.mkdir()

    def spawn(self, *command: str, below: str = "") -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(command or ("sleep", "1000"))
        self.processes.append(process)
        self.add(process.pid, below)
        return process

    def add(self, pid: int, below: str = "") -> None:
        (self.path / below).mkdir(exist_ok=True)
        (self.path / below / "cgroup.procs").write_text(str(pid))

    @property
    def frozen(self) -> bool:
        """Is it asked to be frozen?"""
        for name in ("freezer.self_freezing", "cgroup.freeze"):
            if (self.path / name).exists():
                return (self.path / name).read_text().strip() == "1"
        raise AssertionError("neither v1 nor v2")

    def set(self, frozen: bool, below: str = "") -> None:
        if (self.path / "freezer.state").exists():
            (self.path / below / "freezer.state").write_text("FROZEN" if frozen else "THAWED")
        else:
            (self.path / below / "cgroup.freeze").write_text("1" if frozen else "0")

    def remove(self) -> None:
        self.set(False)
        for process in self.processes:
            process.kill()
            process.wait()
        for directory, _, _ in os.walk(self.path, topdown=False):
            wait_until(lambda: not Path(directory, "cgroup.procs").read_text())
            os.rmdir(directory)


def hierarchy(fstype: str) -> Path:
    mounts = mountinfo.parse(Path("/proc/self/mountinfo").read_bytes())
    option = "freezer" if fstype == "cgroup" else ""
    return Path(next(m.mountpoint for m in mounts if m.fstype == fstype and option in m.super_options))


@pytest.fixture(
    params=[
        pytest.param("cgroup", marks=pytest.mark.needs_cgroup1),
        pytest.param("cgroup2", marks=pytest.mark.needs_cgroup2),
    ]
)
def cgroup(request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    made = Cgroup(hierarchy(request.param) / f"spfs-test-{os.getpid()}-freezer")
    try:
        yield made
    finally:
        made.remove()


def ticks(process: "subprocess.Popen[bytes]") -> int:
    """CPU time of a busy process, in clock ticks: it grows as long as it runs."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_frozen_processes_stand_still_and_run_on(cgroup: Cgroup) -> None:
    busy = cgroup.spawn("sh", "-c", "while :; do :; done")
    wait_until(lambda: ticks(busy) > 0)
    with open_freezer(str(cgroup.path)) as freezer:
        freezer.freeze()
        before = ticks(busy)
        time.sleep(0.05)  # nothing can be waited for where nothing may happen
        assert ticks(busy) == before
        freezer.thaw()
        wait_until(lambda: ticks(busy) > before)
        freezer.freeze()
    assert not cgroup.frozen  # the end of the block thawed it
    wait_until(lambda: ticks(busy) > before)


def test_the_right_kind_is_chosen(cgroup: Cgroup) -> None:
    kind = FreezerV2 if (cgroup.path / "cgroup.freeze").exists() else FreezerV1
    assert isinstance(open_freezer(str(cgroup.path)), kind)
    assert isinstance(open_freezer(f"{cgroup.path}/"), kind)


@pytest.mark.parametrize("path", [None, "", "(null)", "/sys/fs/cgroup/freezer/(null)", "/sys/fs/cgroup/x/(null)/"])
def test_no_freezer(path: str) -> None:
    with open_freezer(path) as freezer:
        assert isinstance(freezer, NoFreezer)
        freezer.freeze()
        freezer.thaw()
        assert freezer.pids() == []


def test_processes_of_all_cgroups_below_are_listed(cgroup: Cgroup) -> None:
    freezer = open_freezer(str(cgroup.path))
    assert freezer.pids() == []
    found = sorted([cgroup.spawn(below="inner").pid, cgroup.spawn(below="inner").pid, cgroup.spawn(below="other").pid])
    assert freezer.pids() == found


def test_what_was_frozen_before_is_frozen_afterwards(cgroup: Cgroup) -> None:
    cgroup.spawn()
    cgroup.set(True)
    with open_freezer(str(cgroup.path)) as freezer:
        freezer.freeze()
        freezer.thaw()
        assert not cgroup.frozen
    assert cgroup.frozen


def test_unused_it_changes_nothing(cgroup: Cgroup) -> None:
    cgroup.set(True)
    with open_freezer(str(cgroup.path)):
        pass
    assert cgroup.frozen


@pytest.mark.needs_fuse
def test_a_task_that_waits_for_a_file_system(cgroup: Cgroup, places: Places) -> None:  # noqa: F811
    places.base()
    places.bindfs("source", "mnt")
    (daemon,) = daemons(f"bindfs {places.path('source')}")
    os.kill(daemon, signal.SIGSTOP)
    try:
        waiter = cgroup.spawn("cat", places.path("mnt/who"))
        where = Path(f"/proc/{waiter.pid}/wchan")
        wait_until(lambda: any(word in where.read_text() for word in ("fuse", "request")))
        free = cgroup.spawn("sh", "-c", "while :; do :; done")
        start = time.monotonic()
        with pytest.raises(SpfsError, match=f"not frozen in 0.3 s.*{waiter.pid}") as caught:
            open_freezer(str(cgroup.path)).freeze(0.3)
        assert caught.value.errno == errno.ETIMEDOUT
        assert 0.3 <= time.monotonic() - start < 3
        assert not cgroup.frozen
        before = ticks(free)
        wait_until(lambda: ticks(free) > before)
    finally:
        os.kill(daemon, signal.SIGCONT)
    open_freezer(str(cgroup.path)).freeze(5)  # answered, so it can be frozen now


def test_a_timeout_leaves_a_frozen_one_frozen(cgroup: Cgroup) -> None:
    cgroup.spawn()
    cgroup.set(True)
    freezer = open_freezer(str(cgroup.path))
    freezer._wait = lambda frozen, timeout: False  # type: ignore[attr-defined]
    with pytest.raises(SpfsError, match="not frozen"):
        freezer.freeze(0.01)
    assert cgroup.frozen


def test_beneath_a_frozen_cgroup_it_refuses(cgroup: Cgroup) -> None:
    cgroup.spawn(below="inner")
    cgroup.set(True)
    with pytest.raises(SpfsError, match="a cgroup above it is frozen") as caught:
        open_freezer(str(cgroup.path / "inner")).freeze(1)
    assert caught.value.errno == errno.EBUSY
    cgroup.set(False)


def test_one_that_contains_us_is_refused(cgroup: Cgroup) -> None:
    # In a child, which is put in the place of the manager.
    child = cgroup.spawn(below="inner")
    with pytest.raises(SpfsError, match=f"process {child.pid}") as caught:
        open_freezer(str(cgroup.path), protect=[child.pid])
    assert caught.value.errno == errno.EBUSY
    ours = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    own = hierarchy("cgroup2") / ours.partition("::")[2].lstrip("/")
    if (own / "cgroup.freeze").exists():
        with pytest.raises(SpfsError, match=f"process {os.getpid()}"):
            open_freezer(str(own))


def refused(path: str) -> SpfsError:
    with pytest.raises(SpfsError, match="cannot use freezer cgroup") as caught:
        open_freezer(path)
    return caught.value


def test_no_such_cgroup_or_none_at_all(cgroup: Cgroup, tmp_path: Path) -> None:
    assert refused(str(cgroup.path / "nonesuch")).errno == errno.ENOENT
    assert refused(str(tmp_path)).errno == errno.EINVAL
    for name, text in (("freezer.state", "THAWED"), ("cgroup.freeze", "0"), ("cgroup.procs", "")):
        (tmp_path / name).write_text(text)
    assert refused(str(tmp_path)).errno == errno.EINVAL  # the files alone do not make a cgroup
    assert refused(str(cgroup.path.parent)).errno == errno.EINVAL  # the root


def test_a_cgroup_that_is_removed_meanwhile(cgroup: Cgroup) -> None:
    (cgroup.path / "inner").mkdir()
    freezer = open_freezer(str(cgroup.path / "inner"))
    freezer.freeze(1)
    (cgroup.path / "inner").rmdir()
    freezer.restore()
    with pytest.raises(SpfsError, match="cannot freeze cgroup"):
        freezer.freeze(1)


def test_whether_a_cgroup_is_there(cgroup: Cgroup, tmp_path: Path) -> None:
    assert is_there(str(cgroup.path)) and is_there(f"{cgroup.path}/") and is_there(f"{cgroup.path}/x/..")
    assert not is_there(f"{cgroup.path}/none") and not is_there(f"{cgroup.path}/cgroup.procs")
    (tmp_path / "link").symlink_to(cgroup.path)
    assert not is_there(str(tmp_path)) and not is_there(str(tmp_path / "link")) and not is_there("(null)")
