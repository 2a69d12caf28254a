"""Moves what processes hold on one mount to another one, while they stand still for some milliseconds.

The process part of a replacement, and all of a switch between two mounts. Order: ``prepare`` (nothing stands still,
nothing is changed), then ``execute``: freeze, seize, thaw, compare, have the mounts switched, operate, detach; again
for references that came meanwhile, until there are none.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import logging
import os
import resource
import threading
import time
from dataclasses import dataclass, field
from typing import Callable, Collection, Container, Dict, List, Optional, Tuple, TypeVar, Union

from spfs.errors import MissingFeatureError, SpfsError, reason
from spfs.freezer import Freezer
from spfs.linux import arch
from spfs.linux import process as syscalls
from spfs.linux import procfs
from spfs.linux.arch import Architecture
from spfs.linux.process import KCMP_FILES, KCMP_FS, KCMP_VM
from spfs.references import LeftReference, MountRoot, Resolver
from spfs.surgery import fifos, locks, report, scheduler, sockets
from spfs.surgery.compare import Comparison, memory_is_same, take_offsets_over
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.examine import OUT_OF_REACH, Examiner, FdTable, FsContext, Memory, Process, shared
from spfs.surgery.gadget import GadgetFinder
from spfs.surgery.operation import BASE_STEP, FIRST_BASE, Operation
from spfs.surgery.theatre import CANNOT_STOP, Theatre, in_group_stop, in_own_thread, task_state
from spfs.tracee import Script, Tracee

R = TypeVar("R", FdTable, FsContext, Memory)
_log = logging.getLogger(__name__)
Progress = Callable[[str, Dict[str, object]], None]

FREEZE_TIMEOUT = 5.0  # seconds
STOP_TIMEOUT = 2.0  # seconds until every seized task must stand still
STEP_TIMEOUT = 5.0  # seconds without any progress in a process that is operated on
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
    """What ``execute`` did. ``blackout``: seconds from the freeze to the last detach, of all rounds together."""

    processes: Dict[int, str]
    moved: Dict[str, int]
    left: List[LeftReference]
    blackout: float
    stages: Dict[str, float] = field(default_factory=dict)  # seconds
    rounds: int = 1

    def data(self) -> Dict[str, object]:
        """For JSON."""
        return {
            "blackout": self.blackout,
            "stages": self.stages,
            "rounds": self.rounds,
            "processes": [{"pid": pid, "command": command} for pid, command in self.processes.items()],
            "moved": self.moved,
            "left": [dataclasses.asdict(one) for one in self.left],
        }


def _no_progress(stage: str, details: Dict[str, object]) -> None:
    pass


class Switch:
    """One switch of the processes from the mount of ``device`` (st_dev). Used once; ``close`` releases everything.

    ``resolver`` knows the paths behind the device's inode numbers, ``roots`` the new mount for an old mount's id
    (LookupError: none). ``exclude``: processes never to be touched, the file system's own among them. ``late``: ids of
    old mounts whose root is another one after the mounts were switched; looked at then, so it may be filled by that.
    """

    def __init__(
        self,
        device: int,
        resolver: Resolver,
        roots: Callable[[int], MountRoot],
        freezer: Freezer,
        *,
        strict: bool = False,
        exclude: Container[int] = (),
        late: Collection[int] = (),
        freeze_timeout: float = FREEZE_TIMEOUT,
        progress: Progress = _no_progress,
    ) -> None:
        architecture = arch.current()
        if architecture is None:
            raise MissingFeatureError(f"cannot operate on processes: no code for {os.uname().machine}")
        self._architecture: Architecture = architecture
        self._device = device
        self._freezer = freezer
        self._strict = strict
        self._exclude = exclude
        self._late = late
        self._freeze_timeout = freeze_timeout
        self._progress = progress
        self._examiner = Examiner(device)
        self._gadgets = GadgetFinder(device, architecture)
        self._counterparts = Counterparts(resolver, roots)
        self._processes: Dict[int, Process] = {}
        self._moved: Dict[str, int] = {}
        self._reasons: Dict[Tuple[int, int, str], str] = {}
        self._locks: Dict[int, List[bytes]] = {}
        self._stages: Dict[str, float] = {}
        self._blackout = 0.0

    def __enter__(self) -> "Switch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for process in self._processes.values():
            process.close()
        self._processes.clear()
        self._examiner.close()
        self._counterparts.close()

    # -- ahead of time

    def prepare(self) -> Preparation:
        """Find the users and open the counterparts of what they hold; causes no request to the file system.

        SpfsError with ``strict`` if anything could not be moved.
        """
        self._find()
        left = report.left(self._processes.values())
        self._refuse(left)
        users = [process for process in self._processes.values() if process.uses_mount]
        return Preparation(
            {process.pid: process.command for process in users}, report.references(users), left
        )

    def _users(self) -> Dict[int, str]:
        """By pid, the commands of those that hold something of the mount."""
        return {process.pid: process.command for process in self._processes.values() if process.uses_mount}

    def _find(self) -> None:
        """Examine every process; keep those that use the mount and those of the freezer."""
        _raise_descriptor_limit()
        self._locks = locks.held(self._device)  # before the processes: a lock that comes now is noticed either way
        frozen = set(self._freezer.pids())
        pids = sorted(frozen | set(procfs.processes()))
        self._examiner.sockets = sockets.bound_on(self._device, pids)
        for pid in pids:
            if pid == os.getpid() or pid in self._exclude or pid in self._processes:
                continue
            try:
                process = self._examiner.process(pid)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    hint = "raise RLIMIT_NOFILE of the one who moves: two descriptors per open file"
                    raise SpfsError(f"cannot examine process {pid}: {reason(error)}", hint, error.errno) from error
                if error.errno not in (errno.EPERM, errno.EACCES):
                    raise
                # More privileged than we are, as the first process of a container's host can be.
                _log.debug("process %d cannot be examined: %s", pid, error)
                continue
            if process is None:
                continue
            if process.uses_mount or pid in frozen:
                self._processes[pid] = process
            else:
                process.close()
        self._counterparts.provide(self._processes.values())
        self._judge()

    def _judge(self) -> None:
        locks.judge(self._processes.values())
        fifos.judge(self._processes.values())

    def _refuse(self, left: List[LeftReference]) -> None:
        if self._strict and left:
            first = left[0]
            what = f"{first.what} ({first.path or 'no name'}) of process {first.pid} ({first.command})"
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise SpfsError(f"cannot move {what}{more}: {first.reason}", "without strict they stay on the old mount")

    # -- the blackout

    def execute(self, when_stopped: Callable[[], None]) -> SwitchReport:
        """Stop the processes, call ``when_stopped`` (the mounts are switched), move everything, let them go.

        Whatever fails, nothing stays frozen or stopped. SpfsError: the freezer's, or with ``strict`` for what came
        since ``prepare``; what ``when_stopped`` raises passes through; in these cases nothing was moved.
        """
        everybody: Dict[int, str] = {}
        for number in range(1, ROUNDS + 1):
            everybody.update(self._users())
            action = when_stopped if number == 1 else _nothing
            # A thread per round: when it ends, the kernel lets go of tasks that could not be stopped.
            in_own_thread(lambda cancelled: self._round(action, cancelled))
            everybody.update(self._users())  # with those that came to the cgroup since then
            stuck = self._account()
            if number == ROUNDS:
                break
            if not self._find_again() and not self._came_loose(stuck):
                break
        left = self._left()
        return SwitchReport(everybody, dict(self._moved), left, self._blackout, dict(self._stages), number)

    def _round(self, when_stopped: Callable[[], None], cancelled: threading.Event) -> None:
        processes = list(self._processes.values())
        comparison = Comparison(processes, self._device, self._locks)
        operations = self._plan(processes)
        bell = scheduler.Bell()
        theatre = Theatre(bell)
        # Reading /proc/locks waits for an RCU grace period (locks_start: percpu_down_write), but not again right after
        # that. So once now, for nothing, to have the comparison's look in a twentieth of a millisecond.
        locks.held(self._device)
        collecting = _stop_collecting()
        begin = time.perf_counter()
        try:
            self._stop(theatre)
            self._stage("stop", begin)
            stale = self._compare(theatre, comparison)
            if stale:
                operations = self._examine_again(theatre, stale, comparison, operations)
            self._judge()
            if self._strict:
                self._refuse(report.left(self._processes.values()))
            if cancelled.is_set():
                raise SpfsError("cannot move the processes: told to give up")
            self._timed("mounts", when_stopped)
            self._timed("open again", self._open_again)
            self._timed("fifos", lambda: fifos.transfer(self._processes.values()))
            self._timed("locks", lambda: locks.transfer(self._processes.values()))
            self._timed("operate", lambda: self._operate(theatre, operations, bell))
        finally:
            detaching = time.perf_counter()
            theatre.release()
            self._freezer.restore()
            end = time.perf_counter()
            self._stages["detach"] = self._stages.get("detach", 0.0) + end - detaching
            self._blackout += end - begin
            bell.close()
            if collecting:
                gc.enable()

    def _open_again(self) -> None:
        if not self._late:
            return
        for failure in self._counterparts.open_again(self._processes.values(), self._late):
            _log.warning("its counterpart stays on a mount that is on no path: %s", failure)

    def _stage(self, name: str, begin: float) -> None:
        self._stages[name] = self._stages.get(name, 0.0) + time.perf_counter() - begin

    def _timed(self, name: str, action: Callable[[], None]) -> None:
        begin = time.perf_counter()
        action()
        self._stage(name, begin)

    def _stop(self, theatre: Theatre) -> None:
        """Freeze, seize and interrupt all, thaw: a frozen task cannot run what is injected."""
        freezing = self._freezer.path is not None
        # PTRACE_SEIZE of a task in group-stop waits, without limit, for the task to notice: which in a frozen cgroup
        # (v1) it does not. Those are left out below; should one be missed, the thaw lets the wait end.
        watchdog = threading.Timer(self._freeze_timeout + STOP_TIMEOUT, self._freezer.thaw)
        if freezing:
            watchdog.start()
        try:
            if freezing:
                self._freezer.freeze(self._freeze_timeout)
            pids = list(self._processes)
            pids += [pid for pid in self._freezer.pids() if pid not in self._processes and pid not in self._exclude]
            for pid in pids:
                if not (freezing and in_group_stop(pid)):
                    theatre.seize(pid)
        finally:
            self._freezer.thaw()
            if freezing:
                watchdog.cancel()
                watchdog.join()
        theatre.wait(STOP_TIMEOUT)
        # Without a freezer, tasks can be made until the last one stands still.
        while any([theatre.seize(pid) for pid in pids]):
            theatre.wait(STOP_TIMEOUT)

    def _compare(self, theatre: Theatre, comparison: Comparison) -> List[int]:
        """The pids whose references are no longer, or not at all, those that were examined."""
        begin = time.perf_counter()
        stale = {process.pid for process in comparison.stale()}
        for process in self._processes.values():
            memory = process.memory
            if not theatre.is_stopped(process.pid):
                process.problem = theatre.problems.get(process.pid, "the process ended")
                continue
            if process.traced:
                process.traced, process.problem = False, None  # not any more
            try:
                maps = procfs.read(f"/proc/{memory.tid}/maps") if memory else b""
            except (FileNotFoundError, ProcessLookupError):
                maps = b""
            if memory is not None:
                memory.maps = maps
            if not memory_is_same(process, maps, self._device):
                stale.add(process.pid)
        stale.update(pid for pid in self._freezer.pids() if pid not in self._processes and theatre.is_stopped(pid))
        self._stage("compare", begin)
        return sorted(stale)

    def _examine_again(
        self, theatre: Theatre, pids: List[int], comparison: Comparison, operations: List[Operation]
    ) -> List[Operation]:
        begin = time.perf_counter()
        pids = self._with_sharers(pids)
        fresh: List[Process] = []
        for pid in pids:
            process = self._processes.get(pid)
            if process is None or not self._examiner.refresh(process, comparison.locked):
                process = self._examine_anew(theatre, pid)
            if process is not None:
                fresh.append(process)
        self._counterparts.provide(fresh)
        take_offsets_over(fresh)
        plan = [operation for operation in operations if operation.process.pid not in pids]
        plan += self._plan(fresh, len(operations))
        self._stage("examine again", begin)
        return plan

    def _examine_anew(self, theatre: Theatre, pid: int) -> Optional[Process]:
        process = self._examiner.process(pid)
        former = self._processes.pop(pid, None)
        if former is not None:
            former.close()
        if process is not None:
            if process.traced:
                process.problem = theatre.problems.get(pid)  # by us, if there is none
            self._processes[pid] = process
        return process

    def _with_sharers(self, pids: List[int]) -> List[int]:
        """With those that one of them acts for, or that act for one of them."""
        wanted = set(pids)
        grown = True
        while grown:
            grown = False
            of = {id(record): p.pid for p in self._processes.values() for record in _shareable(p)}
            for process in self._processes.values():
                owners = {of[id(record.owner)] for record in _shareable(process) if record.owner is not None}
                for one, other in ((process.pid, owner) for owner in owners):
                    if (one in wanted) != (other in wanted):
                        wanted |= {one, other}
                        grown = True
        return sorted(wanted)

    def _plan(self, processes: List[Process], first: int = 0) -> List[Operation]:
        """One operation for each task that must act, encoded for scratch memory at an address of its own."""
        _find_owners(processes)
        plan: Dict[int, Operation] = {}

        def operation(process: Process, tid: int) -> Operation:
            if tid not in plan:
                base = FIRST_BASE + (first + len(plan)) * BASE_STEP
                plan[tid] = Operation(process, tid, base)
            return plan[tid]

        for process in processes:
            for table in process.tables:
                if table.held and table.owner is None:
                    operation(process, table.tid).table = table
            for context in process.contexts:
                if (context.cwd or context.root) and context.owner is None:
                    operation(process, context.tid).context = context
            memory = process.memory
            if memory is not None and (memory.regions or memory.exe) and memory.owner is None:
                operation(process, memory.tid).memory = memory
        for planned in plan.values():
            planned.prepare(self._gadgets)
        return list(plan.values())

    def _operate(self, theatre: Theatre, operations: List[Operation], bell: scheduler.Bell) -> None:
        tracees: Dict[Tracee, Operation] = {}
        scripts: Dict[Tracee, Script] = {}
        for operation in operations:
            process = operation.process
            if process.problem is not None:
                continue
            if operation.tid not in theatre.stops:
                process.problem = theatre.problems.get(process.pid, "the process ended")
                continue
            sandboxed = process.status.seccomp != 0
            if sandboxed and not theatre.seccomp_suspended:
                process.problem = "its seccomp filter cannot be suspended (the one who replaces is under seccomp too)"
                continue
            pidfd = process.pidfd
            of_its_own = operation.tid in {table.tid for table in process.tables} or process.pid not in process.tids
            if operation.tid != process.pid and of_its_own:
                try:
                    pidfd = syscalls.pidfd_open(operation.tid, leader=False)
                except OSError as error:
                    operation.refuse(OUT_OF_REACH if error.errno == errno.EINVAL else reason(error))
                    continue
            tracee = Tracee(operation.tid, process.pid, pidfd, self._architecture, sandboxed)
            tracees[tracee] = operation
            scripts[tracee] = operation.script(tracee, self._gadgets)

        recover: Dict[Tracee, Script] = {}

        def failed(tracee: Tracee, error: OSError) -> None:
            process = tracees[tracee].process
            if error.errno == errno.ESRCH:
                process.problem = "the process ended"
                return
            process.problem = f"the process cannot be operated on: {reason(error)}"
            recover[tracee] = tracee.close()

        def lost(tracee: Tracee, error: OSError) -> None:
            tracees[tracee].process.problem = f"the process could not be put back: {reason(error)}"

        try:
            scheduler.run(scripts, bell, STEP_TIMEOUT, failed)
            scheduler.run(recover, bell, STEP_TIMEOUT, lost)
            for tracee in tracees:
                tracee.repeat_swallowed()
        finally:
            for tracee in tracees:
                tracee.release()
                if tracee.pidfd != tracees[tracee].process.pidfd:
                    os.close(tracee.pidfd)

    # -- and again

    def _account(self) -> List[Tuple[int, int]]:
        """Count what was moved, remember why the rest was not, and let go of both sides; (pid, start) of the
        processes that could not be stopped."""
        stuck: List[Tuple[int, int]] = []
        for process in self._processes.values():
            if process.problem is not None and CANNOT_STOP in process.problem:
                stuck.append((process.pid, process.start))
            for kind, what in report.moved(process):
                self._moved[kind] = self._moved.get(kind, 0) + 1
            for kind, what, _, problem in report.entries(process):
                why = process.problem or problem
                if why is not None:
                    self._reasons[process.pid, process.start, what] = why
        self.close()
        return stuck

    def _came_loose(self, stuck: List[Tuple[int, int]]) -> bool:
        """Wait a little for processes that could not be stopped: a parent in vfork(2) can be when its child has
        called execve(2). True if one is worth another try."""
        deadline = time.monotonic() + LOOSE_TIMEOUT
        while stuck and time.monotonic() < deadline:
            for pid, start in stuck:
                if task_state(pid) not in ("D", ""):
                    self._reasons = {key: why for key, why in self._reasons.items() if key[:2] != (pid, start)}
                    return True
            time.sleep(0.005)  # the kernel tells nobody
        return False

    def _find_again(self) -> bool:
        """Examine everything anew; True if something is found that was not tried yet."""
        self._find()
        again = False
        for process in self._processes.values():
            for _, what, _, problem in report.entries(process):
                if problem is None and process.problem is None:
                    if (process.pid, process.start, what) not in self._reasons:
                        again = True
        return again

    def _left(self) -> List[LeftReference]:
        left: List[LeftReference] = []
        for process in self._processes.values():
            for kind, what, path, problem in report.entries(process):
                known = self._reasons.get((process.pid, process.start, what))
                # What was met when it was tried says more than what is seen from outside.
                why = known or process.problem or problem or "it came while the processes were moved"
                left.append(LeftReference(process.pid, process.command, kind, what, path, why))
        return left


def _find_owners(processes: List[Process]) -> None:
    """Where tables, directories or memory are shared between processes (clone(2)), let one act for all."""
    for process in processes:
        for record in _shareable(process):
            record.owner = None
    tables = [table for process in processes for table in process.tables if table.held]
    contexts = [c for process in processes for c in process.contexts if c.cwd or c.root]
    memories = [p.memory for p in processes if p.memory is not None and (p.memory.lines or p.memory.exe)]
    for tid, first in shared([table.tid for table in tables], KCMP_FILES).items():
        _by_tid(tables, tid).owner = _by_tid(tables, first)
    for tid, first in shared([context.tid for context in contexts], KCMP_FS).items():
        _by_tid(contexts, tid).owner = _by_tid(contexts, first)
    for tid, first in shared([memory.tid for memory in memories], KCMP_VM).items():
        _by_tid(memories, tid).owner = _by_tid(memories, first)


def _shareable(process: Process) -> List[Union[FdTable, FsContext, Memory]]:
    return [*process.tables, *process.contexts, *([process.memory] if process.memory else [])]


def _by_tid(records: List[R], tid: int) -> R:
    return next(record for record in records if record.tid == tid)


def _nothing() -> None:
    pass


def _stop_collecting() -> bool:
    """No garbage collection from here on: it would lengthen the blackout. Whether there was any before."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    return enabled


def _raise_descriptor_limit() -> None:
    """Copies and counterparts of everything are open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
