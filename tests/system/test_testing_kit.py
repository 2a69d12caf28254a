"""The kit for tests of programs: what mounts it gives, and that nothing is left of them, whoever is killed."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import pytest
from testing_kit import TOP, leftovers, unprivileged

from spfs.testing import DelayedMount, MountServer, StubfsError, delayed_mount, process_state, wait_until
from stubfs.errors import UsageError

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
LIMIT = 20.0
FSYNC = "import os,sys; fd = os.open(sys.argv[1], os.O_WRONLY); os.write(fd, b'x'); os.fsync(fd)"


@pytest.fixture(autouse=True)
def own_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the kit puts its mounts; nothing may be left there. Of a short name: sockets are in it."""
    base = tmp_path_factory.mktemp("t")
    monkeypatch.setenv("TMPDIR", str(base))
    yield base
    wait_until(lambda: not leftovers(base), LIMIT, f"left: {leftovers(base)}")


@pytest.fixture
def server() -> Iterator[MountServer]:
    with MountServer() as server:
        yield server


@pytest.fixture
def mount(server: MountServer) -> DelayedMount:
    return server.mount()


@pytest.fixture
def real(tmp_path: Path) -> Path:
    directory = tmp_path / "real"
    directory.mkdir()
    (directory / "f").write_text("real")
    return directory


@pytest.fixture
def run() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts programs, which are gone at the end."""
    started: List["subprocess.Popen[str]"] = []

    def start(*command: object) -> "subprocess.Popen[str]":
        started.append(
            subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def python(code: str, *arguments: object) -> "list[object]":
    return [sys.executable, "-c", code, *arguments]


def errno_of(action: Callable[[], Any]) -> Optional[int]:
    try:
        action()
    except (OSError, StubfsError) as error:
        return error.errno
    return None


class TestFiles:
    def test_what_is_created_is_there(self, mount: DelayedMount) -> None:
        path = mount.create_file("a/b/file", "contents", mode=0o640)
        assert path == mount.path / "a/b/file" and path.read_text() == "contents"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert mount.create_file("/hole", size=10_000).stat().st_size == 10_000
        assert mount.create_file("empty").read_bytes() == b""
        assert stat.S_ISFIFO(mount.create_fifo("a/fifo").stat().st_mode)
        assert mount.create_dir("d", 0o700).is_dir() and stat.S_IMODE((mount.path / "d").stat().st_mode) == 0o700
        assert sorted(os.listdir(mount.path)) == ["a", "d", "empty", "hole"]

    def test_a_path_may_lead_through_the_mountpoint(self, mount: DelayedMount, run: Callable[..., Any]) -> None:
        path = mount.create_file(mount.path / "a" / "f", "contents")
        assert path == mount.path / "a" / "f" and path.read_text() == "contents"
        with mount.fail("EACCES", ["open"], path):
            assert errno_of(path.read_text) == errno.EACCES
        mount.stub()
        process = run("cat", path)
        (held,) = mount.wait_held(1, LIMIT, path=mount.path / "a*")
        assert held.pid == process.pid and mount.held(path=mount.path / "b*") == []
        mount.release()

    def test_what_cannot_be_created(self, mount: DelayedMount, real: Path) -> None:
        mount.create_file("f", "first")
        assert errno_of(lambda: mount.create_file("f", "second")) == errno.EEXIST
        assert (mount.path / "f").read_text() == "first"
        with pytest.raises(UsageError, match="cannot create a/../../f: it leads out of the mount"):
            mount.create_file("a/../../f")
        assert errno_of(lambda: mount.create_dir("f/d")) == errno.ENOTDIR
        with pytest.raises(StubfsError, match="content and a size"):
            mount.create_file("g", "x", size=1)
        mount.proxy(real)
        with pytest.raises(StubfsError, match="make it there") as caught:
            mount.create_file("g")
        assert caught.value.errno == errno.EROFS

    def test_of_a_directory_from_the_start(self, server: MountServer, real: Path) -> None:
        mount = server.mount(real)
        assert (mount.path / "f").read_text() == "real"
        (mount.path / "new").write_text("new")
        assert (real / "new").read_text() == "new"
        assert errno_of(lambda: server.mount(real / "f")) == errno.ENOTDIR

    def test_on_a_directory_of_the_callers(self, server: MountServer, tmp_path: Path) -> None:
        here = tmp_path / "here"
        here.mkdir()
        mount = server.mount(path=here)
        mount.create_file("f", "x")
        assert mount.path == here and os.listdir(here) == ["f"]
        mount.close()
        assert os.listdir(here) == []
        assert errno_of(lambda: server.mount(path=tmp_path / "nowhere")) == errno.ENOENT


class TestWaiting:
    def test_everybody_waits_until_released(self, mount: DelayedMount, run: Callable[..., Any]) -> None:
        mount.create_file("f", "contents")
        mount.stub()
        process = run("cat", mount.path / "f")
        (held,) = mount.wait_held(1, LIMIT)
        assert (held.operation, held.name, held.pid, held.command) == ("lookup", "f", process.pid, "cat")
        assert f"by process {process.pid} (cat), for" in str(held)
        late = mount.create_file("late", "also while all wait")
        assert process.poll() is None and mount.status().held == 1
        mount.release()
        assert process.communicate(timeout=LIMIT)[0] == "contents" and late.read_text() == "also while all wait"
        assert mount.held() == [] and mount.status().mode == "restore"

    def test_the_server_comes(self, mount: DelayedMount, real: Path, run: Callable[..., Any]) -> None:
        mount.create_file("f", "a scaffold")
        mount.stub()
        process = run("cat", mount.path / "f")
        mount.wait_held(1, LIMIT)
        mount.proxy(real)
        assert process.communicate(timeout=LIMIT)[0] == "real"
        mount.stub()
        process = run("cat", mount.path / "f")
        mount.wait_held(1, LIMIT)
        mount.release()
        assert process.communicate(timeout=LIMIT)[0] == "real" and mount.status().mode == "proxy"

    def test_as_on_a_soft_mount(self, mount: DelayedMount) -> None:
        mount.stub(timeout=0.05, errno="EHOSTDOWN")
        assert errno_of(lambda: os.stat(mount.path / "f")) == errno.EHOSTDOWN

    def test_a_test_that_waits_for_itself_gets_an_error(self, server: MountServer, run: Callable[..., Any]) -> None:
        mount = server.mount(own_limit=0.2)
        mount.stub()
        process = run("cat", mount.path / "f")
        mount.wait_held(1, LIMIT)
        # Of another name: for one that somebody else looks up just now, the kernel does not ask twice.
        assert errno_of(lambda: os.stat(mount.path / "g")) == errno.ETIMEDOUT
        mount.release()
        process.communicate(timeout=LIMIT)
        mount.hang(["lookup"])
        assert errno_of(lambda: os.stat(mount.path / "f")) == errno.ETIMEDOUT

    def test_waiting_longer_says_who_waits(self, mount: DelayedMount, run: Callable[..., Any]) -> None:
        mount.stub()
        process = run("cat", mount.path / "f")
        mount.wait_held(1, LIMIT)
        with pytest.raises(TimeoutError, match=rf"2 held requests: 1 after(.|\n)*lookup of f by process {process.pid}"):
            mount.wait_held(2, timeout=0.05)

    def test_from_several_threads(self, server: MountServer, run: Callable[..., Any]) -> None:
        first, second = server.mount(), server.mount()
        first.stub()
        found: List[Any] = []
        waiter = threading.Thread(target=lambda: found.extend(first.wait_held(1, LIMIT)))
        waiter.start()
        second.create_file("f", "the other is not concerned")
        assert (second.path / "f").read_text() == "the other is not concerned" and found == []
        process = run("ls", first.path / "x")
        waiter.join(LIMIT)
        assert [request.pid for request in found] == [process.pid]


class TestRules:
    def test_only_fsync_hangs(self, mount: DelayedMount, run: Callable[..., Any]) -> None:
        path = mount.create_file("f")
        rule = mount.hang(["fsync"])
        process = run(*python(FSYNC, path))
        (held,) = mount.wait_held(1, LIMIT, ["fsync"])
        assert held.pid == process.pid and path.read_text() == "x"
        rule.end()
        assert process.wait(LIMIT) == 0 and mount.rules == []
        rule.end()

    def test_only_one_process(self, mount: DelayedMount) -> None:
        path, other = mount.create_file("f", "x"), mount.create_file("g", "y")
        process = subprocess.Popen(
            ["sh", "-c", 'read go; exec cat "$0"', str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process, mount.hang(pids=[process.pid]):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            assert mount.wait_held(1, LIMIT, pids=[process.pid]) and other.read_text() == "y"
            process.kill()
            process.wait(LIMIT)
            # A rule for processes that have ended is no obstacle to others.
            mount.fail("EROFS", ["write"])
            assert [rule.action for rule in mount.rules] == ["fail"]
        assert errno_of(lambda: mount.hang(pids=[process.pid])) == errno.ESRCH

    def test_the_latest_decides_first(self, mount: DelayedMount) -> None:
        db, other = mount.create_file("a.db", "x"), mount.create_file("b", "x")
        with mount.fail("EIO", ["open"], "*.db"):
            assert errno_of(db.read_text) == errno.EIO and other.read_text() == "x"
            with mount.serve(path="*.db"):
                assert db.read_text() == "x"
            assert errno_of(db.read_text) == errno.EIO
        assert db.read_text() == "x"

    def test_the_first_ones_only(self, mount: DelayedMount) -> None:
        path = mount.create_file("f", "x")
        mount.fail(errno.ENOSPC, ["open"], times=2)
        assert [errno_of(path.read_text) for _ in range(3)] == [errno.ENOSPC, errno.ENOSPC, None]

    def test_slow(self, mount: DelayedMount) -> None:
        path = mount.create_file("f", "x")
        mount.slow(0.2, ["open"])
        begun = time.monotonic()
        assert path.read_text() == "x"
        assert time.monotonic() - begun >= 0.2

    def test_what_makes_no_sense_changes_nothing(self, mount: DelayedMount) -> None:
        mount.hang(["fsync"])
        for action in (
            lambda: mount.hang(["no such"]), lambda: mount.fail("ENOSUCH"), lambda: mount.slow(-1),
            lambda: mount.fail(path="/absolute"),
        ):  # fmt: skip
            with pytest.raises(StubfsError):
                action()
        with pytest.raises(StubfsError):
            mount.stub(errno="EIO")
        assert [str(rule) for rule in mount.rules] == ["hold operations=fsync"] and mount.status().mode == "restore"


class TestReplace:
    pytestmark = [pytest.mark.needs_ptrace]

    def test_under_the_processes_and_this_one(self, mount: DelayedMount, real: Path, run: Callable[..., Any]) -> None:
        path = mount.create_file("f")
        with open(path) as ours:
            mount.stub()
            process = run("sh", "-c", 'exec tail -f "$0"', path)
            mount.wait_held(1, LIMIT)
            report = mount.replace(real)
            assert report["left"] == [] and report["ended"] and report["moved"]["file"] >= 1
            assert ours.read() == "real" and os.path.samestat(os.fstat(ours.fileno()), os.stat(real / "f"))
            assert process.stdout.read(4) == "real"
            assert os.path.samestat(path.stat(), os.stat(real / "f"))
            process.kill()
            process.wait(LIMIT)
        mount.close()
        assert not mount.path.exists() and (real / "f").read_text() == "real"

    def test_by_a_file_system_that_is_mounted(self, mount: DelayedMount) -> None:
        mount.replace(source="none", type="tmpfs", options="size=1m")
        with open("/proc/self/mounts") as table:
            assert f"none {mount.path} tmpfs" in table.read()

    def test_that_fails_changes_nothing(self, mount: DelayedMount) -> None:
        path = mount.create_file("f", "still here")
        with pytest.raises(StubfsError, match="no file system type nosuch"):
            mount.replace(source="none", type="nosuch")
        assert path.read_text() == "still here"
        with pytest.raises(StubfsError, match="give a directory, or both"):
            mount.replace(source="none")
        with pytest.raises(StubfsError, match="cannot serve /nowhere: No such file") as caught:
            mount.replace("/nowhere", timeout=1000)
        assert caught.value.errno == errno.ENOENT
        mount.close()
        with pytest.raises(StubfsError, match=f"cannot use {mount.path}: it is closed"):
            mount.stub()

    def test_on_a_directory_that_has_a_mount(self, server: MountServer, real: Path, tmp_path: Path) -> None:
        here = tmp_path / "here"
        here.mkdir()
        with MountServer() as other:
            below = other.mount(path=here)
            below.replace(source="none", type="tmpfs")
            (here / "below").touch()
            mount = server.mount(path=here)
            mount.replace(real)
            assert os.listdir(here) == ["f"]
            mount.close()
            assert os.listdir(here) == ["below"]
        assert os.listdir(here) == []

    def test_in_a_user_namespace(self) -> None:
        code = (
            "import os; from spfs.testing import delayed_mount\n"
            "assert os.getuid() == 0 and open('/proc/self/uid_map').read().split()[1] == '65534'\n"
            "os.mkdir('real'); open('real/f', 'w').write('real')\n"
            "with delayed_mount() as mount:\n"
            "    ours = open(mount.create_file('f'))\n"
            "    mount.stub()\n"
            "    report = mount.replace('real')\n"
            "    print(report['moved'], report['left'], ours.read(), os.path.samestat(os.fstat(ours.fileno()),"
            " os.stat('real/f')))\n"
        )
        with unprivileged() as user:
            done = user.in_user_namespace("-c", code)
            assert done.stdout == "{'file': 1} [] real True\n", done.stdout
            assert sorted(os.listdir(user.home)) == ["real"]


class TestUnprivileged:
    def test_all_but_replace(self) -> None:
        code = (
            "import os, subprocess; from spfs.testing import delayed_mount\n"
            "with delayed_mount() as mount:\n"
            "    path = mount.create_file('d/f', 'contents')\n"
            "    mount.stub()\n"
            "    process = subprocess.Popen(['cat', path], stdout=subprocess.PIPE, text=True)\n"
            "    print(*[request.uid for request in mount.wait_held(1, 20)])\n"
            "    mount.release()\n"
            "    print(process.communicate(timeout=20)[0])\n"
            "    with mount.fail('EROFS', ['open']):\n"
            "        try: open(path)\n"
            "        except OSError as error: print(error.strerror)\n"
            "    try: mount.replace('/usr')\n"
            "    except Exception as error: print('replace:', error)\n"
            "    print(path.read_text(), mount.status().mode)\n"
            "print(os.listdir())\n"
        )
        with unprivileged() as user:
            done = user.python("-c", code)
        lines = done.stdout.splitlines()
        assert lines[:3] == ["65534", "contents", "Read-only file system"], done.stdout
        assert "running as user 65534, not as root (run the tests as root, or in a namesp" in lines[3], done.stdout
        assert lines[4:] == ["contents restore", "[]"], done.stdout

    def test_fusermount_that_may_not_mount_is_a_missing_feature(self) -> None:
        code = (
            "from spfs.testing import *\n"
            "try:\n"
            "    with delayed_mount(): pass\n"
            "except MissingFeatureError as error: print(error)\n"
        )
        with unprivileged() as user:
            done = user.run("setpriv", "--no-new-privs", sys.executable, "-c", code)
            assert "fusermount must be setuid root" in done.stdout, done.stdout
            assert os.listdir(user.home) == []


OWNER = """
import os, subprocess, sys, time
from spfs.testing import MountServer
server = MountServer()
first, second, third = server.mount(), server.mount(path=sys.argv[1]), server.mount()
third.create_file("f")
third.replace(sys.argv[2])
first.stub()
# Has copies of all our descriptors.
if not os.fork():
    try: os.stat(first.path / "f")
    except OSError as error: print(error.errno, flush=True)
    os._exit(0)
first.wait_held(1, 20)
print(server._pid, *(m.path for m in (first, second, third)), flush=True)
time.sleep(1000)
"""


class TestKilled:
    @pytest.fixture
    def owner(self, tmp_path: Path, real: Path) -> Iterator["subprocess.Popen[str]"]:
        (tmp_path / "user").mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path / "user"), str(real)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(TOP)},
        ) as process:  # fmt: skip
            yield process
            process.kill()

    @staticmethod
    def _mounts(paths: List[str]) -> List[str]:
        with open("/proc/self/mountinfo") as table:
            return [line for line in table if line.split(" ")[4] in paths]

    def test_the_owner(self, owner: "subprocess.Popen[str]", own_directory: Path) -> None:
        assert owner.stdout is not None
        forkserver, *paths = owner.stdout.readline().split()
        assert len(self._mounts(paths)) == 3
        owner.kill()
        assert owner.stdout.readline() in (f"{errno.EIO}\n", f"{errno.ECONNABORTED}\n", f"{errno.ENOTCONN}\n")
        wait_until(lambda: not self._mounts(paths) and not leftovers(own_directory), LIMIT)
        wait_until(lambda: process_state(int(forkserver)) in ("", "Z"), LIMIT)

    def test_the_owner_and_the_fork_server_and_the_file_systems(
        self, owner: "subprocess.Popen[str]", own_directory: Path
    ) -> None:
        """As when a whole container, or a unit of systemd, is killed; the next run finds what is left."""
        assert owner.stdout is not None
        forkserver, *paths = owner.stdout.readline().split()
        os.killpg(int(forkserver), signal.SIGSTOP)  # so that none sees the end of another
        owner.kill()
        os.killpg(int(forkserver), signal.SIGKILL)
        owner.wait(LIMIT)
        assert self._mounts(paths) and leftovers(own_directory)
        with MountServer() as server:
            server.mount()
            assert self._mounts(paths) == [] and len(os.listdir(own_directory)) == 1

    def test_the_fork_server(self, server: MountServer) -> None:
        mount = server.mount()
        path = mount.create_file("f", "x")
        os.kill(server._pid, signal.SIGKILL)
        wait_until(lambda: process_state(server._pid) == "Z", LIMIT)
        assert path.read_text() == "x"
        with pytest.raises(StubfsError, match="cannot start a file system"):
            server.mount()

    def test_the_file_system(self, mount: DelayedMount, run: Callable[..., Any]) -> None:
        mount.stub()
        process = run("cat", mount.path / "f")
        mount.wait_held(1, LIMIT)
        mount.crash()
        assert process.wait(LIMIT) == 1
        assert errno_of(lambda: os.stat(mount.path / "f")) in (errno.ENOTCONN, errno.ECONNABORTED)
        assert errno_of(mount.status) == errno.ECONNREFUSED

    def test_a_run_that_goes_on_is_left_alone(self, server: MountServer) -> None:
        path = server.mount().create_file("f", "x")
        with delayed_mount() as other:
            assert other.path.exists() and path.read_text() == "x"
        assert path.read_text() == "x"


def test_who_waits_at_the_end_gets_an_error(run: Callable[..., Any]) -> None:
    with delayed_mount() as mount:
        mount.stub()
        process = run("cat", mount.path / "f")
        mount.wait_held(1, LIMIT)
    assert "Input/output error" in process.communicate(timeout=LIMIT)[1]
    mount.close()


def test_a_mount_that_is_in_use_is_taken_away(server: MountServer) -> None:
    mount = server.mount()
    with open(mount.create_file("f", "x")):
        mount.close()
        assert not mount.path.exists()


def test_a_child_that_cleans_up_takes_nothing_away(server: MountServer) -> None:
    mount = server.mount()
    path = mount.create_file("f", "x")
    pid = os.fork()
    if not pid:
        try:
            mount.close()
            server.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert path.read_text() == "x" and mount.status().mode == "restore" and len(server.mounts()) == 1
