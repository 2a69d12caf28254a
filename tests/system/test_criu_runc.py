"""A container of runc with a delayed volume, by runc's own commands and CRIU's configuration file alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Any, Dict, List

import pytest
from criu_kit import TIMEOUT, World, spfs_criu, world
from surgery_kit import compile_c

from spfs.linux.mountapi import MS
from spfs.testing import wait_until

__all__ = ["world"]

pytestmark = [
    pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_criu,
    pytest.mark.needs_runc,
]  # fmt: skip

PROGRAM = r"""
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

int main(void)
{
    char buffer[16];
    sigset_t set;
    int sig, fd, out;
    ssize_t got;

    for (fd = 0; fd < 3; fd++)
        close(fd);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, 0);
    fd = open("/data/file", O_RDWR);
    lseek(fd, 4, SEEK_SET);
    out = open("/out/report", O_WRONLY | O_CREAT | O_APPEND, 0644);
    do {
        got = sigwait(&set, &sig) ? -1 : read(fd, buffer, 3);
    } while (got >= 0 && write(out, buffer, got) == got);
    return 1;
}
"""


class Container:
    def __init__(self, world: World) -> None:
        self.id = f"spfs-test-{uuid.uuid4().hex[:8]}"
        self._base = world.base / "container"
        self.out = self._base / "out"
        for path in (self.out, *(self._base / "rootfs" / name for name in ("data", "out", "proc"))):
            path.mkdir(parents=True)
        os.rename(compile_c(self._base, PROGRAM, "-static"), self._base / "rootfs/program")
        action, conf = self._base / "action", self._base / "criu.conf"
        action.write_text(spfs_criu("action", "--script"))
        action.chmod(0o755)
        options = f"action-script {action}\nlink-remap\nfile-locks\nfile-validation filesize\nlog-file criu.log\n"
        conf.write_text(options)
        (self._base / "config.json").write_text(json.dumps(self._bundle(world.mnt, conf)))
        mount: Dict[str, Any] = {"key": "data", "type": "none", "source": str(world.export), "flags": int(MS.BIND)}
        configuration = self._base / "criu.json"
        mount["places"] = [{"mountpoint": "/data"}]
        configuration.write_text(json.dumps({"version": 1, "mounts": [mount]}))
        self._environment = {**os.environ, "SPFS_CRIU_CONFIG": str(configuration)}
        self._images = ["--image-path", str(world.images), "--work-path", str(world.images)]

    def _bundle(self, volume: Path, conf: Path) -> Dict[str, Any]:
        binds = [("/data", volume), ("/out", self.out)]
        mounts: List[Dict[str, Any]] = [{"destination": "/proc", "type": "proc", "source": "proc"}]
        mounts += [
            {"destination": path, "type": "bind", "source": str(source), "options": ["rbind"]} for path, source in binds
        ]
        return {
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["/program"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": {"org.criu.config": str(conf)},
            "mounts": mounts,
            "linux": {"namespaces": [{"type": name} for name in ("pid", "mount", "ipc", "uts")]},
        }

    def runc(self, command: str, *arguments: str, check: bool = True) -> str:
        # To a file: the container would keep a pipe open.
        with open(self._base / "runc.log", "w+") as log:
            done = subprocess.run(
                ["runc", "--root", str(self._base / "state"), command, *arguments, self.id],
                cwd=self._base, env=self._environment, timeout=TIMEOUT,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
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
    def report(self) -> str:
        path = self.out / "report"
        return path.read_text() if path.exists() else "not yet"

    @property
    def pid(self) -> int:
        return int(json.loads(self.runc("state"))["pid"])


def test_a_container_with_a_delayed_volume(world: World) -> None:
    (world.export / "file").write_bytes(b"0123456789")
    world.bind()
    container = Container(world)
    world.stack.callback(container.runc, "delete", "--force", check=False)
    container.runc("run", "--detach")
    wait_until(lambda: container.report == "", TIMEOUT, "the program to start")
    container.checkpoint()
    assert f"{world.mnt}" in spfs_criu("files", str(world.images), "--json")  # where the volume is for runc
    world.unbind()
    world.server_goes()

    container.restore()
    assert world.types() == ["fuse.stubfs"]
    # The manager is not one of the container's processes, where runc has put CRIU.
    manager = world.client().status()["manager"]["pid"]
    assert container.id not in Path(f"/proc/{manager}/cgroup").read_text()
    os.kill(container.pid, signal.SIGUSR1)
    world.somebody_waits()
    assert container.report == ""
    world.server_comes()
    wait_until(lambda: container.report == "456", TIMEOUT, "the program to read on")
    report = world.wait()["data"]
    assert report["left"] == [] and report["mounts_left"] == [], report
    world.replaced()
    inside = Path(f"/proc/{container.pid}/mountinfo").read_text()
    assert "stubfs" not in inside and " /data " in inside
