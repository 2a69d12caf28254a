"""System calls that any stop ends early, with EINTR (signal(7)): they are made to go on for the time that is left.

Of most calls the kernel itself knows how to go on after a stop. It does not for those here: it neither restarts them
nor keeps what is left of their time. An endless wait is simply begun again. Of a timed one is wanted when it began,
which nothing tells but the scheduler: when the task last ran. That is noted before anything is stopped.

What waits on a socket with a time limit (SO_RCVTIMEO, SO_SNDTIMEO) is begun again, too, and with all of its limit: that
belongs to the socket, which others may use, and is read when a call begins.

Whoever is inside execve(2) is told, too: nobody can begin to trace a process until that call ends.

select(2), pselect(2) and ppoll(2) are restarted by the kernel, with the time that was left when they were stopped, in
the caller's own structure: there, the time of the standstill is taken off.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import struct
import time
from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional, Set, Tuple

from spfs.linux import procfs, ptrace
from spfs.linux.arch import Architecture, Noted


class _Form(enum.Enum):
    """How a call is told its time limit."""

    NONE = enum.auto()
    MILLISECONDS = enum.auto()  # an int, negative: endless
    TIMESPEC = enum.auto()  # an address, 0: endless
    SOCKET = enum.auto()  # by an option of the socket; the argument is a descriptor
    IO_URING = enum.auto()  # flags, and an address in the next argument
    KEPT_TIMESPEC = enum.auto()  # an address, where the kernel has put what is left
    KEPT_TIMEVAL = enum.auto()


_CALLS: Dict[str, Tuple[_Form, int]] = {  # with the argument's index
    "epoll_wait": (_Form.MILLISECONDS, 3),
    "epoll_pwait": (_Form.MILLISECONDS, 3),
    "epoll_pwait2": (_Form.TIMESPEC, 3),
    "rt_sigtimedwait": (_Form.TIMESPEC, 2),
    "semop": (_Form.NONE, 0),
    "semtimedop": (_Form.TIMESPEC, 3),
    "io_getevents": (_Form.TIMESPEC, 4),
    "io_pgetevents": (_Form.TIMESPEC, 4),
    "io_uring_enter": (_Form.IO_URING, 3),
    "pselect6": (_Form.KEPT_TIMESPEC, 4),
    "ppoll": (_Form.KEPT_TIMESPEC, 2),
    "select": (_Form.KEPT_TIMEVAL, 4),
    **dict.fromkeys(
        [
            *("accept", "accept4", "connect", "read", "readv", "recvfrom", "recvmsg", "recvmmsg"),
            *("sendto", "sendmsg", "sendmmsg", "write", "writev"),
        ],
        (_Form.SOCKET, 0),
    ),
}
_STARTS = ("execve", "execveat")
_STARTING = 0.05  # seconds after which somebody who starts a program is taken to hang in a file system
_BEGUN_AGAIN = (_Form.NONE, _Form.SOCKET)  # whatever time has passed
_ERESTARTNOHAND = 514
_KEPT = {_Form.KEPT_TIMESPEC: 1, _Form.KEPT_TIMEVAL: 1000}  # ns of the unit in the structure's second word
_EXT_ARG, _ABSOLUTE, _REGISTERED = 1 << 3, 1 << 5, 1 << 6  # IORING_ENTER_EXT_ARG, _ABS_TIMER, _EXT_ARG_REG
_GETEVENTS_ARG = struct.Struct("<QIIQ")  # of which the last one is the address of a timespec
_TIMESPEC = struct.Struct("<qq")
_WORD = (1 << 64) - 1
_SECOND = 10**9

_LAST_RUN = re.compile(rb"^se\.exec_start\s*:\s*(\d+)\.(\d{6})", re.MULTILINE)
_SLEEPS = re.compile(rb"^nr_voluntary_switches\s*:\s*(\d+)", re.MULTILINE)


@dataclass
class _Timed:
    """A timed wait: when it began, and sleeps of the task so far."""

    begin: int  # ns of CLOCK_MONOTONIC
    sleeps: int


class Waits:
    """The waits of the tasks of one standstill: ``note``, stop them, ``stopped``, ``resume`` each."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        numbers = ((architecture.calls.get(name), rule) for name, rule in _CALLS.items())
        self._rules = {number: rule for number, rule in numbers if number is not None}
        self._starts_by = [architecture.calls[name] for name in _STARTS]
        self._starting: Dict[int, Optional[int]] = {}  # pid -> its task inside execve(2)
        self._noted: Dict[int, Noted] = {}
        self._timed: Dict[int, _Timed] = {}
        self._unknown: Set[int] = set()  # tasks that wait for a time of which nobody knows when it began
        self._stopped = 0
        self._number = -1  # of the call whose registers are in the buffer
        self._buffer = ptrace.Registers(architecture.registers)

    def note(self, pids: Iterable[int]) -> None:
        """Before anything is stopped."""
        clock = _SchedulerClock()
        try:
            for pid in pids:
                self._starting[pid] = None
                for tid in procfs.tasks(pid):
                    try:
                        if self._note(tid, clock) in self._starts_by:
                            self._starting[pid] = tid
                    except (OSError, ValueError):
                        continue  # it has ended, or the kernel does not tell (/proc/TID/sched, Linux with SCHED_DEBUG)
        finally:
            clock.close()
        self._wait_for_starts()

    def _wait_for_starts(self) -> None:
        deadline = time.monotonic() + _STARTING
        while True:
            for pid, tid in self._starting.items():
                if tid is not None and not self._starts(tid):
                    self._starting[pid] = None
            if not any(self._starting.values()) or time.monotonic() > deadline:
                return
            time.sleep(0.002)  # the kernel tells nobody

    def is_starting(self, pid: int, tid: int) -> bool:
        """Was the process inside execve(2) when it was noted, and for longer than that takes? Of one that was not: is
        the task, now?"""
        return self._starting[pid] is not None if pid in self._starting else self._starts(tid)

    def _starts(self, tid: int) -> bool:
        try:
            word = procfs.read(f"/proc/{tid}/syscall").split()[0]
            return word != b"running" and int(word) in self._starts_by
        except (OSError, ValueError, IndexError):
            return False

    def _note(self, tid: int, clock: "_SchedulerClock") -> int:
        """The number of the call that it waits in, -1 for none."""
        words = procfs.read(f"/proc/{tid}/syscall").split()
        if len(words) < 9:
            return -1
        if int(words[0]) in self._rules:
            self._note_wait(tid, words, clock)
        return int(words[0])

    def _note_wait(self, tid: int, words: List[bytes], clock: "_SchedulerClock") -> None:
        *arguments, pointer, instruction = (int(word, 16) for word in words[1:9])
        self._noted[tid] = Noted(int(words[0]), tuple(arguments), pointer, instruction)
        form, index = self._rules[int(words[0])]
        if form in _KEPT or form in _BEGUN_AGAIN or arguments[index] == 0:
            return
        self._unknown.add(tid)
        last_run, sleeps = _schedule(f"/proc/{tid}/sched")
        fields = procfs.parse_stat(procfs.read(f"/proc/{tid}/stat")).fields
        self._timed[tid] = _Timed(clock.monotonic(last_run, int(fields[36])), sleeps)
        self._unknown.discard(tid)

    def stopped(self, stops: int) -> None:
        """When all stand still. ``stops``: how often each was put to sleep for that. Who slept more often has left
        the call that was noted: it is not known, then, when the present one began, but that it was just now."""
        self._stopped = time.monotonic_ns()
        for tid, timed in list(self._timed.items()):
            try:
                _, sleeps = _schedule(f"/proc/{tid}/sched")
            except (OSError, ValueError):
                continue
            if sleeps > timed.sleeps + stops:
                del self._timed[tid]

    def resume(self, tid: int) -> None:
        """In the event stop of a task that has its own registers again: have its call go on if a stop has ended it.

        The kernel then begins the call anew, or lets it fail with EINTR if there is a signal to be handled. OSError
        ESRCH if the task was killed meanwhile.
        """
        words = self._buffer.words
        if not self._buffer.read(tid):
            return  # 32 bits: other numbers, other structures
        call = self._architecture.interrupted(words, self._noted.get(tid))
        if call is None or call.number not in self._rules:
            return
        form, index = self._rules[call.number]
        self._number = call.number
        try:
            if form in _KEPT:
                if call.result == -_ERESTARTNOHAND:
                    self._shorten(tid, words[self._architecture.arguments[index]], _KEPT[form])
            elif call.result == -_ERESTARTNOHAND and form is _Form.TIMESPEC:  # of io_pgetevents alone
                if tid not in self._unknown and self._set_time_left(tid, form, index):
                    self._buffer.write(tid)
            elif call.result == -errno.EINTR and tid not in self._unknown and self._set_time_left(tid, form, index):
                if not self._architecture.decides_at_the_end and procfs.handles_signal(tid):
                    return
                self._architecture.restart_unless_handled(words)
                self._buffer.write(tid)
        except ProcessLookupError:
            raise
        except OSError:
            pass  # its memory cannot be read, or written: the call fails with EINTR, as after any stop

    def _set_time_left(self, tid: int, form: _Form, index: int) -> bool:
        """Give the call in the buffer what is left of its time; False if that cannot be."""
        position = self._architecture.arguments[index]
        value = self._buffer.words[position]
        if form is _Form.NONE:
            return True
        if form is _Form.SOCKET:  # of nothing else is it known that to be interrupted means to have done nothing
            return os.readlink(f"/proc/{tid}/fd/{value & 0xFFFFFFFF}").startswith("socket:")
        if form is _Form.MILLISECONDS:
            if value & 0x80000000:
                return True
            left = self._left(tid, (value & 0xFFFFFFFF) * 10**6)
            self._buffer.words[position] = -(-left // 10**6)
            return True
        if form is _Form.TIMESPEC:
            if value:
                self._buffer.words[position] = self._put(tid, self._timespec_left(tid, value))
            return True
        if value & _ABSOLUTE or not value & _EXT_ARG:
            return True
        if value & _REGISTERED:
            return False
        position = self._architecture.arguments[index + 1]
        *others, address = _GETEVENTS_ARG.unpack(_peek(tid, self._buffer.words[position], _GETEVENTS_ARG.size))
        if address:
            place = self._put(tid, self._timespec_left(tid, address) + bytes(_GETEVENTS_ARG.size))
            _poke(tid, place + _TIMESPEC.size, _GETEVENTS_ARG.pack(*others, place))
            self._buffer.words[position] = place + _TIMESPEC.size
        return True

    def _shorten(self, tid: int, address: int, unit: int) -> None:
        """Take the time since ``stopped`` off the structure at ``address`` (0: none)."""
        if not address:
            return
        seconds, rest = _TIMESPEC.unpack(_peek(tid, address, _TIMESPEC.size))
        left = max(0, seconds * _SECOND + rest * unit - (time.monotonic_ns() - self._stopped))
        _poke(tid, address, _TIMESPEC.pack(left // _SECOND, left % _SECOND // unit))

    def _timespec_left(self, tid: int, address: int) -> bytes:
        seconds, nanoseconds = _TIMESPEC.unpack(_peek(tid, address, _TIMESPEC.size))
        left = self._left(tid, seconds * _SECOND + nanoseconds)
        return _TIMESPEC.pack(left // _SECOND, left % _SECOND)

    def _left(self, tid: int, limit: int) -> int:
        """ns of ``limit`` that are left; never too few."""
        words, noted, timed = self._buffer.words, self._noted.get(tid), self._timed.get(tid)
        begin = self._stopped
        if noted is not None and timed is not None:
            present = tuple(words[position] for position in self._architecture.arguments)
            if noted[:3] == (self._number, present, self._pointer):
                begin = min(begin, timed.begin)
        return max(0, limit - (time.monotonic_ns() - begin))

    def _put(self, tid: int, data: bytes) -> int:
        """Have ``data`` in the task's memory until its call has begun: where a signal's frame could lie, too."""
        address = (self._pointer - self._architecture.red_zone - len(data)) & ~0xF
        _poke(tid, address, data)
        return address

    @property
    def _pointer(self) -> int:
        return self._buffer.words[self._architecture.stack_pointer]


class _SchedulerClock:
    """Translates the scheduler's times (rq_clock_task) to CLOCK_MONOTONIC: a constant per processor, but for the time
    that interrupts and a hypervisor take (then it shows too small, and waits come out too long by as much)."""

    def __init__(self) -> None:
        self._allowed = os.sched_getaffinity(0)
        self._offsets: Dict[int, int] = {}
        self._moved = False

    def close(self) -> None:
        if self._moved:
            os.sched_setaffinity(0, self._allowed)

    def monotonic(self, moment: int, processor: int) -> int:
        """ns of CLOCK_MONOTONIC for ``moment`` on ``processor``. OSError if we may not run there."""
        if processor not in self._offsets:
            self._moved = True
            os.sched_setaffinity(0, {processor})
            time.sleep(1e-6)  # what it shows is when we were last put on the processor
            last_run, _ = _schedule("/proc/thread-self/sched")
            self._offsets[processor] = time.monotonic_ns() - last_run
        return moment + self._offsets[processor]


def _schedule(path: str) -> Tuple[int, int]:
    """When the task last ran, in the scheduler's ns, and how often it has slept. ValueError: the kernel does not tell.
    """
    data = procfs.read(path)
    last_run, sleeps = _LAST_RUN.search(data), _SLEEPS.search(data)
    if last_run is None or sleeps is None:
        raise ValueError(path)
    return int(last_run[1]) * 10**6 + int(last_run[2]), int(sleeps[1])


def _peek(tid: int, address: int, length: int) -> bytes:
    fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, length, address)
    finally:
        os.close(fd)
    if len(data) != length:
        raise OSError(errno.EFAULT, "the memory of the task cannot be read", str(tid))
    return data


def _poke(tid: int, address: int, data: bytes) -> None:
    fd = os.open(f"/proc/{tid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        written = os.pwrite(fd, data, address)
    finally:
        os.close(fd)
    if written != len(data):
        raise OSError(errno.EFAULT, "the memory of the task cannot be written", str(tid))
