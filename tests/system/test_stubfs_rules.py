"""Rules on a real mount: what is held, failed, delayed or served against the mode, for whom, and until when."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator, List, Optional

import pytest
from stubfs_kit import Filesystem, mounted, wait_until

from stubfs import messages, wire
from stubfs.client import FilesystemClient
from stubfs.errors import StubfsError
from stubfs.rules import Rule

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
LIMIT = 10.0


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path, "proxy") as filesystem:
        (filesystem.real / "d").mkdir()
        for name in ("f", "g", "d/f"):
            (filesystem.real / name).write_bytes(b"real " + name.encode())
        yield filesystem


def errno_of(action: Callable[[], object]) -> Optional[int]:
    try:
        action()
    except OSError as error:
        return error.errno
    return None


def sync(path: Path) -> None:
    with open(path, "ab") as file:
        os.fsync(file.fileno())


def pipes(fs: Filesystem) -> int:
    """How many ends of pipes the file system has open; a wait has two."""
    count = 0
    for path in Path(f"/proc/{fs.daemon.pid}/fd").iterdir():
        try:
            count += os.readlink(path).startswith("pipe:")
        except FileNotFoundError:
            pass  # closed meanwhile
    return count


class TestHold:
    def test_one_operation_hangs_and_no_other(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("hold", operations=["fsync"])])
        process = fs.run(lambda: sync(fs.path / "f"))
        assert fs.client.wait_held(1, LIMIT) == 1
        assert [(item.operation, item.pid, item.path) for item in fs.client.held()] == [("fsync", process.pid, "f")]
        assert (fs.path / "f").read_bytes() == b"real f"
        (fs.path / "new").write_text("new")
        assert not process.finished()
        fs.client.set_rules([])
        process.result()
        assert fs.client.rules() == [] and (fs.real / "new").read_text() == "new"

    def test_one_process_and_no_other(self, fs: Filesystem) -> None:
        ready = fs.base / "ready"
        process = fs.run(lambda: (wait_until(ready.exists), (fs.path / "f").read_text())[1])
        other = fs.run(lambda: (wait_until(ready.exists), (fs.path / "g").read_text())[1])
        fs.client.set_rules([Rule("hold", pids=[process.pid])])
        ready.touch()
        fs.client.wait_held(1, LIMIT, pids=[process.pid])
        assert other.result() == "real g" and not process.finished()
        fs.client.set_rules([])
        assert process.result() == "real f"

    def test_by_a_thread_of_the_process(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("hold", pids=[os.getpid()])])
        thread = threading.Thread(target=os.path.exists, args=(fs.path / "g",))
        thread.start()
        fs.client.wait_held(1, LIMIT)
        (held,) = fs.client.held()
        assert held.tid == thread.native_id and held.pid == os.getpid()
        fs.client.set_rules([])
        thread.join(LIMIT)
        assert not thread.is_alive()

    def test_paths(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("hold", path="d/*")])
        process = fs.run(lambda: (fs.path / "d/f").read_text())
        fs.client.wait_held(1, LIMIT, path="d/f", operations=["lookup"])
        assert (fs.path / "f").read_text() == "real f" and os.listdir(fs.path / "d") == ["f"]
        fs.client.set_rules([Rule("hold", operations=["rename"], path="new*")])
        assert process.result() == "real d/f"
        renamed = fs.run(lambda: os.rename(fs.path / "f", fs.path / "new name"))
        fs.client.wait_held(1, LIMIT, operations=["rename"], path="f")
        fs.client.set_rules([])
        renamed.result()

    def test_who_is_held_by_a_rule_can_be_killed(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("hold", operations=["read"])])
        process = fs.run((fs.path / "f").read_text)
        fs.client.wait_held(1, LIMIT)
        process.kill()
        process.wait(3)
        assert fs.client.held() == []

    def test_the_mode_can_change_under_it(self, fs: Filesystem) -> None:
        """Nothing that a rule holds is let go by a change of mode, nor what a mode holds by a rule that ends."""
        fs.client.set_rules([Rule("hold", operations=["fsync"], times=1)])
        syncing = fs.run(lambda: sync(fs.path / "f"))
        fs.client.wait_held(1, LIMIT)
        fs.client.mode("stub")
        reading = fs.run((fs.path / "g").read_text)
        fs.client.wait_held(2, LIMIT)
        fs.proxy()
        assert reading.result() == "real g"
        assert [item.operation for item in fs.client.held()] == ["fsync"]
        sync(fs.path / "g")  # the second one
        fs.client.mode("stub")
        fs.client.set_rules([])
        assert [item.operation for item in fs.client.held()] == ["fsync"] and not syncing.finished()
        fs.proxy()
        syncing.result()

    def test_an_open_of_a_file_whose_pages_a_held_read_has_locked(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("hold", operations=["read"])])
        readers = [fs.run((fs.path / "f").read_text) for _ in range(2)]
        fs.client.wait_held(1, LIMIT)
        opener = fs.run(lambda: os.close(os.open(fs.path / "f", os.O_RDONLY)))
        opener.result(5)
        for reader in readers:
            assert not reader.finished()
        readers[0].kill()
        readers[0].wait(3)
        fs.client.set_rules([])
        assert readers[1].result() == "real f"


class TestFail:
    def test_with_an_errno(self, fs: Filesystem) -> None:
        fs.client.set_rules([
            Rule("fail", operations=["write"], errno="ENOSPC", path="d/*"),
            Rule("fail", operations=["unlink"]),
        ])  # fmt: skip
        with open(fs.path / "d/f", "wb", buffering=0) as file:
            assert errno_of(lambda: file.write(b"x")) == errno.ENOSPC
        (fs.path / "f").write_bytes(b"written")
        assert errno_of((fs.path / "f").unlink) == errno.EIO
        assert (fs.real / "f").read_bytes() == b"written"

    def test_reads_of_what_the_kernel_has_cached_fail_as_well(self, fs: Filesystem) -> None:
        with open(fs.path / "f", "rb", buffering=0) as file:
            assert file.read() == b"real f"
            fs.client.set_rules([Rule("fail", operations=["read"])])
            file.seek(0)
            assert errno_of(file.read) == errno.EIO
            fs.client.set_rules([])
            assert file.read() == b"real f"

    def test_the_first_two_times(self, fs: Filesystem) -> None:
        """What a program that tries again meets."""
        fs.client.set_rules([Rule("fail", operations=["open"], errno="EAGAIN", times=2)])
        found = [errno_of((fs.path / "f").read_bytes) for _ in range(4)]
        assert found == [errno.EAGAIN, errno.EAGAIN, None, None]

    def test_pages_that_are_written_back(self, fs: Filesystem) -> None:
        (fs.real / "m").write_bytes(b"m" * mmap.PAGESIZE)
        with open(fs.path / "m", "r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapping:
            mapping[0:1] = b"X"
            # Setting it writes back what is dirty, under the former rules.
            fs.client.set_rules([Rule("fail", operations=["write"]), Rule("hold", operations=["write"])])
            assert (fs.real / "m").read_bytes()[:1] == b"X"
            mapping[1:2] = b"Y"
            assert errno_of(mapping.flush) == errno.EIO
            fs.client.set_rules([Rule("hold", operations=["write"])])
            mapping[2:3] = b"Z"
            mapping.flush()  # never held: exit and kill -9 would hang behind it
        assert (fs.real / "m").read_bytes()[2:3] == b"Z"

    def test_a_handle_is_released_all_the_same(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("fail", operations=["read", "flush", "getattr"])])
        fd = os.open(fs.path / "f", os.O_RDONLY)
        assert len(fs.client.handles()) == 1
        assert errno_of(lambda: os.close(fd)) == errno.EIO
        wait_until(lambda: not fs.client.handles(), 5)


class TestDelay:
    def test_every_request_is_slower(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("delay", seconds=0.05)])
        start = time.monotonic()
        os.stat(fs.path / "f")  # a lookup and its attributes
        assert 0.05 <= time.monotonic() - start < 1.0
        fs.client.set_rules([])
        start = time.monotonic()
        os.stat(fs.path / "f")
        assert time.monotonic() - start < 0.05

    def test_many_at_once_are_not_delayed_by_each_other(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("delay", seconds=0.5, operations=["lookup"])])
        processes = [fs.run(lambda: os.path.exists(fs.path / f"{os.getpid()}")) for _ in range(20)]
        start = time.monotonic()
        for process in processes:
            assert process.result() is False
        assert time.monotonic() - start < 5  # and not 20 times half a second

    def test_delayed_in_stub_mode_and_then_held(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("delay", seconds=0.05, operations=["lookup"])])
        fs.client.mode("stub")
        process = fs.run((fs.path / "f").read_text)
        fs.client.wait_held(1, LIMIT)
        assert not process.finished(0.3)
        fs.proxy()
        assert process.result() == "real f"


class TestServe:
    def test_all_but_one_directory_hang(self, fs: Filesystem) -> None:
        fs.client.set_rules([Rule("serve", path="d"), Rule("serve", path="d/*")])
        fs.client.mode("stub")
        assert (fs.path / "d/f").read_text() == "real d/f"
        process = fs.run((fs.path / "f").read_text)
        fs.client.wait_held(1, LIMIT)
        fs.proxy()
        assert process.result() == "real f"


class TestSoft:
    def test_an_error_after_the_timeout(self, fs: Filesystem) -> None:
        fs.client.mode("stub", timeout=0.3, errno="ETIMEDOUT")
        start = time.monotonic()
        assert errno_of((fs.path / "f").read_text) == errno.ETIMEDOUT
        assert 0.3 <= time.monotonic() - start < 3
        os.stat(fs.path)  # answered as ever
        fs.client.mode("stub", timeout=0.1)
        assert errno_of((fs.path / "f").read_text) == errno.EIO
        waiting = fs.run((fs.path / "g").read_text)
        fs.client.mode("stub")  # without: for ever, also for whoever waits already
        assert fs.client.wait_held(1, LIMIT) == 1 or waiting.finished()
        fs.proxy()
        assert (fs.path / "f").read_text() == "real f"

    def test_thousands_at_the_same_time(self, fs: Filesystem) -> None:
        found: List[Optional[int]] = []
        threads = [
            threading.Thread(target=lambda i=i: found.append(errno_of(lambda: os.stat(fs.path / f"n{i}"))))
            for i in range(1000)
        ]
        fs.client.mode("stub", timeout=1.5)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert found == [errno.EIO] * 1000 and fs.client.status().held == 0

    def test_options_end_with_the_mode(self, fs: Filesystem) -> None:
        fs.client.mode("stub", timeout=0.1, exempt=[os.getpid()])
        fs.proxy()
        fs.client.mode("stub")
        process = fs.run((fs.path / "f").read_text)
        fs.client.wait_held(1, LIMIT)
        assert not process.finished(0.3)
        fs.proxy()
        assert process.result() == "real f"


class TestWaitHeld:
    def test_time_over(self, fs: Filesystem) -> None:
        fs.client.mode("stub")
        process = fs.run((fs.path / "f").read_text)
        fs.client.wait_held(1, LIMIT)
        with pytest.raises(StubfsError) as caught:
            fs.client.wait_held(2, 0.1)
        assert caught.value.errno == errno.ETIMEDOUT and "for 2 held requests: 1 after 0.1 s" in str(caught.value)
        assert fs.client.status().held == 1  # the connection goes on
        fs.proxy()
        process.result()

    def test_a_client_that_hangs_up(self, fs: Filesystem) -> None:
        fs.client.status()  # it has started, and needs the pipe of its start no more
        before = pipes(fs)
        sock = wire.connect(fs.socket_path)
        with sock:
            wire.send(sock, messages.encode({"command": "wait_held", "count": 5}))
            wait_until(lambda: pipes(fs) == before + 2, 10)  # the one that wakes it
        wait_until(lambda: pipes(fs) == before, 10)
        assert fs.client.status().mode == "proxy"

    def test_the_end_of_the_file_system(self, fs: Filesystem) -> None:
        """Whoever waits is told."""
        fs.client.status()  # as above
        before = pipes(fs)
        with FilesystemClient(fs.socket_path) as waiting, ThreadPoolExecutor() as pool:
            wait = pool.submit(waiting.wait_held, 1)
            wait_until(lambda: pipes(fs) == before + 2, 10)
            fs.client.quit()
            with pytest.raises(StubfsError, match="the file system ends") as caught:
                wait.result(LIMIT)
        assert caught.value.errno == errno.ESHUTDOWN

    def test_an_event_and_no_polling(self, fs: Filesystem) -> None:
        """Answered at the moment when the last one comes, however many wait for it."""
        fs.client.mode("stub")
        found: List[int] = []

        def wait(count: int) -> None:
            with FilesystemClient(fs.socket_path) as client:
                found.append(client.wait_held(count, LIMIT, operations=["lookup"]))

        waiters = [threading.Thread(target=wait, args=(count,)) for count in (1, 2, 3)]
        for waiter in waiters:
            waiter.start()
        processes = [fs.run(lambda: os.path.exists(fs.path / str(os.getpid()))) for _ in range(3)]
        for waiter in waiters:
            waiter.join(LIMIT)
        assert sorted(found)[-1] == 3 and len(found) == 3
        fs.proxy()
        for process in processes:
            assert process.result() is False


class TestBadInput:
    @pytest.mark.parametrize(
        "packet",
        [
            {"command": "rules", "rules": {}}, {"command": "rules", "rules": [{"action": "hold"}, {"action": "?"}]},
            {"command": "rules", "rules": [{"action": "hold", "pids": [2**30]}]},
            {"command": "mode", "mode": "proxy", "timeout": 5}, {"command": "mode", "mode": "stub", "timeout": -5},
            {"command": "mode", "mode": "stub", "errno": "EIO"}, {"command": "mode", "mode": "stub", "exempt": [2**30]},
            {"command": "mode", "mode": "stub", "timeout": 5, "errno": 1000},
            {"command": "wait_held", "count": 0}, {"command": "wait_held", "count": "1"},
            {"command": "wait_held", "timeout": "x"}, {"command": "wait_held", "operations": ["none"]},
            {"command": "held", "path": 5},
        ],
    )  # fmt: skip
    def test_changes_nothing(self, fs: Filesystem, packet: "dict[str, object]") -> None:
        fs.client.set_rules([Rule("hold", path="nothing")])
        sock: socket.socket = wire.connect(fs.socket_path, LIMIT)
        with sock:
            wire.send(sock, messages.encode(packet))
            answer = wire.receive(sock, messages.STATUS.size)
        assert answer is not None
        (status,) = messages.STATUS.unpack(answer[0])
        message = messages.decode(answer[1])["message"]
        assert status in (-errno.EINVAL, -errno.ESRCH) and message.startswith("cannot "), message
        assert fs.client.status().mode == "proxy" and fs.client.rules() == [Rule("hold", path="nothing")]


def test_from_the_command_line(tmp_path: Path) -> None:
    options = ["--timeout", "0.2", "--errno", "ENODATA", "--exempt", str(os.getpid()), "--rule", "fail path=broken"]
    with mounted(tmp_path, "stub", options=options) as fs:
        (fs.path / "f").write_text("by the exempt one")
        assert errno_of((fs.path / "f").stat) is None
        assert fs.run(lambda: errno_of((fs.path / "f").read_text)).result() == errno.ENODATA
        assert fs.client.rules() == [Rule("fail", path="broken")]
        assert fs.run(lambda: errno_of((fs.path / "broken").stat)).result() == errno.EIO
