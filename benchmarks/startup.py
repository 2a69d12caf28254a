"""Milliseconds until a manager serves, a mount is usable, and a mode is changed with nothing held.

``python -m benchmarks.startup [--json] [--rounds N]``. Medians over fresh managers; beside them what a bare Python
interpreter takes to start in the same run, as the part that nobody can save.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List

from benchmarks.report import show
from spfs.client import ManagerClient

_ROOT = Path(__file__).resolve().parent.parent
_MODE_CHANGES = 20
_TARGETS = {"manager started, mounted and answering": 250.0, "mode change": 10.0}


def _timed(samples: Dict[str, List[float]], name: str, action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    taken = (time.perf_counter() - begun) * 1000
    samples.setdefault(name, []).append(taken)
    return taken


def _round(samples: Dict[str, List[float]], base: Path) -> None:
    work, mountpoint = base / "work", base / "mnt"
    mountpoint.mkdir()
    command = [sys.executable, "-m", "spfs.cli.manager", "-d", "--work-dir", str(work), "--exit-with-spfs"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    _timed(samples, "bare interpreter", lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
    together = _timed(samples, "manager started", lambda: subprocess.run(command, env=environment, check=True))
    with ManagerClient(str(work / "spfs-manager.sock"), 30) as client:
        try:
            together += _timed(samples, "first mount", lambda: client.mount("a", str(mountpoint)))
            together += _timed(samples, "first answer of the mount", lambda: os.stat(mountpoint))
            samples.setdefault("manager started, mounted and answering", []).append(together)
            second = base / "second"
            second.mkdir()
            _timed(samples, "another mount", lambda: client.mount("b", str(second)))
            for number in range(_MODE_CHANGES):
                mode = ("restore", "stub")[number % 2]
                _timed(samples, "mode change", lambda: client.mode(mode, "a"))
            _timed(samples, "unmount", lambda: client.unmount("b"))
        finally:
            client.unmount(force=True)


def measure(rounds: int) -> Dict[str, float]:
    """What → median milliseconds."""
    samples: Dict[str, List[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="spfs-bench-", dir="/run") as base:
            _round(samples, Path(base))
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7, help="managers to start (default: 7)")
    settings = parser.parse_args()
    figures = measure(settings.rounds)
    show("Start-up, medians", figures, _TARGETS, settings.json, digits=1)


if __name__ == "__main__":
    main()
