"""Microseconds per operation: stubfs against the native directory, a plain fusepy loopback, and bindfs.

``python -m benchmarks.requests [--json] [--count N]``. All in one run, pinned to one CPU and not; the median of
several rounds. A round takes the file systems in turn, so that a slow moment of the machine meets them all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

from rich.console import Console
from rich.table import Table

from stubfs.client import FilesystemClient

_ROUNDS = 7
_ROOT = Path(__file__).resolve().parent.parent


def create_truncate_close(directory: str, count: int) -> None:
    for i in range(count):
        fd = os.open(f"{directory}/c{i}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.ftruncate(fd, 100)
        os.close(fd)


def open_close(directory: str, count: int) -> None:
    for i in range(count):
        os.close(os.open(f"{directory}/c{i}", os.O_RDONLY))


def stat_file(directory: str, count: int) -> None:
    for i in range(count):
        os.stat(f"{directory}/c{i}")


def write_page(directory: str, count: int) -> None:
    data = bytes(4096)
    fd = os.open(f"{directory}/page", os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        for _ in range(count):
            os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


def unlink(directory: str, count: int) -> None:
    for i in range(count):
        os.unlink(f"{directory}/c{i}")


def listdir(directory: str, count: int) -> None:
    for _ in range(max(1, count // 100)):
        os.listdir(directory)


# In this order: each needs what the one before has left.
OPERATIONS: Dict[str, Callable[[str, int], None]] = {
    "create+truncate+close": create_truncate_close,
    "open+close": open_close,
    "stat": stat_file,
    "list (per 100 files)": listdir,
    "write 4 KiB": write_page,
    "unlink": unlink,
}


@contextmanager
def _stubfs(mode: str, backing: str, mountpoint: str) -> Iterator[str]:
    socket_path = f"{mountpoint}.sock"
    command = [sys.executable, "-m", "stubfs", mountpoint, "--mode", mode, "--socket-path", socket_path]
    if mode == "proxy":
        command += ["--proxy-dir", backing]
    subprocess.run(command, check=True, cwd=_ROOT, timeout=30)
    try:
        yield mountpoint
    finally:
        with FilesystemClient(socket_path, 10) as client:
            client.quit()


@contextmanager
def _command(arguments: List[str], mountpoint: str) -> Iterator[str]:
    device = os.stat(mountpoint).st_dev
    process = subprocess.Popen(arguments)
    try:
        deadline = time.monotonic() + 10
        while os.stat(mountpoint).st_dev == device:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{arguments[0]} did not mount")
            time.sleep(0.01)
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False)
        process.terminate()
        process.wait(10)


def measure(count: int) -> Dict[str, Dict[str, float]]:
    """file system -> operation -> microseconds."""
    base = tempfile.mkdtemp(prefix="stubfs-bench-", dir="/dev/shm")
    try:
        with ExitStack() as stack:

            def mountpoint(name: str) -> Tuple[str, str]:
                for part in ("mnt", "real"):
                    os.makedirs(f"{base}/{name}-{part}")
                return f"{base}/{name}-real", f"{base}/{name}-mnt"

            places = {"native": mountpoint("native")[0]}
            backing, mnt = mountpoint("restore")
            places["stubfs restore"] = stack.enter_context(_stubfs("restore", backing, mnt))
            backing, mnt = mountpoint("proxy")
            places["stubfs proxy"] = stack.enter_context(_stubfs("proxy", backing, mnt))
            backing, mnt = mountpoint("loopback")
            loopback = [sys.executable, "-W", "ignore", str(_ROOT / "benchmarks" / "loopback.py"), backing, mnt]
            places["fusepy loopback"] = stack.enter_context(_command(loopback, mnt))
            if shutil.which("bindfs"):
                backing, mnt = mountpoint("bindfs")
                places["bindfs"] = stack.enter_context(_command(["bindfs", "-f", backing, mnt], mnt))
            samples: Dict[str, Dict[str, List[float]]] = {
                name: {operation: [] for operation in OPERATIONS} for name in places
            }
            for _ in range(_ROUNDS):
                for operation, run in OPERATIONS.items():
                    for name, directory in places.items():
                        start = time.perf_counter()
                        run(directory, count)
                        samples[name][operation].append((time.perf_counter() - start) / count * 1e6)
            return {
                name: {operation: statistics.median(values) for operation, values in of_place.items()}
                for name, of_place in samples.items()
            }
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _table(title: str, figures: Dict[str, Dict[str, float]]) -> Table:
    table = Table(title=f"{title}: µs per operation (× native; × fusepy loopback)")
    table.add_column("operation")
    for name in figures:
        table.add_column(name, justify="right")
    for operation in OPERATIONS:
        native, plain = figures["native"][operation], figures["fusepy loopback"][operation]
        row = [operation]
        for name, values in figures.items():
            value = values[operation]
            ratios = "" if name == "native" else f" ({value / native:.0f}; {value / plain:.2f})"
            row.append(f"{value:.1f}{ratios}")
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int, default=300, help="operations per round")
    settings = parser.parse_args()
    cpus = os.sched_getaffinity(0)
    results = {}
    for title, affinity in (("pinned to one CPU", {min(cpus)}), ("not pinned", cpus)):
        os.sched_setaffinity(0, affinity)  # the servers inherit it
        results[title] = measure(settings.count)
    if settings.json:
        print(json.dumps(results, indent=2))
        return
    console = Console(width=160)
    for title, figures in results.items():
        console.print(_table(title, figures))


if __name__ == "__main__":
    main()
