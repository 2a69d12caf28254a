"""What differs between processors: system call numbers, the register set, and the injected machine code.

Data only; nothing here calls the kernel. Numbers: arch/x86/entry/syscalls/syscall_64.tbl and, for aarch64,
include/uapi/asm-generic/unistd.h. The code is listed beside its bytes; a test assembles the listing again.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Dict, MutableSequence, Optional, Sequence, Tuple

# One entry of a call table: number, six arguments, result; see ``spfs.linux.calls``.
_CORE_LISTING = """
    test r13, r13
    jz 9f
5:  mov rax, [r12]
    mov rdi, [r12+8]
    mov rsi, [r12+16]
    mov rdx, [r12+24]
    mov r10, [r12+32]
    mov r8, [r12+40]
    mov r9, [r12+48]
    bt rax, 32
    jnc 1f
    movsxd rdi, dword ptr [rdi]
1:  bt rax, 33
    jnc 2f
    mov rsi, [rsi]
2:  bt rax, 34
    jnc 3f
    movsxd rdx, dword ptr [rdx]
3:  bt rax, 35
    jnc 4f
    movsxd r8, dword ptr [r8]
4:  mov eax, eax
    syscall
    mov [r12+56], rax
    add r12, 64
    dec r13
    jnz 5b
9:
"""
_CORE = bytes.fromhex(
    "4d85ed745c498b0424498b7c2408498b742410498b5424184d8b5424204d8b4424284d8b4c2430480fbae020730348633f"
    "480fbae0217303488b36480fbae0227303486312480fbae02373034d630089c00f0549894424384983c44049ffcd75a4"
)

# In the tracee: r12 = table, r13 = count, r14 = 16 bytes for commands, r15 = socket, rbx = signal frame's ucontext,
# rbp = not 0 if close() may be forbidden. MSG_NOSIGNAL: a SIGPIPE, blocked now, would kill the tracee afterwards.
_SERVER_LISTING = (
    "0:"
    + _CORE_LISTING
    + """
    mov eax, 44
    mov edi, r15d
    mov rsi, r14
    mov edx, 1
    mov r10d, 0x4000
    xor r8d, r8d
    xor r9d, r9d
    syscall
    xor eax, eax
    mov edi, r15d
    mov rsi, r14
    mov edx, 16
    syscall
    cmp rax, 16
    jne 7f
    mov r12, [r14]
    mov r13, [r14+8]
    jmp 0b
7:  test ebp, ebp
    jnz 8f
    mov eax, 3
    mov edi, r15d
    syscall
8:  mov rsp, rbx
    mov eax, 15
    syscall
"""
)
_SERVER = _CORE + bytes.fromhex(
    "b82c0000004489ff4c89f6ba0100000041ba004000004531c04531c90f0531c04489ff4c89f6ba100000000f05"
    "4883f810750c4d8b264d8b6e08e960ffffff85ed750ab8030000004489ff0f054889dcb80f0000000f05"
)

_LOCAL_LISTING = (
    """
    push r12
    push r13
    mov r12, rdi
    mov r13, rsi
"""
    + _CORE_LISTING
    + """
    pop r13
    pop r12
    ret
"""
)
_LOCAL = bytes.fromhex("415441554989fc4989f5") + _CORE + bytes.fromhex("415d415cc3")

# Flag bits of an entry's number: the argument is not the value but the address of it.
LOAD_ARGUMENT_0 = 1 << 32  # a 32-bit integer, sign-extended: a file descriptor
LOAD_ARGUMENT_1 = 1 << 33  # 64 bits: an offset
LOAD_ARGUMENT_2 = 1 << 34  # a 32-bit integer, sign-extended: a flag word
LOAD_ARGUMENT_4 = 1 << 35  # a 32-bit integer, sign-extended: mmap's file descriptor


_ERESTARTNOHAND = -514
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Architecture:
    """One processor type. Registers are named by their index in the 64-bit words of NT_PRSTATUS's register set."""

    machine: str
    registers: int
    number: int  # of the system call that is entered
    arguments: Tuple[int, ...]
    result: int
    original: int  # the number of the system call that was interrupted; -1 (unsigned) if none was. -1 as index: none
    instruction_pointer: int
    stack_pointer: int
    loop: Tuple[int, ...]  # the server code's: table, count, command buffer, socket, signal frame, keep socket
    syscall: bytes  # the instruction
    syscall_return: bytes  # the instruction, followed by a return
    sigreturn: Tuple[bytes, ...]  # what a signal handler returns to: rt_sigreturn, as C libraries have it
    red_zone: int  # bytes below the stack pointer that are in use
    server: bytes  # runs tables in the tracee, for as long as its socket's peer lives
    local: bytes  # void run(table, count), for ourselves
    calls: Dict[str, int]

    def words(self, registers: bytes) -> Sequence[int]:
        return struct.unpack(f"<{self.registers}Q", registers)

    def interrupted_call(self, words: Sequence[int]) -> Optional[int]:
        """The number of the system call that a task was stopped in, or at the end of; None if in none."""
        number = words[self.original]
        return number if number >> 63 == 0 else None

    def call_result(self, words: Sequence[int]) -> int:
        """What the interrupted call is about to return, negative errno or one of the kernel's own restart codes."""
        result = words[self.result]
        return result - (1 << 64) if result >> 63 else result

    def restart_unless_handled(self, words: MutableSequence[int]) -> None:
        """Have the kernel begin the call anew when the task goes on, or fail with EINTR if a handler runs before."""
        words[self.result] = _ERESTARTNOHAND & _WORD


_X86_64_CALLS = {
    "read": 0,
    "close": 3,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "mremap": 25,
    "msync": 26,
    "madvise": 28,
    "listen": 50,
    "socketpair": 53,
    "recvmsg": 47,
    "fcntl": 72,
    "flock": 73,
    "fchdir": 81,
    "lseek": 8,
    "mlock": 149,
    "prctl": 157,
    "chroot": 161,
    "epoll_ctl": 233,
    "openat": 257,
    "dup3": 292,
    "prlimit64": 302,
    "kcmp": 312,
    "mlock2": 325,
    "statx": 332,
    "io_uring_register": 427,
    "pidfd_getfd": 438,
    "gettid": 186,
    "process_vm_readv": 310,
    # Those that are waited in, see ``spfs.surgery.waits``.
    "epoll_wait": 232,
    "epoll_pwait": 281,
    "epoll_pwait2": 441,
    "rt_sigtimedwait": 128,
    "semop": 65,
    "semtimedop": 220,
    "io_getevents": 208,
    "io_uring_enter": 426,
    "select": 23,
    "pselect6": 270,
    "ppoll": 271,
}

_AARCH64_CALLS = {
    "read": 63,
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
}

X86_64 = Architecture(
    machine="x86_64",
    registers=27,
    number=10,  # rax
    arguments=(14, 13, 12, 7, 9, 8),  # rdi, rsi, rdx, r10, r8, r9
    result=10,
    original=15,
    instruction_pointer=16,
    stack_pointer=19,
    loop=(3, 2, 1, 0, 5, 4),  # r12, r13, r14, r15, rbx, rbp
    syscall=b"\x0f\x05",
    syscall_return=b"\x0f\x05\xc3",
    sigreturn=(bytes.fromhex("48c7c00f0000000f05"), bytes.fromhex("b80f0000000f05")),
    red_zone=128,
    server=_SERVER,
    local=_LOCAL,
    calls=_X86_64_CALLS,
)


def current() -> Optional[Architecture]:
    """This machine's architecture; None if there is no code for it."""
    return {"x86_64": X86_64}.get(os.uname().machine)


def call_numbers() -> Dict[str, int]:
    """The system call numbers of this machine, also where there is no code to inject."""
    return _AARCH64_CALLS if os.uname().machine == "aarch64" else _X86_64_CALLS
