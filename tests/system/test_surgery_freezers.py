"""The same with cgroup freezers, and from a real FUSE mount that holds every request until it is a proxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterable, Iterator, Optional

import pytest
from surgery_kit import Mounts, Victim, tasks_stopped

from spfs.freezer import open_freezer
from spfs.references import MountRoot, Remains
from spfs.switch import Switch
from spfs.testing import process_state, wait_until
from stubfs.client import FilesystemClient

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

VERSIONS = [
    pytest.param("/sys/fs/cgroup/freezer", marks=pytest.mark.needs_cgroup1, id="v1"),
    pytest.param("/sys/fs/cgroup/unified", marks=pytest.mark.needs_cgroup2, id="v2"),
]


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    mounts.file("f")
    yield mounts
    mounts.close()


@pytest.fixture(params=VERSIONS)
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    path = Path(request.param, f"spfs-test-{os.getpid()}-surgery")
    path.mkdir()
    yield path
    wait_until(lambda: not (path / "cgroup.procs").read_text(), 5)
    path.rmdir()


def state(cgroup: Path) -> str:
    file = cgroup / "freezer.state"
    return file.read_text() if file.exists() else (cgroup / "cgroup.freeze").read_text()


def enter(cgroup: Path, victim: Victim) -> None:
    (cgroup / "cgroup.procs").write_text(str(victim.pid))


def hold(mounts: Mounts, victim: Victim) -> None:
    victim.run(f"import os, signal; os.chdir({str(mounts.old)!r}); fd = os.open('f', os.O_RDONLY)")


def test_frozen_and_outside(mounts: Mounts, cgroup: Path) -> None:
    """Users in the cgroup and outside of it, and a member that holds nothing until it stands still."""
    inside, outside, late = Victim(), Victim(), Victim()
    try:
        for victim in (inside, late):
            enter(cgroup, victim)
        hold(mounts, inside)
        hold(mounts, outside)
        before = state(cgroup)
        _, report = mounts.prepared_switch(open_freezer(str(cgroup)), between=lambda: hold(mounts, late))
        assert report.moved == {"file": 3, "cwd": 3} and report.left == [] and report.rounds == 1
        assert state(cgroup) == before and mounts.users() == []
        for victim in (inside, outside, late):
            assert victim.run("os.read(fd, 3)") == b"new" and tasks_stopped(victim.pid) == []
    finally:
        for victim in (inside, outside, late):
            victim.close()


def test_stopped_in_the_cgroup(mounts: Mounts, cgroup: Path) -> None:
    """In group-stop inside a frozen cgroup a task reports nothing before it is thawed."""
    victim = Victim()
    try:
        enter(cgroup, victim)
        hold(mounts, victim)
        os.kill(victim.pid, signal.SIGSTOP)
        os.waitpid(victim.pid, os.WUNTRACED)
        report = mounts.switch(freezer=open_freezer(str(cgroup)))
        assert report.moved == {"file": 1, "cwd": 1}
        wait_until(lambda: process_state(victim.pid) == "T", 2)
        os.kill(victim.pid, signal.SIGCONT)
        assert victim.run("os.read(fd, 3)") == b"new"
    finally:
        victim.close()


def test_signal_in_the_cgroup(mounts: Mounts, cgroup: Path) -> None:
    victim = Victim()
    try:
        enter(cgroup, victim)
        hold(mounts, victim)
        victim.run("got = []; signal.signal(signal.SIGUSR1, lambda *a: got.append(a[0])); None")
        victim.start("signal.pause(); got")
        victim.blocked()
        kill = lambda: os.kill(victim.pid, signal.SIGUSR1)  # noqa: E731
        assert mounts.switch(freezer=open_freezer(str(cgroup)), when_stopped=kill).left == []
        assert victim.result() == [signal.SIGUSR1]
    finally:
        victim.close()


def test_failure_thaws(mounts: Mounts, cgroup: Path) -> None:
    victim = Victim()
    try:
        enter(cgroup, victim)
        hold(mounts, victim)
        before = state(cgroup)

        def fail() -> None:
            raise RuntimeError("no mount today")

        with pytest.raises(RuntimeError, match="no mount today"):
            mounts.switch(freezer=open_freezer(str(cgroup)), when_stopped=fail)
        assert state(cgroup) == before and victim.run("os.read(fd, 3)") == b"old"
    finally:
        victim.close()


class NodeResolver:
    """Paths from the file system itself."""

    def __init__(self, client: FilesystemClient) -> None:
        self._client = client

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        return self._client.nodes(list(nodes))

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        return {}


@pytest.mark.needs_fuse
def test_from_fuse(tmp_path: Path) -> None:
    """Prepared while the file system holds every request; moved when it is a proxy; the file system ends."""
    mountpoint, real, control = tmp_path / "mnt", tmp_path / "real", str(tmp_path / "control")
    mountpoint.mkdir()
    (real / "dir").mkdir(parents=True)
    os.mkfifo(real / "dir" / "fifo")
    (real / "dir" / "f").write_bytes(b"real contents".ljust(8192, b"."))
    ready, theirs = os.pipe()
    command = [sys.executable, "-m", "stubfs", str(mountpoint), "--mode", "restore", "--socket-path", control, "-f"]
    with subprocess.Popen([*command, "--ready-fd", str(theirs)], pass_fds=[theirs]) as process:
        os.close(theirs)
        try:
            assert os.read(ready, 1) == b"\n"
            os.close(ready)
            _use(mountpoint, real, control, process.pid)
        finally:
            subprocess.run(["umount", "-l", str(mountpoint)], check=True)
            process.wait(10)


def _use(mountpoint: Path, real: Path, control: str, pid: int) -> None:
    (mountpoint / "dir").mkdir()
    os.mkfifo(mountpoint / "dir" / "fifo")
    (mountpoint / "dir" / "f").write_bytes(bytes(8192))
    victim = Victim()
    root = os.open(real, os.O_PATH)
    try:
        victim.run(
            f"""
import mmap, os
os.chdir({str(mountpoint / 'dir')!r})
fd = os.open('f', os.O_RDWR); os.lseek(fd, 5, 0); d = os.open('.', os.O_RDONLY)
shared = mmap.mmap(fd, 8192)
private = mmap.mmap(fd, 8192, flags=mmap.MAP_PRIVATE)
private[4096:4099] = b'own'
fifo = os.open('fifo', os.O_RDWR); os.write(fifo, b'queued')
"""
        )
        device = os.stat(mountpoint).st_dev
        with FilesystemClient(control, 10) as client:
            client.mode("stub")
            resolver, freezer = NodeResolver(client), open_freezer(None)
            with Switch(device, resolver, lambda mount: MountRoot(root), freezer, exclude={pid}) as switch:
                preparation = switch.prepare()
                assert preparation.left == [] and list(preparation.processes) == [victim.pid]
                client.mode("proxy", root)
                report = switch.execute(lambda: None)
            assert report.left == []
            assert report.moved == {
                "file": 3,
                "directory": 1,
                "fifo": 1,
                "cwd": 1,
                "shared mapping": 1,
                "private mapping": 1,
            }
            wait_until(lambda: not client.handles(), 5, "the last handle to be released")
        assert victim.run("os.read(fd, 8), os.read(fifo, 9), os.listdir(d)[0] in ('f', 'fifo')") == (
            b"contents",
            b"queued",
            True,
        )
        assert victim.run("shared[0:4], private[0:4], private[4096:4100]") == (b"real", b"real", b"own\0")
        victim.run("shared[0:4] = b'REAL'")
        assert (real / "dir" / "f").read_bytes()[:13] == b"REAL contents"
    finally:
        os.close(root)
        victim.close()
