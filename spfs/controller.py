"""The manager: its socket, its clients, and when it ends. What requests mean is the handlers' business."""

from __future__ import annotations

import errno
import functools
import logging
import os
import resource
import signal
import socket
import time
from typing import Any, Dict, Optional, Sequence, Set

from spfs import __version__, replies
from spfs.connection import Answer, Connection
from spfs.counters import Counters
from spfs.eventloop import EventLoop
from spfs.events import Events
from spfs.handlers import Handlers
from spfs.linux.prctl import set_child_subreaper
from spfs.requests import Request
from spfs.state import WorkDirectory
from spfs.supervisor import Supervisor
from stubfs import wire

log = logging.getLogger(__name__)

ACCEPT_PAUSE = 0.1  # seconds without accepting when descriptors ran out
PRELOAD_AFTER = 1.0  # seconds: whoever starts a manager has a first request, which must not wait for this
UNUSED_AFTER = 30.0  # seconds without mount and client, after which --exit-with-spfs ends one that was never used
LINGER = 1.0  # seconds from the end of the last mount to ours, with --exit-with-spfs
LOGGED = 1000  # characters of a request; one to create files may have millions
DRAIN = 5.0  # seconds for clients to take their last answers


class Controller:
    """One manager on a locked work directory and a listening socket, both of which are its own from now on."""

    def __init__(
        self,
        work: WorkDirectory,
        listener: socket.socket,
        socket_path: str,
        log_dir: Optional[str] = None,
        log_options: Sequence[str] = (),
        exit_with_spfs: bool = False,
    ) -> None:
        self._work = work
        self._listener = listener
        self._socket_path = socket_path
        self._socket_made = os.stat(socket_path)
        self._exit_with_spfs = exit_with_spfs
        self._started = time.time()
        self._ending = False
        self._accepting = True
        # The rest is for mounts and jobs: what is done for one client must not fail for want of what others hold.
        self._most_clients = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._last_seen = time.monotonic()
        self._unused_since: Optional[float] = None  # as far as --exit-with-spfs is concerned
        self._connections: Set[Connection] = set()
        self._loop = EventLoop()
        self._counters = Counters()
        self._events = Events(self._counters.count)
        self._supervisor = Supervisor(self._loop, work, log_dir, log_options, self._changed, self._events)
        self._registry = self._supervisor.registry
        self._handlers = Handlers(
            self._loop, self._supervisor, self._events, self._counters, self._about, self._end
        )

    def run(self) -> None:
        """Serve until told to end. Mounts that are there then stay, with all that a later manager needs."""
        set_child_subreaper()  # the file systems are children of jobs that end long before them
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.on_signal(number, functools.partial(self._told_to_end, number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._listener.setblocking(False)
        self._supervisor.take_over()
        self._loop.watch(self._listener.fileno(), self._accept)
        self._loop.later(PRELOAD_AFTER, _preload)
        log.info("listening on %s, pid %d", self._socket_path, os.getpid())
        try:
            self._loop.run()
        finally:
            for connection in list(self._connections):
                connection.close()
            self._close_listener()
            left = self._supervisor.close()
            self._loop.close()
            self._work.close(remove=not left)
        log.info("ended; mounts left: %s", left)

    # Clients

    def _accept(self) -> None:
        if len(self._connections) >= self._most_clients:
            log.warning("no more clients for now: there are %d (raise the limit on open files)", self._most_clients)
            self._loop.unwatch(self._listener.fileno())  # they wait until one of those leaves
            return
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if self._accepting:  # said once, not at every attempt
                log.error("cannot accept a client: %s", error)
            self._accepting = False
            # Level-triggered: without a pause we would spin until a descriptor is free again.
            self._loop.unwatch(self._listener.fileno())
            self._loop.later(ACCEPT_PAUSE, self._accept_again)
            return
        self._accepting = True
        uid = wire.peer_uid(sock)
        if uid not in (0, os.geteuid()):
            log.warning("refused a client of uid %d", uid)
            with sock:
                refusal = replies.error_reply("cannot serve you: only root and the owner", "", errno.EPERM)
                sock.setblocking(False)
                try:
                    wire.send(
                        sock, replies.encode_data(refusal.data), prefix=replies.encode_status(refusal.status)
                    )
                except OSError:
                    pass
            return
        self._connections.add(Connection(self._loop, sock, self._handle, self._connection_closed))

    def _accept_again(self) -> None:
        if not self._ending:
            self._loop.watch(self._listener.fileno(), self._accept)

    def _connection_closed(self, connection: Connection) -> None:
        if len(self._connections) == self._most_clients:
            self._accept_again()
        self._connections.discard(connection)
        self._last_seen = time.monotonic()
        if self._exit_with_spfs and not self._connections and not len(self._registry):
            self._loop.later(UNUSED_AFTER, self._end_unused)
        self._changed()

    def _end_unused(self) -> None:
        """A restorer that failed before its first mount must not leave us behind."""
        unused = not self._connections and not len(self._registry) and not self._supervisor.busy
        if unused and time.monotonic() - self._last_seen >= UNUSED_AFTER:
            log.info("no mount and no client for %s s", UNUSED_AFTER)
            self._end()

    def _handle(self, connection: Connection, request: Request, answer: Answer) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("request: %.*s", LOGGED, _without_options(request))
        self._handlers.handle(connection, request, answer)

    def _about(self) -> Dict[str, Any]:
        return {
            "manager": {
                "pid": os.getpid(),
                "version": __version__,
                "socket": self._socket_path,
                "work_dir": self._work.path,
                "started": self._started,
                "clients": len(self._connections),
            },
            "changes": self._events.number,
        }

    # The end

    def _told_to_end(self, number: int) -> None:
        log.info("%s: ending", signal.Signals(number).name)
        self._end()

    def _end(self) -> None:
        if self._ending:
            return
        self._ending = True
        self._close_listener()
        hint = "wait again at the next manager on this work directory"
        self._handlers.end_waits(
            replies.error_reply("cannot wait longer: the manager is ending", hint, errno.ESHUTDOWN)
        )
        self._supervisor.stop()
        self._loop.later(DRAIN, self._stop_waiting_for_clients)
        self._loop.soon(self._changed)

    def _close_listener(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.unwatch(self._listener.fileno())
            # First the name, so that nobody can connect to what will never be accepted.
            wire.remove(self._socket_path, self._socket_made)
            self._listener.close()

    def _stop_waiting_for_clients(self) -> None:
        for connection in list(self._connections):
            connection.close()

    def _changed(self) -> None:
        """Something ended. Is it time to end, too?"""
        registry = self._registry
        unused = registry.ever_mounted and not len(registry) and not self._supervisor.busy
        if not unused:
            self._unused_since = None
        elif self._exit_with_spfs and not self._ending:
            now = time.monotonic()
            if self._unused_since is None:
                self._unused_since = now
                self._loop.later(LINGER, self._changed)
            # Somebody may be about to ask what became of the last mount.
            if now - self._unused_since >= LINGER:
                log.info("the last mount is gone")
                self._end()
        if self._ending and not self._supervisor.busy:
            for connection in list(self._connections):
                if connection.idle:
                    connection.close()
            if not self._connections:
                self._loop.stop()


def _without_options(request: Request) -> str:
    """For the log: options may hold passwords."""
    options: str = getattr(request, "options", "")
    return str(request).replace(repr(options), "'...'") if options else str(request)


def _preload() -> None:
    """What can wait until the first request has been served: imports for later jobs, warnings about the machine."""
    import spfs.filesystem  # noqa: F401
    import spfs.mounts  # noqa: F401
    import spfs.replace  # noqa: F401
    import stubfs.client  # noqa: F401
    from spfs import features, fsprocess

    fsprocess.preload()
    for warning in features.warnings():
        log.warning("%s", warning)
