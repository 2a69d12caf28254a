"""``stubfs.mount()``: the file system for scripts, always in a process of its own.

Never in the caller's: a thread of it that touches the mount may hold the interpreter's lock while it waits for an
answer, which only another thread of the same interpreter could give; a page fault in a mapping always does. And when
such a process is killed, the kernel waits for its own requests to be answered by it.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from types import TracebackType
from typing import Any, List, Optional, Sequence, Type, Union

from stubfs import fusemount, interpreter, readiness
from stubfs.client import FilesystemClient
from stubfs.errors import StubfsError, UsageError, reason
from stubfs.messages import FilesystemStatus
from stubfs.modes import Mode

_EXIT_LIMIT = 10.0  # seconds for the process to end when it has been asked to
Directory = Union[str, "os.PathLike[str]", int]


class Mount:
    """A mounted file system; a context manager. ``path`` is the mountpoint, ``client`` its control connection.

    The file system is ours alone: it ends, and the mount goes away, with close(), and also if this process dies. In a
    forked child close() gives up the child's part of it, and the parent's mount stays.
    """

    def __init__(self, path: str, arguments: Sequence[str], timeout: float) -> None:
        self.path = os.path.abspath(path)
        self._lifeline = -1
        self._maker = os.getpid()
        self._process: Optional["subprocess.Popen[bytes]"] = None
        try:
            # Only to meet: whoever is killed later leaves nothing there.
            with tempfile.TemporaryDirectory(prefix="stubfs-mount-") as meeting_place:
                socket_path = os.path.join(meeting_place, "control")
                self._start([self.path, "--foreground", "--socket-path", socket_path, *arguments], timeout)
                self.client = FilesystemClient(socket_path, timeout)
        except BaseException:
            self._end()
            raise

    def _start(self, arguments: List[str], timeout: float) -> None:
        ready, tell = os.pipe()
        lifeline, self._lifeline = os.pipe()
        try:
            with tempfile.TemporaryFile() as messages:
                self._process = subprocess.Popen(
                    interpreter.command("stubfs.cli", f"--ready-fd={tell}", f"--lifeline-fd={lifeline}", *arguments),
                    pass_fds=[tell, lifeline], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=messages,
                    start_new_session=True,  # what interrupts the caller is not to take the mount from under its feet
                )  # fmt: skip
                os.close(tell)
                tell = -1
                try:
                    readiness.wait(ready, timeout)
                except TimeoutError as error:
                    self._process.kill()
                    raise StubfsError(
                        f"cannot mount on {self.path}: {reason(error)}", "give it longer: timeout=", errno.ETIMEDOUT
                    ) from error
                except EOFError as error:
                    status = self._process.wait()
                    messages.seek(0)
                    last = messages.read().decode(errors="backslashreplace").strip().rpartition("\n")[2]
                    why = last or (f"killed by signal {-status}" if status < 0 else f"exit code {status}")
                    raise StubfsError(f"cannot mount on {self.path}: {why}", "", errno.EIO) from error
        finally:
            for fd in (ready, tell, lifeline):
                if fd >= 0:
                    os.close(fd)

    @property
    def pid(self) -> int:
        """Of the process that serves the mount. StubfsError after close()."""
        return self._serving().pid

    def _serving(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise StubfsError(f"cannot ask the file system of {self.path}: it has been closed", "", errno.ESHUTDOWN)
        return self._process

    def mode(self, mode: str, directory: Optional[Directory] = None, **options: Any) -> FilesystemStatus:
        """Change the mode; "proxy" needs the directory, as a path or as an fd, which stays the caller's.

        ``options`` of stub mode as FilesystemClient.mode() has them.

        Returns when the change is in force. StubfsError says why not; then nothing has changed.
        """
        self._serving()
        if directory is None or isinstance(directory, int):
            return self.client.mode(mode, directory, **options)
        try:
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StubfsError(
                f"cannot use {os.fspath(directory)}: {error.strerror}", "give a directory", error.errno or errno.EIO
            ) from error
        try:
            return self.client.mode(mode, fd, **options)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Unmount, lazily, and end the file system: who still uses it gets errors. Again: nothing.

        StubfsError if its process was killed and the mount cannot be taken away.
        """
        if self._process is None:
            return
        if os.getpid() == self._maker:
            try:
                self.client.quit()
            except StubfsError:
                pass  # it has ended: somebody has unmounted it
        self.client.close()
        self._end()

    def _end(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        process, self._process = self._process, None
        if process is None or os.getpid() != self._maker:
            return
        try:
            process.wait(_EXIT_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode < 0:
            fusemount.unmount_dead(self.path)

    def __enter__(self) -> "Mount":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


def mount(
    mountpoint: Union[str, "os.PathLike[str]"],
    mode: str = "restore",
    directory: Union[str, "os.PathLike[str]", None] = None,
    *,
    options: str = "",
    rules: Sequence[str] = (),
    log: Union[str, "os.PathLike[str]", None] = None,
    timeout: float = 30.0,
) -> Mount:
    """Mount a stubfs, served by a process of its own, and return when it is ready.

    ``with stubfs.mount("/mnt") as fs: ...``

    ``directory`` is the real one, for mode "proxy"; ``options`` as for -o, ``rules`` as for --rule; ``log`` is appended
    to; ``timeout`` in seconds is that of the start and of each control call. Raises UsageError, MissingFeatureError or
    another StubfsError, and then nothing is left behind.
    """
    if mode not in [known.value for known in Mode]:
        raise UsageError(f"cannot mount on {os.fspath(mountpoint)}: {mode!r}: no such mode", "restore, stub or proxy")
    arguments = ["--mode", mode]
    if directory is not None:
        arguments += ["--proxy-dir", os.fspath(directory)]
    if options:
        arguments += ["-o", options]
    for rule in rules:
        arguments += ["--rule", rule]
    if log is not None:
        arguments += ["--log", os.fspath(log)]
    return Mount(os.fspath(mountpoint), arguments, timeout)
