"""The replace step: the real mount made, the file system's requests let through to it, mounts and processes moved.

Here is only the order, and what undoes what; each step has a module of its own. Runs in a process by itself, the
only one that uses ptrace and setns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Optional, Tuple

from spfs.target import Target

Progress = Callable[[str, Dict[str, object]], None]


@dataclass(frozen=True)
class ReplaceRequest:
    """What to mount in the file system's place: ``source``, ``fstype``, ``flags``, ``options`` as in mount(2)."""

    source: str
    fstype: str
    flags: int = 0
    options: str = ""
    bindmounts: Tuple[str, ...] = ()
    freeze_cgroup: Optional[str] = None
    strict: bool = False
    timeout: Optional[float] = None  # seconds to go on trying the real mount; None: until it is there


@dataclass(frozen=True)
class MountedFilesystem:
    """A file system process and where its mount is. ``device`` is its st_dev; the target stays the caller's."""

    id: str
    control: str
    pid: int
    device: int
    mountpoint: str
    target: Target


@dataclass(frozen=True)
class SwitchRequest:
    """Only the process part: from the mount of ``source`` or ``device`` to the one at the directory ``target``."""

    target: str
    freeze_cgroup: Optional[str]
    source: Optional[str] = None
    device: Optional[int] = None
    ns_pid: Optional[int] = None


def replace(request: ReplaceRequest, filesystem: MountedFilesystem, progress: Progress) -> Dict[str, object]:
    """Replace the file system's mount by the real one and move the processes; the report. SpfsError on failure."""
    raise NotImplementedError


def switch(request: SwitchRequest, progress: Progress) -> Dict[str, object]:
    """Move the processes from one existing mount to another; the report. SpfsError on failure."""
    raise NotImplementedError
