"""What a fifo needs besides its descriptors: all its ends move together, and so does what lies in its buffer."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import termios
from typing import Dict, List

from spfs.errors import reason
from spfs.linux.process import tee
from spfs.references import Kind
from spfs.surgery.kinds.base import Handler, Scene, Use
from spfs.surgery.records import Description

_F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032
_BOTH = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC


class Fifos(Handler):
    """Ends of one fifo stay together; readers and writers sleep on while what they wait for changes beneath them."""

    def judge(self, scene: Scene) -> None:
        """A fifo of which one end must stay keeps the others: two ends on two mounts would never meet again."""
        for ends in _ends(scene):
            why = next((end.problem for end in ends if end.problem is not None), None)
            if why is not None:
                for end in ends:
                    end.description.problem = end.description.problem or f"another end of it cannot be moved: {why}"

    def transfer(self, scene: Scene) -> None:
        """Duplicate what lies in the old fifos' buffers into the new ones, when nobody runs who could read or write."""
        for ends in _ends(scene):
            description = ends[0].description
            if description.problem is not None or description.new < 0:
                continue
            try:
                _copy_buffer(description)
            except OSError as error:
                for end in ends:
                    end.description.problem = f"what lies in its buffer cannot be moved: {reason(error)}"

    def conclude(self, scene: Scene) -> None:
        """Empty the buffers that were left by all ends: an end that turns up later must not bring the bytes again."""
        for ends in _ends(scene):
            if all(end.description.moved for end in ends):
                old = os.open(f"/proc/self/fd/{ends[0].description.copy}", _BOTH)
                try:
                    length = _buffered(old)
                    if length:
                        os.read(old, length)
                finally:
                    os.close(old)


def _ends(scene: Scene) -> List[List[Use]]:
    found: Dict[int, List[Use]] = {}
    for use in scene.uses:
        if use.description.kind is Kind.FIFO:
            found.setdefault(use.description.object.inode, []).append(use)
    return list(found.values())


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
