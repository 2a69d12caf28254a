"""A process does not notice that it was operated on: signals, job control, its parent's wait(), its registers.

The system calls it waits in are in test_surgery_calls.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from surgery_kit import Mounts, Victim, compile_c, tasks_stopped

from spfs.testing import process_state, wait_until
from spfs.tracee import Tracee

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    mounts.file("f")
    yield mounts
    mounts.close()


@pytest.mark.parametrize("disposition", ["SIG_IGN", "SIG_DFL", "lambda *a: None"])
def test_sigtrap_keeps_its_disposition(mounts: Mounts, disposition: str) -> None:
    victim = Victim()
    try:
        victim.run("import os, signal; from signal import SIG_IGN, SIG_DFL")
        victim.run(
            f"signal.signal(5, {disposition}); signal.pthread_sigmask(0, [5, 10]);"
            f"fd = os.open({str(mounts.old / 'f')!r}, 0)"
        )
        masks = "[l for l in open('/proc/self/status') if l.startswith(('Sig', 'Shd')) and l[3] != 'Q']"
        before = victim.run(masks)
        assert mounts.switch().moved == {"file": 1}
        assert victim.run(masks) == before and victim.run("os.read(fd, 3)") == b"new"
    finally:
        victim.close()


HANDLED = "signal.SIGURG, signal.SIGWINCH"  # one of them is what a process stops itself by


@pytest.mark.parametrize(
    "way, stops",
    [
        ("", 6),
        ("for s in ({}): signal.signal(s, signal.SIG_IGN)", 6),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])", 6),
        ("for s in ({}): signal.signal(s, lambda *a: called.append(a[0]))", 9),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, [{}])", 9),
    ],
    ids=["default", "ignored", "one blocked", "handlers", "blocked"],
)
def test_signals_that_a_process_uses_itself(
    mounts: Mounts, monkeypatch: pytest.MonkeyPatch, way: str, stops: int
) -> None:
    """None is lost, none is made up: those pending before, and those that come while it stands still."""
    waits = []
    until = Tracee._until

    def counted(self: Tracee, expected: Callable[[int, int], bool]) -> Any:
        waits.append(self.tid)
        return until(self, expected)

    monkeypatch.setattr(Tracee, "_until", counted)
    victim = Victim()
    try:
        victim.run(f"import os, signal; called = []; fd = os.open({str(mounts.old / 'f')!r}, 0)")
        victim.run(way.format(HANDLED) or "pass")
        os.kill(victim.pid, signal.SIGURG)
        os.kill(victim.pid, signal.SIGURG)
        state = "[l for l in open('/proc/self/status') if l.startswith(('Sig', 'Shd')) and l[3] != 'Q']"
        before, called = victim.run(state), victim.run("called.copy()")
        report = mounts.switch(when_stopped=lambda: os.kill(victim.pid, signal.SIGWINCH))
        # Where the kernel decides early, the call that was interrupted is entered again.
        assert report.moved == {"file": 1} and len(waits) == stops + (0 if os.uname().machine == "x86_64" else 2)
        assert victim.run("called[len(%r):]" % called) == ([signal.SIGWINCH] if "called" in way else [])
        if "BLOCK" in way and stops == 9:
            assert victim.run("{s.name for s in signal.sigpending()}") == {"SIGURG", "SIGWINCH"}
        else:
            assert victim.run(state) == before
        assert victim.run("os.read(fd, 3)") == b"new"
    finally:
        victim.close()


def test_stopped_process_stays_stopped(mounts: Mounts) -> None:
    victim = Victim()
    try:
        victim.run(f"import os; fd = os.open({str(mounts.old / 'f')!r}, 0)")
        os.kill(victim.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(victim.pid, os.WUNTRACED)[1])
        report = mounts.switch()
        assert report.moved == {"file": 1}
        wait_until(lambda: process_state(victim.pid) == "T", 2)
        assert os.waitpid(victim.pid, os.WUNTRACED | os.WNOHANG | os.WCONTINUED) == (0, 0)  # nothing to be seen
        os.kill(victim.pid, signal.SIGCONT)
        assert victim.run("os.read(fd, 3)") == b"new"
    finally:
        victim.close()


def test_stopped_during_the_blackout(mounts: Mounts) -> None:
    """A SIGSTOP that comes meanwhile works afterwards, and a SIGCONT ends it."""
    victim = Victim()
    try:
        victim.run(f"import os; fd = os.open({str(mounts.old / 'f')!r}, 0)")
        assert mounts.switch(when_stopped=lambda: os.kill(victim.pid, signal.SIGSTOP)).moved == {"file": 1}
        assert os.WIFSTOPPED(os.waitpid(victim.pid, os.WUNTRACED)[1])
        os.kill(victim.pid, signal.SIGCONT)
        assert victim.run("os.read(fd, 3)") == b"new"
    finally:
        victim.close()


def test_continued_during_the_blackout(mounts: Mounts) -> None:
    victim = Victim()
    try:
        victim.run(f"import os; fd = os.open({str(mounts.old / 'f')!r}, 0)")
        os.kill(victim.pid, signal.SIGSTOP)
        os.waitpid(victim.pid, os.WUNTRACED)
        assert mounts.switch(when_stopped=lambda: os.kill(victim.pid, signal.SIGCONT)).moved == {"file": 1}
        assert victim.run("os.read(fd, 3)") == b"new"
    finally:
        victim.close()


def test_parent_sees_nothing(mounts: Mounts) -> None:
    """No SIGCHLD and no status for the parent of a process that was operated on."""
    victim = Victim()
    try:
        child = victim.run(
            f"""
import os, signal
seen = []
signal.signal(signal.SIGCHLD, lambda *a: seen.append(a[0]))
child = os.fork()
if not child:
    fd = os.open({str(mounts.old / 'f')!r}, 0); signal.pause()
child"""
        )
        wait_until(lambda: mounts.users() == [child])
        assert mounts.switch().moved == {"file": 1}
        assert victim.run("seen, os.waitpid(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)") == ([], (0, 0))
        victim.run("os.kill(child, 9); os.waitpid(child, 0)")
    finally:
        victim.close()


SANDBOXED = r"""
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KILL(number) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), \
                     BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS)

static void install(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        KILL(SYS_socketpair), KILL(SYS_recvmsg), KILL(SYS_dup3), KILL(SYS_mmap), KILL(SYS_munmap),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof(filter) / sizeof(filter[0]), filter };
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

int main(int argc, char **argv)
{
    int fd = open(argv[1], O_RDONLY);
    char buffer[4] = "";
    if (argv[2][0] == 's') prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT); else install();
    write(1, "ready\n", 6);
    read(0, buffer, 1);
    read(fd, buffer, 3);
    write(1, buffer, 3);
    syscall(SYS_exit, 0);
}
"""


@pytest.mark.parametrize("mode", ["strict", "filter"])
def test_seccomp(mounts: Mounts, tmp_path: Path, mode: str) -> None:
    program = compile_c(tmp_path, SANDBOXED, "-Wno-unused-result")
    with subprocess.Popen(
        [program, str(mounts.old / "f"), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        report = mounts.switch()
        assert report.moved == {"file": 1} and report.left == []
        out, _ = process.communicate(b"x", timeout=10)
        assert (out, process.returncode) == (b"new", 0)


SUPERVISED = r"""
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* the child's getppid() is answered by its parent, which takes its time with the first one it is told of */
static int child(const char *path, int channel)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof(filter) / sizeof(filter[0]), filter };
    char contents[4] = "";
    int fd = open(path, O_RDONLY);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    int listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    write(channel, &listener, sizeof(listener));
    long result = syscall(SYS_getppid);
    read(fd, contents, 3);
    dprintf(1, "%ld %s", result, contents);
    return 0;
}

int main(int argc, char **argv)
{
    int channel[2], listener, told = 0;
    char byte;
    socketpair(AF_UNIX, SOCK_STREAM, 0, channel);
    pid_t pid = fork();
    if (!pid) return child(argv[1], channel[1]);
    read(channel[0], &listener, sizeof(listener));
    listener = syscall(SYS_pidfd_getfd, syscall(SYS_pidfd_open, pid, 0), listener, 0);
    for (;;) {
        struct seccomp_notif request = { 0 };
        struct seccomp_notif_resp response = { 0 };
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &request)) return 1;
        if (!told++) {
            write(1, "ready\n", 6);
            read(0, &byte, 1);
        }
        response.id = request.id;
        response.val = 77;
        if (!ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response)) break;
    }
    wait(NULL);
    dprintf(1, " %d", told);
    return 0;
}
"""


def test_call_that_a_supervisor_answers(mounts: Mounts, tmp_path: Path) -> None:
    """Interrupted by us, it is made again, and the supervisor is told once more; the answer is the call's result."""
    program = compile_c(tmp_path, SUPERVISED, "-Wno-unused-result")
    with subprocess.Popen(
        [program, str(mounts.old / "f")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        report = mounts.switch()
        assert (report.moved, report.left) == ({"file": 1}, [])
        assert process.communicate(b"x", timeout=10)[0] == b"77 new 2" and process.returncode == 0


DISPATCHED = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* until told in memory that it shares, has every call of its own sent to its handler, which answers 42 */
static volatile char selector;
static int handled;

static void handle(int number, siginfo_t *info, void *context)
{
    selector = 0;
    handled++;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RAX] = 42;
}

int main(int argc, char **argv)
{
    int fd = open(argv[1], O_RDONLY), shared = open(argv[2], O_RDWR);
    volatile char *told = mmap(NULL, 1, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
    struct sigaction action = { .sa_sigaction = handle, .sa_flags = SA_SIGINFO };
    char contents[4] = "";
    sigaction(SIGSYS, &action, NULL);
    if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector)) return 77;
    write(1, "ready\n", 6);
    selector = 1;
    while (!*told);
    long result = syscall(SYS_getpid);
    read(fd, contents, 3);
    printf("%ld %d %s", result, handled, contents);
    return 0;
}
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86 has PR_SET_SYSCALL_USER_DISPATCH")
def test_calls_dispatched_to_itself(mounts: Mounts, tmp_path: Path) -> None:
    """What we have it call would be sent to its handler, and end it: it is left before anything is done to it, and with
    it the offset that it shares with another process."""
    program = compile_c(tmp_path, DISPATCHED, "-Wno-unused-result")
    told = tmp_path / "told"
    told.write_bytes(bytes(1))
    victim = Victim()
    try:
        victim.run(
            f"""
import os, subprocess
fd, alone = [os.open({str(mounts.old / 'f')!r}, 0) for _ in range(2)]
child = subprocess.Popen([{program!r}, "/proc/self/fd/0", {str(told)!r}], stdin=fd, stdout=subprocess.PIPE, bufsize=0)
"""
        )
        if victim.run("child.stdout.read(6)") != b"ready\n":
            pytest.skip("the kernel has no PR_SET_SYSCALL_USER_DISPATCH")
        report = mounts.switch()
        reasons = {(left.pid == victim.pid, left.what): left.reason for left in report.left}
        assert report.moved == {"file": 1}
        assert "PR_SET_SYSCALL_USER_DISPATCH" in reasons[False, "fd 0"]
        assert "shared with process" in reasons[True, "fd 3"]
        with told.open("r+b") as file:  # not cut before it is written: it is mapped
            file.write(b"1")
        assert victim.run("child.stdout.read()") == b"42 1 old" and victim.run("child.wait()") == 0
        assert victim.run("os.lseek(fd, 0, os.SEEK_CUR), os.read(alone, 3)") == (0, b"new")
        assert mounts.switch().moved == {"file": 1} and victim.run("os.read(fd, 3)") == b"new"
    finally:
        victim.close()


BUSY = r"""
#include <fcntl.h>
#include <immintrin.h>
#include <stdio.h>
#include <unistd.h>

/* counts in vector registers without any system call, and tells whether the count was ever wrong */
int main(int argc, char **argv)
{
    int fd = open(argv[1], O_RDONLY);
    volatile int *stop = (volatile int *)&argc;
    char contents[4] = "";
    __m128i one = _mm_set_epi64x(1, 1), sum = _mm_setzero_si128();
    long expected = 0, wrong = 0, values[2];
    write(1, "ready\n", 6);
    while (*stop && expected < 3000000000) {
        sum = _mm_add_epi64(sum, one);
        expected++;
        asm volatile("" : "+x"(sum), "+x"(one));
        if (!(expected & 0xfffff)) {
            _mm_storeu_si128((__m128i *)values, sum);
            wrong += values[0] != expected || values[1] != expected;
            if (pread(fd, contents, 3, 0) == 3 && contents[0] == 'n') break;
        }
    }
    printf("%ld %s\n", wrong, contents);
    return 0;
}
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the program uses the vector registers of x86")
def test_busy_registers(mounts: Mounts, tmp_path: Path) -> None:
    """Interrupted in user space, with the vector registers in use."""
    program = compile_c(tmp_path, BUSY, "-Wno-unused-result", "-O2")
    with subprocess.Popen([program, str(mounts.old / "f")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert mounts.switch().moved == {"file": 1}
        out, _ = process.communicate(timeout=20)
        assert (out.split(), process.returncode) == ([b"0", b"new"], 0)


RESTARTABLE = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/rseq.h>
#include <unistd.h>

/* stays in a critical section that is left only by being aborted, as each interruption must do */
int main(int argc, char **argv)
{
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    int fd = open(argv[1], O_RDONLY);
    char contents[4] = "";
    if (!__rseq_size) { write(1, "none\n", 5); return 0; }
    write(1, "ready\n", 6);
    do {
        asm volatile(
            ".pushsection sections, \"aw\"\n .balign 32\n 3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
            "lea 3b(%%rip), %%rax\n mov %%rax, %0\n"
            "1: pause\n jmp 1b\n 2:\n"
            ".pushsection aborts, \"ax\"\n .byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n 4: jmp 5f\n .popsection\n"
            "5:\n"
            : "=m"(area->rseq_cs) : : "rax", "memory");
        pread(fd, contents, 3, 0);
    } while (contents[0] != 'n');
    write(1, contents, 3);
    return 0;
}
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the assembly of another architecture")
@pytest.mark.skipif(not os.path.exists("/usr/include/x86_64-linux-gnu/sys/rseq.h"), reason="no rseq in this C library")
def test_restartable_sequence(mounts: Mounts, tmp_path: Path) -> None:
    """Interrupted in a critical section: it is aborted. Gone on with, this one would never end."""
    program = compile_c(tmp_path, RESTARTABLE, "-Wno-unused-result")
    with subprocess.Popen([program, str(mounts.old / "f")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() == b"none\n":
                pytest.skip("the C library has not registered rseq")
            assert mounts.switch().moved == {"file": 1}
            out, _ = process.communicate(timeout=20)
            assert (out, process.returncode) == (b"new", 0)
        finally:
            process.kill()


def test_many_switches_of_a_busy_process(mounts: Mounts) -> None:
    """There and back, thirty times, while threads allocate, sleep and are sent signals."""
    victim = Victim()
    try:
        victim.run(
            f"""
import os, signal, threading, time
got, stop = [], False
signal.signal(signal.SIGUSR1, lambda *a: got.append(1))
fd = os.open({str(mounts.old / 'f')!r}, os.O_RDONLY)
errors = []
def churn():
    while not stop:
        try:
            assert os.pread(fd, 12, 0) in (b'old contents', b'new contents')
            time.sleep(0.0001); bytes(100000)
        except BaseException as error: errors.append(repr(error))
threads = [threading.Thread(target=churn) for _ in range(4)]
[t.start() for t in threads]
"""
        )
        for _ in range(15):
            for _ in range(2):
                signal_it: Callable[[], None] = lambda: os.kill(victim.pid, signal.SIGUSR1)
                report = mounts.switch(when_stopped=signal_it)
                assert report.moved == {"file": 1} and report.left == []
                mounts.reverse()
        assert victim.run("stop = True; [t.join() for t in threads]; errors") == []
        wait_until(lambda: victim.run("len(got)") > 0, 2)
        assert tasks_stopped(victim.pid) == []
    finally:
        victim.close()
