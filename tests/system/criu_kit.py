"""Processes that are dumped and restored by CRIU, what they have mounted, and an undisturbed twin of each.

Their mount is a directory of a tmpfs, which is "the server": it is bound in the mount's place when it is there, and is
not there as long as it has another name.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import pytest
from manager_kit import ENVIRONMENT

from spfs.client import ManagerClient
from spfs.criu.manager import STATE, WORK_DIR
from spfs.errors import SpfsError
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
        timeout=TIMEOUT,
    )
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr, _logs(arguments))
    return done.stdout if status == 0 else done.stderr


def criu(*arguments: str, environment: Optional[Dict[str, str]] = None) -> "subprocess.CompletedProcess[str]":
    """CRIU itself, as somebody who does not know of spfs-criu runs it."""
    # No pipe: what it leaves behind when it is killed would keep that open.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            ["criu", *arguments],
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=TIMEOUT,
        )
        output.seek(0)
        return subprocess.CompletedProcess(done.args, done.returncode, "", output.read())


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

    def __init__(self, directory: Path, prefix: Sequence[str] = (), seen_as: Optional[str] = None) -> None:
        """``seen_as``: the path that ``directory`` has where the prefix leads to."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        with open(directory / "output", "wb") as output:
            self.process: Optional["subprocess.Popen[bytes]"] = subprocess.Popen(
                [*prefix, sys.executable, "-c", SERVE, seen_as or str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
            )
        wait_until((directory / "ready").exists, TIMEOUT, "the subject to start")
        self.pid = self.process.pid
        if seen_as is not None:
            # unshare(1) waits outside of the namespaces that it has made.
            while children := Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text():
                self.pid = int(children)

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
        for kill in (os.killpg, os.kill):  # its children, too; where it leads no group it is the first of a namespace
            try:
                kill(self.pid, signal.SIGKILL)
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
        path.mkdir(exist_ok=True)
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

    def container(
        self, name: str, binds: Dict[str, Path], *namespaces: str, setup: str = "", user: Optional[int] = None
    ) -> Subject:
        """A subject in namespaces of its own, whose root is a bind mount of ours with nothing mounted but ``binds``
        (path there → source) and /proc. ``setup``: more shell commands, in the new root before it is one; ``user``:
        the uid (and gid) outside that is root in a user namespace of its own, to which all others belong; its root
        directory is made outside, as nobody in one could."""
        directory, root = self.base / name, self.base / "root"
        if not root.exists():
            root.mkdir()
            self.bind(Path("/"), root)
            self.stack.callback(self.unbind, root)
        lines = [f"mount --make-rprivate /; mount --bind / {root}; cd {root}; mount --bind {directory} media"]
        lines += [f"mount --bind {source} .{path}" for path, source in binds.items()]
        lines += [setup, "mount -t proc proc proc; pivot_root . opt; umount -l /opt; cd /"]
        within = ["--pid", "--fork", *namespaces]
        enter = ""
        if user is not None:
            ids = f"--map-users=0:{user}:1000 --map-groups=0:{user}:1000 --setuid=0 --setgid=0"
            enter = f"unshare --user {ids} --mount {' '.join(within)} --mount-proc"
            for path in self.base.parents:
                if not path.stat().st_mode & 0o001:  # CRIU must get there as that user
                    self.stack.callback(path.chmod, path.stat().st_mode)
                    path.chmod(path.stat().st_mode | 0o001)
            self.base.chmod(0o711)
            directory.mkdir(parents=True)
            (directory / "output").touch()
            for path in (directory, directory / "output"):
                os.chown(path, user, user)
        begin = 'exec setsid "$@" </dev/null >/media/output 2>&1'
        script = "set -e\n" + "\n".join(lines) + f"\nexec {enter} sh -c '{begin}' sh \"$@\""
        prefix = ["unshare", "--mount", *([] if user is not None else within), "sh", "-c", script, "sh"]
        return self.subject(name, prefix=prefix, seen_as="/media")

    def dump_container(self, subject: Subject, *options: str) -> str:
        return self.dump(subject, "--external", "mnt[/media]:control", *options)

    def restore_container(self, subject: Subject, *options: str) -> None:
        pidfile = self.base / "pid"
        pidfile.unlink(missing_ok=True)
        control = f"mnt[control]:{subject.directory}"
        self.restore("--root", str(self.base / "root"), "--external", control, "--pidfile", str(pidfile), *options)
        subject.pid = int(pidfile.read_text())

    def dump(self, subject: Subject, *options: str) -> str:
        said = spfs_criu("dump", "-t", str(subject.pid), "-D", str(self.images), "-o", "dump.log", "-v4", *options)
        subject.reap()
        return said

    def restore(self, *options: str, status: int = 0, **named: Any) -> str:
        log = ["-o", "restore.log", "-v4"]
        return spfs_criu("restore", "-D", str(self.images), "-d", *log, *options, status=status, **named)

    def new_images(self) -> None:
        """Of the dumps to come."""
        self.images = self.base / f"{self.images.name}-more"
        self.images.mkdir()

    def client(self) -> ManagerClient:
        client = ManagerClient(str(Path(WORK_DIR, "control.sock")), TIMEOUT)
        self.stack.callback(client.close)
        return client

    def rows(self) -> List[Dict[str, Any]]:
        """Of the mounts that the manager has; without a mount it has ended, or will."""
        if not os.path.exists(f"{WORK_DIR}/control.sock"):
            return []
        return list(self.client().status()["mounts"])

    def wait(self) -> Dict[str, Dict[str, Any]]:
        """Key → report, when all replaces have ended well."""
        client = self.client()
        status = client.status()
        ids = [row["id"] for row in status["mounts"] + status["finished"]]
        reports = {}
        for id in reversed(ids):  # the latest first: of several restores it counts
            reports[id.partition("@")[0]] = client.wait(id, TIMEOUT)["replace"]["report"]
        return reports

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
    """Of a test that has left mounts behind; else it ends by itself, perhaps just now."""
    if not os.path.exists(WORK_DIR):
        return
    log = Path(WORK_DIR, "spfs-manager.log")
    try:
        with ManagerClient(os.path.join(WORK_DIR, "control.sock"), TIMEOUT) as client:
            text = log.read_text()
            pid = client.status()["manager"]["pid"]
            client.shutdown(unmount=True, force=True)
    except (FileNotFoundError, SpfsError) as error:
        if error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET):
            raise
        return
    wait_until(lambda: process_state(pid) in ("", "Z"), TIMEOUT, "the manager to end")
    assert "Traceback" not in text, text


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()
