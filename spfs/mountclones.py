"""Detached clones of the real mount, one for each mount of the old file system, as like it as a mount can be.

The same subdirectory, the same per-mount flags relative to the first mount of the old file system, the same propagation
among each other. Runs in a forked child: the way to a subdirectory leads over the real file system, which may hang.
"""

from __future__ import annotations

import errno
import os
from typing import Dict, List, Optional, Sequence

from spfs import nschild, workshop
from spfs.errors import SpfsError, reason
from spfs.instances import Instance
from spfs.linux import mountapi
from spfs.linux.mountapi import MS, MountAttr
from spfs.linux.openat2 import RESOLVE_IN_ROOT, RESOLVE_NO_SYMLINKS, openat2
from stubfs import wire

_AT_ONCE = wire.MAX_FDS // 2

_ATTRIBUTES: Dict[str, MountAttr] = {
    "ro": MountAttr.RDONLY,
    "nosuid": MountAttr.NOSUID,
    "nodev": MountAttr.NODEV,
    "noexec": MountAttr.NOEXEC,
    "nodiratime": MountAttr.NODIRATIME,
    "nosymfollow": MountAttr.NOSYMFOLLOW,
}


def make_clones(instances: Sequence[Instance], real_fd: int, timeout: Optional[float]) -> List[int]:
    """A detached mount for each of ``instances``, in their order; the descriptors are the caller's.

    ``real_fd`` is a detached mount; if it had to be used up, it is a new clone of it afterwards, behind the same
    number. SpfsError if a subdirectory is missing on the real file system, or it does not answer within
    ``timeout`` seconds.
    """
    fds: List[int] = []
    try:
        # Few at a time: a packet holds a bounded number of descriptors.
        for start in range(0, len(instances), _AT_ONCE):
            part = instances[start : start + _AT_ONCE]
            with nschild.call(lambda: (None, _clones(part, instances[0], real_fd)), timeout) as result:
                fds += [result.steal(index) for index in range(len(part))]
                if len(result.fds):  # what was detached is used up, and this is in its place
                    copy = result.steal(len(part))
                    os.dup2(copy, real_fd, inheritable=False)
                    os.close(copy)
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise SpfsError(
                f"cannot prepare the real mount: {reason(error)}",
                "does its server answer?" if error.errno == errno.ETIMEDOUT else "",
                error.errno or errno.EIO,
            ) from error
        raise
    return fds


def _clones(instances: Sequence[Instance], first: Instance, real_fd: int) -> List[int]:
    """The clones; after them, if ``real_fd`` had to be used up, another one."""
    groups = _Groups(real_fd)
    fds = [_clone(instance, first, groups) for instance in instances]
    if groups.used_up:
        # A clone: the seed itself is unmounted when the namespace that it is attached in ends, with this process.
        fds.append(mountapi.open_tree(groups.seed(None, None), "", mountapi.OPEN_TREE_CLONE))
    return fds


def _clone(instance: Instance, first: Instance, groups: "_Groups") -> int:
    shared, master = instance.mount.group("shared"), instance.mount.group("master")
    source = groups.seed(shared, master)
    if not instance.root:
        mount_fd = mountapi.open_tree(source, "", mountapi.OPEN_TREE_CLONE)
    else:
        try:
            # The real side's symlinks must not lead to another directory than the one the old mount showed.
            place = openat2(source, instance.root, os.O_PATH, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)
        except OSError as error:
            raise SpfsError(
                f"cannot replace mount {instance.describe()}: {instance.root} on the real file system:"
                f" {reason(error)}",
                "make it there, or unmount the bind mount",
                error.errno or errno.EIO,
            ) from error
        mount_fd = mountapi.open_tree(place, "", mountapi.OPEN_TREE_CLONE)
        os.close(place)
    _set_attributes(mount_fd, instance.options, first.options)
    if shared is None and master is not None:
        mountapi.mount_setattr(mount_fd, propagation=MS.SLAVE)
    elif instance.mount.group("unbindable") is not None:
        mountapi.mount_setattr(mount_fd, propagation=MS.UNBINDABLE)
    return mount_fd


def _set_attributes(mount_fd: int, options: Sequence[str], baseline: Sequence[str]) -> None:
    """What was changed on a bind mount against the first mount is changed on its clone, too."""
    change, clear = MountAttr(0), MountAttr(0)
    for word, attribute in _ATTRIBUTES.items():
        if word in options and word not in baseline:
            change |= attribute
        elif word in baseline and word not in options:
            clear |= attribute
    if _access_time(options) != _access_time(baseline):
        # The access time modes are one field: all of its bits are cleared, and 0 is relatime.
        clear |= MountAttr.ATIME_MASK
        change |= _access_time(options)
    if change or clear:
        mountapi.mount_setattr(mount_fd, set=change, clear=clear)


def _access_time(options: Sequence[str]) -> MountAttr:
    if "noatime" in options:
        return MountAttr.NOATIME
    return MountAttr(0) if "relatime" in options else MountAttr.STRICTATIME


class _Groups:
    """Peer groups among the clones like those among the old mounts.

    A clone of a shared mount is its peer (Documentation/filesystems/sharedsubtree.rst), so each group has a seed from
    which its members are cloned. The seeds go when the child ends. ``used_up``: was the real mount itself attached?
    """

    def __init__(self, real_fd: int) -> None:
        self.used_up = False
        try:
            # Since Linux 6.15 a detached mount can be cloned, if it was made by fsmount or is a copy of such a one, or
            # was copied from the present mount namespace (fs/namespace.c, check_anonymous_mnt).
            first = mountapi.open_tree(real_fd, "", mountapi.OPEN_TREE_CLONE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Otherwise only what is attached in one's own namespace.
            workshop.enter()
            first = real_fd
            self.used_up = True
        self._seeds: Dict[Optional[int], int] = {}
        self._plant(first, None, [MS.PRIVATE])

    def _plant(self, mount_fd: int, group: Optional[int], propagation: Sequence[MS]) -> int:
        if self.used_up:
            name = f"seed{group}"
            os.mkdir(name)
            mountapi.move_mount(mount_fd, mountapi.AT_FDCWD, name)
        for change in propagation:
            mountapi.mount_setattr(mount_fd, propagation=change)
        self._seeds[group] = mount_fd
        return mount_fd

    def seed(self, shared: Optional[int], master: Optional[int]) -> int:
        """The mount to clone a member of group ``shared`` or a slave of group ``master`` from."""
        if shared is None:
            return self._seeds[None] if master is None else self.seed(master, None)
        if shared in self._seeds:
            return self._seeds[shared]
        mount_fd = mountapi.open_tree(self.seed(None, master), "", mountapi.OPEN_TREE_CLONE)
        return self._plant(mount_fd, shared, [MS.SHARED] if master is None else [MS.SLAVE, MS.SHARED])
