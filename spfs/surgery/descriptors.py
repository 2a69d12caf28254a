"""Finds what descriptor tables hold of a device: descriptions of its files, and what other descriptors hold of it.

Descriptions that several descriptors share, in one process or many, are one record, told by kcmp(2).
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from contextlib import contextmanager
from typing import Callable, Container, Dict, Iterator, List, Tuple, TypeVar

from spfs.linux import process, procfs, statx
from spfs.linux.calls import CallTable, run_local
from spfs.surgery.bulk import objects
from spfs.surgery.kinds.base import Found
from spfs.surgery.kinds.registry import Kinds
from spfs.surgery.records import Description, FdTable, Process, kind_of

OUT_OF_REACH = "a thread has it in a table of its own, which cannot be reached before Linux 6.9"

T = TypeVar("T")


class Descriptors:
    """Owns the copies of all descriptions, of the device and of what holds something of it; ``close`` closes them."""

    def __init__(self, device: int, kinds: Kinds) -> None:
        self._device = device
        self._kinds = kinds
        self._descriptions: Dict[Tuple[int, int], List[Description]] = {}
        self._copies: Dict[Tuple[int, int], List[int]] = {}

    def close(self) -> None:
        for candidates in self._descriptions.values():
            for description in candidates:
                description.close()
        self._descriptions.clear()
        self._close_copies()

    def forget(self) -> None:
        """Let go of all descriptions but those that were moved: who else turns up with one of them gets the same
        counterpart, which stays shared."""
        for candidates in self._descriptions.values():
            for description in candidates:
                if not description.moved:
                    description.close()
            candidates[:] = [description for description in candidates if description.moved]
        self._close_copies()

    def _close_copies(self) -> None:
        for copies in self._copies.values():
            for copy in copies:
                os.close(copy)
        self._copies.clear()

    def table(self, record: Process, tid: int) -> FdTable:
        numbers = [int(name) for name in os.listdir(f"/proc/{tid}/fd")]
        soft, hard = procfs.parse_descriptor_limits(procfs.read(f"/proc/{tid}/limits"))
        table = FdTable(tid, set(numbers), limit=soft, hard_limit=hard)
        with _pidfd_of(record, tid) as pidfd:
            for number, found in zip(numbers, objects([f"/proc/{tid}/fd/{number}" for number in numbers])):
                if found is not None:
                    self._examine(table, pidfd, number, found)
        return table

    def refresh(self, record: Process, table: FdTable, locked: Container[int]) -> None:
        """What is still held keeps its description. ``locked``: inode numbers whose locks have changed."""
        fresh = {int(name) for name in os.listdir(f"/proc/{table.tid}/fd")}
        calls, me = CallTable(), os.getpid()
        for number, description in table.held.items():
            calls.add("kcmp", table.tid, me, process.KCMP_FILE, number, description.copy)
        same = [number for number, result in zip(table.held, run_local(calls)) if result == 0]
        kept = {number: table.held[number] for number in same if table.held[number].object.inode not in locked}
        table.numbers, table.held = fresh, dict(kept)
        table.locks = [(number, lock) for number, lock in table.locks if number in kept]
        # Watches and registrations do not show in the descriptor: these are read again.
        table.close()
        table.holdings, table.epolls = [], {}
        others = sorted(fresh - kept.keys())
        with _pidfd_of(record, table.tid) as pidfd:
            for number, found in zip(others, objects([f"/proc/{table.tid}/fd/{number}" for number in others])):
                if found is not None:
                    self._examine(table, pidfd, number, found)

    def _examine(self, table: FdTable, pidfd: int, number: int, found: statx.Object) -> None:
        try:
            if found.device == self._device:
                info = procfs.parse_fdinfo(procfs.read(f"/proc/{table.tid}/fdinfo/{number}"))
                description = self._description(table.tid, pidfd, number, found, info)
                table.held[number] = description
                self._kinds.note(table, number, description, info)
            elif stat.S_IFMT(found.mode) in (0, stat.S_IFSOCK):  # 0: an anonymous inode, as epoll and inotify have
                self._kinds.look(self._found(table, pidfd, number, found))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBADF):  # closed meanwhile
                raise

    def _found(self, table: FdTable, pidfd: int, number: int, found: statx.Object) -> Found:
        @functools.lru_cache(maxsize=None)
        def info() -> procfs.FdInfo:
            return procfs.parse_fdinfo(procfs.read(f"/proc/{table.tid}/fdinfo/{number}"))

        def copy() -> int:
            candidates = self._copies.setdefault((found.device, found.inode), [])
            place, same = _search(table.tid, number, candidates, int)
            if not same:
                if pidfd < 0:
                    return -1
                candidates.insert(place, process.pidfd_getfd(pidfd, number, 0))
            return candidates[place]

        return Found(table, number, found, info, copy, pidfd)

    def _description(
        self, tid: int, pidfd: int, number: int, found: statx.Object, info: procfs.FdInfo
    ) -> Description:
        candidates = self._descriptions.setdefault((found.inode, found.mount_id), [])
        place, same = _search(tid, number, candidates, lambda candidate: candidate.copy)
        if same:
            if pidfd < 0:  # nor can the other descriptors of it go: they would no longer share the offset
                candidates[place].problem = OUT_OF_REACH
            return candidates[place]
        flags = info.flags & ~os.O_CLOEXEC
        kind = kind_of(found.mode, flags)
        if pidfd < 0:
            return Description(found, flags, kind, info.position, problem=OUT_OF_REACH)
        description = Description(found, flags, kind, info.position, process.pidfd_getfd(pidfd, number, 0))
        candidates.insert(place, description)
        return description


def _search(tid: int, number: int, candidates: List[T], copy: Callable[[T], int]) -> Tuple[int, bool]:
    """Where a descriptor is, or belongs, among candidates in the kernel's order (so that many openings of one file
    cost no n²), and whether it is there."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        order = process.kcmp(tid, os.getpid(), process.KCMP_FILE, number, copy(candidates[middle]))
        if order == 0:
            return middle, True
        low, high = (low, middle) if order == 1 else (middle + 1, high)
    return low, False


@contextmanager
def _pidfd_of(record: Process, tid: int) -> Iterator[int]:
    """A pidfd of the task whose table it is: the process's, or one of its own; -1 if that cannot be had."""
    if tid == record.pid:
        yield record.pidfd
        return
    try:
        pidfd = process.pidfd_open(tid, leader=False)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        yield -1
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)
