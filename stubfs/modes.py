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
from dataclasses import dataclass, field, replace
from typing import Optional, Protocol, Sequence, Tuple

from stubfs.backing import Backing, Staging
from stubfs.errors import UsageError
from stubfs.held import HeldTable
from stubfs.protocol import Opcode
from stubfs.request import Request
from stubfs.rules import (
    HOLD,
    SERVE,
    ActiveRule,
    PathsOf,
    Rule,
    Treatment,
    activate,
    decide,
    errno_number,
    is_written_back,
    never_waits,
    pids_tuple,
    seconds_number,
)
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


# OPEN: after its answer the kernel drops the file's pages, unkillable until a held READ unlocks them.
_TOUCHES_PAGES = frozenset((Opcode.READ, Opcode.WRITE, Opcode.OPEN))


@dataclass(frozen=True)
class StubOptions:
    """What stub mode does other than to hold for ever. UsageError for what makes no sense.

    ``timeout``: seconds after which a held request is answered with ``errno`` (EIO if not given), as on a soft mount.
    ``exempt``: processes whose requests are served from the directory that was in force before.
    """

    timeout: Optional[float] = None
    errno: Optional[int] = None
    exempt: Tuple[int, ...] = ()

    @classmethod
    def checked(cls, timeout: object, errno: object, exempt: object) -> "StubOptions":
        """From what a user gave; None for what was not."""
        name, value = "timeout", timeout
        try:
            seconds = None if timeout is None else seconds_number(timeout)
            name, value = "errno", errno
            number = None if errno is None else errno_number(errno)
            name, value = "exempt", exempt
            pids = () if exempt is None else pids_tuple(exempt)
        except ValueError as error:
            raise UsageError(f"cannot use the options of stub mode: {name} {value!r:.60}: {error}") from error
        if number is not None and seconds is None:
            raise UsageError("cannot use the options of stub mode: errno: no timeout is given", "give both")
        return cls(seconds, number, pids)

    def first(self) -> Tuple[ActiveRule, ...]:
        """The rules before all others. StubfsError ESRCH for a process that is not there."""
        return activate([Rule("serve", pids=self.exempt)] if self.exempt else [])

    def last(self) -> Tuple[ActiveRule, ...]:
        return activate(
            [Rule("hold", seconds=self.timeout, errno=self.errno)] if self.timeout is not None else []
        )


@dataclass(frozen=True, eq=False)
class State:
    """``backing`` is None exactly in stub mode; ``since``: seconds since the epoch.

    ``aside``: in stub mode, the state that rules let requests through to.
    """

    mode: Mode
    backing: Optional[Backing]
    gate: Gate
    since: float
    rules: Tuple[ActiveRule, ...] = ()
    aside: Optional["State"] = None
    serves_all: bool = field(init=False)  # without a question: what nearly every request finds
    vouches: bool = field(init=False)  # the kernel may believe attributes for a moment: nobody wants to see requests
    is_aside: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "serves_all", self.gate is Gate.NOTHING and not self.rules)
        object.__setattr__(self, "vouches", self.serves_all and self.mode is not Mode.STUB)
        object.__setattr__(self, "is_aside", self.mode is Mode.STUB and self.backing is not None)

    def treat(self, request: Request, paths_of: PathsOf) -> Treatment:
        """What becomes of the request. Not asked for those that are answered in every mode."""
        if self.gate is Gate.DATA and request.opcode in _TOUCHES_PAGES and not is_written_back(request):
            return HOLD
        decided = decide(self.rules, request, paths_of) if self.rules else None
        if decided is not None:
            return decided
        return SERVE if self.gate is not Gate.ALL or is_written_back(request) or never_waits(request) else HOLD


class Server(Protocol):
    """What the switch needs of the session."""

    state: State

    def drain(self, state: State, timeout: float) -> bool:
        """Wait until no request is served under another state than ``state``; False on timeout."""

    def drop_caches(self, state: State) -> None:
        """Drop all that the kernel has cached, serving what stands in the way under ``state``."""

    def refresh_attributes(self) -> None:
        """To be called under the state that follows stub mode, before anything that was held goes on: make sure that
        none of it goes by attributes of the former state."""


class ModeSwitch:
    """Changes the server's state; owns the backing directories."""

    def __init__(self, server: Server, held: HeldTable, staging: Staging) -> None:
        self._server = server
        self._held = held
        self._staging = staging
        self._changing = threading.Lock()
        self._last_number = staging.number
        self._latest: Backing = staging
        self._proxy: Optional[Backing] = None
        self._options = StubOptions()
        self._first: Tuple[ActiveRule, ...] = ()
        self._rules: Tuple[ActiveRule, ...] = ()
        self._last: Tuple[ActiveRule, ...] = ()

    @property
    def generation(self) -> int:
        """Number of the latest backing directory: the one in force, or, in stub mode, the last that was."""
        return self._latest.number

    @property
    def rules(self) -> Tuple[Rule, ...]:
        """Those that were set by set_rules()."""
        return tuple(active.rule for active in self._rules)

    def begin(
        self, mode: Mode, directory: Optional[int], options: StubOptions = StubOptions(), rules: Sequence[Rule] = ()
    ) -> State:
        """Put the first state in force, and return it; takes ``directory`` (needed for proxy) over.

        StubfsError ESRCH for an exempt process, or one of a rule, that is not there.
        """
        self._rules = activate(rules)
        self._options, self._first, self._last = options, options.first(), options.last()
        state = self._make(mode, directory, time.time())
        self._keep_time(state)
        self._adopt(state)
        self._enter(state)
        self._held.reconsider()
        return state

    def _make(self, mode: Mode, directory: Optional[int], since: float) -> State:
        """A state that nothing knows of yet."""
        if mode is Mode.STUB:
            aside = State(mode, self._latest, Gate.NOTHING, since)
            return State(mode, None, Gate.ALL, since, self._ordered(), aside)
        backing: Backing = self._staging
        if mode is Mode.PROXY:
            assert directory is not None
            self._last_number += 1
            backing = Backing(directory, self._last_number, is_staging=False)
        return State(mode, backing, Gate.NOTHING, since, self._rules)

    def _ordered(self) -> Tuple[ActiveRule, ...]:
        return (*self._first, *self._rules, *self._last)

    def _adopt(self, state: State) -> None:
        if state.backing is not None:
            self._latest = state.backing
        if state.mode is Mode.PROXY:
            self._proxy = state.backing

    def _enter(self, state: State) -> None:
        # In this order: nothing that is held under the new state may look like one of a former state.
        self._held.enter(state)
        self._server.state = state

    def _keep_time(self, state: State) -> None:
        if any(active.seconds is not None for active in state.rules):
            self._held.keep_time()

    def change(self, mode: Mode, directory: Optional[int] = None, options: StubOptions = StubOptions()) -> State:
        """Put ``mode`` in force and return the state; takes ``directory`` over. ``options``: for stub mode.

        Every request read afterwards is treated under it, and nothing read under the former one is under way.
        StubfsError ESRCH for an exempt process that is not there.
        """
        with self._changing:
            old = self._server.state
            if old.mode is mode and not (mode is Mode.PROXY and directory is not None) and options == self._options:
                return old
            before = (self._options, self._first, self._last)
            try:
                self._options, self._first, self._last = options, options.first(), options.last()
                new = self._make(mode, directory, old.since if old.mode is mode is Mode.STUB else time.time())
                drained = self._put_in_force(old, new)
            except BaseException:
                self._options, self._first, self._last = before
                if directory is not None:
                    os.close(directory)
                raise
            former = self._proxy
            self._adopt(new)
            if new.mode is Mode.PROXY and former is not None and drained:
                former.close()
            _log.info("mode %s, generation %d", mode.value, self.generation)
            return new

    def set_rules(self, rules: Sequence[Rule]) -> State:
        """Put ``rules`` in force in place of those of the last call, in this mode and those to come.

        Requests that wait are looked at anew. What is under way is not waited for. StubfsError ESRCH for a process
        that is not there.
        """
        with self._changing:
            old, before = self._server.state, self._rules
            self._rules = activate(rules)
            try:
                new = replace(old, rules=self._ordered())
                self._put_in_force(old, new)
            except BaseException:
                self._rules = before
                raise
            _log.info("%d rules", len(rules))
            return new

    def cover(self, covered: Optional[ActiveRule]) -> None:
        """Put a rule in force before all others, in place of one of before (None: none), until the next change."""
        with self._changing:
            old = self._server.state
            rules = self._ordered()
            self._put_in_force(old, replace(old, rules=rules if covered is None else (covered, *rules)))

    def _put_in_force(self, old: State, new: State) -> bool:
        """False: something read under the old state is still under way."""
        self._keep_time(new)
        drained = True
        # A rule for reads is to see them: the kernel's pages would keep them from us.
        leaves = new.backing is not old.backing or any(rule.may_concern_caches() for rule in new.rules)
        try:
            if leaves and (old.backing is not None or new.backing is not None):
                drained = self._leave(old, new)
        except BaseException:
            # No thread for the invalidation, no memory: as before, or reads would be held for good.
            self._enter(old)
            self._held.reconsider()
            raise
        self._enter(new)
        if new.backing is not old.backing:
            # What did not end within the first wait is no reason for a second one.
            drained = self._drain(new, _DRAIN_LIMIT if drained else 0.0)
        if old.backing is None and new.backing is not None:
            self._server.refresh_attributes()
        if new.backing is not None or old.rules or new.rules:  # else stub mode goes on to hold all that is held
            self._held.reconsider()
        return drained

    def _leave(self, old: State, new: State) -> bool:
        # Reads and writes wait from now on: what they would bring into the page cache could not be told from what
        # the invalidation has passed already. Everything else goes on, the pages written back above all.
        if old.backing is not None:
            closing = replace(old, gate=Gate.DATA)
        else:
            closing = replace(old, rules=())  # who was exempt waits, too
        self._enter(closing)
        drained = self._drain(closing, _DRAIN_LIMIT)
        # In stub mode only who was exempt can have filled the cache; what waits is of the new state.
        self._server.drop_caches(closing if old.backing is not None else new)
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
