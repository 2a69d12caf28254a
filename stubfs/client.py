"""Typed calls to a file system's control socket."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
from types import TracebackType
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Type, Union

from stubfs import messages, wire
from stubfs.errors import StubfsError, reason
from stubfs.messages import FilesystemStatus, Handle, HeldRequest
from stubfs.rules import RequestFilter, Rule

_ANSWER_TIME = 10.0  # seconds for an answer to come back after a wait


class FilesystemClient:
    """A connection; a context manager. ``timeout`` in seconds holds for each call.

    Calls raise StubfsError: what the file system refused (with its errno), or that it cannot be reached.
    """

    def __init__(self, path: str, timeout: Optional[float] = None) -> None:
        self._path = path
        try:
            self._sock: socket.socket = wire.connect(path, timeout)
        except OSError as error:
            hint = "does the file system run, and is this its --socket-path?"
            if error.errno == errno.ENAMETOOLONG:
                hint = f"use a path of at most {wire.MAX_PATH} bytes"
            raise StubfsError(
                f"cannot reach a file system: {path}: {reason(error)}", hint, error.errno or errno.ECONNREFUSED
            ) from error

    def __enter__(self) -> "FilesystemClient":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def _call(
        self, command: str, fds: Sequence[int] = (), **arguments: Any
    ) -> Tuple[Dict[str, Any], wire.Descriptors]:
        try:
            wire.send(self._sock, messages.encode({"command": command, **arguments}), fds)
            packet = wire.receive(self._sock, messages.STATUS.size)
        except OSError as error:
            # Not the next request on this connection: its answer could be the one that is late.
            self._sock.close()
            number = errno.ETIMEDOUT if isinstance(error, socket.timeout) else error.errno
            raise StubfsError(
                f"cannot ask the file system for {command}: {self._path}: {reason(error) or 'timed out'}",
                "",
                number or errno.EIO,
            ) from error
        if packet is None:
            raise StubfsError(
                f"cannot ask the file system for {command}: {self._path}: it has ended",
                "its log may say why; if it is still mounted: umount -l, and mount it again",
                errno.ECONNRESET,
            )
        prefix, payload, descriptors = packet
        try:
            (status,) = messages.STATUS.unpack(prefix)
            answer = messages.decode(payload)
            if status:
                raise StubfsError(
                    str(answer.get("message", os.strerror(-status))), str(answer.get("hint", "")), -status
                )
            return answer, descriptors
        except ValueError as error:
            descriptors.close()
            raise StubfsError(
                f"cannot understand the file system: {self._path}: {error}", "", errno.EPROTO
            ) from error
        except BaseException:
            descriptors.close()
            raise

    def _ask(self, command: str, fds: Sequence[int] = (), **arguments: Any) -> Dict[str, Any]:
        answer, descriptors = self._call(command, fds, **arguments)
        descriptors.close()
        return answer

    def status(self) -> FilesystemStatus:
        return FilesystemStatus(**self._ask("status"))

    def mode(
        self, mode: str, directory: Optional[int] = None, timeout: Optional[float] = None,
        errno: Union[None, int, str] = None, exempt: Sequence[int] = (), missing: Optional[str] = None,
    ) -> FilesystemStatus:  # fmt: skip
        """Change the mode; ``directory`` (for proxy) stays the caller's. Returns when the change is in force.

        Options of stub mode, which end with it: requests that are held for ``timeout`` seconds are answered with
        ``errno`` (EIO if not given; a name or a number); those of the processes ``exempt`` are served as before.

        ``missing``, for proxy: what becomes of files that restore mode has and the directory lacks. "leave": they are
        gone, and who has them open gets ESTALE. "carry": they are copied there first, with owner, mode and times.
        """
        options = {"timeout": timeout, "errno": errno, "exempt": list(exempt) or None, "missing": missing}
        fds = [] if directory is None else [directory]
        return FilesystemStatus(**self._ask("mode", fds, mode=mode, **options))

    def set_rules(self, rules: Iterable[Rule]) -> None:
        """Put ``rules`` in force, in this mode and those to come, in place of those before. None end them all.

        In force on return; requests that wait are looked at anew.
        """
        self._ask("rules", rules=[rule.as_json() for rule in rules])

    def rules(self) -> List[Rule]:
        """Those that set_rules() has set, or the command line."""
        return [Rule.from_json(item) for item in self._ask("rules")["rules"]]

    def cover(self, paths: Iterable[str], device: int) -> None:
        """The mount is to be taken off, with what is mounted on ``paths`` (relative to its root): who is on his way
        there then is sent to what comes in its place. Until the next change of mode or rules; no paths end it.

        ``device``: the st_dev of the mount.
        """
        self._ask("cover", paths=list(paths), device=device)

    def held(
        self, operations: Sequence[str] = (), path: Optional[str] = None, pids: Sequence[int] = ()
    ) -> List[HeldRequest]:
        """The requests that wait, the oldest first; those that a RequestFilter of these arguments means."""
        wanted = RequestFilter(operations, path, pids)
        return [HeldRequest(**item) for item in self._ask("held", **dataclasses.asdict(wanted))["held"]]

    def wait_held(
        self, count: int = 1, timeout: Optional[float] = None,
        operations: Sequence[str] = (), path: Optional[str] = None, pids: Sequence[int] = (),
    ) -> int:  # fmt: skip
        """Wait until at least ``count`` requests that the filter means are held at once; returns how many they are.

        An event, no polling. StubfsError ETIMEDOUT after ``timeout`` seconds (None: never), whatever the client's own
        time limit is.
        """
        wanted = dataclasses.asdict(RequestFilter(operations, path, pids))
        usual = self._sock.gettimeout()
        self._sock.settimeout(None if timeout is None else timeout + _ANSWER_TIME)
        try:
            return int(self._ask("wait_held", count=count, timeout=timeout, **wanted)["held"])
        finally:
            if self._sock.fileno() >= 0:
                self._sock.settimeout(usual)

    def handles(self) -> List[Handle]:
        return [Handle(**item) for item in self._ask("handles")["handles"]]

    def nodes(self, numbers: Iterable[int]) -> Dict[int, Optional[str]]:
        """node -> path relative to the root, None for one that has no name any more or is not known."""
        return {number: path for number, path in self._ask("nodes", nodes=list(numbers))["nodes"]}

    def remains(self, numbers: Iterable[int]) -> Dict[int, Tuple[int, bool]]:
        """For nodes without a name of which something is left: an O_PATH fd of it, which the caller closes, and
        whether it is in the staging directory (else in a directory that was given for proxy)."""
        found: Dict[int, Tuple[int, bool]] = {}
        wanted = list(numbers)
        while wanted:
            answer, descriptors = self._call("remains", nodes=wanted)
            with descriptors:
                listed = answer["remains"]
                found.update((node, (descriptors.steal(0), staging)) for node, staging in listed)
            # Asked for in order, and cut off where a packet is full.
            wanted = wanted[answer["asked"] :]
        return found

    def staging(self) -> int:
        """A directory fd of restore mode's contents, which the caller closes."""
        _, descriptors = self._call("staging")
        with descriptors:
            return descriptors.steal(0)

    def quit(self) -> None:
        """End the file system: held requests get EIO; it unmounts what it has mounted itself."""
        self._ask("quit")
