"""Finds the processes that hold something of a device, and what: by /proc alone, never by asking the file system.

The result is a set of ``Process`` records; ``spfs.surgery.compare`` tells later whether they still are true.
"""

from __future__ import annotations

import functools
import os
from typing import Container, Dict, List, Optional, Sequence

from spfs.linux import process, procfs, statx
from spfs.references import Kind
from spfs.surgery.bulk import objects
from spfs.surgery.descriptors import Descriptors
from spfs.surgery.kinds.registry import Kinds
from spfs.surgery.records import FsContext, Memory, Place, Process, Region


class Examiner:
    """Examines processes for references to ``device``; descriptions that several of them share are one object."""

    def __init__(self, device: int, kinds: Kinds) -> None:
        self.device = device
        self._descriptors = Descriptors(device, kinds)

    def close(self) -> None:
        self._descriptors.close()

    def forget(self) -> None:
        """Let go of all descriptions but those that were moved."""
        self._descriptors.forget()

    def process(self, pid: int) -> Optional[Process]:
        """Everything ``pid`` holds; None if it is gone, a zombie or a kernel thread."""
        try:
            before = procfs.parse_stat(procfs.read(f"/proc/{pid}/stat"))
            task = pid
            if before.state in "ZX":  # only the first thread, perhaps
                task = next((tid for tid in procfs.tasks(pid) if not is_dead(tid)), 0)
                if not task:
                    return None
            status = procfs.parse_status(procfs.read(f"/proc/{task}/status"))
            if status.kernel_thread:
                return None
            pidfd = process.pidfd_open(pid)
        except (FileNotFoundError, ProcessLookupError):
            return None
        record = Process(pid, before.command, before.start, pidfd, status)
        try:
            self._fill(record)
            if _is_32_bit(task):
                record.problem = "is a 32-bit process, which cannot be operated on"
            elif status.tracer:
                record.problem, record.traced = f"is traced by process {status.tracer}", True
        except (FileNotFoundError, ProcessLookupError):
            record.close()
            return None
        except BaseException:
            record.close()
            raise
        return record

    def refresh(self, record: Process, locked: Container[int] = ()) -> bool:
        """Bring the record of a stopped process up to date: what it still holds keeps its description or place, and
        so its counterpart. ``locked``: inode numbers whose locks have changed.

        False if it cannot be done that way (other tasks have tables of their own, or it is gone): examine it anew.
        """
        try:
            now = procfs.parse_stat(procfs.read(f"/proc/{record.pid}/stat"))
            if now.start != record.start:
                return False
            record.command = now.command
            tids = [tid for tid in procfs.tasks(record.pid) if tid in record.tids or not is_dead(tid)]
            if not self._has_same_owners(record, tids):
                return False
            record.tids = set(tids)
            record.status = procfs.parse_status(procfs.read(f"/proc/{record.tables[0].tid}/status"))
            for table in record.tables:
                self._descriptors.refresh(record, table, locked)
            for context in record.contexts:
                cwd, root = objects([f"/proc/{context.tid}/cwd", f"/proc/{context.tid}/root"])
                context.cwd = self._same_place(context.cwd, cwd, Kind.CWD)
                context.root = self._same_place(context.root, root, Kind.ROOT)
            if record.memory is not None:
                self._refresh_memory(record.memory)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return True

    @staticmethod
    def _has_same_owners(record: Process, tids: List[int]) -> bool:
        """Whether each task has the table and the directories of one that stands for them, as before."""
        leader = record.tables[0].tid
        for records, kind in ((record.tables, process.KCMP_FILES), (record.contexts, process.KCMP_FS)):
            own = {one.tid for one in records}
            if not own <= set(tids) or records[0].tid != leader:
                return False
            if any(process.kcmp(leader, tid, kind, 0, 0) for tid in tids if tid not in own):
                return False
        return record.memory is not None and record.memory.tid == leader

    def _same_place(self, former: Optional[Place], found: Optional[statx.Object], kind: Kind) -> Optional[Place]:
        if former is not None:
            if found is not None and _is_same(former.object, found):
                return former
            former.close()
        return self._place(found, kind)

    def _refresh_memory(self, memory: Memory) -> None:
        (exe,) = objects([f"/proc/{memory.tid}/exe"])
        memory.exe = self._same_place(memory.exe, exe, Kind.EXE)
        memory.maps = procfs.read(f"/proc/{memory.tid}/maps")
        lines = procfs.lines_of_device(memory.maps, self.device)
        if lines == memory.lines:
            return
        former = {region.mapping: region for region in memory.regions}
        mappings = [procfs.parse_mapping(line) for line in lines]
        memory.lines, memory.regions = lines, []
        new = [mapping.start for mapping in mappings if mapping not in former]
        flags = procfs.read_vm_flags(f"/proc/{memory.tid}/smaps", new) if new else {}
        for mapping in mappings:
            region = former.get(mapping) or _region(memory.tid, mapping, flags)
            if region is not None:
                memory.regions.append(region)

    def _fill(self, record: Process) -> None:
        tids = [tid for tid in procfs.tasks(record.pid) if not is_dead(tid)]
        if not tids:
            raise ProcessLookupError(record.pid)
        record.tids = set(tids)
        leader = record.pid if record.pid in record.tids else tids[0]
        own_tables, own_contexts = {leader}, {leader}
        for tid in tids:
            if tid != leader:
                if process.kcmp(leader, tid, process.KCMP_FILES, 0, 0):
                    own_tables.add(tid)
                if process.kcmp(leader, tid, process.KCMP_FS, 0, 0):
                    own_contexts.add(tid)
        for tid in sorted(own_tables):
            record.tables.append(self._descriptors.table(record, tid))
        for tid in sorted(own_contexts):
            record.contexts.append(self.context(tid))
        record.memory = self.memory(leader)

    # -- directories

    def context(self, tid: int) -> FsContext:
        cwd, root = objects([f"/proc/{tid}/cwd", f"/proc/{tid}/root"])
        return FsContext(tid, self._place(cwd, Kind.CWD), self._place(root, Kind.ROOT))

    def _place(self, found: Optional[statx.Object], kind: Kind) -> Optional[Place]:
        return Place(found, kind) if found is not None and found.device == self.device else None

    # -- memory

    def memory(self, tid: int) -> Memory:
        maps = procfs.read(f"/proc/{tid}/maps")
        (exe,) = objects([f"/proc/{tid}/exe"])
        memory = Memory(tid, procfs.lines_of_device(maps, self.device), exe=self._place(exe, Kind.EXE), maps=maps)
        if memory.lines:
            mappings = [procfs.parse_mapping(line) for line in memory.lines]
            flags = procfs.read_vm_flags(f"/proc/{tid}/smaps", [mapping.start for mapping in mappings])
            for mapping in mappings:
                region = _region(tid, mapping, flags)
                if region is not None:
                    memory.regions.append(region)
        return memory


def _region(tid: int, mapping: procfs.Mapping, flags: Dict[int, frozenset[str]]) -> Optional[Region]:
    link = f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}"
    try:
        mode = os.lstat(link).st_mode
        found = statx.examine(link)
    except FileNotFoundError:
        return None  # changed since maps was read: seen when the process stands still
    kind = Kind.SHARED_MAPPING if mapping.shared else Kind.PRIVATE_MAPPING
    return Region(mapping, found, kind, flags.get(mapping.start, frozenset()), mode)


def _is_same(former: statx.Object, found: statx.Object) -> bool:
    return (former.device, former.inode, former.mount_id) == (found.device, found.inode, found.mount_id)


def is_dead(tid: int) -> bool:
    try:
        return procfs.parse_stat(procfs.read(f"/proc/{tid}/stat")).state in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _is_32_bit(pid: int) -> bool:
    """By its auxiliary vector: pairs of words, of which the first one's type is small."""
    entry = procfs.read(f"/proc/{pid}/auxv")[:8]
    return len(entry) == 8 and int.from_bytes(entry, "little") >= 1 << 32


def shared(tids: Sequence[int], kind: int) -> Dict[int, int]:
    """For each task that shares what kcmp(2) calls ``kind`` with one earlier in the kernel's order: that one."""

    def compare(first: int, second: int) -> int:
        try:
            return {0: 0, 1: -1}.get(process.kcmp(first, second, kind, 0, 0), 1)
        except ProcessLookupError:
            return -1 if first < second else 1

    found: Dict[int, int] = {}
    first: Optional[int] = None
    for tid in sorted(tids, key=functools.cmp_to_key(compare)):
        if first is not None and compare(first, tid) == 0:
            found[tid] = first
        else:
            first = tid
    return found
