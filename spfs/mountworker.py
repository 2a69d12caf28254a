"""The part of a switch that runs inside a mount namespace: a forked helper's commands.

It holds what is prepared for each old mount there and, when told, puts the new one beneath, takes the old one off, or
gives it back. The order and the decisions are ``spfs.mountswitch``'s.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Dict, List

from spfs import mountnested
from spfs.errors import reason
from spfs.instances import mount_id, read_mountinfo
from spfs.linux import mountapi
from spfs.linux.mountapi import MS, MoveMount
from spfs.linux.mountinfo import MountTable
from spfs.mountnested import Nested
from spfs.nschild import Answer, Command

_HERE = mountapi.AT_NO_AUTOMOUNT | mountapi.AT_SYMLINK_NOFOLLOW


@dataclass
class _Place:
    """One old mount, ``old`` a descriptor of its root; ``real`` goes in its place, ``spare`` is a detached copy of the
    old one to give it back with.

    ``parent``: id of the mount that the old one was on. ``nested``: what is mounted on the old one, each after the one
    that it is on. ``how``: what was done ("" nothing yet). ``lined``: a mount of the same file system is beneath the
    old one already, as a switch leaves it that was killed when half done; ``adopted``: that one is on the path now, in
    place of ours.
    """

    path: str
    parent: int
    old: int
    real: int
    real_id: int
    spare: int
    nested: List[Nested] = field(default_factory=list)
    how: str = ""
    lined: bool = False
    adopted: bool = False


class Worker:
    """State of a helper; made before the fork, lives only in the child. Mount ids are the keys of all."""

    def __init__(self) -> None:
        self._places: Dict[int, _Place] = {}
        self._proc = -1

    def commands(self) -> Dict[str, Command]:
        return {
            "prepare": self.prepare,
            "nested": self.nested,
            "place": self.place,
            "reveal": self.reveal,
            "nest": self.nest,
            "follow": self.follow,
            "undo": self.undo,
            "check": self.check,
        }

    def open_proc(self) -> None:
        """Open this process' /proc; to be done before it joins a namespace, which may have none."""
        self._proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def prepare(self, argument: Any, fds: List[int]) -> Answer:
        """[[id, path]] and a detached real mount for each → {id: why it cannot be switched}."""
        refused = {}
        table = self._table()
        for (number, path), fd in zip(argument, fds):
            try:
                old = mountapi.open_tree(mountapi.AT_FDCWD, path, _HERE)
                if mount_id(old, self._proc) != number:
                    os.close(old)
                    raise OSError(errno.ESTALE, "its path leads to another mount, which covers it")
                # Recursive, or the kernel refuses to copy a mount that has locked mounts on it.
                spare = mountapi.open_tree(old, "", mountapi.OPEN_TREE_CLONE | mountapi.AT_RECURSIVE)
                # Not a peer of the old one: else the umount of what is nested there would propagate to the copy.
                mountapi.mount_setattr(spare, flags=mountapi.AT_RECURSIVE, propagation=MS.PRIVATE)
                real = os.dup(fd)
                place = _Place(path, table.by_id[number].parent_id, old, real, mount_id(real, self._proc), spare)
                beneath = table.by_id.get(place.parent)
                if beneath is not None and beneath.mountpoint == table.by_id[number].mountpoint:
                    place.lined = beneath.st_dev == os.fstat(real).st_dev
                self._places[number] = place
            except OSError as error:
                refused[number] = reason(error)
        return refused, []

    def nested(self, argument: Any, fds: List[int]) -> Answer:
        """{id, mounts: [[path, path beneath it, with all on it?, index in fds or -1]]}: copied onto the real mount."""
        place = self._places[argument["id"]]
        for path, relative, whole, index in argument["mounts"]:
            given = fds[index] if index >= 0 else None
            place.nested.append(mountnested.copy(path, relative, whole, given, place.real, place.nested))
        return None, []

    def place(self, argument: Any, fds: List[int]) -> Answer:
        """[id] → {id: how}: the real mount beneath the old one, where the kernel allows it."""
        return {number: self._place(number) for number in argument}, []

    def _place(self, number: int) -> str:
        place = self._places[number]
        if self._top(place.path) != number:
            return "gone"
        if not place.lined:
            self._put_beneath(place, place.old)
        return place.how

    @staticmethod
    def _put_beneath(place: _Place, top: int) -> bool:
        try:
            # Since Linux 6.5. Refused for a locked mount, one on the root of the namespace or on our root, and where
            # the parent's propagation would put a copy beneath the very mount (fs/namespace.c,
            # can_move_mount_beneath).
            mountapi.move_mount(place.real, top, flags=MoveMount.BENEATH)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
                raise
            return False
        place.how = "beneath"
        return True

    def _attach_late(self, place: _Place) -> None:
        # By the descriptor of its root the covered mount is reached: a walk looks for mounts on what it comes to, not
        # on where it starts.
        for one in place.nested:
            if not one.attached:
                # It may have come by propagation from a peer.
                one.attach(place.real, there_already=self._is_mountpoint(place, one.relative))

    def _is_mountpoint(self, place: _Place, relative: str) -> bool:
        fd = os.open(relative, os.O_PATH | os.O_CLOEXEC, dir_fd=place.real)
        try:
            there = self._table().by_id.get(mount_id(fd, self._proc))
        finally:
            os.close(fd)
        return there is not None and there.mountpoint == os.path.join(place.path, relative)

    def reveal(self, argument: Any, fds: List[int]) -> Answer:
        """[id] → {id: how}: the old mount off, so that the real one is on the path."""
        return {number: self._reveal(number) for number in argument}, []

    def _reveal(self, number: int) -> str:
        place = self._places[number]
        if place.how == "beneath":
            # Not earlier: when all peers are in place, what is put on one comes to the others, and is found there.
            self._attach_late(place)
            if self._top(place.path) == number:
                self._take_off(number, place)
        elif self._top(place.path) == number:
            if not (place.lined and self._adopt(number, place)):
                self._exchange(number, place)
        # Neither: it went with a peer, and a copy of the peer's real mount is here.
        return place.how if self._top(place.path) == place.real_id else "gone"

    def _take_off(self, number: int, place: _Place) -> None:
        """Unmount the old one, with ours beneath it; what is mounted on it comes to ours before, as far as it can."""
        self._hand_over(self._directly_on(number, place), place.old, place.real)
        self._unmount_old(number, place)

    def _unmount_old(self, number: int, place: _Place) -> None:
        """Unmount the old one with what is still mounted on it."""
        for one in place.nested:
            if not one.moved:
                one.part_from_copy()
        self._unmount(place.path, number)

    def _hand_over(self, nested: List[Nested], source: int, destination: int) -> None:
        table = self._table()
        with ExitStack() as stack:
            for mount in (source, destination) if nested else ():
                if table.by_id[mount_id(mount, self._proc)].group("shared") is not None:
                    stack.enter_context(mountnested.apart(mount))
            mountnested.hand_over(nested, self._unmount_covering)

    def _directly_on(self, number: int, place: _Place) -> List[Nested]:
        """What was mounted on mount ``number`` when the copies were made, and still is."""
        ours = [(one.mount, one) for one in place.nested if one.copy is not None and not one.moved]
        numbers = [(mount_id(mount, self._proc), one) for mount, one in ours if mount is not None]
        there = {mount.mount_id for mount in self._table().children(number)} if numbers else set()
        return [one for mount, one in numbers if mount in there]

    def _adopt(self, number: int, place: _Place) -> bool:
        """Take the old mount off; what is revealed stays if it is as the prepared one: else that is put onto it."""
        try:
            self._unmount_old(number, place)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):
                raise
            return False  # locked
        there = mountapi.open_tree(mountapi.AT_FDCWD, place.path, _HERE)
        if not _is_alike(there, place.real):
            os.close(there)
            mountapi.move_mount(place.real, mountapi.AT_FDCWD, place.path)
            place.how = "exchanged"
            return True
        place.real, ours = there, place.real
        os.close(ours)
        place.adopted = True  # for ``follow``, which can tell its root
        return True

    def _exchange(self, number: int, place: _Place) -> None:
        """Without "beneath": the old one off, then the real one on. Between the two the path is bare.

        What is mounted on it is for ``nest``, when all its peers are in place.
        """
        try:
            self._unmount_old(number, place)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):
                raise
            # Locked: made in a more privileged namespace, from which this one is a copy (mount_namespaces(7)). It
            # cannot be unmounted here by anybody, but it can be covered.
            mountapi.move_mount(place.real, place.old)
            place.how = "covered"
        else:
            try:
                mountapi.move_mount(place.real, mountapi.AT_FDCWD, place.path)
            except OSError:
                mountapi.move_mount(place.spare, mountapi.AT_FDCWD, place.path)
                raise
            place.how = "exchanged"

    def nest(self, argument: Any, fds: List[int]) -> Answer:
        """[id] → {}: what is to be on the real mounts that were put on their paths put on them, if not yet done."""
        for number in argument:
            place = self._places[number]
            if place.how in ("exchanged", "covered"):
                self._attach_late(place)
        return {}, []

    def follow(self, argument: Any, fds: List[int]) -> Answer:
        """[[id, keep what propagated?]] → {id: [how or "hidden", index of the new root in the fds or None]}.

        For mounts that a peer's switch may have switched already. A copy that propagated here is itself replaced by
        the mount that was prepared, unless its parent is shared: then the copy stays, for what is done to it is done
        to its peers, and the descriptor of its root goes back.
        """
        answer: Dict[int, List[Any]] = {}
        roots: List[int] = []
        for number, keep in argument:
            place = self._places[number]
            if self._top(place.path) == number and not self._off_a_copy(number):
                self._place(number)
                self._reveal(number)
                if place.how in ("exchanged", "covered"):
                    self._attach_late(place)
            table = self._table()
            top = table.top_at(place.path)
            if number in table.by_id and place.how != "covered":
                # Still mounted, so what is on its path is no copy of a peer's, but somebody's mount that covers it.
                answer[number] = ["hidden", None]
                continue
            if top is None:
                mountapi.move_mount(place.real, mountapi.AT_FDCWD, place.path)
                self._attach_late(place)
                place.how = "exchanged"
            elif top.mount_id != place.real_id and (keep or place.adopted):
                place.how = "propagated"
                if place.adopted:
                    self._attach_late(place)
                answer[number] = [place.how, len(roots)]
                roots.append(mountapi.open_tree(mountapi.AT_FDCWD, place.path, _HERE))
                continue
            elif top.mount_id != place.real_id:
                self._replace_copy(place)
            answer[number] = [place.how, None]
        return answer, roots

    def _off_a_copy(self, number: int) -> bool:
        """Take the old mount off if a copy of a peer's real mount is beneath it; False if it stays.

        What propagates to a path comes beneath the mount that is there. Such a one was not unmounted with its peer if
        a locked mount is on it.
        """
        place = self._places[number]
        if self._table().by_id[number].parent_id == place.parent:
            return False
        try:
            self._unmount_old(number, place)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):
                raise
            return False
        return True

    def _replace_copy(self, place: _Place) -> None:
        copy = mountapi.open_tree(mountapi.AT_FDCWD, place.path, _HERE)
        try:
            number = mount_id(copy, self._proc)
            if self._put_beneath(place, copy):
                self._attach_late(place)
                self._unmount(place.path, number)
            else:
                self._unmount(place.path, number)
                place.how = "exchanged"
                mountapi.move_mount(place.real, mountapi.AT_FDCWD, place.path)
                self._attach_late(place)
        finally:
            os.close(copy)

    def undo(self, argument: Any, fds: List[int]) -> Answer:
        """[id] → {id: why the old mount could not be given back}."""
        failed = {}
        for number in reversed(argument):
            place = self._places[number]
            try:
                self._undo(number, place)
            except OSError as error:
                failed[number] = reason(error)
        return failed, []

    def _undo(self, number: int, place: _Place) -> None:
        # Placed but not revealed, or revealed: either way the real one is below or on top of what is there. If it is
        # no more, or never was ("propagated"), then it was given back together with a peer.
        if place.how in ("beneath", "exchanged", "covered") and place.real_id in self._table().by_id:
            if place.how == "covered":
                self._unmount(place.path, place.real_id)
            else:
                self._give_back(number, place)
        elif place.adopted:
            mountapi.move_mount(place.spare, mountapi.AT_FDCWD, place.path)
        place.how = ""

    def _give_back(self, number: int, place: _Place) -> None:
        if self._top(place.path) == number:
            # Placed, not revealed: "beneath" is always beneath the topmost, so the old one must go for its copy to
            # come beneath the real one. The application stands still meanwhile.
            self._take_off(number, place)
        try:
            mountapi.move_mount(place.spare, place.real, flags=MoveMount.BENEATH)
        except OSError:
            self._unmount(place.path, place.real_id)
            mountapi.move_mount(place.spare, mountapi.AT_FDCWD, place.path)
        else:
            moved = [one.back_on(place.spare) for one in place.nested if one.moved]
            self._hand_over(moved, place.real, place.spare)
            self._unmount(place.path, place.real_id)

    def check(self, argument: Any, fds: List[int]) -> Answer:
        """[major, minor] of the old device → {id: what is wrong with what is on its path now}."""
        table = self._table()
        here = [table.by_id[place.real_id] for place in self._places.values() if place.real_id in table.by_id]
        wrong = {}
        for number, place in self._places.items():
            if not place.how:
                continue  # hidden: said to be left
            top = table.by_id.get(self._top(place.path))
            device = list(top.device) if top is not None else None
            if place.how == "propagated":
                # A copy has an id that nobody told us: its device must do.
                right = device is not None and device != argument and all(device == list(m.device) for m in here)
            else:
                right = top is not None and top.mount_id == place.real_id
            if not right:
                wrong[number] = f"{top.fstype if top else 'an unknown'} mount is there instead of the real one"
        return wrong, []

    def _table(self) -> MountTable:
        return MountTable.from_bytes(read_mountinfo(self._proc))

    def _top(self, path: str) -> int:
        """Id of the mount that ``path`` leads to."""
        fd = mountapi.open_tree(mountapi.AT_FDCWD, path, _HERE)
        try:
            return mount_id(fd, self._proc)
        finally:
            os.close(fd)

    def _unmount_covering(self, root: int) -> None:
        """Unmount lazily the topmost mount at directory or file ``root``, to which no path need lead.

        By the link of the descriptor: umount2(2) has no other way to what is beneath the mount on a path.
        """
        os.fchdir(self._proc)
        try:
            mountapi.umount2(f"fd/{root}", mountapi.MNT_DETACH)
        finally:
            os.chdir("/")

    def _unmount(self, path: str, expected: int) -> None:
        """Unmount lazily mount ``expected``, which is the topmost at ``path``; OSError EBUSY if it is not.

        By path and not by a descriptor: "." would need fchdir, which asks the file system for permission.
        """
        if self._top(path) != expected:
            raise OSError(errno.EBUSY, "another mount covers it by now")
        mountapi.umount2(path, mountapi.MNT_DETACH | mountapi.UMOUNT_NOFOLLOW)


def _is_alike(first: int, second: int) -> bool:
    """Do the roots of two mounts show the same directory with the same flags (read-only, nosuid …)?"""
    same = os.path.samestat(os.stat(first), os.stat(second))
    return same and os.fstatvfs(first).f_flag == os.fstatvfs(second).f_flag
