"""Files without a name: the contents of those that were made anew on the new mount.

Copied while nobody runs, because nobody could say afterwards what was written meanwhile. Holes stay holes.
"""

from __future__ import annotations

import errno
import os
from typing import Dict, List, Optional, Tuple, Union

from spfs.errors import reason
from spfs.surgery.kinds.base import Handler, Scene
from spfs.surgery.records import Carried, Description, Process, Region

User = Tuple[Process, Union[Description, Region]]

_PART = 4 << 20  # bytes


class Unlinked(Handler):
    """All who have such a file go, or nobody does: the ones would not see what the others write."""

    def judge(self, scene: Scene) -> None:
        for carried, users in _users(scene):
            why = next(filter(None, (process.problem or record.problem for process, record in users)), None)
            why = why or _left_out(scene, carried.inode)
            if why is not None:
                for _, record in users:
                    record.problem = record.problem or f"it has no name, and another user of it cannot go: {why}"

    def transfer(self, scene: Scene) -> None:
        for carried, users in _users(scene):
            if carried.done or any(record.problem is not None for _, record in users):
                continue
            try:
                _carry(carried, users)
                _give_up_writing(carried.target)
                carried.done = True
            except OSError as error:
                for _, record in users:
                    record.problem = f"it has no name, and its contents cannot be copied: {reason(error)}"


def _users(scene: Scene) -> List[Tuple[Carried, List[User]]]:
    found: Dict[int, Tuple[Carried, List[User]]] = {}

    def add(process: Process, record: Union[Description, Region]) -> None:
        if record.carried is not None:
            found.setdefault(id(record.carried), (record.carried, []))[1].append((process, record))

    for use in scene.uses:
        add(use.process, use.description)
    for process in scene.processes:
        for region in process.memory.regions if process.memory is not None else ():
            add(process, region)
    return list(found.values())


def _left_out(scene: Scene, inode: int) -> Optional[str]:
    """Why somebody will keep the old one who is not even to be moved."""
    for process, table in scene.tables():
        for one in table.held.values():
            if one.object.inode == inode and one.carried is None:
                return process.problem or one.problem
    return None


def _carry(carried: Carried, users: List[User]) -> None:
    links = [link for link in map(_link, users) if link]
    mapped = any(isinstance(record, Region) and record.mapping.shared for _, record in users)
    if carried.source >= 0:
        # What the old file system has of it, without a request to it; but for written pages that it was not sent yet.
        if mapped:
            fd = _open_first(links)
            os.fsync(fd)
            os.close(fd)
        links = [f"/proc/self/fd/{carried.source}"]
    fd = _open_first(links)
    try:
        _copy(fd, carried.target)
    finally:
        os.close(fd)


def _give_up_writing(fd: int) -> None:
    """A program's file must not be open for writing (ETXTBSY) by anybody, if it is to be its /proc/PID/exe."""
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(reading, fd, inheritable=False)
    os.close(reading)


def _link(user: User) -> str:
    process, record = user
    if isinstance(record, Description):
        return f"/proc/self/fd/{record.copy}" if record.copy >= 0 else ""
    assert process.memory is not None
    return f"/proc/{process.memory.tid}/map_files/{record.mapping.start:x}-{record.mapping.end:x}"


def _open_first(links: List[str]) -> int:
    for link in links:
        try:
            return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            last = error
    raise last


def _copy(source: int, target: int) -> None:
    status = os.fstat(source)
    os.ftruncate(target, 0)
    os.ftruncate(target, status.st_size)
    position = 0
    while position < status.st_size:
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(source, position, os.SEEK_HOLE)
        while position < end:
            part = os.pread(source, min(_PART, end - position), position)
            if not part:
                raise OSError(errno.EIO, "it ended early")
            view = memoryview(part)
            while view:
                written = os.pwrite(target, view, position)
                position += written
                view = view[written:]
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
