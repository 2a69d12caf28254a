"""restore, stub, proxy: under which state a request is served, and the change from one to another.

A state is immutable; a request is served under the one that was in force when it was read. The order of a change:
hold reads and writes, wait for what is under way, drop the kernel's caches, put the new state in force, let go.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import stat
import threading
import time
from dataclasses import dataclass
from typing import Optional, Protocol

from stubfs.backing import Backing, Staging
from stubfs.held import HeldTable
from stubfs.protocol import BODY, ROOT_NODE, WRITE_CACHE, WRITE_IN, Opcode
from stubfs.request import Request
from stubfs.syscalls import device_without_sync

_log = logging.getLogger(__name__)
_DRAIN_LIMIT = 2.0  # seconds to wait for operations under way: one that hangs in the real file system must not stop us


class Mode(enum.Enum):
    RESTORE = "restore"
    STUB = "stub"
    PROXY = "proxy"


class Gate(enum.Enum):
    NOTHING = "serve everything"
    DATA = "hold what fills the page cache"
    ALL = "hold everything that can wait"


_ROOT_ANSWERS = frozenset((Opcode.GETATTR, Opcode.ACCESS, Opcode.GETXATTR, Opcode.LISTXATTR))
_TOUCHES_PAGES = frozenset((Opcode.READ, Opcode.OPEN))


@dataclass(frozen=True, eq=False)
class State:
    """``backing`` is None exactly in stub mode; ``since``: seconds since the epoch."""

    mode: Mode
    backing: Optional[Backing]
    gate: Gate
    since: float

    def holds(self, request: Request) -> bool:
        """Whether the request must wait. Not asked for those that are answered in every mode."""
        if self.gate is Gate.NOTHING:
            return False
        opcode = request.opcode
        if opcode == Opcode.WRITE:
            # Pages written back: munmap, exit and kill -9 would hang behind them.
            return not WRITE_IN.unpack_from(request.buffer, BODY)[3] & WRITE_CACHE
        if self.gate is Gate.DATA:
            # OPEN: after its answer the kernel drops the file's pages, unkillable until a held READ unlocks them.
            return opcode in _TOUCHES_PAGES
        if request.node == ROOT_NODE and opcode in _ROOT_ANSWERS:
            return False
        return opcode != Opcode.FLUSH  # a killed process must be able to close its files


class Server(Protocol):
    """What the switch needs of the session."""

    state: State

    def drain(self, state: State, timeout: float) -> bool:
        """Wait until no request is served under another state than ``state``; False on timeout."""

    def drop_caches(self, state: State) -> None:
        """Drop all pages that the kernel has cached, serving what stands in the way under ``state``."""


class ModeSwitch:
    """Changes the server's state; owns the backing directories."""

    def __init__(self, server: Server, held: HeldTable, staging: Staging) -> None:
        self._server = server
        self._held = held
        self._staging = staging
        self._changing = threading.Lock()
        self._last_number = staging.number
        self._generation = staging.number
        self._proxy: Optional[Backing] = None

    @property
    def generation(self) -> int:
        """Number of the latest backing directory: the one in force, or, in stub mode, the last that was."""
        return self._generation

    def initial(self, mode: Mode, directory: Optional[int]) -> State:
        """The state to begin with; takes ``directory`` (needed for proxy) over."""
        return self._make(mode, directory)

    def _make(self, mode: Mode, directory: Optional[int]) -> State:
        backing: Optional[Backing] = None
        if mode is Mode.RESTORE:
            backing = self._staging
        elif mode is Mode.PROXY:
            assert directory is not None
            self._last_number += 1
            backing = Backing(directory, self._last_number, is_staging=False)
        if backing is not None:
            self._generation = backing.number
        return State(mode, backing, Gate.ALL if mode is Mode.STUB else Gate.NOTHING, time.time())

    def change(self, mode: Mode, directory: Optional[int] = None) -> State:
        """Put ``mode`` in force and return the state; takes ``directory`` over.

        Every request read afterwards is treated under it, and nothing read under the former one is under way.
        """
        with self._changing:
            old = self._server.state
            if old.mode is mode and not (mode is Mode.PROXY and directory is not None):
                return old
            if mode is Mode.STUB:
                self._held.let_go(False)
            drained = True
            try:
                if old.backing is not None:
                    drained = self._leave(old)
                new = self._make(mode, directory)
            except BaseException:
                # No thread for the invalidation, no memory: as before, or reads would be held for good.
                self._server.state = old
                self._held.let_go(old.backing is not None)
                if directory is not None:
                    os.close(directory)
                raise
            self._server.state = new
            # What did not end within the first wait is no reason for a second one.
            drained = self._drain(new, _DRAIN_LIMIT if drained else 0.0)
            if new.backing is not None:
                self._held.let_go(True)
            if new.mode is Mode.PROXY:
                former, self._proxy = self._proxy, new.backing
                if former is not None and drained:
                    former.close()
            _log.info("mode %s, generation %d", mode.value, self._generation)
            return new

    def _leave(self, old: State) -> bool:
        # Reads and writes wait from now on: what they would bring into the page cache could not be told from what
        # the invalidation has passed already. Everything else goes on, the pages written back above all.
        closing = State(old.mode, old.backing, Gate.DATA, old.since)
        self._server.state = closing
        drained = self._drain(closing, _DRAIN_LIMIT)
        self._server.drop_caches(closing)
        return drained

    def _drain(self, state: State, limit: float) -> bool:
        if self._server.drain(state, limit):
            return True
        _log.warning("an operation of the former mode is still under way after %g seconds", limit)
        return False


def check_directory(fd: int, own_device: Optional[int]) -> None:
    """OSError unless ``fd`` is a directory outside the mount itself, where requests would wait for themselves."""
    if device_without_sync(b"", fd) == own_device:
        raise OSError(errno.ELOOP, "the directory is on the mount itself")
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
