"""The service, under a systemd that this machine boots for it in namespaces: as docs/howto/install.md installs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List

import psutil
import pytest

from spfs.linux import mountinfo
from spfs.testing import wait_until

TOP = Path(__file__).parents[2]
BOOT = Path(__file__).with_name("boot-systemd")
STOP_LIMIT = 45  # seconds: half of what systemd would wait for a mount unit that cannot be stopped

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_cgroup2]


class Machine:
    def __init__(self, process: "subprocess.Popen[bytes]", console: Path) -> None:
        self.process = process
        self.console = console

    def init(self) -> int:
        """The pid, outside, of the first process inside; 0 before it is systemd."""
        assert self.process.poll() is None, self.console.read_text()
        children = psutil.Process(self.process.pid).children()
        return children[0].pid if children and children[0].name() == "systemd" else 0

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(
            ["nsenter", "--target", str(self.init()), "--all", *command], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.rstrip("\n")

    def spfs(self, *command: str) -> Any:
        return json.loads(self.run("/usr/local/bin/spfs", *command, "--json"))

    def property(self, name: str, unit: str = "spfs-manager") -> str:
        return self.run("systemctl", "show", "--value", "--property", name, unit)

    def held(self) -> List[str]:
        return [row["command"] for row in self.spfs("held")]

    def mounted(self) -> List[str]:
        """File system types on /srv/data, as the first process of the machine sees them."""
        with open(f"/proc/{self.init()}/mountinfo", "rb") as table:
            return [mount.fstype for mount in mountinfo.parse(table.read()) if mount.mountpoint == "/srv/data"]

    def file_systems(self) -> List[int]:
        """Their pids, outside."""
        every = psutil.Process(self.init()).children(recursive=True)
        return [process.pid for process in every if "stubfs" in _called(process)]


def _called(process: psutil.Process) -> List[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if not os.path.exists("/lib/systemd/systemd"):
        pytest.skip("no systemd: install the Debian package systemd")
    if "overlay" not in Path("/proc/filesystems").read_text().split():
        pytest.skip("no overlayfs: modprobe overlay")
    with booted(tmp_path) as made:
        made.run("mkdir", "-p", "/srv/data", "/srv/server")
        for program in ("spfs", "spfs-manager"):
            made.run("ln", "-s", f"{sys.prefix}/bin/{program}", "/usr/local/bin/")
        yield made


@contextmanager
def booted(tmp_path: Path) -> Iterator[Machine]:
    with open("/proc/self/mountinfo", "rb") as table:
        top = next(mount.mountpoint for mount in mountinfo.parse(table.read()) if mount.fstype == "cgroup2")
    cgroup = Path(top, f"spfs-test-{os.getpid()}-systemd")
    cgroup.mkdir()
    (tmp_path / "machine").mkdir()
    console = tmp_path / "console"
    try:
        with open(console, "wb") as output:
            process = subprocess.Popen(
                [BOOT, tmp_path / "machine", cgroup, TOP, sys.prefix], stdout=output, stderr=output
            )
        try:
            made = Machine(process, console)
            # Before the first of systemd's sockets is there, systemctl has nobody to ask.
            wait_until(lambda: made.init() and os.path.exists(f"/proc/{made.init()}/root/run/systemd/private"), 30)
            assert made.run("systemctl", "is-system-running", "--wait") in ("running", "degraded")
            yield made
        finally:
            process.kill()  # and with it, by the kernel, all that is inside
            process.wait()
    finally:
        wait_until(lambda: not _populated(cgroup))
        for directory, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(directory)


def _populated(cgroup: Path) -> bool:
    return "populated 1" in (cgroup / "cgroup.events").read_text()


def install(machine: Machine) -> None:
    """By the commands of the page."""
    page = (TOP / "docs" / "howto" / "install.md").read_text()
    service = page.partition("## The service")[2]
    commands = re.findall(r"^# (.*)$", service.partition("```console\n")[2].partition("```")[0], re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        machine.run("sh", "-c", f"cd {TOP} && PATH=/usr/local/bin:$PATH && {command}")


def stand_in_with_a_reader(machine: Machine) -> int:
    """A stand-in in stub mode, and a service that waits on it; the pid of the file system."""
    machine.spfs("mount", "data", "/srv/data", "--mode", "stub")
    machine.run("systemd-run", "--unit=reader", "--property=StandardOutput=file:/srv/answer", "cat", "/srv/data/file")
    wait_until(lambda: machine.held())
    (pid,) = machine.file_systems()
    return pid


def test_the_service_is_installed_and_started_as_the_page_says(machine: Machine) -> None:
    install(machine)
    # enable --now has returned when the manager had told that it is ready: it answers at once.
    assert machine.spfs("status")["manager"]["work_dir"] == "/run/spfs-manager-system"
    assert machine.property("ActiveState") == "active" and machine.property("UnitFileState") == "enabled"
    modes = machine.run("stat", "--format=%n %a %U", "/run/spfs-manager", "/var/log/spfs", "/run/spfs-manager-system")
    assert modes.splitlines() == [
        "/run/spfs-manager 755 root",
        "/var/log/spfs 700 root",
        "/run/spfs-manager-system 700 root",
    ]
    machine.run("touch", "/var/log/spfs/record")
    machine.run("systemd-tmpfiles", "--clean", "spfs.conf")
    assert machine.run("ls", "/var/log/spfs") == "record"  # there is no way to make one that is old: ctime counts, too


def test_mounts_and_who_waits_outlive_the_stop_and_the_death_of_the_service(machine: Machine) -> None:
    install(machine)
    file_system = stand_in_with_a_reader(machine)
    assert machine.mounted() == ["fuse.stubfs"]

    machine.run("systemctl", "restart", "spfs-manager")
    assert machine.held() == ["cat"] and machine.file_systems() == [file_system]

    machine.run("systemctl", "stop", "spfs-manager")
    assert machine.property("ActiveState") == "inactive" and machine.property("Result") == "success"
    assert machine.mounted() == ["fuse.stubfs"] and machine.file_systems() == [file_system]
    assert machine.property("ActiveState", "reader") == "active"
    machine.run("systemctl", "start", "spfs-manager")
    assert machine.held() == ["cat"]

    first = machine.property("MainPID")
    machine.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "spfs-manager")
    wait_until(lambda: machine.property("MainPID") not in ("0", first), 30)  # Restart=on-failure
    wait_until(lambda: machine.property("ActiveState") == "active", 30)
    assert machine.held() == ["cat"] and machine.file_systems() == [file_system]

    # The last of these managers replaces; the service that waited goes on.
    machine.run("sh", "-c", "echo the real contents >/srv/server/file")
    bind = ["--source", "/srv/server", "--type", "none", "--flags", "4096"]
    assert machine.spfs("replace", "data", *bind, "--wait")["replace"]["phase"] == "done"
    wait_until(lambda: machine.property("ActiveState", "reader") == "inactive", 30)
    assert machine.run("cat", "/srv/answer") == "the real contents"
    wait_until(lambda: not machine.file_systems())
    assert "fuse.stubfs" not in machine.mounted()


def test_a_machine_with_a_hanging_mount_is_switched_off(machine: Machine) -> None:
    """Neither the mount's unit, whose umount would wait as everybody does, nor who waits on it holds the machine up."""
    install(machine)
    stand_in_with_a_reader(machine)
    machine.run("systemctl", "poweroff")
    machine.process.wait(STOP_LIMIT)
