"""Starting a manager as a daemon, from a program that need not stand still meanwhile. Imports next to nothing."""

from __future__ import annotations

import errno
import os
import select
import signal
import time

from spfs.errors import SpfsError, reason
from stubfs import interpreter

TIMEOUT = 30.0  # seconds
SOCKET_VARIABLE = "SPFS_MANAGER_SOCK"
"""The environment variable that says where the manager's socket is."""

_NAME = "spfs-manager: "  # how its messages begin
_CANNOT = _NAME + "cannot "


class ManagerStart:
    """A manager that is being started on ``work_dir``. Whoever begins this waits for its end."""

    def __init__(self, work_dir: str, socket_path: str, *, exit_with_spfs: bool = True) -> None:
        """SpfsError if there can be no process."""
        self._work_dir = work_dir
        arguments = ["-d", "--work-dir", work_dir, "--socket-path", socket_path]
        command = interpreter.command("spfs.cli.manager", *arguments, *["--exit-with-spfs"] * exit_with_spfs)
        self._said, says = os.pipe()
        try:
            self._pid = os.posix_spawn(
                command[0],
                command,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, says, 2),
                ],
                setsigmask=[],
            )
        except OSError as error:
            os.close(self._said)
            raise SpfsError(f"cannot start the manager in {work_dir}: {reason(error)}", errno=errno.EIO) from error
        finally:
            os.close(says)

    def wait(self) -> None:
        """Until it accepts. SpfsError with what it said if it cannot, or is not ready in time; it is ended then."""
        words, deadline = b"", time.monotonic() + TIMEOUT
        poll = select.poll()
        poll.register(self._said, select.POLLIN)
        try:
            # The daemon lets go of the pipe when it accepts.
            while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                chunk = os.read(self._said, 65536)
                if not chunk:
                    break
                words += chunk
            else:
                os.kill(self._pid, signal.SIGKILL)
        finally:
            os.close(self._said)
            _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            raise SpfsError(self._failure(words.decode(errors="replace").strip(), code), errno=errno.EIO)

    def _failure(self, said: str, code: int) -> str:
        last = said.rpartition("\n")[2]
        if last.startswith(_CANNOT):
            return last[len(_NAME) :]  # with its hint
        why = last or (f"not ready after {TIMEOUT:.0f} s, or killed" if code < 0 else f"it ended with {code}")
        return f"cannot start the manager in {self._work_dir}: {why}"
