"""What the manager and spfs say in what seldom goes wrong: each is provoked for real where that can be had."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from manager_kit import ENVIRONMENT, TIMEOUT, Manager, alive
from surgery_kit import Mounts, Tree, Victim, tasks_stopped

from spfs import filesystem, fsprocess, mountclones, mountswitch, realmount
from spfs.errors import MissingFeatureError, SpfsError
from spfs.freezer import NoFreezer, open_freezer
from spfs.instances import Instance
from spfs.linux import machine, mountapi, mountinfo
from spfs.managerstart import ManagerStart
from spfs.references import MountRoot
from spfs.requests import Mount
from spfs.surgery.theatre import in_own_thread
from spfs.switch import Switch
from spfs.target import Target
from spfs.testing import wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


def directory(path: Path) -> str:
    path.mkdir(parents=True)
    return str(path)


@contextmanager
def asked(ask: Callable[[], Any]) -> Iterator[List[SpfsError]]:
    """``ask`` in a thread, which has ended at the end; its errors."""
    errors: List[SpfsError] = []

    def call() -> None:
        try:
            ask()
        except SpfsError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield errors
    finally:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


class TestTheManager:
    @pytest.fixture
    def hung(self, manager: Manager, tmp_path: Path) -> str:
        """A directory whose server does not answer: on a stand-in."""
        manager.client().mount("server", directory(tmp_path / "server"))
        (tmp_path / "server" / "export").mkdir()
        manager.client().mode("stub", "server")
        return str(tmp_path / "server" / "export")

    def wait_asked(self, manager: Manager) -> None:
        wait_until(lambda: manager.client().held("server"), TIMEOUT)

    def test_a_mount_is_gone_before_its_mode_can_be_changed(self, manager: Manager, tmp_path: Path, hung: str) -> None:
        client = manager.client()
        client.mount("a", directory(tmp_path / "mnt"))
        with asked(lambda: manager.client().mode("proxy", "a", proxy_dir=hung)) as errors:
            self.wait_asked(manager)
            client.unmount("a")
            client.mode("restore", "server")  # its server answers again
        (error,) = errors
        assert str(error) == "cannot change the mode of mount 'a': it is gone (see status)"
        assert error.errno == errno.ENOENT

    def test_a_manager_that_is_ending_begins_nothing(self, manager: Manager, tmp_path: Path, hung: str) -> None:
        client, other, pid = manager.client(), manager.client(), manager.pid
        client.mount("a", directory(tmp_path / "mnt"))
        with asked(lambda: client.mode("proxy", "a", proxy_dir=hung)):
            self.wait_asked(manager)
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not manager.socket.exists(), TIMEOUT)  # it has begun to end
            with pytest.raises(SpfsError, match="cannot do the mode change: the manager is shutting down .ask"):
                other.mode("proxy", "a", proxy_dir=str(tmp_path))
        wait_until(lambda: not alive(pid), TIMEOUT)
        manager.start()

    def test_no_process_is_left_for_a_job(self, manager: Manager, tmp_path: Path) -> None:
        group = Path("/sys/fs/cgroup/pids", f"spfs-test-{os.getpid()}-messages")
        if not group.parent.is_dir():
            pytest.skip("no pids cgroup of version 1")
        group.mkdir()
        try:
            (group / "cgroup.procs").write_text(str(manager.pid))
            (group / "pids.max").write_text("1")
            with pytest.raises(SpfsError, match="cannot do the mount: no new process: Resource temporarily unavail"):
                manager.client().mount("a", directory(tmp_path / "mnt"))
            assert manager.client().status()["mounts"] == []
            (group / "pids.max").write_text("max")
            manager.client().mount("a", str(tmp_path / "mnt"))
            manager.client().shutdown(unmount=True)
            manager.wait_ended()
        finally:
            wait_until(lambda: not (group / "cgroup.procs").read_text())
            group.rmdir()

    def test_nobody_is_left_in_the_namespace_of_a_mount(self, manager: Manager, tmp_path: Path) -> None:
        with subprocess.Popen(["unshare", "--mount", "cat"], stdin=subprocess.PIPE) as process:
            own = os.stat("/proc/self/ns/mnt").st_ino
            wait_until(lambda: os.stat(f"/proc/{process.pid}/ns/mnt").st_ino != own)
            manager.client().mount("a", directory(tmp_path / "mnt"), "stub", ns_pid=process.pid)
            kept = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)  # so that the mount stays
            try:
                manager.kill()
                process.kill()
                process.wait()
                manager.start()
                client = manager.client()
                client.replace("a", "none", "tmpfs", begin="release")
                with pytest.raises(SpfsError) as caught:
                    client.wait("a")
                assert str(caught.value) == (
                    f"cannot replace mount 'a' on {tmp_path}/mnt: every process of its mount namespace has ended"
                    " (there is nothing left to move; unmount it)"
                )
                client.unmount("a", force=True)
            finally:
                os.close(kept)

    def test_a_stand_in_below_another_mount(self, manager: Manager, tmp_path: Path) -> None:
        client, mnt = manager.client(), directory(tmp_path / "mnt")
        client.mount("a", mnt)
        subprocess.run(["mount", "-t", "tmpfs", "covers", mnt], check=True)
        try:
            with pytest.raises(SpfsError, match=f"cannot unmount: {mnt}: still there .locked .* or hidden below"):
                client.unmount("a")
        finally:
            subprocess.run(["umount", mnt], check=True)
        client.unmount("a")

    def test_a_file_system_that_is_not_ready_in_time(
        self, tmp_path: Path, hung: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It waits for the directory that it is to serve; whatever was begun is undone."""
        monkeypatch.setattr(fsprocess, "START_TIMEOUT", 0.5)
        request = Mount("a", "proxy", directory(tmp_path / "mnt"), proxy_dir=hung)
        settings = filesystem.Settings(control=str(tmp_path / "sock"), log=str(tmp_path / "log"))
        with pytest.raises(SpfsError, match=f"cannot start the file system: a: not ready .*see {tmp_path}/log"):
            filesystem.mount(Context(), request, settings)  # type: ignore[arg-type]
        assert not os.path.ismount(request.mountpoint)

    def test_a_manager_that_cannot_be_started(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(work_dir: str) -> str:
            with pytest.raises(SpfsError) as caught:
                ManagerStart(work_dir, str(tmp_path / "sock")).wait()
            return str(caught.value)

        bad = "cannot use the work directory /proc/none: No such file or directory (choose another: --work-dir)"
        assert start("/proc/none") == bad
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        assert start("/run/x") == "cannot start the manager in /run/x: out of memory"
        python.write_text("#!/bin/sh\nexec sleep 1000\n")
        monkeypatch.setattr("spfs.managerstart.TIMEOUT", 0.2)
        assert start("/run/x") == "cannot start the manager in /run/x: not ready after 0 s, or killed"
        monkeypatch.setattr(sys, "executable", "/none/python")
        assert start("/run/x") == "cannot start the manager in /run/x: No such file or directory"


class Context:
    """Of a job: nobody is told how far it is."""

    def progress(self, stage: str, details: object) -> None:
        pass


class TestASwitch:
    @pytest.fixture
    def mounts(self, tmp_path: Path) -> Iterator[Mounts]:
        made = Mounts(tmp_path)
        made.file("file", b"old", b"new")
        yield made
        made.close()

    @pytest.fixture
    def victim(self, mounts: Mounts) -> Iterator[Victim]:
        made = Victim()
        made.run(f"import os; fds = [os.open({str(mounts.old / 'file')!r}, os.O_RDONLY) for _ in range(100)]")
        yield made
        made.close()

    def command(self, victim: Victim, source: object, target: object, *prefix: str) -> "Tuple[int, str]":
        words = [*prefix, sys.executable, "-m", "spfs.cli.spfs", "switch", "--pid", str(victim.pid)]
        done = subprocess.run(
            [*words, "--source", str(source), "--target", str(target)], capture_output=True, text=True, timeout=TIMEOUT,
            env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
        return done.returncode, done.stderr

    def test_too_few_descriptors_to_look_at_a_process(self, mounts: Mounts, victim: Victim) -> None:
        status, said = self.command(victim, mounts.old, mounts.new, "prlimit", "--nofile=40:40", "--")
        assert status == 1 and f"cannot examine process {victim.pid}: Too many open files (raise RLIMIT_NOFILE" in said
        assert victim.run("os.pread(fds[99], 9, 0)") == b"old"

    def test_a_directory_that_is_mounted_nowhere(self, mounts: Mounts, victim: Victim) -> None:
        detached = mountapi.open_tree(mountapi.AT_FDCWD, str(mounts.old), mountapi.OPEN_TREE_CLONE)
        source = f"/proc/{os.getpid()}/fd/{detached}/."
        status, said = self.command(victim, source, mounts.new)
        os.close(detached)
        assert status == 1 and f"cannot switch from {source} in " in said
        assert "no mount there has its device number (subvolumes of btrfs, and an overlay of layers on several" in said

    def test_given_up_when_all_stand_still(self, mounts: Mounts, victim: Victim) -> None:
        """An order to end that comes during the blackout is obeyed as long as nothing is moved."""
        told, switched = threading.Event(), threading.Event()
        told.set()
        new = os.open(mounts.new, os.O_PATH)
        tree = Tree(mounts.old)
        with Switch(mounts.device, tree, lambda mount: MountRoot(new), NoFreezer(), chosen={victim.pid}) as step:
            assert step.prepare().references
            with pytest.raises(SpfsError, match="cannot move the processes: told to give up"):
                in_own_thread(lambda _: step._round(switched.set, told))
        os.close(new)
        assert not switched.is_set() and not tasks_stopped(victim.pid)
        assert victim.run("os.pread(fds[0], 9, 0)") == b"old"


class TestTheMachine:
    def test_a_processor_for_which_there_is_no_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "current", lambda: None)
        with pytest.raises(MissingFeatureError, match="cannot operate on processes: no code for .* .x86-64 and "):
            Switch(0, None, None, None)  # type: ignore[arg-type]

    def test_no_program_that_starts_file_systems_of_fuse(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(realmount, "_HELPER_PLACES", ())
        with Target.pin(None) as target:
            with pytest.raises(SpfsError, match="cannot mount u@h:/: type fuse.sshfs: there is no /sbin/mount.fuse to"):
                realmount.make("u@h:/", "fuse.sshfs", 0, "", target)

    @pytest.mark.parametrize(
        "top, frozen, state",
        [
            pytest.param("/sys/fs/cgroup/freezer", "FROZEN", "freezer.state", marks=pytest.mark.needs_cgroup1),
            pytest.param("/sys/fs/cgroup/unified", "1", "cgroup.freeze", marks=pytest.mark.needs_cgroup2),
        ],
    )
    def test_a_cgroup_below_a_frozen_one(
        self, top: str, frozen: str, state: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        above = Path(top, f"spfs-test-{os.getpid()}-messages")
        below = above / "below"
        below.mkdir(parents=True)
        said = below / ("freezer.state" if frozen == "FROZEN" else "cgroup.events")
        monkeypatch.setattr("spfs.freezer.TIMEOUT", 0.2)
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
            try:
                (below / "cgroup.procs").write_text(str(process.pid))
                with open_freezer(str(below)) as freezer:
                    (above / state).write_text(frozen)
                    wait_until(lambda: "FROZEN" in said.read_text() or "frozen 1" in said.read_text())
                    with pytest.raises(SpfsError, match="cannot thaw cgroup: .*: still frozen .*is a cgroup above"):
                        freezer.thaw()
            finally:
                (above / state).write_text("THAWED" if frozen == "FROZEN" else "0")
                process.kill()
                process.wait()
                below.rmdir()
                above.rmdir()

    def test_a_real_mount_that_cannot_be_cloned(self) -> None:
        """For an fd that is none, here; a kernel that has let us mount it lets us clone it."""
        with open("/proc/self/mountinfo", "rb") as table:
            nowhere = Instance(mountinfo.parse(table.read())[0], 0, None, None, ())
        with pytest.raises(SpfsError, match="^cannot prepare the real mount: Bad file descriptor$"):
            mountclones.make_clones([nowhere], -1, 5.0)

    def test_mounts_that_cannot_be_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(mountswitch.PreparedSwitch, "prepare", full)
        with pytest.raises(SpfsError, match="^cannot prepare the switch of the mounts: Too many open files$"):
            mountswitch.prepare_switch([], -1)
