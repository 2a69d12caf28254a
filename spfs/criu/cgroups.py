"""The cgroups of a restore: those of CRIU, which we leave, and the one that a restored tree may have for itself."""

from __future__ import annotations

import os
from typing import Collection, Dict, Iterator, List, Optional, Tuple

from spfs.criu.log import log


def leave() -> None:
    """For those of the first process: what is started by us outlives CRIU, which runc has put into the container's."""
    ours, wanted = (_paths(pid) for pid in ("self", "1"))
    if ours == wanted:
        return
    for controllers, directory in _directories(wanted):
        if ours.get(controllers) != wanted[controllers]:
            try:
                with open(os.path.join(directory, "cgroup.procs"), "w") as procs:
                    procs.write("0")
            except OSError as error:
                log(f"cannot leave the cgroup of CRIU for {wanted[controllers]}: {error}")


def freezer_of(root: int, others: Collection[int]) -> Optional[str]:
    """The freezer cgroup in which the process ``root`` and its descendants are by themselves, but for ``others``.

    As containers have one. None where somebody else is in it, too: who shares a cgroup with CRIU, as a user's session,
    is not to be frozen. Nobody is moved to another one: processes see their cgroups, and a next dump would have it.
    """
    paths = _paths(str(root))
    for controllers, directory in _directories(paths):
        v2 = controllers == ""
        if not v2 and "freezer" not in controllers.split(","):
            continue
        if not os.path.exists(os.path.join(directory, "cgroup.freeze" if v2 else "freezer.state")):
            continue  # the root cgroup
        from spfs.freezer import open_freezer

        members = set(open_freezer(directory).pids()) - set(others)
        if members and members <= set(tree(root)):
            return directory
    return None


def tree(root: int) -> List[int]:
    """The process and its descendants, of all of its threads; without those that have ended meanwhile."""
    found = [root]
    for pid in found:
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def _paths(pid: str) -> Dict[str, str]:
    """Controllers ("" for v2's) → path."""
    with open(f"/proc/{pid}/cgroup") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    return {controllers: path for _, controllers, path in lines}


def _directories(paths: Dict[str, str]) -> Iterator[Tuple[str, str]]:
    """(controllers, directory), of those that can be seen here."""
    from spfs.linux import mountinfo

    with open("/proc/self/mountinfo", "rb") as file:
        mounts = [mount for mount in mountinfo.parse(file.read()) if mount.fstype in ("cgroup", "cgroup2")]
    for mount in mounts:
        options = mount.super_options.split(",")
        for controllers, path in paths.items():
            if (mount.fstype == "cgroup2") != (controllers == ""):
                continue
            if controllers == "" or set(controllers.split(",")) <= set(options):
                beneath = os.path.relpath(path, mount.root) if path.startswith(mount.root) else "."
                yield controllers, os.path.normpath(os.path.join(mount.mountpoint, beneath))
