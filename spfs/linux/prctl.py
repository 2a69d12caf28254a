"""prctl(2): the few settings of the calling process that the controller side needs."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import List, Sequence

from stubfs.libc import bind

_PR_SET_NAME = 15
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_PR_SET_CHILD_SUBREAPER = 36

_prctl = bind("prctl", ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_sbrk = bind("sbrk", ctypes.c_ssize_t, restype=ctypes.c_size_t)


def set_child_subreaper(on: bool = True) -> None:
    """Descendants whose parent has ended become our children, and their ends ours to wait for. Not inherited."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def set_name(name: str) -> None:
    """Of the calling thread, as /proc/PID/comm shows it; the kernel cuts it to 15 bytes."""
    text = ctypes.create_string_buffer(os.fsencode(name))
    _prctl(_PR_SET_NAME, ctypes.addressof(text), 0, 0, 0)


class _MmMap(ctypes.Structure):
    """struct prctl_mm_map of linux/prctl.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack")
        + ("arg_start", "arg_end", "env_start", "env_end", "auxv")
    ] + [("auxv_size", ctypes.c_uint32), ("exe_fd", ctypes.c_uint32)]


# proc_pid_stat(5): which field tells what is to stay as it is.
_KEPT = {"start_code": 26, "end_code": 27, "start_stack": 28, "start_data": 45, "end_data": 46, "start_brk": 47}
_KEPT.update(env_start=50, env_end=51)
_shown: List[mmap.mmap] = []  # memory that must stay where it is: the kernel reads it whenever somebody looks


def set_command_line(words: Sequence[str]) -> None:
    """What /proc/PID/cmdline shows. For a process with one thread; OSError where the kernel cannot (it needs
    CONFIG_CHECKPOINT_RESTORE)."""
    data = b"".join(os.fsencode(word) + b"\0" for word in words)
    memory = mmap.mmap(-1, len(data), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(data)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # All at once and not PR_SET_MM_ARG_START: that needs CAP_SYS_RESOURCE, which containers rarely have.
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b") ")[2].split()
    wanted = _MmMap(arg_start=address, arg_end=address + len(data), exe_fd=0xFFFFFFFF)
    for name, number in _KEPT.items():
        setattr(wanted, name, int(fields[number - 3]))
    size, place = ctypes.sizeof(wanted), ctypes.addressof(wanted)
    wanted.brk = _sbrk(0)  # the last thing before the call: the heap may grow at any time
    _prctl(_PR_SET_MM, _PR_SET_MM_MAP, place, size, 0)
    _shown.append(memory)
