"""What differs between processors, for the injection of system calls; ``x86_64`` and ``aarch64`` are the two.

Data, and what follows from registers; nothing here calls the kernel. ``spfs.linux.machine`` has this machine's.
"""

from __future__ import annotations

import abc
import struct
from dataclasses import dataclass
from typing import Dict, MutableSequence, NamedTuple, Optional, Sequence, Tuple

# Flag bits of an entry's number: the argument is not the value but the address of it.
LOAD_ARGUMENT_0 = 1 << 32  # a 32-bit integer, sign-extended: a file descriptor
LOAD_ARGUMENT_1 = 1 << 33  # 64 bits: an offset
LOAD_ARGUMENT_2 = 1 << 34  # a 32-bit integer, sign-extended: a flag word
LOAD_ARGUMENT_4 = 1 << 35  # a 32-bit integer, sign-extended: mmap's file descriptor

FRAME_ALIGNMENT = 64  # of a signal frame, enough for all
NO_STACK = 0x8  # ss_flags that sigaltstack(2) refuses, so that rt_sigreturn leaves the alternate stack as it is


@dataclass(frozen=True)
class Interrupted:
    """A system call that a task was stopped in: its number, and what it was about to return: a negative errno or one
    of the kernel's own restart codes."""

    number: int
    result: int


class Noted(NamedTuple):
    """A system call as /proc/TID/syscall shows it to those who do not trace: seen before the task was stopped."""

    number: int
    arguments: Tuple[int, ...]
    stack_pointer: int
    instruction_pointer: int  # behind the instruction


@dataclass(frozen=True)
class Architecture(abc.ABC):
    """One processor type. Registers are named by their index in the 64-bit words of NT_PRSTATUS's register set."""

    machine: str
    registers: int
    number: int  # of the system call that is entered
    arguments: Tuple[int, ...]
    result: int
    instruction_pointer: int
    stack_pointer: int
    loop: Tuple[int, ...]  # the server code's: table, count, command buffer, socket, signal frame, keep socket
    syscall: bytes  # the instruction
    syscall_return: bytes  # the instruction, followed by a return
    sigreturn: Tuple[bytes, ...]  # what a signal handler returns to: rt_sigreturn, as C libraries have it
    epoll_event: str  # struct epoll_event for the module struct
    red_zone: int  # bytes below the stack pointer that are in use
    state_kinds: Tuple[int, ...]  # of the extended state, for PTRACE_GETREGSET; the first that there is
    server: bytes  # runs tables in the tracee, for as long as its socket's peer lives
    local: bytes  # void run(table, count), for ourselves
    calls: Dict[str, int]

    def words(self, registers: bytes) -> Sequence[int]:
        return struct.unpack(f"<{self.registers}Q", registers)

    @abc.abstractmethod
    def is_compatibility(self, words: Sequence[int]) -> bool:
        """Whether registers of the full size are those of a 32-bit program all the same."""

    @abc.abstractmethod
    def outside_of_calls(self, words: Sequence[int]) -> bool:
        """Whether the task may have been stopped outside of system calls. In an event stop."""

    @abc.abstractmethod
    def forget_call(self, words: MutableSequence[int]) -> None:
        """Make the registers of an interrupted task ones with which it can run something else."""

    @abc.abstractmethod
    def return_to(self, words: MutableSequence[int], code: int, frame: int) -> None:
        """Have an injected call return to ``code`` with the stack pointer at ``frame``; the word before it is free."""

    @abc.abstractmethod
    def interrupted(self, words: MutableSequence[int], noted: Optional[Noted]) -> Optional[Interrupted]:
        """The call that the task was stopped in, or at the end of; None: in none, or unknown. Registers that hold
        its arguments no more get them again, from ``noted``."""

    @abc.abstractmethod
    def restart_unless_handled(self, words: MutableSequence[int]) -> None:
        """Have the kernel begin the call anew when the task goes on, or, where ``decides_at_the_end``, fail with EINTR
        if a handler runs before."""

    decides_at_the_end = True
    """Whether the kernel looks at the registers that it finds when the task goes on, to restart a call or to have it
    fail with EINTR. If not it has decided before the stop, and its decision is lost when the task is made to run
    anything: the interrupted call must be entered again, with an interrupt pending, to have the kernel decide anew."""

    def entered_again(self, words: Sequence[int], instruction: bytes) -> Optional[Sequence[int]]:
        """The registers with which an interrupted call is to be entered again, ``instruction`` being what is about to
        be executed; None if there is none to be entered. See ``decides_at_the_end``."""
        return None

    def refused(self, words: Sequence[int], entered: Sequence[int]) -> bool:
        """Whether what was ``entered_again`` with those registers has found nothing to be continued."""
        return False

    @abc.abstractmethod
    def frame(self, registers: bytes, mask: bytes, state: bytes, address: int) -> bytes:
        """The signal frame by which rt_sigreturn(2) puts a task back to where it was, if nobody else does; to be
        written at ``address`` (a multiple of FRAME_ALIGNMENT), with the stack pointer to be set there.

        ``registers``: NT_PRSTATUS as the interrupt left them. ``state``: the extended state, of one of ``state_kinds``.
        """

    @abc.abstractmethod
    def frame_at(self, frame: bytes, address: int) -> bytes:
        """The same frame for another address."""
