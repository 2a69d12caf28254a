"""Unix sockets that are bound on the old mount: they keep it in use without a descriptor of it.

connect(2) finds a socket by the inode that its path leads to. So a socket that waits for others to come is replaced by
a new one, bound by the same address where that leads to the new mount. What only keeps the place of the one that
accepted it has no more use for it: a connection stays as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

from spfs.errors import reason
from spfs.linux import namespaces, sockdiag
from spfs.linux.sockdiag import UnixSocket
from spfs.references import Kind
from spfs.surgery import socketlist
from spfs.surgery.counterparts import Counterparts, copy_flags
from spfs.surgery.kinds.base import Found, Handler, Scene, Survey
from spfs.surgery.program import Program
from spfs.surgery.records import FdTable, Holding, Process

_CONNECTED = "it is one end of a connection, which cannot be made again: it works on, and keeps the old mount in use"
_WAITING = "{} wait in it that cannot be handed over: asked again when they are gone, it goes"

_SIOCGSKNS = 0x894C  # the network namespace of a socket, netdevice(7)
_SO_PASSPIDFD, _SO_PEEK_OFF, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 76, 42, 32, 33
_BUFFERS = ((socket.SO_SNDBUF, _SO_SNDBUFFORCE), (socket.SO_RCVBUF, _SO_RCVBUFFORCE))
_OPTIONS = (socket.SO_PASSCRED, 34, _SO_PASSPIDFD, socket.SO_RCVLOWAT, _SO_PEEK_OFF, socket.SO_PRIORITY)  # 34: PASSSEC
_TIMES = (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)


@dataclass(eq=False)
class BoundSocket(Holding):
    """``known``: what the kernel lists of it; ``directory``: where its path is on the new mount, this record's."""

    known: Optional[UnixSocket] = None
    directory: int = -1

    def close(self) -> None:
        super().close()
        if self.directory >= 0:
            os.close(self.directory)
            self.directory = -1


class Sockets(Handler):
    """One new socket for all that share an old one; bound by us, listened on by the process itself, whose credentials
    those who connect are shown (SO_PEERCRED)."""

    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._bound: Dict[int, UnixSocket] = {}
        self._peers: Dict[int, int] = {}  # how many are connected to a socket, by its number
        self._pids: List[int] = []

    def survey(self, survey: Survey) -> None:
        self._pids = survey.pids
        self._list(survey.sockets)

    def _list(self, sockets: Iterable[UnixSocket]) -> None:
        self._bound.clear()
        self._peers.clear()
        for one in sockets:
            if one.device == self.device:
                self._bound[one.number] = one
            if one.peer:
                self._peers[one.peer] = self._peers.get(one.peer, 0) + 1

    def look(self, found: Found) -> None:
        known = self._bound.get(found.object.inode) if stat.S_ISSOCK(found.object.mode) else None
        if known is not None:
            place = BoundSocket(found.number, Kind.SOCKET, known.inode, found.object, exchanged=True, known=known)
            place.copy = found.copy()
            place.problem = self._obstacle(known) if place.copy >= 0 else "its table is out of reach"
            found.table.holdings.append(place)

    def _obstacle(self, known: UnixSocket) -> Optional[str]:
        if known.type == socket.SOCK_DGRAM:
            if known.peer:
                return "it is connected to another socket"
            if self._peers.get(known.number):
                return "others are connected to it, who would go on sending to the old one"
        elif known.state == sockdiag.ESTABLISHED:
            return _CONNECTED
        return None

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        for holding in _of(process):
            holding.path = counterparts.path(holding.inode)
            if holding.problem is None and holding.new < 0:
                try:
                    holding.directory = counterparts.open_parent(process.status, holding.inode)
                    holding.new = _like(holding.copy)
                except OSError as error:
                    holding.problem = f"it cannot be bound on the new mount: {reason(error)}"

    def judge(self, scene: Scene) -> None:
        for users in _by_socket(scene):
            for _, one in users:
                if one.problem is None and _is_readable(one.copy):
                    listening = one.known is not None and one.known.state == sockdiag.LISTENING
                    one.problem = _WAITING.format("connections" if listening else "messages")
            why = next(filter(None, (process.problem or one.problem for process, one in users)), None)
            for _, one in users if why is not None else ():
                one.problem = one.problem or f"it is shared with somebody who cannot go: {why}"

    def transfer(self, scene: Scene) -> None:
        groups = [users for users in _by_socket(scene) if all(one.problem is None for _, one in users)]
        if any(one.known is not None and one.known.type == socket.SOCK_DGRAM for users in groups for _, one in users):
            self._list(socketlist.of_processes(self._pids))  # somebody can have connected to it a moment ago
        for users in groups:
            process, first = users[0]
            try:
                assert first.known is not None
                obstacle = self._obstacle(self._bound.get(first.known.number, first.known))
                if obstacle is not None:
                    raise OSError(errno.EBUSY, obstacle)
                _bind(process, first)
            except OSError as error:
                for _, one in users:
                    one.problem = f"it cannot be bound on the new mount: {reason(error)}"
                continue
            for _, one in users[1:]:
                os.dup2(first.new, one.new, inheritable=False)

    def finish(self, program: Program, table: FdTable) -> None:
        for holding in table.holdings:
            if isinstance(holding, BoundSocket) and holding.number in program.exchanged and holding.known is not None:
                if holding.known.state == sockdiag.LISTENING:
                    program.add("listen", holding.number, holding.known.limit)


def _of(process: Process) -> Iterator[BoundSocket]:
    return (one for table in process.tables for one in table.holdings if isinstance(one, BoundSocket))


def _by_socket(scene: Scene) -> List[List[Tuple[Process, BoundSocket]]]:
    found: Dict[int, List[Tuple[Process, BoundSocket]]] = {}
    for process, _, holding in scene.holdings():
        if isinstance(holding, BoundSocket):
            found.setdefault(holding.holder.inode, []).append((process, holding))
    return list(found.values())


def _is_readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


@contextmanager
def _socket(fd: int) -> Iterator[socket.socket]:
    """As a socket object, without its ownership."""
    wrapped = socket.socket(fileno=fd)
    try:
        yield wrapped
    finally:
        wrapped.detach()


def _like(copy: int) -> int:
    """A new socket of the same type, network namespace, options and flags."""
    with _socket(copy) as old:
        kind = old.type | socket.SOCK_CLOEXEC
        namespace = fcntl.ioctl(copy, _SIOCGSKNS)
        try:
            new = socketlist.in_thread(
                lambda: socket.socket(socket.AF_UNIX, kind), [(namespace, namespaces.CLONE_NEWNET)]
            )
        finally:
            os.close(namespace)
        try:
            for option, force in _BUFFERS:
                # What is read is twice what was set: the kernel adds as much for its own use (socket(7)).
                new.setsockopt(socket.SOL_SOCKET, force, old.getsockopt(socket.SOL_SOCKET, option) // 2)
            for option in _OPTIONS:
                _copy_option(old, new, option)
            for option in _TIMES:
                new.setsockopt(socket.SOL_SOCKET, option, old.getsockopt(socket.SOL_SOCKET, option, 16))
            copy_flags(copy, new.fileno())
            return new.detach()
        except BaseException:
            new.close()
            raise


def _copy_option(old: socket.socket, new: socket.socket, option: int) -> None:
    try:
        value = old.getsockopt(socket.SOL_SOCKET, option)
        if value != new.getsockopt(socket.SOL_SOCKET, option):
            new.setsockopt(socket.SOL_SOCKET, option, value)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):  # not of this kernel, or not of this type
            raise


def _bind(process: Process, one: BoundSocket) -> None:
    """Bind the new socket by the old one's address, as the process sees the world; a left socket there is replaced."""
    with _socket(one.copy) as old:
        address = old.getsockname()
    name = os.fsdecode(one.path or "").rpartition("/")[2]
    there = _status(one.directory, name)
    if there is not None:
        if not stat.S_ISSOCK(there.st_mode):
            raise OSError(errno.EEXIST, "something that is no socket has its name there")
        if any((s.device, s.inode) == (there.st_dev, there.st_ino & 0xFFFFFFFF) for s in sockdiag.unix_sockets()):
            raise OSError(errno.EADDRINUSE, "another socket is bound there")
    if there is not None:
        os.unlink(name, dir_fd=one.directory)  # as every server does before it binds
    mode = stat.S_IMODE(there.st_mode) if there is not None else 0o777 & ~process.status.umask
    uid, gid = (there.st_uid, there.st_gid) if there is not None else (process.status.uid, process.status.gid)
    try:
        _bind_as_seen(process, one, address, mode)
    except BaseException:
        if there is not None:
            os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=one.directory)
            os.chmod(name, mode, dir_fd=one.directory)
            os.chown(name, uid, gid, dir_fd=one.directory, follow_symlinks=False)
        raise
    os.chown(name, uid, gid, dir_fd=one.directory, follow_symlinks=False)


def _status(directory: int, name: str) -> Optional[os.stat_result]:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _bind_as_seen(process: Process, one: BoundSocket, address: str, mode: int) -> None:
    assert process.tables
    tid = process.tables[0].tid
    namespace = os.open(f"/proc/{tid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    root = os.open(f"/proc/{tid}/root", os.O_PATH | os.O_CLOEXEC)
    beneath = _beginning(one, address)

    def bind() -> None:
        os.fchdir(root)
        os.chroot(".")
        if beneath is not None:
            os.fchdir(one.directory)
            for _ in range(beneath):
                os.chdir("..")
        wanted, found = os.fstat(one.directory), os.stat(os.path.dirname(address) or ".")
        if (wanted.st_dev, wanted.st_ino) != (found.st_dev, found.st_ino):
            raise OSError(errno.EXDEV, f"its address {address} does not lead to the new mount")
        os.umask(0o777 & ~mode)  # of this thread alone, as the directories
        with _socket(one.new) as new:
            new.bind(address)

    try:
        socketlist.in_thread(bind, [(namespace, namespaces.CLONE_NEWNS)])
    finally:
        os.close(root)
        os.close(namespace)


def _beginning(one: BoundSocket, address: str) -> Optional[int]:
    """For an address relative to a directory that the process may have left since: how many levels that one is above
    the directory of the socket. None for an absolute address."""
    if address.startswith("/"):
        return None
    parts = [part for part in address.split("/")[:-1] if part not in ("", ".")]
    if ".." in parts:
        raise OSError(errno.EXDEV, f"where its address {address} begins is not known")
    return len(parts)
