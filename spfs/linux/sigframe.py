"""The frame by which rt_sigreturn(2) puts a task back to where it was, if nobody else does.

Layout: struct ucontext and struct sigcontext of arch/x86/include/uapi/asm, and the extended state behind them as
arch/x86/kernel/fpu/signal.c wants it (without it the vector registers would be reset). On a processor without XSAVE
that is what FXSAVE stores, and nothing says that there is more.
"""

from __future__ import annotations

import struct

from spfs.linux.arch import X86_64

_RESTART = {-512, -513, -514}  # ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND: not seen by user space
_ERESTART_RESTARTBLOCK = -516
_EINTR = 4
_UC_FLAGS = 0x2 | 0x4  # UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
_UC_FP_XSTATE = 0x1
_NO_STACK = 0x8  # ss_flags that sigaltstack(2) refuses, so that the alternate stack stays as it is
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
_FXSAVE = 512  # bytes
_SOFTWARE_BYTES = 464  # offset of struct _fpx_sw_bytes in the extended state
_XSTATE_BV = 512  # offset of the header's mask of components in use
_TILES = 0x60000  # AMX: the only components beyond _WITHOUT_TILES, and not part of a frame before they are used
_WITHOUT_TILES = 2696  # bytes, standard format up to PKRU
ALIGNMENT = 64
_CONTEXT = 320  # bytes for struct ucontext, rounded up

# sigcontext: r8 … r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags as indices of user_regs_struct.
_ORDER = (9, 8, 7, 6, 3, 2, 1, 0, 14, 13, 4, 5, 12, 10, 11, 19, 16, 18)
_CS, _SS = 17, 20
_STATE_POINTER = 224  # offset of sigcontext.fpstate in the frame


def build(registers: bytes, mask: bytes, xstate: bytes, address: int) -> bytes:
    """The frame to be written at ``address`` (a multiple of ALIGNMENT), with the stack pointer to be set there.

    ``registers``: NT_PRSTATUS as the interrupt left them; a system call that was interrupted is restarted, or, if
    it goes on by restart_syscall(2), which rt_sigreturn makes impossible, returns EINTR. ``xstate``: what
    ``spfs.linux.ptrace.floating_point_state`` gives.
    """
    words = list(X86_64.words(registers))
    if words[X86_64.original] < 1 << 63:
        result = words[X86_64.result] - (1 << 64)
        if result in _RESTART:
            words[X86_64.result] = words[X86_64.original]
            words[X86_64.instruction_pointer] -= len(X86_64.syscall)
        elif result == _ERESTART_RESTARTBLOCK:
            words[X86_64.result] = (1 << 64) - _EINTR
    state = _extended_state(xstate)
    flags = _UC_FLAGS | (_UC_FP_XSTATE if len(xstate) > _FXSAVE else 0)
    context = struct.pack("<QQQiiQ", flags, 0, 0, _NO_STACK, 0, 0)
    context += struct.pack("<18Q", *[words[index] for index in _ORDER])
    context += struct.pack("<HHHH", words[_CS], 0, 0, words[_SS])
    context += struct.pack("<4QQ64x", 0, 0, 0, 0, address + _CONTEXT)
    context += mask
    return context.ljust(_CONTEXT, b"\0") + state


def at(frame: bytes, address: int) -> bytes:
    """The same frame for another address."""
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
