"""System calls about other processes: what they share (kcmp), copies of their descriptors (pidfd_getfd)."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Iterable, List, Tuple

from spfs.linux.machine import call_numbers
from stubfs.libc import bind, bind_syscall

KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS = 0, 1, 2, 3  # linux/kcmp.h
PIDFD_THREAD = os.O_EXCL  # pidfd_open(2), since Linux 6.9
SFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

_NR = call_numbers()
_long = ctypes.c_long
kcmp = bind_syscall("kcmp", _NR["kcmp"], _long, _long, _long, _long, _long)
pidfd_getfd = bind_syscall("pidfd_getfd", _NR["pidfd_getfd"], _long, _long, _long)
_tee = bind("tee", ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint, restype=ctypes.c_ssize_t)
_setfsuid = bind_syscall("setfsuid", {"x86_64": 122, "aarch64": 151}[os.uname().machine], _long)
_setfsgid = bind_syscall("setfsgid", {"x86_64": 123, "aarch64": 152}[os.uname().machine], _long)
_setgroups = bind_syscall("setgroups", {"x86_64": 116, "aarch64": 159}[os.uname().machine], _long, ctypes.c_void_p)
_setresuid = bind_syscall("setresuid", {"x86_64": 117, "aarch64": 147}[os.uname().machine], _long, _long, _long)
_signalfd = bind("signalfd", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


def pidfd_open(tid: int, leader: bool = True) -> int:
    """A pidfd, close-on-exec, the caller's; of a thread that leads no group only since Linux 6.9 (else EINVAL)."""
    return os.pidfd_open(tid, 0 if leader else PIDFD_THREAD)


def tee(source: int, target: int, length: int) -> int:
    """Duplicate up to ``length`` bytes of pipe ``source`` into pipe ``target``, without waiting; tee(2)."""
    return int(_tee(source, target, length, 2))  # SPLICE_F_NONBLOCK


def signalfd(signals: Iterable[int]) -> int:
    """A non-blocking fd that is readable while one of ``signals``, which the caller has blocked, is pending."""
    mask = ctypes.create_string_buffer(struct.pack("<16Q", sum(1 << (s - 1) for s in signals), *[0] * 15), 128)
    return int(_signalfd(-1, ctypes.addressof(mask), SFD_FLAGS))


class Credentials:
    """This thread's file system credentials set to another's, and back: ``with Credentials(uid, gid, groups)``.

    The raw calls, because glibc's setgroups() changes all threads.
    """

    def __init__(self, uid: int, gid: int, groups: Tuple[int, ...]) -> None:
        self._wanted = (uid, gid, groups)

    def __enter__(self) -> None:
        self._groups: List[int] = os.getgroups()
        uid, gid, groups = self._wanted
        _set_groups(groups)
        _setfsgid(gid)
        _setfsuid(uid)  # last: it takes the capabilities along

    def __exit__(self, *_: object) -> None:
        _setfsuid(os.geteuid())
        _setfsgid(os.getegid())
        _set_groups(self._groups)


class UserIds:
    """This thread's real and effective user ids set to another's, and back: ``with UserIds(real, effective)``.

    What keeps the ids of whoever asks for something, not only those of the file system, is done as another one by this.
    """

    def __init__(self, real: int, effective: int) -> None:
        self._wanted = (real, effective)

    def __enter__(self) -> None:
        self._before = os.getresuid()
        _setresuid(*self._wanted, -1)  # the saved one lets us come back

    def __exit__(self, *_: object) -> None:
        _setresuid(*self._before)


def _set_groups(groups: Iterable[int]) -> None:
    numbers = list(groups)
    array = (ctypes.c_uint * len(numbers))(*numbers)
    _setgroups(len(numbers), ctypes.addressof(array))
