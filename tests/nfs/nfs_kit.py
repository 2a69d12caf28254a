"""A delayed mount whose real side is a directory of a kernel NFS server, which can be silent or stopped."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator

from manager_kit import alive
from replace_kit import Scene

from spfs.testing import wait_until

COMMANDS = ("nfs-block", "nfs-unblock", "nfs-stop", "nfs-start")
EXPORTED = Path("/srv/nfs")
EXPORT = "rw,fsid=0,no_subtree_check,insecure,async"
PATIENCE = 60.0  # seconds; emulated, and NFS itself waits for many

# As mountinfo shows them of such a mount: what is dumped with a container is what there is to mount it again.
OPTIONS = {
    4: "rw,vers=4.2,rsize=262144,wsize=262144,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,"
    "clientaddr=127.0.0.1,local_lock=none,addr=127.0.0.1",
    3: "rw,vers=3,rsize=262144,wsize=262144,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,"
    "mountaddr=127.0.0.1,mountvers=3,mountproto=tcp,local_lock=none,addr=127.0.0.1",
}


class Server:
    """The machine's NFS server. ``restore`` makes it as it was."""

    def __init__(self) -> None:
        self._blocked = self._stopped = self._squashed = False

    def block(self) -> None:
        """Its packets vanish."""
        _run("nfs-block")
        self._blocked = True

    def unblock(self) -> None:
        _run("nfs-unblock")
        self._blocked = False

    def stop(self) -> None:
        """Connections are refused."""
        _run("nfs-stop")
        self._stopped = True

    def start(self) -> None:
        _run("nfs-start")
        self._stopped = False

    def squash_root(self) -> None:
        """From now on root is nobody there."""
        self._squashed = True
        self._export("root_squash")

    def restore(self) -> None:
        if self._blocked:
            self.unblock()
        if self._stopped:
            self.start()
        if self._squashed:
            self._export("no_root_squash")
            self._squashed = False

    @staticmethod
    def _export(squash: str) -> None:
        Path("/etc/exports").write_text(f"{EXPORTED} *({EXPORT},{squash})\n")
        _run("exportfs", "-ra")


class NfsScene(Scene):
    """``export`` is the directory on the server, as the server itself sees it."""

    def __init__(self, base: Path, server: Server, version: int = 4) -> None:
        super().__init__(base)
        self.server, self.version = server, version
        self.export = EXPORTED / self.id
        self.export.mkdir(mode=0o777)
        self.export.chmod(0o777)
        self.source = f"localhost:/{self.id}" if version == 4 else f"localhost:{self.export}"
        self.cleanup(lambda: subprocess.run(["rm", "-rf", str(self.export)], check=True))

    def ask(self, **options: Any) -> str:
        fstype = "nfs4" if self.version == 4 else "nfs"
        given = {"source": self.source, "fstype": fstype, "flags": 0, "options": OPTIONS[self.version], **options}
        return super().ask(**given)

    def wait(self, timeout: float = PATIENCE) -> Dict[str, Any]:
        return super().wait(timeout)

    def attempts(self) -> int:
        return int(self.row()["replace"]["attempts"])

    def replaced(self) -> None:
        """NFS, and it alone, is on the path; FUSE is gone."""
        assert self.types() == ["nfs4" if self.version == 4 else "nfs"], self.types()
        wait_until(lambda: not alive(self.filesystem), PATIENCE, "the file system process to end")
        assert self.instances() == []

    @contextmanager
    def elsewhere(self) -> Iterator[Path]:
        """The same export as another client sees it: what is only in the first one's caches is not there."""
        place = self.base / "elsewhere"
        place.mkdir(exist_ok=True)
        options = OPTIONS[self.version] + ",nosharecache,noac"
        fstype = "nfs4" if self.version == 4 else "nfs"
        _run("mount", "-i", "-t", fstype, "-o", options, self.source, str(place))
        try:
            yield place
        finally:
            # A test that failed may leave users, and a server that would be waited for.
            self.server.restore()
            _run("umount", "-l", str(place))

    def names(self) -> "list[str]":
        """What the server has in the directory, beneath all of it."""
        return sorted(
            os.path.relpath(os.path.join(top, name), self.export)
            for top, directories, files in os.walk(self.export)
            for name in directories + files
        )


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=PATIENCE)
