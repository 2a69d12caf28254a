"""What delayed mounts cost a test run: milliseconds, and as multiples of a bare interpreter's start in the same run.

``python -m benchmarks.testing [--json] [--rounds N]``. The first mount of a run starts the fork server; the others are
forked by it. The plugin's cost for a run that does not use it is the time of its import, as -X importtime has it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, TypeVar

from benchmarks.report import show
from spfs.testing import MountServer

T = TypeVar("T")
_ROOT = Path(__file__).resolve().parent.parent
_TARGETS = {"first mount": 150.0, "another mount": 40.0}
_MOUNTS = 10  # of a run


def _timed(samples: Dict[str, List[float]], name: str, action: Callable[[], T]) -> T:
    begun = time.perf_counter()
    result = action()
    samples.setdefault(name, []).append((time.perf_counter() - begun) * 1000)
    return result


def _round(samples: Dict[str, List[float]]) -> None:
    _timed(samples, "bare interpreter", lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
    server = MountServer()
    try:
        mount = _timed(samples, "first mount", server.mount)
        for _ in range(_MOUNTS):
            mount = _timed(samples, "another mount", server.mount)
        _timed(samples, "stub", mount.stub)
        _timed(samples, "release", mount.release)
        _timed(samples, "end of a mount", mount.close)
    finally:
        _timed(samples, f"end of the run, with {_MOUNTS} mounts", server.close)
    samples.setdefault("import of the plugin", []).append(_import_time())


def _import_time() -> float:
    """Milliseconds, without what pytest has imported anyway."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import pytest, spfs.pytest_plugin"], check=True, text=True,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )  # fmt: skip
    names = {" spfs", " spfs.pytest_plugin"}
    lines = [line.split("|") for line in done.stderr.splitlines()]
    return sum(int(cumulative) for _, cumulative, name in lines if name in names) / 1000


def measure(rounds: int) -> Dict[str, float]:
    """What → median milliseconds."""
    samples: Dict[str, List[float]] = {}
    for _ in range(rounds):
        _round(samples)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7, help="runs (default: 7)")
    settings = parser.parse_args()
    figures = measure(settings.rounds)
    show("Delayed mounts in tests, medians", figures, _TARGETS, settings.json, digits=2)


if __name__ == "__main__":
    main()
