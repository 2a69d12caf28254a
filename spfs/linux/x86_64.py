"""x86-64: registers, system call numbers (arch/x86/entry/syscalls/syscall_64.tbl), injected code, signal frame.

The code is listed beside its bytes; a test assembles the listing again.
"""

from __future__ import annotations

import operator
import struct
from typing import MutableSequence, Optional, Sequence

from spfs.linux.arch import NO_STACK, Architecture, Interrupted, Noted

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

# In the tracee: r12 = table, r13 = count, r14 = 16 bytes for commands, behind which are our end and its own one of the
# socket, r15 = socket, rbx = signal frame's ucontext, rbp = not 0 if close() may be forbidden. MSG_NOSIGNAL: a SIGPIPE,
# blocked now, would kill the tracee afterwards.
_SERVER_LISTING = (
    "0:"
    + _CORE_LISTING
    + """
    mov r15d, [r14+20]
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
    "458b7e14b82c0000004489ff4c89f6ba0100000041ba004000004531c04531c90f0531c04489ff4c89f6ba100000000f05"
    "4883f810750c4d8b264d8b6e08e95cffffff85ed750ab8030000004489ff0f054889dcb80f0000000f05"
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

_CALLS = {
    "execve": 59,
    "execveat": 322,
    "read": 0,
    "ioctl": 16,
    "close": 3,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "mremap": 25,
    "msync": 26,
    "madvise": 28,
    "connect": 42,
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
    "tkill": 200,
    "ptrace": 101,
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
    "accept": 43,
    "accept4": 288,
    "recvfrom": 45,
    "recvmmsg": 299,
    "sendto": 44,
    "sendmsg": 46,
    "sendmmsg": 307,
    "readv": 19,
    "write": 1,
    "writev": 20,
    "io_pgetevents": 333,
}

_RESULT, _ORIGINAL, _INSTRUCTION_POINTER, _STACK_POINTER = 10, 15, 16, 19  # rax, orig_rax, rip, rsp
_CS, _SS = 17, 20
_USER32_CS = 0x23
_ERESTARTNOHAND = -514
_WORD = (1 << 64) - 1
_NT_X86_XSTATE, _NT_PRFPREG = 0x202, 2  # what XSAVE stores; what FXSAVE stores

# The signal frame: struct ucontext and struct sigcontext of arch/x86/include/uapi/asm, and the extended state behind
# them as arch/x86/kernel/fpu/signal.c wants it (without it the vector registers would be reset). On a processor without
# XSAVE that is what FXSAVE stores, and nothing says that there is more.
_RESTART = {-512, -513, -514}  # ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND: not seen by user space
_ERESTART_RESTARTBLOCK = -516
_EINTR = 4
_UC_FLAGS = 0x2 | 0x4  # UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
_UC_FP_XSTATE = 0x1
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
_FXSAVE = 512  # bytes
_SOFTWARE_BYTES = 464  # offset of struct _fpx_sw_bytes in the extended state
_XSTATE_BV = 512  # offset of the header's mask of components in use
_TILES = 0x60000  # AMX: the only components beyond _WITHOUT_TILES, and not part of a frame before they are used
_WITHOUT_TILES = 2696  # bytes, standard format up to PKRU
# struct ucontext: flags, no link, the alternate stack, sigcontext with the pointer to the extended state, signal mask.
_UCONTEXT = struct.Struct("<Q 8x 8x i 12x 18Q 4H 32x Q 64x 8s 16x")
_CONTEXT = _UCONTEXT.size  # rounded up to FRAME_ALIGNMENT

# sigcontext: r8 … r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags as indices of user_regs_struct.
_in_order = operator.itemgetter(9, 8, 7, 6, 3, 2, 1, 0, 14, 13, 4, 5, 12, 10, 11, 19, 16, 18)
_STATE_POINTER = 224  # offset of sigcontext.fpstate in the frame


class _X86_64(Architecture):
    def is_compatibility(self, words: Sequence[int]) -> bool:
        return words[_CS] == _USER32_CS

    def outside_of_calls(self, words: Sequence[int]) -> bool:
        return words[_ORIGINAL] >> 63 == 1

    def forget_call(self, words: MutableSequence[int]) -> None:
        words[_ORIGINAL] = _WORD  # else the kernel would "restart" with our registers

    def return_to(self, words: MutableSequence[int], code: int, frame: int) -> None:
        words[_STACK_POINTER] = frame - 8  # where the return address is

    def interrupted(self, words: MutableSequence[int], noted: Optional[Noted]) -> Optional[Interrupted]:
        if self.outside_of_calls(words):
            return None
        result = words[_RESULT]
        return Interrupted(words[_ORIGINAL], result - (1 << 64) if result >> 63 else result)

    def restart_unless_handled(self, words: MutableSequence[int]) -> None:
        words[_RESULT] = _ERESTARTNOHAND & _WORD

    def frame(self, registers: bytes, mask: bytes, state: bytes, address: int) -> bytes:
        """An interrupted system call is restarted, or, if it goes on by restart_syscall(2), which rt_sigreturn makes
        impossible, returns EINTR."""
        words = list(self.words(registers))
        if not self.outside_of_calls(words):
            result = words[_RESULT] - (1 << 64)
            if result in _RESTART:
                words[_RESULT] = words[_ORIGINAL]
                words[_INSTRUCTION_POINTER] -= len(self.syscall)
            elif result == _ERESTART_RESTARTBLOCK:
                words[_RESULT] = (1 << 64) - _EINTR
        flags = _UC_FLAGS | (_UC_FP_XSTATE if len(state) > _FXSAVE else 0)
        segments = (words[_CS], 0, 0, words[_SS])
        context = _UCONTEXT.pack(flags, NO_STACK, *_in_order(words), *segments, address + _CONTEXT, mask)
        return context + _extended_state(state)

    def frame_at(self, frame: bytes, address: int) -> bytes:
        pointer = struct.pack("<Q", address + _CONTEXT)
        return frame[:_STATE_POINTER] + pointer + frame[_STATE_POINTER + 8 :]


def _extended_state(xstate: bytes) -> bytes:
    size = len(xstate)
    if size == _FXSAVE:
        return xstate[:_SOFTWARE_BYTES].ljust(_FXSAVE, b"\0")
    (used,) = struct.unpack_from("<Q", xstate, _XSTATE_BV)
    # The frame may not be larger than what this task has permission for (check_xstate_in_sigframe).
    if size > _WITHOUT_TILES and not used & _TILES:
        size = _WITHOUT_TILES
    state = bytearray(xstate[:size])
    (features,) = struct.unpack_from("<Q", state, _SOFTWARE_BYTES)  # the kernel puts XCR0 there (regset.c)
    struct.pack_into("<IIQI28x", state, _SOFTWARE_BYTES, _MAGIC1, size + 4, features, size)
    return bytes(state) + struct.pack("<I", _MAGIC2)


X86_64 = _X86_64(
    machine="x86_64",
    registers=27,
    number=_RESULT,
    arguments=(14, 13, 12, 7, 9, 8),  # rdi, rsi, rdx, r10, r8, r9
    result=_RESULT,
    instruction_pointer=_INSTRUCTION_POINTER,
    stack_pointer=_STACK_POINTER,
    loop=(3, 2, 1, 0, 5, 4),  # r12, r13, r14, r15, rbx, rbp
    syscall=b"\x0f\x05",
    syscall_return=b"\x0f\x05\xc3",
    sigreturn=(bytes.fromhex("48c7c00f0000000f05"), bytes.fromhex("b80f0000000f05")),
    epoll_event="<IQ",  # packed
    red_zone=128,
    state_kinds=(_NT_X86_XSTATE, _NT_PRFPREG),
    server=_SERVER,
    local=_LOCAL,
    calls=_CALLS,
)
