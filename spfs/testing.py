"""What tests of programs on delayed mounts need, and the project's own tests use: waiting, and leftovers.

Works without pytest. Nothing here is used by the manager or the file system.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, FrozenSet, Iterator, List, Optional, TypeVar

import psutil

from spfs.linux import procfs

T = TypeVar("T")

MARK = "SPFS_TEST_RUN"
"""Environment variable by which every process that a test started is found again, whoever its parent is now."""


def wait_until(condition: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """The first true result of ``condition``, which is asked every few milliseconds; TimeoutError after ``timeout`` s.

    For what the kernel gives no event for (a state in /proc); where there is one, wait for that.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {what or condition}")
        time.sleep(0.002)


def process_state(pid: int) -> str:
    """The state letter of /proc/PID/stat ("R", "S", "D", "T", "t", "Z" …); "" if there is no such process."""
    try:
        return procfs.parse_stat(procfs.read(f"/proc/{pid}/stat")).state
    except (FileNotFoundError, ProcessLookupError):
        return ""


@dataclass(frozen=True)
class Snapshot:
    """What can be left behind: processes, mounts below a directory, frozen cgroups, our own fds.

    Processes count that are marked, and those that have the directory's name in their command line: mount helpers run
    in an environment of their own.
    """

    processes: Dict[int, str] = field(default_factory=dict)
    mounts: FrozenSet[str] = frozenset()
    frozen: FrozenSet[str] = frozenset()
    fds: FrozenSet[str] = frozenset()

    def added_since(self, before: "Snapshot") -> List[str]:
        """One line for each thing that is here and was not there before."""
        lines = [f"process {pid}: {line}" for pid, line in self.processes.items() if pid not in before.processes]
        lines += [f"mount: {line}" for line in sorted(self.mounts - before.mounts)]
        lines += [f"frozen cgroup: {path}" for path in sorted(self.frozen - before.frozen)]
        lines += [f"file descriptor: {fd}" for fd in sorted(self.fds - before.fds)]
        return lines


def snapshot(below: str, mark: Optional[str] = None, cgroups: Callable[[], List[str]] = list) -> Snapshot:
    """The present state; ``below``: directory whose mounts count; ``mark``: value of MARK; ``cgroups``: their paths."""
    return Snapshot(
        processes=_processes(below, mark) if mark else {},
        mounts=frozenset(_mounts_below(below)),
        frozen=frozenset(path for path in cgroups() if _is_frozen(path)),
        fds=frozenset(_own_fds()),
    )


def _processes(below: str, mark: str) -> Dict[int, str]:
    found = {}
    ours = {os.getpid(), os.getppid()}  # pytest, which can have been told the directory
    for process in psutil.process_iter():
        try:
            if process.pid in ours:
                continue
            words = process.cmdline()
            if process.environ().get(MARK) == mark or any(word.startswith(below) for word in words):
                found[process.pid] = f"{process.status()} {' '.join(words)}"
        except psutil.Error:
            continue  # it ended meanwhile, or is a kernel thread
    return found


def _mounts_below(directory: str) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        if (line.split(" ")[4] + "/").startswith(directory.rstrip("/") + "/"):
            yield line


def _is_frozen(cgroup: str) -> bool:
    for name, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        try:
            if Path(cgroup, name).read_text().strip() != thawed:
                return True
        except OSError:
            continue
    return False


def _own_fds() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the one that listed the directory
        yield f"{fd} -> {target}"
