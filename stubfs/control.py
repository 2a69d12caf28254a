"""The control socket: requests in, session methods called, replies out. A thread per connected client.

Only root and the file system's own user may speak. A bad request changes nothing and is answered with an errno and
a message that says what, on what and why.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple

from stubfs import messages, wire
from stubfs.errors import StubfsError, UsageError, reason
from stubfs.messages import FilesystemStatus, Handle, HeldRequest, Reply
from stubfs.modes import Mode, check_directory
from stubfs.protocol import opcode_name
from stubfs.session import Session

_log = logging.getLogger(__name__)
_MAX_NODES = 1_000_000  # asked for at once


def _path(path: Optional[bytes]) -> Optional[str]:
    return None if path is None else os.fsdecode(path)


class Control:
    """Serves the listening ``sock``, which stays the caller's.

    For quit, ``leave`` is called before the reply (it undoes the mount), ``end`` after it (it ends the process).
    """

    def __init__(
        self, sock: socket.socket, session: Session, mountpoint: str,
        own_device: Optional[int], leave: Callable[[], None], end: Callable[[], None],
    ) -> None:  # fmt: skip
        self.socket = sock
        self._session = session
        self._mountpoint = mountpoint
        self._own_device = own_device
        self._leave = leave
        self._end = end
        self._accepting = True
        self._commands: Dict[str, Callable[[Dict[str, Any], wire.Descriptors], Reply]] = {
            "status": self._status,
            "mode": self._mode,
            "held": self._held,
            "handles": self._handles,
            "nodes": self._nodes,
            "staging": self._staging,
            "quit": self._quit,
        }

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
                        self._reply(client, -error.errno, {"message": f"bad packet: {reason(error)}", "hint": ""})
                        continue
                    if packet is None:
                        return
                    _, payload, descriptors = packet
                    with descriptors:
                        if not is_owner:
                            message = "cannot serve this user: not the owner"
                            self._reply(client, -errno.EPERM, {"message": message, "hint": "become root"})
                            return
                        after = self._answer(client, payload, descriptors)
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
                    f"unknown command: {str(command)[:100]}", f"one of: {', '.join(self._commands)}", errno.EINVAL
                )
            answer, fds = handler(request, descriptors)
            status = 0
            if command == "quit":
                after = self._end
        except StubfsError as error:
            status, answer = -error.errno, {"message": error.message, "hint": error.hint}
        except ValueError as error:
            status, answer = -errno.EINVAL, {"message": f"bad request: {error}", "hint": ""}
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

    # --- commands

    def _status(self, request: Dict[str, Any], descriptors: wire.Descriptors) -> Reply:
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
        )
        return messages.as_dict(status), ()

    def _mode(self, request: Dict[str, Any], descriptors: wire.Descriptors) -> Reply:
        try:
            mode = Mode(request.get("mode"))
        except ValueError:
            raise UsageError(
                f"cannot change the mode: {str(request.get('mode'))[:100]}: no such mode", "restore, stub or proxy"
            ) from None
        directory: Optional[int] = None
        if mode is Mode.PROXY:
            if len(descriptors) != 1:
                raise UsageError(
                    "cannot change the mode: proxy: one directory fd is needed", "send it with the request"
                )
            directory = descriptors.steal(0)
        try:
            if directory is not None:
                check_directory(directory, self._own_device)
        except OSError as error:
            os.close(directory)  # type: ignore[arg-type]
            raise StubfsError(
                f"cannot change the mode: proxy: {reason(error)}", "give a directory of the real file system",
                error.errno or errno.EINVAL,
            ) from error  # fmt: skip
        self._session.switch.change(mode, directory)
        return self._status(request, descriptors)

    def _held(self, request: Dict[str, Any], descriptors: wire.Descriptors) -> Reply:
        processes: Dict[int, Tuple[int, str]] = {}
        listed: List[Dict[str, Any]] = []
        for held, age, path, name in self._session.held_requests():
            if held.tid not in processes:
                processes[held.tid] = _process(held.tid)
            pid, command = processes[held.tid]
            listed.append(
                messages.as_dict(
                    HeldRequest(
                        held.unique, opcode_name(held.opcode), held.node, _path(path), _path(name),
                        held.tid, pid, held.uid, held.gid, age, command,
                    )  # fmt: skip
                )
            )
        return {"held": listed}, ()

    def _handles(self, request: Dict[str, Any], descriptors: wire.Descriptors) -> Reply:
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

    def _nodes(self, request: Dict[str, Any], descriptors: wire.Descriptors) -> Reply:
        numbers = request.get("nodes")
        if (
            not isinstance(numbers, list)
            or len(numbers) > _MAX_NODES
            or not all(type(number) is int for number in numbers)
        ):
            raise UsageError("cannot name nodes: nodes: a list of numbers is needed")
        paths = self._session.nodes.path
        return {"nodes": [[number, _path(paths(number))] for number in numbers]}, ()

    def _staging(self, request: Dict[str, Any], descriptors: wire.Descriptors) -> Reply:
        return {}, (self._session.staging.directory(),)

    def _quit(self, request: Dict[str, Any], descriptors: wire.Descriptors) -> Reply:
        self._leave()
        return {}, ()


def _process(tid: int) -> Tuple[int, str]:
    """(process id, command) of a thread; (0, "") for nobody, the tid itself for one that is gone."""
    if not tid:
        return 0, ""
    try:
        # Thousands may be asked for at once: as few steps as can be.
        fd = os.open(f"/proc/{tid}/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.read(fd, 4096)
        finally:
            os.close(fd)
        name, number = status.index(b"Name:\t") + 6, status.index(b"\nTgid:\t") + 7
        return int(status[number : status.index(b"\n", number)]), os.fsdecode(status[name : status.index(b"\n")])
    except (OSError, ValueError):
        return tid, ""
