"""The record beside the images: what is delayed at their restore, and which files it must hold.

Written at the dump, so that a restore needs neither options nor pycriu. Administrators may say the same, for images
without a record, or other than it does, in a file of the same form.
"""

from __future__ import annotations

import errno
import json
import os
from typing import List, Optional, Sequence

from spfs.criu.delayed import DelayedMount, unlike
from spfs.errors import SpfsError, UsageError, reason

NAME = "spfs-criu.json"
_VERSION = 1


def write(directory: str, mounts: Sequence[DelayedMount]) -> None:
    """Beside the images in ``directory``; all of it or nothing."""
    path = os.path.join(directory, NAME)
    made = f"{path}.{os.getpid()}"  # not by tempfile, whose import costs a restore several milliseconds
    try:
        fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                # Paths need not be UTF-8: ASCII escapes bring their surrogates through.
                json.dump({"version": _VERSION, "mounts": [mount.to_json() for mount in mounts]}, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(made, path)
        except BaseException:
            os.unlink(made)
            raise
    except OSError as error:
        raise SpfsError(
            f"cannot write what is delayed: {path}: {reason(error)}", "", error.errno or errno.EIO
        ) from error


def read(path: str) -> Optional[List[DelayedMount]]:
    """Of the file ``path``, or the one beside the images in the directory ``path``; None if there is none."""
    if os.path.isdir(path):
        path = os.path.join(path, NAME)
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SpfsError(f"cannot read what is delayed: {path}: {reason(error)}", "", errno.EINVAL) from error
    if not isinstance(data, dict) or data.get("version") != _VERSION or not isinstance(data.get("mounts"), list):
        raise UsageError(
            f"cannot read what is delayed: {path}: not of version {_VERSION}", "was it written by another spfs-criu?"
        )
    try:
        return unlike([DelayedMount.from_json(mount) for mount in data["mounts"]])
    except UsageError as error:
        raise UsageError(f"{error.message}, in {path}", error.hint) from error
