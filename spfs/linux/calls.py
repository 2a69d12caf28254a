"""Tables of system calls: the form in which many calls are run by one piece of machine code.

The same table serves a tracee (``spfs.tracee`` writes it into its memory) and ourselves (``run_local``), where it
saves the interpreter's cost per call. An entry is 64 bytes: number, six arguments, result.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import struct
from concurrent.futures import Executor
from typing import Any, Optional, Sequence, Tuple, Union

from spfs.linux.arch import LOAD_ARGUMENT_0, LOAD_ARGUMENT_1, LOAD_ARGUMENT_2, LOAD_ARGUMENT_4
from spfs.linux.machine import call_numbers, current
from stubfs.libc import bind

ENTRY = 64
RESULT = 56  # offset of the result within an entry
_PACK = struct.Struct("<Qqqqqqqq")
_MASK = (1 << 64) - 1

_mmap = bind(
    "mmap",
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
    restype=ctypes.c_long,
)


class CallTable:
    """A table that grows by ``add``; where results will be is known before it runs (``base`` + offset).

    ``pending``: what the result of a call is that has not been made.
    """

    def __init__(self, pending: int = 0) -> None:
        self.numbers = call_numbers()
        self._pending = pending
        self._entries = bytearray()

    def __len__(self) -> int:
        return len(self._entries) // ENTRY

    def add(self, name: str, *arguments: int, load: int = 0) -> int:
        """Append a call; the index of its entry. ``load``: LOAD_ARGUMENT_* bits. Addresses must be below 2**63."""
        index = len(self._entries) // ENTRY
        filled = arguments + (0,) * (6 - len(arguments))
        self._entries += _PACK.pack(self.numbers[name] | load, *filled, self._pending)
        return index

    def encode(self) -> bytearray:
        """The table as it lies in memory; the object's own buffer, not to be resized while in use."""
        return self._entries


class FixedTable:
    """A table of ours that is run again and again, in parts."""

    def __init__(self, calls: Sequence[Tuple[Union[str, int], ...]]) -> None:
        """``calls``: each a name and its arguments."""
        table = CallTable()
        for name, *arguments in calls:
            table.add(str(name), *map(int, arguments))
        self._words = (ctypes.c_int64 * (len(table) * ENTRY // 8)).from_buffer_copy(table.encode())
        self._address = ctypes.addressof(self._words)
        self._code = _code()

    def run(self, part: slice) -> None:
        """Run the entries of a ``part``, all of them; OSError of the first one that failed. ``part``: where the results
        are, see ``part_of``."""
        self._code.run(self._address + 8 * part.start - RESULT, (part.stop - part.start) * 8 // ENTRY)
        results = self._words[part]
        if min(results) < 0:
            number = -next(result for result in results if result < 0)
            raise OSError(number, os.strerror(number))


def part_of(first: int, end: int) -> slice:
    """The entries from ``first`` to before ``end`` of a FixedTable."""
    return slice((first * ENTRY + RESULT) // 8, (end * ENTRY + RESULT) // 8, ENTRY // 8)


def results(table: Union[bytes, bytearray]) -> "array.array[int]":
    """The results in a table that has run: negative errno or the call's value, in the order of the entries."""
    words = array.array("q")
    words.frombytes(table)
    return words[RESULT // 8 :: ENTRY // 8]


def result_address(base: int, index: int) -> int:
    """Where entry ``index`` of a table at ``base`` keeps its result, for LOAD_ARGUMENT_*."""
    return base + index * ENTRY + RESULT


class _LocalCode:
    """The loop in our own memory. Made at first use: some systems refuse executable memory (then call by call)."""

    def __init__(self) -> None:
        self._function: Optional[Any] = None
        self._syscall = bind("syscall", *[ctypes.c_long] * 7, restype=ctypes.c_long)
        self._syscall.errcheck = lambda result, function, arguments: (
            -ctypes.get_errno() if result == -1 else result
        )
        architecture = current()
        if architecture is None:
            return
        # Mapped from a file: the kernel then sees to it that the processor's instruction cache has what was written.
        fd = os.memfd_create("calls", os.MFD_CLOEXEC)
        try:
            os.write(fd, architecture.local)
            # Not by Python's mmap, which keeps a descriptor of its own.
            address = _mmap(None, len(architecture.local), mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
        except OSError:
            return
        finally:
            os.close(fd)
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)(address)

    def run(self, address: int, count: int, by_call: bool = False) -> None:
        if self._function is not None and not by_call:
            self._function(address, count)
            return
        for entry in range(address, address + count * ENTRY, ENTRY):
            words = (ctypes.c_long * 8).from_address(entry)
            number, arguments = words[0] & 0xFFFFFFFF, list(words[1:7])
            if words[0] & LOAD_ARGUMENT_0:
                arguments[0] = ctypes.c_int.from_address(arguments[0]).value
            if words[0] & LOAD_ARGUMENT_1:
                arguments[1] = ctypes.c_long.from_address(arguments[1]).value
            if words[0] & LOAD_ARGUMENT_2:
                arguments[2] = ctypes.c_int.from_address(arguments[2]).value
            if words[0] & LOAD_ARGUMENT_4:
                arguments[4] = ctypes.c_int.from_address(arguments[4]).value
            words[7] = self._syscall(number, *arguments)


_local: Optional[_LocalCode] = None


def address_of(buffer: bytearray) -> int:
    """Where a buffer's bytes lie; valid while it is neither resized nor dropped."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else 0


def run_local(table: CallTable, by_call: bool = False) -> "array.array[int]":
    """Run a table in this thread and return the results; ``by_call`` without the machine code."""
    code, encoded = _code(), table.encode()
    if encoded:
        code.run(address_of(encoded), len(table), by_call)
    return results(encoded)


def run_shared(table: CallTable, cuts: Sequence[int], helper: Executor) -> "array.array[int]":
    """Run a table in this thread and in the one of ``helper``, which take turns at the parts between the ``cuts``:
    entries before which it can be cut, because no call behind it needs the result of one before it."""
    encoded = table.encode()
    if encoded:
        code, address = _code(), address_of(encoded)
        parts = iter(list(zip([0, *cuts], [*cuts, len(table)])))

        def work() -> None:
            for first, end in parts:
                code.run(address + first * ENTRY, end - first)

        helped = helper.submit(work)
        work()
        if not helped.cancel():
            helped.result()
    return results(encoded)


def _code() -> _LocalCode:
    global _local
    if _local is None:
        _local = _LocalCode()
    return _local
