"""What a fifo needs besides its descriptors: all its ends move together, and so does what lies in its buffer."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import termios
from typing import Dict, Iterable, List, Tuple

from spfs.errors import reason
from spfs.linux.process import tee
from spfs.references import Kind
from spfs.surgery.examine import Description, Process

_F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032
_BOTH = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC


def _ends(processes: Iterable[Process]) -> Dict[Tuple[int, int], List[Tuple[Process, Description]]]:
    found: Dict[Tuple[int, int], List[Tuple[Process, Description]]] = {}
    for process in processes:
        for table in process.tables:
            for description in table.held.values():
                if description.kind is Kind.FIFO:
                    key = (description.object.device, description.object.inode)
                    found.setdefault(key, []).append((process, description))
    return found


def judge(processes: Iterable[Process]) -> None:
    """A fifo of which one end must stay keeps the others: two ends on two mounts would never meet again."""
    for ends in _ends(processes).values():
        for process, description in ends:
            why = process.problem or description.problem
            if why is not None:
                for _, other in ends:
                    other.problem = other.problem or f"another end of it cannot be moved: {why}"
                break


def transfer(processes: Iterable[Process]) -> None:
    """Duplicate what lies in the old fifos' buffers into the new ones, when nobody runs who could read or write."""
    for ends in _ends(processes).values():
        description = ends[0][1]
        if description.problem is not None or description.new < 0:
            continue
        try:
            _copy_buffer(description)
        except OSError as error:
            for _, other in ends:
                other.problem = f"what lies in its buffer cannot be moved: {reason(error)}"


def drain(processes: Iterable[Process]) -> None:
    """Empty the buffers that were left by all ends: an end that turns up later must not bring the bytes once more."""
    for ends in _ends(processes).values():
        if all(description.moved for _, description in ends):
            old = os.open(f"/proc/self/fd/{ends[0][1].copy}", _BOTH)
            try:
                length = _buffered(old)
                if length:
                    os.read(old, length)
            finally:
                os.close(old)


def _copy_buffer(description: Description) -> None:
    # Opened again by their magic links, for both directions: our descriptors may be of the wrong end. A fifo's open
    # never reaches its file system (fs/pipe.c: fifo_open).
    old = os.open(f"/proc/self/fd/{description.copy}", _BOTH)
    try:
        new = os.open(f"/proc/self/fd/{description.new}", _BOTH)
        try:
            length = _buffered(old)
            capacity = fcntl.fcntl(old, _F_GETPIPE_SZ)
            if fcntl.fcntl(new, _F_GETPIPE_SZ) != capacity:
                fcntl.fcntl(new, _F_SETPIPE_SZ, capacity)
            if length and tee(old, new, length) != length:
                os.read(new, capacity)
                raise OSError(errno.EIO, "not all of it could be duplicated")
        finally:
            os.close(new)
    finally:
        os.close(old)


def _buffered(fd: int) -> int:
    length = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, length)
    return length[0]
