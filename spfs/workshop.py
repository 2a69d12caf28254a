"""A mount namespace of a forked child's own, with a directory to mount on that nobody else can see."""

from __future__ import annotations

import os

from spfs.linux import mountapi, namespaces
from spfs.linux.mountapi import MS, FsConfig


def private_namespace() -> None:
    """Leave the parent's mount namespace for a copy of it."""
    namespaces.unshare(namespaces.CLONE_NEWNS)
    # Nothing that is mounted here may be seen elsewhere; what is unmounted elsewhere must not be held here.
    mountapi.mount_setattr(mountapi.AT_FDCWD, "/", mountapi.AT_RECURSIVE, propagation=MS.SLAVE)


def enter() -> int:
    """In a private namespace, make an empty tmpfs the current directory; a descriptor of it, the caller's.

    It is mounted over "/": that exists everywhere, and it hides nothing, since a path walk begins at the root below
    it. As the current directory it is reached all the same.
    """
    private_namespace()
    fs_fd = mountapi.fsopen("tmpfs")
    try:
        mountapi.fsconfig(fs_fd, FsConfig.CMD_CREATE)
        base = mountapi.fsmount(fs_fd)
    finally:
        os.close(fs_fd)
    mountapi.move_mount(base, mountapi.AT_FDCWD, "/")
    os.fchdir(base)
    return base
