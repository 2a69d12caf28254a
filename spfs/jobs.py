"""Jobs: what could block the manager is done in a forked child, which reports over a socket pair.

A job is a function run without exec, with all of the manager's descriptors closed but those it is given. It may send
progress, delivers one result (JSON and descriptors), and is cancelled by SIGTERM, which raises in it so that its own
clean-up runs. Nothing here knows what the jobs do.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence

from spfs.errors import SpfsError, reason
from spfs.state import write_atomically
from stubfs import wire
from stubfs.errors import StubfsError

log = logging.getLogger(__name__)

KILL_AFTER = 20.0
"""Seconds that a cancelled job has for its clean-up. Longer than any bounded wait inside a job."""

UNCHANGED = "mounting"
"""The stage of a job in which nothing has been changed yet, so that it can be given up at any moment."""


class Cancelled(BaseException):
    """Raised inside a job by cancel(). Not an Exception, so that no handler of ordinary errors swallows it."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with ``value`` (descriptors are the receiver's), or with ``error``.

    ``died``: it ended without saying so (killed); what it had in hand was not cleaned up by it.
    """

    value: Dict[str, Any] = field(default_factory=dict)
    fds: wire.Descriptors = field(default_factory=wire.Descriptors)
    error: Optional[StubfsError] = None
    cancelled: bool = False
    died: bool = False


class Context:
    """The job's side of the socket pair."""

    def __init__(self, sock: socket.socket, result_file: Optional[str] = None) -> None:
        self._sock = sock
        self._result_file = result_file
        self.delivered = False

    def progress(self, stage: str, details: Optional[Dict[str, object]] = None) -> None:
        """Tell the manager. If it is gone: Cancelled while nothing was changed, else the job goes on to its end."""
        packet = {"stage": stage, "details": details or {}, "time": time.time()}
        try:
            wire.send(self._sock, json.dumps(packet).encode())
        except (BrokenPipeError, ConnectionResetError):
            if stage == UNCHANGED:
                raise Cancelled() from None

    def deliver(self, value: Dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send the result with copies of ``fds``. If the manager is gone: into the result file if there is one, else
        ConnectionError, and the job should undo what it did."""
        self._send({"result": value}, fds)

    def fail(self, error: StubfsError, cancelled: bool = False) -> None:
        packet = {"message": error.message, "hint": error.hint, "errno": error.errno, "cancelled": cancelled}
        self._send({"error": packet}, ())

    def _send(self, packet: Dict[str, Any], fds: Sequence[int]) -> None:
        self.delivered = True
        data = json.dumps(packet).encode()
        try:
            wire.send(self._sock, data, fds)
        except (BrokenPipeError, ConnectionResetError):
            if self._result_file is None:
                raise
            write_atomically(self._result_file, data)


OnProgress = Callable[[str, Dict[str, Any], float], None]
"""Gets stage, details and time of what a job tells."""


def ignore_progress(stage: str, details: Dict[str, Any], when: float) -> None:
    """For jobs whose steps are of no interest."""


class Job:
    """The manager's side of a running job. ``pidfd`` and ``sock`` are the job's, closed by finish()."""

    def __init__(self, kind: str, pid: int, pidfd: int, sock: socket.socket, on_progress: OnProgress) -> None:
        self.kind = kind
        self.pid = pid
        self.pidfd = pidfd
        self.sock = sock
        self._on_progress = on_progress
        self.cancelled = False
        self._result: Optional[Dict[str, Any]] = None
        self._fds = wire.Descriptors()

    def read(self) -> bool:
        """Take what the job has sent. False when it will send no more."""
        while True:
            try:
                packet = wire.receive(self.sock)
            except BlockingIOError:
                return True
            except OSError as error:
                log.warning("job %s (pid %d): bad packet: %s", self.kind, self.pid, error)
                return False
            if packet is None:
                return False
            _, payload, fds = packet
            message = json.loads(payload)
            if "stage" in message:
                fds.close()
                self._on_progress(message["stage"], message["details"], message["time"])
            else:
                self._fds.close()
                self._result, self._fds = message, fds

    def cancel(self) -> None:
        """Ask it to undo and end. The caller kills it after KILL_AFTER."""
        self.cancelled = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass  # it has ended; its end is on its way to us

    def finish(self) -> Outcome:
        """After the process has ended, and before it is waited for. Closes ``sock`` and ``pidfd``."""
        self.read()
        self.sock.close()
        os.close(self.pidfd)
        outcome = outcome_of(self._result, self.kind, self._fds)
        if outcome.died:
            # Its helper processes are in its session. Until it is waited for, the number cannot be another group's.
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        return outcome


def outcome_of(message: Optional[Dict[str, Any]], kind: str, fds: Optional[wire.Descriptors] = None) -> Outcome:
    """The Outcome that a job's last packet (or result file) stands for; None: it left none."""
    fds = fds if fds is not None else wire.Descriptors()
    if message is None:
        fds.close()
        lost = SpfsError(
            f"cannot finish the {kind}: the process that did it was killed", "ask for it again", errno.ECONNABORTED
        )
        return Outcome(error=lost, died=True)
    if "error" in message:
        fds.close()
        told = message["error"]
        error = SpfsError(told["message"], told["hint"], told["errno"])
        return Outcome(error=error, cancelled=bool(told["cancelled"]))
    return Outcome(value=message["result"], fds=fds)


def start(
    kind: str,
    function: Callable[[Context], None],
    on_progress: OnProgress = ignore_progress,
    keep: Sequence[int] = (),
    result_file: Optional[str] = None,
) -> Job:
    """Fork a child that runs ``function`` with the descriptors ``keep`` (besides 0-2); OSError if it cannot.

    Must be called by a single-threaded process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place = -1
    # Blocked over the fork: a cancel that comes before the child's handler is set must not kill it outright.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        place = os.dup(ours.fileno())  # for the pidfd, which must not fail when the child is at work
        pid = os.fork()
        if pid == 0:
            _run(kind, function, Context(theirs, result_file), [theirs.fileno(), *keep])
        os.close(place)
        place = -1
        pidfd = os.pidfd_open(pid)
        theirs.close()
        ours.setblocking(False)
        return Job(kind, pid, pidfd, ours, on_progress)
    except BaseException:
        ours.close()
        theirs.close()
        if place >= 0:
            os.close(place)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _run(kind: str, function: Callable[[Context], None], context: Context, keep: Sequence[int]) -> NoReturn:
    """In the child. Nothing may get out of here: above on the stack is the manager's loop."""
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, _raise_cancelled)
        for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.chdir("/")  # a Python that it starts would look for modules in the current directory first
        _close_all_but([*keep, *_log_files()])
        status = _report(kind, function, context)
    except Cancelled:
        pass
    except BaseException:
        log.exception("job %s: cannot report", kind)
    finally:
        os._exit(status)


def _report(kind: str, function: Callable[[Context], None], context: Context) -> int:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # one that came meanwhile is raised here
        function(context)
        if not context.delivered:
            context.deliver({})
        return 0
    except Cancelled:
        error = SpfsError(f"cannot finish the {kind}: it was aborted", "ask for it again", errno.ECANCELED)
        context.fail(error, cancelled=True)
    except StubfsError as known:
        context.fail(known)
    except ConnectionError as gone:
        if context.delivered:
            return 1  # nobody is left to be told
        context.fail(SpfsError(f"cannot do the {kind}: {reason(gone)}", "see the log", gone.errno or errno.EIO))
    except OSError as system:
        on = f": {system.filename}" if system.filename else ""
        context.fail(SpfsError(f"cannot do the {kind}{on}: {reason(system)}", "see the log", system.errno or errno.EIO))
    except Exception as bug:
        log.exception("job %s", kind)
        context.fail(SpfsError(f"cannot do the {kind}: {bug!r}", "this is a defect: the log has more", errno.EIO))
    return 1


def _raise_cancelled(number: int, frame: Optional[FrameType]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the clean-up
    raise Cancelled()


def _close_all_but(keep: Sequence[int]) -> None:
    # Not up to the limit, which may be a thousand million: Python 3.9 closes each number by a call of its own.
    last = max(map(int, os.listdir("/proc/self/fd")))
    low = 3
    for fd in sorted({fd for fd in keep if fd >= low}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, last + 1)


def _log_files() -> List[int]:
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    return [handler.stream.fileno() for handler in handlers if handler.stream is not None]
