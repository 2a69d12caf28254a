"""Whose file system ids a serving thread has: those of the caller, as the request's header names them.

So ownership and permission come out on the real side as if the caller had acted there itself.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import Dict, Iterator, NamedTuple, Optional, Tuple

from stubfs import syscalls

_GROUPS_VALID = 0.2  # seconds for which a thread's supplementary groups are believed
_GROUPS_KEPT = 1024


class Credentials(NamedTuple):
    uid: int
    gid: int
    groups: Tuple[int, ...]


ROOT = Credentials(0, 0, ())


class _OfThread(threading.local):
    identity: Optional["ThreadIdentity"] = None


_of_thread = _OfThread()


@contextmanager
def ourselves() -> Iterator[None]:
    """The calling thread's own credentials, for what the caller of an operation need not have a right to."""
    identity = _of_thread.identity
    if identity is None:
        yield
        return
    callers = identity.current
    identity.assume(ROOT)
    try:
        yield
    finally:
        identity.assume(callers)


def _read_groups(tid: int) -> Tuple[int, ...]:
    try:
        with open(f"/proc/{tid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Groups:"):
                    return tuple(int(word) for word in line.split()[1:])
    except OSError:
        pass
    return ()  # the caller is gone, or of another pid namespace: it has what its ids give, nothing more


class ThreadIdentity:
    """The calling thread's file system ids; changed only when the caller is another one than before.

    Not root: the ids stay ours, and every method does nothing.
    """

    def __init__(self) -> None:
        self.current = ROOT
        self._groups: Dict[Tuple[int, int, int], Tuple[float, Credentials]] = {}
        self._privileged = os.geteuid() == 0
        self._umask: Optional[int] = None  # the process's

    def of(self, uid: int, gid: int, tid: int) -> Credentials:
        """The credentials of a caller; its supplementary groups come from /proc."""
        if uid == 0 and gid == 0:
            # Root's groups decide nothing that its capabilities do not: spare the look into /proc.
            return ROOT
        if not self._privileged:
            return Credentials(uid, gid, ())
        now = time.monotonic()
        key = (tid, uid, gid)
        known = self._groups.get(key)
        if known is not None and now - known[0] < _GROUPS_VALID:
            return known[1]
        self.assume(ROOT)  # with hidepid, others see nothing of a process
        credentials = Credentials(uid, gid, _read_groups(tid) if tid else ())
        if len(self._groups) >= _GROUPS_KEPT:
            self._groups.clear()
        self._groups[key] = (now, credentials)
        return credentials

    def assume(self, credentials: Credentials) -> None:
        """OSError as setgroups(2)."""
        current = self.current
        if credentials == current or not self._privileged:
            return
        if credentials.groups != current.groups:
            syscalls.setgroups(credentials.groups)
        if credentials.gid != current.gid:
            syscalls.setfsgid(credentials.gid)
        if credentials.uid != current.uid:
            syscalls.setfsuid(credentials.uid)
        self.current = credentials
        _of_thread.identity = self

    def mask(self, umask: int) -> None:
        """Make files with the caller's umask: the backing file system knows when it counts."""
        if umask != self._umask:
            if self._umask is None:
                syscalls.unshare(syscalls.CLONE_FS)
            os.umask(umask)
            self._umask = umask
