"""The fusepy class: path in, backing directory, errno out; nothing else.

libfuse calls it for what changes or walks the tree; the loop calls it for what it answers itself by path. The
request being served, and with it the generation and the credentials, is the calling worker's.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Dict, Optional

from stubfs.backing import Backing
from stubfs.lanes import CurrentWorker
from stubfs.libfuse import ENCODING


def _bytes(path: str) -> bytes:
    return path.encode(ENCODING)[1:]


def _text(name: bytes) -> str:
    return name.decode(ENCODING)


class Operations:
    """Every method raises nothing but OSError: fusepy's wrapper has no right answer to anything else.

    Not derived from fusepy's Operations, whose defaults claim success for what is not implemented; methods that
    are missing here are operations that the loop answers itself.
    """

    use_ns = True
    flag_nullpath_ok = 1
    # Paths of open files are not computed: a hung read and an unlink would else block libfuse's tree.
    flag_nopath = 1

    def __init__(self, current: CurrentWorker) -> None:
        self._current = current

    def __call__(self, operation: str, *arguments: Any) -> Any:
        return getattr(self, operation)(*arguments)

    @property
    def backing(self) -> Backing:
        backing: Optional[Backing] = getattr(self._current.worker.request.state, "backing", None)
        if backing is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return backing

    def init(self, path: str) -> None:
        """Nothing to do; fusepy insists on it."""

    def destroy(self, path: str) -> None:
        """The session closes what there is to close."""

    def getattr(self, path: str, info: Any = None) -> Dict[str, int]:
        """The type alone: the session puts the attributes, exact ones, into the reply that libfuse makes."""
        worker = self._current.worker
        status = worker.status
        if not worker.allotting or status is None:
            status = worker.status = self.backing.stat(_bytes(path))
        return {"st_mode": status.st_mode}

    def readlink(self, path: str) -> str:
        return _text(self.backing.readlink(_bytes(path)))

    def mknod(self, path: str, mode: int, device: int) -> None:
        self.backing.mknod(_bytes(path), mode, device)

    def mkdir(self, path: str, mode: int) -> None:
        self.backing.mkdir(_bytes(path), mode)

    def symlink(self, path: str, target: str) -> None:
        self.backing.symlink(target.encode(ENCODING), _bytes(path))

    def unlink(self, path: str) -> None:
        self.backing.unlink(_bytes(path))

    def rmdir(self, path: str) -> None:
        self.backing.rmdir(_bytes(path))

    def rename(self, old: str, new: str) -> None:
        self.backing.rename(_bytes(old), _bytes(new), self._current.worker.rename_flags)

    def link(self, new: str, old: str) -> None:
        self.backing.link(_bytes(old), _bytes(new))

    def access(self, path: str, mode: int) -> None:
        self.backing.access(_bytes(path), mode)

    def statfs(self, path: str) -> Dict[str, int]:
        status = self.backing.statvfs()
        names = (
            "f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_frsize", "f_namemax",
        )  # fmt: skip
        return {name: getattr(status, name) for name in names}

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        self.backing.setxattr(_bytes(path), name.encode(ENCODING), value, flags)

    def removexattr(self, path: str, name: str) -> None:
        self.backing.removexattr(_bytes(path), name.encode(ENCODING))
