"""What the control socket's commands do: a request's keys checked, the session asked, the answer put together.

Bad input raises UsageError and changes nothing.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from stubfs import messages, wire
from stubfs.callers import Processes
from stubfs.carry import Carrying
from stubfs.covered import Covered
from stubfs.errors import StubfsError, UsageError, reason
from stubfs.messages import FilesystemStatus, Handle, HeldRequest, Reply
from stubfs.modes import Mode, StubOptions, check_directory
from stubfs.protocol import opcode_name
from stubfs.rules import Matcher, RequestFilter, Rule, seconds_number
from stubfs.session import Session

_MAX_NODES = 1_000_000  # asked for at once
_MAX_RULES = 1_000
_FILTER_KEYS = ("operations", "path", "pids")
_STUB_KEYS = ("timeout", "errno", "exempt")


class Call(NamedTuple):
    """One request of a client, whose socket it is; the descriptors are closed after the call unless stolen."""

    request: Dict[str, Any]
    descriptors: wire.Descriptors
    client: socket.socket


Command = Callable[[Call], Reply]
"""Raises StubfsError, or OSError, for the errno to answer with."""


def _path(path: Optional[bytes]) -> Optional[str]:
    return None if path is None else os.fsdecode(path)


class Commands:
    """``leave`` undoes the mount; it is called for quit, before the reply."""

    def __init__(
        self, session: Session, mountpoint: str, own_device: Optional[int], leave: Callable[[], None]
    ) -> None:
        self._session = session
        self._mountpoint = mountpoint
        self._own_device = own_device
        self._leave = leave
        self.by_name: Mapping[str, Command] = {
            "status": self._status,
            "mode": self._mode,
            "rules": self._rules,
            "cover": self._cover,
            "held": self._held,
            "wait_held": self._wait_held,
            "handles": self._handles,
            "nodes": self._nodes,
            "remains": self._remains,
            "staging": self._staging,
            "quit": self._quit,
        }

    def _status(self, call: Call) -> Reply:
        session = self._session
        state = session.state
        status = FilesystemStatus(
            mode=state.mode.value,
            since=state.since,
            generation=session.switch.generation,
            held=len(session.held),
            handles=len(session.handles),
            nodes=len(session.nodes),
            pid=os.getpid(),
            mountpoint=self._mountpoint,
            staged=session.switch.generation == session.staging.number,
        )
        return messages.as_dict(status), ()

    def _mode(self, call: Call) -> Reply:
        try:
            mode = Mode(call.request.get("mode"))
        except ValueError:
            raise UsageError(
                f"cannot change the mode: {str(call.request.get('mode'))[:100]}: no such mode",
                "restore, stub or proxy",
            ) from None
        given = [key for key in _STUB_KEYS if call.request.get(key) is not None]
        if given and mode is not Mode.STUB:
            raise UsageError(f"cannot change the mode: {mode.value}: {given[0]}: only for stub")
        missing = call.request.get("missing")
        if missing is not None and (missing not in ("leave", "carry") or mode is not Mode.PROXY):
            raise UsageError(f"cannot change the mode: missing: {str(missing)[:50]}", "leave or carry, with proxy")
        options = StubOptions.checked(*(call.request.get(key) for key in _STUB_KEYS))
        directory: Optional[int] = None
        if mode is Mode.PROXY:
            if len(call.descriptors) != 1:
                raise UsageError(
                    "cannot change the mode: proxy: one directory fd is needed", "send it with the request"
                )
            directory = call.descriptors.steal(0)
        try:
            if directory is not None:
                check_directory(directory, self._own_device)
        except OSError as error:
            os.close(directory)  # type: ignore[arg-type]
            raise StubfsError(
                f"cannot change the mode: proxy: {reason(error)}", "give a directory of the real file system",
                error.errno or errno.EINVAL,
            ) from error  # fmt: skip
        if directory is not None and missing == "carry":
            self._change_carrying(directory)
        else:
            self._session.switch.change(mode, directory, options)
        return self._status(call)

    def _change_carrying(self, directory: int) -> None:
        """To proxy, with what restore mode has and the real side lacks; on an error everything is as before."""
        switch, before = self._session.switch, self._session.state
        try:
            if switch.generation != self._session.staging.number:
                raise UsageError(
                    "cannot change the mode: proxy: missing=carry: restore mode was left for another directory already",
                    "leave it out",
                )
            if before.mode is Mode.RESTORE:
                switch.change(Mode.STUB)  # nothing more comes to it, and what is dirty has been written
            carrying = Carrying(self._session.staging.fd, directory)
            try:
                carrying.run()
            except OSError as error:
                if before.mode is Mode.RESTORE:
                    switch.change(Mode.RESTORE)
                raise StubfsError(
                    f"cannot change the mode: proxy: missing=carry: {error.filename}: {reason(error)}",
                    "the real directory is as it was; mend it there, or leave these files",
                    error.errno or errno.EIO,
                ) from error
        except BaseException:
            os.close(directory)
            raise
        switch.change(Mode.PROXY, directory)

    def _rules(self, call: Call) -> Reply:
        rules = call.request.get("rules")
        if rules is not None:
            if not isinstance(rules, list) or len(rules) > _MAX_RULES:
                raise UsageError(f"cannot set the rules: a list of at most {_MAX_RULES} is needed")
            self._session.switch.set_rules([Rule.from_json(item) for item in rules])
        return {"rules": [rule.as_json() for rule in self._session.switch.rules]}, ()

    def _cover(self, call: Call) -> Reply:
        paths, device = call.request.get("paths"), call.request.get("device")
        if not isinstance(paths, list) or len(paths) > _MAX_RULES or not all(type(path) is str for path in paths):
            raise UsageError(f"cannot cover mountpoints: paths: a list of at most {_MAX_RULES} is needed")
        if type(device) is not int or device < 0:
            raise UsageError("cannot cover mountpoints: device: a number is needed")
        self._session.switch.cover(Covered({os.fsencode(path) for path in paths}, device) if paths else None)
        return {}, ()

    def _held(self, call: Call) -> Reply:
        matcher, paths_of = _matcher(call.request), self._session.paths_of
        self._session.end_orphaned_reads()
        processes = Processes()
        listed: List[Dict[str, Any]] = []
        for held, age, path, name in self._session.held_requests():
            if not matcher.matches_all and not matcher.matches(held, paths_of):
                continue
            pid, command = processes.of(held.tid)
            listed.append(
                messages.as_dict(
                    HeldRequest(
                        held.unique, opcode_name(held.opcode), held.node, _path(path), _path(name),
                        held.tid, pid, held.uid, held.gid, age, command,
                    )  # fmt: skip
                )
            )
        return {"held": listed}, ()

    def _wait_held(self, call: Call) -> Reply:
        """Answered when so many are held at the same time; ETIMEDOUT says how many there were at the end."""
        count, timeout = call.request.get("count", 1), call.request.get("timeout")
        if type(count) is not int or count < 1:
            raise UsageError("cannot wait for held requests: count: give a number of requests, at least 1")
        try:
            limit = None if timeout is None else seconds_number(timeout)
        except ValueError as error:
            raise UsageError(f"cannot wait for held requests: timeout: {error}") from error
        self._session.end_orphaned_reads()
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        held = self._session.held
        try:
            watch = held.watch(_matcher(call.request), count, lambda: _wake(write))
            try:
                _wait(read, call.client, limit)
            finally:
                held.unwatch(watch)  # before the pipe is closed that it writes to
        finally:
            os.close(read)
            os.close(write)
        found = len(watch.found)
        if watch.enough:
            return {"held": max(found, count)}, ()
        if held.has_ended():
            raise StubfsError("cannot wait for held requests: the file system ends", "", errno.ESHUTDOWN)
        raise StubfsError(
            f"cannot wait longer for {count} held requests: {found} after {limit:g} s" if limit is not None
            else "cannot wait for held requests: the client is gone", "see held", errno.ETIMEDOUT,
        )  # fmt: skip

    def _handles(self, call: Call) -> Reply:
        listed = [
            messages.as_dict(
                Handle(
                    file.fh, file.node, _path(path), "directory" if file.is_directory else "file", file.flags,
                    file.generation, file.tid,
                )  # fmt: skip
            )
            for file, path in self._session.handles.snapshot()
        ]
        return {"handles": listed}, ()

    def _nodes(self, call: Call) -> Reply:
        paths = self._session.nodes.path
        return {"nodes": [[number, _path(paths(number))] for number in _numbers(call)]}, ()

    def _remains(self, call: Call) -> Reply:
        """Of nodes that have no name: which of them are still there and whether they are in the staging directory, and
        as many O_PATH descriptors. Only the first nodes, as many as fit into a packet; "asked" tells how many."""
        numbers = _numbers(call)[: wire.MAX_FDS - 2]
        fds: List[int] = []
        listed: List[Tuple[int, bool]] = []
        for number in numbers:
            found = self._session.remains(number)
            if found is not None:
                fds.append(found.fd)
                listed.append((number, found.generation == self._session.staging.number))
        return {"remains": listed, "asked": len(numbers)}, tuple(fds)

    def _staging(self, call: Call) -> Reply:
        return {}, (self._session.staging.directory(),)

    def _quit(self, call: Call) -> Reply:
        self._leave()
        return {}, ()


def _numbers(call: Call) -> List[int]:
    numbers = call.request.get("nodes")
    if (
        not isinstance(numbers, list)
        or len(numbers) > _MAX_NODES
        or not all(type(number) is int for number in numbers)
    ):
        raise UsageError("cannot name nodes: nodes: a list of numbers is needed")
    return numbers


def _matcher(request: Mapping[str, Any]) -> Matcher:
    given = {key: request[key] for key in _FILTER_KEYS if request.get(key) is not None}
    return Matcher(RequestFilter.from_json(given))


def _wake(fd: int) -> None:
    try:
        os.write(fd, b"\0")
    except BlockingIOError:
        pass  # it is awake


def _wait(fd: int, client: socket.socket, limit: Optional[float]) -> None:
    """Until ``fd`` can be read, the client has hung up, or ``limit`` seconds are over."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(client, 0)  # a hang-up is always told; who only sends no more still waits for the answer
    deadline = None if limit is None else time.monotonic() + limit
    while True:
        # poll(2) takes an int of milliseconds.
        remaining = 86400.0 if deadline is None else min(86400.0, max(0.0, deadline - time.monotonic()))
        if poll.poll(remaining * 1000) or (deadline is not None and time.monotonic() >= deadline):
            return
