"""A real stubfs for tests, and real processes that use it; all of them end whatever becomes of the test."""

from __future__ import annotations

import errno
import faulthandler
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence

from spfs.testing import wait_until
from stubfs import syscalls
from stubfs.client import FilesystemClient

TOP = Path(__file__).parents[2]
LIMIT = 20.0


def command(*arguments: str) -> List[str]:
    return [sys.executable, "-m", "stubfs", *arguments]


def environment() -> "dict[str, str]":
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH")]))}


class Process:
    """A forked child that runs ``action``; result() gives what it returned, or raises what it raised."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                faulthandler.disable()  # pytest's: a SIGBUS that is meant to come is no news
                try:
                    answer = (True, action())
                except BaseException as error:
                    answer = (False, (type(error).__name__, getattr(error, "errno", None), traceback.format_exc()))
                with os.fdopen(write, "wb") as pipe:
                    pickle.dump(answer, pipe)
            finally:
                os._exit(0)
        os.close(write)
        self.status: Optional[int] = None

    def finished(self, timeout: float = 0.0) -> bool:
        """Whether it has answered or died."""
        return bool(select.select([self._read], [], [], timeout)[0])

    def result(self, timeout: float = LIMIT) -> Any:
        assert self.finished(timeout), "the process is blocked"
        with os.fdopen(os.dup(self._read), "rb") as pipe:
            data = pipe.read()
        assert data, f"the process died: {self.wait()}"
        succeeded, value = pickle.loads(data)
        if not succeeded:
            raise AssertionError(value[2])
        return value

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = LIMIT) -> int:
        """The wait status; TimeoutError if it does not end."""

        def ended() -> bool:
            if self.status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.status = status
            return self.status is not None

        wait_until(ended, timeout)
        assert self.status is not None
        return self.status

    def close(self) -> None:
        if self.status is None:
            for number in (signal.SIGKILL, signal.SIGCONT):
                try:
                    self.kill(number)
                except ProcessLookupError:
                    pass
            self.wait(5)
        if self._read >= 0:
            os.close(self._read)
            self._read = -1


class Filesystem:
    """A mounted stubfs in the foreground, with ``path``, ``client`` and a directory ``real`` beside it.

    ``under``: a command that executes it.
    """

    def __init__(
        self, base: Path, mode: str = "restore", name: str = "fs", real: Optional[Path] = None,
        options: Sequence[str] = (), under: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.base = base / name
        self.path = self.base / "mnt"
        self.real = real if real is not None else self.base / "real"
        for directory in (self.path, self.real):
            directory.mkdir(parents=True, exist_ok=True)
        self.socket_path = str(self.base / "sock")
        self.log = self.base / "log"
        self._stack = ExitStack()
        self.processes: List[Process] = []
        read, write = os.pipe()
        arguments = ["-f", "--mode", mode, "--socket-path", self.socket_path, "--log", str(self.log), "-v", *options]
        if mode == "proxy":
            arguments += ["--proxy-dir", str(self.real)]
        self.daemon = subprocess.Popen(
            [*under, *command(str(self.path), *arguments, "--ready-fd", str(write))],
            env=environment(), pass_fds=[write], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            ready = pipe.read(1)
        if ready != b"\n":
            raise AssertionError(f"stubfs did not start: {self.daemon.communicate()[1]}")
        self.device = syscalls.device_without_sync(os.fsencode(self.path))
        self.client = FilesystemClient(self.socket_path, LIMIT)

    def run(self, action: Callable[[], Any]) -> Process:
        process = Process(action)
        self.processes.append(process)
        return process

    def proxy(self, directory: Optional[Path] = None) -> None:
        fd = os.open(directory if directory is not None else self.real, os.O_PATH | os.O_DIRECTORY)
        try:
            self.client.mode("proxy", fd)
        finally:
            os.close(fd)

    def wait_held(self, count: int = 1) -> None:
        """Until so many requests of processes are held; those that nobody waits for do not count."""
        wait_until(lambda: sum(1 for held in self.client.held() if held.tid) >= count, LIMIT)

    def close(self) -> None:
        for process in self.processes:
            try:
                process.kill()
            except ProcessLookupError:
                pass
        try:
            self.client.quit()
        except Exception:
            pass
        self.client.close()
        try:
            self.daemon.wait(5)
        except subprocess.TimeoutExpired:
            # It hangs in the kernel: only the end of the connection helps.
            self.daemon.kill()
            abort(self.device)
            self.daemon.wait(5)
        finally:
            if self.daemon.stderr is not None:
                self.daemon.stderr.close()
            for process in self.processes:
                process.close()
            try:
                if syscalls.device_without_sync(os.fsencode(self.path)) == self.device:
                    syscalls.umount2(os.fsencode(self.path), syscalls.MNT_DETACH)
            except OSError:
                pass


def outcome(action: Callable[[], Any]) -> Any:
    """What it returns, or the name of its errno."""
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def mount_new(fstype: str, path: "str | os.PathLike[str]", attributes: int = 0, **options: str) -> None:
    """A new file system on a directory; ``attributes`` as of fsmount(2)."""
    context = syscalls.fsopen(fstype)
    try:
        for key, value in options.items():
            syscalls.fsconfig(context, key, value)
        syscalls.fsconfig(context, None)
        mount_fd = syscalls.fsmount(context, attributes)
    finally:
        os.close(context)
    try:
        syscalls.move_mount(mount_fd, os.fsencode(path))
    finally:
        os.close(mount_fd)


def abort(device: int) -> None:
    """End a FUSE connection by the control file system, mounted for the moment."""
    with tempfile.TemporaryDirectory() as directory:
        mount_new("fusectl", directory)
        try:
            Path(directory, str(os.minor(device)), "abort").write_text("1")
        except OSError:
            pass  # it has ended by itself
        finally:
            syscalls.umount2(os.fsencode(directory), syscalls.MNT_DETACH)


@contextmanager
def mounted(base: Path, mode: str = "restore", **settings: Any) -> Iterator[Filesystem]:
    filesystem = Filesystem(base, mode, **settings)
    try:
        yield filesystem
    finally:
        filesystem.close()


def as_user(uid: int, gid: int, groups: List[int], action: Callable[[], Any]) -> Callable[[], Any]:
    """``action`` with a user's credentials, for a child."""

    def run() -> Any:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        return action()

    return run


def blocked_in_fuse(pid: int) -> bool:
    """Whether a process waits for the answer to a request: also when it is not listed as one that waits."""
    try:
        return b"fuse" in Path(f"/proc/{pid}/stack").read_bytes()
    except OSError:
        return False


__all__ = ["Filesystem", "Process", "abort", "as_user", "blocked_in_fuse", "command", "mounted", "wait_until"]
