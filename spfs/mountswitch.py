"""The old file system's mounts exchanged for the real one's, everywhere at once and within a blackout.

``prepare_switch`` does all that can be done before: detached clones of the real mount, a helper inside each mount
namespace. ``commit`` then puts each clone beneath the old mount and takes that off. What is on a path is never nothing,
except where the kernel refuses "beneath" (see ``spfs.mountworker``).
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Dict, FrozenSet, Iterable, List, Optional, Sequence, Set, Tuple, Type

from spfs.errors import SpfsError, reason
from spfs.instances import Instance, instances, pin_namespace
from spfs.linux.mountinfo import Mount
from spfs.mountclones import make_clones
from spfs.mountworker import Worker
from spfs.nschild import Helper, deadline_left
from spfs.references import MountRoot
from spfs.target import Target
from stubfs import wire

PREPARE_TIMEOUT = 30.0  # seconds
COMMIT_TIMEOUT = 5.0


@dataclass(frozen=True)
class SwitchOutcome:
    """``switched``: mount id of each old mount → how ("beneath", "exchanged", "covered", "propagated").

    ``left``: what is still mounted, with the reason; "covered" mounts are among them, since the old one stays beneath
    the real one. ``seconds``: duration of the commit.
    """

    switched: Dict[int, str] = field(default_factory=dict)
    left: Tuple[Tuple[Instance, str], ...] = ()
    seconds: float = 0.0


class PreparedSwitch:
    """A switch ready to be committed, once. Owns the helpers, the clones and the descriptors in ``roots``.

    ``roots``: old mount id → the new mount's root. For those that the commit reports as "propagated" the real mount
    on the path is known only after it, behind the same descriptor number: it is the copy of a shared peer's, so
    what is opened before would be on a mount that is on no path.
    """

    def __init__(self, switched: Sequence[Instance], targets: Sequence[Target], timeout: float) -> None:
        self._instances = {instance.mount_id: instance for instance in switched}
        self._targets = targets
        self._timeout = timeout
        self._helpers: Dict[int, Helper] = {}
        self._nested_done = False
        self._committed = False
        self._leaders, self._followers = _leaders(one for one in switched if not one.inside)
        self.roots: Dict[int, MountRoot] = {}
        self.left: List[Tuple[Instance, str]] = []

    @property
    def helpers(self) -> FrozenSet[int]:
        """The pids of our helper processes. They hold the old mounts, and must not be stopped."""
        return frozenset(helper.pid for helper in self._helpers.values())

    @property
    def mountpoints(self) -> FrozenSet[str]:
        """What is mounted on the old ones is mounted there: paths relative to the root of the file system."""
        return frozenset(
            os.path.relpath(os.path.join(one.root, os.path.relpath(mount.mountpoint, one.mountpoint)), "/")
            for one in self._instances.values()
            for mount in one.nested
            if mount.parent_id == one.mount_id
        )

    def prepare(self, real_fd: int) -> None:
        """Clones and helpers. For ``prepare_switch``, which closes this object if it fails."""
        found = list(self._instances.values())
        for instance, fd in zip(found, make_clones(found, real_fd, self._timeout)):
            self.roots[instance.mount_id] = MountRoot(fd, instance.root)
        for namespace in dict.fromkeys(instance.namespace for instance in found):
            here = [one for one in found if one.namespace == namespace and not one.inside]
            if not here:
                continue
            try:
                self._prepare_namespace(namespace, here)
            except SpfsError as error:
                if error.errno != errno.ESRCH:
                    raise
                self.left += [(one, "its mount namespace is gone") for one in here]
        refused = {instance.mount_id for instance, _ in self.left}
        self._leaders = [one for one in self._leaders if one.mount_id not in refused]
        self._followers = [one for one in self._followers if one.mount_id not in refused]

    def _prepare_namespace(self, namespace: int, here: Sequence[Instance]) -> None:
        worker = Worker()
        with pin_namespace(here[0], self._targets) as place:
            self._helpers[namespace] = Helper(
                worker.commands(), place, ("mnt",), before=worker.open_proc, timeout=self._timeout
            )
        helper = self._helpers[namespace]
        for part in _parts(here):
            fds = [self.roots[one.mount_id].fd for one in part]
            helper.send("prepare", [[one.mount_id, one.mountpoint] for one in part], fds)
            with helper.receive(self._timeout) as result:
                for number, why in result.value.items():
                    self.left.append((self._instances[int(number)], why))

    def prepare_nested(self, timeout: float = PREPARE_TIMEOUT) -> None:
        """Copy the mounts that are on the old ones onto the new ones; the rest of the lazy umount takes them along.

        The paths to them lead over the old file system, so it must answer: to be called when it has left stub mode,
        before the freeze. ``commit`` does it if it was not done. SpfsError if one has no place on the real file system,
        or the file system does not answer in ``timeout`` seconds; nothing has changed then.
        """
        if self._nested_done:
            return
        for instance in [*self._leaders, *self._followers]:
            plan, fds = self._nested_plan(instance)
            if not plan:
                continue
            helper = self._helpers[instance.namespace]
            try:
                helper.call("nested", {"id": instance.mount_id, "mounts": plan}, fds, timeout).close()
            except OSError as error:
                raise SpfsError(
                    f"cannot replace mount {instance.describe()}: a mount on it cannot be kept: {reason(error)}",
                    "make its mountpoint on the real file system, or unmount it",
                    error.errno or errno.EIO,
                ) from error
        self._nested_done = True

    def _nested_plan(self, instance: Instance) -> Tuple[List[List[Any]], List[int]]:
        """For ``Worker.nested``: whole subtrees where no mount of the old file system is in them."""
        children: Dict[int, List[Mount]] = {}
        for mount in instance.nested:
            children.setdefault(mount.parent_id, []).append(mount)
        plan: List[List[Any]] = []
        fds: List[int] = []

        def holds_old(mount: Mount) -> bool:
            return mount.device == instance.mount.device or any(map(holds_old, children.get(mount.mount_id, [])))

        def add(parent: int) -> None:
            for mount in children.get(parent, []):
                relative = os.path.relpath(mount.mountpoint, instance.mountpoint)
                if mount.mount_id in self.roots:
                    plan.append([mount.mountpoint, relative, False, len(fds)])
                    fds.append(self.roots[mount.mount_id].fd)
                    add(mount.mount_id)
                elif holds_old(mount):
                    plan.append([mount.mountpoint, relative, False, -1])
                    add(mount.mount_id)
                else:
                    plan.append([mount.mountpoint, relative, True, -1])

        add(instance.mount_id)
        return plan, fds

    def commit(self, timeout: float = COMMIT_TIMEOUT) -> SwitchOutcome:
        """Switch all mounts; of each it is said how, or why it is left. Meant for the blackout, bounded by ``timeout``.

        SpfsError if a helper died or did not answer in time; ``undo`` then gives back what it can.
        """
        start = time.monotonic()
        deadline = start + timeout
        if self._committed:
            raise RuntimeError("these mounts have been switched")  # a defect of the caller's
        self._committed = True
        switched: Dict[int, str] = {}
        try:
            self.prepare_nested(max(0.0, deadline - time.monotonic()))
            waves = _waves(self._leaders)
            for command in ("place", "reveal", "nest"):
                for wave in waves:
                    switched.update(self._ask_all(command, wave, deadline))
            gone = [one for one in self._leaders if switched.get(one.mount_id) == "gone"]
            # What only looks for a copy first; then the others, one helper after the other.
            followers = sorted([*gone, *self._followers], key=lambda one: (not _keeps_copy(one), one.namespace))
            for _, group in itertools.groupby(followers, lambda one: one.namespace):
                switched.update(self._follow(list(group), deadline))
        except OSError as error:
            raise SpfsError(
                f"cannot switch the mounts: {reason(error)}", "undo gives them back", error.errno or errno.EIO
            ) from error
        for outer in [*self._leaders, *self._followers]:
            # What was inside came with the tree that it is in.
            for mount in outer.nested:
                if mount.mount_id in self._instances and switched[outer.mount_id] != "hidden":
                    switched[mount.mount_id] = switched[outer.mount_id]
        left = [*self.left]
        for number, how in switched.items():
            if how == "covered":
                left.append((self._instances[number], "locked by a more privileged mount namespace: it stays beneath"))
            elif how == "hidden":
                left.append((self._instances[number], "another mount covers it by now"))
        for instance, _ in left:
            if switched.get(instance.mount_id) != "covered":
                switched.pop(instance.mount_id, None)
        return SwitchOutcome(switched, tuple(left), time.monotonic() - start)

    def _ask_all(self, command: str, wanted: Sequence[Instance], deadline: float) -> Dict[int, str]:
        """Ask the helper of each namespace, all at once; the answers, by mount id."""
        asked: List[Helper] = []
        answers: Dict[int, str] = {}
        failure: Optional[OSError] = None
        for namespace in dict.fromkeys(one.namespace for one in wanted):
            helper = self._helpers[namespace]
            try:
                helper.send(command, [one.mount_id for one in wanted if one.namespace == namespace])
                asked.append(helper)
            except OSError as error:
                failure = failure or error
        for helper in asked:
            try:
                with helper.receive(deadline_left(deadline)) as result:
                    answers.update({int(number): how for number, how in result.value.items()})
            except OSError as error:  # the others are waited for all the same: what they did can be undone
                failure = failure or error
        if failure is not None:
            raise failure
        return answers

    def _follow(self, group: Sequence[Instance], deadline: float) -> Dict[int, str]:
        answers: Dict[int, str] = {}
        helper = self._helpers[group[0].namespace]
        argument = [[one.mount_id, _keeps_copy(one)] for one in group]
        with helper.call("follow", argument, (), deadline_left(deadline)) as result:
            for number, (how, index) in result.value.items():
                answers[int(number)] = how
                if index is not None:
                    # Behind the same number, which the owners of the references know.
                    root = result.steal(index)
                    os.dup2(root, self.roots[int(number)].fd, inheritable=False)
                    os.close(root)
        return answers

    def undo(self, timeout: float = COMMIT_TIMEOUT) -> None:
        """Give every old mount back, as far as it was taken; nothing if nothing was committed. Closes this object.

        SpfsError naming what could not be given back.
        """
        failed: List[str] = []
        if self._committed:
            deadline = time.monotonic() + timeout
            for namespace, helper in self._helpers.items():
                here = [one for one in [*self._followers, *self._leaders] if one.namespace == namespace]
                try:
                    helper.drain(deadline_left(deadline))
                    with helper.call("undo", [one.mount_id for one in here], (), deadline_left(deadline)) as result:
                        failed += [
                            f"{self._instances[int(number)].mountpoint}: {why}" for number, why in result.value.items()
                        ]
                except OSError as error:
                    failed.append(f"{', '.join(one.mountpoint for one in here)}: {reason(error)}")
        self.close()
        if failed:
            raise SpfsError(
                f"cannot give the mounts back: {'; '.join(failed)}", "see what is mounted there: findmnt", errno.EIO
            )

    def verify(self, timeout: float = PREPARE_TIMEOUT) -> List[Instance]:
        """After the commit: on each path is exactly the real mount, else SpfsError EIO.

        Returned is where the old file system is still mounted, in whatever namespace: "covered" ones, those in
        ``left``, and those in namespaces that were cloned meanwhile (prepare again for them, before this object is
        closed: it keeps the old file system's device number from being given to somebody else's mount).
        """
        if not self._instances:
            return []
        device = next(iter(self._instances.values())).mount.device
        wrong: List[str] = []
        for helper in self._helpers.values():
            with helper.call("check", list(device), (), timeout) as result:
                wrong += [
                    f"{self._instances[int(number)].describe()}: {why}" for number, why in result.value.items()
                ]
        if wrong:
            raise SpfsError(f"the mounts were switched, but: {'; '.join(wrong)}", errno=errno.EIO)
        return instances(device, self._targets)

    def close(self) -> None:
        """End the helpers, drop what was prepared and not used, and the last hold on the old mounts."""
        helpers, self._helpers = self._helpers, {}
        for helper in helpers.values():
            helper.close()
        roots, self.roots = self.roots, {}
        for root in roots.values():
            os.close(root.fd)

    def __enter__(self) -> "PreparedSwitch":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


def prepare_switch(
    switched: Sequence[Instance],
    real_fd: int,
    targets: Sequence[Target] = (),
    timeout: float = PREPARE_TIMEOUT,
) -> PreparedSwitch:
    """Everything for the switch of the mounts ``switched`` (see ``instances``) to the real mount ``real_fd``.

    Nothing is changed, and no request is sent to the old file system. ``real_fd`` (detached; see ``realmount.make``)
    and ``targets`` stay the caller's. A mount that cannot be switched, being covered, is found in ``left``. SpfsError
    if a bind mount's subdirectory is missing on the real file system, a namespace cannot be entered, or ``timeout``.
    """
    prepared = PreparedSwitch(switched, targets, timeout)
    try:
        prepared.prepare(real_fd)
    except BaseException as error:
        prepared.close()
        if isinstance(error, OSError):
            raise SpfsError(
                f"cannot prepare the switch of the mounts: {reason(error)}", errno=error.errno or errno.EIO
            ) from error
        raise
    return prepared


def _parts(here: Sequence[Instance]) -> Iterable[Sequence[Instance]]:
    size = wire.MAX_FDS // 2
    return (here[start : start + size] for start in range(0, len(here), size))


def _keeps_copy(instance: Instance) -> bool:
    """Must a copy that propagated there stay? Yes if what is done to it would be done to its peers."""
    return instance.parent is not None and instance.parent.group("shared") is not None


def _location(instance: Instance) -> Tuple[object, ...]:
    """The directory that it is mounted on, as the file system there sees it: the same for propagation peers."""
    if instance.parent is None:
        return (instance.namespace, instance.mount_id)
    relative = os.path.relpath(instance.mountpoint, instance.parent.mountpoint)
    return (instance.parent.device, os.path.normpath(os.path.join(instance.parent.root, relative)))


def _leaders(found: Iterable[Instance]) -> Tuple[List[Instance], List[Instance]]:
    """Those to be switched, and those that the others' switch reaches by propagation of the parent mounts."""
    by_location: Dict[Tuple[object, ...], List[Instance]] = {}
    for instance in found:
        by_location.setdefault(_location(instance), []).append(instance)
    leaders: List[Instance] = []
    followers: List[Instance] = []
    for here in by_location.values():
        groups: Set[Optional[int]] = {one.parent.group("shared") for one in here if one.parent} - {None}
        # Masters before their slaves, since propagation goes only that way.
        rest = sorted(here, key=lambda one: one.parent is not None and one.parent.group("master") in groups)
        while rest:
            leader, rest = rest[0], rest[1:]
            leaders.append(leader)
            reached = _reached(leader, rest)
            followers += reached
            rest = [one for one in rest if one not in reached]
    return leaders, followers


def _reached(leader: Instance, others: Sequence[Instance]) -> List[Instance]:
    groups = {leader.parent.group("shared")} - {None} if leader.parent else set()
    reached: List[Instance] = []
    grown = True
    while grown and groups:
        grown = False
        for one in others:
            if one in reached or one.parent is None:
                continue
            if one.parent.group("shared") in groups or one.parent.group("master") in groups:
                reached.append(one)
                groups |= {one.parent.group("shared")} - {None}
                grown = True
    return reached


def _waves(leaders: Sequence[Instance]) -> List[List[Instance]]:
    """Leaders whose umounts may run at once: no two of a wave are peers, for an umount propagates to peers."""
    waves: List[List[Instance]] = []
    used: List[Set[Optional[int]]] = []
    for one in leaders:
        groups = {one.mount.group("shared"), one.mount.group("master")} - {None}
        for wave, taken in zip(waves, used):
            if not groups & taken:
                wave.append(one)
                taken |= groups
                break
        else:
            waves.append([one])
            used.append(set(groups))
    return waves
