"""A container of runc with a delayed volume, by runc's own commands and CRIU's configuration file alone."""

from __future__ import annotations

import json
import subprocess
import uuid
from pathlib import Path
from typing import Any, Dict, List

import pytest
from container_kit import Workload
from criu_kit import TIMEOUT, World, spfs_criu, world

from spfs.criu.cgroups import freezer_of
from spfs.testing import wait_until

__all__ = ["world"]

pytestmark = [
    pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_criu,
    pytest.mark.needs_runc,
]  # fmt: skip


class Container:
    def __init__(self, world: World) -> None:
        self.id = f"spfs-test-{uuid.uuid4().hex[:8]}"
        self.workload = Workload(world)
        self._base = self.workload.base
        (self._base / "config.json").write_text(json.dumps(self._bundle(world.mnt)))
        self._images = ["--image-path", str(world.images), "--work-path", str(world.images)]

    def _bundle(self, volume: Path) -> Dict[str, Any]:
        binds = [("/data", volume), ("/out", self.workload.out)]
        mounts: List[Dict[str, Any]] = [{"destination": "/proc", "type": "proc", "source": "proc"}]
        mounts += [
            {"destination": path, "type": "bind", "source": str(source), "options": ["rbind"]} for path, source in binds
        ]
        return {
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["/program"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": {"org.criu.config": str(self.workload.conf)},
            "mounts": mounts,
            "linux": {"namespaces": [{"type": name} for name in ("pid", "mount", "ipc", "uts")]},
        }

    def runc(self, command: str, *arguments: str, check: bool = True) -> str:
        # To a file: the container would keep a pipe open.
        with open(self._base / "runc.log", "w+") as log:
            done = subprocess.run(
                ["runc", "--root", str(self._base / "state"), command, *arguments, self.id],
                cwd=self._base, timeout=TIMEOUT, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
            log.seek(0)
            text = log.read()
        assert not check or done.returncode == 0, text
        return text

    def checkpoint(self) -> None:
        self.runc("checkpoint", *self._images, "--file-locks")

    def restore(self) -> None:
        self.runc("restore", "--detach", *self._images)

    @property
    def pid(self) -> int:
        return int(json.loads(self.runc("state"))["pid"])


def test_a_container_with_a_delayed_volume(world: World) -> None:
    (world.export / "file").write_bytes(b"0123456789")
    world.bind()
    container = Container(world)
    world.stack.callback(container.runc, "delete", "--force", check=False)
    container.runc("run", "--detach")
    wait_until(lambda: container.workload.report == "", TIMEOUT, "the program to start")
    container.checkpoint()
    assert f"{world.mnt}" in spfs_criu("files", str(world.images), "--json")  # where the volume is for runc
    world.unbind()
    world.server_goes()

    container.restore()
    assert world.types() == ["fuse.stubfs"]
    # Its own cgroup, in which nobody else is, is what the replace freezes.
    (row,) = world.rows()
    assert row["replace"]["freeze_cgroup"] == freezer_of(container.pid, ())
    assert container.id in row["replace"]["freeze_cgroup"]
    # The manager is not one of the container's processes, where runc has put CRIU.
    manager = world.client().status()["manager"]["pid"]
    assert container.id not in Path(f"/proc/{manager}/cgroup").read_text()
    container.workload.reads_on(container.pid)
