"""The way in: typed requests to a manager's socket, as text (what every manager understands) and as JSON."""

from __future__ import annotations

import errno
import glob
import os
import socket
from types import TracebackType
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

from spfs import replies
from spfs.errors import SpfsError, reason
from spfs.managerstart import SOCKET_VARIABLE as SOCKET_VARIABLE
from spfs.replies import Reply
from stubfs import wire

if TYPE_CHECKING:
    from stubfs.rules import Rule

MODE_VARIABLE = "SPFS_MODE"
_PLACES = ("/run/spfs-manager*/*.sock", "/run/spfs-manager/*/*.sock")


def find_manager(socket_path: Optional[str] = None) -> str:
    """The socket of the manager that is meant: the one given, $SPFS_MANAGER_SOCK, or the only one running.

    SpfsError if there is none, or more than one to choose from.
    """
    chosen = socket_path or os.environ.get(SOCKET_VARIABLE)
    if chosen:
        return chosen
    running = [path for path in find_sockets() if _accepts(path)]
    if len(running) == 1:
        return running[0]
    if running:
        listed = ", ".join(running)
        raise SpfsError(f"cannot choose a manager: {len(running)} are running: {listed}", "name one: --socket-path")
    raise SpfsError(
        "cannot find a manager: none is running below /run",
        f"start one: spfs-manager -d; or name its socket: --socket-path or ${SOCKET_VARIABLE}",
        errno.ENOENT,
    )


def find_sockets() -> List[str]:
    """Where managers listen by default, and where CRIU lets them; file systems' own sockets are not among them."""
    found = {path for place in _PLACES for path in glob.glob(place)}
    return sorted(path for path in found if not os.path.basename(path).startswith("fs-"))


def _how_to_start(socket_path: str) -> str:
    """The command for a manager that listens there; in its work directory it also takes over what is there."""
    directory, name = os.path.split(os.path.abspath(socket_path))
    where = f"--work-dir {directory}" if name == "spfs-manager.sock" else f"--socket-path {socket_path}"
    return f"spfs-manager -d {where}"


def _accepts(path: str) -> bool:
    try:
        wire.connect(path, 1.0).close()
    except OSError:
        return False
    return True


class ManagerClient:
    """A connection to a manager; one request at a time. Errors of the manager are raised as SpfsError with its errno.

    ``timeout``: seconds to wait for each answer, None for ever. After a TimeoutError the connection is closed, as
    the late answer would be taken for that of the next request.
    """

    def __init__(self, socket_path: str, timeout: Optional[float] = None) -> None:
        """SpfsError if nobody listens there."""
        self.socket_path = socket_path
        try:
            self._sock: socket.socket = wire.connect(socket_path, timeout)
        except OSError as error:
            hint = {
                errno.ENAMETOOLONG: f"use a path of at most {wire.MAX_PATH} bytes",
                errno.EACCES: "the socket is its owner's and root's",
                errno.EPROTOTYPE: "that is the socket of something else",
            }.get(error.errno or 0, f"start it: {_how_to_start(socket_path)}")
            raise SpfsError(
                f"cannot reach the manager: {socket_path}: {reason(error)}", hint, error.errno or errno.EIO
            ) from error

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> "ManagerClient":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    # The two forms of a request

    def request_text(self, text: str, options: Optional[str] = None) -> Reply:
        """Send ``text`` as it is, and ``options`` as the second string; the reply, whatever its status is."""
        strings = [os.fsencode(text)] + ([os.fsencode(options)] if options is not None else [])
        reply, fds = self._exchange(b"".join(string + b"\0" for string in strings))
        fds.close()
        return reply

    def request(self, command: str, **keys: Any) -> Dict[str, Any]:
        """A JSON request; keys that are None are left out. The data of the answer."""
        reply, fds = self._request(command, keys)
        fds.close()
        return reply.data

    def _request(self, command: str, keys: Mapping[str, Any]) -> Tuple[Reply, wire.Descriptors]:
        given = {key: value for key, value in keys.items() if value is not None}
        reply, fds = self._exchange(replies.encode_data({"command": command, **given}))
        if reply.status < 0:
            fds.close()
            message = reply.data.get("message") or f"the manager refused {command}: {os.strerror(-reply.status)}"
            error = RequestFailed(message, reply.data.get("hint", ""), -reply.status)
            error.data = reply.data
            raise error
        return reply, fds

    def _exchange(self, packet: bytes) -> Tuple[Reply, wire.Descriptors]:
        try:
            wire.send(self._sock, packet)
            answer = wire.receive(self._sock, replies.STATUS_LENGTH)
            if answer is None:
                raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
            prefix, payload, fds = answer
            return replies.decode_reply(prefix, payload), fds
        except socket.timeout as error:
            self.close()
            raise SpfsError(
                f"cannot get an answer from the manager: {self.socket_path}: it took too long",
                "it goes on with what it was asked: see status",
                errno.ETIMEDOUT,
            ) from error
        except (BrokenPipeError, ConnectionResetError) as error:
            self.close()
            raise SpfsError(
                f"cannot get an answer from the manager: {self.socket_path}: it has ended",
                "mounts stay: start it again on its work directory",
                error.errno or errno.ECONNRESET,
            ) from error
        except (OSError, ValueError) as error:
            self.close()
            number = (error.errno if isinstance(error, OSError) else 0) or errno.EPROTO
            raise SpfsError(
                f"cannot get an answer from the manager: {self.socket_path}: {reason(error)}", "see its log", number
            ) from error

    # Commands

    def mount(
        self,
        id: str,
        mountpoint: str,
        mode: str = "restore",
        *,
        proxy_dir: Optional[str] = None,
        ns_pid: Optional[int] = None,
        ns_list: Optional[Sequence[str]] = None,
        root: Optional[str] = None,
        ns_mountpoint: Optional[str] = None,
        options: Optional[str] = None,
    ) -> Dict[str, Any]:
        """Mount a stand-in file system; it is usable on return. Its id, pid, device and control socket."""
        return self.request(
            "mount",
            id=id,
            mountpoint=mountpoint,
            mode=mode,
            proxy_dir=proxy_dir,
            ns_pid=ns_pid,
            ns_list=list(ns_list) if ns_list is not None else None,
            root=root,
            ns_mountpoint=ns_mountpoint,
            options=options or None,
        )

    def mode(
        self,
        mode: str,
        id: Optional[str] = None,
        *,
        proxy_dir: Optional[str] = None,
        ns_pid: Optional[int] = None,
        timeout: Optional[float] = None,
        errno: Union[None, int, str] = None,
        exempt: Sequence[int] = (),
        missing: str = "leave",
    ) -> List[str]:
        """Change the mode of ``id``, or of all. In force on return; the ids of the mounts that it concerned.

        ``timeout``, ``errno``, ``exempt``: options of stub mode, ``missing``: of proxy, as in FilesystemClient.mode().
        """
        answer = self.request(
            "mode", **_whom(id), mode=mode, proxy_dir=proxy_dir, ns_pid=ns_pid, timeout=timeout, errno=errno,
            exempt=list(exempt) or None, missing=missing if missing != "leave" else None,
        )  # fmt: skip
        return list(answer["mounts"])

    def set_rules(self, rules: Sequence[Rule], id: Optional[str] = None) -> List[str]:
        """Put ``rules`` in force on ``id``, or on all, in place of those before; the ids of the mounts."""
        return list(self.request("rules", **_whom(id), rules=[rule.as_json() for rule in rules])["mounts"])

    def rules(self, id: Optional[str] = None) -> Dict[str, List[Rule]]:
        """id -> the rules in force there."""
        from stubfs.rules import Rule

        rows = self.request("rules", **_whom(id))["mounts"]
        return {row["id"]: [Rule.from_json(item) for item in row["rules"]] for row in rows}

    def replace(
        self,
        id: str,
        source: str,
        fstype: str,
        flags: int = 0,
        options: str = "",
        *,
        begin: Optional[str] = None,
        **more: Any,
    ) -> str:
        """Ask for the real file system to take the mount's place. Returns when that is accepted; see wait().

        ``begin``: "hold" until begin() is called, "release" to begin at once, None: when restore mode is over.
        ``more``: other keys of the request, as ``spfs.requests.Replace`` has them: bindmounts, freeze_cgroup, strict,
        missing, timeout, remove, net_pid.
        """
        answer = self.request(
            "replace", id=id, source=source, type=fstype, flags=flags, options=options, mode=begin, **more
        )
        return str(answer["replace"])

    def begin(self, begin: str, id: Optional[str] = None) -> List[str]:
        """Release or hold (``begin``) what was asked for before; the ids of the mounts that it concerned."""
        return list(self.request("replace", **_whom(id), mode=begin)["mounts"])

    def switch(
        self,
        target: str,
        *,
        source: Optional[str] = None,
        device: Optional[int] = None,
        freeze_cgroup: Optional[str] = None,
        ns_pid: Optional[int] = None,
    ) -> Dict[str, Any]:
        """Move the processes from one existing mount to another; the report, when it is done."""
        return self.request(
            "switch", target=target, source=source, device=device, freeze_cgroup=freeze_cgroup, ns_pid=ns_pid
        )

    def status(self, id: Optional[str] = None) -> Dict[str, Any]:
        """``manager``, ``mounts`` and ``finished`` (those that are gone)."""
        return self.request("status", id=id)

    def held(self, id: Optional[str] = None) -> List[Dict[str, Any]]:
        """The requests that wait in stub mode, with the id of their mount."""
        return list(self.request("held", id=id)["held"])

    def wait_held(
        self, id: str, count: int = 1, timeout: Optional[float] = None,
        operations: Sequence[str] = (), path: Optional[str] = None, pids: Sequence[int] = (),
    ) -> int:  # fmt: skip
        """Until so many requests are held on the mount at once; returns how many. As FilesystemClient.wait_held(): asks
        its file system, by whose control socket the manager goes, too."""
        from stubfs.client import FilesystemClient

        mounts = self.status(id)["mounts"]
        if not mounts:
            raise SpfsError(f"cannot wait for requests on mount {id!r}: it is gone", "see status", errno.ENOENT)
        with FilesystemClient(mounts[0]["control"]) as filesystem:
            return filesystem.wait_held(count, timeout, operations, path, pids)

    def wait(self, id: str, timeout: Optional[float] = None) -> Dict[str, Any]:
        """Until the replace (or mode change) of ``id`` has ended; the mount's status with the report. An error that
        ended it is raised; ETIMEDOUT after ``timeout`` seconds."""
        return self.request("wait", id=id, timeout=timeout)

    def changes(self, since: int, timeout: Optional[float] = None) -> int:
        """Wait until something has happened after status() said ``changes: since``; the count then. After ``timeout``
        seconds it is the same one."""
        return int(self.request("changes", since=since, timeout=timeout)["changes"])

    def metrics(self) -> Dict[str, Any]:
        """``manager``, ``mounts`` (in short) and ``counters`` since the manager's start; see spfs.counters."""
        return self.request("metrics")

    def abort(self, id: Optional[str] = None) -> List[str]:
        """Give up what is pending or running; everything is as it was before on return."""
        return list(self.request("abort", **_whom(id))["mounts"])

    def unmount(self, id: Optional[str] = None, force: bool = False) -> Dict[str, Any]:
        return self.request("unmount", **_whom(id), force=force)

    def create(self, id: str, files: Sequence[Mapping[str, Any]]) -> int:
        """Create files in bulk in restore mode; see spfs.restore for what a file's keys are. How many there were."""
        return int(self.request("create", id=id, files=list(files))["created"])

    def staging(self, id: str) -> int:
        """A descriptor of the directory that restore mode keeps its files in. The caller's."""
        _, fds = self._request("staging", {"id": id})
        with fds:
            return fds.steal(0)

    def shutdown(self, unmount: bool = False, force: bool = False) -> None:
        """End the manager. EBUSY while mounts are there, unless ``unmount`` takes or ``force`` leaves them."""
        self.request("shutdown", unmount=unmount, force=force)


class RequestFailed(SpfsError):
    """The manager's answer was an error; ``data`` is all that it said."""

    data: Dict[str, Any] = {}


def _whom(id: Optional[str]) -> Dict[str, Any]:
    return {"all": True} if id is None else {"id": id}
