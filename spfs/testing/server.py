"""Mounts for tests: ``MountServer`` makes any number of them, cheaply; ``delayed_mount`` is for just one.

A fork server (``spfs.testing.forkserver``), started with the first mount, forks the file systems. Whatever becomes of
this process, it and they end with it, and nothing stays mounted.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Iterator, List, Optional, Type, Union

from spfs.testing import places
from spfs.testing.delayed import DEFAULT_OWN_LIMIT, DelayedMount
from stubfs import interpreter, messages, wire
from stubfs.errors import StubfsError, from_data, reason

_START_LIMIT = 60.0  # seconds for a mount; it takes a tenth of one on an idle machine
_END_LIMIT = 20.0  # seconds for the fork server to end: longer than it waits for file systems

PathLike = Union[str, "os.PathLike[str]"]


class MountServer:
    """Makes delayed mounts, which end with it; a context manager. One process, which costs nothing until it is used.

    A process forked while it is open may use the mounts, but not the server.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._sock: Optional[socket.socket] = None
        self._pid = 0
        self._pidfd = -1
        self._log = -1
        self._directory = ""
        self._count = 0
        self._mounts: List[DelayedMount] = []

    def __enter__(self) -> "MountServer":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def mount(
        self, directory: Optional[PathLike] = None, *, path: Optional[PathLike] = None,
        own_limit: Optional[float] = DEFAULT_OWN_LIMIT, allow_other: Optional[bool] = None,
    ) -> DelayedMount:  # fmt: skip
        """A new mount, ready on return; on ``path``, an existing directory, or on one made for it.

        It serves ``directory`` from the start, or, without one, files that are created on it. ``own_limit``: see
        DelayedMount. ``allow_other`` (default: as root): whether other users may use it. MissingFeatureError says
        what this machine lacks; StubfsError for anything else that is in the way.
        """
        if self._sock is None:
            self._start()
        place = os.path.join(self._directory, str(self._count))
        self._count += 1
        os.mkdir(place)
        os.chmod(place, 0o711)
        try:
            mountpoint = os.path.abspath(path) if path is not None else os.path.join(place, "mnt")
            if path is None:
                os.mkdir(mountpoint)
            socket_path = os.path.join(place, "sock")
            log = os.memfd_create("stubfs-log")
            try:
                pidfd = self._fork(mountpoint, socket_path, place, log, allow_other)
            except BaseException:
                os.close(log)
                raise
        except BaseException:
            places.clear(place)
            raise
        mount = DelayedMount(mountpoint, socket_path, place, pidfd, log, own_limit)
        self._mounts.append(mount)
        try:
            if directory is not None:
                mount.proxy(directory)
        except BaseException:
            mount.close()
            raise
        return mount

    def mounts(self) -> List[DelayedMount]:
        """Those that are not closed."""
        self._mounts = [mount for mount in self._mounts if not mount.closed]
        return list(self._mounts)

    def close(self) -> None:
        """End all mounts and the server. Whoever waits gets EIO. StubfsError if something cannot be taken away.

        Only in the process that has made it; in others nothing happens.
        """
        if os.getpid() != self._owner:
            return
        failures: List[StubfsError] = []
        for mount in reversed(self.mounts()):
            try:
                mount.close()
            except StubfsError as error:
                failures.append(error)
        if self._sock is not None:
            self._stop()
        if failures:
            raise failures[0]

    # -- the fork server

    def _start(self) -> None:
        self._directory = places.make()
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = os.memfd_create("forkserver-log")
        with its:
            # Not the socket's end, but ours, ends it: a process that we fork has copies of the socket.
            owner = os.pidfd_open(os.getpid())
            try:
                for fd in (its.fileno(), owner):
                    os.set_inheritable(fd, True)
                command = interpreter.command(
                    "spfs.testing.forkserver", str(its.fileno()), str(owner), self._directory
                )
                self._pid = os.posix_spawn(
                    command[0],
                    command,
                    # Without root, staging files are in a temporary directory: where we can remove it.
                    {**os.environ, "TMPDIR": self._directory},
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, log, 1),
                        (os.POSIX_SPAWN_DUP2, log, 2),
                    ],
                    setsid=True,  # Ctrl-C is for the tests, which have mounts to close
                    setsigmask=[],
                    setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD],
                )
            except BaseException:
                ours.close()
                os.close(log)
                places.remove(self._directory)
                raise
            finally:
                os.close(owner)
        self._pidfd = os.pidfd_open(self._pid)
        self._log = log
        self._sock = ours

    def _stop(self) -> None:
        assert self._sock is not None
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended
        self._sock.close()
        self._sock = None
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(_END_LIMIT * 1000):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        os.close(self._log)
        if os.path.isdir(self._directory):
            try:
                places.remove(self._directory)
            except OSError as error:
                raise StubfsError(
                    f"cannot remove {self._directory}: {reason(error)}", places.IN_THE_WAY, error.errno or errno.EIO
                ) from error

    def _fork(
        self, mountpoint: str, socket_path: str, source: str, log: int, allow_other: Optional[bool]
    ) -> int:
        """Have a file system forked; a pidfd of it, the caller's."""
        assert self._sock is not None
        request = {"mountpoint": mountpoint, "socket": socket_path, "source": source, "allow_other": allow_other}
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, its:
            ours.settimeout(_START_LIMIT)
            try:
                wire.send(self._sock, messages.encode(request), [its.fileno(), log])
                its.close()
                packet = wire.receive(ours, messages.STATUS.size)
            except OSError as error:
                raise self._no_answer(mountpoint, reason(error) or "timed out", log) from error
            if packet is None:
                raise self._no_answer(mountpoint, "it ended without a word", log)
            prefix, payload, _ = packet
            answer = messages.decode(payload)
            (status,) = messages.STATUS.unpack(prefix)
            if status:
                raise from_data(answer)
            return os.pidfd_open(answer["pid"])

    def _no_answer(self, mountpoint: str, why: str, log: int) -> StubfsError:
        said = (read_all(self._log) + read_all(log)).strip().splitlines()
        tail = f": {said[-1]}" if said else ""
        return StubfsError(f"cannot start a file system on {mountpoint}: {why}{tail}", "", errno.EIO)


def read_all(fd: int) -> str:
    """What is in a memfd, whose offset is the writer's."""
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")


@contextmanager
def delayed_mount(directory: Optional[PathLike] = None, **settings: Any) -> Iterator[DelayedMount]:
    """One mount, for as long as the context lasts; arguments as of MountServer.mount()."""
    with MountServer() as server:
        yield server.mount(directory, **settings)
