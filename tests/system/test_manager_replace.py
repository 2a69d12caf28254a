"""How the manager drives replaces, and what it makes of its own death and theirs.

The replace step itself is stood in for: here it hangs, fails or is killed exactly where a test wants it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from manager_kit import ENVIRONMENT, Manager, alive, end, manager_in, reading

from spfs.errors import SpfsError
from spfs.testing import wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

# The manager with a replace step that does what the source says.
SCRIPT = """
import errno, os, time
from spfs import mounts, replace as step
from spfs.errors import SpfsError

def replace(request, filesystem, progress, **how):
    what, _, where = request.source.partition(":")
    if what == "refuse":
        raise SpfsError("cannot mount refuse: no such device", "plug it in", errno.ENODEV)
    if what == "bug":
        raise ZeroDivisionError("one")
    attempt = 0
    while what == "never" or what == "file" and not os.path.exists(where):
        attempt += 1
        progress("mounting", {"attempt": attempt, "errno": errno.ECONNREFUSED, "error": "Connection refused"})
        time.sleep(0.02)
    progress("prepared", {})
    try:
        if what == "freeze" and where and os.path.exists(where):
            what = "ok"  # the second time
        if what == "freeze":
            if where:
                open(where, "x").close()
            for name, word in (("freezer.state", "FROZEN"), ("cgroup.freeze", "1")):
                if os.path.exists(os.path.join(request.freeze_cgroup, name)):
                    with open(os.path.join(request.freeze_cgroup, name), "w") as file:
                        file.write(word)
            progress("frozen", {})
        while what in ("hang", "freeze"):
            time.sleep(60)
        if what == "slow":
            time.sleep(float(where))
        progress("switched", {})
        network = None if how["network"] is None else how["network"].identity().get("net")
        asked = {"cgroup": request.freeze_cgroup, "network": network}
        return {"processes": 1, "moved": {"files": 3}, "left": [], "blackout": 0.004, **asked}
    finally:
        progress("cleaned", {})

def attach(mount_fd, target, path, attach=mounts.attach):
    if path.endswith("before"):
        time.sleep(60)
    attach(mount_fd, target, path)
    if path.endswith("after"):
        time.sleep(60)

step.replace = replace
mounts.attach = attach
from spfs.cli import manager
manager.main()
"""


class FakedManager(Manager):
    def start(self, *arguments: str, environment: Any = None) -> "FakedManager":
        command = [sys.executable, "-c", SCRIPT, "-d", "-vv", "--work-dir", str(self.work), *arguments]
        subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, timeout=20)
        self.pid = self.client().status()["manager"]["pid"]
        return self


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakedManager]:
    made = FakedManager(tmp_path)
    try:
        yield made.start()
    finally:
        made.clean_up()


def phase(manager: Manager, id: str = "a") -> str:
    return str(manager.row(id)["replace"]["phase"])


def stage(manager: Manager, id: str = "a") -> str:
    return str(manager.row(id)["replace"]["stage"])


def jobs_of(pid: int) -> List[int]:
    """Children of the manager that are jobs: forked, so with its own command line."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    own = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [child for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == own]


def test_a_replace_that_is_never_told_when_begins_with_the_stub_mode(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    assert client.replace("a", "ok", "tmpfs") == "waiting"
    assert phase(manager) == "waiting"
    assert client.mode("stub") == ["a"]
    report = client.wait("a", 10)["replace"]
    assert report["phase"] == "done" and report["report"]["moved"] == {"files": 3}
    assert [entry["stage"] for entry in report["stages"]] == ["begun", "prepared", "switched", "cleaned"]


def test_hold_and_release(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    assert client.replace("a", "ok", "tmpfs", begin="hold") == "held"
    client.mode("stub")
    with pytest.raises(SpfsError, match="not done in 0.05 s") as caught:
        client.wait("a", 0.05)
    assert caught.value.errno == errno.ETIMEDOUT and phase(manager) == "held"
    assert client.request_text("replace;all;mode=release").status == 0
    assert client.wait("a", 10)["replace"]["phase"] == "done"


def test_release_at_once(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    client.replace("a", "ok", "tmpfs", begin="release")
    assert client.wait("a", 10)["replace"]["phase"] == "done"


def test_wait_is_woken_for_every_client(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt))
    client.replace("a", "ok", "tmpfs", begin="hold")
    waiting = [manager.raw() for _ in range(20)]
    for sock in waiting:
        sock.send(b'{"command": "wait", "id": "a"}')
    waiting.pop().close()
    client.begin("release", "a")
    for sock in waiting:
        with sock:
            assert sock.recv(4) == b"\0\0\0\0"


def test_an_error_leaves_the_mount_as_it_is_and_may_be_asked_again(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", "refuse", "tmpfs")
    with pytest.raises(SpfsError, match=r"no such device \(plug it in\)") as caught:
        client.wait("a", 10)
    assert caught.value.errno == errno.ENODEV
    row = manager.row("a")
    assert (row["mode"], row["state"], row["replace"]["phase"]) == ("stub", "mounted", "failed")
    client.replace("a", "ok", "tmpfs")
    assert client.wait("a", 10)["replace"]["phase"] == "done"


def test_a_defect_in_the_step_is_an_error_like_any_other(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", "bug", "tmpfs")
    with pytest.raises(SpfsError, match="ZeroDivisionError.*the log has more"):
        client.wait("a", 10)
    assert "Traceback" in manager.log()


def test_attempts_are_shown_and_can_be_aborted(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", "never", "nfs4")
    row = wait_until(lambda: (wanted := manager.row("a")["replace"])["attempts"] > 3 and wanted)
    assert row["phase"] == "running" and row["last_attempts"][-1]["error"] == "Connection refused"
    assert client.abort("a") == ["a"]
    assert phase(manager) == "aborted" and jobs_of(manager.pid) == []
    with pytest.raises(SpfsError) as caught:
        client.wait("a")
    assert caught.value.errno == errno.ECANCELED
    assert manager.row("a")["mode"] == "stub"


def test_an_aborted_replace_cleans_up_first(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", "hang", "nfs4")
    wait_until(lambda: stage(manager) == "prepared")
    assert client.abort() == ["a"]
    assert manager.row("a")["replace"]["stages"][-1]["stage"] == "cleaned"


def test_one_that_hangs_delays_neither_the_other_nor_the_socket(manager: FakedManager, tmp_path: Path) -> None:
    client = manager.client(timeout=10)
    for name in "ab":
        (tmp_path / name).mkdir()
        client.mount(name, str(tmp_path / name), "stub")
    client.replace("a", "hang", "nfs4")
    wait_until(lambda: stage(manager) == "prepared")
    client.replace("b", "ok", "tmpfs")
    assert client.wait("b", 10)["replace"]["phase"] == "done"
    begun = time.monotonic()
    for _ in range(20):
        client.status()
    assert time.monotonic() - begun < 2
    for command, keys in (("mode", {"mode": "restore", "id": "a"}), ("unmount", {"id": "a"})):
        with pytest.raises(SpfsError, match="a replace is running") as caught:
            client.request(command, **keys)
        assert caught.value.errno == errno.EBUSY
    client.unmount("a", force=True)
    assert [row["id"] for row in client.status()["mounts"]] == ["b"]


def test_a_killed_job_is_reported_with_its_helpers_gone(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", "hang", "nfs4")
    wait_until(lambda: stage(manager) == "prepared")
    (job,) = jobs_of(manager.pid)
    os.kill(job, signal.SIGKILL)
    with pytest.raises(SpfsError, match="was killed"):
        client.wait("a", 10)
    assert phase(manager) == "failed" and manager.row("a")["state"] == "mounted"


@contextmanager
def cgroup(top: str) -> Iterator[Path]:
    path = Path(top) / f"spfs-test-{os.getpid()}-manager"
    path.mkdir()
    try:
        with subprocess.Popen(["sleep", "600"]) as member:
            (path / "cgroup.procs").write_text(str(member.pid))
            try:
                yield path
            finally:
                member.kill()  # a frozen one dies only when it is thawed
                for name, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
                    if (path / name).exists():
                        (path / name).write_text(word)
    finally:
        path.rmdir()


def frozen(path: Path) -> bool:
    if (path / "freezer.state").exists():
        return (path / "freezer.state").read_text().strip() != "THAWED"
    return (path / "cgroup.freeze").read_text().strip() != "0"


FREEZERS = [
    pytest.param("/sys/fs/cgroup/freezer", marks=pytest.mark.needs_cgroup1),
    pytest.param("/sys/fs/cgroup/unified", marks=pytest.mark.needs_cgroup2),
]


@pytest.mark.parametrize("top", FREEZERS)
@pytest.mark.parametrize("with_manager", [False, True])
def test_what_a_killed_replace_had_frozen_is_thawed(
    manager: FakedManager, mnt: Path, tmp_path: Path, top: str, with_manager: bool
) -> None:
    with cgroup(top) as group:
        client = manager.client()
        client.mount("a", str(mnt), "stub")
        client.replace("a", f"freeze:{tmp_path}/once", "tmpfs", freeze_cgroup=str(group))
        wait_until(lambda: stage(manager) == "frozen")
        assert frozen(group)
        (job,) = jobs_of(manager.pid)
        if with_manager:
            os.kill(manager.pid, signal.SIGSTOP)  # so that it is the next one that cleans up
            os.kill(job, signal.SIGKILL)
            manager.kill()
            assert frozen(group)
            manager.start()
            assert manager.client().wait("a", 10)["replace"]["phase"] == "done"
        else:
            os.kill(job, signal.SIGKILL)
            wait_until(lambda: phase(manager) == "failed")
        wait_until(lambda: not frozen(group))


def test_what_was_frozen_before_stays_so(manager: FakedManager, mnt: Path) -> None:
    with cgroup("/sys/fs/cgroup/freezer") as group:
        (group / "freezer.state").write_text("FROZEN")
        wait_until(lambda: (group / "freezer.state").read_text() == "FROZEN\n")
        client = manager.client()
        client.mount("a", str(mnt), "stub")
        client.replace("a", "freeze", "tmpfs", freeze_cgroup=str(group))
        wait_until(lambda: stage(manager) == "frozen")
        os.kill(jobs_of(manager.pid)[0], signal.SIGKILL)
        wait_until(lambda: phase(manager) == "failed")
        client.unmount("a")
        assert frozen(group)


@pytest.mark.needs_cgroup1
def test_a_cgroup_that_is_gone_had_nobody_left_in_it(manager: FakedManager, mnt: Path) -> None:
    """As of a container that has ended before its server came. One that never was is for the replace to refuse."""
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    with cgroup("/sys/fs/cgroup/freezer") as group:
        client.replace("a", "ok", "tmpfs", freeze_cgroup=str(group), begin="hold")
    client.begin("release")
    assert client.wait("a", 10)["replace"]["report"]["cgroup"] is None
    client.replace("a", "ok", "tmpfs", freeze_cgroup=str(group), begin="release")
    assert client.wait("a", 10)["replace"]["report"]["cgroup"] == str(group)


def test_the_network_is_that_of_the_process_named_also_after_a_restart(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            network = os.stat(f"/proc/{process.pid}/ns/net").st_ino
            client.replace("a", "ok", "tmpfs", net_pid=process.pid, begin="hold")
            manager.kill()
            client = manager.start().client()
            client.begin("release")
            assert client.wait("a", 10)["replace"]["report"]["network"] == network
            client.replace("a", "other", "tmpfs", net_pid=process.pid, begin="hold")
        finally:
            process.kill()
            process.wait()
    with pytest.raises(SpfsError, match="no process is left in them"):
        client.begin("release")
        client.wait("a", 10)
    with pytest.raises(SpfsError, match="no such process"):
        client.replace("a", "ok", "tmpfs", net_pid=process.pid)


# The manager's death


def mode_of(manager: Manager, id: str = "a") -> str:
    return str(manager.row(id)["mode"])


def test_mounts_outlive_a_killed_manager_and_are_taken_over(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    pid = client.mount("a", str(mnt))["pid"]
    client.replace("a", "ok", "tmpfs", begin="hold", options="size=1m")
    client.mode("stub")
    with reading(mnt / "file") as reader:
        wait_until(lambda: client.held())
        manager.kill()
        assert alive(pid) and alive(reader.pid)
        manager.start()
        wait_until(lambda: manager.row("a")["answering"])
        client = manager.client()
        row = manager.row("a")
        assert (row["pid"], row["state"], row["replace"]["phase"]) == (pid, "mounted", "held")
        wait_until(lambda: mode_of(manager) == "stub")
        assert [entry["pid"] for entry in client.held()] == [reader.pid]
        client.begin("release")
        assert client.wait("a", 10)["replace"]["phase"] == "done"
        client.unmount("a", force=True)
        assert reader.wait(10) == 1


def test_a_pending_replace_goes_on_after_a_restart(manager: FakedManager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    server = tmp_path / "server"
    client.replace("a", f"file:{server}", "nfs4")
    wait_until(lambda: stage(manager) == "mounting")
    (job,) = jobs_of(manager.pid)
    manager.kill()
    wait_until(lambda: not alive(job), what="a job without a manager gives up what has changed nothing")
    manager.start()
    wait_until(lambda: manager.row("a")["replace"]["attempts"] > 2)
    server.touch()
    assert manager.client().wait("a", 10)["replace"]["phase"] == "done"


def test_a_replace_that_is_at_work_ends_without_its_manager(manager: FakedManager, mnt: Path) -> None:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", "slow:0.7", "nfs4")
    wait_until(lambda: stage(manager) == "prepared")
    (job,) = jobs_of(manager.pid)
    manager.kill()
    assert alive(job)
    manager.start()
    report = manager.client().wait("a", 10)["replace"]
    assert report["phase"] == "done" and report["report"]["moved"] == {"files": 3}
    assert not list(manager.work.glob("*.result"))


def test_sigterm_leaves_the_mounts_and_the_next_one_goes_on(manager: FakedManager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    pid = client.mount("a", str(mnt), "stub")["pid"]
    server = tmp_path / "server"
    client.replace("a", f"file:{server}", "nfs4")
    wait_until(lambda: stage(manager) == "mounting")
    (job,) = jobs_of(manager.pid)
    manager.stop()
    assert alive(pid) and not alive(job) and not manager.socket.exists()
    server.touch()
    manager.start()
    assert manager.client().wait("a", 10)["replace"]["phase"] == "done"


def test_a_file_system_that_died_meanwhile_is_found_dead(manager: FakedManager, mnt: Path, tmp_path: Path) -> None:
    client = manager.client()
    pids: Dict[str, int] = {"a": client.mount("a", str(mnt))["pid"]}
    (tmp_path / "b").mkdir()
    pids["b"] = client.mount("b", str(tmp_path / "b"))["pid"]
    manager.kill()
    for pid in pids.values():
        end(pid, signal.SIGKILL)
    subprocess.run(["umount", str(tmp_path / "b")], check=True)
    manager.start()
    wait_until(lambda: [row["state"] for row in manager.client().status()["mounts"]] == ["failed"])
    manager.client().unmount("a")
    assert manager.client().status()["mounts"] == []


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("job_too", [False, True])
def test_a_mount_that_was_half_made_is_undone(
    manager: FakedManager, tmp_path: Path, where: str, job_too: bool
) -> None:
    """The manager (and the job) is killed while the file system is being attached."""
    place = tmp_path / where
    place.mkdir()
    record = manager.work / "mount-1.json"
    with manager.raw() as sock:
        sock.send(f"mount;id=a;mode=restore;mountpoint={place}\0".encode())
        wait_until(lambda: record.exists() and json.loads(record.read_text())["pid"])
        wait_until(lambda: where == "before" or str(place) in Path("/proc/self/mountinfo").read_text())
        (job,) = jobs_of(manager.pid)
        if job_too:
            os.kill(manager.pid, signal.SIGSTOP)
            end(job, signal.SIGKILL)
        manager.kill()
    manager.start()
    wait_until(lambda: not manager.client().status()["mounts"])
    end(job, signal.SIGTERM)
    assert str(place) not in Path("/proc/self/mountinfo").read_text()
    assert not record.exists() or '"gone"' in record.read_text()


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_mount_whose_job_is_ended_is_undone(
    manager: FakedManager, tmp_path: Path, where: str, number: signal.Signals
) -> None:
    place = tmp_path / where
    place.mkdir()
    with manager.raw() as sock:
        sock.send(f"mount;id=a;mode=restore;mountpoint={place}\0".encode())
        record = manager.work / "mount-1.json"
        wait_until(lambda: record.exists() and json.loads(record.read_text())["pid"])
        wait_until(lambda: where == "before" or str(place) in Path("/proc/self/mountinfo").read_text())
        os.kill(jobs_of(manager.pid)[0], number)
        assert int.from_bytes(sock.recv(4), sys.byteorder, signed=True) < 0
    wait_until(lambda: not manager.client().status()["mounts"])
    assert str(place) not in Path("/proc/self/mountinfo").read_text()


def test_a_mount_can_be_aborted(manager: FakedManager, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    with manager.raw() as sock:
        sock.send(f"mount;id=a;mode=restore;mountpoint={tmp_path}/before\0".encode())
        wait_until((manager.work / "mount-1.json").exists)
        assert manager.client().abort("a") == ["a"]
        assert int.from_bytes(sock.recv(4), sys.byteorder, signed=True) == -errno.ECANCELED
    assert manager.client().status()["mounts"] == []


@pytest.mark.needs_ptrace
def test_a_delayed_mount_from_end_to_end(tmp_path: Path, mnt: Path) -> None:
    """With the real replace step: the reader goes on where it was, and everything of ours is gone."""
    server = tmp_path / "server"
    server.mkdir()
    (server / "file").write_text("first\nsecond\n")
    script = "import sys; f = open(sys.argv[1])\nfor line in sys.stdin: print(f.readline(), end='', flush=True)"
    with manager_in(tmp_path) as manager:
        manager.start("--exit-with-spfs")
        client = manager.client()
        pid = client.mount("a", str(mnt))["pid"]
        client.create("a", [{"path": "file", "mode": 0o100644, "size": 13}])
        command = [sys.executable, "-c", script, str(mnt / "file")]
        # The reader is killed before it is waited for, whatever has become of the replace.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as reader, ExitStack() as cleanup:
            assert reader.stdin is not None and reader.stdout is not None
            cleanup.callback(reader.kill)
            wait_until(lambda: client.status("a")["mounts"][0]["handles"] == 1)
            group = "/sys/fs/cgroup/freezer/(null)"
            client.replace("a", str(server), "none", flags=4096, freeze_cgroup=group, begin="hold")
            client.mode("stub")
            reader.stdin.write("\n")
            reader.stdin.flush()
            wait_until(lambda: [held["pid"] for held in client.held()] == [reader.pid])
            client.begin("release")
            row = client.wait("a", 20)
            report = row["replace"]["report"]
            assert report["moved"] == {"file": 1} and report["left"] == [] and row["end"] == "replaced"
            assert reader.stdout.readline() == "first\n"
            reader.stdin.close()
            assert reader.wait(10) == 0
        manager.wait_ended()
        assert not alive(pid) and (mnt / "file").read_text() == "first\nsecond\n"
        subprocess.run(["umount", str(mnt)], check=True)


def test_records_that_cannot_be_read_are_left_alone(manager: FakedManager, mnt: Path) -> None:
    manager.client().mount("a", str(mnt))
    manager.kill()
    bad = {"mount-7.json": "{", "mount-8.json": '{"version": 99}', "mount-9.json": '{"version": 1, "id": 3}'}
    for name, text in bad.items():
        (manager.work / name).write_text(text)
    manager.start()
    assert [row["id"] for row in manager.client().status()["mounts"]] == ["a"]
    assert all((manager.work / name).read_text() == text for name, text in bad.items())
    assert manager.log().count("cannot take over") + manager.log().count("cannot read") >= 3
