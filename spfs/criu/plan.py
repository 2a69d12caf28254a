"""Which files a delayed mount must hold for CRIU to restore, from what the images name. No I/O of its own.

What CRIU looks at (4.1): that a path can be opened with the flags of then, the whole st_mode, of regular files the
size; what an unlinked file is restored beside is its directory. What it makes by itself are the file without a name
that is in the images, and unix sockets.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from spfs.criu.delayed import DelayedMount, Place, PlannedFile
from spfs.criu.images import ImageFile, ImageMount, Images
from spfs.errors import SpfsError

_DIRECTORY = stat.S_IFDIR | 0o755  # where the images do not tell; nobody checks the mode then
_FILE = stat.S_IFREG | 0o644
Look = Callable[[str], Optional[PlannedFile]]
"""What is at a path of the file system, if that can still be told (at the dump)."""


class Locator:
    """To which delayed mount a path belongs, and where in it."""

    def __init__(self, images: Images, mounts: Sequence[DelayedMount], others: Iterable[str] = ()) -> None:
        """``others``: what else was mounted where, for processes that have no mounts in their images."""
        self._images = images
        self._mounts = mounts
        self._by_id = {} if not images.mounts else self._of_images()
        self._by_path: List[Tuple[str, Optional[Tuple[str, str]]]] = [(path, None) for path in others]
        for mount in mounts:
            self._by_path += [(place.mountpoint, (mount.key, place.subdirectory)) for place in mount.places]
        self._by_path.sort(key=lambda one: len(one[0]), reverse=True)

    def _of_images(self) -> Dict[int, Tuple[str, str]]:
        """Mount id → key, and the directory of the real root that it shows."""
        found: Dict[int, Tuple[str, str]] = {}
        for mount in self._mounts:
            wanted = {place.external for place in mount.places if place.external}
            wanted |= {place.mountpoint for place in mount.places}
            primary = [one for one in self._images.mounts.values() if one.external and one.external in wanted]
            devices = {one.device for one in primary}
            for one in self._images.mounts.values():
                below = _within(one.root, mount.root)
                if one.device in devices and below is not None:
                    found[one.id] = (mount.key, below)
        return found

    def locate(self, path: str, mount_id: Optional[int]) -> Optional[Tuple[str, str]]:
        """(key, path from the file system's root), or None for what is on no delayed mount."""
        if self._images.mounts:
            mount = self._images.mounts.get(mount_id) if mount_id is not None else self._at(path)
            if mount is None or mount.id not in self._by_id:
                return None
            key, top = self._by_id[mount.id]
            return key, _joined(top, _within(path, mount.mountpoint) or "")
        for mountpoint, found in self._by_path:
            rest = _within(path, mountpoint)
            if rest is not None:
                return None if found is None else (found[0], _joined(found[1], rest))
        return None

    def used(self) -> Set[str]:
        """At which of the places there are files, for processes that have no mounts in their images."""
        paths = [mountpoint for mountpoint, _ in self._by_path]
        found = set()
        for file in self._images.files:
            found.update([path for path in paths if _within(file.path, path) is not None][:1])
        return found

    def _at(self, path: str) -> Optional[ImageMount]:
        """The mount that a path is on; for entries that do not tell."""
        candidates = [one for one in self._images.mounts.values() if _within(path, one.mountpoint) is not None]
        return max(candidates, key=lambda one: len(one.mountpoint), default=None)

    def mounted_on(self) -> List[Tuple[str, str]]:
        """Where something else is mounted on a delayed mount: as ``locate`` gives it."""
        found = []
        if self._images.mounts:
            for mount in self._images.mounts.values():
                if mount.parent in self._by_id and mount.id != mount.parent:
                    parent = self._images.mounts[mount.parent]
                    key, top = self._by_id[mount.parent]
                    found.append((key, _joined(top, _within(mount.mountpoint, parent.mountpoint) or "")))
            return found
        for path, _ in self._by_path:
            parent_key = self.locate(os.path.dirname(path), None)
            if parent_key is not None:
                found.append((parent_key[0], _joined(parent_key[1], os.path.basename(path))))
        return found


def plan(
    images: Images,
    mounts: Sequence[DelayedMount],
    others: Iterable[str] = (),
    uses: Optional[Mapping[int, Sequence[str]]] = None,
    look: Mapping[str, Look] = {},
) -> Dict[str, List[PlannedFile]]:
    """Key → what must be there, parents before what is in them. ``uses`` as of Images; ``look``: by key."""
    locator = Locator(images, mounts, others)
    planned: Dict[str, _Tree] = {mount.key: _Tree(look.get(mount.key)) for mount in mounts}
    files = {file.id: file for file in images.files if file.kind == "reg"}
    remaps = {remap.original: remap for remap in images.remaps}
    stand_ins = {remap.stand_in for remap in images.remaps if remap.kind == "LINKED"}
    for file in images.files:
        if file.kind == "reg" and file.id in stand_ins:
            continue  # comes with the original
        found = locator.locate(file.path, file.mount)
        if found is None:
            continue
        key, path = found
        tree, why = planned[key], tuple((uses or {}).get(file.id, ()))
        remap = remaps.get(file.id) if file.kind == "reg" else None
        if file.kind == "socket" or remap is not None and remap.kind != "LINKED":
            tree.add(PlannedFile(os.path.dirname(path), _DIRECTORY, uses=why), known=False)
        elif remap is not None:
            # CRIU makes the original again as a link to the stand-in, removes both, and checks the size in between.
            stand_in = locator.locate(files[remap.stand_in].path, file.mount)
            if stand_in is not None:
                tree.add(_as_planned(file, stand_in[1], why)._replace(original=path))
                tree.add(PlannedFile(os.path.dirname(path), _DIRECTORY, uses=why), known=False)
        else:
            tree.add(_as_planned(file, path, why), known=file.mode is not None)
    for key, path in locator.mounted_on():
        planned[key].add(PlannedFile(path, _DIRECTORY, uses=("something is mounted on it",)), known=False)
    return {key: tree.files() for key, tree in planned.items()}


def used_alone(images: Images, mounts: Sequence[DelayedMount], others: Iterable[str]) -> List[DelayedMount]:
    """``mounts`` at the places only where the processes have files: in a mount namespace that is not their own the
    rest is other people's. Without those that are used nowhere."""
    used = Locator(images, mounts, others).used()
    chosen = [
        mount._replace(places=tuple(place for place in mount.places if place.mountpoint in used))
        for mount in mounts
    ]
    return [mount for mount in chosen if mount.places]


def _as_planned(file: ImageFile, path: str, uses: Tuple[str, ...]) -> PlannedFile:
    if file.mode is None:
        # What is watched is a directory more often than not, and CRIU does not look.
        return PlannedFile(path, _DIRECTORY if file.kind == "watch" else _FILE, uses=uses)
    size = (file.size or 0) if stat.S_ISREG(file.mode) else None
    return PlannedFile(path, file.mode, size, uses=uses)


class _Tree:
    """What is planned for one file system; several entries may name one path."""

    def __init__(self, look: Optional[Look]) -> None:
        self._files: Dict[str, PlannedFile] = {}
        self._known: Dict[str, bool] = {}
        self._look = look

    def add(self, file: PlannedFile, known: bool = True) -> None:
        """``known``: the images tell what it is."""
        there = self._files.get(file.path)
        if there is not None:
            merged = tuple(dict.fromkeys((*there.uses, *file.uses)))
            better = file if known and not self._known[file.path] else there
            self._files[file.path] = better._replace(uses=merged)
            self._known[file.path] = known or self._known[file.path]
            return
        if not file.path and not known and self._look is None:
            return  # the root is there in any case
        self._files[file.path], self._known[file.path] = file, known

    def files(self) -> List[PlannedFile]:
        parents = {parent for path in self._files for parent in _parents(path)}
        result = []
        for path, file in sorted(self._files.items()):
            seen = self._look(path) if self._look is not None else None
            if stat.S_ISLNK(file.mode):
                file = file._replace(target=seen.target if seen and seen.target else "unknown")
            elif stat.S_ISCHR(file.mode) or stat.S_ISBLK(file.mode):
                # Images have no numbers of devices; without them it is as if the device were not there any more.
                file = file._replace(device=seen.device if seen and seen.device else 0)
            elif not self._known[path]:
                if seen is not None:
                    file = seen._replace(uses=file.uses)
                elif path in parents:
                    file = file._replace(mode=_DIRECTORY, size=None)
            result.append(file if seen is None else file._replace(owner=seen.owner))
        return result


def _parents(path: str) -> Iterable[str]:
    while path:
        path = os.path.dirname(path)
        yield path


def _within(path: str, directory: str) -> Optional[str]:
    """The rest of ``path`` after ``directory``, without a slash; None if it is not there."""
    if path == directory:
        return ""
    top = directory.rstrip("/") + "/"
    return path[len(top) :] if path.startswith(top) else None


def _joined(top: str, rest: str) -> str:
    return "/".join(part for part in (top, rest) if part)


def from_images(images: Images, mount: DelayedMount) -> DelayedMount:
    """``mount`` with the places at which the images have it, for one that nothing else is known about than one place.

    SpfsError if the processes had a mount namespace of their own and nothing external there.
    """
    if not images.mounts or mount.namespaced:
        return mount
    wanted = {place.mountpoint for place in mount.places}
    primary = [one for one in images.mounts.values() if one.mountpoint in wanted and one.external]
    if not primary:
        raise SpfsError(
            f"cannot delay {mount.key}: the images have no external mount on {' or '.join(sorted(wanted))}",
            f"dump with --external 'mnt[{min(wanted, default='MOUNTPOINT')}]:{mount.key}', or by spfs-criu dump",
            errno.EINVAL,
        )
    top = min((one.root for one in primary), key=len)
    places = [
        Place(one.mountpoint, below, one.external)
        for one in images.mounts.values()
        for below in [_within(one.root, top)]
        if one.device == primary[0].device and one.external and below is not None
    ]
    return mount._replace(root=top, places=tuple(sorted(places, key=lambda place: len(place.subdirectory))))
