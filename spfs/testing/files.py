"""Files put on a test's mount: in the directory that restore mode serves, and so without a request to the mount."""

from __future__ import annotations

import errno
import os
from typing import Optional, Union

from stubfs.errors import UsageError

PathLike = Union[str, "os.PathLike[str]"]


def inside(mountpoint: str, path: PathLike) -> str:
    """Relative to the mount's root; from that, or from a path that leads through the mountpoint."""
    name = os.fspath(path)
    return name[len(mountpoint) + 1 :] if name.startswith(f"{mountpoint}/") else name


def create(root: int, path: str, mode: int, content: bytes = b"", size: Optional[int] = None) -> None:
    """What ``mode`` says, at ``path`` beneath the directory ``root``, with its parents. OSError: EEXIST if there is
    something, or as open(2)."""
    from spfs import restore  # when it is needed: a good part of what a test would wait for

    if ".." in path.split("/"):
        raise UsageError(f"cannot create {path}: it leads out of the mount", "give a path relative to its root")
    try:
        os.close(_open_beneath(root, path, os.O_PATH | os.O_NOFOLLOW))
    except FileNotFoundError:
        pass
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    restore.create_file(root, path, mode, size)
    if content:
        with os.fdopen(_open_beneath(root, path, os.O_WRONLY), "wb") as file:
            file.write(content)


def _open_beneath(root: int, path: str, flags: int) -> int:
    from stubfs import syscalls  # with ctypes, which not every test needs

    inside_only = syscalls.Resolve.BENEATH | syscalls.Resolve.NO_SYMLINKS
    return syscalls.openat2(root, os.fsencode(path), flags | os.O_CLOEXEC, 0, inside_only)
