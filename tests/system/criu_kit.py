"""Processes that are dumped and restored by CRIU, what they have mounted, and an undisturbed twin of each.

Their mount is a directory of a tmpfs, which is "the server": it is bound in the mount's place when it is there, and is
not there as long as it has another name.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from manager_kit import ENVIRONMENT

from spfs.client import ManagerClient
from spfs.criu.restoration import STATE, WORK_DIR
from spfs.linux import mountapi
from spfs.linux.mountapi import MS
from spfs.testing import process_state, wait_until

TIMEOUT = 30.0

# Nothing but what the statements make may be in the images: no descriptor of ours, no terminal.
SERVE = r"""
import ast, json, os, signal, sys
os.closerange(3, 4096)
directory, names = sys.argv[1], {}
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
open(directory + "/ready", "w").close()
while True:
    signal.sigwait({signal.SIGUSR1})
    with open(directory + "/ask") as file:
        text = file.read()
    os.unlink(directory + "/ask")
    try:
        tree = ast.parse(text)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<told>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<told>", "eval"), names) if last else None
        answer = ["value", repr(value)]
    except BaseException as error:
        answer = ["error", repr(error)]
    with open(directory + "/answer.new", "w") as file:
        json.dump(answer, file)
    os.rename(directory + "/answer.new", directory + "/answer")
"""


def spfs_criu(*arguments: str, status: int = 0, environment: Optional[Dict[str, str]] = None) -> str:
    """Run the command; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "spfs.cli.criu", *arguments],
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT * 2,
    )
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr, _logs(arguments))
    return done.stdout if status == 0 else done.stderr


def _logs(arguments: Sequence[str]) -> str:
    """The errors that CRIU has written to its log."""
    found = []
    for argument in arguments:
        for path in Path(argument).glob("*.log") if os.path.isdir(argument) else []:
            lines = path.read_text(errors="replace").splitlines()
            found += [line for line in lines if "Error" in line or "Warn" in line][-10:]
    return "\n".join(found)


class Subject:
    """A process that runs the statements which it is told by way of files in ``directory``, and has no pipe to us.

    ``prefix``: a command that it is run by, which must end in it.
    """

    def __init__(self, directory: Path, prefix: Sequence[str] = (), python: str = sys.executable) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        with open(directory / "output", "wb") as output:
            self.process: Optional["subprocess.Popen[bytes]"] = subprocess.Popen(
                [*prefix, python, "-c", SERVE, str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
            )
        wait_until((directory / "ready").exists, TIMEOUT, "the subject to start")
        self.pid = self.process.pid

    def start(self, statements: str) -> None:
        (self.directory / "ask").write_text(statements)
        os.kill(self.pid, signal.SIGUSR1)

    def result(self, timeout: float = TIMEOUT) -> Any:
        answer = self.directory / "answer"

        def come() -> bool:
            assert process_state(self.pid) not in ("", "Z"), (self.directory / "output").read_text()
            return answer.exists()

        wait_until(come, timeout, "the subject to answer")
        kind, text = json.loads(answer.read_text())
        answer.unlink()
        assert kind == "value", text
        return ast.literal_eval(text)

    def run(self, statements: str) -> Any:
        self.start(statements)
        return self.result()

    @property
    def answered(self) -> bool:
        return (self.directory / "answer").exists()

    def reap(self) -> None:
        """It was dumped, and so killed; what is restored is not our child."""
        if self.process is not None:
            self.process.wait(TIMEOUT)
            self.process = None

    def close(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)  # its children, too
        except ProcessLookupError:
            pass
        if self.process is not None:
            self.process.kill()
            self.process.wait(TIMEOUT)
        else:
            wait_until(lambda: process_state(self.pid) in ("", "Z"), TIMEOUT, "the subject to end")


class World:
    """A server, a mount of it at ``mnt``, the images of who uses it; and a twin of the server for the twin."""

    def __init__(self, base: Path) -> None:
        self.base, self.mnt, self.images = base, base / "mnt", base / "images"
        self.real = base / "real"
        self.export, self.gone = self.real / "export", self.real / "gone"
        self.stack = ExitStack()
        for path in (self.mnt, self.images, self.real):
            path.mkdir()
        self.mount_tmpfs(self.real)
        self.export.mkdir()
        self.export.chmod(0o755)
        self._subjects: List[Subject] = []

    def mount_tmpfs(self, path: Path) -> None:
        mountapi.mount("server", str(path), "tmpfs")
        self.stack.callback(mountapi.umount2, str(path), mountapi.MNT_DETACH)

    # The mount

    def bind(self, source: Optional[Path] = None, path: Optional[Path] = None) -> None:
        """The server's directory on ``mnt``, as it is before the dump, for what is then taken away by unbind."""
        mountapi.mount(str(source or self.export), str(path or self.mnt), None, int(MS.BIND))

    def unbind(self, path: Optional[Path] = None) -> None:
        mountapi.umount2(str(path or self.mnt), mountapi.MNT_DETACH)

    def server_goes(self) -> None:
        self.export.rename(self.gone)

    def server_comes(self) -> None:
        self.gone.rename(self.export)

    @property
    def delayed(self) -> str:
        return f"data={self.mnt},type=none,source={self.export},flags={int(MS.BIND)}"

    def types(self, path: Optional[Path] = None) -> List[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.partition(" - ")[2].split()[0] for line in lines if line.split()[4] == str(path or self.mnt)]

    # Processes

    def subject(self, name: str = "subject", **options: Any) -> Subject:
        made = Subject(self.base / name, **options)
        self._subjects.append(made)
        return made

    def dump(self, subject: Subject, *options: str) -> str:
        said = spfs_criu("dump", "-t", str(subject.pid), "-D", str(self.images), "-o", "dump.log", "-v4", *options)
        subject.reap()
        return said

    def restore(self, *options: str, status: int = 0, **named: Any) -> str:
        log = ["-o", "restore.log", "-v4"]
        return spfs_criu("restore", "-D", str(self.images), "-d", *log, *options, status=status, **named)

    def client(self) -> ManagerClient:
        client = ManagerClient(str(Path(WORK_DIR, "control.sock")), TIMEOUT)
        self.stack.callback(client.close)
        return client

    def rows(self) -> List[Dict[str, Any]]:
        return list(self.client().status()["mounts"])

    def wait(self) -> Dict[str, Dict[str, Any]]:
        """Key → report, when all replaces have ended well."""
        client = self.client()
        status = client.status()
        ids = [row["id"] for row in status["mounts"] + status["finished"]]
        return {id.partition("@")[0]: client.wait(id, TIMEOUT)["replace"]["report"] for id in ids}

    def replaced(self, path: Optional[Path] = None) -> None:
        """The real side, and it alone, is on the path."""
        assert self.types(path) == ["tmpfs"], self.types(path)
        assert os.stat(path or self.mnt).st_dev == os.stat(self.real).st_dev

    def somebody_waits(self) -> None:
        client = self.client()
        wait_until(lambda: [one for one in client.held() if one["pid"]], TIMEOUT, "requests held")

    def close(self) -> None:
        with self.stack:
            for subject in self._subjects:
                subject.close()
            _end_manager()
            for path in (self.mnt,):
                if self.types(path):
                    self.unbind(path)
            left = os.listdir(STATE) if os.path.isdir(STATE) else []
            assert left == [], f"left of restores: {left}"


def _end_manager() -> None:
    path = os.path.join(WORK_DIR, "control.sock")
    if not os.path.exists(path):
        return
    with ManagerClient(path, TIMEOUT) as client:
        pid = client.status()["manager"]["pid"]
        log = Path(WORK_DIR, "spfs-manager.log").read_text()
        client.shutdown(unmount=True, force=True)
    wait_until(lambda: process_state(pid) in ("", "Z"), TIMEOUT, "the manager to end")
    assert "Traceback" not in log, log


__all__ = ["STATE", "Subject", "World", "spfs_criu", "time"]
