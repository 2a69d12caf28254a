"""Exchanges what /proc/PID/exe shows; refused by the kernel while any mapping of the old executable is left (EBUSY)."""

from __future__ import annotations

import os
import struct

from spfs.linux import procfs
from spfs.linux.calls import CallTable
from spfs.surgery import message
from spfs.surgery.records import Memory
from spfs.surgery.tables import run_table
from spfs.tracee import USER, Script, Tracee

_PR_SET_MM, _PR_SET_MM_EXE_FILE, _PR_SET_MM_MAP = 35, 13, 14
_MM_MAP = struct.Struct("<11QQII")  # struct prctl_mm_map

SPACE = 512  # bytes behind USER


def script(tracee: Tracee, memory: Memory) -> Script:
    """Let the process refer to the new executable, if there is one; the record tells how it ended."""
    exe = memory.exe
    if exe is None or exe.problem is not None or exe.new < 0:
        return
    calls = CallTable()
    data, slots = message.receive(calls, tracee.base, tracee.base + USER, 1)
    end_of_heap = calls.add("brk", 0)
    outcome = yield from run_table(tracee, calls, data, [[exe.new]])
    (fd,) = struct.unpack("<i", tracee.read(slots[0], 4))
    # The first one wants CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE in the process's user namespace and a kernel with
    # CONFIG_CHECKPOINT_RESTORE, the second one CAP_SYS_RESOURCE in the first namespace.
    layout = _layout(tracee, outcome[end_of_heap], fd)
    calls = CallTable()
    calls.add("prctl", _PR_SET_MM, _PR_SET_MM_MAP, tracee.base + USER, len(layout), 0)
    calls.add("prctl", _PR_SET_MM, _PR_SET_MM_EXE_FILE, fd, 0, 0)
    calls.add("close", fd)
    outcome = yield from run_table(tracee, calls, layout)
    if outcome[0] < 0 and outcome[1] < 0:
        exe.problem = f"the process may not change it: {os.strerror(-outcome[0])}"
    else:
        exe.moved = True


def _layout(tracee: Tracee, end_of_heap: int, fd: int) -> bytes:
    """struct prctl_mm_map: everything as it is, but the file."""
    fields = procfs.parse_stat(procfs.read(f"/proc/{tracee.tid}/stat")).fields
    # proc(5) counts from 1, and ``fields`` begins with the third.
    code = [int(fields[n - 3]) for n in (26, 27, 45, 46, 47)]
    rest = [int(fields[n - 3]) for n in (28, 48, 49, 50, 51)]
    return _MM_MAP.pack(*code, end_of_heap, *rest, 0, 0, fd)
