"""The paths behind a mounted file system's inode numbers, for a file system that has no process of ours to ask.

The text of a /proc link is only a hint ("x (deleted)" is no name, and names are reused): it counts if the path, opened
without a request to the file system, is the object itself. Implements ``spfs.references.Resolver``.
"""

from __future__ import annotations

import os
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence

from spfs.instances import Instance
from spfs.linux import procfs, statx
from spfs.linux.statx import Object
from spfs.references import Remains

LookUp = Callable[[Instance, List[str]], List[Optional[int]]]
"""For paths beneath a mount, the inode numbers of what is there now (None: nothing, or something else's)."""


class LinkNames:
    """Names by what processes' links say. ``look_up`` is called with few, large lists: it may need another process."""

    def __init__(self, device: int, instances: Sequence[Instance], look_up: LookUp) -> None:
        self._device = device
        self._instances = {one.mount_id: one for one in instances}
        self._look_up = look_up

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        wanted = set(nodes)
        hints: Dict[int, Dict[str, int]] = {}  # by mount: path -> inode number
        for link in links():
            try:
                found = statx.examine(link)
                if found.device == self._device and found.inode in wanted and found.mount_id in self._instances:
                    path = self._beneath(found, os.readlink(link))
                    if path is not None:
                        hints.setdefault(found.mount_id, {})[path] = found.inode
            except OSError:  # ended or closed meanwhile
                continue
        names: Dict[int, Optional[str]] = dict.fromkeys(wanted)
        for mount_id, paths in hints.items():
            instance = self._instances[mount_id]
            for path, inode in zip(paths, self._look_up(instance, list(paths))):
                if inode == paths[path]:
                    names[inode] = "/".join(filter(None, [instance.root, path]))
        return names

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        return {}  # it is the processes' descriptors alone that keep them

    def _beneath(self, found: Object, text: str) -> Optional[str]:
        mountpoint = self._instances[found.mount_id].mountpoint.rstrip("/")
        if text == mountpoint:
            return ""
        return text[len(mountpoint) + 1 :] if text.startswith(mountpoint + "/") else None


def with_other_devices(device: int, instances: Sequence[Instance]) -> Iterator[str]:
    """Links of what is on one of these mounts, but has another device number than ``device``, there or as mapped.

    Kernels before file_user_inode() show an overlay's files with the layer's number in /proc/PID/maps.
    """
    mounts = {one.mount_id for one in instances}
    for link in links():
        try:
            found = statx.examine(link)
            if found.mount_id in mounts and not (found.device == device and _is_mapped_so(link, device)):
                yield link
        except OSError:  # ended or closed meanwhile
            continue


def _is_mapped_so(link: str, device: int) -> bool:
    """If the link is a mapping's: does /proc/PID/maps show it with this device number?"""
    directory, name = os.path.split(link)
    process, kind = os.path.split(directory)
    if kind != "map_files":
        return True
    # maps has leading zeros, the link's name has none.
    wanted = [int(address, 16) for address in name.split("-")]
    lines = procfs.lines_of_device(procfs.read(f"{process}/maps"), device)
    return any([int(address, 16) for address in line.split(b" ")[0].split(b"-")] == wanted for line in lines)


def links() -> Iterator[str]:
    """Every link of /proc that stands for something a process holds."""
    for pid in procfs.processes():
        for name in ("cwd", "root", "exe"):
            yield f"/proc/{pid}/{name}"
        for directory in ("fd", "map_files"):
            try:
                names = os.listdir(f"/proc/{pid}/{directory}")
            except OSError:
                continue
            for name in names:
                yield f"/proc/{pid}/{directory}/{name}"
