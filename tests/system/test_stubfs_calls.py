"""Every sort of call that can wait: killed by what is fatal, disturbed by nothing else.

Each call has a directory and a file of its own, so that all of them wait at the same time and nobody behind another.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Set

import pytest
from stubfs_kit import LIMIT, Filesystem, Process, mounted, wait_until

from stubfs.rules import OPERATIONS, Rule

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
_SIZE = 256 << 10
_FS_IOC_GETFLAGS = 0x80086601
_PTRACE_DETACH, _PTRACE_SEIZE, _PTRACE_INTERRUPT = 17, 0x4206, 0x4207
_WALL = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Place:
    """One call's own directory, open, with a file that is open in some ways, a link and a program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.top = os.open(path, os.O_PATH | os.O_DIRECTORY)
        self.listing = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.fd = os.open(path / "f", os.O_RDWR)
        self.direct = os.open(path / "f", os.O_RDWR | os.O_DIRECT)
        self.program = os.open(path / "true", os.O_RDONLY)

    @staticmethod
    def make(path: Path) -> None:
        path.mkdir(parents=True)
        (path / "f").write_bytes(b"x" * _SIZE)
        (path / "link").symlink_to("f")
        (path / "sub").mkdir()
        shutil.copy("/bin/true", path / "true")
        os.setxattr(path / "f", "user.a", b"1")

    # --- what takes more than a line

    def mapped(self, **settings: int) -> int:
        with mmap.mmap(self.fd, _SIZE, **settings) as area:
            if settings.get("prot", mmap.PROT_WRITE) & mmap.PROT_WRITE:
                area[9000] = 1
            return area[9001]

    def read_directly(self) -> int:
        return os.preadv(self.direct, [mmap.mmap(-1, 8192)], 0)

    def write_directly(self, offset: int) -> int:
        return os.pwritev(self.direct, [mmap.mmap(-1, 8192)], offset)

    def bind(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"/proc/self/fd/{self.top}/socket")

    def flags(self) -> int:
        found = array.array("l", [0])
        fcntl.ioctl(self.fd, _FS_IOC_GETFLAGS, found)
        return len(found)

    def watch(self) -> bool:
        watches = _libc.inotify_init1(os.O_CLOEXEC)
        return bool(_libc.inotify_add_watch(watches, f"/proc/self/fd/{self.top}/sub".encode(), 2) > 0)

    def splice(self) -> int:
        read, write = os.pipe()
        return int(_libc.splice(self.fd, None, write, None, ctypes.c_size_t(4096), 0))


CALLS: Dict[str, Callable[[Place], Any]] = {
    "open": lambda at: os.close(os.open("f", os.O_RDONLY, dir_fd=at.top)),
    "open again": lambda at: os.close(os.open(f"/proc/self/fd/{at.fd}", os.O_RDONLY)),
    "open what is not there": lambda at: os.open("none", os.O_RDONLY, dir_fd=at.top),
    "create": lambda at: os.close(os.open("new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=at.top)),
    "create without a name": lambda at: os.close(os.open(f"/proc/self/fd/{at.top}", os.O_TMPFILE | os.O_RDWR)),
    "stat": lambda at: os.stat("f", dir_fd=at.top).st_size,
    "fstat": lambda at: os.fstat(at.fd).st_size,
    "access": lambda at: os.access(f"/proc/self/fd/{at.fd}", os.R_OK),
    "read": lambda at: len(os.pread(at.fd, 10, 0)),
    "read much": lambda at: len(os.pread(at.fd, _SIZE, 0)),
    "read directly": lambda at: at.read_directly(),
    "write": lambda at: os.pwrite(at.fd, b"x" * 10, 0),
    "write much": lambda at: os.pwrite(at.fd, b"x" * _SIZE, 0),
    "write directly": lambda at: at.write_directly(0),
    "append directly": lambda at: at.write_directly(_SIZE),
    "list": lambda at: sorted(os.listdir(at.listing)),
    "list by the path": lambda at: sorted(os.listdir(f"/proc/self/fd/{at.top}")),
    "read a mapping": lambda at: at.mapped(prot=mmap.PROT_READ),
    "write a mapping": lambda at: at.mapped(),
    "write a private mapping": lambda at: at.mapped(flags=mmap.MAP_PRIVATE),
    "execute": lambda at: os.execv(f"/proc/self/fd/{at.top}/true", ["true"]),
    "execute what is open": lambda at: os.execve(at.program, ["true"], {}),
    "fsync": lambda at: os.fsync(at.fd),
    "fdatasync": lambda at: os.fdatasync(at.fd),
    "fsync of a directory": lambda at: os.fsync(at.listing),
    "rename": lambda at: os.rename("f", "f2", src_dir_fd=at.top, dst_dir_fd=at.top),
    "rename to another directory": lambda at: os.rename("f", "sub/f", src_dir_fd=at.top, dst_dir_fd=at.top),
    "link": lambda at: os.link("f", "f2", src_dir_fd=at.top, dst_dir_fd=at.top),
    "symlink": lambda at: os.symlink("x", "new", dir_fd=at.top),
    "readlink": lambda at: os.readlink("link", dir_fd=at.top),
    "unlink": lambda at: os.unlink("f", dir_fd=at.top),
    "mkdir": lambda at: os.mkdir("new", dir_fd=at.top),
    "rmdir": lambda at: os.rmdir("sub", dir_fd=at.top),
    "mkfifo": lambda at: os.mkfifo("new", dir_fd=at.top),
    "bind a socket": lambda at: at.bind(),
    "chmod": lambda at: os.fchmod(at.fd, 0o600),
    "chown": lambda at: os.fchown(at.fd, 1, 1),
    "utimes": lambda at: os.utime(at.fd, (1, 1)),
    "truncate": lambda at: os.truncate(f"/proc/self/fd/{at.fd}", 5),
    "ftruncate": lambda at: os.ftruncate(at.fd, 5),
    "statfs": lambda at: os.fstatvfs(at.fd).f_namemax,
    "getxattr": lambda at: os.getxattr(at.fd, "user.a"),
    "setxattr": lambda at: os.setxattr(at.fd, "user.b", b"1"),
    "listxattr": lambda at: os.listxattr(at.fd),
    "removexattr": lambda at: os.removexattr(at.fd, "user.a"),
    "fallocate": lambda at: os.posix_fallocate(at.fd, 0, 10),
    "seek data": lambda at: os.lseek(at.fd, 0, os.SEEK_DATA),
    "copy a range": lambda at: os.copy_file_range(at.fd, at.fd, 100, 0, _SIZE),
    "sendfile": lambda at: os.sendfile(at.fd, at.fd, 0, 100),
    "splice": lambda at: at.splice(),
    "ioctl": lambda at: at.flags(),
    "change to a directory": lambda at: os.fchdir(at.top),
    "watch": lambda at: at.watch(),
}
# What comes before the operation that a call is about. Without these, a rule that holds all others holds the call later
# than stub mode does.
_ON_THE_WAY = ("lookup", "getattr", "access", "open", "opendir", "getxattr")
_NOT_BY_A_RULE = (
    "open", "open again", "open what is not there", "stat", "fstat", "access", "getxattr", "change to a directory",
    "watch",
)  # fmt: skip
_WITHOUT_ERRNO = {"access": False, "watch": False, "splice": -1}  # what Python makes of the error
_EXECUTED = ("execute", "execute what is open")


def result_of(call: Callable[[Place], Any], place: Place) -> Any:
    try:
        return call(place)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class Calls:
    """All calls, each by a process of its own, held at the same time: by stub mode, or by a rule, which holds what a
    call is about rather than what comes before it."""

    def __init__(self, fs: Filesystem, how: str) -> None:
        self.fs = fs
        self.how = how
        for top in (fs.real, fs.base / "native"):
            for name in CALLS:
                Place.make(top / name)
        fs.proxy()
        self._ready, self._tell_ready = os.pipe()
        self._go, self._tell_go = os.pipe()
        self.processes = {name: fs.run(partial(self._act, name)) for name in CALLS}
        os.close(self._tell_ready)
        os.close(self._go)

    def _act(self, name: str) -> Any:
        """In the process, which dies of SIGINT and handles two signals: so that they restart calls, and do not."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for number, interrupts in ((signal.SIGUSR1, True), (signal.SIGUSR2, False)):
            signal.signal(number, lambda *_: None)
            signal.siginterrupt(number, interrupts)
        os.close(self._tell_go)
        place = Place(self.fs.path / name)
        os.close(self._tell_ready)
        os.read(self._go, 1)
        return result_of(CALLS[name], place)

    def hold(self) -> None:
        """Let them begin, and wait until they wait; those that no rule holds are forgotten when they are done."""
        client = self.fs.client
        os.read(self._ready, 1)  # its end: all of them are ready
        if self.how == "stub":
            client.mode("stub")
        else:
            client.set_rules([Rule("hold", operations=sorted(set(OPERATIONS) - {*_ON_THE_WAY, "flush"}))])
        os.close(self._tell_go)
        self._tell_go = -1

        def begun() -> bool:
            held = {item.pid for item in client.held()}
            return all(process.pid in held or process.finished() for process in self.processes.values())

        wait_until(begun, LIMIT)
        self.processes = {name: process for name, process in self.processes.items() if not process.finished()}
        spared = () if self.how == "stub" else _NOT_BY_A_RULE
        assert [name for name in CALLS if name not in spared] == list(self.processes)
        self._requests = self._waited_for()

    def _waited_for(self) -> Dict[int, Set[int]]:
        """process -> unique numbers of its requests."""
        found: Dict[int, Set[int]] = {process.pid: set() for process in self.processes.values()}
        for item in self.fs.client.held():
            found.get(item.pid, set()).add(item.unique)
        return found

    def signal(self, *numbers: int) -> None:
        for number in numbers:
            for process in self.processes.values():
                process.kill(number)

    def leave_out(self, names: Sequence[str]) -> None:
        for name in names:
            process = self.processes.pop(name, None)
            if process is not None:
                process.close()

    def must_all_die(self, number: int) -> None:
        """Of the signal, which they have just got. How soon is looked at elsewhere, for one: they are more than there
        are CPUs."""
        for name, process in self.processes.items():
            try:
                assert os.WTERMSIG(process.wait(LIMIT)) == number, name
            except TimeoutError:
                stack = Path(f"/proc/{process.pid}/stack").read_text()
                raise AssertionError(f"{name} is still there: {stack}") from None
        wait_until(lambda: not self.fs.client.held(), LIMIT)

    def must_all_go_on(self) -> None:
        """Nobody has noticed anything, and each has the result that it has on the directory itself."""
        deadline = time.monotonic() + 0.7  # longer than it takes to be looked at again
        while time.monotonic() < deadline:
            assert [name for name, process in self.processes.items() if process.finished(0.01)] == []
        # The same waits: Python asks again after an EINTR (PEP 475), which others would have seen.
        found = self._waited_for()
        assert found == {process.pid: self._requests[process.pid] for process in self.processes.values()}
        if self.how == "stub":
            self.fs.proxy()
        else:
            self.fs.client.set_rules([])
        self.must_have_results()

    def _act_natively(self, name: str) -> Any:
        return result_of(CALLS[name], Place(self.fs.base / "native" / name))

    def must_have_results(self) -> None:
        for name, process in self.processes.items():
            if name in _EXECUTED:
                assert process.wait() == 0
                continue
            native = self.fs.run(partial(self._act_natively, name))  # it may leave the current directory
            assert process.result() == native.result(), name

    def close(self) -> None:
        os.close(self._ready)
        if self._tell_go >= 0:
            os.close(self._tell_go)


@pytest.fixture(params=["stub", "rule"])
def calls(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Calls]:
    with mounted(tmp_path) as fs:
        held = Calls(fs, request.param)
        try:
            held.hold()
            yield held
        finally:
            held.close()


@pytest.fixture
def cgroup(request: pytest.FixtureRequest) -> Iterator["Cgroup"]:
    group = Cgroup(request.param)
    try:
        yield group
    finally:
        group.remove()


class Cgroup:
    """A freezer of its own."""

    def __init__(self, version: int) -> None:
        top = Path("/sys/fs/cgroup/freezer" if version == 1 else "/sys/fs/cgroup/unified")
        if version == 2 and not top.is_dir():
            top = Path("/sys/fs/cgroup")
        self._path = top / f"spfs-test-{os.getpid()}-calls"
        self._path.mkdir()
        self._control, self._words = (
            (self._path / "freezer.state", ("THAWED", "FROZEN")) if version == 1
            else (self._path / "cgroup.freeze", ("0", "1"))
        )  # fmt: skip

    def freeze_and_thaw(self, processes: List[Process]) -> None:
        for process in processes:
            (self._path / "cgroup.procs").write_text(str(process.pid))
        self._control.write_text(self._words[1])
        # Each has been told: the freezer's fake signal has ended the sleep that the kernel calls interruptible.
        wait_until(lambda: all(told(process.pid) for process in processes), LIMIT)
        self._control.write_text(self._words[0])

    def remove(self) -> None:
        self._control.write_text(self._words[0])
        wait_until(lambda: not (self._path / "cgroup.procs").read_text(), LIMIT)
        self._path.rmdir()


def told(pid: int) -> bool:
    """It waits where no signal but a fatal one ends the wait any more, or has from the beginning."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"


VERSIONS = [pytest.param(1, marks=pytest.mark.needs_cgroup1), pytest.param(2, marks=pytest.mark.needs_cgroup2)]


class TestFatal:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGQUIT])
    def test_a_signal(self, calls: Calls, number: int) -> None:
        calls.signal(number)
        calls.must_all_die(number)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_after_others_that_were_not(self, calls: Calls, number: int) -> None:
        """The kernel announces the first one alone, and no one as fatal to who has another one pending."""
        calls.signal(signal.SIGUSR1, signal.SIGSTOP, signal.SIGCONT)
        wait_until(lambda: all(told(process.pid) for process in calls.processes.values()), LIMIT)
        calls.signal(number)
        calls.must_all_die(number)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    @pytest.mark.parametrize("cgroup", VERSIONS, indirect=True)
    def test_after_a_freeze(self, calls: Calls, cgroup: Cgroup, number: int) -> None:
        cgroup.freeze_and_thaw(list(calls.processes.values()))
        calls.signal(number)
        calls.must_all_die(number)


class TestNotFatal:
    def test_handled_and_harmless_signals(self, calls: Calls) -> None:
        calls.leave_out(_EXECUTED)  # what is executed does not handle them
        calls.signal(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCHLD, signal.SIGUSR1)
        calls.must_all_go_on()

    def test_stopped_and_continued(self, calls: Calls) -> None:
        calls.signal(signal.SIGTSTP, signal.SIGCONT, signal.SIGSTOP, signal.SIGCONT)
        calls.must_all_go_on()

    @pytest.mark.parametrize("cgroup", VERSIONS, indirect=True)
    def test_frozen_and_thawed(self, calls: Calls, cgroup: Cgroup) -> None:
        cgroup.freeze_and_thaw(list(calls.processes.values()))
        calls.must_all_go_on()

    def test_a_tracer_that_goes_away(self, calls: Calls) -> None:
        calls.leave_out(_EXECUTED)  # nobody can attach to a process inside execve: cred_guard_mutex

        def trace() -> None:
            for process in calls.processes.values():
                assert _libc.ptrace(_PTRACE_SEIZE, process.pid, None, None) == 0
                assert _libc.ptrace(_PTRACE_INTERRUPT, process.pid, None, None) == 0

        tracer = calls.fs.run(trace)
        tracer.result()
        tracer.wait()
        calls.must_all_go_on()

    def test_a_tracer_that_stays(self, calls: Calls) -> None:
        calls.leave_out(_EXECUTED)
        for process in calls.processes.values():
            assert _libc.ptrace(_PTRACE_SEIZE, process.pid, None, None) == 0
            assert _libc.ptrace(_PTRACE_INTERRUPT, process.pid, None, None) == 0
        calls.fs.proxy() if calls.how == "stub" else calls.fs.client.set_rules([])
        for process in calls.processes.values():  # let go by the file system, it stops for us at last
            wait_until(lambda: os.waitpid(process.pid, os.WNOHANG | _WALL)[0] == process.pid, LIMIT)
            assert _libc.ptrace(_PTRACE_DETACH, process.pid, None, None) == 0
        calls.must_have_results()


def test_a_time_limit(calls: Calls) -> None:
    """Each gets the error that was chosen, and nothing else, also who was interrupted by signals before."""
    calls.signal(signal.SIGSTOP, signal.SIGCONT)
    client = calls.fs.client
    if calls.how == "stub":
        client.mode("stub", timeout=0.2, errno="ETIMEDOUT")
    else:
        client.set_rules([replace(rule, seconds=0.2, errno="ETIMEDOUT") for rule in client.rules()])
    for name, process in calls.processes.items():
        if "mapping" in name:
            assert os.WTERMSIG(process.wait()) == signal.SIGBUS, name
        else:
            assert process.result() == _WITHOUT_ERRNO.get(name, "ETIMEDOUT"), name
    assert client.held() == []
