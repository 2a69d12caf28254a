"""Blocking as one meets it in life: terminals, unmounts of all sorts, thousands of changes, servers that hang."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import pytest
from stubfs_kit import LIMIT, Filesystem, Process, abort, mounted, wait_until

from spfs.testing import process_state
from stubfs import syscalls
from stubfs.rules import Rule

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
_MNT_FORCE = 1


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path) as filesystem:
        for top in (filesystem.path, filesystem.real):
            for name in "fgh":
                (top / name).write_text(name * 100_000)
        yield filesystem


def errno_of_read(path: Path) -> Optional[int]:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno
    return None


class TestTerminals:
    """A shell with job control on a terminal of its own, and a program that waits in its foreground."""

    @pytest.fixture
    def shell(self, fs: Filesystem) -> Iterator["Shell"]:
        fs.client.mode("stub")
        shell = Shell()
        try:
            yield shell
        finally:
            shell.close()

    def test_control_c_ends_who_waits(self, fs: Filesystem, shell: "Shell") -> None:
        shell.type(f"cat {fs.path}/f\n")
        fs.client.wait_held(1, LIMIT)
        start = time.monotonic()
        shell.type("\x03")
        wait_until(lambda: not fs.client.held(), LIMIT)
        assert time.monotonic() - start < 1
        shell.type("echo status=$?\n")
        shell.until("status=130")
        assert fs.client.held() == []

    def test_control_z_and_fg(self, fs: Filesystem, shell: "Shell") -> None:
        """It stops when it has its answer; until then it waits on, and no error is ever seen."""
        shell.type(f"cat {fs.path}/f >{fs.base}/copy\n")
        fs.client.wait_held(1, LIMIT)
        (held,) = fs.client.held()
        shell.type("\x1a")
        wait_until(lambda: b"SigPnd:\t0000000000000000" not in Path(f"/proc/{held.pid}/status").read_bytes()
                   or b"ShdPnd:\t0000000000000000" not in Path(f"/proc/{held.pid}/status").read_bytes(), LIMIT)
        assert [item.unique for item in fs.client.held()] == [held.unique]
        fs.proxy()
        wait_until(lambda: process_state(held.pid) == "T", LIMIT)
        shell.until("Stopped")
        shell.type("fg\necho status=$?\n")
        shell.until("status=0")
        assert (fs.base / "copy").read_text() == "f" * 100_000


class Shell:
    """bash on a pseudo terminal."""

    def __init__(self) -> None:
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            os.environ["PS1"] = "$ "
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        self._seen = ""

    def type(self, text: str) -> None:
        self._seen = ""
        # Its echo must not be taken for the answer.
        os.write(self._terminal, text.replace("echo status", 'ec""ho status').encode())

    def until(self, text: str) -> str:
        """What it shows until ``text`` comes."""

        deadline = time.monotonic() + LIMIT
        while text not in self._seen:
            remaining = deadline - time.monotonic()
            assert remaining > 0 and select.select([self._terminal], [], [], remaining)[0], self._seen
            self._seen += os.read(self._terminal, 4096).decode()
        return self._seen

    def close(self) -> None:
        os.close(self._terminal)
        for number in (signal.SIGHUP, signal.SIGKILL):
            os.kill(self.pid, number)
        os.waitpid(self.pid, 0)


class TestDeaths:
    def test_by_kill_in_every_operation(self, fs: Filesystem) -> None:
        file = open(fs.path / "f", "r+b", buffering=0)
        directory = os.open(fs.path, os.O_RDONLY)
        fs.client.mode("stub")
        actions = {
            "read": lambda: os.pread(file.fileno(), 10, 0),
            "fsync": lambda: os.fsync(file.fileno()),
            "readdir": lambda: os.listdir(directory),
            "getattr": lambda: os.fstat(file.fileno()),
            "lookup": lambda: os.stat(fs.path / "none"),
            "open": lambda: os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY),
            "statfs": lambda: os.statvfs(fs.path),
            "setattr": lambda: os.fchmod(file.fileno(), 0o600),
            # May ask for the file's capabilities first, which it takes away.
            "write getxattr": lambda: os.pwrite(file.fileno(), b"x", 0),
            "fallocate getxattr": lambda: os.posix_fallocate(file.fileno(), 0, 10),
        }
        for operation, action in actions.items():
            process = fs.run(action)
            fs.client.wait_held(1, LIMIT, operations=operation.split())
            start = time.monotonic()
            process.kill()
            process.wait(3)
            assert time.monotonic() - start < 1, operation
            wait_until(lambda: not fs.client.held(), 1, operation)
        os.close(directory)
        file.close()

    def test_the_reads_of_the_dead_do_not_count(self, fs: Filesystem) -> None:
        with open(fs.path / "f", "rb", buffering=0) as file:
            fs.client.mode("stub")
            dead = [fs.run(lambda: file.read(10)) for _ in range(3)]
            fs.client.wait_held(1, LIMIT)
            # All at once: they share an offset, and whoever waits for its lock cannot be killed.
            for process in dead:
                process.kill()
            for process in dead:
                process.wait(3)
            # The kernel does not announce it, so that we look: before every answer, and from time to time.
            wait_until(lambda: fs.client.status().held == 0, 3)
            alive = fs.run(lambda: file.read(1))
            assert fs.client.wait_held(1, LIMIT) == 1
            assert [item.pid for item in fs.client.held()] == [alive.pid]
            fs.proxy()
            assert alive.result() == b"f"


class TestUnmounts:
    def waiting(self, fs: Filesystem) -> List[Process]:
        fs.client.mode("stub")
        processes = [fs.run(partial(errno_of_read, fs.path / name)) for name in "fgh"]
        fs.client.wait_held(3, LIMIT)
        return processes

    def test_by_force(self, fs: Filesystem) -> None:
        """umount -f ends the connection, whoever waits; the mount itself goes with its last user."""
        processes = self.waiting(fs)
        try:
            syscalls.umount2(os.fsencode(fs.path), _MNT_FORCE)
        except OSError as error:
            assert error.errno == errno.EBUSY
        for process in processes:
            assert process.result() in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
        assert fs.daemon.wait(5) == 0
        assert not os.path.exists(fs.socket_path) and str(fs.path) not in Path("/proc/self/mountinfo").read_text()

    def test_by_the_control_file_system(self, fs: Filesystem) -> None:
        processes = self.waiting(fs)
        abort(fs.device)
        for process in processes:
            assert process.result() in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
        assert fs.daemon.wait(5) == 0

    def test_lazily_while_requests_are_held(self, fs: Filesystem) -> None:
        """Who waits is served in the end, as long as anybody is there; then the file system ends."""
        processes = self.waiting(fs)
        syscalls.umount2(os.fsencode(fs.path), syscalls.MNT_DETACH)
        assert not any(process.finished(0.1) for process in processes) and fs.daemon.poll() is None
        assert fs.client.status().held == 3
        fs.proxy()
        assert [process.result() for process in processes] == [None] * 3
        assert fs.daemon.wait(5) == 0


class Changes:
    """Threads and processes under load while modes change; what each of them must find is checked as it goes."""

    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs

    def appender(self, number: int) -> int:
        """One caller's writes must come in its order, none twice, none lost."""
        count = 0
        with open(self.fs.path / f"log{number}", "ab", buffering=0) as log:
            while not (self.fs.base / "stop").exists():
                log.write(b"%d\n" % count)
                count += 1
        return count

    def creator(self, number: int) -> int:
        count = 0
        while not (self.fs.base / "stop").exists():
            path = self.fs.path / f"c{number}-{count}"
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)  # a second time it would fail
            os.write(fd, b"%d" % count)
            os.close(fd)
            count += 1
        return count

    def reader(self) -> int:
        count = 0
        with open(self.fs.path / "f", "rb", buffering=0) as file:
            while not (self.fs.base / "stop").exists():
                assert os.pread(file.fileno(), 200_000, 0) == b"f" * 100_000
                assert (self.fs.path / "g").stat().st_size == 100_000
                count += 1
        return count


@pytest.mark.timeout(300)
def test_a_thousand_changes_under_load(fs: Filesystem) -> None:
    fs.proxy()
    load = Changes(fs)
    appenders = [fs.run(partial(load.appender, number)) for number in range(3)]
    creators = [fs.run(partial(load.creator, number)) for number in range(3)]
    readers = [fs.run(load.reader) for _ in range(3)]
    everybody = [*appenders, *creators, *readers]
    for number in range(500):
        fs.client.mode("stub", timeout=1000 if number % 3 else None)
        if number % 10 == 0:
            fs.client.wait_held(3, LIMIT)
        if number % 7 == 0:
            fs.client.set_rules([Rule("delay", seconds=0.001, operations=["write", "create"])] if number % 2 else [])
        fs.proxy()
    (fs.base / "stop").touch()
    counts = [process.result() for process in everybody]
    assert min(counts) > 5
    for number in range(3):
        lines = (fs.real / f"log{number}").read_text().split()
        assert [int(line) for line in lines] == list(range(counts[number]))
        created = {path.name: path.read_text() for path in fs.real.glob(f"c{number}-*")}
        assert created == {f"c{number}-{i}": str(i) for i in range(counts[3 + number])}
    wait_until(lambda: fs.client.status().held == 0 and not fs.client.handles(), 5)
    assert "ERROR" not in fs.log.read_text()


class TestHungServer:
    """The real file system is another one of ours, in stub mode."""

    def test_two_hundred_hung_requests(self, tmp_path: Path) -> None:
        with mounted(tmp_path, "proxy", name="server") as server, mounted(tmp_path, name="client") as client:
            (client.path / "kept").write_text("kept")
            (server.real / "d").mkdir()
            for i in range(200):
                (server.real / f"d/f{i}").write_text(str(i))
            (server.real / "f").write_text("contents")
            client.proxy(server.path)
            assert (client.path / "f").read_text() == "contents"
            before = threads_of(client)
            # Hangs in d alone; what is elsewhere on the same server is served all the time.
            server.client.set_rules([Rule("hold", path="d/*")])
            hung = [client.run((client.path / f"d/f{i}").read_text) for i in range(200)]
            server.client.wait_held(200, LIMIT * 2)
            durations = []
            for i in range(100):
                start = time.perf_counter()
                assert (client.path / "f").read_text() == "contents"
                (client.path / "new").write_text(str(i))
                (client.path / "new").unlink()
                durations.append(time.perf_counter() - start)
            assert sorted(durations)[50] < 0.25
            assert not any(process.finished() for process in hung)
            client.client.status()
            for process in hung[:50]:
                process.kill()
            for process in hung[:50]:
                process.wait(5)
            server.client.set_rules([])
            assert [process.result() for process in hung[50:]] == [str(i) for i in range(50, 200)]
            wait_until(lambda: threads_of(client) <= before + 4, 5)

    def test_an_open_of_a_file_whose_read_hangs(self, tmp_path: Path) -> None:
        """The kernel would drop the pages of the file, and wait for those that the read has locked."""
        with mounted(tmp_path, "proxy", name="server") as server, mounted(tmp_path, name="client") as client:
            (server.real / "f").write_text("contents")
            client.proxy(server.path)
            server.client.set_rules([Rule("hold", operations=["read"])])
            reader = client.run((client.path / "f").read_text)
            server.client.wait_held(1, LIMIT)
            opener = client.run(lambda: os.fstat(os.open(client.path / "f", os.O_RDONLY)).st_size)
            assert opener.result(5) == 8
            server.client.set_rules([])
            assert reader.result() == "contents"


def threads_of(fs: Filesystem) -> int:
    return len(os.listdir(f"/proc/{fs.daemon.pid}/task"))


def resident(fs: Filesystem) -> int:
    """KiB."""
    for line in Path(f"/proc/{fs.daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_ten_thousand_of_all_sorts_each_answered_once(fs: Filesystem) -> None:
    """Reads, stats, opens and creates, in one directory; nobody gets two answers, and nobody none."""
    per_process, kinds = 625, ("read", "stat", "open", "create")
    for top in (fs.path, fs.real):
        for i in range(per_process * 4):
            (top / f"r{i}").write_bytes(b"x" * 10)
    fs.client.mode("restore")

    def wait_in_threads(number: int) -> Dict[str, int]:
        kind, first = kinds[number % 4], number // 4 * per_process
        found: List[object] = []
        files = [os.open(fs.path / f"r{first + i}", os.O_RDONLY) for i in range(per_process)] if kind == "read" else []
        ready.set()
        wait_until((fs.base / "go").exists, 60)

        def act(i: int) -> None:
            if kind == "read":
                found.append(os.pread(files[i], 100, 0))
            elif kind == "stat":
                found.append(os.stat(fs.path / f"r{first + i}").st_size)
            elif kind == "open":
                os.close(os.open(fs.path / f"r{first + i}", os.O_RDONLY))
                found.append(0)
            else:
                os.close(os.open(fs.path / f"n{number}/{i}", os.O_CREAT | os.O_EXCL))
                found.append(0)

        threading.stack_size(64 << 10)
        threads = [threading.Thread(target=act, args=(i,)) for i in range(per_process)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {kind: len(found)}

    import multiprocessing

    ready = multiprocessing.Event()
    for number in range(16):
        for top in (fs.path, fs.real):
            (top / f"n{number}").mkdir()
    # The kernel knows the names: lookups of unknown ones would lock the directory.
    children = [fs.run(partial(wait_in_threads, number)) for number in range(16)]
    ready.wait(LIMIT)
    before = resident(fs)
    wait_until(lambda: fs.client.status().handles == 4 * per_process, LIMIT)
    fs.client.mode("stub")
    (fs.base / "go").touch()
    fs.client.wait_held(16 * per_process, 60)
    assert resident(fs) - before < 15 << 10
    assert len(fs.client.held()) == 16 * per_process
    fs.proxy()
    results = [child.result(60) for child in children]
    assert results == [{kinds[number % 4]: per_process} for number in range(16)]
    for number in range(3, 16, 4):
        assert len(os.listdir(fs.real / f"n{number}")) == per_process
    wait_until(lambda: fs.client.status().held == 0, 5)
    assert "ERROR" not in fs.log.read_text(), json.dumps(fs.log.read_text())
    assert subprocess.run(["ls", str(fs.path)], stdout=subprocess.DEVNULL, timeout=LIMIT).returncode == 0
