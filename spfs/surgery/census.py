"""The processes that use the mount, with everything they hold and its counterparts; looked at again while they stand.

Owns the records and their descriptors. What is done to the processes is ``spfs.surgery.execution``'s.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Callable, Container, Dict, Iterable, List, Optional, Set, Union

from spfs.errors import SpfsError, reason
from spfs.freezer import Freezer, NoFreezer
from spfs.linux import procfs
from spfs.references import MountRoot, Remains, Resolver
from spfs.surgery import headroom, limits, maps, selection, turns
from spfs.surgery.compare import Comparison, take_offsets_over
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.examine import Examiner
from spfs.surgery.kinds import locks
from spfs.surgery.kinds.registry import Kinds
from spfs.surgery.records import NOT_CHOSEN, FdTable, FsContext, Memory, Process
from spfs.surgery.theatre import Theatre

if TYPE_CHECKING:  # imports this module
    from spfs.surgery.errands import Errands

_log = logging.getLogger(__name__)


class Census:
    """``processes`` by pid: those that use the mount, and those of the freezer.

    ``chosen``: only these are to be moved; ``exclude``: never to be looked at. ``within``: a reference whose path is
    elsewhere (None: it has no name) is none of ours. ``alone``: nobody else's surgery goes on within it.
    """

    def __init__(
        self,
        device: int,
        resolver: Resolver,
        roots: Callable[[int], MountRoot],
        freezer: Freezer,
        exclude: Container[int] = (),
        chosen: Container[int] = selection.Everybody(),
        within: Callable[[Optional[str]], bool] = lambda path: True,
        alone: Callable[[], "AbstractContextManager[None]"] = nullcontext,
    ) -> None:
        self.processes: Dict[int, Process] = {}
        self.locks: Dict[int, List[bytes]] = {}
        self._device = device
        self._freezer = freezer
        self._exclude = exclude
        self._chosen = chosen
        self._within = within
        self._alone = alone
        self._others: List[Process] = []  # users that are not chosen
        self._seen: Set[int] = set()
        self.kinds = Kinds(device)
        self._examiner = Examiner(device, self.kinds)
        self._counterparts = Counterparts(resolver, roots)

    def close(self) -> None:
        """Let go of both sides, the old one and the new one."""
        self._forget_processes()
        self._examiner.close()
        self._counterparts.close()

    def forget(self) -> None:
        """After a round: everything but the descriptions that were moved; ``find`` begins anew."""
        self._forget_processes()
        self._examiner.forget()
        self._counterparts.forget()

    def _forget_processes(self) -> None:
        for process in (*self.processes.values(), *self._others):
            process.close()
        self.processes.clear()
        self._others.clear()
        self._seen.clear()

    def users(self) -> Dict[int, str]:
        """By pid, the commands of those that hold something of the mount."""
        return {process.pid: process.command for process in self.processes.values() if process.uses_mount}

    def find(self) -> None:
        """Examine every process, and open the counterparts of what the users hold."""
        _raise_descriptor_limit()
        frozen = set(self._freezer.pids())
        # Not while counterparts are opened: that may wait for the new file system as long as it likes.
        with self._alone():
            self._look(frozen)
        self._provide(self.processes.values())
        self._leave_out(frozen)
        limits.look(self.processes.values())
        self.judge()
        maps.read_ahead(self.processes.values())

    def _look(self, frozen: Set[int]) -> None:
        self.locks = locks.held(self._device)  # before the processes: a lock that comes now is noticed either way
        pids = sorted(frozen | set(procfs.processes()))
        self.kinds.survey(pids)
        surgeons = turns.others()
        for pid in pids:
            self._seen.add(pid)
            if pid == os.getpid() or pid in self._exclude or pid in surgeons or pid in self.processes:
                continue
            process = self._examined(pid)
            if process is None:
                continue
            if pid in self._chosen and (process.is_concerned or pid in frozen):
                self.processes[pid] = process
            elif process.is_concerned:
                process.problem = NOT_CHOSEN
                self._others.append(process)
            else:
                process.close()

    def newcomers(self, is_stopped: Callable[[int], bool]) -> List[int]:
        """Processes that were forked since ``find`` by those that stand still by now."""
        found = []
        for pid in sorted(set(procfs.processes()) - self._seen):
            if pid in self._exclude:
                continue
            try:
                parent = procfs.parse_stat(procfs.read(f"/proc/{pid}/stat")).parent
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent in self.processes and is_stopped(parent) or parent in found:
                found.append(pid)
        return found

    def _examined(self, pid: int) -> Optional[Process]:
        try:
            return self._examiner.process(pid)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                hint = "raise RLIMIT_NOFILE of the one who moves: two descriptors per open file"
                raise SpfsError(f"cannot examine process {pid}: {reason(error)}", hint, error.errno) from error
            if error.errno not in (errno.EPERM, errno.EACCES):
                raise
            # More privileged than we are, as the first process of a container's host can be.
            _log.debug("process %d cannot be examined: %s", pid, error)
            return None

    def judge(self) -> None:
        """What concerns several references at once: some cannot go if others must stay."""
        limits.look_again(self.processes.values())
        everybody = [*self.processes.values(), *self._others]
        self.kinds.judge(everybody)
        selection.judge(list(self.processes.values()), self._others)
        headroom.apportion(self.processes.values())

    def _provide(self, processes: Iterable[Process]) -> None:
        processes = list(processes)
        self._counterparts.provide(processes)
        self.kinds.provide(self._counterparts, processes)
        for process in processes:
            for record in process.records():
                record.elsewhere = not self._within(record.path)

    def _leave_out(self, frozen: Container[int]) -> None:
        """Whoever has nothing on the part of the mount that is concerned need not be stopped."""
        for pid, process in list(self.processes.items()):
            if pid not in frozen and not process.is_concerned:
                self._others.append(self.processes.pop(pid))

    def rehearse(self) -> None:
        """Just before all are stopped; the file system serves requests by now."""
        self.kinds.rehearse(self.processes.values())

    def changed(self) -> List[Process]:
        """Those that hold something else by now, in ways that ``Comparison`` does not look at."""
        return self.kinds.changed(self.processes.values())

    def transfer(self, errands: "Errands") -> None:
        """What is done before the processes' own part, at most with their help."""
        self.kinds.transfer(errands)

    def conclude(self) -> None:
        """When all has been moved that could be, and nobody runs yet."""
        self.kinds.conclude()

    def examine_again(self, theatre: Theatre, pids: List[int], comparison: Comparison) -> List[Process]:
        """Bring the records of stopped processes up to date; those of ``pids`` that are still there."""
        fresh: List[Process] = []
        for pid in pids:
            process = self.processes.get(pid)
            if process is None or not self._examiner.refresh(process, comparison.locked):
                process = self._examine_anew(theatre, pid)
            if process is not None:
                fresh.append(process)
        self._provide(fresh)
        take_offsets_over(fresh)
        return fresh

    def _examine_anew(self, theatre: Theatre, pid: int) -> Optional[Process]:
        process = self._examiner.process(pid)
        former = self.processes.pop(pid, None)
        if former is not None:
            former.close()
        if process is not None:
            if process.traced:
                process.problem = theatre.problems.get(pid)  # by us, if there is none
            self.processes[pid] = process
        return process

    def with_sharers(self, pids: List[int]) -> List[int]:
        """With those that one of them acts for, or that act for one of them."""
        wanted = set(pids)
        grown = True
        while grown:
            grown = False
            of = {id(record): p.pid for p in self.processes.values() for record in shareable(p)}
            for process in self.processes.values():
                owners = {of[id(record.owner)] for record in shareable(process) if record.owner is not None}
                for one, other in ((process.pid, owner) for owner in owners):
                    if (one in wanted) != (other in wanted):
                        wanted |= {one, other}
                        grown = True
        return sorted(wanted)

    def open_again(self, mounts: Container[int]) -> None:
        """The counterparts of what was on old ``mounts`` (ids) once more: their new roots are others by now."""
        for failure in self._counterparts.open_again(self.processes.values(), mounts):
            _log.warning("its counterpart stays on a mount that is on no path: %s", failure)


class _Nameless:
    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        return dict.fromkeys(nodes)

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        return {}


def users_of(device: int) -> Dict[int, str]:
    """By pid, the commands of those that hold something of ``device``, whose file system may be dead."""
    census = Census(device, _Nameless(), lambda mount_id: MountRoot(-1), NoFreezer())
    try:
        census.find()
        return census.users()
    finally:
        census.close()


def shareable(process: Process) -> List[Union[FdTable, FsContext, Memory]]:
    """What clone(2) can have made several processes share."""
    return [*process.tables, *process.contexts, *([process.memory] if process.memory else [])]


def _raise_descriptor_limit() -> None:
    """Copies and counterparts of everything are open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
