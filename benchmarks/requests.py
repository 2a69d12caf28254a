"""Microseconds per operation: stubfs against the native directory, plain fusepy loopbacks, and bindfs.

``python -m benchmarks.requests [--json] [--count N] [--only TEXT]``. All in one run: as root and as another user,
pinned to one CPU and not; the median of several rounds. A round takes the file systems in turn, so that a slow moment
of the machine meets them all. Beside the time that passes, the CPU time of caller and server together: it says more
where the CPUs have other work. The loopback comes twice, because the kernel remembers names and attributes for a
second on its behalf, and nothing on behalf of stubfs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Tuple

from rich.console import Console
from rich.table import Table

from benchmarks.filesystems import NATIVE, PLAIN, UNCACHED, mounted

_ROUNDS = 5
_NOBODY = 65534
_THREADS = 8
_BLOCK = 1 << 20
_BIG = 32 << 20  # bytes of the file that is read and written as a whole
_PAGE = 4096
_MEAN = "metadata, geometric mean"
_CALLERS = {"root": 0, "another user": _NOBODY}

Figures = Dict[str, Dict[str, float]]
"""File system -> operation -> microseconds."""


def create_truncate_close(directory: str, count: int) -> int:
    for i in range(count):
        fd = os.open(f"{directory}/c{i}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.ftruncate(fd, 100)
        os.close(fd)
    return count


def open_close(directory: str, count: int) -> int:
    for i in range(count):
        os.close(os.open(f"{directory}/c{i}", os.O_RDONLY))
    return count


def stat_file(directory: str, count: int) -> int:
    for i in range(count):
        os.stat(f"{directory}/c{i}")
    return count


def stat_as_two_users(directory: str, count: int) -> int:
    caller = os.geteuid()
    try:
        for i in range(count):
            os.seteuid(_NOBODY if i % 2 else 0)
            os.stat(f"{directory}/c{i}")
    finally:
        os.seteuid(0)
        os.seteuid(caller)
    return count


def stat_by_threads(directory: str, count: int) -> int:
    threads = [threading.Thread(target=stat_file, args=(directory, count)) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count * _THREADS


def rename(directory: str, count: int) -> int:
    for i in range(count):
        os.rename(f"{directory}/c{i}", f"{directory}/r{i}")
    for i in range(count):
        os.rename(f"{directory}/r{i}", f"{directory}/c{i}")
    return 2 * count


def make_directories(directory: str, count: int) -> int:
    for i in range(count):
        os.mkdir(f"{directory}/d{i}")
    for i in range(count):
        os.rmdir(f"{directory}/d{i}")
    return 2 * count


def list_directory(directory: str, count: int) -> int:
    return sum(len(os.listdir(directory)) for _ in range(5))


def unlink(directory: str, count: int) -> int:
    for i in range(count):
        os.unlink(f"{directory}/c{i}")
    return count


def write_page(directory: str, count: int) -> int:
    data = bytes(_PAGE)
    fd = os.open(f"{directory}/page", os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        for _ in range(count):
            os.pwrite(fd, data, 0)
    finally:
        os.close(fd)
    return count


def write_big(directory: str, count: int) -> int:
    data = bytes(_BLOCK)
    fd = os.open(f"{directory}/big", os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        for offset in range(0, _BIG, _BLOCK):
            os.pwrite(fd, data, offset)
    finally:
        os.close(fd)
    return _BIG // _BLOCK


@contextmanager
def _uncached(directory: str, advice: int) -> Iterator[int]:
    """The big file, of which the kernel has no page: without an effect on tmpfs itself, which is nothing but pages."""
    fd = os.open(f"{directory}/big", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, advice)
        yield fd
    finally:
        os.close(fd)


def read_page(directory: str, count: int) -> int:
    pages = _BIG // _PAGE
    with _uncached(directory, os.POSIX_FADV_RANDOM) as fd:
        for i in range(count):
            os.pread(fd, _PAGE, i * 1117 % pages * _PAGE)  # 1117 is coprime to the number: no page twice
    return count


def read_big(directory: str, count: int) -> int:
    buffer = bytearray(_BLOCK)
    with _uncached(directory, os.POSIX_FADV_SEQUENTIAL) as fd:
        for offset in range(0, _BIG, _BLOCK):
            os.preadv(fd, [buffer], offset)
    return _BIG // _BLOCK


@dataclass(frozen=True)
class Operation:
    """``run`` does it in a directory about ``count`` times and returns how often it did."""

    name: str
    run: Callable[[str, int], int]
    is_metadata: bool = True


# In this order: each needs what those before have left.
OPERATIONS = (
    Operation("create+truncate+close", create_truncate_close),
    Operation("open+close", open_close),
    Operation("stat", stat_file),
    Operation("stat, as two users in turn", stat_as_two_users),
    Operation(f"stat, {_THREADS} threads", stat_by_threads),
    Operation("rename", rename),
    Operation("mkdir, rmdir", make_directories),
    Operation("list, per name", list_directory),
    Operation("unlink", unlink),
    Operation("write 4 KiB", write_page, is_metadata=False),
    Operation("write 1 MiB, sequential", write_big, is_metadata=False),
    Operation("read 4 KiB, random", read_page, is_metadata=False),
    Operation("read 1 MiB, sequential", read_big, is_metadata=False),
)


@contextmanager
def _acting_as(uid: int) -> Iterator[None]:
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


_Samples = Dict[str, Dict[str, List[float]]]


def measure(count: int, uid: int, operations: Tuple[Operation, ...]) -> Tuple[Figures, Figures]:
    """The time that passes, and the CPU time."""
    passed: _Samples = {}
    used: _Samples = {}
    with mounted() as places:
        with _acting_as(uid):
            for _ in range(_ROUNDS):
                for operation in operations:
                    for name, place in places.items():
                        start, cpu = time.perf_counter(), time.process_time() + place.cpu_seconds()
                        done = operation.run(place.directory, count)
                        seconds = time.perf_counter() - start, time.process_time() + place.cpu_seconds() - cpu
                        for samples, value in zip((passed, used), seconds):
                            samples.setdefault(name, {}).setdefault(operation.name, []).append(value / done * 1e6)
    return _medians(passed, operations), _medians(used, operations)


def _medians(samples: _Samples, operations: Tuple[Operation, ...]) -> Figures:
    figures = {
        name: {operation: statistics.median(values) for operation, values in of_place.items()}
        for name, of_place in samples.items()
    }
    metadata = [operation.name for operation in operations if operation.is_metadata]
    if metadata:
        for values in figures.values():
            values[_MEAN] = statistics.geometric_mean(values[name] for name in metadata)
    return figures


def _table(title: str, figures: Figures) -> Table:
    table = Table(title=f"{title}: µs per operation (× native; × loopback; × loopback without caches)")
    table.add_column("operation")
    for name in figures:
        table.add_column(name, justify="right")
    for operation in figures[NATIVE]:
        row = [operation]
        for name, values in figures.items():
            value = values[operation]
            ratios = [value / figures[other][operation] for other in (NATIVE, PLAIN, UNCACHED)]
            shown = "" if name == NATIVE else f" ({ratios[0]:.0f}; {ratios[1]:.2f}; {ratios[2]:.2f})"
            row.append(f"{value:.1f}{shown}")
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int, default=300, help="operations per round (default: 300)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only operations with TEXT in their names")
    settings = parser.parse_args()
    # What an operation needs of those before it is made by the first one of each kind.
    makers = ("create", "write 1 MiB") if settings.only else ()
    operations = tuple(
        operation for operation in OPERATIONS if settings.only in operation.name or operation.name.startswith(makers)
    )
    cpus = os.sched_getaffinity(0)
    results: Dict[str, Figures] = {}
    for caller, uid in _CALLERS.items():
        for pinning, affinity in (("pinned to one CPU", {min(cpus)}), ("not pinned", cpus)):
            os.sched_setaffinity(0, affinity)  # the servers inherit it
            title = f"{caller}, {pinning}"
            results[title], results[f"{title}, CPU time"] = measure(settings.count, uid, operations)
    os.sched_setaffinity(0, cpus)
    if settings.json:
        print(json.dumps(results, indent=2))
        return
    console = Console(width=200)
    for title, figures in results.items():
        console.print(_table(title, figures))


if __name__ == "__main__":
    main()
