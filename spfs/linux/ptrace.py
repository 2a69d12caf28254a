"""ptrace(2) in its PTRACE_SEIZE form, and how a tracee's stops are awaited.

All calls must come from the thread that seized: the kernel keeps the relation per thread, and ends it, with what is
still pending, when that thread ends. Stops are read by waitid(2) without WEXITED, so that no exit status that
somebody else waits for is consumed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from typing import MutableSequence, Optional, Sequence, Tuple

from spfs.linux.calls import FixedTable, part_of
from spfs.linux.machine import current
from stubfs.libc import bind

O_TRACESYSGOOD = 0x1
O_SUSPEND_SECCOMP = 1 << 21

EVENT_STOP = 128  # high byte of a stop's status: an interrupt's stop, or a group-stop
SYSCALL_STOP = signal.SIGTRAP | 0x80  # with O_TRACESYSGOOD

_CONT = 7
_DETACH = 17
_SYSCALL = 24
_GETREGSET = 0x4204
_SETREGSET = 0x4205
_SEIZE = 0x4206
_INTERRUPT = 0x4207
_GETSIGMASK = 0x420A
_SETSIGMASK = 0x420B
_GET_RSEQ_CONFIGURATION = 0x420F
_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211
_NT_PRSTATUS = 1

_WALL = 0x40000000
_STOPS = os.WSTOPPED | os.WNOHANG | _WALL
_SIGMASK_SIZE = 8  # bytes of the kernel's sigset_t

_ptrace = bind(
    "ptrace", ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, restype=ctypes.c_long
)


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def seize(tid: int, options: int) -> None:
    """Begin to trace without stopping. OSError: EPERM (traced already, or a zombie), ESRCH, EINVAL (an option)."""
    _ptrace(_SEIZE, tid, None, options)


def interrupt(tid: int) -> None:
    """Ask for an event stop; it comes at once even from a blocking system call, whose registers it leaves as is."""
    _ptrace(_INTERRUPT, tid, None, None)


def cont(tid: int, number: int = 0) -> None:
    _ptrace(_CONT, tid, None, number)


def cont_to_syscall(tid: int) -> None:
    """Go on until the next entry to, or exit from, a system call."""
    _ptrace(_SYSCALL, tid, None, None)


def detach(tid: int, number: int = 0) -> None:
    """Let a *stopped* tracee go; OSError ESRCH if it is not stopped."""
    _ptrace(_DETACH, tid, None, number)


def read_registers(tid: int, size: int, kind: int = _NT_PRSTATUS) -> bytes:
    """The register set, at most ``size`` bytes. A 32-bit task has a shorter one."""
    buffer = ctypes.create_string_buffer(size)
    vector = _IoVec(ctypes.addressof(buffer), size)
    _ptrace(_GETREGSET, tid, kind, ctypes.addressof(vector))
    return ctypes.string_at(buffer, vector.length)


def extended_state(tid: int, size: int, kinds: Sequence[int]) -> bytes:
    """The vector registers, at most ``size`` bytes, as the first of the register sets ``kinds`` that there is: a
    processor without XSAVE has only a shorter one."""
    for kind in kinds[:-1]:
        try:
            return read_registers(tid, size, kind)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
    return read_registers(tid, size, kinds[-1])


class Registers:
    """A buffer for the general registers of ``count`` words, used again and again: a process has many stops."""

    def __init__(self, count: int) -> None:
        array = (ctypes.c_uint64 * count)()
        self.words: MutableSequence[int] = array  # type: ignore[assignment]  # negative ones are wrapped
        self._content, self._size = ctypes.addressof(array), ctypes.sizeof(array)
        self._vector = _IoVec(self._content, self._size)
        self._address = ctypes.addressof(self._vector)

    def set(self, content: bytes) -> None:
        ctypes.memmove(self._content, content, self._size)

    def read(self, tid: int) -> bool:
        """False for a task that has not so many: a 32-bit one."""
        self._vector.length = self._size  # the kernel sets it to what there is
        _ptrace(_GETREGSET, tid, _NT_PRSTATUS, self._address)
        return int(self._vector.length) == self._size

    def write(self, tid: int) -> None:
        self._vector.length = self._size
        _ptrace(_SETREGSET, tid, _NT_PRSTATUS, self._address)


# Parts of the table of ``Requests``.
_WRITE_BLOCK_ENTER, _RESTORE, _WRITE_ENTER = part_of(0, 3), part_of(3, 5), part_of(4, 6)
_WRITE_CONT, _INTERRUPT_CONT, _READ, _CAPTURE = part_of(6, 8), part_of(8, 10), part_of(10, 11), part_of(10, 12)


class Requests(Registers):
    """What is asked of one task again and again, with its registers in the buffer: made ahead, and what follows each
    other in one go, without the interpreter in between. OSError: ESRCH, of all of them, if the task is not stopped."""

    def __init__(self, tid: int) -> None:
        architecture = current()
        assert architecture is not None
        super().__init__(architecture.registers)
        self._mask = (ctypes.c_char * _SIGMASK_SIZE)()
        get, set_ = ((request, tid, _NT_PRSTATUS, self._address) for request in (_GETREGSET, _SETREGSET))
        mask = ctypes.addressof(self._mask)
        get_mask, set_mask = ((request, tid, _SIGMASK_SIZE, mask) for request in (_GETSIGMASK, _SETSIGMASK))
        enter, cont_, interrupt_ = (_SYSCALL, tid), (_CONT, tid), (_INTERRUPT, tid)
        requests = [set_, set_mask, enter, set_mask, set_, enter, set_, cont_, interrupt_, cont_, get, get_mask]
        self._table = FixedTable([("ptrace", *request) for request in requests])

    def _make(self, part: slice) -> bool:
        self._vector.length = self._size  # the kernel sets it to what there is
        self._table.run(part)
        return int(self._vector.length) == self._size

    def capture(self) -> Optional[Tuple[bytes, bytes]]:
        """The registers and the blocked signals, in a call with a mask of its own (ppoll, sigsuspend) those it goes
        back to. None for a task that has not so many registers: a 32-bit one."""
        return (bytes(self.words), self._mask.raw) if self._make(_CAPTURE) else None

    def fetch(self) -> None:
        """Read the registers."""
        self._make(_READ)

    def enter(self, mask: Optional[bytes] = None) -> None:
        """Write the registers, set the blocked signals to ``mask``, ``cont_to_syscall``."""
        if mask is None:
            self._make(_WRITE_ENTER)
        else:
            self._mask.raw = mask
            self._make(_WRITE_BLOCK_ENTER)

    def cont(self) -> None:
        """Write the registers, ``cont``."""
        self._make(_WRITE_CONT)

    def interrupt(self) -> None:
        """``interrupt``, ``cont``: at the entry of a call, to have it stop before it returns."""
        self._make(_INTERRUPT_CONT)

    def restore(self, mask: bytes) -> None:
        """Set the blocked signals to ``mask``, write the registers."""
        self._mask.raw = mask
        self._make(_RESTORE)


def set_signal_mask(tid: int, mask: bytes) -> None:
    buffer = ctypes.create_string_buffer(mask, _SIGMASK_SIZE)
    _ptrace(_SETSIGMASK, tid, _SIGMASK_SIZE, ctypes.addressof(buffer))


def rseq_area(tid: int) -> Optional[int]:
    """The address of the task's struct rseq; None without one, or before Linux 5.13."""
    buffer = ctypes.create_string_buffer(24)
    try:
        _ptrace(_GET_RSEQ_CONFIGURATION, tid, 24, ctypes.addressof(buffer))
    except OSError:
        return None
    return int.from_bytes(buffer.raw[:8], "little") or None


def dispatches_calls(tid: int) -> bool:
    """Whether PR_SET_SYSCALL_USER_DISPATCH is on: calls from elsewhere than the task said may end in SIGSYS. False
    where the kernel does not tell (before Linux 6.4, or other processors than x86)."""
    buffer = ctypes.create_string_buffer(32)
    try:
        _ptrace(_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, 32, ctypes.addressof(buffer))
    except OSError:
        return False
    return any(buffer.raw[:8])


def poll_stop(tid: int) -> Optional[Tuple[int, int]]:
    """(signal, event) of a stop of ``tid`` that nobody has read yet; None if it runs, or has ended."""
    try:
        result = os.waitid(os.P_PID, tid, _STOPS)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status & 0xFF, result.si_status >> 8
