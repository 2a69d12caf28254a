"""The process part alone: from one mount that exists to another one, neither of which is ours.

For who has mounted the real file system by other means (command ``switch``). Runs in a process by itself, like
``spfs.replace``.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional

from spfs import nschild
from spfs.errors import SpfsError, reason
from spfs.freezer import open_freezer
from spfs.instances import Instance, instances, pin_namespace
from spfs.linknames import LinkNames
from spfs.linux import mountapi, statx
from spfs.nschild import Answer
from spfs.references import MountRoot
from spfs.switch import Switch
from spfs.target import Target

Progress = Callable[[str, Dict[str, object]], None]

TIMEOUT = 30.0  # seconds for a path to be resolved, which may lead over file systems that hang


@dataclass(frozen=True)
class SwitchRequest:
    """From the mount at ``source``, or every mount of ``device`` (st_dev), to the one that directory ``target`` is on.

    Paths are as process ``ns_pid`` sees them (None: as we do).
    """

    target: str
    freeze_cgroup: Optional[str]
    source: Optional[str] = None
    device: Optional[int] = None
    ns_pid: Optional[int] = None


def switch(request: SwitchRequest, progress: Progress) -> Dict[str, object]:
    """Move what the processes hold; the mounts stay as they are. The report; SpfsError if nothing could be done."""
    protect = (os.getppid(),)
    with ExitStack() as stack:
        freezer = stack.enter_context(open_freezer(request.freeze_cgroup, protect))
        place = stack.enter_context(Target.pin(request.ns_pid))
        new = _open_root(place, request.target)
        stack.callback(os.close, new)
        device = request.device if request.device is not None else _device(place, request.source or "/")
        if statx.examine("", new, statx.AT_EMPTY_PATH).device == device:
            raise SpfsError(f"cannot switch to {request.target}: it is on the file system that is left", "give another")
        found = instances(device, [place])
        root = MountRoot(new)

        def look_up(instance: Instance, paths: List[str]) -> List[Optional[int]]:
            with pin_namespace(instance, [place]) as there:
                with nschild.run(lambda: _inodes(instance, paths), there, ("mnt",), TIMEOUT, root=False) as result:
                    return list(result.value)

        step = stack.enter_context(
            Switch(device, LinkNames(device, found, look_up), lambda _: root, freezer, exclude=protect)
        )
        preparation = step.prepare()
        progress("prepared", {"processes": len(preparation.processes), "references": dict(preparation.references)})
        return step.execute(lambda: None).data()


def _open_root(place: Target, path: str) -> int:
    def work() -> Answer:
        return None, [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]

    return _resolved(place, path, work).steal()


def _device(place: Target, path: str) -> int:
    def work() -> Answer:
        # The mount that is seen there, without a request to it.
        tree = mountapi.open_tree(mountapi.AT_FDCWD, path, mountapi.AT_NO_AUTOMOUNT)
        return statx.examine("", tree, statx.AT_EMPTY_PATH).device, []

    with _resolved(place, path, work) as result:
        return int(result.value)


def _resolved(place: Target, path: str, work: Callable[[], Answer]) -> nschild.Result:
    try:
        return nschild.run(work, place, ("mnt",), TIMEOUT)
    except OSError as error:
        raise SpfsError(
            f"cannot switch: {path} in {place.describe()}: {reason(error)}",
            "give directories as that process sees them",
            error.errno or errno.EIO,
        ) from error


def _inodes(instance: Instance, paths: List[str]) -> Answer:
    root = mountapi.open_tree(mountapi.AT_FDCWD, instance.mountpoint, mountapi.AT_SYMLINK_NOFOLLOW)
    inodes: List[Optional[int]] = []
    for path in paths:
        flags = statx.AT_SYMLINK_NOFOLLOW if path else statx.AT_EMPTY_PATH
        try:
            found = statx.examine(path, root, flags)
        except OSError:
            inodes.append(None)
            continue
        inodes.append(found.inode if found.device == instance.mount.st_dev else None)
    return inodes, []
