"""System calls that are made only to see whether this machine has them; used by ``spfs.features``."""

from __future__ import annotations

import ctypes
import os

from stubfs.libc import bind, bind_syscall, machine_syscall

_KCMP_FILE = 0
_PTRACE_SEIZE = 0x4206

_ptrace = bind("ptrace", ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, restype=ctypes.c_long)
_kcmp = bind_syscall("kcmp", machine_syscall((312, 272)), *[ctypes.c_long] * 5)
_pidfd_getfd = bind_syscall("pidfd_getfd", 438, ctypes.c_int, ctypes.c_int, ctypes.c_uint)


def load_library(name: str) -> None:
    """OSError if the dynamic linker does not find it, or it does not fit."""
    ctypes.CDLL(name)


def seize(pid: int) -> None:
    _ptrace(_PTRACE_SEIZE, pid, None, None)


def kcmp_files(fd1: int, fd2: int) -> bool:
    """Are two of our descriptors the same open file description?"""
    return _kcmp(os.getpid(), os.getpid(), _KCMP_FILE, fd1, fd2) == 0


def pidfd_getfd(pidfd: int, fd: int) -> int:
    return _pidfd_getfd(pidfd, fd, 0)
