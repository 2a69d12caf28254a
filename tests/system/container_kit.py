"""What containers of the tests run, and CRIU's configuration for them: the action script, told what is delayed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from criu_kit import TIMEOUT, World, spfs_criu
from surgery_kit import compile_c

from spfs.linux.mountapi import MS
from spfs.testing import wait_until

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


class Workload:
    """A root file system with the program in it, in which ``out`` is to be mounted on /out, the volume on /data."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.base = world.base / "container"
        self.out, self.rootfs = self.base / "out", self.base / "rootfs"
        for path in (self.out, *(self.rootfs / name for name in ("data", "out", "proc"))):
            path.mkdir(parents=True)
        os.rename(compile_c(self.base, PROGRAM, "-static"), self.rootfs / "program")
        mount = {"key": "data", "type": "none", "source": str(world.export), "flags": int(MS.BIND)}
        delayed = self.base / "criu.json"
        delayed.write_text(json.dumps({"version": 1, "mounts": [{**mount, "places": [{"mountpoint": "/data"}]}]}))
        script = self._script("action", spfs_criu("action", "--script"))
        # What starts CRIU may give it another environment than it has itself.
        told = self._script("told", f"#!/bin/sh\nexport SPFS_CRIU_CONFIG={delayed}\nexec {script}\n")
        self.conf = self.base / "criu.conf"
        options = f"action-script {told}\nlink-remap\nfile-locks\nfile-validation filesize\nlog-file criu.log\n"
        self.conf.write_text(options)

    def _script(self, name: str, text: str) -> Path:
        path = self.base / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    @property
    def report(self) -> str:
        path = self.out / "report"
        return path.read_text() if path.exists() else "not yet"

    def reads_on(self, pid: int) -> None:
        """Restored as process ``pid``: it waits for its file, and gets on when the server comes."""
        world = self._world
        os.kill(pid, signal.SIGUSR1)
        world.somebody_waits()
        assert self.report == ""
        world.server_comes()
        wait_until(lambda: self.report == "456", TIMEOUT, "the program to read on")
        report = world.wait()["data"]
        assert report["left"] == [] and report["mounts_left"] == [], report
        world.replaced()
        inside = Path(f"/proc/{pid}/mountinfo").read_text()
        assert "stubfs" not in inside and " /data " in inside
