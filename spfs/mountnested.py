"""What is mounted on an old mount: copied onto the real one ahead of time, and itself put there when that is in place.

A mount itself can only be moved within the namespace, so not onto what is still detached; and never from or to a
moment without it: whoever dies in the middle leaves on either side the mount or a copy of it. Where it cannot be moved
(see ``hand_over``), the copy stays: that shows the same, but who is on the mount itself has no path to it any more.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Iterator, Optional, Sequence, Tuple

from spfs.errors import reason
from spfs.linux import mountapi
from spfs.linux.mountapi import MS, MoveMount

_CLONE_TREE = mountapi.OPEN_TREE_CLONE | mountapi.AT_RECURSIVE


@dataclass
class Nested:
    """One mount at ``relative`` beneath the old one's root.

    ``mount``: a descriptor of its root, None if only a copy of it can be put in its place. ``copy``: of the copy's,
    None if somebody else's is there. Both are closed with the process.
    """

    relative: str
    mount: Optional[int]
    copy: Optional[int]
    attached: bool = False
    moved: bool = False

    def attach(self, real: int, there_already: bool = False) -> None:
        """Put the copy onto the real mount ``real``; it is dropped if another one is ``there_already``."""
        assert self.copy is not None
        if there_already:
            os.close(self.copy)
            self.copy = None
        else:
            mountapi.move_mount(self.copy, real, self.relative)
        self.attached = True

    def part_from_copy(self) -> None:
        """Before the mount is unmounted: a copy of a shared one is its peer, and would lose what is mounted on it."""
        if self.mount is not None:
            try:
                mountapi.mount_setattr(self.mount, flags=mountapi.AT_RECURSIVE, propagation=MS.PRIVATE)
            except OSError as error:
                if error.errno != errno.EINVAL:  # not mounted any more
                    raise

    def back_on(self, old: int) -> "Nested":
        """To be handed over in the other direction: ``old`` has a copy of it."""
        place = os.open(self.relative, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=old)
        return replace(self, copy=place, moved=False)


def copy(
    path: str, relative: str, whole: bool, given: Optional[int], real: int, others: Sequence[Nested]
) -> Nested:
    """A copy of the mount at ``path``, attached at ``relative`` of the real mount if the kernel allows that already.

    ``whole``: with all that is mounted on it, else itself alone, and what is on it comes onto the copy; ``given``: a
    detached mount that takes its place. ``others`` are those that were copied before. OSError if there is no such
    place.
    """
    if given is not None:
        fd = os.dup(given)
    else:
        flags = _CLONE_TREE if whole else mountapi.OPEN_TREE_CLONE
        fd = mountapi.open_tree(mountapi.AT_FDCWD, path, flags | mountapi.AT_NO_AUTOMOUNT)
    base, rest = _base(real, relative, others)
    try:
        os.close(os.open(rest, os.O_PATH | os.O_CLOEXEC, dir_fd=base))
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, f"{path} has no place on the real file system: {reason(error)}") from error
    if base != real:
        return Nested(relative, None, fd)
    mount = None
    if whole and given is None:
        mount = mountapi.open_tree(mountapi.AT_FDCWD, path, mountapi.AT_NO_AUTOMOUNT)
    nested = Nested(relative, mount, fd)
    try:
        nested.attach(real)
    except OSError as error:
        # Onto a detached mount only since Linux 6.15, and if it was made by fsmount, or in this namespace.
        if error.errno != errno.EINVAL:
            os.close(fd)
            raise
    return nested


def _base(real: int, relative: str, others: Sequence[Nested]) -> Tuple[int, str]:
    """The mount on which ``relative`` will be when all is attached, and its path there."""
    base, rest = real, relative
    for one in others:  # an inner one comes after the one that it is on
        if not one.attached and one.copy is not None and relative.startswith(one.relative + "/"):
            base, rest = one.copy, os.path.relpath(relative, one.relative)
    return base, rest


def hand_over(nested: Sequence[Nested], unmount: Callable[[int], None]) -> None:
    """Move the mounts themselves to where their copies are, which are unmounted; new copies stay where they were.

    Neither the mount that they are on, nor the one that they come to, may be shared: ``apart``. The kernel refuses what
    is locked by a more privileged namespace (fs/namespace.c, do_move_mount): then the copy stays. ``unmount``: takes
    off what is topmost at a descriptor.
    """
    for one in nested:
        assert one.mount is not None and one.copy is not None
        try:
            stand_in = mountapi.open_tree(one.mount, "", _CLONE_TREE)
            try:
                mountapi.mount_setattr(stand_in, flags=mountapi.AT_RECURSIVE, propagation=MS.PRIVATE)
                mountapi.move_mount(stand_in, one.mount, flags=MoveMount.BENEATH)
            finally:
                os.close(stand_in)  # which ends it if it is on no path
            mountapi.move_mount(one.mount, one.copy, flags=MoveMount.BENEATH)
        except OSError:
            continue
        one.moved = True
        # As above (``part_from_copy``), the other way round.
        mountapi.mount_setattr(one.copy, flags=mountapi.AT_RECURSIVE, propagation=MS.PRIVATE)
        unmount(one.copy)


@contextmanager
def apart(mount: int) -> Iterator[None]:
    """Keep what is done on the shared ``mount`` within the block from its peers, in this and other namespaces."""
    peer = mountapi.open_tree(mount, "", _CLONE_TREE)  # keeps the group; recursive for the sake of locked mounts
    try:
        mountapi.mount_setattr(mount, propagation=MS.PRIVATE)
        try:
            yield
        finally:
            mountapi.move_mount(peer, mount, flags=MoveMount.SET_GROUP)
    finally:
        os.close(peer)
