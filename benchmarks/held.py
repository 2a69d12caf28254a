"""What held requests cost: memory, threads, CPU, the time to list them and to let them go.

``python -m benchmarks.held [--json]``. By stats, reads and creates, each in one directory or in many; 1,000, 4,000
and 10,000 of them, made by threads of several processes. The native cost beside it: the same calls by the same
number of threads on the directory itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator, List

from rich.console import Console
from rich.table import Table

from stubfs.client import FilesystemClient

_ROOT = Path(__file__).resolve().parent.parent
_PER_PROCESS = 500  # threads
_DIRECTORIES = 100  # where they are many
_CALLER = """
import os, sys, threading
kind, first, count, top, directories = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
def path(i):
    return f"{top}/d{i % directories}/{i}"
def act(i):
    start.wait()
    if kind == "stat":
        os.path.exists(path(i))
    elif kind == "create":
        os.close(os.open(path(i), os.O_CREAT | os.O_WRONLY))
    else:
        os.pread(files[i - i % 2], 1, i % 2 * 2**20)
files = {i: os.open(path(i), os.O_RDONLY) for i in range(first, first + count, 2)} if kind == "read" else {}
start = threading.Event()
threading.stack_size(64 << 10)
threads = [threading.Thread(target=act, args=(i,)) for i in range(first, first + count)]
for thread in threads:
    thread.start()
print("ready", flush=True)
sys.stdin.readline()
start.set()
for thread in threads:
    thread.join()
"""


@dataclass(frozen=True)
class Result:
    kind: str
    directories: int
    count: int
    held: int
    memory_kib: int
    threads: int
    cpu_per_second: float  # seconds of CPU per second while they are held
    listed_seconds: float
    let_go_seconds: float
    let_go_cpu_seconds: float  # the server's share, in ticks of the clock; the rest is what the callers do with it
    native_seconds: float


@contextmanager
def _callers(kind: str, count: int, top: str, directories: int) -> Iterator[List["subprocess.Popen[str]"]]:
    processes: List["subprocess.Popen[str]"] = []
    try:
        for first in range(0, count, _PER_PROCESS):
            arguments = [kind, str(first), str(min(_PER_PROCESS, count - first)), top, str(directories)]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _CALLER, *arguments],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
            )
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _go(processes: List["subprocess.Popen[str]"]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise ValueError(field)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _prepare(top: str, directories: int, count: int, kind: str) -> None:
    for i in range(directories):
        os.makedirs(f"{top}/d{i}", exist_ok=True)
    if kind == "read":
        # One for two reads, further apart than the kernel reads ahead: half of a common limit of 20,000 descriptors is
        # for files to be opened again.
        for i in range(0, count, 2):
            with open(f"{top}/d{i % directories}/{i}", "wb") as file:
                file.truncate(2 * 2**20)


def _settle(client: FilesystemClient) -> int:
    """How many are held when no more arrive, once the first have: thousands of threads take a while to begin."""
    held, since = 0, time.monotonic()
    while time.monotonic() - since < (0.5 if held else 60):
        time.sleep(0.05)
        now = client.status().held
        if now != held:
            held, since = now, time.monotonic()
    return held


def measure(kind: str, directories: int, count: int) -> Result:
    base = tempfile.mkdtemp(prefix="stubfs-bench-", dir="/dev/shm")
    mountpoint, real, native = (f"{base}/{name}" for name in ("mnt", "real", "native"))
    for directory in (mountpoint, real, native):
        os.mkdir(directory)
    sock = f"{base}/sock"
    subprocess.run(
        [sys.executable, "-m", "stubfs", mountpoint, "--socket-path", sock], check=True, cwd=_ROOT, timeout=30
    )
    try:
        with FilesystemClient(sock, 60) as client:
            try:
                for top in (mountpoint, real, native):
                    _prepare(top, directories, count, kind)
                pid = client.status().pid
                with _callers(kind, count, native, directories) as processes:
                    start = time.perf_counter()
                    _go(processes)
                    for process in processes:
                        process.wait()
                    native_seconds = time.perf_counter() - start
                with _callers(kind, count, mountpoint, directories) as processes:
                    client.mode("stub")
                    memory = _status(pid, "VmRSS")
                    _go(processes)
                    held = _settle(client)
                    memory = _status(pid, "VmRSS") - memory
                    cpu = _cpu(pid)
                    time.sleep(1)
                    cpu = _cpu(pid) - cpu
                    start = time.perf_counter()
                    listed = len(client.held())
                    listed_seconds = time.perf_counter() - start
                    assert listed == held, (listed, held)
                    threads = _status(pid, "Threads")
                    fd = os.open(real, os.O_PATH)
                    let_go_cpu = _cpu(pid)
                    start = time.perf_counter()
                    client.mode("proxy", fd)
                    while client.status().held:
                        time.sleep(0.01)  # each look takes the server a moment, too
                    let_go = time.perf_counter() - start
                    let_go_cpu = _cpu(pid) - let_go_cpu
                    os.close(fd)
                    for process in processes:
                        process.wait()
                return Result(
                    kind, directories, count, held, memory, threads, cpu, listed_seconds, let_go, let_go_cpu,
                    native_seconds,
                )  # fmt: skip
            finally:
                client.quit()
    finally:
        shutil.rmtree(base, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int, action="append", help="how many (default: 1000, 4000 and 10000)")
    settings = parser.parse_args()
    results = [
        measure(kind, directories, count)
        for count in settings.count or (1000, 4000, 10_000)
        for kind in ("stat", "read", "create")
        for directories in (1, _DIRECTORIES)
    ]
    if settings.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    table = Table(title="held requests")
    for column in ("calls", "directories", "held", "memory", "threads", "CPU/s", "listed", "let go (CPU)", "native, ×"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            f"{result.count:,} {result.kind}", str(result.directories), f"{result.held:,}",
            f"{result.memory_kib / 1024:.1f} MiB", str(result.threads), f"{result.cpu_per_second:.2f}",
            f"{result.listed_seconds:.3f} s", f"{result.let_go_seconds:.3f} s ({result.let_go_cpu_seconds:.2f})",
            f"{result.native_seconds:.3f} s, {result.let_go_seconds / result.native_seconds:.1f}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
