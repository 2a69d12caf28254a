"""Registrations with epoll instances that no process can change: nobody who has the instance has the descriptor that it
was made for, as when that was closed while a duplicate lives (epoll(7), Q6), or by a child of fork(2).

A registration is of a description and a number, in whatever table. So we remove it, and make it anew for what takes the
description's place, by our copies of both; the one of the description is given that number for the moment.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Set, Tuple, Union

from spfs.errors import reason
from spfs.linux import notify, procfs, statx
from spfs.references import Kind
from spfs.surgery.kinds.base import Found, Handler, Scene, Survey
from spfs.surgery.kinds.epolls import entries
from spfs.surgery.records import Description, EpollEntry, FdTable, Holding, Loss, Process

_CLOSED = "the descriptor that it was made for is closed (epoll(7), Q6)"
_OUT_OF_REACH = "who still has the file is out of reach"
_IN_USE = "its number cannot be had"

Identity = Tuple[int, int]
"""Device and inode number."""


@dataclass(eq=False)
class _Candidate:
    """What may be registered. ``stays``: one of its users must; ``users``: the tables that have it, by which number."""

    record: Union[Description, Holding]
    stays: bool = False
    users: List[Tuple[FdTable, int]] = field(default_factory=list)

    @property
    def goes(self) -> bool:
        return not self.stays and self.record.new >= 0 and not self.moved

    @property
    def moved(self) -> bool:
        return any(number in table.moved for table, number in self.users)


@dataclass(eq=False)
class _Orphan:
    """``instance``: our copy; ``users``: the tables that have it, by which number."""

    instance: int
    users: List[Tuple[FdTable, int]]
    entry: EpollEntry
    candidates: List[_Candidate]
    removed: Optional[_Candidate] = None  # which it was

    def report(self, why: str) -> None:
        """It stays."""
        entry = self.entry
        holder = statx.Object(entry.device, entry.inode, 0, 0, 0, 0, 0, 0, 0)
        for table, number in self.users:
            one = Holding(number, Kind.EPOLL, entry.inode, holder, f"for {entry.number}", problem=f"{_CLOSED}: {why}")
            if one.what not in {holding.what for holding in table.holdings}:
                table.holdings.append(one)

    def lose(self, why: str) -> None:
        for table, number in self.users:
            table.losses.append(Loss(Kind.EPOLL, number, f"what was registered for {self.entry.number} is not: {why}"))


class Orphans(Handler):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._copies: Dict[FdTable, Dict[int, int]] = {}  # of the epoll instances, by descriptor; not ours to close
        self._orphans: List[_Orphan] = []
        self._occupied: Set[int] = set()  # numbers of ours, by those who do not run now

    def survey(self, survey: Survey) -> None:
        self._copies.clear()
        self._orphans.clear()
        self._occupied.clear()

    def look(self, found: Found) -> None:
        """Behind ``Epolls``, for what that has noted; also of processes that have nothing of the mount."""
        if stat.S_IFMT(found.object.mode) == 0 and found.table.epolls.get(found.number):
            copy = found.copy()
            if copy >= 0:
                self._copies.setdefault(found.table, {})[found.number] = copy

    def judge(self, scene: Scene) -> None:
        candidates = _candidates(scene)
        instances: Dict[int, List[Tuple[FdTable, int]]] = {}
        for table, copies in self._copies.items():
            for number, copy in copies.items():
                instances.setdefault(copy, []).append((table, number))
        self._orphans = []
        for instance, users in instances.items():
            noted = {(one.device, one.inode, one.number) for table, number in users for one in table.epolls[number]}
            for device, inode, number in noted:
                known = candidates.get((device, inode), [])
                # Of another device, it is something that is not exchanged.
                if not (known or device == self.device) or _is_theirs(number, users, known):
                    continue
                for entry in _entries_now(instance):
                    if (entry.device, entry.inode, entry.number) == (device, inode, number):
                        self._add(_Orphan(instance, users, entry, known))

    def _add(self, orphan: _Orphan) -> None:
        if orphan.candidates:
            self._orphans.append(orphan)
        else:
            orphan.report(_OUT_OF_REACH)

    def rehearse(self, scene: Scene) -> None:
        self._occupied = {orphan.entry.number for orphan in self._orphans if _is_open(orphan.entry.number)}

    def transfer(self, scene: Scene) -> None:
        for orphan in self._orphans:
            try:
                orphan.removed = self._remove(orphan)
            except OSError as error:
                orphan.report(reason(error))

    def conclude(self, scene: Scene) -> None:
        for orphan in self._orphans:
            if orphan.removed is None:
                continue
            record = orphan.removed.record
            try:
                with self._numbered(record.new if orphan.removed.moved else record.copy, orphan.entry.number):
                    notify.register(orphan.instance, orphan.entry.number, orphan.entry.events, orphan.entry.data)
            except OSError as error:
                orphan.lose(reason(error))

    def _remove(self, orphan: _Orphan) -> Optional[_Candidate]:
        """Of what goes; None if it is of something that does not. OSError if it cannot be told, or done."""
        number = orphan.entry.number
        for candidate in orphan.candidates:
            try:
                with self._numbered(candidate.record.copy, number):
                    notify.unregister(orphan.instance, number)
                    if candidate.goes:
                        return candidate
                    notify.register(orphan.instance, number, orphan.entry.events, orphan.entry.data)
                    return None
            except FileNotFoundError:
                continue  # of another one
        raise OSError(errno.ENOENT, _OUT_OF_REACH)

    @contextmanager
    def _numbered(self, fd: int, number: int) -> Iterator[None]:
        """Have ``fd`` by ``number``, too. A descriptor of ours that has it is put aside, if it had it already when all
        were to be stopped: a thread of ours may have taken it since, and be using it."""
        taken = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, number)
        if taken == number:
            try:
                yield
            finally:
                os.close(number)
            return
        os.close(taken)
        if number not in self._occupied:
            raise OSError(errno.EBUSY, _IN_USE)
        if fd == number:
            yield
            return
        aside = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            os.dup2(fd, number, inheritable=False)
            yield
        finally:
            os.dup2(aside, number, inheritable=False)
            os.close(aside)


def _candidates(scene: Scene) -> Dict[Identity, List[_Candidate]]:
    """By what they refer to, all that is to be exchanged and can be registered."""
    found: Dict[int, _Candidate] = {}

    def add(key: int, process: Process, table: FdTable, number: int, record: Union[Description, Holding]) -> None:
        if record.copy >= 0:
            candidate = found.setdefault(key, _Candidate(record))
            candidate.users.append((table, number))
            candidate.stays = candidate.stays or process.problem is not None or record.problem is not None

    for use in scene.uses:
        add(id(use.description), *use)
    for process, table, holding in scene.holdings():
        if holding.exchanged:
            add(-1 - holding.copy, process, table, holding.number, holding)
    by_identity: Dict[Identity, List[_Candidate]] = {}
    for candidate in found.values():
        record = candidate.record
        thing = record.object if isinstance(record, Description) else record.holder
        by_identity.setdefault((thing.device, thing.inode), []).append(candidate)
    return by_identity


def _is_theirs(registered: int, users: List[Tuple[FdTable, int]], candidates: List[_Candidate]) -> bool:
    """Whether somebody who has the instance has the descriptor, too, and so can change the registration."""
    tables = [table for table, _ in users]
    return any(number == registered and table in tables for one in candidates for table, number in one.users)


def _entries_now(instance: int) -> Iterator[EpollEntry]:
    return entries(instance, procfs.parse_fdinfo(procfs.read(f"/proc/self/fdinfo/{instance}")).lines)


def _is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True
