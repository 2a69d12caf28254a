"""Programs run as an ordinary user, on a machine as such a user has it: /dev/fuse is everybody's, fusermount setuid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Sequence

import pytest

TOP = Path(__file__).parents[2]
NOBODY = 65534

# In a mount namespace of its own. The interpreter may be in a directory that only root may enter: that becomes an
# empty one in which there is nothing else.
_SCRIPT = """
set -eu
base=$1 closed=$2 kept=$3; shift 3
mount -t tmpfs -o mode=755,dev none "$base/dev"
mknod "$base/dev/fuse" c 10 229
chmod 666 "$base/dev/fuse"
mount --bind "$base/dev/fuse" /dev/fuse
if [ -n "$closed" ]; then
    mkdir "$base/dev/kept"
    mount --bind "$kept" "$base/dev/kept"
    mount -t tmpfs -o mode=755 none "$closed"
    mkdir -p "$kept"
    mount --bind "$base/dev/kept" "$kept"
fi
cd "$base/home"
exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
"""


def let_others_in(path: Path) -> None:
    """Other users may pass through pytest's temporary directories on the way to ``path``, and look into them."""
    for directory in (path, *path.parents):
        mode = directory.stat().st_mode
        if directory == path or "pytest-" in str(directory):
            directory.chmod(mode & 0o7777 | 0o055)
        elif not mode & 0o001:
            pytest.skip(f"other users may not pass through {directory}: choose another PYTEST_DEBUG_TEMPROOT")


class Unprivileged:
    """``home``: a directory of the user's."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self.home = base / "home"
        for directory in (self.home, base / "dev"):
            directory.mkdir()
        os.chown(self.home, NOBODY, NOBODY)

    def run(self, *command: str, timeout: float = 100.0) -> "subprocess.CompletedProcess[str]":
        kept = Path(sys.base_prefix)
        closed = [str(parent) for parent in reversed(kept.parents) if not parent.stat().st_mode & 0o001]
        words = ["unshare", "-m", "sh", "-c", _SCRIPT, "sh", str(self._base), closed[0] if closed else "", str(kept)]
        environment = {
            **os.environ, "HOME": str(self.home), "TMPDIR": str(self.home),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH")])),
            "PYTHONDONTWRITEBYTECODE": "1", "USER": "nobody",
        }  # fmt: skip
        return subprocess.run(
            [*words, *command], env=environment, timeout=timeout, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def python(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.run(sys.executable, *arguments)

    def in_user_namespace(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.run("unshare", "--user", "--map-root-user", "--mount", sys.executable, *arguments)


@contextmanager
def unprivileged() -> Iterator[Unprivileged]:
    base = Path(tempfile.mkdtemp(prefix="spfs-nobody-", dir="/tmp"))
    base.chmod(0o755)
    try:
        yield Unprivileged(base)
    finally:
        shutil.rmtree(base)


def leftovers(directory: Path, among: Sequence[str] = ("spfs-test-",)) -> "list[str]":
    """What a kit that was told to use ``directory`` has left in it, or mounted beneath it."""
    left = [entry.name for entry in directory.iterdir() if entry.name.startswith(tuple(among))]
    with open("/proc/self/mountinfo") as table:
        left += [line for line in table if f" {directory}/" in line]
    return left
