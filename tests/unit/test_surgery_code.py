"""The injected machine code and the tables it runs: bytes against their listing, both ways of running agree."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from spfs.linux import aarch64, arch, x86_64
from spfs.linux.calls import CallTable, address_of, result_address, run_local

HEADERS = {"x86_64": "asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}  # the generic table is aarch64's
x86_64_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="a header of x86_64's")


def assembler(machine: str) -> str:
    """The prefix of its binutils' commands: none for this machine's own."""
    return "" if machine == os.uname().machine else f"{machine}-linux-gnu-"


# This machine's own, and what there is an assembler for: each is assembled where it runs.
MODULES = {
    machine: module
    for machine, module in (("x86_64", x86_64), ("aarch64", aarch64))
    if machine == os.uname().machine or shutil.which(assembler(machine) + "as")
}


@pytest.mark.parametrize("machine", MODULES)
@pytest.mark.parametrize("name", ["_CORE", "_SERVER", "_LOCAL"])
def test_bytes_are_their_listing(tmp_path: Path, name: str, machine: str) -> None:
    module, prefix = MODULES[machine], assembler(machine)
    source, thing, raw = tmp_path / "code.s", tmp_path / "code.o", tmp_path / "code.bin"
    syntax = ".intel_syntax noprefix\n" if machine == "x86_64" else ""
    source.write_text(syntax + getattr(module, name + "_LISTING"))
    subprocess.run([prefix + "as", "-o", str(thing), str(source)], check=True)
    subprocess.run([prefix + "objcopy", "-O", "binary", "-j", ".text", str(thing), str(raw)], check=True)
    assert raw.read_bytes() == getattr(module, name)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
@pytest.mark.parametrize("machine", [pytest.param("x86_64", marks=x86_64_only), "aarch64"])
def test_call_numbers(machine: str) -> None:
    """Against the kernel's headers."""
    numbers = {"x86_64": x86_64.X86_64, "aarch64": aarch64.AARCH64}[machine].calls
    source = f"#include <{HEADERS[machine]}>\n" + "".join(f"NUMBER {name} __NR_{name}\n" for name in numbers)
    out = subprocess.run(["cc", "-E", "-P", "-"], input=source, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"NUMBER\s+(\w+)\s+(\d+)", out))
    assert found == {name: str(number) for name, number in numbers.items()}


@pytest.mark.parametrize("by_call", [False, True])
def test_tables(by_call: bool) -> None:
    """Results, errors, and arguments that are loaded from memory."""
    fd, other = (os.memfd_create(name) for name in ("a", "b"))
    try:
        words = bytearray(struct.pack("<ixxxxq", fd, 77))
        table = CallTable()
        assert run_local(table, by_call).tolist() == []
        table.add("lseek", fd, 41, os.SEEK_SET)
        table.add("lseek", 0, 1, os.SEEK_CUR, load=arch.LOAD_ARGUMENT_0)
        table.add("lseek", other, 0, os.SEEK_SET, load=arch.LOAD_ARGUMENT_1)
        table.add("fcntl", other, 2, 0, load=arch.LOAD_ARGUMENT_2)
        table.add("close", -1)
        table.add("mmap", 0, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, 0, 0, load=arch.LOAD_ARGUMENT_4)
        encoded = table.encode()
        base = address_of(encoded)
        struct.pack_into("<Q", encoded, 64 + 8, address_of(words))
        struct.pack_into("<Q", encoded, 128 + 16, result_address(base, 1))
        struct.pack_into("<Q", encoded, 192 + 24, result_address(base, 4))
        struct.pack_into("<Q", encoded, 320 + 40, result_address(base, 4))
        assert run_local(table, by_call).tolist() == [41, 42, 42, 0, -9, -9]
        assert os.lseek(other, 0, os.SEEK_CUR) == 42
    finally:
        os.close(fd)
        os.close(other)


@pytest.mark.parametrize(
    "original, result, expected, back",
    [
        (0, -512, 0, 2),  # ERESTARTSYS: the call again
        (34, -514, 34, 2),  # ERESTARTNOHAND
        (35, -516, -4, 0),  # ERESTART_RESTARTBLOCK: EINTR, what it waits for is lost
        (1, 100, 100, 0),
        (-1, -512, -512, 0),  # not in a system call: a program's own number
    ],
)
def test_frame_restarts_as_the_kernel_would(original: int, result: int, expected: int, back: int) -> None:
    words = [0] * x86_64.X86_64.registers
    words[x86_64._ORIGINAL], words[x86_64.X86_64.result] = original & (1 << 64) - 1, result & (1 << 64) - 1
    words[x86_64.X86_64.instruction_pointer] = 0x1000
    xstate = bytearray(2696)
    struct.pack_into("<Q", xstate, 464, 0x2E7)
    frame = x86_64.X86_64.frame(struct.pack("<27Q", *words), b"\x01" + bytes(7), bytes(xstate), 0x5000)
    registers = struct.unpack_from("<18q", frame, 40)
    assert (registers[13], registers[16]) == (expected, 0x1000 - back)
    assert struct.unpack_from("<Q", frame, 224) == (0x5000 + 320,) and frame[296:304] == b"\x01" + bytes(7)
    assert struct.unpack_from("<IIQI", frame, 320 + 464) == (0x46505853, 2700, 0x2E7, 2696)
    assert frame[-4:] == struct.pack("<I", 0x46505845)
    assert x86_64.X86_64.frame_at(frame, 0x9000) == x86_64.X86_64.frame(
        struct.pack("<27Q", *words), b"\x01" + bytes(7), bytes(xstate), 0x9000
    )


def test_frame_without_extended_state() -> None:
    """Of a processor without XSAVE: 512 bytes, and nothing that announces more (no magic, no UC_FP_XSTATE)."""
    state = bytes(range(256)) * 2
    frame = x86_64.X86_64.frame(bytes(8 * x86_64.X86_64.registers), bytes(8), state, 0x5000)
    assert struct.unpack_from("<Q", frame) == (0x6,)
    assert frame[320:] == state[:464] + bytes(48)
