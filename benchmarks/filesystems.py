"""The file systems that are compared, each mounted for the time of a run.

All of them on directories of one tmpfs, where the file systems beneath cost next to nothing; anybody may use them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional

NATIVE = "native"
PLAIN = "fusepy loopback"
UNCACHED = "loopback, no cache"

_ROOT = Path(__file__).resolve().parent.parent
_LOOPBACK = [sys.executable, "-W", "ignore", str(_ROOT / "benchmarks" / "loopback.py")]


@dataclass(frozen=True)
class Place:
    """Where one of the file systems is mounted, and the process behind it, if there is one."""

    directory: str
    pid: Optional[int]

    def cpu_seconds(self) -> float:
        """The CPU time of that process up to now."""
        if self.pid is None:
            return 0.0
        return time.clock_gettime(~self.pid << 3 | 2)  # clock_getcpuclockid(3), which Python does not have


def _stubfs(mode: str, real: str, mountpoint: str) -> List[str]:
    # In the foreground, as the others: the scheduler shares CPUs among sessions first (autogroups, sched(7)), so what
    # is in one of its own waits longer than they do where there is other work.
    command = [sys.executable, "-m", "stubfs", "-f", mountpoint, "--mode", mode, "-o", "allow_other"]
    return command + (["--proxy-dir", real] if mode == "proxy" else [])


@contextmanager
def _command(arguments: List[str], mountpoint: str) -> Iterator[int]:
    device = os.stat(mountpoint).st_dev
    process = subprocess.Popen(arguments, cwd=_ROOT)
    try:
        deadline = time.monotonic() + 10
        while os.stat(mountpoint).st_dev == device:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{arguments[0]} did not mount")
            time.sleep(0.01)
        yield process.pid
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False)
        process.terminate()
        process.wait(10)


@contextmanager
def mounted() -> Iterator[Dict[str, Place]]:
    """By name; anybody may use the directories. bindfs only where it is installed. The servers inherit the CPUs."""
    base = tempfile.mkdtemp(prefix="stubfs-bench-", dir="/dev/shm")
    try:
        os.chmod(base, 0o755)
        with ExitStack() as stack:
            places: Dict[str, Place] = {}
            for name in (NATIVE, "stubfs restore", "stubfs proxy", PLAIN, UNCACHED, "bindfs"):
                real, mountpoint = (f"{base}/{len(places)}-{part}" for part in ("real", "mnt"))
                os.mkdir(real)
                os.mkdir(mountpoint)
                pid = None
                if name == NATIVE:
                    mountpoint = real
                elif name.startswith("stubfs"):
                    pid = stack.enter_context(_command(_stubfs(name.split()[1], real, mountpoint), mountpoint))
                elif name != "bindfs":
                    timeouts = [] if name == PLAIN else ["attr_timeout=0", "entry_timeout=0"]
                    pid = stack.enter_context(_command([*_LOOPBACK, real, mountpoint, *timeouts], mountpoint))
                elif shutil.which("bindfs"):
                    pid = stack.enter_context(_command(["bindfs", "-f", real, mountpoint], mountpoint))
                else:
                    continue
                os.chmod(mountpoint, 0o777)
                places[name] = Place(mountpoint, pid)
            yield places
    finally:
        shutil.rmtree(base, ignore_errors=True)
