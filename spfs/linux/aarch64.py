"""aarch64: registers, system call numbers (include/uapi/asm-generic/unistd.h), injected code, signal frame.

What is decided when a call is interrupted differs from x86-64: on the way to the stop the kernel has put the program
counter back to the call's instruction and the first argument into its register, and keeps to itself what the call
returned (arch/arm64/kernel/signal.c, do_signal). The code is listed beside its bytes; a test assembles it again.
"""

from __future__ import annotations

import errno
import struct
from typing import MutableSequence, Optional, Sequence

from spfs.linux.arch import NO_STACK, Architecture, Interrupted, Noted

# One entry of a call table: number, six arguments, result; see ``spfs.linux.calls``.
_CORE_LISTING = """
    cbz x20, 9f
5:  ldr x8, [x19]
    ldp x0, x1, [x19, #8]
    ldp x2, x3, [x19, #24]
    ldp x4, x5, [x19, #40]
    tbz x8, #32, 1f
    ldrsw x0, [x0]
1:  tbz x8, #33, 2f
    ldr x1, [x1]
2:  tbz x8, #34, 3f
    ldrsw x2, [x2]
3:  tbz x8, #35, 4f
    ldrsw x4, [x4]
4:  mov w8, w8
    svc #0
    str x0, [x19, #56]
    add x19, x19, #64
    sub x20, x20, #1
    cbnz x20, 5b
9:
"""
_CORE = bytes.fromhex(
    "740200b4680240f9608640a9628e41a9649642a9480000b6000080b9480008b6210040f9480010b6420080b9480018b6"
    "840080b9e803082a010000d4601e00f973020191940600d1f4fdffb5"
)

# In the tracee: x19 = table, x20 = count, x21 = 16 bytes for commands, behind which are our end and its own one of the
# socket, x22 = socket, x23 = signal frame, x24 = not 0 if close() may be forbidden. 0x4000, MSG_NOSIGNAL: a SIGPIPE,
# blocked now, would kill the tracee afterwards.
_SERVER_LISTING = (
    "0:"
    + _CORE_LISTING
    + """
    ldr w22, [x21, #20]
    mov x8, #206
    mov w0, w22
    mov x1, x21
    mov x2, #1
    mov x3, #0x4000
    mov x4, xzr
    mov x5, xzr
    svc #0
    mov x8, #63
    mov w0, w22
    mov x1, x21
    mov x2, #16
    svc #0
    cmp x0, #16
    b.ne 7f
    ldp x19, x20, [x21]
    b 0b
7:  cbnz w24, 8f
    mov x8, #57
    mov w0, w22
    svc #0
8:  mov sp, x23
    mov x8, #139
    svc #0
"""
)
_SERVER = _CORE + bytes.fromhex(
    "b61640b9c81980d2e003162ae10315aa220080d2030088d2e4031faae5031faa010000d4e80780d2e003162ae10315aa"
    "020280d2010000d41f4000f161000054b35240a9dcffff1798000035280780d2e003162a010000d4ff020091"
    "681180d2010000d4"
)

_LOCAL_LISTING = (
    """
    stp x19, x20, [sp, #-16]!
    mov x19, x0
    mov x20, x1
"""
    + _CORE_LISTING
    + """
    ldp x19, x20, [sp], #16
    ret
"""
)
_LOCAL = bytes.fromhex("f353bfa9f30300aaf40301aa") + _CORE + bytes.fromhex("f353c1a8c0035fd6")

_CALLS = {
    "execve": 221,
    "execveat": 281,
    "read": 63,
    "ioctl": 29,
    "close": 57,
    "mmap": 222,
    "mprotect": 226,
    "munmap": 215,
    "brk": 214,
    "mremap": 216,
    "msync": 227,
    "madvise": 233,
    "socketpair": 199,
    "listen": 201,
    "connect": 203,
    "recvmsg": 212,
    "fcntl": 25,
    "flock": 32,
    "fchdir": 50,
    "lseek": 62,
    "mlock": 228,
    "prctl": 167,
    "chroot": 51,
    "epoll_ctl": 21,
    "openat": 56,
    "dup3": 24,
    "prlimit64": 261,
    "kcmp": 272,
    "mlock2": 284,
    "statx": 291,
    "io_uring_register": 427,
    "pidfd_getfd": 438,
    "gettid": 178,
    "tkill": 130,
    "ptrace": 117,
    "process_vm_readv": 270,
    "epoll_pwait": 22,
    "epoll_pwait2": 441,
    "rt_sigtimedwait": 137,
    "semop": 193,
    "semtimedop": 192,
    "io_getevents": 4,
    "io_uring_enter": 426,
    "pselect6": 72,
    "ppoll": 73,
    "accept": 202,
    "accept4": 242,
    "recvfrom": 207,
    "recvmmsg": 243,
    "sendto": 206,
    "sendmsg": 211,
    "sendmmsg": 269,
    "readv": 65,
    "write": 64,
    "writev": 66,
    "io_pgetevents": 292,
}

_LINK, _STACK_POINTER, _INSTRUCTION_POINTER, _STATE = 30, 31, 32, 33
_NUMBER, _RESULT = 8, 0
_BRANCH_TYPE = 0xC00  # PSTATE.BTYPE: what kind of branch an instruction was reached by
_SVC = bytes.fromhex("010000d4")
_RET = bytes.fromhex("c0035fd6")
_ERESTARTNOHAND = 514
_RESTART_SYSCALL = 128
_WORD = (1 << 64) - 1
_NT_PRFPREG = 2  # struct user_fpsimd_state
# Calls that go on by restart_syscall(2): nanosleep, clock_nanosleep, futex with a time limit.
_BY_RESTART_BLOCK = (101, 115, 98)

# struct rt_sigframe: siginfo, ucontext with its mask, sigcontext (16-byte aligned), and in its reserved space records
# of which the first has the vector registers and one of size 0 is the last (arch/arm64/include/uapi/asm/sigcontext.h).
# What SVE registers have beyond the 128 bits is not among them.
_SIGINFO = 128
_FPSIMD_MAGIC, _FPSIMD_SIZE = 0x46508001, 528


class _AArch64(Architecture):
    decides_at_the_end = False

    def is_compatibility(self, words: Sequence[int]) -> bool:
        return False  # has a register set of another size

    def outside_of_calls(self, words: Sequence[int]) -> bool:
        return True  # cannot be told

    def forget_call(self, words: MutableSequence[int]) -> None:
        words[_STATE] &= ~_BRANCH_TYPE

    def return_to(self, words: MutableSequence[int], code: int, frame: int) -> None:
        words[_STACK_POINTER], words[_LINK] = frame, code

    def interrupted(self, words: MutableSequence[int], noted: Optional[Noted]) -> Optional[Interrupted]:
        if noted is None or (words[_NUMBER], words[_STACK_POINTER]) != (noted.number, noted.stack_pointer):
            return None
        if words[_INSTRUCTION_POINTER] == noted.instruction_pointer and words[_RESULT] == -errno.EINTR & _WORD:
            words[_RESULT] = noted.arguments[0]  # the same register
            return Interrupted(noted.number, -errno.EINTR)
        if words[_INSTRUCTION_POINTER] == noted.instruction_pointer - len(self.syscall):
            return Interrupted(noted.number, -_ERESTARTNOHAND)
        return None

    def restart_unless_handled(self, words: MutableSequence[int]) -> None:
        words[_INSTRUCTION_POINTER] -= len(self.syscall)

    def entered_again(self, words: Sequence[int], instruction: bytes) -> Optional[Sequence[int]]:
        if instruction != self.syscall:
            return None
        entered = list(words)
        if words[_NUMBER] in _BY_RESTART_BLOCK:
            entered[_NUMBER] = _RESTART_SYSCALL
        return entered

    def refused(self, words: Sequence[int], entered: Sequence[int]) -> bool:
        """What restart_syscall returns if nothing was interrupted: the task had been about to enter a call."""
        failed = words[_INSTRUCTION_POINTER] != entered[_INSTRUCTION_POINTER] and words[_RESULT] == -errno.EINTR & _WORD
        return entered[_NUMBER] == _RESTART_SYSCALL and failed

    def frame(self, registers: bytes, mask: bytes, state: bytes, address: int) -> bytes:
        """An interrupted system call is begun anew."""
        words = self.words(registers)
        context = struct.pack("<QQQixxxxQ", 0, 0, 0, NO_STACK, 0) + mask
        context = context.ljust(176, b"\0")
        context += struct.pack("<Q31QQQQ8x", 0, *words[:31], *words[31:])
        vectors, (status, control) = state[:512], struct.unpack_from("<II", state, 512)
        context += struct.pack("<IIII", _FPSIMD_MAGIC, _FPSIMD_SIZE, status, control) + vectors
        return bytes(_SIGINFO) + context + bytes(16)

    def frame_at(self, frame: bytes, address: int) -> bytes:
        return frame  # no address of its own in it


AARCH64 = _AArch64(
    machine="aarch64",
    registers=34,
    number=_NUMBER,
    arguments=(0, 1, 2, 3, 4, 5),
    result=_RESULT,
    instruction_pointer=_INSTRUCTION_POINTER,
    stack_pointer=_STACK_POINTER,
    loop=(19, 20, 21, 22, 23, 24),
    syscall=_SVC,
    syscall_return=_SVC + _RET,
    sigreturn=(bytes.fromhex("681180d2") + _SVC,),  # mov x8, #139
    epoll_event="<IxxxxQ",
    red_zone=0,
    state_kinds=(_NT_PRFPREG,),
    server=_SERVER,
    local=_LOCAL,
    calls=_CALLS,
)
