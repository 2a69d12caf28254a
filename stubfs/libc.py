"""How the project calls what Python has no wrapper for: libc functions and raw system calls.

Each function is bound once, at import, with its types, and fails with OSError like the os module does.
The functions themselves live in ``stubfs.syscalls`` and ``spfs.linux``; nobody else imports ctypes.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Callable, Optional, Sequence

_libc = ctypes.CDLL(None, use_errno=True)


def raise_errno(call: str, filename: Optional[object] = None) -> None:
    """Raise OSError for the errno that the last call left in this thread."""
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), filename if filename is not None else call)


def _check(name: str) -> Any:
    def check(result: int, function: object, arguments: object) -> int:
        if result < 0:
            raise_errno(name)
        return result

    return check


def bind(name: str, *argtypes: Any, restype: Any = ctypes.c_int) -> Any:
    """The libc function ``name``; a negative result raises OSError whose filename is the function's name."""
    function = _libc[name]  # a new object each time, so that types set here are nobody else's
    function.argtypes = list(argtypes)
    function.restype = restype
    function.errcheck = _check(name)
    return function


def bind_quick(name: str) -> Any:
    """The libc function ``name``, returning an int, at a third of the price: for what each request needs.

    It must never wait, because no other thread runs meanwhile; and nothing is converted or checked: the arguments are
    pointers of byref(), and the caller looks at the result.
    """
    return ctypes.PyDLL(None)[name]


def bind_syscall(name: str, number: int, *argtypes: Any) -> Callable[..., int]:
    """The raw system call ``number``, for what glibc does not export, or wraps in a way that does not fit."""
    function = _libc["syscall"]
    function.argtypes = [ctypes.c_long, *argtypes]
    function.restype = ctypes.c_long
    function.errcheck = _check(name)

    def call(*arguments: Any) -> int:
        return int(function(number, *arguments))

    call.__name__ = name
    return call


def machine_syscall(numbers: Sequence[int]) -> int:
    """Of (x86-64, aarch64) system call numbers, the one of this machine."""
    return numbers[{"x86_64": 0, "aarch64": 1}[os.uname().machine]]
