"""How long processes stand still while their files are exchanged, against a bare loop over as many files.

``python -m benchmarks.blackout [--json] [--rounds N] [--profile PROCESSESxFDS]``. As root. The processes are moved
there and back between two tmpfs mounts; the loop (open, lseek, dup2, close in Python, on the same tmpfs) is measured
between the moves. Medians.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
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

CASES: List[Tuple[int, int, float]] = [(1, 1000, 4.0), (10, 100, 5.0), (50, 10, 15.0)]  # processes, fds, ratio to reach

_HOLDER = """
import os, sys
first, count = int(sys.argv[2]), int(sys.argv[3])
fds = [os.open(f"{sys.argv[1]}/f{i}", os.O_RDWR) for i in range(first, first + count)]
for fd in fds:
    os.lseek(fd, 3, os.SEEK_SET)
print("ready", flush=True)
sys.stdin.read(1)
assert all(os.lseek(fd, 0, os.SEEK_CUR) == 3 for fd in fds)
"""


class _Names:
    """The resolver for a directory of files."""

    def __init__(self, directory: str) -> None:
        self._names = {entry.inode(): entry.name for entry in os.scandir(directory)}

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        return {node: self._names.get(node) for node in nodes}

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        return {}


class Case:
    """``processes`` that hold ``fds`` files each on the first of two mounts."""

    def __init__(self, processes: int, fds: int, stack: ExitStack) -> None:
        self.files = processes * fds
        top = stack.enter_context(tempfile.TemporaryDirectory(prefix="spfs-blackout-"))
        self.mounts = [os.path.join(top, name) for name in ("a", "b")]
        for mount in self.mounts:
            os.mkdir(mount)
            subprocess.run(["mount", "-t", "tmpfs", "benchmark", mount], check=True)
            stack.callback(subprocess.run, ["umount", "-l", mount], check=True)
            for number in range(self.files):
                with open(f"{mount}/f{number}", "w") as file:
                    file.write("contents")
        self._holders = []
        for number in range(processes):
            holder = subprocess.Popen(
                [sys.executable, "-c", _HOLDER, self.mounts[0], str(number * fds), str(fds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(holder)
            stack.callback(holder.kill)
            self._holders.append(holder)
        for holder in self._holders:
            assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"

    def loop(self) -> float:
        """Seconds of the bare loop."""
        directory = self.mounts[0]
        target = os.open(os.devnull, os.O_RDONLY)
        try:
            begin = time.perf_counter()
            for number in range(self.files):
                fd = os.open(f"{directory}/f{number}", os.O_RDWR)
                os.lseek(fd, 3, os.SEEK_SET)
                os.dup2(fd, target)
                os.close(fd)
            return time.perf_counter() - begin
        finally:
            os.close(target)

    def move(self) -> SwitchReport:
        """From the first mount to the second one, which then changes places with it."""
        new = os.open(self.mounts[1], os.O_PATH)
        try:
            device = os.stat(self.mounts[0]).st_dev
            with Switch(device, _Names(self.mounts[0]), lambda mount: MountRoot(new), NoFreezer()) as switch:
                switch.prepare()
                report = switch.execute(lambda: None)
        finally:
            os.close(new)
        if report.moved != {"file": self.files} or report.left:
            raise AssertionError(f"not everything was moved: {report.moved}, {report.left[:3]}")
        self.mounts.reverse()
        return report

    def finish(self) -> None:
        """Every holder checks its offsets."""
        for holder in self._holders:
            holder.communicate(b"x")
            if holder.returncode:
                raise AssertionError(f"a process noticed: {holder.returncode}")


def measure(processes: int, fds: int, target: float, rounds: int) -> Dict[str, Any]:
    with ExitStack() as stack:
        case = Case(processes, fds, stack)
        case.move()
        case.move()  # the first ones warm up caches, and both directions are alike afterwards
        loops, reports = [], []
        for _ in range(rounds):
            loops.append(case.loop())
            reports.append(case.move())
            loops.append(case.loop())
        case.finish()
    blackout = statistics.median(report.blackout for report in reports)
    loop = statistics.median(loops)
    stages = {
        name: 1000 * statistics.median(report.stages.get(name, 0.0) for report in reports) for name in reports[0].stages
    }
    return {
        "processes": processes,
        "fds": fds,
        "blackout_ms": 1000 * blackout,
        "loop_ms": 1000 * loop,
        "ratio": blackout / loop,
        "target": target,
        "stages_ms": stages,
    }


def profile(processes: int, fds: int) -> None:
    """Where the time goes: cProfile of what happens in the blackout, which it lengthens."""
    with ExitStack() as stack:
        case = Case(processes, fds, stack)
        case.move()
        profiler = cProfile.Profile()
        original = Switch._round

        def profiled(self: Switch, *arguments: object) -> None:
            profiler.runcall(original, self, *arguments)  # type: ignore[arg-type]

        Switch._round = profiled  # type: ignore[assignment, method-assign]
        case.move()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=15, help="moves per case (default: 15)")
    parser.add_argument("--profile", metavar="PROCESSESxFDS", help="profile one case instead")
    arguments = parser.parse_args()
    if arguments.profile:
        processes, fds = (int(part) for part in arguments.profile.split("x"))
        profile(processes, fds)
        return 0
    results = [measure(processes, fds, target, arguments.rounds) for processes, fds, target in CASES]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return 0
    table = Table("processes × fds", "blackout", "bare loop", "ratio", "to reach", "stages (ms)")
    for result in results:
        stages = ", ".join(f"{name} {value:.1f}" for name, value in result["stages_ms"].items() if value >= 0.05)
        table.add_row(
            f"{result['processes']} × {result['fds']}",
            f"{result['blackout_ms']:.1f} ms",
            f"{result['loop_ms']:.1f} ms",
            f"{result['ratio']:.1f}",
            f"{result['target']:.0f}",
            stages,
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
