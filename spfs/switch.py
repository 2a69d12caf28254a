"""Moves what processes hold on one mount to another one, while they stand still for some milliseconds.

The process part of a replacement, and all of a switch between two mounts. Order: ``prepare`` (nothing stands still,
nothing is changed), then ``execute``: freeze, seize, thaw, compare, have the mounts switched, operate, detach; again
for references that came meanwhile, until there are none. Here is only the order; ``spfs.surgery`` does the steps.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Collection, Container, Dict, Iterator, List, Optional, Sequence

from spfs.blackoutguard import BlackoutGuard
from spfs.errors import MissingFeatureError, SpfsError
from spfs.freezer import Freezer
from spfs.linux import machine
from spfs.linux.arch import Architecture
from spfs.references import HeldReference, LeftReference, MountRoot, Resolver
from spfs.surgery import execution, report, unowned
from spfs.surgery.account import Account, Identity
from spfs.surgery.census import Census
from spfs.surgery.compare import Comparison
from spfs.surgery.errands import Errands
from spfs.surgery.gadget import GadgetFinder
from spfs.surgery.kinds import locks
from spfs.surgery.operation import Operation
from spfs.surgery.scheduler import Bell
from spfs.surgery.selection import Everybody
from spfs.surgery.theatre import Theatre, in_group_stop, in_own_thread, task_state
from spfs.surgery.turns import Turn
from spfs.surgery.waits import Waits

FREEZE_TIMEOUT = 5.0  # seconds
STOP_TIMEOUT = 2.0  # seconds until every seized task must stand still
LOOSE_TIMEOUT = 0.5  # seconds to wait between rounds for who could not be stopped
ROUNDS = 5  # how often new references are looked for


@dataclass(frozen=True)
class Preparation:
    """What ``prepare`` found: processes by pid and command, references by kind, and what will be left."""

    processes: Dict[int, str]
    references: Dict[str, int]
    left: List[LeftReference]


@dataclass(frozen=True)
class SwitchReport:
    """What ``execute`` did. ``blackout``: seconds from the freeze to the last detach, all rounds together; ``began``:
    when the first one did, in seconds of the epoch."""

    processes: Dict[int, str]
    moved: Dict[str, int]
    left: List[LeftReference]
    blackout: float
    stages: Dict[str, float] = field(default_factory=dict)  # seconds
    rounds: int = 1
    began: float = 0.0

    def data(self) -> Dict[str, object]:
        """For JSON."""
        return {
            "blackout": self.blackout,
            "blackout_began": self.began,
            "stages": self.stages,
            "rounds": self.rounds,
            "processes": [{"pid": pid, "command": command} for pid, command in self.processes.items()],
            "moved": self.moved,
            "left": [dataclasses.asdict(one) for one in self.left],
        }


class Refused(SpfsError):
    """With ``strict``: something cannot be moved, so nothing was."""


class Switch:
    """One switch of the processes from the mount of ``device`` (st_dev). Used once; ``close`` releases everything.

    ``resolver`` knows the paths behind the device's inode numbers, ``roots`` the new mount for an old mount's id
    (LookupError: none). ``chosen``: only these processes are moved; ``exclude``: never to be touched, the file system's
    own among them; ``within``: references whose path is elsewhere are none of ours. ``late``: ids of old mounts whose
    root is another one after the mounts were switched; looked at then, so it may be filled by that.
    """

    def __init__(
        self,
        device: int,
        resolver: Resolver,
        roots: Callable[[int], MountRoot],
        freezer: Freezer,
        *,
        strict: bool = False,
        chosen: Container[int] = Everybody(),
        exclude: Container[int] = (),
        within: Callable[[Optional[str]], bool] = lambda path: True,
        late: Collection[int] = (),
        freeze_timeout: float = FREEZE_TIMEOUT,
    ) -> None:
        architecture = machine.current()
        if architecture is None:
            raise MissingFeatureError(
                f"cannot operate on processes: no code for {os.uname().machine}", "x86-64 and aarch64 are known"
            )
        self._architecture: Architecture = architecture
        self._device = device
        self._freezer = freezer
        self._strict = strict
        self._chosen = chosen
        self._turn = Turn()
        try:
            with self._turn.taken():  # another one's freeze is not to be given back as what was found
                self._guard = BlackoutGuard(freezer, [self._turn.fileno()])
        except BaseException:
            self._turn.close()
            raise
        self._exclude = _Excluded(exclude, self._guard.pid)
        self._within = within
        self._unowned: List[LeftReference] = []
        self._late = late
        self._freeze_timeout = freeze_timeout
        self._gadgets = GadgetFinder(device, architecture)
        self._census = Census(device, resolver, roots, freezer, self._exclude, chosen, within, self._turn.taken)
        self._account = Account()
        self._stages: Dict[str, float] = {}
        self._blackout = 0.0
        self._began = 0.0

    def __enter__(self) -> "Switch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._guard.close()
        self._census.close()
        self._turn.close()

    # -- ahead of time

    def prepare(self) -> Preparation:
        """Find the users and open the counterparts of what they hold; causes no request to the file system.

        Refused if anything could not be moved, with ``strict``.
        """
        self._census.find()
        processes = self._census.processes.values()
        if unowned.KERNEL in self._chosen:
            self._unowned = [one for one in unowned.held(self._device) if self._within(one.path)]
        left = [*report.left(processes), *self._unowned]
        self._refuse(left)
        users = [process for process in processes if process.uses_mount]
        return Preparation({process.pid: process.command for process in users}, report.references(users), left)

    def references(self) -> Iterator[HeldReference]:
        """After ``prepare``: all that the processes hold, each with the reason why it would stay, if it would."""
        yield from report.held(self._census.processes.values())
        yield from self._unowned

    def _refuse(self, left: List[LeftReference]) -> None:
        if self._strict and left:
            first = left[0]
            what = f"{first.what} ({first.path or 'no name'}) of process {first.pid} ({first.command})"
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise Refused(f"cannot move {what}{more}: {first.reason}", "without strict they stay on the old mount")

    # -- the blackout

    def execute(self, when_stopped: Callable[[], None]) -> SwitchReport:
        """Stop the processes, call ``when_stopped`` (the mounts are switched), move everything, let them go.

        Whatever fails, nothing stays frozen or stopped. SpfsError: the freezer's; Refused, with ``strict``, for what
        came since ``prepare``; what ``when_stopped`` raises passes through; in these cases nothing was moved.
        """
        census = self._census
        everybody: Dict[int, str] = {}
        for number in range(1, ROUNDS + 1):
            everybody.update(census.users())
            action = when_stopped if number == 1 else _nothing
            # A thread per round: when it ends, the kernel lets go of tasks that could not be stopped.
            in_own_thread(lambda cancelled: self._round(action, cancelled))
            everybody.update(census.users())  # with those that came to the cgroup since then
            stuck = self._account.add(census.processes.values())
            census.forget()
            if number == ROUNDS:
                break
            census.find()
            if not self._account.has_untried(census.processes.values()) and not self._came_loose(stuck):
                break
        left = [*self._account.left(census.processes.values()), *self._unowned]
        return SwitchReport(
            everybody, dict(self._account.moved), left, self._blackout, dict(self._stages), number, self._began
        )

    def _round(self, when_stopped: Callable[[], None], cancelled: threading.Event) -> None:
        census = self._census
        processes = list(census.processes.values())
        census.rehearse()
        with closing(Comparison(processes, self._device, census.locks)) as comparison:
            operations = execution.plan(processes, census.kinds, self._gadgets)
            bell = Bell()
            waits = Waits(self._architecture)
            waits.note([*census.processes, *(pid for pid in self._freezer.pids() if pid not in census.processes)])
            theatre = Theatre(bell, waits)
            with self._turn.taken(cancelled.is_set):
                self._stand_still(theatre, comparison, operations, when_stopped, cancelled)

    def _stand_still(
        self,
        theatre: Theatre,
        comparison: Comparison,
        operations: List[Operation],
        when_stopped: Callable[[], None],
        cancelled: threading.Event,
    ) -> None:
        census = self._census
        collecting = _stop_collecting()
        guarded = ExitStack()
        guarded.enter_context(self._guard.armed())
        locks.held(self._device)  # for nothing but to have it cheap from now on, see locks.Attention
        begin = time.perf_counter()
        self._began = self._began or time.time()
        try:
            attention = guarded.enter_context(locks.Attention(self._device))
            self._stop(theatre)
            theatre.waits.stopped(2 if self._freezer.path is not None else 1)
            self._stage("stop", begin)
            stale = self._compare(theatre, comparison)
            attention.end()
            if stale:
                operations = self._examine_again(theatre, stale, comparison, operations)
            execution.rule_out(theatre, census.processes.values())
            census.judge()
            if self._strict:
                self._refuse(report.left(census.processes.values()))
            if cancelled.is_set():
                raise SpfsError("cannot move the processes: told to give up")
            self._timed("mounts", when_stopped)
            if self._late:
                self._timed("open again", lambda: census.open_again(self._late))
            operate = partial(self._operate, theatre)
            self._timed("transfer", lambda: census.transfer(Errands(operate)))
            self._timed("operate", lambda: operate(operations))
            census.conclude()
        finally:
            detaching = time.perf_counter()
            theatre.release()
            self._freezer.restore()
            guarded.close()
            end = time.perf_counter()
            self._stages["detach"] = self._stages.get("detach", 0.0) + end - detaching
            self._blackout += end - begin
            theatre.bell.close()
            if collecting:
                gc.enable()

    def _operate(self, theatre: Theatre, works: Sequence[execution.Work]) -> None:
        execution.operate(theatre, works, self._gadgets, self._architecture, theatre.bell)

    def _stage(self, name: str, begin: float) -> None:
        self._stages[name] = self._stages.get(name, 0.0) + time.perf_counter() - begin

    def _timed(self, name: str, action: Callable[[], None]) -> None:
        begin = time.perf_counter()
        action()
        self._stage(name, begin)

    def _stop(self, theatre: Theatre) -> None:
        """Freeze, seize and interrupt all, thaw: a frozen task cannot run what is injected."""
        known = self._census.processes
        freezing = self._freezer.path is not None
        # PTRACE_SEIZE of a task in group-stop waits, without limit, for the task to notice: which in a frozen cgroup
        # (v1) it does not. Those are left out below; should one be missed, the thaw lets the wait end.
        watchdog = threading.Timer(self._freeze_timeout + STOP_TIMEOUT, self._freezer.thaw)
        if freezing:
            watchdog.start()
        try:
            if freezing:
                self._freezer.freeze(self._freeze_timeout)
            pids = list(known)
            pids += [pid for pid in self._freezer.pids() if pid not in known and self._is_ours(pid)]
            for pid in pids:
                if not (freezing and in_group_stop(pid)):
                    theatre.seize(pid)
        finally:
            self._freezer.thaw()
            if freezing:
                watchdog.cancel()
                watchdog.join()
        # Without a freezer, tasks and processes can be made until the last one stands still.
        added = True
        while added:
            theatre.wait(STOP_TIMEOUT)
            pids += [pid for pid in self._census.newcomers(theatre.is_stopped) if pid not in pids]
            added = any([theatre.seize_more(pid) for pid in pids])

    def _is_ours(self, pid: int) -> bool:
        return pid in self._chosen and pid not in self._exclude

    def _compare(self, theatre: Theatre, comparison: Comparison) -> List[int]:
        """The pids whose references are no longer, or not at all, those that were examined."""
        begin = time.perf_counter()
        known = self._census.processes
        stale = {process.pid for process in (*comparison.stale(theatre.tasks), *self._census.changed())}
        for process in known.values():
            if not theatre.is_stopped(process.pid):
                process.problem = theatre.problems.get(process.pid, "the process ended")
                continue
            if process.traced:
                process.traced, process.problem = False, None  # not any more
            if not comparison.memory_is_same(process):
                stale.add(process.pid)
        stale.update(pid for pid in theatre.stopped() if pid not in known)
        self._stage("compare", begin)
        return sorted(stale)

    def _examine_again(
        self, theatre: Theatre, pids: List[int], comparison: Comparison, operations: List[Operation]
    ) -> List[Operation]:
        begin = time.perf_counter()
        pids = self._census.with_sharers(pids)
        fresh = self._census.examine_again(theatre, pids, comparison)
        kept = [operation for operation in operations if operation.process.pid not in pids]
        kept += execution.plan(fresh, self._census.kinds, self._gadgets, len(operations))
        self._stage("examine again", begin)
        return kept

    def _came_loose(self, stuck: List[Identity]) -> bool:
        """Wait a little for processes that could not be stopped: a parent in vfork(2) can be when its child has
        called execve(2). True if one is worth another try, or has ended and what stayed for its sake is."""
        deadline = time.monotonic() + LOOSE_TIMEOUT
        while stuck and time.monotonic() < deadline:
            for pid, start in stuck:
                state = task_state(pid)
                if state and state != "D" or not state and self._account.left(self._census.processes.values()):
                    self._account.forget((pid, start))
                    return True
            time.sleep(0.005)  # the kernel tells nobody
        return False


class _Excluded:
    """``others``, and one more."""

    def __init__(self, others: Container[int], pid: int) -> None:
        self._others, self._pid = others, pid

    def __contains__(self, pid: object) -> bool:
        return pid == self._pid or pid in self._others


def _nothing() -> None:
    pass


def _stop_collecting() -> bool:
    """No garbage collection from here on: it would lengthen the blackout. Whether there was any before."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    return enabled
