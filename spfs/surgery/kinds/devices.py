"""Device nodes: opened again where an opening is all there is to it. Used by ``spfs.surgery.counterparts``."""

from __future__ import annotations

import os
import stat
from typing import Optional

from spfs.linux import statx

_MEMORY = 1  # major number; Documentation/admin-guide/devices.txt
_WITHOUT_STATE = frozenset([1, 3, 4, 5, 7, 8, 9])  # mem, null, port, zero, full, random, urandom


def obstacle(old: statx.Object) -> Optional[str]:
    """Why an open device cannot be exchanged for another opening of the same device; None if it can."""
    if stat.S_ISBLK(old.mode):
        return None
    if os.major(old.rdev) == _MEMORY and os.minor(old.rdev) in _WITHOUT_STATE:
        return None
    number = f"{os.major(old.rdev)}:{os.minor(old.rdev)}"
    return f"what it is doing for its user is in the open device ({number}), which another opening of it does not have"
