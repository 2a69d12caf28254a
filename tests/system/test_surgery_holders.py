"""What holds files without a descriptor of the process's: io_uring, and sockets with descriptors in flight."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from surgery_kit import Mounts, Victim, mounts, tasks_stopped, victim

from spfs.testing import process_state, wait_until

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

RING = """
libc = ctypes.CDLL(None, use_errno=True)
params = ctypes.create_string_buffer(120)
ring = libc.syscall(425, 4, params)  # io_uring_setup
assert ring >= 0, ctypes.get_errno()
sq_head, sq_tail, sq_mask, sq_entries, sq_flags, sq_dropped, sq_array = struct.unpack_from('7I', params, 40)
cq_head, = struct.unpack_from('I', params, 80)
def register(*fds):
    assert libc.syscall(427, ring, 2, (ctypes.c_int * len(fds))(*fds), len(fds)) == 0, ctypes.get_errno()
def count(memory, at):
    value, = struct.unpack_from('I', memory, at)
    struct.pack_into('I', memory, at, value + 1)
    return value
def fixed_read(index, length=3):
    buffer = ctypes.create_string_buffer(16)
    # IORING_FEAT_SINGLE_MMAP: both queues are in one mapping
    with mmap.mmap(ring, 4096) as queues, mmap.mmap(ring, 256, offset=0x10000000) as entries:
        mask, tail = struct.unpack_from('I', queues, sq_mask)[0], struct.unpack_from('I', queues, sq_tail)[0]
        slot = tail & mask
        # IORING_OP_READ, IOSQE_FIXED_FILE
        entry = struct.pack('BBHiQQI', 22, 1, 0, index, 0, ctypes.addressof(buffer), length)
        entries[64 * slot:64 * slot + 64] = entry.ljust(64, bytes(1))
        struct.pack_into('I', queues, sq_array + 4 * slot, slot)
        count(queues, sq_tail)
        assert libc.syscall(426, ring, 1, 1, 1, None, 0) == 1, ctypes.get_errno()
        count(queues, cq_head)
    return buffer.raw[:length]
"""


def has_ring() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(425, 1, ctypes.create_string_buffer(120))
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


needs_ring = pytest.mark.skipif(not has_ring(), reason="no io_uring (io_uring_setup fails)")


@needs_ring
def test_files_registered_with_a_ring(mounts: Mounts, victim: Victim) -> None:
    """What is read through the ring comes from the new file; others that are registered stay as they are."""
    path = mounts.file("f")
    elsewhere = mounts.old.parent / "elsewhere"
    elsewhere.write_text("elsewhere")
    victim.run(RING + f"a, b = os.open({str(elsewhere)!r}, 0), os.open({path!r}, os.O_RDWR); register(a, -1, b)")
    assert victim.run("fixed_read(0), fixed_read(2)") == (b"els", b"old")
    report = mounts.switch()
    assert (report.moved, report.left) == ({"file": 1, "io_uring file": 1}, [])
    assert victim.run("fixed_read(0), fixed_read(2), os.read(b, 3)") == (b"els", b"new", b"new")


@needs_ring
def test_ring_with_a_thread_of_the_kernel(mounts: Mounts, victim: Victim) -> None:
    """IORING_SETUP_SQPOLL: it is one of the process's tasks, and stopped and let go with them."""
    path = mounts.file("f")
    parameters = "ctypes.create_string_buffer(struct.pack('8x2I', 2, 60000).ljust(120, bytes(1)), 120)"
    victim.run(RING.replace("ctypes.create_string_buffer(120)", parameters) + f"a = os.open({path!r}, 0); register(a)")
    assert "iou-sqp-" in "".join(file.read_text() for file in Path(f"/proc/{victim.pid}/task").glob("*/comm"))
    report = mounts.switch()
    assert (report.moved, report.left) == ({"file": 1, "io_uring file": 1}, []) and tasks_stopped(victim.pid) == []
    assert victim.run("fixed_read(0), os.read(a, 3)") == (b"new", b"new")


@needs_ring
def test_files_that_only_a_ring_has(mounts: Mounts, victim: Victim) -> None:
    paths = [mounts.file(name) for name in ("closed", "twice")]
    victim.run(RING + f"a, b, c = [os.open(p, 0) for p in {(*paths, paths[1])!r}]; register(a, b); os.close(a)")
    report = mounts.switch()
    reasons = {left.what.partition(" file ")[2]: left.reason for left in report.left}
    assert "only the ring" in reasons["0"] and "more than once" in reasons["1"] and report.moved == {"file": 2}
    assert victim.run("fixed_read(0), fixed_read(1), os.read(c, 3)") == (b"old", b"old", b"new")


@needs_ring
def test_sockets_that_a_ring_has(mounts: Mounts, victim: Victim) -> None:
    """Registered, or with a request under way, of which the kernel does not say for what: it would wait for ever."""
    victim.run(RING + f"one = socket.socket(socket.AF_UNIX); one.bind({str(mounts.old / 'bound')!r}); one.listen()")
    victim.run("register(one.fileno())")
    (left,) = mounts.switch().left
    assert "an io_uring of its process" in left.reason
    victim.run("assert libc.syscall(427, ring, 3, None, 0) == 0")  # IORING_UNREGISTER_FILES
    (left,) = mounts.switch().left
    assert "does not lead to the new mount" in left.reason
    victim.run(
        """
with mmap.mmap(ring, 4096) as queues, mmap.mmap(ring, 256, offset=0x10000000) as entries:
    entries[:64] = struct.pack('BBHiQQII', 6, 0, 0, one.fileno(), 0, 0, 0, 1).ljust(64, bytes(1))  # IORING_OP_POLL_ADD
    struct.pack_into('I', queues, sq_array, 0)
    count(queues, sq_tail)
    assert libc.syscall(426, ring, 1, 0, 0, None, 0) == 1, ctypes.get_errno()
"""
    )
    (left,) = mounts.switch().left
    assert "an io_uring of its process" in left.reason


@needs_ring
@pytest.mark.parametrize("call", ["io_uring", "io_submit"])
def test_fifo_that_a_request_waits_for(mounts: Mounts, victim: Victim, call: str) -> None:
    """Its writer must not go: the request would find the end of the fifo, or be told of nothing any more."""
    mounts.both(lambda root: os.mkfifo(root / "fifo"))
    path = str(mounts.old / "fifo")
    victim.run(f"r = os.open({path!r}, os.O_RDONLY | os.O_NONBLOCK)")
    writer = Victim()
    try:
        writer.run(f"import os; w = os.open({path!r}, os.O_WRONLY)")
        if call == "io_uring":
            victim.run(RING + READ_LATER + "os.set_blocking(r, True); read_later(r)")
            reason = "an io_uring of its process"
        else:
            victim.run(POLL_LATER)
            reason = "io_submit"
        report = mounts.switch()
        assert report.moved == {} and len(report.left) == 2 and all(reason in left.reason for left in report.left)
        writer.run("os.write(w, b'abc')")
        if call == "io_uring":
            assert victim.run("enter(1), buffer.raw[:3]") == (0, b"abc")
        else:
            assert victim.run("libc.syscall(io_getevents, context, 1, 1, events, None), os.read(r, 3)") == (1, b"abc")
            victim.run("assert libc.syscall(io_destroy, context) == 0")
        assert mounts.switch().moved == {"fifo": 2} and mounts.users() == []
        writer.run("os.write(w, b'def')")
        assert victim.run("os.read(r, 3)") == b"def"
    finally:
        writer.close()


@needs_ring
def test_buffers_registered_with_a_ring(mounts: Mounts, victim: Victim) -> None:
    """The ring has their pages: what it reads would never be seen in others."""
    path = mounts.file("f", b"x" * 8192, b"y" * 8192)
    victim.run(
        RING
        + f"""
f = os.open({path!r}, os.O_RDWR); m, n = [mmap.mmap(f, 4096, mmap.MAP_PRIVATE) for _ in range(2)]
m[0], n[0] = 97, 97; address = ctypes.addressof(ctypes.c_char.from_buffer(m))
def register_buffer():
    assert libc.syscall(427, ring, 0, struct.pack('QQ', address, 4096), 1) == 0, ctypes.get_errno()
a, b = os.pipe(); os.write(b, b'through')
def read_fixed(length):
    with mmap.mmap(ring, 4096) as queues, mmap.mmap(ring, 256, offset=0x10000000) as entries:
        mask, tail = struct.unpack_from('I', queues, sq_mask)[0], struct.unpack_from('I', queues, sq_tail)[0]
        # IORING_OP_READ_FIXED, of the pipe
        entry = struct.pack('BBHiQQI', 4, 0, 0, a, 2**64 - 1, address, length).ljust(64, bytes(1))
        entries[64 * (tail & mask):64 * (tail & mask) + 64] = entry
        struct.pack_into('I', queues, sq_array + 4 * (tail & mask), tail & mask)
        count(queues, sq_tail)
        assert libc.syscall(426, ring, 1, 1, 1, None, 0) == 1, ctypes.get_errno()
        count(queues, cq_head)
    return m[:length]
"""
    )
    # After everything was looked at, for one that comes late.
    _, report = mounts.prepared_switch(between=lambda: victim.run("register_buffer()"))
    assert [(left.kind, "registered with an io_uring" in left.reason) for left in report.left] == [
        ("private mapping", True)
    ]
    assert report.moved["private mapping"] == 1 and victim.run("n[:3], m[:3]") == (b"axx", b"axx")
    assert victim.run("read_fixed(7)") == b"through"
    victim.run("assert libc.syscall(427, ring, 1, None, 0) == 0")  # IORING_UNREGISTER_BUFFERS
    assert mounts.switch().moved == {"private mapping": 1} and mounts.users() == []
    assert victim.run("m[:8]") == b"throughx"


READ_LATER = """
def enter(complete):
    return libc.syscall(426, ring, 0, complete, 1, None, 0)
def read_later(fd):
    global buffer
    buffer = ctypes.create_string_buffer(16)
    with mmap.mmap(ring, 4096) as queues, mmap.mmap(ring, 256, offset=0x10000000) as entries:
        entries[:64] = struct.pack('BBHiQQI', 22, 0, 0, fd, 2**64 - 1, ctypes.addressof(buffer), 3).ljust(64, bytes(1))
        struct.pack_into('I', queues, sq_array, 0)
        count(queues, sq_tail)
        assert libc.syscall(426, ring, 1, 0, 0, None, 0) == 1, ctypes.get_errno()
"""
IO_CALLS = (206, 207, 209, 208) if os.uname().machine == "x86_64" else (0, 1, 2, 4)
POLL_LATER = f"""
io_setup, io_destroy, io_submit, io_getevents = {IO_CALLS}
libc = ctypes.CDLL(None, use_errno=True)
context, events = ctypes.c_ulong(), ctypes.create_string_buffer(32)
assert libc.syscall(io_setup, 4, ctypes.byref(context)) == 0, ctypes.get_errno()
# struct iocb: IOCB_CMD_POLL of r, for POLLIN
request = ctypes.create_string_buffer(struct.pack('QIIHhIQQqQII', 1, 0, 0, 5, 0, r, 1, 0, 0, 0, 0, 0))
pointer = ctypes.c_void_p(ctypes.addressof(request))
assert libc.syscall(io_submit, context, 1, ctypes.byref(pointer)) == 1, ctypes.get_errno()
"""


SENT = """
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_{0})
fd, again = os.open({1!r}, os.O_RDWR), os.open({1!r}, os.O_RDWR | os.O_APPEND)
null = os.open('/dev/null', 0); os.lseek(fd, 2, 0); os.lseek(again, 1, 0)
a.send(b'before'); socket.send_fds(a, [b'take it'], [null, fd]); a.send(b'after'); socket.send_fds(a, [b'too'], [again])
a.send(b'end')
"""
TAKEN = """
def receive():
    data, fds, _, _ = socket.recv_fds(b, 6, 5)
    return data, fds
"""


@pytest.mark.parametrize("kind", ["STREAM", "DGRAM", "SEQPACKET"])
def test_descriptors_in_flight(mounts: Mounts, victim: Victim, kind: str) -> None:
    """Those of the mount are exchanged, in their messages, with their offsets and flags, and still shared."""
    path = mounts.file("f", b"0123456789", b"abcdefghij")
    victim.run(SENT.format(kind, path) + TAKEN + "os.close(fd); sizes = a.getsockopt(1, 7), b.getsockopt(1, 42)")
    report = mounts.switch()
    assert (report.moved, report.left, mounts.users()) == ({"file": 1, "descriptor in flight": 2}, [], [])
    assert victim.run("(a.getsockopt(1, 7), b.getsockopt(1, 42)) == sizes")
    assert victim.run("receive()") == (b"before", [])
    data, fds = victim.run("receive()")
    assert data == b"take i" and len(fds) == 2
    assert victim.run(f"os.read({fds[1]}, 3), os.readlink('/proc/self/fd/{fds[0]}')") == (b"cde", "/dev/null")
    assert victim.run("receive()") == (b"tafter" if kind == "STREAM" else b"after", [])
    data, (shared,) = victim.run("receive()")
    assert data == b"too" and victim.run(f"os.read({shared}, 2), os.read(again, 2)") == (b"bc", b"de")
    assert victim.run(f"os.write({shared}, b'!'); os.pread({shared}, 20, 0)") == b"abcdefghij!"
    assert victim.run("receive()") == (b"end", [])
    victim.run("a.send(b'more')")
    assert victim.run("receive()") == (b"more", []) and victim.run("b.setblocking(False)") is None


def test_descriptors_in_flight_between_processes(mounts: Mounts, victim: Victim) -> None:
    """With the credentials of who sent them, while the other one sleeps for room; only if both ends are reached."""
    path = mounts.file("f")
    victim.run(
        f"""
a, b = socket.socketpair(); b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
r, w = os.pipe(); child = os.fork()
if not child:
    b.close(); a.setsockopt(1, 7, 5000)
    fd = os.open({path!r}, 0); socket.send_fds(a, [b'take it'], [fd]); os.close(fd)
    os.close(w); a.sendall(bytes(100000)); os._exit(0)
os.close(w); os.read(r, 1); a.close()
"""
    )
    child = victim.run("child")
    wait_until(lambda: process_state(child) == "S")
    report = mounts.switch(chosen={victim.pid})
    reasons = [one.reason for one in report.left]
    assert len(reasons) == 1 and f"process {child} (" in reasons[0] and "is not among" in reasons[0], report
    report = mounts.switch()
    assert (report.moved, report.left) == ({"descriptor in flight": 1}, [])
    victim.run("data, more, _, _ = b.recvmsg(99, 99)")
    kinds = victim.run("sorted((kind, len(content)) for _, kind, content in more)")
    assert kinds == [(1, 4), (2, 12)] and victim.run("data") == b"take it"
    rights = "struct.unpack('i', [c for _, kind, c in more if kind == 1][0])[0]"
    assert victim.run(f"os.read({rights}, 3), struct.unpack('iII', [c for _, k, c in more if k == 2][0])") == (
        b"new",
        (child, 0, 0),
    )
    assert victim.run("sum(iter(lambda: len(b.recv(9999)), 0)); os.waitpid(child, 0)[1]") == 0


def test_descriptors_in_flight_that_stay(mounts: Mounts, victim: Victim) -> None:
    """Where the writer is gone, or the file cannot go; received undamaged, and moved afterwards."""
    path = mounts.file("f")
    victim.run("a, b = socket.socketpair(); c, d = socket.socketpair()")
    victim.run(f"fd = os.open({path!r}, 0); socket.send_fds(a, [b'closed'], [fd]); a.close(); os.close(fd)")
    victim.run(f"fd = os.open({mounts.file('only here', new=None)!r}, 0); socket.send_fds(c, [b'missing'], [fd])")
    report = mounts.switch()
    reasons = {one.path: one.reason for one in report.left if one.kind == "descriptor in flight"}
    assert "other end is closed" in reasons["f"] and "no such file on the new mount" in reasons["only here"]
    assert report.moved == {} and victim.run("socket.recv_fds(d, 20, 5)[0]") == b"missing"
    assert victim.run("message, fds, _, _ = socket.recv_fds(b, 20, 5); message, os.pread(fds[0], 3, 0)") == (
        b"closed",
        b"old",
    )
    assert mounts.switch().moved == {"file": 1}
    assert victim.run("os.pread(fds[0], 3, 0)") == b"new"
