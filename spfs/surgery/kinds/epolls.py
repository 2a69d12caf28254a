"""Registrations with epoll instances: they are of a description and a number, and end with the description.

So they are made anew for what takes its place. What is ready then is told once more, edge-triggered or not; no edge
is lost.
"""

from __future__ import annotations

import os
import stat
from typing import Iterable, Iterator, List

from spfs.linux import procfs
from spfs.linux.machine import EPOLL_EVENT
from spfs.surgery.kinds.base import Found, Handler, from_kernel_device
from spfs.surgery.program import Program
from spfs.surgery.records import EpollEntry, FdTable, Process

_EPOLL_ADD, _EPOLL_DEL = 1, 2


class Epolls(Handler):
    def look(self, found: Found) -> None:
        # Also one with nothing in it: a moment later it may have.
        if stat.S_IFMT(found.object.mode) == 0 and _is_epoll(found.table, found.number):
            found.table.epolls[found.number] = list(entries(found.number, found.info().lines))

    def changed(self, process: Process) -> bool:
        return any(
            _read(table) != table.epolls for table in process.tables if table.epolls and _has_pollable(table)
        )

    def before(self, program: Program, table: FdTable, number: int) -> None:
        remove(program, table, number)

    def finish(self, program: Program, table: FdTable) -> None:
        if table.epolls:
            for number in sorted(program.exchanged):
                add_again(program, table, number)


def remove(program: Program, table: FdTable, number: int) -> None:
    for entry in _of(table, number):
        program.add("epoll_ctl", entry.epoll, _EPOLL_DEL, number, 0)


def add_again(program: Program, table: FdTable, number: int) -> None:
    for entry in _of(table, number):
        event = program.put(EPOLL_EVENT.pack(entry.events, entry.data))
        program.add("epoll_ctl", entry.epoll, _EPOLL_ADD, number, event)


def _is_epoll(table: FdTable, number: int) -> bool:
    return os.readlink(f"/proc/{table.tid}/fd/{number}") == "anon_inode:[eventpoll]"


def _has_pollable(table: FdTable) -> bool:
    """Only what is not a regular file or a directory can be registered (epoll_ctl(2))."""
    return any(one.special for one in table.held.values()) or any(one.exchanged for one in table.holdings)


def _read(table: FdTable) -> "dict[int, List[EpollEntry]]":
    """What is registered now with the epoll instances that are known."""
    found = {}
    for number in table.epolls:
        try:
            info = procfs.parse_fdinfo(procfs.read(f"/proc/{table.tid}/fdinfo/{number}"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[number] = list(entries(number, info.lines))
    return found


def _of(table: FdTable, number: int) -> Iterator[EpollEntry]:
    """The registrations of descriptor ``number`` as what it is, not as what it was when a former one had the number."""
    if not table.epolls:
        return
    held = table.held.get(number)
    objects = [held.object] if held is not None else [h.holder for h in table.holdings if h.number == number]
    for registered in table.epolls.values():
        for entry in registered:
            if entry.number == number and (entry.device, entry.inode) in [(o.device, o.inode) for o in objects]:
                yield entry


def entries(epoll: int, lines: Iterable[str]) -> Iterator[EpollEntry]:
    """What fdinfo tells of an epoll instance that has descriptor ``epoll``."""
    for line in lines:
        if not line.startswith("tfd:"):
            continue
        # "tfd: 5 events: 1 data: 5 pos:0 ino:1 sdev:1": the first three have a blank before their value
        words = line.split()
        values = dict(word.split(":", 1) for word in words[6:])
        device = from_kernel_device(int(values["sdev"], 16))
        yield EpollEntry(epoll, int(words[1]), int(words[3], 16), int(words[5], 16), int(values["ino"], 16), device)
