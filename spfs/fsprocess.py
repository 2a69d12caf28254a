"""The process that serves one mount: the command ``stubfs``, forked from a job instead of executed.

A job is a copy of the manager, which has imported most of what the file system needs; after ``preload()`` all of it.
An interpreter that must start first would be most of the time that a mount takes, and each would have its own copy of
what they now share.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import traceback
from typing import List, NoReturn, Sequence, Tuple

from spfs.errors import SpfsError, reason
from spfs.processes import has_ended
from stubfs import readiness, stdio
from stubfs.errors import StubfsError

START_TIMEOUT = 20.0  # seconds from fork to ready; it takes a hundredth of one on an idle machine
END_TIMEOUT = 3.0  # seconds for a file system process to end when it is told to
NAME = "stubfs"


def preload() -> None:
    """Import all that a file system needs, so that those that are forked later need not."""
    import stubfs.cli  # noqa: F401
    from stubfs import libfuse

    try:
        libfuse.load()
    except StubfsError:
        pass  # whoever asks for a mount is told so


def start(arguments: Sequence[str], device_fd: int, log: str) -> Tuple[int, int]:
    """Start ``stubfs ARGUMENTS``, which may name ``device_fd``; error output goes to the file ``log``.

    Its pid, and the pipe (the caller's) on which it tells that it is ready. OSError if there can be no process.
    """
    ready, tell = os.pipe()
    # Until the child has its own disposition: a job's cancellation must not be raised in it.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        pid = os.fork()
        if pid == 0:
            _become(["--ready-fd", str(tell), "--log", log, *arguments], [device_fd, tell], log)
        return pid, ready
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(tell)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _become(arguments: List[str], keep: Sequence[int], log: str) -> NoReturn:
    """In the child. Nothing may get out of here: above on the stack is the job."""
    status = 1
    try:
        gc.freeze()  # what is the manager's is neither collected here, nor its pages copied for that
        os.setsid()  # it outlives the job, whose session is killed with it
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        stdio.let_go(output)
        logging.getLogger().handlers.clear()  # the manager's
        from stubfs import cli, daemon

        daemon.close_inherited(keep)
        _reset_signals()
        _rename([NAME, *arguments])
        status = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _reset_signals() -> None:
    """As for a program that has just been started; all else is inherited from the manager as it would be by that."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _rename(words: Sequence[str]) -> None:
    """So that ps(1) and its kind show what it is."""
    from spfs.linux import prctl

    prctl.set_name(words[0])
    try:
        prctl.set_command_line(words)
    except OSError:
        pass  # a kernel without this: it is shown with the manager's arguments


def wait_ready(id: str, ready: int, log: str) -> None:
    """Until it is ready. SpfsError with what it tells if it cannot be, or takes too long."""
    try:
        readiness.wait(ready, START_TIMEOUT)
    except StubfsError as error:
        raise SpfsError(f"cannot start the file system: {id}: {error.message}", error.hint, error.errno) from error
    except TimeoutError as error:
        why = reason(error)
        raise SpfsError(f"cannot start the file system: {id}: {why}", f"see {log}", errno.ETIMEDOUT) from error
    except EOFError as error:
        raise SpfsError(f"cannot start the file system: {id}: it has died", f"see {log}", errno.EIO) from error


def end(pid: int, pidfd: int) -> None:
    """Ask (SIGTERM gives held requests EIO), then kill. Its end is waited for here, or by whoever is its parent."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            break
        if has_ended(pidfd, END_TIMEOUT):
            break
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
