"""The process around a session: its fds, its signals, its way into the background, its main loop and its end."""

from __future__ import annotations

import errno
import logging
import os
import selectors
import signal
import socket
import threading
from functools import partial
from typing import Callable, Iterable, List, NoReturn, Optional, Sequence

from stubfs import fusemount, wire
from stubfs.backing import Staging
from stubfs.commands import Commands
from stubfs.control import Control
from stubfs.errors import StubfsError, UsageError, reason
from stubfs.fusemount import OwnMount
from stubfs.modes import Mode, StubOptions, check_directory
from stubfs.options import MountOptions, own_top
from stubfs.rules import Rule
from stubfs.session import Session

_log = logging.getLogger(__name__)
_INIT_LIMIT = 10.0  # seconds for the kernel's first request, which it sends when the mount is made
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SETTLE_LIMIT = 1.0  # seconds for clients to get their answers at the end
_OOM_SCORE = "-500"
_OPEN_FILES = 1 << 20  # as many as fs.nr_open allows where nobody has changed it
_ACCEPT_PAUSE = 0.1  # seconds without accepting control clients when descriptors or threads ran out


def close_inherited(kept: Iterable[int]) -> None:
    """Close every fd but the standard ones and ``kept``: a pipe of a caller's must not live as long as we do."""
    keep = {0, 1, 2, *kept}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                pass  # the listing's own


def make_independent() -> None:
    """Of the caller's directory, umask, and of the memory killer's taste for whoever has many blocked clients."""
    os.chdir("/")
    os.umask(0)
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write(_OOM_SCORE)
    except OSError:
        pass  # needs CAP_SYS_RESOURCE
    import resource

    # A descriptor or two for every file that any process has open: more than one process has a use for.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(hard, _OPEN_FILES), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            break
        except (OSError, ValueError):
            pass  # more than the hard limit needs CAP_SYS_RESOURCE, and fs.nr_open allows it


def go_background() -> Optional[Callable[[int], None]]:
    """Fork. In the child: a function that tells the parent the exit status to end with. The parent never returns.

    Before any thread is started.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        told = os.read(read_end, 1)
        if told:
            os._exit(told[0])
        _, status = os.waitpid(pid, 0)
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
    os.close(read_end)
    os.setsid()

    def tell(status: int) -> None:
        try:
            os.write(write_end, bytes([status]))
        except OSError:
            pass  # it was killed; the mount is there all the same
        os.close(write_end)

    return tell


def warn_of_sysctls() -> None:
    """Kernel settings that end blocked requests, or the machine, after a while."""
    for path, meaning in (
        ("/proc/sys/fs/fuse/max_request_timeout", "the kernel aborts the mount when a request is held longer"),
        ("/proc/sys/kernel/hung_task_panic", "the kernel panics when a process is blocked for long"),
    ):
        try:
            with open(path) as setting:
                value = setting.read().strip()
        except OSError:
            continue
        if value not in ("", "0"):
            _log.warning("%s is %s: %s (set it to 0)", path, value, meaning)


class Interrupted(KeyboardInterrupt):
    """The start was ended by signal ``number``, and has been undone."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Daemon:
    """Everything that must be undone if the start fails, or at the end."""

    def __init__(
        self, mountpoint: str, mode: Mode, proxy_directory: Optional[str], socket_path: Optional[str],
        options: MountOptions, stub_options: StubOptions = StubOptions(), rules: Sequence[Rule] = (),
        record: Optional[str] = None,
    ) -> None:  # fmt: skip
        self._stub_options = stub_options
        self._rules = rules
        self._record = record
        self._cleanups: List[Callable[[], None]] = []
        self._control: Optional[Control] = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._leaving = threading.Lock()
        self._left = False
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _give_up)
        try:
            self._start(mountpoint, mode, proxy_directory, socket_path, options)
        except BaseException:
            self.leave()
            raise

    def _start(
        self, mountpoint: str, mode: Mode, proxy_directory: Optional[str], socket_path: Optional[str],
        options: MountOptions,
    ) -> None:  # fmt: skip
        directory = _open_directory(proxy_directory) if proxy_directory is not None else None
        sock = _listen(socket_path) if socket_path is not None else None
        if sock is not None:
            self._cleanups.append(sock.close)
            self._cleanups.append(partial(wire.remove, str(socket_path), os.stat(str(socket_path))))
        device = fusemount.device_fd_of(mountpoint)
        if device is None:
            # No signal in between: there is no moment at which the mount is there, and nobody would take it off.
            unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            try:
                own = OwnMount(mountpoint, options)
                self._cleanups.append(own.unmount)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            device = own.device_fd
        own_device = fusemount.connection_device(device)
        if directory is not None:
            try:
                check_directory(directory, own_device)
            except OSError as error:
                raise StubfsError(
                    f"cannot use {proxy_directory}: {reason(error)}", "give a directory of the real file system",
                    error.errno or errno.EINVAL,
                ) from error  # fmt: skip
        staging = Staging(1)
        self._cleanups.append(staging.discard)
        try:
            own_top(options, staging.fd)
        except OSError as error:
            raise StubfsError(
                f"cannot give the top directory its owner: {reason(error)}", "leave out uid= and gid=, or become root",
                error.errno or errno.EPERM,
            ) from error  # fmt: skip
        self._session = Session(device, mode, staging, directory, self._stub_options, self._rules, own_device)
        if self._record is not None:
            self._record_waits(self._record)
        # First of all, so that nobody waits for a mount that is going away.
        self._cleanups.append(self._session.quit)
        self._session.start(self._mount_gone)
        if not self._session.wait_ready(_INIT_LIMIT):
            raise StubfsError(
                f"cannot serve {mountpoint}: the kernel sends no request", "is it the device of a mount?", errno.ENODEV
            )
        if sock is not None:
            sock.setblocking(False)
            commands = Commands(self._session, mountpoint, own_device, self.leave)
            self._control = Control(sock, commands.by_name, self._wake)
        self._take_signals()

    def _take_signals(self) -> None:
        """They end run(), also when they come before it: whoever is told that we are ready may send one at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def _record_waits(self, path: str) -> None:
        from stubfs.record import Record
        from stubfs.waits import WaitRecorder

        recorder = self._session.held.recorder = WaitRecorder(Record(path), self._session.place_of)
        self._cleanups.append(recorder.close)  # after the session's end, which is the end of all waits

    def _mount_gone(self) -> None:
        if not self._left:  # else we have unmounted it, and whoever asked for that is to get an answer first
            self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except OSError:
            pass  # full: it is awake

    def serve(self, lifeline: Optional[int] = None) -> NoReturn:
        """run(), leave(), and the end of the process."""
        try:
            self.run(lifeline)
        finally:
            self.leave()
            if self._control is not None:
                self._control.settle(_SETTLE_LIMIT)
            logging.shutdown()
            # A thread may be inside read(2) of the device, or of a real file system that hangs: join none of them.
            os._exit(0)

    def run(self, lifeline: Optional[int] = None) -> None:
        """Until the mount is gone, a signal or a client ends it, nobody holds the pipe ``lifeline`` any more, or the
        process has ended of which it is a pidfd."""
        if self._session.has_ended():
            self._wake()
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            if lifeline is not None:
                selector.register(lifeline, selectors.EVENT_READ)
            if self._control is not None:
                selector.register(self._control.socket, selectors.EVENT_READ, self._control)
            paused = False
            while True:
                ready = [key.data for key, _ in selector.select(_ACCEPT_PAUSE if paused else None)]
                if None in ready:
                    return
                if self._control is None:
                    continue
                if paused:
                    selector.register(self._control.socket, selectors.EVENT_READ, self._control)
                    paused = False
                elif ready and not self._control.accept():
                    # The client goes on waiting, and would wake us at once.
                    selector.unregister(self._control.socket)
                    paused = True

    def leave(self) -> None:
        """Undo everything, in reverse order. Threads that hang in the real file system are left to the exit."""
        with self._leaving:
            if self._left:
                return
            self._left = True
            for cleanup in reversed(self._cleanups):
                try:
                    cleanup()
                except OSError as error:
                    _log.error("cannot clean up: %s", error)


def _give_up(number: int, frame: object) -> NoReturn:
    """A signal during the start: what has been made is undone, above all the mount, which nobody would serve."""
    raise Interrupted(number)


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StubfsError(
            f"cannot use {path}: {reason(error)}", "give a directory of the real file system", error.errno or errno.EIO
        ) from error


def _listen(path: str) -> socket.socket:
    try:
        return wire.listen(path)
    except OSError as error:
        hint = {
            errno.EADDRINUSE: "another file system has it, or another file is there: choose another --socket-path",
            errno.ENAMETOOLONG: f"use a --socket-path of at most {wire.MAX_PATH} bytes",
            errno.ENOENT: "make its directory first",
        }
        raise UsageError(
            f"cannot listen on {path}: {reason(error)}", hint.get(error.errno or 0, ""), error.errno or errno.EIO
        ) from error
