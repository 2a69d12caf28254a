"""Two directories side by side, and users' processes that do the same in both: actors, comparable trees."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import signal
import socket
import stat
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

from differential_hands import FS_IOC_SETFLAGS, Hands, attributes

LARGE = 5 * 2**30


class User(NamedTuple):
    name: str
    uid: int
    gid: int
    groups: Tuple[int, ...]


ROOT = User("root", 0, 0, ())
ALICE = User("alice", 1001, 1001, (2000,))
BOB = User("bob", 1002, 1002, (2000, 2001))
USERS = (ROOT, ALICE, BOB)


class Actor:
    """A process of ``user`` in ``top``, doing one operation of Hands after another."""

    def __init__(self, user: User, top: str) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock = ours
        self.pid = os.fork()
        if not self.pid:
            try:
                ours.close()
                _serve(its, user, top)
            finally:
                os._exit(0)
        its.close()

    def ask(self, operation: str, *arguments: Any) -> None:
        self._sock.send(pickle.dumps((operation, arguments)))

    def answer(self, timeout: float = 30.0) -> Tuple[str, Any]:
        self._sock.settimeout(timeout)
        data = self._sock.recv(2**20 + 2**18)
        assert data, f"the process has died: {os.waitpid(self.pid, os.WNOHANG)}"
        kind, value = pickle.loads(data)
        return kind, value

    def do(self, operation: str, *arguments: Any) -> Tuple[str, Any]:
        self.ask(operation, *arguments)
        return self.answer()

    def close(self) -> None:
        self._sock.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _serve(sock: socket.socket, user: User, top: str) -> None:
    os.chdir(top)
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    os.umask(0o022)
    hands = Hands()
    while True:
        data = sock.recv(2**20)
        if not data:
            return
        operation, arguments = pickle.loads(data)
        if operation == "within":
            _within(sock, hands, *arguments)
        else:
            sock.send(pickle.dumps(_perform(hands, operation, arguments)))


def _perform(hands: Hands, operation: str, arguments: Tuple[Any, ...]) -> Tuple[str, Any]:
    if b"." in arguments and not os.access(".", os.X_OK, effective_ids=True):
        # The kernel asks a file system for names alone: it does not get to know of a "." or ".." on the way.
        return "refused", "the working directory may not be searched"
    if any(_is_protected(name, operation, arguments) for name in arguments if isinstance(name, bytes)):
        return "refused", "protected by a sysctl"
    return _outcome(getattr(hands, operation), arguments)


def _within(sock: socket.socket, hands: Hands, slot: int, operation: str, arguments: Tuple[Any, ...]) -> None:
    """In an open directory; by a child, as the way back may be closed."""
    pid = os.fork()
    if not pid:
        try:
            outcome = _outcome(lambda: os.fchdir(hands.files[hands.one_of_type(slot, stat.S_IFDIR)]), ())
            if outcome[0] == "result":
                outcome = _perform(hands, operation, arguments)
            sock.send(pickle.dumps(outcome))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


_FOLLOWING = ("open", "tmpfile", "contents", "stat", "list", "chdir", "chmod", "truncate", "access", "statfs")


def _is_protected(name: bytes, operation: str, arguments: Tuple[Any, ...], depth: int = 5) -> bool:
    """Whether fs.protected_symlinks or fs.protected_regular may refuse it: FUSE hides sticky bits from the kernel."""
    follows = operation in _FOLLOWING or operation in ("link", "chown") and arguments[-1] is True
    creates = operation == "open" and bool(arguments[2] & os.O_CREAT)
    at = b"."
    parts = name.split(b"/")
    for number, part in enumerate(parts, 1):
        try:
            parent, status = os.stat(at), os.lstat(at + b"/" + part)
        except (OSError, ValueError):
            return False
        is_last, is_link = number == len(parts), stat.S_ISLNK(status.st_mode)
        if (
            parent.st_mode & stat.S_ISVTX and parent.st_mode & 0o022
            and status.st_uid not in (os.geteuid(), parent.st_uid)
            and (is_link and (follows or not is_last) or creates and is_last)
        ):  # fmt: skip
            return True
        if is_link and depth and (follows or not is_last):
            target = os.path.join(at, os.readlink(at + b"/" + part))
            if _is_protected(target, operation, arguments, depth - 1):
                return True
        at += b"/" + part
    return False


def _outcome(action: Callable[..., Any], arguments: Any) -> Tuple[str, Any]:
    try:
        return "result", action(*arguments)
    except OSError as error:
        return "error", errno.errorcode[error.errno or 0]
    except (KeyError, ValueError) as error:  # no such slot; an empty mapping
        return "refused", type(error).__name__


def furnish(top: bytes) -> None:
    """So that there is something to work on: files of each user, which some may write to and others not even read."""
    for name in (b"d", b"d/e"):
        os.mkdir(os.path.join(top, name))
        os.chmod(os.path.join(top, name), 0o777)
    os.symlink(b"d", os.path.join(top, b"s"))
    files = [(b"a", ALICE, 0o666), (b"b", BOB, 0o640), (b"c", ROOT, 0o600), (b"d/a", ALICE, 0o664)]
    for name, owner, mode in [*files, (b"d/b", ROOT, 0o666)]:
        fd = os.open(os.path.join(top, name), os.O_CREAT | os.O_WRONLY)
        try:
            os.write(fd, name * 3000)
            os.fchown(fd, owner.uid, owner.groups[0] if owner.groups else owner.gid)
            os.fchmod(fd, mode)
            os.setxattr(fd, "trusted.t", name)
        finally:
            os.close(fd)


def tree(top: bytes) -> Dict[bytes, Any]:
    """Everything beneath ``top``: attributes, contents, extended attributes, and which names are one file."""
    found: Dict[bytes, Any] = {}
    first: Dict[int, bytes] = {}
    for parent, directories, files in os.walk(top):
        for name in sorted(directories) + sorted(files):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            attributes_then = attributes(status)
            content: Optional[bytes] = None
            if stat.S_ISREG(status.st_mode) and status.st_size < 2**20:
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            keys = sorted(os.listxattr(path, follow_symlinks=False))
            extended = {key: os.getxattr(path, key, follow_symlinks=False) for key in keys}
            beneath = os.path.relpath(path, top)
            # Where links are met in another order the first one is another: the smallest name stands for the file.
            found[beneath] = (attributes_then, content, extended, status.st_ino)
            first[status.st_ino] = min(first.get(status.st_ino, beneath), beneath)
    return {name: (*rest, first[inode]) for name, (*rest, inode) in found.items()}


def _unflag(path: bytes) -> None:
    """So that it can be removed."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, bytes(8))
    finally:
        os.close(fd)


def empty(top: bytes) -> None:
    """Remove all that is beneath."""
    for parent, _, files in os.walk(top):
        _unflag(parent)
        for name in files:
            if stat.S_ISREG(os.lstat(os.path.join(parent, name)).st_mode):
                _unflag(os.path.join(parent, name))
    for parent, directories, files in os.walk(top, topdown=False):
        for name in files:
            os.unlink(os.path.join(parent, name))
        for name in directories:
            path = os.path.join(parent, name)
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)
