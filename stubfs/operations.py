"""The fusepy class: path in, backing directory, errno out; nothing else.

libfuse calls it for what makes, moves and removes names. The request being served, and with it the generation and
the credentials, is the calling worker's.
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


class Operations:
    """Every method raises nothing but OSError: fusepy's wrapper has no right answer to anything else.

    Not derived from fusepy's Operations, whose defaults claim success for what is not implemented; methods that
    are missing here are operations that the loop answers itself.
    """

    use_ns = True

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
        """Of what was just made. The type alone is for libfuse; the answer takes all from the worker."""
        status = self._current.worker.status = self.backing.stat(_bytes(path))
        return {"st_mode": status.st_mode}

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
