"""Processes restored by CRIU onto delayed mounts: blocked until the real file system is there, and moved onto it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from criu_kit import TIMEOUT, World, spfs_criu, world
from surgery_kit import compile_c

from spfs.testing import process_state, wait_until

__all__ = ["world"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_criu]


def test_the_main_road(world: World) -> None:
    (world.export / "file").write_bytes(b"hello, world")
    world.bind()
    subject = world.subject()
    subject.run(f"import os; fd = os.open({str(world.mnt / 'file')!r}, os.O_RDWR); os.lseek(fd, 7, 0)")
    assert "data on" in world.dump(subject, "--delayed", world.delayed)
    world.unbind()
    world.server_goes()

    world.restore()
    assert world.types() == ["fuse.stubfs"]
    subject.start("os.read(fd, 100)")
    world.somebody_waits()
    assert not subject.answered

    world.server_comes()
    assert subject.result() == b"world"
    reports = world.wait()
    assert reports["data"]["moved"] == {"file": 1} and not reports["data"]["left"], reports
    world.replaced()
    assert subject.run("os.fstat(fd).st_dev") == os.stat(world.real).st_dev


STUB_SECONDS = float(os.environ.get("SPFS_TEST_STUB_SECONDS", "1"))


@pytest.mark.timeout(120 + STUB_SECONDS)
def test_a_server_that_comes_late(world: World) -> None:
    """However long it takes: $SPFS_TEST_STUB_SECONDS. One of those who wait is killed meanwhile."""
    for name in ("file", "other"):
        (world.export / name).write_bytes(b"hello, world")
    world.bind()
    subject = world.subject()
    subject.run(f"import os; top = {str(world.mnt)!r}; fd = os.open(top + '/file', os.O_RDWR)")
    # Its child asks for each of a thousand names, and the first answer comes when the server does.
    subject.run("pid = os.fork(); pid or [os.stat(f'{top}/other') and os.read(fd, 0) for _ in iter(int, 1)]")
    world.dump(subject, "--delayed", world.delayed)
    world.unbind()
    world.server_goes()
    world.restore()
    subject.start("(os.pread(fd, 5, 0), os.kill(pid, 9), os.waitpid(pid, 0)[1])")
    client = world.client()
    wait_until(lambda: len([one for one in client.held() if one["pid"]]) == 2, TIMEOUT, "both to wait")
    wait_until(lambda: min(one["age"] for one in client.held()) >= STUB_SECONDS, TIMEOUT + STUB_SECONDS)
    (row,) = client.status()["mounts"]
    assert row["replace"]["attempts"] > 1 and not subject.answered
    world.server_comes()
    assert subject.result() == (b"hello", None, signal.SIGKILL)
    assert world.wait()["data"]["left"] == []
    world.replaced()


PROGRAM = r"""
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static char dirty[100000] = "initial";

int main(int argc, char **argv)
{
    sigset_t set;
    int sig, fd;

    for (fd = 0; fd < 3; fd++)
        close(fd);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    strcpy(dirty + 50000, "changed");
    for (;;) {
        fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (write(fd, dirty, strlen(dirty)) < 0 || write(fd, dirty + 50000, strlen(dirty + 50000)) < 0)
            return 1;
        close(fd);
        sigwait(&set, &sig);
    }
}
"""


def test_a_program_that_runs_from_the_mount(world: World) -> None:
    """Its code is the file's: a page that it has not needed yet is one of the real file, never of the stand-in."""
    world.bind()
    compiled = Path(compile_c(world.base, PROGRAM, "-static"))
    (world.export / "program").write_bytes(compiled.read_bytes())
    (world.export / "program").chmod(0o755)
    out = world.base / "out"
    with subprocess.Popen([world.mnt / "program", out], start_new_session=True, cwd="/") as process:
        wait_until(lambda: out.exists() and out.read_text() == "initialchanged", TIMEOUT)
        spfs_criu("dump", "-t", str(process.pid), "-D", str(world.images), "--delayed", world.delayed)
    pid = process.pid
    assert f"program of {pid}" in spfs_criu("files", str(world.images))
    world.unbind()
    world.server_goes()
    world.restore()
    try:
        os.kill(pid, signal.SIGUSR1)
        world.server_comes()
        wait_until(lambda: out.read_text() == "initialchanged" * 2, TIMEOUT, "the program to go on")
        report = world.wait()["data"]
        assert report["left"] == [] and report["ended"], report
        assert os.stat(f"/proc/{pid}/exe").st_dev == os.stat(world.real).st_dev
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process_state(pid) in ("", "Z"), TIMEOUT)
