"""The textbook fusepy loopback, to compare with: ``python loopback.py DIRECTORY MOUNTPOINT [OPTION=VALUE...]``."""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List, Optional

from fuse import FUSE, Operations


class Loopback(Operations):  # type: ignore[misc]
    def __init__(self, root: str) -> None:
        self.root = root

    def getattr(self, path: str, fh: Optional[int] = None) -> Dict[str, Any]:
        status = os.lstat(self.root + path)
        names = ("st_atime", "st_ctime", "st_gid", "st_mode", "st_mtime", "st_nlink", "st_size", "st_uid")
        return {name: getattr(status, name) for name in names}

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.root + path, mode)

    def readdir(self, path: str, fh: int) -> List[str]:
        return [".", "..", *os.listdir(self.root + path)]

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.root + path, mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.root + path)

    def unlink(self, path: str) -> None:
        os.unlink(self.root + path)

    def rename(self, old: str, new: str) -> None:
        os.rename(self.root + old, self.root + new)

    def open(self, path: str, flags: int) -> int:
        return os.open(self.root + path, flags)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self.root + path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        os.lseek(fh, offset, os.SEEK_SET)
        return os.read(fh, size)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        os.lseek(fh, offset, os.SEEK_SET)
        return os.write(fh, data)

    def truncate(self, path: str, length: int, fh: Optional[int] = None) -> None:
        os.truncate(self.root + path, length)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)


if __name__ == "__main__":
    options = dict(option.split("=") for option in sys.argv[3:])
    FUSE(Loopback(sys.argv[1]), sys.argv[2], foreground=True, fsname="loopback", allow_other=True, **options)
