"""Changes of mode while many use the file system: nothing lost, doubled, reordered or answered with an error.

Longer, by hand: STUBFS_CHANGES=5000 python -m pytest tests/system/test_stubfs_switching.py -k under_load
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from stubfs_kit import Filesystem, mounted, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
CHANGES = int(os.environ.get("STUBFS_CHANGES", "150"))


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path, "proxy") as filesystem:
        yield filesystem


class Load:
    """Threads that repeat an action each until stop(), which raises what any of them met."""

    def __init__(self, *actions: Callable[[int], None]) -> None:
        self._stop = threading.Event()
        self._errors: List[BaseException] = []
        self.rounds = [0] * len(actions)
        self._threads = [threading.Thread(target=self._run, args=(i, action)) for i, action in enumerate(actions)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, action: Callable[[int], None]) -> None:
        try:
            while not self._stop.is_set():
                action(self.rounds[number])
                self.rounds[number] += 1
        except BaseException as error:
            self._errors.append(error)

    def is_blocked(self) -> bool:
        """Whether every thread waits in the kernel (an answer, a lock, a page), not for the interpreter."""
        for thread in self._threads:
            task = Path(f"/proc/self/task/{thread.native_id}")
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            stack = (task / "stack").read_text()
            # A close is answered in stub mode, too: it only has to come to its turn.
            if state not in "SD" or "futex" in stack or "fuse_flush" in stack:
                return False
        return True

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self._threads), "blocked for ever"
        if self._errors:
            raise self._errors[0]


@contextmanager
def busy(fs: Filesystem) -> Iterator["Load"]:
    """A Load of all sorts of operations; at the end the mode is proxy, and what was written is checked."""
    (fs.real / "constant").write_bytes(b"constant" * 1000)
    with ExitStack() as stack:
        logs = [stack.enter_context(open(fs.path / f"log{i}", "ab", buffering=0)) for i in range(2)]
        load = Load(*actions(fs, logs))
        try:
            yield load
        finally:
            fs.proxy()
            load.stop()
    for thread in (0, 1):
        lines = (fs.real / f"log{thread}").read_text().split()
        assert [int(line) for line in lines] == list(range(load.rounds[thread]))


def actions(fs: Filesystem, logs: List[FileIO]) -> List[Callable[[int], None]]:
    def appends(log: FileIO) -> Callable[[int], None]:
        return lambda i: (log.write(b"%d\n" % i), None)[1]

    def creates(i: int) -> None:
        path = fs.path / f"c{i}"
        with open(path, "x") as file:
            file.write(str(i))
        assert path.read_text() == str(i)
        os.rename(path, fs.path / f"r{i}")
        os.unlink(fs.path / f"r{i}")

    def directories(i: int) -> None:
        path = fs.path / f"d{i % 7}"
        path.mkdir()
        assert path.name in os.listdir(fs.path)
        path.rmdir()

    def reads(i: int) -> None:
        with open(fs.path / "constant", "rb") as file:
            assert file.read() == b"constant" * 1000

    return [*map(appends, logs), creates, directories, reads, reads]


@pytest.mark.timeout(60 + CHANGES // 5)
def test_proxy_and_stub_under_load(fs: Filesystem) -> None:
    with busy(fs) as load:
        for _ in range(CHANGES):
            fs.client.mode("stub")
            fs.proxy()
    assert min(load.rounds) > 5, load.rounds
    assert fs.client.status().held == 0
    assert "ERROR" not in fs.log.read_text()


@pytest.mark.timeout(60 + CHANGES // 5)
def test_restore_stub_proxy_under_load(tmp_path: Path) -> None:
    with mounted(tmp_path, "restore") as fs:
        for top in (fs.path, fs.real):
            (top / "constant").write_bytes(b"constant" * 1000)

        def reads(i: int) -> None:
            assert (fs.path / "constant").read_bytes() == b"constant" * 1000

        def stats(i: int) -> None:
            assert os.stat(fs.path / "constant").st_size == 8000

        load = Load(reads, reads, stats, stats)
        try:
            for _ in range(CHANGES // 5):
                fs.client.mode("stub")
                fs.proxy()
                fs.client.mode("restore")
                fs.proxy()
                fs.client.mode("restore")
        finally:
            load.stop()
        assert min(load.rounds) > 5
        assert "ERROR" not in fs.log.read_text()


def test_nothing_is_served_in_stub_mode(fs: Filesystem) -> None:
    """Once the change is in force nobody gets on, however busy they were."""
    with busy(fs) as load:
        for _ in range(5):
            fs.client.mode("stub")
            # An answer may still be on its way to its thread; and who waits for a directory's lock is not held by us.
            wait_until(load.is_blocked, 10)
            rounds, held = list(load.rounds), {item.unique for item in fs.client.held()}
            assert held
            time.sleep(0.1)
            assert load.rounds == rounds
            # Nothing was answered; who waited for a lock may have come to us since.
            assert {item.unique for item in fs.client.held()} >= held
            fs.proxy()


def test_stub_again_while_requests_are_let_go(fs: Filesystem) -> None:
    for i in range(200):
        (fs.real / f"f{i}").write_text(str(i))
    fs.client.mode("stub")
    results: List[str] = []
    threads = [
        threading.Thread(target=lambda path: results.append(path.read_text()), args=(fs.path / f"f{i}",), daemon=True)
        for i in range(200)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: fs.client.status().held >= 200, 20)
    for _ in range(20):
        fs.proxy()
        fs.client.mode("stub")
        held = fs.client.held()
        assert [item.unique for item in held] == sorted(item.unique for item in held), "not in their order any more"
    fs.proxy()
    for thread in threads:
        thread.join(20)
    assert sorted(map(int, results)) == list(range(200))
    assert fs.client.status().held == 0


def test_new_requests_are_not_starved_by_those_let_go(fs: Filesystem) -> None:
    for i in range(50):
        (fs.real / f"f{i}").write_text("x")
    fs.client.mode("stub")
    threads = [
        threading.Thread(target=os.path.exists, args=(fs.path / f"f{i}",), daemon=True) for i in range(1000)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: fs.client.status().held >= 1000, 30)
    fs.proxy()
    start = time.monotonic()
    os.stat(fs.path / "f0")
    assert time.monotonic() - start < 0.5
    for thread in threads:
        thread.join(20)


def test_releases_and_forgets_are_not_lost(fs: Filesystem) -> None:
    for i in range(20):
        (fs.real / f"f{i}").write_text("x")
    files = [open(fs.path / f"f{i}") for i in range(20)]
    assert len(fs.client.handles()) == 20
    fs.client.mode("stub")
    for file in files:
        file.close()
    fs.proxy()
    wait_until(lambda: not fs.client.handles(), 5)
    # Unlinked behind the kernel's back and looked up again: the nodes go with the kernel's references.
    for i in range(20):
        os.unlink(fs.path / f"f{i}")
    wait_until(lambda: fs.client.status().nodes == 1, 5)


def test_a_mode_change_is_quick(fs: Filesystem) -> None:
    for i in range(100):
        (fs.path / f"f{i}").write_text("x")
    durations = []
    for _ in range(21):
        start = time.perf_counter()
        fs.client.mode("stub")
        middle = time.perf_counter()
        fs.proxy()
        durations += [middle - start, time.perf_counter() - middle]
    assert sorted(durations)[len(durations) // 2] < 0.010
