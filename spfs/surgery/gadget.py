"""Finds a system call instruction in a process: in its vDSO, else in any executable mapping but the old mount's."""

from __future__ import annotations

import errno
import os
from typing import Iterator, Optional, Tuple

from spfs.linux import procfs
from spfs.tracee import Tracee

_CHUNK = 1 << 20  # bytes


class GadgetFinder:
    """Remembers where in the vDSO the instruction was: most processes have the kernel's own one."""

    def __init__(self, device: int) -> None:
        self._device = procfs.device_text(device)
        self._offset: Optional[int] = None

    def find(self, tracee: Tracee, maps: bytes) -> int:
        """The instruction's address; OSError ENOEXEC if there is none."""
        instruction = tracee.architecture.syscall
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
