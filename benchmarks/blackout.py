"""How long processes stand still while what they hold is exchanged, against a bare loop over as many files.

``python -m benchmarks.blackout [--json] [--rounds N] [--case NAME]… [--profile NAME]``. As root. The processes are
moved there and back between two tmpfs mounts. "blackout" is by our own clock, from the first stop to the last detach;
"seen" by the applications: the largest gap of a thread that looks at the clock every half millisecond, in the worst
one of the first and the last process. The bare loop (open, lseek, dup2, close in Python, on the same tmpfs) is measured
between the moves. Medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import mmap
import os
import pstats
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Optional

from rich.console import Console
from rich.table import Table

from spfs.freezer import NoFreezer
from spfs.references import MountRoot, Remains
from spfs.switch import Switch, SwitchReport

MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    """``processes`` with ``fds`` files each. ``ratio``: to reach, to the bare loop; for ``dirty`` bytes of ``mapped``
    ones, which are private, to a memcpy of them to new pages; of ``every`` so many pages one is dirty. ``threads``: of
    each, besides the first and the ticker.
    """

    name: str
    processes: int
    fds: int
    ratio: Optional[float] = None
    mapped: int = 0
    dirty: int = 0
    every: int = 1
    threads: int = 0


SETTINGS = [
    Setting("1x1000", 1, 1000, 2.5),
    Setting("1x3000", 1, 3000, 2.5),
    Setting("10x100", 10, 100, 3.5),
    Setting("50x10", 50, 10, 10.0),
    Setting("200x3", 200, 3),
    Setting("memory", 1, 1, 2.0, mapped=1024 * MIB, dirty=64 * MIB),
    Setting("scattered", 1, 1, 2.0, mapped=1024 * MIB, dirty=64 * MIB, every=2),
    Setting("threads", 1, 10, threads=500),
]

_HOLDER = """
import mmap, os, sys, threading, time
top, first, count, mapped, dirty, every, threads, ticks = sys.argv[1], *map(int, sys.argv[2:])
own = range(0, every * dirty, every * mmap.PAGESIZE)
fds = [os.open(f"{top}/f{i}", os.O_RDWR) for i in range(first, first + count)]
for fd in fds:
    os.lseek(fd, 3, os.SEEK_SET)
if mapped:
    memory = mmap.mmap(fds[0], mapped, mmap.MAP_PRIVATE)
    for start in own:
        memory[start] = 1
over, gap = threading.Event(), [0.0]
def tick():
    last = time.perf_counter()
    while not over.is_set():
        time.sleep(0.0005)
        now = time.perf_counter()
        gap[0] = max(gap[0], now - last)
        last = now
started = [threading.Thread(target=over.wait) for _ in range(threads)] + [threading.Thread(target=tick)] * ticks
for thread in started:
    thread.start()
print("ready", flush=True)
for line in sys.stdin:
    print(gap[0], flush=True)
    gap[0] = 0.0
over.set()
for thread in started:
    thread.join()
assert all(os.lseek(fd, 0, os.SEEK_CUR) == 3 for fd in fds)
assert not mapped or all(memory[start] == 1 for start in own) and memory[every * dirty] == 0
"""


class _Names:
    """The resolver for a directory of files."""

    def __init__(self, directory: str) -> None:
        self._names = {entry.inode(): entry.name for entry in os.scandir(directory)}

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        return {node: self._names.get(node) for node in nodes}

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        return {}


class Holder:
    """A process, which tells the largest gap that its ticker has seen since it was asked last."""

    def __init__(self, stack: ExitStack, setting: Setting, mount: str, number: int) -> None:
        self.ticks = number in (0, setting.processes - 1)
        memory = (setting.mapped, setting.dirty, setting.every)
        numbers = (number * setting.fds, setting.fds, *memory, setting.threads, int(self.ticks))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, mount, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.enter_context(self._process)
        stack.callback(self._process.kill)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ready(self) -> None:
        if self._line() != "ready\n":
            raise AssertionError("a process did not start")

    def gap(self) -> float:
        """Seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def finish(self) -> None:
        """It checks what it holds."""
        self._process.communicate()
        if self._process.returncode:
            raise AssertionError(f"a process noticed: {self._process.returncode}")


class Case:
    """The processes of a setting, which hold files on the first of two mounts."""

    def __init__(self, setting: Setting, stack: ExitStack) -> None:
        self.setting = setting
        self.files = setting.processes * setting.fds
        top = stack.enter_context(tempfile.TemporaryDirectory(prefix="spfs-blackout-"))
        self.mounts = [os.path.join(top, name) for name in ("a", "b")]
        for mount in self.mounts:
            os.mkdir(mount)
            subprocess.run(["mount", "-t", "tmpfs", "benchmark", mount], check=True)
            stack.callback(subprocess.run, ["umount", "-l", mount], check=True)
            for number in range(self.files):
                with open(f"{mount}/f{number}", "w") as file:
                    file.write("contents")
                    file.truncate(setting.mapped or 8)
        self.holders = [Holder(stack, setting, self.mounts[0], number) for number in range(setting.processes)]
        for holder in self.holders:
            holder.ready()

    def loop(self) -> float:
        """Seconds of the bare loop; of the memcpy where that is the measure."""
        if self.setting.dirty:
            source = b"1" * self.setting.dirty
            with mmap.mmap(-1, self.setting.dirty) as target:  # pages are made at the first touch, as in the process
                begin = time.perf_counter()
                target[:] = source
                return time.perf_counter() - begin
        directory = self.mounts[0]
        target_fd = os.open(os.devnull, os.O_RDONLY)
        try:
            begin = time.perf_counter()
            for number in range(self.files):
                fd = os.open(f"{directory}/f{number}", os.O_RDWR)
                os.lseek(fd, 3, os.SEEK_SET)
                os.dup2(fd, target_fd)
                os.close(fd)
            return time.perf_counter() - begin
        finally:
            os.close(target_fd)

    def move(self) -> SwitchReport:
        """From the first mount to the second one, which then changes places with it."""
        new = os.open(self.mounts[1], os.O_PATH)
        try:
            device = os.stat(self.mounts[0]).st_dev
            with Switch(device, _Names(self.mounts[0]), lambda mount: MountRoot(new), NoFreezer()) as switch:
                switch.prepare()
                for holder in self.holders:
                    holder.gap() if holder.ticks else None
                report = switch.execute(lambda: None)
        finally:
            os.close(new)
        mappings = int(bool(self.setting.mapped))  # each with a descriptor of its own: so Python maps
        expected = {"file": self.files + mappings, **({"private mapping": mappings} if mappings else {})}
        if report.moved != expected or report.left:
            raise AssertionError(f"not everything was moved: {report.moved}, {report.left[:3]}")
        self.mounts.reverse()
        return report

    def seen(self) -> float:
        """The largest gap since the move began, in seconds."""
        return max(holder.gap() for holder in self.holders if holder.ticks)


def measure(setting: Setting, rounds: int) -> Dict[str, Any]:
    with ExitStack() as stack:
        case = Case(setting, stack)
        case.move()
        case.move()  # the first ones warm up caches, and both directions are alike afterwards
        loops, reports, seen = [], [], []
        for _ in range(rounds):
            before = case.loop()
            reports.append(case.move())
            seen.append(case.seen())
            loops.append((before + case.loop()) / 2)
        for holder in case.holders:
            holder.finish()
    blackouts = [report.blackout for report in reports]
    stages = {
        name: 1000 * statistics.median(report.stages.get(name, 0.0) for report in reports) for name in reports[0].stages
    }
    return {
        "case": setting.name,
        "processes": setting.processes,
        "fds": setting.fds,
        "blackout_ms": 1000 * statistics.median(blackouts),
        "best_ms": 1000 * min(blackouts),
        "seen_ms": 1000 * statistics.median(seen),
        "loop_ms": 1000 * statistics.median(loops),
        "ratio": statistics.median(blackout / loop for blackout, loop in zip(blackouts, loops)),
        "target": setting.ratio,
        "stages_ms": stages,
    }


def profile(setting: Setting) -> None:
    """Where the time goes: cProfile of what happens in the blackout, which it lengthens."""
    with ExitStack() as stack:
        case = Case(setting, stack)
        case.move()
        profiler = cProfile.Profile()
        original = Switch._round

        def profiled(self: Switch, *arguments: object) -> None:
            profiler.runcall(original, self, *arguments)  # type: ignore[arg-type]

        Switch._round = profiled  # type: ignore[assignment, method-assign]
        case.move()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> int:
    names = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=15, help="moves per case (default: 15)")
    parser.add_argument("--case", action="append", choices=names, help="only this one; repeatable")
    parser.add_argument("--profile", choices=names, help="profile one case instead")
    arguments = parser.parse_args()
    by_name = dict(zip(names, SETTINGS))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its mounts are taken away
    if arguments.profile:
        profile(by_name[arguments.profile])
        return 0
    results = [measure(by_name[name], arguments.rounds) for name in arguments.case or names]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return 0
    table = Table("case", "blackout", "best", "seen", "loop", "ratio", "to reach", "stages (ms)")
    for result in results:
        stages = ", ".join(f"{name} {value:.1f}" for name, value in result["stages_ms"].items() if value >= 0.05)
        times = [f"{result[key]:.1f} ms" for key in ("blackout_ms", "best_ms", "seen_ms", "loop_ms")]
        target = f"{result['target']:.1f}" if result["target"] else "-"
        table.add_row(result["case"], *times, f"{result['ratio']:.1f}", target, stages)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
