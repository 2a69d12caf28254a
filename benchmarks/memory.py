"""How long a process stands still while its mappings are exchanged, against copying as many bytes.

``python -m benchmarks.memory [--json] [--rounds N]``. As root. One process has a private mapping of 1 GiB of which some
pages are written to, and is moved there and back between two tmpfs mounts. Between the moves as many bytes are copied:
to memory that is fresh, as the process's new pages must be, and to memory that is there already. Medians.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any, Dict, Iterable, List, Optional, Tuple

from rich.console import Console
from rich.table import Table

from spfs.freezer import NoFreezer
from spfs.references import MountRoot, Remains
from spfs.switch import Switch, SwitchReport

MIB = 1 << 20
SIZE = 1024 * MIB
CASES: List[Tuple[str, int, int]] = [  # pages written to, and one out of how many
    ("nothing written", 0, 1),
    ("64 MiB in one piece", 64 * MIB, 1),
    ("64 MiB, every second page", 64 * MIB, 2),
    ("1 MiB, pages far apart", MIB, 1024),
]

_HOLDER = """
import mmap, os, sys
path, size, written, step = sys.argv[1], *map(int, sys.argv[2:])
fd = os.open(path, os.O_RDONLY)
memory = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
os.close(fd)
places = range(0, written * step, mmap.PAGESIZE * step)
for place in places:
    memory[place] = 7
print("ready", flush=True)
sys.stdin.read(1)
assert all(memory[place] == 7 and memory[place + 1] == 1 for place in places)
"""


class _Name:
    """The resolver for the only file."""

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        return {}

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        return {node: "file" for node in nodes}


class _Memory:
    """Anonymous memory without large pages, as a private mapping of a file has none."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._object = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._object)

    def close(self) -> None:
        del self._object
        self._map.close()


def copy(size: int) -> Tuple[float, float]:
    """Seconds to copy so many bytes to fresh memory, and again to the same."""
    source, target = _Memory(size), _Memory(size)
    try:
        ctypes.memset(source.address, 1, size)
        begin = time.perf_counter()
        ctypes.memmove(target.address, source.address, size)
        middle = time.perf_counter()
        ctypes.memmove(target.address, source.address, size)
        return middle - begin, time.perf_counter() - middle
    finally:
        source.close()
        target.close()


def move(mounts: List[str]) -> SwitchReport:
    """From the first mount to the second one, which then changes places with it."""
    new = os.open(mounts[1], os.O_PATH)
    try:
        device = os.stat(mounts[0]).st_dev
        with Switch(device, _Name(), lambda mount: MountRoot(new), NoFreezer()) as switch:
            switch.prepare()
            report = switch.execute(lambda: None)
    finally:
        os.close(new)
    if report.left or not report.moved.get("private mapping"):
        raise AssertionError(f"not everything was moved: {report.moved}, {report.left[:3]}")
    mounts.reverse()
    return report


def measure(name: str, written: int, step: int, rounds: int) -> Dict[str, Any]:
    with ExitStack() as stack:
        top = stack.enter_context(tempfile.TemporaryDirectory(prefix="spfs-memory-"))
        mounts = [os.path.join(top, name) for name in ("a", "b")]
        for mount in mounts:
            os.mkdir(mount)
            subprocess.run(["mount", "-t", "tmpfs", "benchmark", mount], check=True)
            stack.callback(subprocess.run, ["umount", "-l", mount], check=True)
            with open(f"{mount}/file", "wb") as file:
                file.truncate(SIZE)
                for place in range(0, written * step, MIB):
                    file.seek(place)
                    file.write(b"\1" * MIB)
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, f"{mounts[0]}/file", str(SIZE), str(written), str(step)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        stack.enter_context(holder)
        stack.callback(holder.kill)
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        reports: List[SwitchReport] = []
        fresh: List[float] = []
        again: List[float] = []
        for _ in range(rounds):
            reports.append(move(mounts))
            for times, seconds in zip((fresh, again), copy(written) if written else (0.0, 0.0)):
                times.append(seconds)
        holder.communicate(b"x")
        if holder.returncode:
            raise AssertionError(f"the process noticed: {holder.returncode}")
    blackout = statistics.median(report.blackout for report in reports)
    operate = statistics.median(report.stages["operate"] for report in reports)
    return {
        "case": name,
        "blackout_ms": 1000 * blackout,
        "operate_ms": 1000 * operate,
        "copy_fresh_ms": 1000 * statistics.median(fresh),
        "copy_again_ms": 1000 * statistics.median(again),
        "speed": statistics.median(fresh) / operate,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=9, help="moves per case (default: 9)")
    arguments = parser.parse_args()
    results = [measure(*case, arguments.rounds) for case in CASES]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return 0
    columns = ("1 GiB, private", "blackout", "of it exchange", "memcpy to fresh memory", "again", "of memcpy's speed")
    table = Table(*columns)
    for result in results:
        table.add_row(
            result["case"],
            f"{result['blackout_ms']:.1f} ms",
            f"{result['operate_ms']:.1f} ms",
            f"{result['copy_fresh_ms']:.1f} ms",
            f"{result['copy_again_ms']:.1f} ms",
            f"{100 * result['speed']:.0f} %" if result["copy_fresh_ms"] else "",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
