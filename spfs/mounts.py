"""Putting mounts in their places in any mount namespace, finding them again, and taking them away.

The replacing of one mount by another is in ``spfs.mountswitch``, the finding in ``spfs.instances``; this module is the
way in to both.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import Dict, List, Optional, Sequence

from spfs import nschild
from spfs.errors import SpfsError, reason
from spfs.instances import Device, Instance, instances, mount_id, pin_namespace
from spfs.linux import mountapi
from spfs.mountswitch import PreparedSwitch, SwitchOutcome, prepare_switch
from spfs.nschild import Answer
from spfs.target import Target

__all__ = [
    "Instance", "PreparedSwitch", "SwitchOutcome", "attach", "instances", "open_root", "prepare_switch", "unmount"
]  # fmt: skip

_TIMEOUT = 30.0  # seconds; a path to a mountpoint may lead over file systems that hang


def attach(mount_fd: int, target: Target, path: str, timeout: float = _TIMEOUT) -> None:
    """Put the detached mount ``mount_fd`` on directory ``path`` of ``target``, beneath the target's root.

    SpfsError, and nothing attached: ENOENT, ENOTDIR, EINVAL if the path is not absolute, or as move_mount(2).
    """
    if not path.startswith("/"):
        raise SpfsError(f"cannot mount on {path!r}: not an absolute path", "give it as the target sees it")

    def move() -> Answer:
        # Opened as a directory first, for the kernel's EINVAL or ENOTDIR of move_mount says nothing of the reason.
        mountpoint = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        mountapi.move_mount(mount_fd, mountpoint)
        return None, []

    try:
        nschild.run(move, target, ("mnt",), timeout).close()
    except OSError as error:
        raise _not_attached(path, target, error) from error


def open_root(target: Target, path: str, timeout: float = _TIMEOUT) -> int:
    """O_PATH of directory ``path`` as the target sees it, the caller's; no request to what is mounted just there."""

    def work() -> Answer:
        return None, [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]

    with nschild.run(work, target, ("mnt",), timeout) as result:
        return result.steal()


def _not_attached(path: str, target: Target, error: OSError) -> SpfsError:
    hints = {
        errno.ENOENT: "make the directory first; the path is taken beneath the target's root",
        errno.ENOTDIR: "the mountpoint must be a directory",
        errno.EPERM: "needs root over the target's user namespace",
        errno.EINVAL: "is the mountpoint reachable in the target's mount namespace?",
        errno.ETIMEDOUT: "a file system on the way to it does not answer",
    }
    code = error.errno or errno.EIO
    return SpfsError(
        f"cannot mount on {path} in {target.describe()}: {reason(error)}", hints.get(code, ""), code
    )


def unmount(
    device: Device, targets: Sequence[Target] = (), timeout: float = _TIMEOUT, source: Optional[str] = None
) -> List[Instance]:
    """Unmount ``device`` lazily wherever it is mounted; what could not be unmounted (locked mounts, hidden paths).

    Mounts on top of it go with it, as with ``umount -l``. Those that vanish with a peer are unmounted, too. ``source``:
    see ``instances``.
    """
    with ExitStack() as holds:
        left: List[Instance] = []
        for _ in range(8):  # what one pass uncovers, or a namespace cloned meanwhile, is for the next one
            found = instances(device, targets, source)
            if not found or found == left:
                return found
            by_namespace: Dict[int, List[Instance]] = {}
            for instance in found:
                by_namespace.setdefault(instance.namespace, []).append(instance)
            for group in by_namespace.values():
                try:
                    with pin_namespace(group[0], targets) as place:
                        # The device number is free for somebody else's mount as soon as the last hold on this file
                        # system is gone: descriptors of what was unmounted keep it until no more is looked for.
                        holds.enter_context(nschild.call(lambda: _unmount_here(place, group), timeout))
                except SpfsError as error:
                    if error.errno != errno.ESRCH:  # the namespace has ended, and its mounts with it
                        raise
            left = found
        return instances(device, targets, source)


def _unmount_here(place: Target, group: Sequence[Instance]) -> Answer:
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    nschild.enter(place, ("mnt",), root=False)
    holds: List[int] = []
    # The ones mounted last first: they may be on one of the others.
    for instance in sorted(group, key=lambda one: len(one.mountpoint), reverse=True):
        try:
            here = mountapi.open_tree(mountapi.AT_FDCWD, instance.mountpoint, mountapi.AT_SYMLINK_NOFOLLOW)
            if mount_id(here, proc) != instance.mount_id:
                os.close(here)
            else:
                holds = holds or [here]
                mountapi.umount2(instance.mountpoint, mountapi.MNT_DETACH | mountapi.UMOUNT_NOFOLLOW)
        except OSError as error:
            # EINVAL: locked, or gone with a peer; ENOENT: gone with what it was on. The next scan tells them apart.
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
    return None, holds
