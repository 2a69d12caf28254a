"""Files that are registered with io_uring: registered again, by their owner, once its descriptors are exchanged.

All that the kernel tells of them is their path (fdinfo, UserFiles). So a registered file counts as a description that
the process has when it is the only one of that path; else, and if only the ring has it, it is left and reported.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Optional, Tuple

from spfs.linux import mountinfo, procfs
from spfs.references import Kind
from spfs.surgery.counterparts import Counterparts
from spfs.surgery.kinds.base import Found, Handler, Scene, Survey, Use
from spfs.surgery.program import Program
from spfs.surgery.records import Description, FdTable, Holding, Memory, Process

_ENTRY = re.compile(r" *(\d+): (.*)")
_BUFFER = re.compile(r"^ *\d+: 0x([0-9a-f]+)/(\d+)$", re.MULTILINE)
_REGISTER_FILES_UPDATE = 6
_UPDATE = struct.Struct("<IIQ")  # struct io_uring_rsrc_update: offset, reserved, address of descriptors

_ALONE = "only the ring has it: neither its flags nor its offset can be had"
_WAITS = "an io_uring of its process has it, or has requests under way that may be about it"
_ASYNCHRONOUS = "a request of its process (io_submit(2), IOCB_CMD_POLL) may wait for it, which the kernel tells nobody"
_BUFFERS = "it has a buffer that is registered with an io_uring"
_AMBIGUOUS = "the process has it open more than once, and which one is registered cannot be told"


@dataclass(eq=False)
class RegisteredFile(Holding):
    index: int = 0
    text: str = ""  # the path as fdinfo shows it
    description: Optional[Description] = None
    descriptor: int = -1  # one that refers to ``description``


class Rings(Handler):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._rings: Dict[FdTable, List[int]] = {}

    def survey(self, survey: Survey) -> None:
        self._rings.clear()

    def look(self, found: Found) -> None:
        if stat.S_IFMT(found.object.mode) or not any(line.startswith("UserFiles:") for line in found.info().lines):
            return
        self._rings.setdefault(found.table, []).append(found.number)
        places = _mountpoints(found.table.tid, self.device)
        for index, path in _registered(found.info().lines):
            if any(path == place or path.startswith(place.rstrip("/") + "/") for place in places):
                one = RegisteredFile(found.number, Kind.RING, 0, found.object, f"file {index}")
                one.index, one.text = index, path
                found.table.holdings.append(one)

    def provide(self, counterparts: Counterparts, process: Process) -> None:
        for table in process.tables:
            wanted = [one for one in table.holdings if isinstance(one, RegisteredFile)]
            links = _links(table) if wanted else {}
            for one in wanted:
                numbers = links.get(one.text, [])
                descriptions = {id(table.held[number]) for number in numbers}
                if len(descriptions) == 1:
                    one.descriptor = numbers[0]
                    one.description = table.held[numbers[0]]
                    one.inode, one.path = one.description.object.inode, one.description.path
                else:
                    one.problem = _AMBIGUOUS if descriptions else _ALONE

    def judge(self, scene: Scene) -> None:
        for process, _, holding in scene.holdings():
            if isinstance(holding, RegisteredFile) and holding.problem is None:
                assert holding.description is not None
                holding.problem = process.problem or holding.description.problem
        fifos: Dict[int, List[Use]] = {}
        for use in scene.uses:
            if use.description.kind is Kind.FIFO and use.description.problem is None:
                fifos.setdefault(id(use.table), []).append(use)
        for process, table in scene.tables():
            ends = fifos.get(id(table), [])
            texts = [_text(table, ring) for ring in self._rings.get(table, ())]
            if ends or table.exchangeable:
                _judge_waits(process, table, ends, texts)
            if process.memory is not None:
                _judge_buffers(process.memory, texts)

    def finish(self, program: Program, table: FdTable) -> None:
        for one in table.holdings:
            if isinstance(one, RegisteredFile) and one.problem is None and one.descriptor in program.exchanged:
                fds = program.put(struct.pack("<i", one.descriptor))
                update = program.put(_UPDATE.pack(one.index, 0, fds))
                entry = program.add("io_uring_register", one.number, _REGISTER_FILES_UPDATE, update, 1)
                program.expect(entry, _teller(one))


def _judge_waits(process: Process, table: FdTable, fifos: List[Use], texts: List[str]) -> None:
    """What a request waits for to become ready must not be exchanged beneath it: it would wait for ever, or find the
    end of a fifo that nobody writes to any more."""
    polls = _ASYNCHRONOUS if process.memory is not None and b"/[aio]" in process.memory.maps else None
    for one in table.exchangeable:
        if one.problem is None:
            used = any(_may_use(text, one.holder.inode) for text in texts)
            one.problem = _WAITS if used else polls
    waits = _WAITS if any(map(_has_waiting, texts)) else polls
    for use in fifos:
        use.description.problem = use.description.problem or waits


def _judge_buffers(memory: Memory, texts: List[str]) -> None:
    """The ring has the pages, not the addresses: other pages in their place would be none of its."""
    found = (pair for text in texts for pair in _BUFFER.findall(text))
    buffers = [range(int(start, 16), int(start, 16) + int(size)) for start, size in found]
    for region in memory.regions if buffers else ():
        mapping = region.mapping
        if region.problem is None and any(one.start < mapping.end and mapping.start < one.stop for one in buffers):
            region.problem = _BUFFERS


def _teller(one: RegisteredFile) -> Callable[[int], None]:
    def told(result: int) -> None:
        if result == 1:
            one.moved = True
        else:
            one.problem = f"it cannot be registered again: {os.strerror(-result) if result < 0 else 'refused'}"

    return told


def _registered(lines: Tuple[str, ...]) -> Iterator[Tuple[int, str]]:
    within = False
    for line in lines:
        match = _ENTRY.fullmatch(line) if within else None
        if match is not None and match.group(2) != "<none>":
            yield int(match.group(1)), match.group(2)
        elif match is None:
            within = line.startswith("UserFiles:")


def _text(table: FdTable, ring: int) -> str:
    try:
        return procfs.read(f"/proc/{table.tid}/fdinfo/{ring}").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _may_use(text: str, number: int) -> bool:
    """Whether socket ``number`` is registered, or requests wait for anything: the kernel does not say for what."""
    return f"socket:[{number}]" in text or _has_waiting(text)


def _has_waiting(text: str) -> bool:
    return text.partition("PollList:")[2].lstrip().startswith("op=")


def _links(table: FdTable) -> Dict[str, List[int]]:
    found: Dict[str, List[int]] = {}
    for number in table.held:
        try:
            found.setdefault(os.readlink(f"/proc/{table.tid}/fd/{number}"), []).append(number)
        except FileNotFoundError:
            continue
    return found


def _mountpoints(tid: int, device: int) -> List[str]:
    table = mountinfo.parse(procfs.read(f"/proc/{tid}/mountinfo"))
    return [mount.mountpoint for mount in table if mount.st_dev == device]
