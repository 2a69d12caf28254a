"""Finds borrowed code in a process: a system call instruction, and what lets the process help itself if we die.

The first choice is a C library's "syscall; ret" together with its rt_sigreturn, or the vDSO's (aarch64); then the
vDSO; then any executable mapping but the old mount's, whose pages its file system might have to be asked for.
"""

from __future__ import annotations

import errno
import os
from typing import Dict, Iterator, NamedTuple, Optional, Tuple

from spfs.linux import procfs
from spfs.linux.arch import Architecture
from spfs.tracee import Tracee

_CHUNK = 1 << 20  # bytes
_MOST = 8 << 20  # bytes looked at per mapping


class Gadget(NamedTuple):
    """Addresses of a system call instruction that returns, and of rt_sigreturn code. ``of_file``: not written by the
    process itself, so that it is the same for as long as the mappings of files are."""

    instruction: int
    code: int
    of_file: bool


class GadgetFinder:
    """Remembers what was found in which file, and where in the vDSO: most processes have the same ones."""

    def __init__(self, device: int, architecture: Architecture) -> None:
        self._device = procfs.device_text(device)
        self._architecture = architecture
        self._offset: Optional[int] = None
        self._in_vdso: Optional[int] = None  # offset of the rt_sigreturn code; -1: not there
        self._pairs: Dict[bytes, Tuple[Optional[int], Optional[int]]] = {}

    def look_ahead(self, pid: int, maps: bytes) -> Optional[Gadget]:
        """What a process has; None if it has not both. Not for use in a blackout: reads whole libraries."""
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            vdso = procfs.find_vdso(maps)
            of_kernel = None if vdso is None else self._sigreturn(memory, *vdso)
            for line in maps.splitlines():
                if b" r-xp " not in line or self._device in line or line.endswith((b"[vsyscall]", b"[vdso]")):
                    continue
                mapping = procfs.parse_mapping(line)
                key = line.split(b" ", 2)[2]  # offset, device, inode, name: the same contents
                if key not in self._pairs or mapping.inode == 0:
                    self._pairs[key] = self._search(memory, mapping)
                returning, code = self._pairs[key]
                if returning is not None and code is not None:
                    return Gadget(mapping.start + returning, mapping.start + code, mapping.inode != 0)
                if returning is not None and of_kernel is not None:
                    return Gadget(mapping.start + returning, of_kernel, False)
        finally:
            os.close(memory)
        return None

    def _search(self, memory: int, mapping: procfs.Mapping) -> Tuple[Optional[int], Optional[int]]:
        """Offsets of the instruction and of the code; None for what is not there."""
        try:
            data = os.pread(memory, min(mapping.end - mapping.start, _MOST), mapping.start)
        except OSError:
            return None, None
        codes = (data.find(code) for code in self._architecture.sigreturn)
        returning = data.find(self._architecture.syscall_return)
        return returning if returning >= 0 else None, next((offset for offset in codes if offset >= 0), None)

    def _sigreturn(self, memory: int, start: int, end: int) -> Optional[int]:
        """The address of the code in the vDSO, which has it on aarch64."""
        if self._in_vdso is None:
            try:
                data = os.pread(memory, end - start, start)
            except OSError:
                return None
            self._in_vdso = max(data.find(code) for code in self._architecture.sigreturn)
        return start + self._in_vdso if self._in_vdso >= 0 else None

    def provide(self, tracee: Tracee, known: Optional[Gadget], certain: bool) -> None:
        """Set the tracee's gadget, and its way back if what ``look_ahead`` found is there, which is ``certain`` if
        the mappings of files are the same as then; OSError ENOEXEC if it has no system call instruction at all."""
        if known is not None and (certain and known.of_file or self._is_there(tracee, known)):
            tracee.gadget, tracee.sigreturn = known.instruction, known.code
        else:
            tracee.gadget, tracee.sigreturn = self._find(tracee, procfs.read(f"/proc/{tracee.tid}/maps")), 0

    def _is_there(self, tracee: Tracee, known: Gadget) -> bool:
        expected = self._architecture.syscall_return
        return _read(tracee, known.instruction, len(expected)) == expected and any(
            _read(tracee, known.code, len(form)) == form for form in self._architecture.sigreturn
        )

    def _find(self, tracee: Tracee, maps: bytes) -> int:
        instruction = self._architecture.syscall
        vdso = procfs.find_vdso(maps)
        if vdso is not None:
            start, end = vdso
            if self._offset is not None and start + self._offset < end:
                if os.pread(tracee.memory, len(instruction), start + self._offset) == instruction:
                    return start + self._offset
            offset = os.pread(tracee.memory, end - start, start).find(instruction)
            if offset >= 0:
                self._offset = offset
                return start + offset
        for start, end in self._executable(maps):
            while start < end:
                # Chunks overlap by a byte less than the instruction's length, so that none is cut in two.
                data = os.pread(tracee.memory, min(_CHUNK, end - start), start)
                offset = data.find(instruction)
                if offset >= 0:
                    return start + offset
                if len(data) < len(instruction):
                    break
                start += len(data) - len(instruction) + 1 if start + len(data) < end else len(data)
        raise OSError(errno.ENOEXEC, "it has no system call instruction to be borrowed", str(tracee.pid))

    def _executable(self, maps: bytes) -> Iterator[Tuple[int, int]]:
        for line in maps.splitlines():
            # Reading a page of the old mount could ask its file system; [vsyscall] can be executed, not read.
            if self._device in line or line.endswith(b"[vsyscall]"):
                continue
            mapping = procfs.parse_mapping(line)
            if mapping.permissions[2] == "x" and mapping.permissions[0] == "r":
                yield mapping.start, mapping.end


def _read(tracee: Tracee, address: int, length: int) -> bytes:
    try:
        return os.pread(tracee.memory, length, address)
    except OSError:
        return b""
