"""Descriptors and directories of real processes, moved between two mounts."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Callable

import pytest
from surgery_kit import Mounts, Victim, compile_c, mounts, tasks_stopped, victim

from spfs.errors import SpfsError
from spfs.linux import process

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


def _has_thread_pidfds() -> bool:
    try:
        os.close(process.pidfd_open(os.getpid(), leader=False))
    except OSError:
        return False
    return True


thread_pidfds = pytest.mark.skipif(not _has_thread_pidfds(), reason="no pidfds of threads (Linux 6.9)")

UNPRIVILEGED = "os.setgroups([]); os.setresgid(1234, 1234, 1234); os.setresuid(1234, 1234, 1234)"


def test_offset_flags_and_cloexec_are_kept(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    victim.run(
        f"""
path = {path!r}
plain = os.open(path, os.O_RDWR)
os.lseek(plain, 4, 0)
append = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_DSYNC)
inherited = os.open(path, os.O_RDONLY)
os.set_inheritable(inherited, True)
fds = (plain, append, inherited)
def state():
    return [(fcntl.fcntl(f, fcntl.F_GETFL), fcntl.fcntl(f, fcntl.F_GETFD), os.lseek(f, 0, 1)) for f in fds]
"""
    )
    before = victim.run("state()")
    report = mounts.switch()
    assert report.moved == {"file": 3} and report.left == [] and report.rounds == 1
    assert victim.run("state()") == before
    assert victim.run("os.read(plain, 3), os.read(inherited, 12)") == (b"con", b"new contents")
    victim.run("os.write(append, b'!')")
    assert (mounts.new / "f").read_bytes() == b"new contents!"
    assert mounts.users() == []


def test_opening_flags_that_act_are_not_repeated(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("kept", new=b"precious")
    flags = "os.O_RDWR | os.O_CREAT | os.O_TRUNC"
    victim.run(f"a = os.open({path!r}, {flags}); b = os.open({path + '2'!r}, {flags} | os.O_EXCL)")
    (mounts.new / "kept2").write_bytes(b"also precious")
    assert mounts.switch().moved == {"file": 2}
    assert victim.run("os.read(a, 20), os.read(b, 20)") == (b"precious", b"also precious")


def test_path_descriptor_and_symlink(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    mounts.both(lambda root: os.symlink("f", root / "link"))
    link = str(mounts.old / "link")
    victim.run(f"p = os.open({path!r}, os.O_PATH); l = os.open({link!r}, os.O_PATH | os.O_NOFOLLOW)")
    assert mounts.switch().moved == {"path": 2}
    assert victim.run("os.read(os.open(f'/proc/self/fd/{p}', os.O_RDONLY), 20)") == b"new contents"
    assert victim.run("os.readlink('', dir_fd=l)") == "f"
    assert mounts.users() == []


def test_directories_and_cwd(mounts: Mounts, victim: Victim) -> None:
    mounts.both(lambda root: (root / "d").mkdir())
    (mounts.new / "d" / "only new").touch()
    victim.run(f"d = os.open({str(mounts.old / 'd')!r}, os.O_RDONLY); os.chdir(d)")
    assert mounts.switch().moved == {"directory": 1, "cwd": 1}
    assert victim.run("os.listdir(d), os.listdir('.'), os.getcwd()") == (
        ["only new"],
        ["only new"],
        str(mounts.new / "d"),
    )


def test_shared_descriptions_stay_shared(mounts: Mounts, victim: Victim) -> None:
    """By dup, fork and SCM_RIGHTS: one description before, one afterwards."""
    path = mounts.file("f")
    victim.run(
        f"""
a = os.open({path!r}, os.O_RDWR); b = os.dup(a)
up, down = socket.socketpair(); back, answer = os.pipe()
child = os.fork()
if child == 0:
    os.close(a); os.close(b); up.close()
    received = socket.recv_fds(down, 1, 1)[1][0]
    os.write(answer, b'r')
    while down.recv(1):
        os.write(answer, bytes([os.lseek(received, 1, 1)]))
    os._exit(0)
down.close()
socket.send_fds(up, [b'x'], [a]); os.read(back, 1)
"""
    )
    report = mounts.switch()
    assert report.moved == {"file": 3} and len(report.processes) == 2
    assert victim.run("os.lseek(a, 5, 0); up.send(b'x'); os.read(back, 1), os.lseek(b, 0, 1)") == (b"\x06", 6)
    assert victim.run("up.close(); os.read(b, 3), os.waitpid(child, 0)[1]") == (b"new contents"[6:9], 0)


@thread_pidfds
def test_threads_with_tables_and_directories_of_their_own(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    mounts.both(lambda root: (root / "d").mkdir())
    (mounts.new / "d" / "here").touch()
    victim.run(
        f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
ready, go, found = threading.Event(), threading.Event(), []
def alone():
    assert libc.unshare(0x400 | 0x200) == 0  # CLONE_FILES | CLONE_FS
    fd = os.open({path!r}, os.O_RDONLY); os.chdir({str(mounts.old / "d")!r})
    ready.set(); go.wait()
    found.append((os.read(fd, 3), os.listdir('.')))
threads = [threading.Thread(target=alone), threading.Thread(target=go.wait)]
[t.start() for t in threads]; ready.wait()
"""
    )
    assert mounts.switch().moved == {"file": 1, "cwd": 1}
    assert victim.run("go.set(); [t.join() for t in threads]; found") == [(b"new", ["here"])]
    assert mounts.users() == []


@thread_pidfds
def test_tables_of_threads_that_cannot_be_reached(
    mounts: Mounts, victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on kernels without pidfds of threads: what such a thread has is left, and said to be; the rest goes."""
    paths = [mounts.file(name) for name in ("both", "leader", "thread")]
    victim.run(
        f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
ready, go = threading.Event(), threading.Event()
both, mine = os.open({paths[0]!r}, os.O_RDONLY), os.open({paths[1]!r}, os.O_RDONLY)
def alone():
    assert libc.unshare(0x400) == 0  # CLONE_FILES
    os.close(mine)
    os.open({paths[2]!r}, os.O_RDONLY)
    ready.set(); go.wait()
thread = threading.Thread(target=alone)
thread.start(); ready.wait()
"""
    )
    pidfd_open = process.pidfd_open

    def of_leaders(tid: int, leader: bool = True) -> int:
        if not leader:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pidfd_open(tid)

    with monkeypatch.context() as patch:
        patch.setattr(process, "pidfd_open", of_leaders)
        report = mounts.switch()
    assert report.moved == {"file": 1}
    assert sorted(one.path or "" for one in report.left) == ["both", "both", "thread"]
    assert all("before Linux 6.9" in one.reason for one in report.left)
    assert victim.run("os.pread(both, 3, 0), os.pread(mine, 3, 0)") == (b"old", b"new")
    assert mounts.switch().left == [] and mounts.users() == []
    victim.run("go.set(); thread.join()")


CLONE, EXIT = {"x86_64": (56, 60), "aarch64": (220, 93)}.get(os.uname().machine, (-1, -1))  # system call numbers


@thread_pidfds
def test_process_whose_first_thread_has_ended(mounts: Mounts) -> None:
    """It has no descriptors any more; those of its other threads are moved all the same."""
    source = f"""
import ctypes, os, threading, sys
fd = os.open({mounts.file("f")!r}, os.O_RDONLY)
os.chdir({str(mounts.old)!r})
def rest():
    while open('/proc/%d/stat' % os.getpid()).read().rpartition(')')[2].split()[0] != 'Z': pass
    os.write(1, b'r'); os.read(0, 1); os.write(1, os.pread(fd, 3, 0)); os._exit(0)
threading.Thread(target=rest).start()
ctypes.CDLL(None).syscall({EXIT}, 0)  # exit, of this thread alone
"""
    with subprocess.Popen(
        [shutil.which("python3") or "python3", "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as ended:
        assert ended.stdout is not None and ended.stdin is not None
        assert os.read(ended.stdout.fileno(), 1) == b"r"
        report = mounts.switch()
        out, _ = ended.communicate(b"x", timeout=20)
        assert (report.moved, report.left) == ({"file": 1, "cwd": 1}, [])
        assert out == b"new"


def test_tables_shared_between_processes(mounts: Mounts, tmp_path: Path) -> None:
    """clone(2) with CLONE_FILES and CLONE_FS but without CLONE_THREAD: moved once, seen by both."""
    path = mounts.file("f")
    source = f"""
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
fd = os.open({path!r}, os.O_RDONLY); os.chdir({str(mounts.old)!r})
libc.syscall.restype = ctypes.c_long
pid = libc.syscall({CLONE}, 0x400 | 0x200 | signal.SIGCHLD, 0, 0, 0, 0)
os.write(1, b'r')
os.read(0, 1)
sys.stdout.write(os.read(fd, 1).decode() + os.getcwd()[-3:]); sys.stdout.flush()
if pid: os.waitpid(pid, 0)
"""
    process = subprocess.Popen(
        [shutil.which("python3") or "python3", "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None and process.stdin is not None
        assert os.read(process.stdout.fileno(), 1) + os.read(process.stdout.fileno(), 1) == b"rr"
        report = mounts.switch()
        assert report.moved == {"file": 1, "cwd": 1} and report.left == []
        assert mounts.users() == []
        process.stdin.write(b"gg")
        process.stdin.close()
        assert sorted(process.stdout.read().decode().replace("new", "")) == ["e", "n"]


def test_directories_shared_alone(mounts: Mounts, tmp_path: Path) -> None:
    """CLONE_FS without CLONE_FILES: each has its descriptors, and where one goes, the other is."""
    path = mounts.file("f")
    mounts.both(lambda root: (root / "directory").mkdir())
    source = f"""
import ctypes, os, signal
libc = ctypes.CDLL(None)
libc.syscall.restype = ctypes.c_long
os.chdir({str(mounts.old)!r})
pid = libc.syscall({CLONE}, 0x200 | signal.SIGCHLD, 0, 0, 0, 0)
fd = os.open({path!r}, os.O_RDONLY)
os.write(1, b'r')
os.read(0, 1)
if not pid:
    os.chdir('directory'); os._exit(0)
os.waitpid(pid, 0)
os.write(1, os.read(fd, 3) + os.path.basename(os.readlink('/proc/self/cwd')).encode())
"""
    with subprocess.Popen(
        [shutil.which("python3") or "python3", "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1) + os.read(process.stdout.fileno(), 1) == b"rr"
        report = mounts.switch()
        assert (report.moved, report.left, mounts.users()) == ({"file": 2, "cwd": 1}, [], [])
        assert process.communicate(b"gg", timeout=10)[0] == b"newdirectory"


def test_hundred_threads(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    victim.run(
        f"""
fd = os.open({path!r}, os.O_RDONLY); go = threading.Event()
threads = [threading.Thread(target=go.wait) for _ in range(120)]
[t.start() for t in threads]
"""
    )
    assert mounts.switch().moved == {"file": 1}
    assert victim.run("os.pread(fd, 3, 0)") == b"new" and tasks_stopped(victim.pid) == []
    victim.run("go.set(); [t.join() for t in threads]")


def test_missing_counterpart(mounts: Mounts, victim: Victim) -> None:
    """Left and reported, with strict refused before anything changes; moved when it is there."""
    paths = mounts.file("here"), mounts.file("missing", new=None)
    victim.run(f"a, b = [os.open(p, os.O_RDONLY) for p in {paths!r}]")
    with pytest.raises(SpfsError, match="cannot move fd .*missing.*no such file"):
        mounts.switch(strict=True)
    assert victim.run("os.pread(a, 3, 0)") == b"old"
    report = mounts.switch()
    (left,) = report.left
    assert (left.path, left.kind, left.pid) == ("missing", "file", victim.pid) and "no such file" in left.reason
    assert report.moved == {"file": 1}
    assert victim.run("os.pread(a, 3, 0), os.pread(b, 3, 0)") == (b"new", b"old")
    (mounts.new / "missing").write_text("there now")
    assert mounts.switch().left == [] and victim.run("os.pread(b, 5, 0)") == b"there"


PROGRAM_32 = r"""
static long call(long number, long a, long b, long c)
{
    long result;
    asm volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}
void _start(void)
{
    char buffer[4];
    call(4, 1, (long)"ready\n", 6); /* write */
    call(3, 0, (long)buffer, 1);    /* read */
    call(3, 3, (long)buffer, 3);
    call(4, 1, (long)buffer, 3);
    call(1, 0, 0, 0);               /* exit */
}
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the program is one for x86")
def test_32_bit_process_is_left(mounts: Mounts, tmp_path: Path) -> None:
    path = mounts.file("f")
    flags = ["-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-pic", "-no-pie"]
    program = compile_c(tmp_path, PROGRAM_32, *flags)
    with subprocess.Popen(
        ["sh", "-c", f"exec {program} 3< {path}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        preparation, report = mounts.prepared_switch()
        assert [left.what for left in report.left] == ["fd 3"] and "32-bit" in preparation.left[0].reason
        process.stdin.write(b"x")
        assert process.stdout.read() == b"old" and process.wait(5) == 0


def test_process_that_forks_and_opens_all_the_time(mounts: Mounts, victim: Victim) -> None:
    """Without a freezer: whatever comes while the processes are stopped one by one is found in the end."""
    for number in range(10):
        mounts.file(f"f{number}")
    victim.run(
        f"""
os.chdir({str(mounts.old)!r})
stop, errors, children = False, [], []
def churn():
    while not stop:
        try:
            fds = [os.open(f'f{{n}}', os.O_RDONLY) for n in range(10)]
            pid = os.fork()
            if not pid:
                os.read(fds[3], 3); time.sleep(0.005); os._exit(0 if os.read(fds[3], 3) else 1)
            assert {{os.read(fd, 3) for fd in fds[4:]}} <= {{b'old', b'new'}}
            for fd in fds: os.close(fd)
            if os.waitpid(pid, 0)[1]: errors.append('child')
        except BaseException as error: errors.append(repr(error))
threads = [threading.Thread(target=churn) for _ in range(3)]
[t.start() for t in threads]
"""
    )
    report = mounts.switch()
    assert report.left == [] and report.moved["cwd"] >= 1
    assert mounts.users() == []
    assert victim.run("stop = True; [t.join() for t in threads]; errors") == []


def test_other_type_is_left(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("type", new=None)
    (mounts.new / "type").mkdir()
    victim.run(f"t = os.open({path!r}, os.O_RDWR)")
    (left,) = mounts.switch().left
    assert "directory there" in left.reason and victim.run("os.pread(t, 3, 0)") == b"old"


def test_what_changes_after_the_preparation(mounts: Mounts, victim: Victim) -> None:
    """Opened, closed, exchanged, sought, forked and flags set between prepare and execute."""
    for name in "abcd":
        mounts.file(name)
    victim.run(f"os.chdir({str(mounts.old)!r}); a, b, c = [os.open(n, os.O_RDWR) for n in 'abc']")

    def between() -> None:
        victim.run(
            """
os.lseek(a, 4, 0); fcntl.fcntl(a, fcntl.F_SETFL, os.O_APPEND); os.set_inheritable(a, True)
os.close(b); os.dup2(c, b); os.close(c)
d = os.open('d', os.O_RDWR); null = os.open('/dev/null', os.O_RDONLY)
child = os.fork()
if not child: signal.pause()
"""
        )

    _, report = mounts.prepared_switch(between=between)
    assert report.left == [] and mounts.users() == []
    assert victim.run("os.lseek(a, 0, 1), fcntl.fcntl(a, fcntl.F_GETFL) & os.O_APPEND, os.get_inheritable(a)") == (
        4,
        os.O_APPEND,
        True,
    )
    assert victim.run("[os.pread(fd, 3, 0) for fd in (a, b, d)]") == [b"new"] * 3
    victim.run("os.kill(child, 9); os.waitpid(child, 0)")


def test_no_descriptor_to_spare(mounts: Mounts, victim: Victim) -> None:
    """A table filled to RLIMIT_NOFILE: raised meanwhile where the hard limit allows, else reported."""
    path = mounts.file("f")
    victim.run(
        f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 100))
fds = []
try:
    while True: fds.append(os.open({path!r}, os.O_RDONLY))
except OSError: pass
"""
    )
    assert mounts.switch().moved == {"file": victim.run("len(fds)")}
    assert victim.run("os.pread(fds[-1], 3, 0), resource.getrlimit(resource.RLIMIT_NOFILE)") == (b"new", (40, 100))


def test_table_full_for_good(mounts: Mounts, victim: Victim) -> None:
    path = mounts.file("f")
    victim.run(
        f"""
import resource
fds = [os.open({path!r}, os.O_RDONLY) for _ in range(30)]
resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 1, max(fds) + 1))
"""
    )
    report = mounts.switch()
    assert report.moved == {} and len(report.left) == 30
    assert "Too many open files" in report.left[0].reason
    assert victim.run("os.pread(fds[3], 3, 0)") == b"old"
    victim.run("os.close(fds.pop()); os.close(fds.pop())")
    report = mounts.switch()
    assert report.moved == {"file": 28} and report.left == []
    assert victim.run("os.pread(fds[3], 3, 0), len(os.listdir('/proc/self/fd'))") == (b"new", 32)


def test_unprivileged_process(mounts: Mounts) -> None:
    mounts.file("f")
    victim = Victim(["setpriv", "--no-new-privs"])
    try:
        victim.run(f"import os; os.chdir({str(mounts.old)!r}); {UNPRIVILEGED}; fd = os.open('f', os.O_RDWR)")
        assert mounts.switch().moved == {"file": 1, "cwd": 1}
        assert victim.run("os.write(fd, b'mine'), os.getuid()") == (4, 1234)
    finally:
        victim.close()


def test_directory_that_may_not_be_entered(mounts: Mounts) -> None:
    mounts.both(lambda root: (root / "d").mkdir())
    (mounts.new / "d").chmod(0o700)
    victim = Victim()
    try:
        victim.run(f"import os; os.chdir({str(mounts.old / 'd')!r}); {UNPRIVILEGED}")
        (left,) = mounts.switch().left
        assert left.kind == "cwd" and "Permission denied" in left.reason
        assert victim.run("os.getcwd()") == str(mounts.old / "d")
    finally:
        victim.close()


def test_root_directory(mounts: Mounts, victim: Victim) -> None:
    """A chroot'ed process, its working directory inside and outside."""
    mounts.both(lambda root: (root / "jail").mkdir())
    (mounts.new / "jail" / "here").touch()
    victim.run(
        f"""
child = os.fork()
if child == 0:
    os.chroot({str(mounts.old / 'jail')!r})
    signal.pause()
os.chdir('/tmp')
"""
    )
    child = victim.run("child")
    report = mounts.switch()
    assert report.moved == {"root": 1} and report.left == []
    assert os.listdir(f"/proc/{child}/root") == ["here"]
    assert os.readlink(f"/proc/{child}/cwd") == os.getcwd()
    victim.run("os.kill(child, 9); os.waitpid(child, 0)")


def test_many_descriptors_in_one_process(mounts: Mounts, victim: Victim) -> None:
    """More than fit into one message, with holes between them."""
    for number in range(700):
        mounts.file(f"f{number}", new=b"new %d" % number)
    resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (4096, 4096))
    victim.run(f"os.chdir('/'); fds = [os.open({str(mounts.old)!r} + f'/f{{n}}', os.O_RDONLY) for n in range(700)]")
    victim.run("[os.close(fd) for fd in fds[::7]]; kept = [(n, fd) for n, fd in enumerate(fds) if n % 7]")
    before = victim.run("sorted(os.listdir('/proc/self/fd'))")
    assert mounts.switch().moved == {"file": 600}
    assert victim.run("all(os.read(fd, 9) == b'new %d' % n for n, fd in kept)")
    assert victim.run("sorted(os.listdir('/proc/self/fd'))") == before


def test_nothing_else_is_touched(mounts: Mounts, victim: Victim, tmp_path: Path) -> None:
    path = mounts.file("f")
    (tmp_path / "other").write_text("other")
    victim.run(f"fd = os.open({path!r}, os.O_RDONLY); o = os.open({str(tmp_path / 'other')!r}, os.O_RDONLY)")
    links: Callable[[], object] = lambda: victim.run(
        "[os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2, o)]"
    )
    maps = victim.run("open('/proc/self/maps').read().count('\\n')")
    before = links()
    assert mounts.switch().moved == {"file": 1}
    assert links() == before and victim.run("len(os.listdir('/proc/self/fd'))") == 6
    assert abs(victim.run("open('/proc/self/maps').read().count('\\n')") - maps) <= 1
