"""``spfs switch``: the files of running programs moved between two mounts, by a command and without a manager."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from manager_kit import ENVIRONMENT, TIMEOUT, run
from surgery_kit import Mounts, Victim, tasks_stopped

from spfs.linux import mountapi, procfs
from spfs.testing import process_state, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    made = Mounts(tmp_path)
    for directory in ("app", "app/deep"):
        made.both(lambda top: (top / directory).mkdir())
    for name in ("file", "app/file", "app/deep/file"):
        made.file(name, b"old " + name.encode(), b"new " + name.encode())
    yield made
    made.close()


@pytest.fixture
def victims(mounts: Mounts) -> "Iterator[List[Victim]]":
    """Two processes with the same files open."""
    made = [Victim(), Victim()]
    for victim in made:
        victim.run(f"import os; top = {str(mounts.old)!r}")
        victim.run("a, b = os.open(top + '/file', os.O_RDWR), os.open(top + '/app/file', os.O_RDWR)")
        victim.run("os.lseek(b, 4, os.SEEK_SET)")
    yield made
    for victim in made:
        victim.close()


def switch(*arguments: str) -> Dict[str, Any]:
    done = run("spfs.cli.spfs", "switch", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    answer: Dict[str, Any] = json.loads(done.stdout)
    return answer


def between(mounts: Mounts, beneath: str = "") -> List[str]:
    return ["--source", str(mounts.old / beneath), "--target", str(mounts.new / beneath)]


def holds(victim: Victim) -> List[bytes]:
    value: List[bytes] = victim.run("[os.pread(fd, 100, 0)[:3] for fd in (a, b)]")
    return value


def test_directories_are_relative_to_the_current_one(
    mounts: Mounts, victims: List[Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mounts.old.parent)
    pid = str(victims[0].pid)
    assert switch("--pid", pid, "--source", mounts.old.name, "--target", f"./{mounts.new.name}")["moved"] == {"file": 2}
    assert holds(victims[0]) == [b"new", b"new"]


def test_only_the_process_that_is_named_is_moved(mounts: Mounts, victims: List[Victim]) -> None:
    one, other = victims
    answer = switch("--pid", str(one.pid), *between(mounts))
    assert answer["moved"] == {"file": 2} and answer["left"] == []
    assert [process["pid"] for process in answer["processes"]] == [one.pid]
    assert holds(one) == [b"new", b"new"] and holds(other) == [b"old", b"old"]
    assert one.run("os.lseek(b, 0, os.SEEK_CUR)") == 4
    assert switch("--all", *between(mounts))["moved"] == {"file": 2}
    assert holds(other) == [b"new", b"new"] and mounts.users() == []


def test_a_dry_run_lists_and_changes_nothing(mounts: Mounts, victims: List[Victim]) -> None:
    one = victims[0]
    (mounts.new / "file").unlink()
    one.run("os.chdir(top + '/app')")
    arguments = ["--pid", str(one.pid), "--dry-run", *between(mounts)]
    found = {item["what"]: item for item in switch(*arguments)["references"]}
    a, b = (f"fd {one.run(name)}" for name in "ab")
    assert found.keys() == {a, b, "cwd"}
    assert found[b] == {
        "pid": one.pid, "command": found[b]["command"], "kind": "file", "what": b, "path": "app/file", "reason": None
    }  # fmt: skip
    assert "no such file" in found[a]["reason"] and found["cwd"]["reason"] is None
    table = run("spfs.cli.spfs", "switch", *arguments)
    assert table.returncode == 0, table.stderr
    (line,) = [line for line in table.stdout.splitlines() if " app/file " in line]
    assert line.split()[0] == str(one.pid) and line.rstrip().endswith("moves")
    assert any("stays: there is no such file" in line for line in table.stdout.splitlines())
    assert holds(one) == [b"old", b"old"] and one.run("os.getcwd()") == str(mounts.old / "app")


def test_a_directory_beneath_the_mounts(mounts: Mounts, victims: List[Victim]) -> None:
    """What is elsewhere on the old mount is none of its business, and who has only that is not even stopped."""
    one, other = victims
    one.run("c = os.open(top + '/app/deep/file', os.O_RDONLY)")
    other.run("os.close(b)")
    answer = switch("--all", *between(mounts, "app"))
    assert answer["moved"] == {"file": 2} and answer["left"] == []
    assert [process["pid"] for process in answer["processes"]] == [one.pid]
    assert holds(one) == [b"old", b"new"]
    assert one.run("os.read(c, 100)") == b"new app/deep/file"
    assert other.run("os.pread(a, 3, 0)") == b"old"


def test_a_bind_mount_of_a_part(mounts: Mounts, victims: List[Victim], tmp_path: Path) -> None:
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", str(mounts.old / "app"), str(bound)], check=True)
    try:
        one = victims[0]
        one.run(f"c = os.open({str(bound)!r} + '/deep/file', os.O_RDONLY)")
        answer = switch("--all", "--source", str(bound), "--target", str(mounts.new / "app"))
        # The same directory of the same file system, by whichever mount.
        assert answer["moved"] == {"file": 3} and answer["left"] == []
        assert one.run("os.read(c, 100)") == b"new app/deep/file" and holds(one) == [b"old", b"new"]
    finally:
        mountapi.umount2(str(bound), mountapi.MNT_DETACH)


def test_what_is_shared_with_somebody_else_stays_until_both_are_named(mounts: Mounts) -> None:
    with_child = Victim()
    try:
        with_child.run(
            f"""
import os
shared = os.open({str(mounts.old / "file")!r}, os.O_RDWR)
r, w = os.pipe()
child = os.fork()
if not child:
    os.close(w)
    own = os.open({str(mounts.old / "app/file")!r}, os.O_RDWR)
    os.read(r, 1)
    os.lseek(shared, 2, os.SEEK_CUR)
    os._exit(0)
"""
        )
        child = with_child.run("child")
        wait_until(lambda: str(mounts.old / "app/file") in links(child))
        answer = switch("--pid", str(child), *between(mounts))
        (left,) = answer["left"]
        assert answer["moved"] == {"file": 1}
        assert f"shared with process {with_child.pid} (" in left["reason"] and "not among" in left["reason"]
        refused = run("spfs.cli.spfs", "switch", "--strict", "--pid", str(child), *between(mounts))
        assert refused.returncode == 1 and "it is shared with process" in refused.stderr
        answer = switch("--pid", str(child), "--pid", str(with_child.pid), *between(mounts))
        assert answer["moved"] == {"file": 2} and answer["left"] == [] and mounts.users() == []
        # One description as before: the child's seek is seen by its parent.
        assert with_child.run("os.write(w, b'x'); os.waitpid(child, 0)[1]") == 0
        assert with_child.run("os.lseek(shared, 0, os.SEEK_CUR)") == 2
    finally:
        with_child.close()


def links(pid: int) -> List[str]:
    return [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]


@pytest.mark.parametrize(
    "top",
    [
        pytest.param("/sys/fs/cgroup/freezer", marks=pytest.mark.needs_cgroup1),
        pytest.param("/sys/fs/cgroup/unified:/sys/fs/cgroup", marks=pytest.mark.needs_cgroup2),
    ],
    ids=["v1", "v2"],
)
def test_the_members_of_a_cgroup(mounts: Mounts, victims: List[Victim], top: str) -> None:
    one, other = victims
    base = next(path for path in top.split(":") if os.path.exists(f"{path}/cgroup.procs"))
    group = Path(base, f"spfs-test-{os.getpid()}-switch")
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(one.pid))
        assert switch("--cgroup", str(group), *between(mounts))["moved"] == {"file": 2}
        assert holds(one) == [b"new", b"new"] and holds(other) == [b"old", b"old"]
        for name, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            assert not (group / name).exists() or (group / name).read_text().strip() == thawed
    finally:
        for victim in victims:
            victim.process.kill()
            victim.process.wait()
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_strict_moves_all_or_nothing(mounts: Mounts, victims: List[Victim]) -> None:
    one = victims[0]
    (mounts.new / "file").unlink()
    refused = run("spfs.cli.spfs", "switch", "--strict", "--pid", str(one.pid), *between(mounts))
    assert refused.returncode == 1 and "cannot move fd" in refused.stderr and "(file)" in refused.stderr
    assert holds(one) == [b"old", b"old"]
    (mounts.new / "file").write_bytes(b"new again")
    assert switch("--strict", "--pid", str(one.pid), *between(mounts))["left"] == []


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["--pid", "{pid}", "--source", "{old}", "--target", "{old}/app"], 1, "the file system that is left"),
        (["--pid", "{pid}", "--source", "{old}/nothing", "--target", "{new}"], 1, "No such file or directory"),
        (["--pid", "{pid}", "--source", "{old}", "--target", "{new}/file"], 1, "Not a directory"),
        (["--pid", "999999999", "--source", "{old}", "--target", "{new}"], 1, "there is none"),
        (["--pid", "0", "--source", "{old}", "--target", "{new}"], 1, "there is none"),
        (["--pid", "{kernel}", "--source", "{old}", "--target", "{new}"], 1, "it is a thread of the kernel"),
        (["--pid", "{thread}", "--source", "{old}", "--target", "{new}"], 1, "of process {pid} (name that one)"),
        (["--pid", "{dead}", "--source", "{old}", "--target", "{new}"], 1, "it has ended"),
        (["--pid", "{pid}", "--source", "{old}", "--target", "{old}"], 1, "the file system that is left"),
        (["--pid", "{pid}", "--source", "", "--target", "{new}"], 1, "cannot switch:  in our own namespaces: No such"),
        (["--pid", "{pid}", "--source", "{old}", "--target", ""], 1, "cannot switch:  in our own namespaces: No such"),
        (["--cgroup", "/nowhere", "--source", "{old}", "--target", "{new}"], 1, "cannot use freezer cgroup"),
        (["--ns-pid", "999999999", "--all", "--source", "{old}", "--target", "{new}"], 1, "no such process"),
        (["--source", "{old}", "--target", "{new}"], 2, "one of the arguments --pid --cgroup --all is required"),
        (["--pid", "1", "--all", "--source", "{old}", "--target", "{new}"], 2, "not allowed with"),
        (["--all", "--source", "{old}"], 2, "--target"),
    ],
)
def test_what_cannot_be_is_said(
    mounts: Mounts, victims: List[Victim], arguments: List[str], status: int, words: str
) -> None:
    victims[0].run("import threading; over = threading.Event(); thread = threading.Thread(target=over.wait)")
    victims[0].run("thread.start()")
    names = {"old": mounts.old, "new": mounts.new, "pid": victims[0].pid, "thread": victims[0].run("thread.native_id")}
    if "{kernel}" in arguments:
        threads = [pid for pid in procfs.processes() if b"\nKthread:\t1\n" in procfs.read(f"/proc/{pid}/status")]
        if not threads:
            pytest.skip("no threads of the kernel in this pid namespace, or a kernel that does not mark them")
        names["kernel"] = threads[0]
    with subprocess.Popen(["true"]) as names["dead"]:
        dead = names["dead"].pid
        wait_until(lambda: process_state(dead) == "Z")
        names["dead"] = dead
        done = run("spfs.cli.spfs", "switch", *(argument.format(**names) for argument in arguments))
    victims[0].run("over.set()")
    assert done.returncode == status and words.format(**names) in done.stderr, done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert holds(victims[0]) == [b"old", b"old"]


def test_somebody_without_rights_is_told(mounts: Mounts, victims: List[Victim]) -> None:
    command = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "spfs.cli.spfs", "switch"]
    done = subprocess.run(
        [*command, "--all", *between(mounts)],
        env={**os.environ, **ENVIRONMENT},
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 3 and "running as user 65534, not as root" in done.stderr, done.stderr


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB on which there is hardly any room."""
    path = tmp_path / "full"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "full", str(path)], check=True)
    (path / "file").write_bytes(b"new file".ljust(40000))
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_target_without_room_for_what_has_no_name(mounts: Mounts, victims: List[Victim], full: Path) -> None:
    """That is known ahead: by a dry run, and with strict. One with holes goes: for that there is room."""
    one, where = victims[0], ["--source", str(mounts.old), "--target", str(full)]
    one.run("os.close(b); gone = os.open(top + '/gone', os.O_RDWR | os.O_CREAT)")
    one.run("os.pwrite(gone, b'x' * 50000, 0); os.unlink(top + '/gone')")
    dry = switch("--dry-run", "--pid", str(one.pid), *where)["references"]
    reasons = {item["path"]: item["reason"] for item in dry}
    assert reasons["file"] is None and "No space left on device" in reasons[None]
    refused = run("spfs.cli.spfs", "switch", "--strict", "--pid", str(one.pid), *where)
    assert refused.returncode == 1 and "No space left on device" in refused.stderr
    assert one.run("os.pread(a, 3, 0)") == b"old"
    left = switch("--pid", str(one.pid), *where)["left"]
    assert [item["path"] for item in left] == [None] and "No space left on device" in left[0]["reason"]
    assert one.run("os.pread(a, 3, 0), len(os.pread(gone, 99999, 0))") == (b"new", 50000)
    one.run("os.ftruncate(gone, 0); os.ftruncate(gone, 1 << 20); os.pwrite(gone, b'end', (1 << 20) - 3)")
    assert switch("--strict", "--pid", str(one.pid), *where)["moved"] == {"file": 1}
    assert one.run("os.fstat(gone).st_size, os.pread(gone, 3, (1 << 20) - 3)") == (1 << 20, b"end")


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_strict_ends_with_an_error_if_something_stays_in_the_last_moment(
    mounts: Mounts, victims: List[Victim], how: "tuple[str]"
) -> None:
    """What is met when the first ones have been moved cannot be undone: it is listed, and no success."""
    code = "import sys; from spfs import jobs, processswitch; from spfs.cli import spfs\n" + (
        "real = processswitch.switch\n"
        "def switch(request, *given):\n"
        "    real(request, *given)\n"
        "    return {'moved': {}, 'left': [{'pid': 1, 'command': 'c', 'kind': 'file', 'what': 'fd 3', 'path': 'p',"
        " 'reason': 'met late'}]}\n"
        "processswitch.switch = switch; spfs.main()"
    )
    command = [sys.executable, "-c", code, "switch", "--strict", *how, "--pid", str(victims[0].pid), *between(mounts)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1 and "cannot move everything: 1 of the references" in done.stderr
    assert "met late" in done.stdout


# The command with a job that stands still in the blackout until it is killed, or told to go on.
PAUSED = """
import os, sys
from spfs.surgery import execution
where = sys.argv.pop(1)
real = execution.operate
def operate(*given):
    with open(where + "/reached", "w") as told:
        told.write(str(os.getpid()))
    with open(where + "/go") as go:
        go.read()
    real(*given)
execution.operate = operate
from spfs.cli import spfs
spfs.main()
"""


@pytest.mark.needs_cgroup1
@pytest.mark.parametrize("how", ["job killed", "both killed", "interrupted", "terminated"])
def test_the_command_is_killed_in_the_blackout(
    mounts: Mounts, victims: List[Victim], tmp_path: Path, how: str
) -> None:
    one = victims[0]
    for name in ("reached", "go"):
        os.mkfifo(tmp_path / name)
    group = Path("/sys/fs/cgroup/freezer", f"spfs-test-{os.getpid()}-killed")
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(one.pid))
        command = [sys.executable, "-c", PAUSED, str(tmp_path), "switch", "--cgroup", str(group), *between(mounts)]
        with subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True
        ) as process:
            job = int((tmp_path / "reached").read_text())
            assert process_state(one.pid) == "t"
            if how == "both killed":
                process.kill()
            if how.endswith("killed"):
                os.kill(job, signal.SIGKILL)
            else:
                process.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGTERM)
                # It is too late for that: what was begun is done, and said to be.
                (tmp_path / "go").write_text("go")
            said = process.communicate(timeout=TIMEOUT)[1]
            wait_until(lambda: tasks_stopped(one.pid) == [])
            wait_until(lambda: (group / "freezer.state").read_text() == "THAWED\n")
            if how == "job killed":
                assert process.returncode == 1 and "was killed" in said and "Traceback" not in said
                assert holds(one) == [b"old", b"old"]
            elif how != "both killed":
                assert process.returncode == 0, said
                assert holds(one) == [b"new", b"new"]
        assert switch("--all", *between(mounts))["left"] == [] and mounts.users() == []
        assert holds(one) == [b"new", b"new"]
    finally:
        one.process.kill()
        one.process.wait()
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
