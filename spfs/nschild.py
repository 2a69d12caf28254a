"""Work inside another process's namespaces, done by a forked child that sends back a value and descriptors.

``run`` forks for one function; a ``Helper`` has joined already and waits for commands, for what must be fast later.
A child dies with the thread that forked it, never returns into its parent's code, and runs none of its cleanups.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from importlib.machinery import BuiltinImporter, FrozenImporter
from types import TracebackType
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional, Sequence, Set, Tuple, Type, Union

from spfs.errors import MissingFeatureError, SpfsError, UsageError
from spfs.linux import namespaces
from spfs.target import Target
from stubfs import wire
from stubfs.errors import StubfsError

# A value that json can carry and descriptors, which are closed in the child once they are sent.
Answer = Tuple[Any, Sequence[int]]
Command = Callable[[Any, List[int]], Answer]
_Mask = Set[Union[int, signal.Signals]]

ALL = tuple(namespaces.NAMESPACES)
_LONGEST = 1e6  # seconds; poll(2) takes an int of milliseconds
_ERRORS: Dict[str, Type[StubfsError]] = {
    kind.__name__: kind for kind in (StubfsError, SpfsError, UsageError, MissingFeatureError)
}


@dataclass
class Result:
    """What a child returned. The descriptors are the caller's: taken by ``steal``, or closed by ``close``."""

    value: Any
    fds: wire.Descriptors = field(default_factory=wire.Descriptors)

    def __enter__(self) -> "Result":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def steal(self, index: int = 0) -> int:
        return self.fds.steal(index)

    def close(self) -> None:
        self.fds.close()


def enter(target: Target, join: Sequence[str] = ALL, root: bool = True) -> None:
    """Join those of ``target``'s pinned namespaces that ``join`` names, and its root. For forked children only.

    After ``pid`` only children of the caller are in the new pid namespace (setns(2)). With ``root`` false a mount
    namespace is entered at its own root, from where mountinfo shows all of it.
    """
    for name, kind in namespaces.NAMESPACES.items():
        if name == "user":
            # chroot before: afterwards it would need the right in that user namespace.
            if root and target.root_fd >= 0 and ("mnt" in join or "mnt" not in target.namespaces):
                os.fchdir(target.root_fd)
                os.chroot(".")
        if name in join and name in target.namespaces:
            namespaces.setns(target.namespaces[name], kind)
    if "user" in join and "user" in target.namespaces:
        _become_root()
    os.chdir("/")
    forbid_imports()


def forbid_imports() -> None:
    """For a forked child that enters another's mount namespace or root: from there on a path is what somebody else has
    put there, and a module that was first imported now would be his code, run with our rights."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder in (BuiltinImporter, FrozenImporter)]
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()


def _become_root() -> None:
    """Be uid and gid 0 of the user namespace just joined, as far as it maps them."""
    changes: List[Tuple[Callable[..., None], Tuple[Any, ...]]] = [
        (os.setgroups, ([],)),
        (os.setresgid, (0, 0, 0)),
        (os.setresuid, (0, 0, 0)),
    ]
    for change, arguments in changes:
        try:
            change(*arguments)
        except OSError:  # 0 is not mapped, or setgroups is denied there: the capabilities are what counts
            pass


def run(
    function: Callable[[], Answer],
    target: Target,
    join: Sequence[str] = ALL,
    timeout: Optional[float] = None,
    root: bool = True,
    group: bool = False,
) -> Result:
    """Run ``function`` in a child that has joined ``target``; what it raises is raised here.

    OSError keeps errno, text and filename; StubfsError its fields; anything else becomes RuntimeError with the child's
    traceback. ``timeout`` in seconds: the child is killed and TimeoutError raised. ChildProcessError if it died.
    With ``group`` it leads a process group of its own, and what it started is killed with it.
    """
    return call(lambda: _joined(function, target, join, root), timeout, group)


def _joined(function: Callable[[], Answer], target: Target, join: Sequence[str], root: bool) -> Answer:
    enter(target, join, root)
    if "pid" not in join or "pid" not in target.namespaces:
        return function()
    result = call(function, None)
    return result.value, [result.steal(index) for index in range(len(result.fds))]


def call(function: Callable[[], Answer], timeout: Optional[float] = None, group: bool = False) -> Result:
    """As ``run``, in a child that joins nothing."""
    child, mask = _fork(lambda sock: _answer(sock, function), None, group)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return child.receive(timeout)
    finally:
        child.end()


class Helper:
    """A child that has joined ``target`` and waits for commands; made before a blackout, used inside.

    It keeps none of the parent's descriptors but those of ``keep``, so it holds nobody's mount or socket. The commands
    are fixed at the start. Owned by the caller: ``close`` ends it, and so does the end of the parent.
    """

    def __init__(
        self,
        commands: Mapping[str, Command],
        target: Target,
        join: Sequence[str] = ("mnt",),
        *,
        root: bool = False,
        keep: Sequence[int] = (),
        before: Callable[[], None] = lambda: None,
        timeout: Optional[float] = 10.0,
    ) -> None:
        """``before`` runs in the child before it joins; OSError or SpfsError if that or the joining fails."""

        def start() -> Answer:
            before()
            enter(target, join, root)
            return None, []

        self._child, mask = _fork(lambda sock: _serve(sock, commands, start), [*keep, *target.fds()])
        self._sent = 1  # the start itself, which is answered like a command
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self.receive(timeout).close()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, command: str, argument: Any = None, fds: Sequence[int] = ()) -> None:
        """Start a command; the answer is had by ``receive``, in order. Several helpers can so work at once."""
        wire.send(self._child.sock, json.dumps([command, argument]).encode(), fds)
        self._sent += 1

    def receive(self, timeout: Optional[float] = None) -> Result:
        """The answer to the oldest command that was sent; raises as ``run`` does.

        After a TimeoutError the answer is still to come: ``drain`` before the next command, or ``close``.
        """
        return self._child.receive(timeout)

    def drain(self, timeout: Optional[float] = None) -> None:
        """Wait for the answers that are still to come, and drop them. TimeoutError; ChildProcessError if it died."""
        while self._child.answers < self._sent:
            before = self._child.answers
            try:
                self.receive(timeout).close()
            except (OSError, StubfsError, RuntimeError):  # the command's failure is an answer like any other
                if self._child.answers == before:
                    raise

    def call(
        self, command: str, argument: Any = None, fds: Sequence[int] = (), timeout: Optional[float] = None
    ) -> Result:
        self.send(command, argument, fds)
        return self.receive(timeout)

    def close(self) -> None:
        self._child.end()

    def __enter__(self) -> "Helper":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


class _Child:
    """The parent's side of a child: its pid and our end of the socket."""

    def __init__(self, pid: int, sock: socket.socket, group: bool = False) -> None:
        self.pid = pid
        self.sock = sock
        self._group = group
        self.answers = 0

    def receive(self, timeout: Optional[float]) -> Result:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(None if timeout is None else min(_LONGEST, max(0, timeout)) * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"helper process {self.pid} has not answered in {timeout} s")
        try:
            packet = wire.receive(self.sock)
        except ConnectionResetError:  # died with a command of ours unread
            packet = None
        if packet is None:
            raise ChildProcessError(errno.ECHILD, f"helper process {self.pid} died before it answered")
        self.answers += 1
        _, payload, fds = packet
        answer = json.loads(payload)
        if "error" in answer:
            fds.close()
            raise _revive(answer["error"])
        return Result(answer["value"], fds)

    def end(self) -> None:
        """Reap the child. One that is stuck in the kernel is killed and left to its parent's reaper."""
        if self.pid <= 0:
            return
        self.sock.close()
        pid, self.pid = self.pid, -1
        # The closed socket ends a helper by itself; SIGKILL is for one that is inside something.
        for stop, seconds in ((None, 0.2), (signal.SIGKILL, 2.0)):
            if stop is not None:
                self._kill(pid, stop)
            if _reap(pid, seconds):
                return

    def _kill(self, pid: int, number: int) -> None:
        try:
            os.killpg(pid, number) if self._group else os.kill(pid, number)
        except ProcessLookupError:  # it has not come as far as making its group
            os.kill(pid, number)


def _reap(pid: int, seconds: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
    finally:
        os.close(pidfd)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:  # somebody reaps all children (SIGCHLD ignored, or a handler that waits)
        pass
    return True


def _fork(
    work: Callable[[socket.socket], None], keep: Optional[Sequence[int]], group: bool = False
) -> Tuple["_Child", _Mask]:
    """A child that does ``work`` with its end of a socketpair, and the signal mask to be set again.

    All signals are blocked on return: a handler that raises must find the caller where it ends the child. With
    ``keep`` (not None) the child closes all other descriptors.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        _child(lambda: work(theirs), None if keep is None else [theirs.fileno(), *keep], parent, mask, group)
    theirs.close()
    return _Child(pid, ours, group), mask


def _child(
    work: Callable[[], None], keep: Optional[Sequence[int]], parent: int, mask: _Mask, group: bool
) -> NoReturn:
    """The whole life of a child."""
    try:
        namespaces.die_with_parent(signal.SIGKILL)
        if os.getppid() in (parent, 0):  # 0: the parent is outside of our pid namespace; else it has ended already
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)  # the parent's cleanups are not ours
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if group:
                os.setpgid(0, 0)
            if keep is not None:
                _close_others(keep)
            work()
    finally:
        os._exit(0)  # whatever was raised has been reported; nothing of the parent's may run here


def _close_others(keep: Sequence[int]) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    limit = max((int(name) for name in os.listdir("/proc/self/fd")), default=2) + 1
    low = 3  # 2 stays: the only place for a message that cannot be sent
    for fd in sorted(fd for fd in set(keep) if fd >= low):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, limit)


def _serve(sock: socket.socket, commands: Mapping[str, Command], start: Callable[[], Answer]) -> None:
    _answer(sock, start)
    while True:
        packet = wire.receive(sock)
        if packet is None:
            return
        _, payload, received = packet
        name, argument = json.loads(payload)
        with received:
            fds = [received.steal(index) for index in range(len(received))]
            try:
                _answer(sock, lambda: commands[name](argument, fds))
            finally:
                for fd in fds:
                    _close_quietly(fd)


def _answer(sock: socket.socket, function: Callable[[], Answer]) -> None:
    try:
        value, fds = function()
        reply = json.dumps({"value": value}).encode()
    except BaseException as error:
        fds = []
        reply = json.dumps({"error": _describe(error)}).encode()
    try:
        wire.send(sock, reply, fds)
    finally:
        for fd in fds:
            _close_quietly(fd)


def _close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:  # a command may have closed, or sent, what it was given
        pass


def _describe(error: BaseException) -> Dict[str, Any]:
    if isinstance(error, StubfsError):
        kind = type(error).__name__
        return {"kind": kind, "message": error.message, "hint": error.hint, "errno": error.errno}
    if isinstance(error, OSError) and error.errno:
        filename = None if error.filename is None else str(error.filename)
        return {"kind": "OSError", "message": error.strerror, "errno": error.errno, "filename": filename}
    return {"kind": "", "message": "".join(traceback.format_exception(type(error), error, error.__traceback__))}


def _revive(error: Dict[str, Any]) -> BaseException:
    kind = error["kind"]
    if kind in _ERRORS:
        return _ERRORS[kind](error["message"], error["hint"], error["errno"])
    if kind == "OSError":
        if error["filename"] is None:
            return OSError(error["errno"], error["message"])
        return OSError(error["errno"], error["message"], error["filename"])
    return RuntimeError(f"in a helper process:\n{error['message']}")


def deadline_left(deadline: Optional[float]) -> Optional[float]:
    """Seconds until ``deadline`` (time.monotonic), at least 0; None if there is none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
