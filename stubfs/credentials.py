"""Whose rights a serving thread has: those of the caller, whom the request's header and /proc name.

So ownership and permission come out on the real side as if the caller had acted there itself: file system ids,
supplementary groups, and effective capabilities (quotas, reserved blocks, trusted.* names, and root that has given some
up), which are all a matter of one thread to the kernel.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import Callable, ContextManager, Dict, Iterator, NamedTuple, Optional, Tuple, TypeVar

from stubfs import syscalls
from stubfs.syscalls import effective_of

_VALID = 0.2  # seconds for which a thread's groups and capabilities are believed
_KEPT = 1024
_ALL = (1 << 64) - 1  # capabilities: as many as we have
# Of linux/capability.h: ours at any time, to become somebody else again. They mean nothing to a file system.
_SETGID, _SETUID = 1 << 6, 1 << 7
# Those that a user namespace gives over files whose ids are mapped in it (capable_wrt_inode_uidgid() in the kernel):
# CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID.
_OVER_FILES = 0b11111
_FOWNER = 0b01000
OVER_DIRECTORIES = 0b00110  # of those, what making and removing names in a directory needs
_EVERY_ID = (1 << 32) - 1  # how many ids there are: the last number stands for none

_T = TypeVar("_T")


class Power(NamedTuple):
    """``capabilities`` that a user namespace gives its root over files whose owner and group are ids of its own."""

    capabilities: int
    uids: Tuple[range, ...]
    gids: Tuple[range, ...]

    def over(self, status: os.stat_result) -> int:
        """Those over one file. For FOWNER its owner is enough: inode_owner_or_capable() in the kernel."""
        if not any(status.st_uid in ids for ids in self.uids):
            return 0
        return self.capabilities & (_OVER_FILES if any(status.st_gid in ids for ids in self.gids) else _FOWNER)

    @property
    def reaches_all(self) -> bool:
        return all(sum(map(len, ids)) >= _EVERY_ID for ids in (self.uids, self.gids))


class Credentials(NamedTuple):
    """``capabilities``: the effective ones, a mask as in /proc/PID/status; those that we lack do not count. ``power``:
    of the caller's user namespace, for insist()."""

    uid: int
    gid: int
    groups: Tuple[int, ...] = ()
    capabilities: int = 0
    power: Optional[Power] = None


ROOT = Credentials(0, 0, (), _ALL)


class _OfThread(threading.local):
    identity: Optional["ThreadIdentity"] = None


_of_thread = _OfThread()


@contextmanager
def acting_as(credentials: Credentials) -> Iterator[None]:
    """For what the caller of an operation need not have a right to. OSError as setgroups(2)."""
    identity = _of_thread.identity
    if identity is None:
        yield
        return
    callers = identity.current
    identity.assume(credentials)
    try:
        yield
    finally:
        identity.assume(callers)


def ourselves() -> ContextManager[None]:
    """The calling thread's own credentials."""
    return acting_as(ROOT)


def insist(action: Callable[[int], _T], fd: int, capabilities: int = _OVER_FILES) -> _T:
    """``action``, which has just been refused, on the object ``fd``; with those of these capabilities that the caller's
    user namespace gives it over that very object. To be called where the refusal is caught: raises it again if that
    gives none.

    ``action`` must need them for nothing else: not for a name in a directory, which may be somebody else's by now.
    """
    identity = _of_thread.identity
    power = identity.current.power if identity is not None else None
    exerted = power.over(os.fstat(fd)) & capabilities if power is not None else 0
    if identity is None or not exerted:
        raise
    identity.exert(exerted)
    try:
        return action(fd)
    finally:
        identity.relax()


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def _field(status: bytes, name: bytes) -> bytes:
    start = status.index(name) + len(name)
    return status[start : status.index(b"\n", start)]


def _groups_and_capabilities(tid: int, uid: int) -> Tuple[Tuple[int, ...], int]:
    """Of a thread that asks as ``uid``."""
    status = _read(f"/proc/{tid}/status")
    groups = tuple(map(int, _field(status, b"\nGroups:").split()))
    real, _, _, own = map(int, _field(status, b"\nUid:").split())
    if own == uid:
        return groups, int(_field(status, b"\nCapEff:"), 16)
    # Else the kernel has put other credentials on.
    if uid:
        return groups, 0  # access(2), by a program with set-id bits on behalf of a user
    if real:
        return groups, _ALL  # in the name of who mounted an overlay
    return groups, int(_field(status, b"\nCapPrm:"), 16)  # access(2), on behalf of root


def _user_namespace(process: str) -> Tuple[int, int]:
    status = os.stat(f"/proc/{process}/ns/user")
    return status.st_dev, status.st_ino


def _ids(tid: int, name: str) -> Tuple[range, ...]:
    """Those of ours that the thread's user namespace knows: user_namespaces(7), as seen from another one."""
    extents = (tuple(map(int, line.split())) for line in _read(f"/proc/{tid}/{name}").splitlines())
    return tuple(range(start, start + count) for _, start, count in extents)


class ThreadIdentity:
    """The calling thread's credentials; changed only when the caller is another one than before.

    Not root: they stay ours, and every method does nothing.
    """

    def __init__(self) -> None:
        self.current = ROOT
        # Of (thread, user, group): when it was looked up, its capabilities then if it had any, and what it may do here.
        self._known: Dict[Tuple[int, int, int], Tuple[float, bytes, Credentials]] = {}
        self._privileged = os.geteuid() == 0
        self._capabilities = syscalls.Capabilities()
        self._permitted = self._capabilities.permitted(0)
        self._namespace = _user_namespace("self")
        self._umask: Optional[int] = None  # the process's

    def of(self, uid: int, gid: int, tid: int) -> Credentials:
        """The credentials of a caller; its groups and capabilities come from its thread.

        Without a thread it is the kernel that writes pages back, or somebody of another pid namespace. One that is
        gone has what its ids give, nothing more.
        """
        if not self._privileged or not tid:
            return ROOT if uid == 0 and gid == 0 else Credentials(uid, gid)
        now = time.monotonic()
        key = (tid, uid, gid)
        known = self._known.get(key)
        try:
            if known is not None:
                since, sets, credentials = known
                # Who gives capabilities up has done so for its very next request.
                if now - since < _VALID and (not sets or self._capabilities.are(tid, sets)):
                    return credentials
            self.assume(ROOT)  # with hidepid, others see nothing of a process
            sets = self._capabilities.sets(tid)
            effective = effective_of(sets)
            credentials = self._look(uid, gid, tid, effective)
        except (OSError, ValueError):
            return Credentials(uid, gid)
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[key] = (now, sets if effective else b"", credentials)
        return credentials

    def _look(self, uid: int, gid: int, tid: int, effective: int) -> Credentials:
        is_ours = not effective or _user_namespace(str(tid)) == self._namespace
        if uid == 0 and gid == 0 and is_ours and effective & self._permitted == self._permitted:
            return ROOT  # its groups decide nothing that its capabilities do not
        groups, capabilities = _groups_and_capabilities(tid, uid)
        if not capabilities or is_ours:
            return Credentials(uid, gid, groups, capabilities)
        power = Power(capabilities & _OVER_FILES, _ids(tid, "uid_map"), _ids(tid, "gid_map"))
        if power.reaches_all:
            return Credentials(uid, gid, groups, power.capabilities)
        return Credentials(uid, gid, groups, 0, power)

    def exert(self, capabilities: int) -> None:
        """These, for the moment: until relax()."""
        self._capabilities.set((capabilities | _SETGID | _SETUID) & self._permitted, self._permitted)

    def relax(self) -> None:
        self.exert(self.current.capabilities)

    def assume(self, credentials: Credentials) -> None:
        """OSError as setgroups(2)."""
        current = self.current
        if credentials is current or credentials == current or not self._privileged:
            return
        if credentials.groups != current.groups:
            syscalls.setgroups(credentials.groups)
        if credentials.gid != current.gid:
            syscalls.setfsgid(credentials.gid)
        if credentials.uid != current.uid:
            syscalls.setfsuid(credentials.uid)
        # Last: from and to root the kernel has just changed some of them (capabilities(7)).
        if credentials.capabilities != current.capabilities or (not credentials.uid) != (not current.uid):
            self.exert(credentials.capabilities)
        self.current = credentials
        _of_thread.identity = self

    def mask(self, umask: int) -> None:
        """Make files with the caller's umask: the backing file system knows when it counts."""
        if umask != self._umask:
            if self._umask is None:
                syscalls.unshare(syscalls.CLONE_FS)
            os.umask(umask)
            self._umask = umask
