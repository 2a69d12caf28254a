"""The manager: its socket, what each request means, and when it ends. Mounts and replaces are the supervisor's work."""

from __future__ import annotations

import errno
import functools
import logging
import os
import resource
import signal
import socket
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Type

from spfs import __version__, replies, requests
from spfs.connection import Answer, Connection
from spfs.counters import Counters
from spfs.description import describe, in_short, outcome
from spfs.errors import SpfsError
from spfs.eventloop import EventLoop
from spfs.events import Events
from spfs.jobs import Context, Outcome
from spfs.linux.prctl import set_child_subreaper
from spfs.registry import Managed, Phase, State
from spfs.replies import Reply
from spfs.requests import Request
from spfs.state import WorkDirectory
from spfs.supervisor import Supervisor
from stubfs import wire
from stubfs.errors import StubfsError

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
        self._waiting: Set[Callable[[Reply], None]] = set()  # the ends of waits, also for changes
        self._loop = EventLoop()
        self._counters = Counters()
        self._events = Events(self._counters.count)
        self._supervisor = Supervisor(self._loop, work, log_dir, log_options, self._changed, self._events)
        self._registry = self._supervisor.registry
        self._handlers: Dict[Type[Any], Callable[[Any, Answer, Connection], None]] = {
            requests.Mount: self._mount,
            requests.Mode: self._mode,
            requests.Rules: self._rules,
            requests.Replace: self._replace,
            requests.Begin: self._begin,
            requests.Switch: self._switch,
            requests.Status: self._status,
            requests.Held: self._held,
            requests.Wait: self._wait,
            requests.Changes: self._changes,
            requests.Metrics: self._metrics,
            requests.Abort: self._abort,
            requests.Unmount: self._unmount,
            requests.Create: self._create,
            requests.Staging: self._staging,
            requests.Shutdown: self._shutdown,
        }

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
        self._handlers[type(request)](request, answer, connection)

    # Requests. Each answers once, now or later; SpfsError raised here becomes the answer.

    def _mount(self, request: requests.Mount, answer: Answer, connection: Connection) -> None:
        self._supervisor.mount(request, _answering(answer))

    def _mode(self, request: requests.Mode, answer: Answer, connection: Connection) -> None:
        self._supervisor.change_mode(self._mounted(request.id), request, _answering(answer))

    def _mounted(self, id: Optional[str]) -> List[Managed]:
        if id is not None:
            return [self._registry.get(id)]
        return [managed for managed in self._registry if managed.state is State.MOUNTED]

    def _rules(self, request: requests.Rules, answer: Answer, connection: Connection) -> None:
        chosen = self._mounted(request.id)
        if request.rules is not None:
            return self._supervisor.set_rules(chosen, request.rules, _answering(answer))
        found: List[Dict[str, Any]] = []
        silent: List[str] = []

        def add(managed: Managed, reply: Reply) -> None:
            if reply.status != 0:
                return silent.append(managed.id)
            found.append({"id": managed.id, "rules": reply.data["rules"]})

        self._ask_all(
            chosen, "rules", add, lambda: answer(Reply(0, {"mounts": found, "not_answering": silent}), ())
        )

    def _replace(self, request: requests.Replace, answer: Answer, connection: Connection) -> None:
        managed = self._supervisor.ask_replace(request)
        answer(Reply(0, {"id": managed.id, "replace": _phase(managed)}), ())

    def _begin(self, request: requests.Begin, answer: Answer, connection: Connection) -> None:
        chosen = self._supervisor.begin(request.id, request.mode)
        answer(Reply(0, {"mounts": [managed.id for managed in chosen]}), ())

    def _switch(self, request: requests.Switch, answer: Answer, connection: Connection) -> None:
        self._supervisor.switch(request, _answering(answer))

    def _abort(self, request: requests.Abort, answer: Answer, connection: Connection) -> None:
        self._supervisor.abort(request.id, _answering(answer))

    def _unmount(self, request: requests.Unmount, answer: Answer, connection: Connection) -> None:
        if request.id is not None:
            return self._supervisor.unmount(self._registry.get(request.id), request.force, _answering(answer))
        self._unmount_all(request.force, _answering(answer))

    def _unmount_all(self, force: bool, done: Callable[[Optional[StubfsError], Dict[str, Any]], None]) -> None:
        chosen = list(self._registry)
        waiting = {managed.number for managed in chosen}
        errors: List[StubfsError] = []

        def one_done(number: int, error: Optional[StubfsError], data: Dict[str, Any]) -> None:
            waiting.discard(number)
            if error is not None:
                errors.append(error)
            if not waiting:
                done(errors[0] if errors else None, {"mounts": [managed.id for managed in chosen]})

        for managed in chosen:
            try:
                self._supervisor.unmount(managed, force, functools.partial(one_done, managed.number))
            except SpfsError as error:
                self._loop.soon(functools.partial(one_done, managed.number, error, {}))
        if not chosen:
            done(None, {"mounts": []})

    def _status(self, request: requests.Status, answer: Answer, connection: Connection) -> None:
        if request.id is not None:
            latest = self._registry.last(request.id)
            chosen = [latest] if latest.live else []
        else:
            chosen = list(self._registry)
        rows = {managed.number: describe(managed) for managed in chosen}
        for managed in chosen:
            rows[managed.number]["busy"] = self._supervisor.busy_with(managed)

        def finish() -> None:
            gone = [managed for managed in self._registry.finished if request.id in (None, managed.id)]
            finished = [describe(managed) for managed in reversed(gone)]  # the latest first
            answer(Reply(0, {**self._about(), "mounts": list(rows.values()), "finished": finished}), ())

        def add(managed: Managed, reply: Reply) -> None:
            row = rows[managed.number]
            row["answering"] = reply.status == 0
            if reply.status == 0:
                # It may have been changed by the file system's own socket.
                row["mode"] = reply.data["mode"]
                self._supervisor.mode_seen(managed, row["mode"])
            row.update({key: reply.data[key] for key in ("held", "handles", "nodes") if key in reply.data})

        self._ask_all(chosen, "status", add, finish)

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

    def _held(self, request: requests.Held, answer: Answer, connection: Connection) -> None:
        chosen = self._registry.select(request.id)
        held: List[Dict[str, Any]] = []
        silent: List[str] = []

        def add(managed: Managed, reply: Reply) -> None:
            if reply.status != 0:
                return silent.append(managed.id)
            held.extend({"id": managed.id, **entry} for entry in reply.data.get("held", []))

        self._ask_all(
            chosen, "held", add, lambda: answer(Reply(0, {"held": held, "not_answering": silent}), ())
        )

    def _ask_all(
        self,
        chosen: Sequence[Managed],
        command: str,
        add: Callable[[Managed, Reply], None],
        finish: Callable[[], None],
    ) -> None:
        """Put a question to every file system at once; one that does not answer costs a bounded time."""
        waiting = {managed.number for managed in chosen if managed.state is State.MOUNTED}
        if not waiting:
            return finish()

        def one_done(managed: Managed, reply: Reply, fds: wire.Descriptors) -> None:
            add(managed, reply)
            waiting.discard(managed.number)
            if not waiting:
                finish()

        for managed in chosen:
            if managed.number in waiting:
                self._supervisor.ask(managed, {"command": command}, functools.partial(one_done, managed))

    def _staging(self, request: requests.Staging, answer: Answer, connection: Connection) -> None:
        managed = self._registry.usable(request.id)

        def done(reply: Reply, fds: wire.Descriptors) -> None:
            if reply.status == 0 and len(fds) != 1:
                reply = replies.error_reply("cannot get the staging directory: it was not sent", "", errno.EPROTO)
            if reply.status != 0:
                return answer(reply, ())
            fd = fds.steal(0)
            try:
                answer(Reply(0, {"id": managed.id}), [fd])
            finally:
                os.close(fd)

        self._supervisor.ask(managed, {"command": "staging"}, done)

    def _create(self, request: requests.Create, answer: Answer, connection: Connection) -> None:
        managed = self._registry.usable(request.id)
        control = managed.control

        def work(context: Context) -> None:
            from spfs import restore
            from stubfs.client import FilesystemClient

            specs = [restore.FileSpec.from_json(item) for item in request.files]
            with FilesystemClient(control, timeout=DRAIN) as filesystem:
                directory = filesystem.staging()
            restore.create_files(directory, specs)
            context.deliver({"created": len(specs)})

        def ended(outcome: Outcome) -> None:
            _answering(answer)(outcome.error, outcome.value)

        self._supervisor.start_job("creation of files", work, ended)

    def _wait(self, request: requests.Wait, answer: Answer, connection: Connection) -> None:
        managed = self._registry.last(request.id)

        def finish(reply: Reply) -> None:
            stop()
            answer(reply, ())

        def stop() -> None:
            self._waiting.discard(finish)
            forget()
            if timer is not None:
                timer.cancel()

        def check() -> None:
            if not self._supervisor.busy_with(managed):
                finish(outcome(managed))

        def expired() -> None:
            stage = managed.replacement.stage if managed.replacement is not None else ""
            late = f"cannot wait longer for mount {managed.id!r}: not done in {request.timeout} s"
            hint = f"it goes on, at stage {stage}" if stage else "it goes on"
            finish(replies.error_reply(late, hint, errno.ETIMEDOUT))

        if not self._supervisor.busy_with(managed):
            return answer(outcome(managed), ())
        forget = self._supervisor.add_waiter(managed, check)
        timer = self._loop.later(request.timeout, expired) if request.timeout is not None else None
        connection.on_gone = stop
        self._waiting.add(finish)

    def _changes(self, request: requests.Changes, answer: Answer, connection: Connection) -> None:
        def finish(reply: Optional[Reply] = None) -> None:
            stop()
            answer(reply or Reply(0, {"changes": self._events.number}), ())

        def stop() -> None:
            self._waiting.discard(finish)
            forget()
            if timer is not None:
                timer.cancel()

        if self._events.number != request.since:
            return answer(Reply(0, {"changes": self._events.number}), ())
        forget = self._events.once(finish)
        timer = self._loop.later(request.timeout, finish) if request.timeout is not None else None
        connection.on_gone = stop
        self._waiting.add(finish)

    def _metrics(self, request: requests.Metrics, answer: Answer, connection: Connection) -> None:
        chosen = list(self._registry)
        held: Dict[int, int] = {}

        def add(managed: Managed, reply: Reply) -> None:
            if reply.status == 0:
                held[managed.number] = reply.data["held"]

        def finish() -> None:
            mounts = [in_short(managed, held.get(managed.number)) for managed in chosen]
            answer(Reply(0, {**self._about(), "mounts": mounts, "counters": self._counters.data()}), ())

        self._ask_all(chosen, "status", add, finish)

    def _shutdown(self, request: requests.Shutdown, answer: Answer, connection: Connection) -> None:
        there = [managed.id for managed in self._registry]
        if there and not request.unmount and not request.force:
            raise SpfsError(
                f"cannot shut down: {len(there)} mounts are there: {', '.join(there[:10])}",
                "unmount: take them away first; force: leave them to a later manager on this work directory",
                errno.EBUSY,
            )

        def done(error: Optional[StubfsError], data: Dict[str, Any]) -> None:
            _answering(answer)(error, data)
            if error is None:
                self._end()

        if request.unmount:
            return self._unmount_all(request.force, done)
        done(None, {"mounts": there})

    # The end

    def _told_to_end(self, number: int) -> None:
        log.info("%s: ending", signal.Signals(number).name)
        self._end()

    def _end(self) -> None:
        if self._ending:
            return
        self._ending = True
        self._close_listener()
        for finish in list(self._waiting):
            hint = "wait again at the next manager on this work directory"
            finish(replies.error_reply("cannot wait longer: the manager is ending", hint, errno.ESHUTDOWN))
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


def _phase(managed: Managed) -> str:
    phase = managed.replacement.phase if managed.replacement is not None else Phase.DONE
    return phase.value


def _answering(answer: Answer) -> Callable[[Optional[StubfsError], Dict[str, Any]], None]:
    def done(error: Optional[StubfsError], data: Dict[str, Any]) -> None:
        if error is not None:
            return answer(replies.error_reply(error.message, error.hint, error.errno), ())
        answer(Reply(0, data), ())

    return done


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
