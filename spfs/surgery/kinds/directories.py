"""Directories that are being read: the position is carried over by name.

What getdents(2) calls an offset is a cookie of the file system, with a meaning for nobody else. But the entries that
were delivered can be listed again, and where the new file system lists the same ones first, whatever their order, the
position behind the last of them continues the reading: no name is delivered twice, none left out.
"""

from __future__ import annotations

import fcntl
import os
from typing import Dict, List, NamedTuple, Optional

from spfs.errors import reason
from spfs.references import Kind
from spfs.surgery.kinds.base import Handler, Scene, Survey
from spfs.surgery.records import Description
from stubfs.protocol import native_dirents
from stubfs.syscalls import getdents64

_STAYS = "it is being read, and cannot be continued on the new mount"
_F_GETOWN_EX = 16
_NOTIFIED = "its owner may be notified of changes (F_NOTIFY), which the kernel tells nobody else"
_BUFFER = 1 << 18


class Entry(NamedTuple):
    name: bytes
    following: int  # the offset behind it


class Listings(NamedTuple):
    old: List[Entry]
    new: List[Entry]


class Directories(Handler):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._rehearsed = False
        self._listings: Dict[int, Listings] = {}  # by id of the description, as all below
        self._failures: Dict[int, str] = {}
        self._positions: Dict[int, int] = {}

    def survey(self, survey: Survey) -> None:
        self._rehearsed = False
        for known in (self._listings, self._failures, self._positions):
            known.clear()

    def rehearse(self, scene: Scene) -> None:
        """List both, by openings of our own: the position of the processes' one is not ours to change."""
        self._rehearsed = True
        for description in _directories(scene):
            if not _position(description):
                continue
            try:
                self._listings[id(description)] = Listings(_list(description.copy), _list(description.new))
            except OSError as error:
                self._failures[id(description)] = reason(error)

    def judge(self, scene: Scene) -> None:
        for description in _directories(scene):
            if _has_owner(description):
                description.problem = _NOTIFIED
        for description in _directories(scene) if self._rehearsed else ():
            position = _position(description)
            if not position:
                continue
            listings = self._listings.get(id(description))
            if listings is None:
                why = self._failures.get(id(description), "that began just now")
                description.problem = f"{_STAYS}: {why}"
                continue
            new = continued(position, listings)
            if new is None:
                description.problem = f"{_STAYS}: entries come in another order there"
            else:
                self._positions[id(description)] = new

    def transfer(self, scene: Scene) -> None:
        for description in _directories(scene):
            position = self._positions.get(id(description))
            try:
                if position is not None:
                    os.lseek(description.new, position, os.SEEK_SET)
            except OSError as error:
                description.problem = f"{_STAYS}: {reason(error)}"


def _directories(scene: Scene) -> List[Description]:
    """Those that are to be moved; one that was removed has no entries anywhere."""
    found = {id(use.description): use.description for use in scene.uses if use.description.kind is Kind.DIRECTORY}
    return [
        one for one in found.values() if one.problem is None and one.new >= 0 and not one.moved and one.path is not None
    ]


def _has_owner(description: Description) -> bool:
    """F_NOTIFY sets one, and nothing else that makes sense for a directory does (fs/notify/dnotify/dnotify.c)."""
    return any(fcntl.fcntl(description.copy, _F_GETOWN_EX, bytes(8))[4:])


def _position(description: Description) -> int:
    return os.lseek(description.copy, 0, os.SEEK_CUR)


def _list(fd: int) -> List[Entry]:
    fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found: List[Entry] = []
        while True:
            data = getdents64(fd, _BUFFER)
            if not data:
                return found
            found += [Entry(name, following) for following, _, _, name in native_dirents(data)]
    finally:
        os.close(fd)


def continued(position: int, listings: Listings) -> Optional[int]:
    """The offset on the new side that goes on where ``position`` was on the old one; None if there is none."""
    old, new = listings
    count = next((index + 1 for index, entry in enumerate(old) if entry.following == position), 0)
    if not count:
        return None  # what was delivered last has been removed meanwhile
    if count == len(old):
        return new[-1].following if new else 0
    if {entry.name for entry in old[:count]} == {entry.name for entry in new[:count]}:
        return new[count - 1].following
    return None
