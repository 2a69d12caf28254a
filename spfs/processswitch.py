"""The process part alone: from one mount that exists to another one, neither of which is ours.

For who moves a program's files to another disk, or has mounted the real file system by other means (command
``switch``). Runs in a process by itself, like ``spfs.replace``; needs neither a manager nor FUSE.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Callable, Container, Dict, Iterator, List, Optional, Sequence, Tuple

from spfs import nschild
from spfs.errors import SpfsError, reason
from spfs.freezer import Freezer, open_freezer
from spfs.instances import Instance, instances, pin_namespace
from spfs.linknames import LinkNames, with_other_devices
from spfs.linux import mountapi, procfs, statx
from spfs.mounts import open_root
from spfs.nschild import Answer
from spfs.references import HeldReference, MountRoot
from spfs.surgery.selection import Everybody, Family, Members
from spfs.surgery.theatre import task_state
from spfs.switch import Switch
from spfs.target import Target

Progress = Callable[[str, Dict[str, object]], None]

TIMEOUT = 30.0  # seconds for a path to be resolved, which may lead over file systems that hang


@dataclass(frozen=True)
class SwitchRequest:
    """What is beneath directory ``source``, or on any mount of ``device`` (st_dev), goes to the same place beneath
    directory ``target`` of another file system.

    Paths are as process ``ns_pid`` sees them (None: as we do). Moved are the processes ``pids`` with what they fork
    meanwhile; without any those of ``freeze_cgroup`` if ``only_cgroup``, else all on this machine.
    """

    target: str
    freeze_cgroup: Optional[str] = None
    source: Optional[str] = None
    device: Optional[int] = None
    ns_pid: Optional[int] = None
    pids: Tuple[int, ...] = ()
    only_cgroup: bool = False
    strict: bool = False


def switch(request: SwitchRequest, progress: Progress, protect: Sequence[int] = ()) -> Dict[str, object]:
    """Move what the processes hold; the mounts stay as they are. The report; SpfsError if nothing could be done.

    ``protect``: processes that are needed for it, and must neither be stopped nor frozen.
    """
    with _prepared(request, protect) as step:
        preparation = step.prepare()
        progress("prepared", {"processes": len(preparation.processes), "references": dict(preparation.references)})
        return step.execute(lambda: None).data()


def examine(request: SwitchRequest, protect: Sequence[int] = ()) -> List[HeldReference]:
    """What would be moved, and what would stay and why; nothing is stopped and nothing is changed."""
    with _prepared(request, protect) as step:
        step.prepare()
        return list(step.references())


@contextmanager
def _prepared(request: SwitchRequest, protect: Sequence[int]) -> Iterator[Switch]:
    with ExitStack() as stack:
        freezer = stack.enter_context(open_freezer(request.freeze_cgroup, protect))
        place = stack.enter_context(Target.pin(request.ns_pid))
        new = _open(place, request.target)
        stack.callback(os.close, new)
        if request.device is not None:
            device, found, prefix = request.device, instances(request.device, [place]), ""
        else:
            device, found, prefix = _source(place, "/" if request.source is None else request.source)
        for link in with_other_devices(device, found):
            where = f"{request.source or '/'} in {place.describe()}"
            raise _indistinct(where, f"{_read(link)} ({link}) has another device number than its mount")
        if statx.examine("", new, statx.AT_EMPTY_PATH).device == device:
            raise SpfsError(
                f"cannot switch to {request.target}: it is on the file system that is left",
                "give a directory on another one",
            )
        root = MountRoot(new, prefix)

        def look_up(instance: Instance, paths: List[str]) -> List[Optional[int]]:
            with pin_namespace(instance, [place]) as there:
                with nschild.run(lambda: _inodes(instance, paths), there, ("mnt",), TIMEOUT, root=False) as result:
                    return list(result.value)

        yield stack.enter_context(
            Switch(
                device,
                LinkNames(device, found, look_up),
                lambda _: root,
                freezer,
                strict=request.strict,
                chosen=_chosen(request, freezer),
                exclude=protect,
                # Without a name it cannot be told where it is: better reported than passed over.
                within=lambda path: path is None or root.relative(path) is not None,
            )
        )


def _chosen(request: SwitchRequest, freezer: Freezer) -> Container[int]:
    if request.pids:
        for pid in request.pids:
            _refuse_other_than_process(pid)
        return Family(request.pids)
    return Members(freezer.pids) if request.only_cgroup else Everybody()


def _refuse_other_than_process(pid: int) -> None:
    """There is a /proc/PID of each thread, and of what has no descriptors and no memory at all."""
    try:
        status = procfs.parse_status(procfs.read(f"/proc/{pid}/status"))
        ended = task_state(pid) in "ZX" and len(procfs.tasks(pid)) < 2
    except (FileNotFoundError, ProcessLookupError) as error:
        raise SpfsError(f"cannot switch process {pid}: there is none", errno=errno.ESRCH) from error
    if status.group != pid:
        raise SpfsError(f"cannot switch process {pid}: it is a thread of process {status.group}", "name that one")
    if status.kernel_thread or ended:
        why = "it has ended, and nobody has waited for it" if ended else "it is a thread of the kernel"
        raise SpfsError(f"cannot switch process {pid}: {why}", errno=errno.ESRCH)


def _source(place: Target, path: str) -> Tuple[int, List[Instance], str]:
    """The file system that ``path`` is on: its device, its mounts, and the directory's path beneath its root."""
    fd = _open(place, path)
    try:
        # Neither needs a request to it: one that hangs can be left, too.
        there, text = statx.examine("", fd, statx.AT_EMPTY_PATH), os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    found = instances(there.device, [place])
    for instance in found:
        mountpoint = instance.mountpoint.rstrip("/")
        if instance.mount_id == there.mount_id and (text == (mountpoint or "/") or text.startswith(mountpoint + "/")):
            return there.device, found, "/".join(filter(None, [instance.root, text[len(mountpoint) :].strip("/")]))
    raise _indistinct(f"{path} in {place.describe()}", "no mount there has its device number")


def _indistinct(where: str, why: str) -> SpfsError:
    return SpfsError(
        f"cannot switch from {where}: {why}",
        "subvolumes of btrfs, and an overlay of layers on several file systems, are not supported",
        errno.EOPNOTSUPP,
    )


def _read(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return "a file"


def _open(place: Target, path: str) -> int:
    try:
        if not path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return open_root(place, path)
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
