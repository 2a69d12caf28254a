"""Random operations on stubfs and on a native directory side by side: the same results, errno for errno."""

from __future__ import annotations

import errno
import os
import random
import stat
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from stubfs_kit import mounted

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
NAMES = ["a", "b", "c", "d", "d/x", "d/y", "d/e", "d/e/z", "s", "l"]
MODES = [0o600, 0o644, 0o755, 0o777, 0o4755, 0o2755]
OPENS = [
    os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_APPEND, os.O_RDONLY | os.O_DIRECTORY,
]  # fmt: skip
STEPS = 4000


class Side:
    """One of the two trees, with a few open files."""

    def __init__(self, top: str) -> None:
        self.top = top
        self.files: Dict[int, int] = {}

    def path(self, name: str) -> str:
        return f"{self.top}/{name}"

    def keep(self, slot: int, fd: int) -> None:
        if slot in self.files:
            os.close(fd)
        else:
            self.files[slot] = fd

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)


def attributes(status: os.stat_result) -> Tuple[int, ...]:
    common = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev)
    # The size and link count of a directory are the file system's own affair.
    return common if stat.S_ISDIR(status.st_mode) else (*common, status.st_size, status.st_nlink)


def reopened(fd: int) -> bytes:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.pread(again, 100, 0)
    finally:
        os.close(again)


def contents(path: str) -> bytes:
    return Path(path).read_bytes() if stat.S_ISREG(os.stat(path).st_mode) else b""


def times(path: str, number: int) -> int:
    os.utime(path, ns=(number * 10**9 + 7, number), follow_symlinks=False)
    return os.lstat(path).st_mtime_ns


class Step:
    """One operation with its arguments, to be run on each side."""

    def __init__(self, source: random.Random) -> None:
        name, other, slot = source.choice(NAMES), source.choice(NAMES), source.randrange(6)
        mode, opening = source.choice(MODES), source.choice(OPENS) | os.O_NONBLOCK
        creating = source.choice([0, 0, os.O_EXCL, os.O_TRUNC, os.O_APPEND]) | os.O_CREAT | os.O_RDWR | os.O_NONBLOCK
        number, small = source.randrange(5000), source.randrange(3)
        data = bytes(source.randrange(256) for _ in range(source.randrange(200)))
        actions: Dict[str, Callable[[Side], Any]] = {
            "create": lambda s: s.keep(slot, os.open(s.path(name), creating, mode)),
            "open": lambda s: s.keep(slot, os.open(s.path(name), opening)),
            "close": lambda s: os.close(s.files.pop(slot)),
            "write": lambda s: os.write(s.files[slot], data),
            "pwrite": lambda s: os.pwrite(s.files[slot], data, number),
            "read": lambda s: os.read(s.files[slot], number + 1),
            "pread": lambda s: os.pread(s.files[slot], 500, number),
            "seek": lambda s: os.lseek(s.files[slot], number, os.SEEK_SET),
            "fstat": lambda s: attributes(os.fstat(s.files[slot])),
            "ftruncate": lambda s: os.ftruncate(s.files[slot], number),
            "fchmod": lambda s: os.fchmod(s.files[slot], mode),
            "fallocate": lambda s: os.posix_fallocate(s.files[slot], number, 10),
            "fgetxattr": lambda s: os.getxattr(s.files[slot], "user.q"),
            "reopen": lambda s: reopened(s.files[slot]),
            "truncate": lambda s: os.truncate(s.path(name), number),
            "unlink": lambda s: os.unlink(s.path(name)),
            "rmdir": lambda s: os.rmdir(s.path(name)),
            "mkdir": lambda s: os.mkdir(s.path(name), mode),
            "mkfifo": lambda s: os.mkfifo(s.path(name), mode),
            "rename": lambda s: os.rename(s.path(name), s.path(other)),
            "symlink": lambda s: os.symlink(other, s.path(name)),
            "link": lambda s: os.link(s.path(name), s.path(other), follow_symlinks=False),
            "readlink": lambda s: os.readlink(s.path(name)),
            "lstat": lambda s: attributes(os.lstat(s.path(name))),
            "stat": lambda s: attributes(os.stat(s.path(name))),
            "chmod": lambda s: os.chmod(s.path(name), mode),
            "chown": lambda s: os.lchown(s.path(name), number % 5, number % 7),
            "utime": lambda s: times(s.path(name), number),
            "list": lambda s: sorted(os.listdir(s.path(name))),
            "contents": lambda s: contents(s.path(name)),
            "access": lambda s: os.access(s.path(name), small),
            "setxattr": lambda s: os.setxattr(s.path(name), "user.q", data, small, follow_symlinks=False),
            "getxattr": lambda s: os.getxattr(s.path(name), "user.q", follow_symlinks=False),
            "listxattr": lambda s: os.listxattr(s.path(name), follow_symlinks=False),
            "removexattr": lambda s: os.removexattr(s.path(name), "user.q", follow_symlinks=False),
        }
        self.operation = source.choice(list(actions))
        self._action = actions[self.operation]
        self.text = f"{self.operation} {name} {other} slot {slot} mode {mode:o} number {number}"

    def on(self, side: Side) -> Tuple[str, Any]:
        try:
            return "result", self._action(side)
        except OSError as error:
            return "error", errno.errorcode[error.errno or 0]
        except KeyError:
            return "no such open file", None


def tree(top: str) -> List[Tuple[str, Tuple[int, ...]]]:
    return sorted(
        (os.path.relpath(os.path.join(parent, name), top), attributes(os.lstat(os.path.join(parent, name))))
        for parent, directories, files in os.walk(top)
        for name in directories + files
    )


@pytest.mark.parametrize("mode, seed", [("restore", 1), ("restore", 2), ("proxy", 3)])
def test_the_same_as_a_native_directory(tmp_path: Path, mode: str, seed: int) -> None:
    source = random.Random(seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as native, mounted(tmp_path, mode) as fs:
        os.chmod(native, 0o755)
        ours, theirs = Side(str(fs.path)), Side(native)
        try:
            for number in range(STEPS):
                step = Step(source)
                assert (number, step.text, step.on(ours)) == (number, step.text, step.on(theirs))
            assert tree(ours.top) == tree(theirs.top)
        finally:
            ours.close()
            theirs.close()
        assert "ERROR" not in fs.log.read_text()
