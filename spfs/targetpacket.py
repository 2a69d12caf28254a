"""A pinned target on its way from the job that pinned it to the manager: JSON and descriptors."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

from spfs.target import Target


def pack_target(target: Target) -> Tuple[Dict[str, Any], List[int]]:
    """What ``unpack_target`` makes the target of again in another process, and the descriptors to send with it."""
    packed = {
        "pid": target.pid,
        "root": target.root,
        "has_root_fd": target.root_fd >= 0,
        "names": list(target.namespaces),
    }
    return packed, target.fds()


def unpack_target(packed: Dict[str, Any], fds: Sequence[int]) -> Target:
    """The descriptors are the target's from now on."""
    remaining = list(fds)
    pidfd = remaining.pop(0) if packed["pid"] is not None else -1
    root_fd = remaining.pop(0) if packed["has_root_fd"] else -1
    return Target(packed["pid"], pidfd, dict(zip(packed["names"], remaining)), root_fd, packed["root"])
