"""File locks and leases. flock and OFD locks belong to the description, and so does a lease: we take them for the
counterpart. A POSIX lock belongs to the descriptor table (the kernel's files_struct): its own task must take it.

Until it does, the same bytes of the new file are locked for us by an OFD lock of the counterpart, which the task gives
up in the call just before its own: so nobody else can come between, but in the time from one call to the next.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from typing import Container, Dict, Iterable, Iterator, List, Optional, Set, Tuple

from spfs.errors import reason
from spfs.linux import procfs
from spfs.linux.procfs import FdInfo, Lock
from spfs.references import Kind
from spfs.surgery.kinds.base import Handler, Scene
from spfs.surgery.program import Program
from spfs.surgery.records import NOT_CHOSEN, Description, FdTable, Loss, Process

_STAYS = "holds a lock that cannot be moved"
_TAKEN = "its lock cannot be had on the new mount"
_ELSEWHERE = "its file is locked, by a lock that cannot be moved and would hold for nobody there"
_FLOCKS = {"READ": fcntl.LOCK_SH, "WRITE": fcntl.LOCK_EX}
_TYPES = {"READ": fcntl.F_RDLCK, "WRITE": fcntl.F_WRLCK}
_FLOCK = struct.Struct("<hh4xqqi4x")  # struct flock: type, whence, start, length, pid
_F_OFD_SETLK = 37
_ATTENTION = 0.003  # seconds from look to look, a part of a grace period
_F_SETLEASE = 1024


class Locks(Handler):
    """A POSIX lock keeps all descriptors of its file in the table together: closing any of them would drop it
    (fcntl(2)), so that it is taken when all are exchanged."""

    def note(self, table: FdTable, number: int, description: Description, info: FdInfo) -> None:
        description.locks = tuple(lock for lock in info.locks if lock.kind != "POSIX")
        table.locks += [(number, lock) for lock in info.locks if lock.kind == "POSIX"]
        if description.problem is not None and description.problem.startswith(_STAYS):
            description.problem = None

    def judge(self, scene: Scene) -> None:
        for use in scene.uses:
            for lock in use.description.locks if use.description.problem is None else ():
                if not _can_go(lock):
                    use.description.problem = f"{_STAYS} ({' '.join(lock[:3])})"
        for process, table in scene.tables():
            for together in _locked_together(table):
                stays = next((one for one in together if _stays(process, one)), None)
                if stays is not None:
                    why = process.problem or stays.problem or "no counterpart"
                    for one in together:
                        one.problem = one.problem or f"{_STAYS} (POSIX) without another descriptor of its file: {why}"
        staying = {inode: problem for inode, problem in _locked(scene) if problem is not None}
        for one in _others(scene, staying):
            one.problem = f"{_ELSEWHERE}: {staying[one.object.inode]}"

    def transfer(self, scene: Scene) -> None:
        done: Set[int] = set()
        failed: Dict[int, str] = {}  # by inode number
        for use in scene.uses:
            description = use.description
            if description.problem or description.moved or description.new < 0 or id(description) in done:
                continue
            done.add(id(description))
            try:
                for lock in description.locks:
                    _take(description.new, lock)
            except OSError as error:
                failed[description.object.inode] = reason(error)
                _keep([description], f"{_TAKEN}: {reason(error)}")
        for process, table in scene.tables():
            if table.locks and process.problem is None:
                self._reserve(table, failed)
        for one in _others(scene, failed):
            _keep([one], f"{_ELSEWHERE}: {failed[one.object.inode]}")

    @staticmethod
    def _reserve(table: FdTable, failed: Dict[int, str]) -> None:
        for number, lock in table.locks:
            description = table.held.get(number)
            if description is None or description.problem is not None or description.new < 0:
                continue
            try:
                fcntl.fcntl(description.new, _F_OFD_SETLK, _structure(lock))
            except OSError as error:
                failed[description.object.inode] = reason(error)
                together = (some for some in _locked_together(table) if description in some)
                _keep(next(together, [description]), f"{_TAKEN}: {reason(error)}")

    def finish(self, program: Program, table: FdTable) -> None:
        seen: Set[Tuple[int, Lock]] = set()
        for number, lock in table.locks:
            description = table.held.get(number)
            if description is None or number not in program.exchanged or (id(description), lock) in seen:
                continue
            seen.add((id(description), lock))  # of descriptors that share a description, each shows the lock
            self._posix(program, table, number, lock)
            for other in description.locks:
                if other.kind == "OFDLCK":  # giving the reservation up has given up what they have in common
                    program.add("fcntl", number, _F_OFD_SETLK, program.put(_structure(other)))
        for number in program.exchanged:
            description = table.held.get(number)
            for lock in description.locks if description is not None else ():
                if lock.kind == "LEASE":
                    # Once more by the task itself: the signal that tells of a break names its descriptor then.
                    program.add("fcntl", number, _F_SETLEASE, _TYPES[lock.mode])

    @staticmethod
    def _posix(program: Program, table: FdTable, number: int, lock: Lock) -> None:
        def told(result: int) -> None:
            if result < 0:
                what = f"its {lock.mode.lower()} lock of the bytes from {lock.start} was lost"
                why = f"{what}: somebody else took it meanwhile ({os.strerror(-result)})"
                table.losses.append(Loss(Kind.LOCK, number, why))

        free = program.put(_structure(lock._replace(mode="UNLCK")))
        program.add("fcntl", number, _F_OFD_SETLK, free)
        program.expect(program.add("fcntl", number, fcntl.F_SETLK, program.put(_structure(lock))), told)


def _can_go(lock: Lock) -> bool:
    if lock.kind == "LEASE":
        return lock.state == "ACTIVE" and lock.mode in _TYPES
    return lock.kind in ("FLOCK", "OFDLCK") and lock.mode in _TYPES


def _locked(scene: Scene) -> Iterator[Tuple[int, Optional[str]]]:
    """The files that are locked, by inode number, and why what set the lock must stay. A lease is no lock.

    Those of processes that are not to be moved do not count, as all of their files do not.
    """
    for process, table in scene.tables():
        if process.problem == NOT_CHOSEN:
            continue
        posix = {number for number, _ in table.locks}
        for number, one in table.held.items() if posix else ():
            if number in posix:
                yield one.object.inode, process.problem or one.problem
    for use in scene.uses:
        if use.process.problem != NOT_CHOSEN and any(lock.kind != "LEASE" for lock in use.description.locks):
            yield use.description.object.inode, use.problem


def _others(scene: Scene, files: Container[int]) -> Iterator[Description]:
    """Who still is to go of those that have one of ``files`` (inode numbers) open."""
    for _, table in scene.tables() if files else ():
        for one in table.held.values():
            if one.object.inode in files and one.kind is Kind.FILE and one.problem is None and not one.moved:
                yield one


def _locked_together(table: FdTable) -> Iterable[List[Description]]:
    """For each file with POSIX locks, the descriptions that this table has of it."""
    inodes = {table.held[number].object.inode for number, _ in table.locks if number in table.held}
    for inode in inodes:
        yield list({id(one): one for one in table.held.values() if one.object.inode == inode}.values())


def _stays(process: Process, description: Description) -> bool:
    return process.problem is not None or description.problem is not None or description.new < 0


def _take(fd: int, lock: Lock) -> None:
    if lock.kind == "FLOCK":
        fcntl.flock(fd, _FLOCKS[lock.mode] | fcntl.LOCK_NB)
    elif lock.kind == "LEASE":
        fcntl.fcntl(fd, _F_SETLEASE, _TYPES[lock.mode])
    else:
        fcntl.fcntl(fd, _F_OFD_SETLK, _structure(lock))


def _keep(descriptions: Iterable[Description], why: str) -> None:
    """They stay where they are; the counterparts are closed, and so unlocked, at once."""
    for description in descriptions:
        description.problem = description.problem or why
        if description.new >= 0:
            os.close(description.new)
            description.new = -1


def _structure(lock: Lock) -> bytes:
    length = 0 if lock.end is None else lock.end - lock.start + 1
    return _FLOCK.pack(_TYPES.get(lock.mode, fcntl.F_UNLCK), os.SEEK_SET, lock.start, length, 0)


class Attention:
    """Keeps /proc/locks cheap to read while the processes are being stopped, however long that takes.

    Who reads it waits for an RCU grace period, 10 ms or so, but not when it was read within the last one
    (locks_start in fs/locks.c: percpu_down_write; kernel/rcu/sync.c). A lock may be taken until the last process
    stands still, and flock(2) has no way to ask for one: so there must be a look at that file then.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="locks")

    def __enter__(self) -> "Attention":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._thread.join()

    def end(self) -> None:
        """Nothing is to be read any more."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(_ATTENTION):
            held(self._device)


def held(device: int) -> Dict[int, List[bytes]]:
    """The locks on ``device``, by inode number; what is compared later."""
    return procfs.locks_on(procfs.read("/proc/locks"), device)
