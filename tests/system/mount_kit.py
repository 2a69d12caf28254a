"""Namespaces, FUSE mounts and propagation for the tests of mounts: real ones, taken away again."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator, List

import psutil
import pytest

from spfs import features, realmount
from spfs.linux import mountapi
from spfs.target import Target

Mount = List[str]

SWITCHED = "beneath" if features.probe("mount_beneath").available else "exchanged"
"""How a mount is switched on this kernel, where nothing forbids it."""


class Places:
    """What a test has set up; all of it ends with ``close``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._mounted: List[str] = []

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def base(self, propagation: str = "private") -> None:
        """A tmpfs of its own over the directory, of the given propagation: what is mounted below goes with it."""
        mount_fd = self.tmpfs()
        mountapi.move_mount(mount_fd, mountapi.AT_FDCWD, str(self.directory))
        self._mounted.append(str(self.directory))
        change = {"private": mountapi.MS.PRIVATE, "shared": mountapi.MS.SHARED}[propagation]
        mountapi.mount_setattr(mount_fd, propagation=change)

    def tmpfs(self, *directories: str, who: str = "") -> int:
        """A detached tmpfs with ``directories`` and, if given, a file "who" holding that; closed with this object."""
        mount_fd = realmount.make("real", "tmpfs", 0, "", Target.pin())
        self._stack.callback(os.close, mount_fd)
        for directory in directories:
            os.makedirs(f"/proc/self/fd/{mount_fd}/{directory}", exist_ok=True)
        if who:
            Path(f"/proc/self/fd/{mount_fd}/who").write_text(who)
        return mount_fd

    def namespace(self, *arguments: str) -> int:
        """The pid of a process that unshare(1) started with ``arguments``, when it has done so."""
        # With a pid namespace unshare forks, and the process within is its child.
        process = subprocess.Popen(
            ["unshare", *arguments, "sh", "-c", "echo ready; exec sleep 1000"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._stack.callback(self._end, process)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(children[0]) if children else process.pid

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def bindfs(self, source: str, mountpoint: str) -> int:
        """A FUSE mount of ``source``; its st_dev. ``who`` in it says FUSE."""
        for path in (source, mountpoint):
            os.makedirs(self.path(path), exist_ok=True)
        (self.directory / source / "who").write_text("FUSE")
        subprocess.run(["bindfs", self.path(source), self.path(mountpoint)], check=True)
        self._mounted.append(self.path(mountpoint))
        return os.stat(self.path(mountpoint)).st_dev

    def mount(self, *arguments: str) -> None:
        """mount(8); what is at the last argument is unmounted in the end."""
        os.makedirs(arguments[-1], exist_ok=True)
        subprocess.run(["mount", *arguments], check=True)
        self._mounted.append(arguments[-1])

    def close(self) -> None:
        self._stack.close()
        for path in reversed(self._mounted):
            while os.path.ismount(path):
                mountapi.umount2(path, mountapi.MNT_DETACH)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    made = Places(tmp_path)
    try:
        yield made
    finally:
        made.close()


def read_in(pid: int, path: str) -> str:
    """The contents of ``path`` as process ``pid`` sees it."""
    return Path(f"/proc/{pid}/root{path}").read_text()


def mounts_at(pid: object, path: str) -> List[Mount]:
    """mountinfo's lines of what is mounted at ``path`` or below, split into fields."""
    lines = [line.split(" ") for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    return [line for line in lines if (line[4] + "/").startswith(path + "/")]


def daemons(command: str) -> List[int]:
    """The processes whose command line begins so."""
    found = []
    for process in psutil.process_iter():
        try:
            if " ".join(process.cmdline()).startswith(command):
                found.append(process.pid)
        except psutil.Error:
            continue  # it has ended
    return found
