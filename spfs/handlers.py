"""What each request to the manager means: put to the supervisor, the registry and the file systems, and answered.

Mounts and replaces are the supervisor's work, the socket and the manager's own end the controller's.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Type

from spfs import replies, requests
from spfs.connection import Answer, Connection
from spfs.counters import Counters
from spfs.description import describe, in_short, outcome
from spfs.errors import SpfsError
from spfs.eventloop import EventLoop
from spfs.events import Events
from spfs.jobs import Context, Outcome
from spfs.registry import Managed, Phase, State
from spfs.replies import Reply
from spfs.requests import Request
from spfs.supervisor import Supervisor
from stubfs import wire
from stubfs.errors import StubfsError

CONTROL_TIMEOUT = 5.0  # seconds for a file system to hand out its staging directory


class Handlers:
    """One method for each request. Each answers once, now or later; SpfsError raised in it becomes the answer.

    ``about``: what answers say of the manager itself; ``end``: end it.
    """

    def __init__(
        self,
        loop: EventLoop,
        supervisor: Supervisor,
        events: Events,
        counters: Counters,
        about: Callable[[], Dict[str, Any]],
        end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._supervisor = supervisor
        self._registry = supervisor.registry
        self._events = events
        self._counters = counters
        self._about = about
        self._end = end
        self._waiting: Set[Callable[[Reply], None]] = set()  # the ends of waits, also for changes
        self._by_request: Dict[Type[Any], Callable[[Any, Answer, Connection], None]] = {
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

    def handle(self, connection: Connection, request: Request, answer: Answer) -> None:
        self._by_request[type(request)](request, answer, connection)

    def end_waits(self, reply: Reply) -> None:
        """Answer ``reply`` to all who wait for something that is to come."""
        for finish in list(self._waiting):
            finish(reply)

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
            with FilesystemClient(control, timeout=CONTROL_TIMEOUT) as filesystem:
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
                f"cannot shut down: still mounted: {', '.join(there[:10])}{' …' * (len(there) > 10)}",
                "unmount takes them away first, force leaves them to a later manager on this work directory",
                errno.EBUSY,
            )

        def done(error: Optional[StubfsError], data: Dict[str, Any]) -> None:
            _answering(answer)(error, data)
            if error is None:
                self._end()

        if request.unmount:
            return self._unmount_all(request.force, done)
        done(None, {"mounts": there})


def _phase(managed: Managed) -> str:
    phase = managed.replacement.phase if managed.replacement is not None else Phase.DONE
    return phase.value


def _answering(answer: Answer) -> Callable[[Optional[StubfsError], Dict[str, Any]], None]:
    def done(error: Optional[StubfsError], data: Dict[str, Any]) -> None:
        if error is not None:
            return answer(replies.error_reply(error.message, error.hint, error.errno), ())
        answer(Reply(0, data), ())

    return done
