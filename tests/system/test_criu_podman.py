"""A container of podman with a delayed volume: checkpointed, exported, imported and restored by its own commands."""

from __future__ import annotations

import os
import subprocess
import tarfile
import uuid
from pathlib import Path

import pytest
from container_kit import Workload
from criu_kit import TIMEOUT, World, world

from spfs.testing import wait_until

__all__ = ["world"]

pytestmark = [
    pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_criu,
    pytest.mark.needs_runc, pytest.mark.needs_podman,
]  # fmt: skip


class Podman:
    """With a storage, and cgroups, of its own."""

    def __init__(self, world: World) -> None:
        self.name = f"spfs-test-{uuid.uuid4().hex[:8]}"
        self.workload = Workload(world)
        self.archive = self.workload.base / "checkpoint.tar.gz"
        self._base = self.workload.base
        self._volumes = ["-v", f"{world.mnt}:/data", "-v", f"{self.workload.out}:/out"]
        world.stack.callback(self._end)
        image = self._base / "image.tar"
        with tarfile.open(image, "w") as tar:
            tar.add(self.workload.rootfs, ".")
        self("import", str(image), self.name)

    def __call__(self, *arguments: str, check: bool = True) -> str:
        places = {"root": "root", "runroot": "runroot", "tmpdir": "tmp"}
        options = [f"--{option}={self._base / name}" for option, name in places.items()]
        options += ["--runtime=runc", "--cgroup-manager=cgroupfs", "--storage-driver=vfs", "--events-backend=none"]
        # To a file: the container would keep a pipe open.
        with open(self._base / "podman.log", "w+") as log:
            done = subprocess.run(
                ["podman", *options, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=TIMEOUT,
                env={**os.environ, "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"},
            )  # fmt: skip
            log.seek(0)
            text = log.read()
        assert not check or done.returncode == 0, text
        return text

    def run(self) -> None:
        options = ["--network=none", f"--cgroup-parent=/{self.name}"]
        options += [f"--annotation=org.criu.config={self.workload.conf}"]
        self("run", "--detach", "--name", self.name, *options, *self._volumes, self.name, "/program")

    @property
    def pid(self) -> int:
        return int(self("inspect", "--format={{.State.Pid}}", self.name))

    def _end(self) -> None:
        self("rm", "--force", "--time=0", self.name, check=False)
        # podman leaves the parent that it was given, and its own monitor there, which ends a moment later.
        for top, _, _ in os.walk("/sys/fs/cgroup", topdown=False):
            if f"/{self.name}" in top:
                wait_until(lambda: not Path(top, "cgroup.procs").read_text(), TIMEOUT, "podman's monitor to end")
                os.rmdir(top)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if line.split()[4].startswith(str(self._base)):
                subprocess.run(["umount", "-l", line.split()[4]], check=False)


def test_a_container_with_a_delayed_volume(world: World) -> None:
    (world.export / "file").write_bytes(b"0123456789")
    world.bind()
    podman = Podman(world)
    podman.run()
    wait_until(lambda: podman.workload.report == "", TIMEOUT, "the program to start")
    podman("container", "checkpoint", "--file-locks", "--compress=gzip", f"--export={podman.archive}", podman.name)
    with tarfile.open(podman.archive) as tar:
        assert "checkpoint/spfs-criu.json" in tar.getnames()
    podman("rm", podman.name)  # it is restored as if on another host
    world.unbind()
    world.server_goes()

    podman("container", "restore", "--file-locks", f"--import={podman.archive}")
    assert world.types() == ["fuse.stubfs"]
    (row,) = world.rows()
    assert podman.name in row["replace"]["freeze_cgroup"]
    podman.workload.reads_on(podman.pid)
