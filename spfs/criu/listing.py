"""What delayed mounts must hold, for people to look at: from the record, or from the images alone."""

from __future__ import annotations

import errno
from typing import List, Optional

from spfs.criu import record
from spfs.criu.delayed import DelayedMount, Place
from spfs.criu.images import Images
from spfs.criu.plan import from_images, plan
from spfs.errors import SpfsError, UsageError


def listed(directory: str, which: Optional[str] = None) -> List[DelayedMount]:
    """The delayed mounts of the images in ``directory``, with their files; ``which``: only that key or mountpoint.

    Without a record ``which`` must be a mountpoint: any path that was one at the dump.
    """
    mounts = record.read(directory)
    if mounts is not None:
        chosen = [mount for mount in mounts if which is None or _is(mount, which)]
        if not chosen:
            known = ", ".join(f"{mount.key} ({mount.places[0].mountpoint})" for mount in mounts) or "none"
            raise SpfsError(
                f"cannot list the files of {which or 'delayed mounts'}: not one of those delayed in {directory}",
                f"known are: {known}",
                errno.ENOENT,
            )
        return chosen
    images = Images(directory)
    if which is None or not which.startswith("/"):
        raise UsageError(
            f"cannot list files: nothing is written beside the images in {directory}",
            "name the mountpoint: spfs-criu files IMAGES MOUNTPOINT",
        )
    mount = from_images(images, DelayedMount("files", "unknown", "unknown", places=(Place(which.rstrip("/") or "/"),)))
    return [mount._replace(files=tuple(plan(images, [mount], (), images.uses())[mount.key]))]


def _is(mount: DelayedMount, which: str) -> bool:
    return which == mount.key or which.rstrip("/") in [place.mountpoint for place in mount.places]
