"""Which task does what, and that it is done: the operations of all processes, planned ahead, run at once."""

from __future__ import annotations

import errno
import logging
import os
import signal
from typing import Dict, Iterable, List, Optional, Protocol, Sequence, TypeVar

from spfs.errors import reason
from spfs.linux import process as syscalls
from spfs.linux import ptrace
from spfs.linux.arch import Architecture
from spfs.linux.process import KCMP_FILES, KCMP_FS, KCMP_VM
from spfs.surgery import scheduler
from spfs.surgery.census import shareable
from spfs.surgery.descriptors import OUT_OF_REACH
from spfs.surgery.examine import shared
from spfs.surgery.gadget import GadgetFinder
from spfs.surgery.kinds.registry import Kinds
from spfs.surgery.operation import Operation, movable
from spfs.surgery.records import FdTable, FsContext, Memory, Process
from spfs.surgery.scheduler import Bell
from spfs.surgery.scratch import BASE_STEP, FIRST_BASE
from spfs.surgery.theatre import Theatre
from spfs.tracee import Script, Tracee

R = TypeVar("R", FdTable, FsContext, Memory)

_log = logging.getLogger(__name__)

STEP_TIMEOUT = 5.0  # seconds without any progress in a process that is operated on


class Work(Protocol):
    """What one task is made to do: an ``Operation``, or an errand. ``refuse``: none of it can be done, and why.
    ``take_stock``: note what has been done when ``script`` has failed and the task stands still again."""

    process: Process
    tid: int
    requests: ptrace.Requests

    def refuse(self, why: str) -> None:
        ...

    def script(self, tracee: Tracee, gadgets: GadgetFinder) -> Script:
        ...

    def take_stock(self, tracee: Tracee) -> None:
        ...


def plan(processes: Iterable[Process], kinds: Kinds, gadgets: GadgetFinder, first: int = 0) -> List[Operation]:
    """One operation for each task that must act, encoded for scratch memory at an address of its own."""
    processes = list(processes)
    _find_owners(processes)
    planned: Dict[int, Operation] = {}

    def operation(process: Process, tid: int) -> Operation:
        if tid not in planned:
            base = FIRST_BASE + (first + len(planned)) * BASE_STEP
            planned[tid] = Operation(process, tid, base, kinds)
        return planned[tid]

    for process in processes:
        for table in process.tables:
            if table.owner is None and _has_movable(table):
                operation(process, table.tid).table = table
        for context in process.contexts:
            if context.owner is None and any(one and movable(one) for one in (context.cwd, context.root)):
                operation(process, context.tid).context = context
        memory = process.memory
        if memory is not None and memory.owner is None and _any_movable(memory):
            operation(process, memory.tid).memory = memory
    for one in planned.values():
        one.prepare(gadgets)
    return list(planned.values())


def rule_out(theatre: Theatre, processes: Iterable[Process]) -> None:
    """Those that stand still, but cannot be made to call anything. Before it is judged what else must stay then."""
    for process in processes:
        if process.problem is None and theatre.is_stopped(process.pid):
            process.problem = _obstacle(theatre, process)


def _obstacle(theatre: Theatre, process: Process) -> Optional[str]:
    if process.status.seccomp and not theatre.seccomp_suspended:
        return "its seccomp filter cannot be suspended (the one who replaces is under seccomp too)"
    # Who has its calls sent to itself has a handler for what they are sent as.
    if process.status.caught >> (signal.SIGSYS - 1) & 1:
        tasks = {record.tid for record in shareable(process)}
        if any(ptrace.dispatches_calls(tid) for tid in tasks):
            return "its system calls are sent to itself (PR_SET_SYSCALL_USER_DISPATCH), ours would be, too"
    return None


def operate(
    theatre: Theatre, operations: Sequence[Work], gadgets: GadgetFinder, architecture: Architecture, bell: Bell
) -> None:
    """Run all that can be; what failed is noted in the records."""
    tracees: Dict[Tracee, Work] = {}
    scripts: Dict[Tracee, Script] = {}
    for operation in operations:
        process = operation.process
        if process.problem is not None:
            continue
        if operation.tid not in theatre.stops:
            process.problem = theatre.problems.get(process.pid, "the process ended")
            continue
        sandboxed = process.status.seccomp != 0
        pidfd = process.pidfd
        of_its_own = operation.tid in {table.tid for table in process.tables} or process.pid not in process.tids
        if operation.tid != process.pid and of_its_own:
            try:
                pidfd = syscalls.pidfd_open(operation.tid, leader=False)
            except OSError as error:
                operation.refuse(OUT_OF_REACH if error.errno == errno.EINVAL else reason(error))
                continue
        caught = process.status.caught
        tracee = Tracee(operation.tid, process.pid, pidfd, architecture, operation.requests, sandboxed, caught)
        tracees[tracee] = operation
        scripts[tracee] = operation.script(tracee, gadgets)

    recover: Dict[Tracee, Script] = {}

    def failed(tracee: Tracee, error: OSError) -> None:
        process = tracees[tracee].process
        if error.errno == errno.ESRCH:
            process.problem = "the process ended"
            return
        process.problem = f"the process cannot be operated on: {reason(error)}"
        # Said here, too: what was done before it failed may be all, so that nothing is left to be reported.
        _log.warning("process %d (%s): %s", process.pid, process.command, process.problem)
        recover[tracee] = tracee.abandon(tracees[tracee].take_stock)

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


def _find_owners(processes: List[Process]) -> None:
    """Where tables, directories or memory are shared between processes (clone(2)), let one act for all."""
    for process in processes:
        for record in shareable(process):
            record.owner = None
    tables = [table for process in processes for table in process.tables if table.held or table.exchangeable]
    contexts = [c for process in processes for c in process.contexts if c.cwd or c.root]
    memories = [p.memory for p in processes if p.memory is not None and (p.memory.lines or p.memory.exe)]
    for tid, first in shared([table.tid for table in tables], KCMP_FILES).items():
        _by_tid(tables, tid).owner = _by_tid(tables, first)
    for tid, first in shared([context.tid for context in contexts], KCMP_FS).items():
        _by_tid(contexts, tid).owner = _by_tid(contexts, first)
    for tid, first in shared([memory.tid for memory in memories], KCMP_VM).items():
        _by_tid(memories, tid).owner = _by_tid(memories, first)


def _has_movable(table: FdTable) -> bool:
    return any(map(movable, table.held.values())) or any(map(movable, table.exchangeable))


def _any_movable(memory: Memory) -> bool:
    return any(map(movable, memory.regions)) or (memory.exe is not None and movable(memory.exe))


def _by_tid(records: List[R], tid: int) -> R:
    return next(record for record in records if record.tid == tid)
