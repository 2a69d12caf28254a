"""What is mounted on the mount itself: not to be lost by a lookup that fails.

When the lookup of a name that it knows fails, the kernel forgets the name and takes off whatever is mounted on it or
beneath, in every mount namespace (fuse_dentry_revalidate() in fs/fuse/dir.c, d_invalidate() in fs/dcache.c). Also if
the caller was only refused: somebody without any rights could unmount what belongs to others. The one errno with which
it does not, and that is no signal's, is ENOMEM.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Dict, Iterator, Optional, Tuple

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_ESCAPE = re.compile(rb"\\([0-7]{3})")  # mangle_path() in fs/seq_file.c


class NestedMounts:
    """``device``: st_dev of the mount; None if it is not known, and then nothing is found."""

    def __init__(self, device: Optional[int]) -> None:
        self._device = None if device is None else b"%d:%d" % (os.major(device), os.minor(device))

    def would_go(self, error: OSError, path: Optional[bytes], tid: int) -> bool:
        """Whether something is mounted on ``path`` or beneath it, in the mount namespace of the thread ``tid``, and
        would be gone if a lookup of ``path`` were answered with this error. To be called with our own rights."""
        if self._device is None or path is None or error.errno in _GONE:
            return False
        try:
            return any(found == path or found.startswith(path + b"/") for found in self._paths(tid))
        except OSError:  # the thread is gone, or cannot be seen
            return False

    def _paths(self, tid: int) -> Iterator[bytes]:
        """Where something is mounted, relative to the root of the file system."""
        ours: Dict[bytes, Tuple[bytes, bytes]] = {}  # id -> root within the file system, mountpoint
        others = []
        with open(f"/proc/{tid}/mountinfo", "rb") as lines:
            for line in lines:
                number, parent, device, root, mountpoint = line.split(b" ", 5)[:5]
                others.append((parent, _unescaped(mountpoint)))
                if device == self._device:
                    ours[number] = _unescaped(root).rstrip(b"/"), _unescaped(mountpoint)
        for parent, mountpoint in others:
            if parent in ours:
                root, top = ours[parent]
                yield (root + mountpoint[len(top) :]).lstrip(b"/")


def _unescaped(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
