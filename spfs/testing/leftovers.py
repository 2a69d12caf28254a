"""What a test can leave behind, found by comparing what was there before it with what is there after it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, FrozenSet, Iterator, List, Optional

MARK = "SPFS_TEST_RUN"
"""Environment variable by which every process that a test started is found again, whoever its parent is now."""


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
    import psutil  # here, because not every user of the package looks for processes

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
