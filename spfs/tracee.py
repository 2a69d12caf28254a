"""One stopped task that is made to run system calls, and is put back so that it cannot tell.

Stages: capture -> open (scratch memory, socket) -> run tables of calls -> close. Each is a script, a generator that
yields what it waits for, so that ``spfs.surgery.scheduler`` can drive many tracees at once. The task must be in an
event stop when ``open`` begins, and is in one again when ``close`` (or ``restore``) has ended.
"""

from __future__ import annotations

import array
import enum
import errno
import os
import signal
import socket
import struct
from typing import Callable, Generator, List, MutableSequence, Optional, Sequence, Set

from spfs.linux import process, ptrace
from spfs.linux.arch import FRAME_ALIGNMENT, LOAD_ARGUMENT_0, LOAD_ARGUMENT_1, Architecture
from spfs.linux.calls import ENTRY, CallTable, result_address

PAGE = 4096
DATA = PAGE  # offset of the command buffer within the scratch memory; the code lies before it
PAIR = DATA + 16  # two 32-bit fds of the socketpair: ours, and the one that the code listens to
SOCKET = PAIR + 8  # the second one once more, for tables
DOT = SOCKET + 4  # "."
SIGNAL = DOT + 4  # 64 bits: the signal by which the task stops itself
LIMITS = SIGNAL + 8  # two struct rlimit64: the new and the old one
NOBODY = LIMITS + 32  # -1: in the place of the code's own end of the socket, for a table that is the last one
BEGIN = DATA + 128  # the first table
FRAME = DATA + 1024
USER = FRAME + 4 * PAGE  # from here on the memory is the user's; the extended state has at most 3 pages

_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_SCRATCH = 0x2 | 0x20 | 0x100000  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
_MAX_XSTATE = 3 * PAGE
_MESSAGES = 100  # of one byte, which fit into the default buffer
_SOCKET_BUFFER = 8 << 20
_SO_SNDBUFFORCE = 32
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RLIMIT_NOFILE = 7
_RUNNING = (0, 0)  # no stop
_ALL_SIGNALS = (1 << 64) - 1
_QUIET = (signal.SIGURG, signal.SIGWINCH)  # without a handler they do nothing, whether or not they are ignored

# What ``BEGIN`` has: the table that the task begins with, and the one that it ends with if no other one was the last.
_PAIRED, _OWN_ID, _STOP, _LAST = 0, 1, 2, 4
LAST = 2  # entries that ``add_last`` appends


def add_last(calls: CallTable, base: int) -> None:
    """Append to a table what ends the work of a task whose scratch memory is at ``base``: see ``Tracee.run``."""
    calls.add("close", base + SOCKET, load=LOAD_ARGUMENT_0)
    _add_stop(calls, base)


def _add_stop(calls: CallTable, base: int) -> None:
    own_id = result_address(base + BEGIN, _OWN_ID)
    calls.add("tkill", own_id, base + SIGNAL, load=LOAD_ARGUMENT_0 | LOAD_ARGUMENT_1)


class Wait(enum.Enum):
    """What a script waits for."""

    STOP = enum.auto()
    MESSAGE = enum.auto()


Script = Generator[Wait, None, None]
Call = Generator[Wait, None, int]


class Tracee:
    """A seized task ``tid`` of process ``pid``. ``gadget``: address of a system call instruction in its memory.

    The object owns the memory's fd and our end of the socket; ``release`` closes them.
    """

    def __init__(
        self,
        tid: int,
        pid: int,
        pidfd: int,
        architecture: Architecture,
        requests: ptrace.Requests,
        sandboxed: bool,
        caught: int = _ALL_SIGNALS,
    ) -> None:
        """``requests``: those to ``tid``. ``caught``: the signals that have a handler, a bit each."""
        self.tid, self.pid, self.pidfd = tid, pid, pidfd
        self.architecture = architecture
        self.gadget = 0
        self.sigreturn = 0  # address of code that calls rt_sigreturn; 0: none known, or ``gadget`` does not return
        self.base = 0
        self.size = 0
        self.sandboxed = sandboxed  # a seccomp filter is on: close() may be fatal once it is no longer suspended
        self.socket: Optional[socket.socket] = None
        self.memory = -1
        self.stop = _RUNNING
        self.swallowed: Set[int] = set()
        self._registers = b""
        self._requests = requests
        self._mask = b""
        self._caught = caught
        self._quiet = 0  # the signal by which it stops itself; 0: none is free for that
        self._blocked = b""
        self._running = False
        self._left_open: List[int] = []  # descriptors of its own that are ours to close
        self._masked = False
        self._frame = b""
        self._net = 0
        self._below_stack = b""
        self._limits: Optional[bytes] = None
        self._resume: Callable[[int], None] = ptrace.cont

    def release(self) -> None:
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    # -- memory

    def write(self, address: int, data: "bytes | bytearray") -> None:
        if os.pwrite(self.memory, data, address) != len(data):
            raise OSError(errno.EFAULT, "the memory of the process cannot be written", str(self.pid))

    def read(self, address: int, length: int) -> bytes:
        data = os.pread(self.memory, length, address)
        if len(data) != length:
            raise OSError(errno.EFAULT, "the memory of the process cannot be read", str(self.pid))
        return data

    # -- scripts

    def capture(self) -> None:
        """Save what will be given back. OSError ENOEXEC for a task of another architecture (32 bits)."""
        captured = self._requests.capture()
        if captured is None or self.architecture.is_compatibility(self._requests.words):
            raise OSError(errno.ENOEXEC, "a 32-bit process cannot be operated on", str(self.pid))
        self._registers, self._mask = captured
        self._choose_signal()
        self.memory = os.open(f"/proc/{self.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self._leave_critical_section()

    def open(self, base: int, size: int, descriptors: Optional[int] = None) -> Script:
        """Scratch memory at ``base`` (EEXIST if something is there) and the socket.

        ``descriptors``: the soft RLIMIT_NOFILE to set meanwhile, for a process whose table is full.
        """
        xstate = ptrace.extended_state(self.tid, _MAX_XSTATE, self.architecture.state_kinds)
        self._frame = self.architecture.frame(self._registers, self._mask, xstate, base + FRAME)
        self._spread_net()
        try:
            yield from self._map(base, size, _PROT_READ | _PROT_WRITE | _PROT_EXEC)
        except PermissionError:
            # Nothing may be both, prctl(PR_SET_MDWE): the code, which lies in the first page, is written as by a
            # debugger.
            yield from self._map(base, PAGE, _PROT_READ | _PROT_EXEC)
            try:
                yield from self._map(base + PAGE, size - PAGE, _PROT_READ | _PROT_WRITE)
            except OSError:
                yield from self._unmap()
                raise
        data = struct.pack("<16xiii4sQ32xi", -1, -1, -1, b".", self._quiet, -1).ljust(BEGIN - DATA, b"\0")
        data = self.architecture.server.ljust(DATA, b"\0") + data + self._first_tables()
        self.write(base, data.ljust(FRAME, b"\0") + self._frame)
        if descriptors is not None:
            yield from self._raise_limit(descriptors)
        if self._quiet:
            self._go_to(base + BEGIN, _LAST)
            yield from self._until(self._stopped_itself(base + BEGIN + _STOP * ENTRY))
            self._running = False
            done = self.read(base + PAIR, BEGIN + ENTRY - PAIR)
            (result,) = struct.unpack_from("<q", done, result_address(BEGIN, _PAIRED) - PAIR)
        else:
            result = yield from self._call("socketpair", *_SOCKETPAIR, base + PAIR)
            done = self.read(base + PAIR, 8)
        _check(result, "socketpair")
        self._left_open = list(struct.unpack_from("<ii", done))
        fd = process.pidfd_getfd(self.pidfd, self._left_open[0], 0)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fd)
        self.write(base + SOCKET, done[4:8])

    def run(self, table: int, count: int, fds: Sequence[Sequence[int]] = (), last: bool = False) -> Script:
        """Run ``count`` calls of the table at address ``table``, which may receive ``fds``, a message each. The first
        table that is run is to close ``PAIR``: our end was taken, and the task's own descriptor of it would keep the
        other end from closing.

        ``last``: nothing else will be run, and the table ends with the calls of ``add_last``, of which ``count`` does
        not know. They save stops where they can be made; otherwise they are not.
        """
        assert self.socket is not None
        last = last and bool(self._quiet)
        count += LAST if last else 0
        try:
            if self._running:
                if last:
                    self.write(self.base + PAIR + 4, struct.pack("<i", -1))  # as NOBODY
                self.socket.send(struct.pack("<QQ", table, count), _SEND)
            if len(fds) > _MESSAGES:
                self.socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
            for group in fds:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", group))
                self.socket.sendmsg([b"d"], [rights], _SEND)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ProcessLookupError(errno.ESRCH, "the process ended", str(self.pid)) from error
        if not self._running:
            self._left_open = self._left_open[1:]
            self._go_to(table, count, last)
        if last:
            yield from self._until(self._stopped_itself(table + (count - 1) * ENTRY))
            self._left_open, self._running = [], False
        else:
            yield from self._hear()

    def _hear(self) -> Script:
        """Wait until a table has been run."""
        assert self.socket is not None
        while True:
            try:
                if self.socket.recv(1, socket.MSG_DONTWAIT):
                    return
            except BlockingIOError:
                yield Wait.MESSAGE
                continue
            raise ProcessLookupError(errno.ESRCH, "the process ended", str(self.pid))

    def close(self) -> Script:
        """Take scratch memory and socket away again and put the task back to where it was."""
        if self._running:
            yield from self.run(self.base + BEGIN + _LAST * ENTRY, 0, last=True) if self._quiet else self._halt()
        yield from self._leave()

    def abandon(self, take_stock: Callable[["Tracee"], None]) -> Script:
        """The same after a failure, wherever the task may be. ``take_stock``: called while there is scratch memory."""
        if self._running:
            yield from self._halt()
        take_stock(self)
        yield from self._leave()

    def _halt(self) -> Script:
        ptrace.interrupt(self.tid)
        if self.stop != _RUNNING:
            self._goes(ptrace.cont)
            ptrace.cont(self.tid)
        yield from self._until(_is_event)
        self._running = False

    def _leave(self) -> Script:
        while self._left_open:
            _check((yield from self._call("close", self._left_open.pop())), "close")
        if self._limits is not None:
            self.write(self.base + LIMITS, self._limits)
            _check((yield from self._call("prlimit64", 0, _RLIMIT_NOFILE, self.base + LIMITS, 0)), "prlimit64")
        yield from self._unmap()
        again = self._to_enter_again()
        if again is None:
            self.restore()
        else:
            yield from self._enter_again(again)
            self._take_net_in()

    def restore(self) -> None:
        """In an event stop: the registers *unmodified*, so that the kernel itself restarts an interrupted call or
        lets it fail with EINTR, as the signals that are pending by then demand."""
        # The mask first: should we die between the two, the net sets the registers right, but nothing the mask.
        self._requests.set(self._registers)
        self._requests.restore(self._mask)
        self._take_net_in()

    def repeat_swallowed(self) -> None:
        """Send again what was not blocked and we had to take: SIGSTOP, and the signal that we use. Before detaching."""
        for number in self.swallowed:
            os.kill(self.pid, number)

    # -- details

    def _choose_signal(self) -> None:
        """How the task is to stop itself, instead of by us at the entry of a call and again behind it: by a signal
        that it sends itself, and that does nothing if we are dead. Which one has a handler was seen when the process
        was examined; one that is blocked could be pending for somebody who waits for it."""
        mask = int.from_bytes(self._mask, "little")
        free = (number for number in _QUIET if not (mask | self._caught) >> (number - 1) & 1)
        # A seccomp filter, which is on again if we die, knows nothing of a call of tkill().
        self._quiet = 0 if self.sandboxed else next(free, 0)
        blocked = _ALL_SIGNALS ^ (1 << (self._quiet - 1) if self._quiet else 0)
        self._blocked = blocked.to_bytes(8, "little")

    def _first_tables(self) -> bytes:
        calls = CallTable()
        calls.add("socketpair", *_SOCKETPAIR, self.base + PAIR)
        calls.add("gettid")
        _add_stop(calls, self.base)
        calls.add("close", self.base + PAIR, load=LOAD_ARGUMENT_0)  # comes to it only if we die
        add_last(calls, self.base)
        return bytes(calls.encode())

    def _go_to(self, table: int, count: int, last: bool = False) -> None:
        """Have the code run ``count`` calls of a table, and listen to its socket then; after the ``last`` one, should
        we have died, not to a number that may be somebody else's by then."""
        words = self._fresh_registers()
        place = self.base + (NOBODY - (PAIR + 4 - DATA) if last else DATA)
        values = (table, count, place, -1, self.base + FRAME, int(self.sandboxed))
        for index, value in zip(self.architecture.loop, values):
            words[index] = value
        words[self.architecture.instruction_pointer] = self.base
        self._running = True
        self._goes(ptrace.cont)
        self._requests.cont()

    def _stopped_itself(self, entry: int) -> Callable[[int, int], bool]:
        """Whether it is in the stop of the call at address ``entry``, and in none by the same signal from elsewhere."""

        def expected(number: int, event: int) -> bool:
            if event or number != self._quiet:
                return False
            self._requests.fetch()
            return self._requests.words[self.architecture.loop[0]] == entry

        return expected

    def _call(self, name: str, *arguments: int) -> Call:
        """One call through the instruction at ``gadget``, from event stop to event stop."""
        words = self._fresh_registers()
        words[self.architecture.number] = self.architecture.calls[name]
        for index, value in zip(self.architecture.arguments, arguments):
            words[index] = value
        words[self.architecture.instruction_pointer] = self.gadget
        if self._net:
            self.architecture.return_to(words, self.sigreturn, self._net + 8)
        mask = None if self._masked else self._blocked
        self._masked = True
        yield from self._through_call(mask)
        result = words[self.architecture.result]
        return result - (1 << 64) if result >> 63 else result

    def _through_call(self, mask: Optional[bytes] = None, inside: Optional[bytes] = None) -> Script:
        """From an event stop through the call that the registers in the buffer enter, in which the result's are then.
        ``mask``: the signals to be blocked from now on; ``inside``: from the entry on."""
        self._goes(ptrace.cont_to_syscall)
        self._requests.enter(mask)
        yield from self._until(_is_entry)
        if inside is not None:
            ptrace.set_signal_mask(self.tid, inside)
        # Interrupted while inside the call, the task stops before it returns to user space, in an event stop again.
        self._goes(ptrace.cont)
        self._requests.interrupt()
        yield from self._until(_is_event)
        self._requests.fetch()

    def _to_enter_again(self) -> Optional[Sequence[int]]:
        """The registers to have the call that was interrupted interrupted once more; None if there is none, or if the
        kernel does without."""
        if self.architecture.decides_at_the_end:
            return None
        saved = self._words(self._registers)
        try:
            instruction = self.read(saved[self.architecture.instruction_pointer], len(self.architecture.syscall))
        except OSError:
            return None  # may be executed but not read: the call is begun anew, whatever signal is handled first
        return self.architecture.entered_again(saved, instruction)

    def _enter_again(self, registers: Sequence[int]) -> Script:
        """From an event stop to one in which the kernel has decided how the interrupted call goes on; it may have ended
        meanwhile."""
        words = self._requests.words
        while True:
            words[:] = registers
            # Its own mask not before the entry: a signal would be delivered before the call has begun.
            yield from self._through_call(inside=self._mask)
            if not self.architecture.refused(words, registers):
                return
            ptrace.set_signal_mask(self.tid, self._blocked)
            registers = self._words(self._registers)

    def _map(self, address: int, length: int, protection: int) -> Script:
        """Add to the scratch memory; ``close`` takes it away."""
        result = yield from self._call("mmap", address, length, protection, _MAP_SCRATCH, -1, 0)
        if result >= 0 and result != address:  # kernels before 4.17 take the address for a hint
            yield from self._call("munmap", result, length)
            result = -errno.EEXIST
        _check(result, "mmap")
        self.base = self.base or address
        self.size += length

    def _unmap(self) -> Script:
        if self.base:
            _check((yield from self._call("munmap", self.base, self.size)), "munmap")
            self.base = self.size = 0

    def _spread_net(self) -> None:
        """For the calls that are made without the scratch memory: should we die, the task returns from the call to
        rt_sigreturn with a frame below its stack, as from a signal handler. It lies there to the end: all who
        could use that memory stand still. Without ``sigreturn``, or without room
        there, those calls (two before, two or three after) are the moments in which our death harms it."""
        if not self.sigreturn:
            return
        pointer = self._words(self._registers)[self.architecture.stack_pointer] - self.architecture.red_zone
        address = (pointer - len(self._frame)) // FRAME_ALIGNMENT * FRAME_ALIGNMENT
        net = struct.pack("<Q", self.sigreturn) + self.architecture.frame_at(self._frame, address)
        try:
            # Put back afterwards: on the small stacks of some runtimes, what lies there is somebody's.
            self._below_stack = self.read(address - 8, len(net))
            self.write(address - 8, net)
        except OSError:
            return
        self._net = address - 8

    def _take_net_in(self) -> None:
        if self._net:
            self.write(self._net, self._below_stack)
            self._net = 0

    def _goes(self, resume: Callable[[int], None]) -> None:
        """It is about to be resumed; ``resume``: how to do that again after a stop that was not asked for."""
        self._resume, self.stop = resume, _RUNNING

    def _until(self, expected: Callable[[int, int], bool]) -> Script:
        while True:
            yield Wait.STOP
            number, event = self.stop
            if expected(number, event):
                return
            self.absorb()

    def absorb(self) -> None:
        """Go on after a stop that was not asked for: a signal that is not blocked, or news about a group-stop.

        OSError EFAULT for a signal that says the injected code itself failed.
        """
        number, event = self.stop
        if not event and number != ptrace.SYSCALL_STOP:
            if number not in (signal.SIGSTOP, self._quiet):
                raise OSError(errno.EFAULT, f"injected calls were ended by signal {number}", str(self.pid))
            self.swallowed.add(number)
        self._goes(self._resume)
        self._resume(self.tid)

    def _raise_limit(self, descriptors: int) -> Script:
        self.write(self.base + LIMITS, struct.pack("<QQ", descriptors, descriptors))
        address = self.base + LIMITS
        _check((yield from self._call("prlimit64", 0, _RLIMIT_NOFILE, 0, address + 16)), "prlimit64")
        limits = self.read(address + 16, 16)
        (hard,) = struct.unpack_from("<Q", limits, 8)
        self.write(address, struct.pack("<QQ", min(descriptors, hard), hard))
        _check((yield from self._call("prlimit64", 0, _RLIMIT_NOFILE, address, 0)), "prlimit64")
        self._limits = limits

    def _words(self, registers: bytes) -> List[int]:
        return list(self.architecture.words(registers))

    def _fresh_registers(self) -> MutableSequence[int]:
        """The saved registers in the buffer, to be changed and written."""
        self._requests.set(self._registers)
        self.architecture.forget_call(self._requests.words)
        return self._requests.words

    def _leave_critical_section(self) -> None:
        """Abort an rseq critical section as the kernel would: it will see our code and take the section for left."""
        words = self._words(self._registers)
        if not self.architecture.outside_of_calls(words):
            return  # hence in no section
        area = ptrace.rseq_area(self.tid)
        if area is None:
            return
        (section,) = struct.unpack("<Q", self.read(area + 8, 8))
        if not section:
            return
        start, length, abort = struct.unpack("<8xQQQ", self.read(section, 32))
        pointer = words[self.architecture.instruction_pointer]
        if start <= pointer < start + length:
            words[self.architecture.instruction_pointer] = abort
            self._registers = struct.pack(f"<{len(words)}Q", *words)


_SOCKETPAIR = (socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0)


def _is_event(number: int, event: int) -> bool:
    return event == ptrace.EVENT_STOP


def _is_entry(number: int, event: int) -> bool:
    return number == ptrace.SYSCALL_STOP


def _check(result: int, call: str) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), call)
