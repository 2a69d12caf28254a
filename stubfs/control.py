"""The control socket: requests in, commands called, replies out. A thread per connected client.

Only root and the file system's own user may speak. A bad request changes nothing and is answered with an errno and
a message that says what, on what and why.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from stubfs import messages, wire
from stubfs.commands import Call, Command
from stubfs.errors import StubfsError, UsageError, reason

_log = logging.getLogger(__name__)


class Control:
    """Serves the listening ``sock``, which stays the caller's. ``end`` is called after the reply to a quit."""

    def __init__(self, sock: socket.socket, commands: Mapping[str, Command], end: Callable[[], None]) -> None:
        self.socket = sock
        self._commands = commands
        self._end = end
        self._accepting = True
        self._unanswered = 0
        self._answered = threading.Condition()

    def accept(self) -> bool:
        """Take one client that waits; never blocks for long. False: out of descriptors or threads, try again later."""
        try:
            client, _ = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ECONNABORTED):
                return True
            return self._cannot_accept(error)
        client.setblocking(True)
        try:
            threading.Thread(target=self._serve, args=(client,), name="control", daemon=True).start()
        except RuntimeError as error:
            client.close()
            return self._cannot_accept(error)
        self._accepting = True
        return True

    def settle(self, seconds: float) -> None:
        """Wait until all that was asked has been answered, but no longer than that: a command may hang in the real
        file system. To be called before the process, and its threads, end."""
        with self._answered:
            self._answered.wait_for(lambda: not self._unanswered, seconds)

    def _cannot_accept(self, error: Exception) -> bool:
        if self._accepting:  # said once, not at every attempt
            _log.error("cannot accept a control client: %s", reason(error))
        self._accepting = False
        return False

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                is_owner = wire.peer_uid(client) in (0, os.geteuid())
                while True:
                    try:
                        packet = wire.receive(client)
                    except OSError as error:
                        if error.errno not in (errno.EPROTO, errno.EMSGSIZE):
                            raise
                        what = f"cannot read the request: {reason(error)}"
                        self._reply(client, -error.errno, {"message": what, "hint": ""})
                        continue
                    if packet is None:
                        return
                    _, payload, descriptors = packet
                    with descriptors:
                        if not is_owner:
                            message = "cannot serve this user: not the owner"
                            self._reply(client, -errno.EPERM, {"message": message, "hint": "become root"})
                            return
                        with self._answered:
                            self._unanswered += 1
                        try:
                            after = self._answer(client, payload, descriptors)
                        finally:
                            with self._answered:
                                self._unanswered -= 1
                                self._answered.notify_all()
                    if after is not None:
                        after()
            except OSError as error:
                _log.debug("control client is gone: %s", error)

    def _answer(
        self, client: socket.socket, payload: bytes, descriptors: wire.Descriptors
    ) -> Optional[Callable[[], None]]:
        fds: Tuple[int, ...] = ()
        after = None
        try:
            request = messages.decode(payload)
            command = request.get("command")
            handler = self._commands.get(command) if isinstance(command, str) else None
            if handler is None:
                raise UsageError(
                    f"cannot read the request: unknown command: {str(command)[:100]}",
                    f"one of: {', '.join(self._commands)}",
                    errno.EINVAL,
                )
            answer, fds = handler(Call(request, descriptors, client))
            status = 0
            if command == "quit":
                after = self._end
        except StubfsError as error:
            status, answer = -error.errno, {"message": error.message, "hint": error.hint}
        except ValueError as error:
            status, answer = -errno.EINVAL, {"message": f"cannot read the request: {error}", "hint": ""}
        except OSError as error:
            status, answer = -(error.errno or errno.EIO), {"message": reason(error), "hint": ""}
        except Exception as error:
            _log.exception("cannot serve a control request")
            status, answer = -errno.EIO, {"message": f"internal error: {error!r}", "hint": "see the log"}
        try:
            self._reply(client, status, answer, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return after

    @staticmethod
    def _reply(client: socket.socket, status: int, answer: Dict[str, Any], fds: Tuple[int, ...] = ()) -> None:
        wire.send(client, messages.encode(answer), fds, prefix=messages.STATUS.pack(status))
