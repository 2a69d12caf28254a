"""A process does not notice that it was operated on: system calls, signals, job control, its parent's wait()."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Callable, Iterator, Tuple

import pytest
from surgery_kit import Mounts, Victim, compile_c, tasks_stopped

from spfs.testing import process_state, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

BLOCKER = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile int handled;
static void handler(int number) { handled++; }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }

/* program FILE CALL RESTART MILLISECONDS: holds FILE, waits in CALL, tells how it ended; endless waits by stdin */
int main(int argc, char **argv)
{
    const char *call = argv[2];
    int fd = open(argv[1], O_RDONLY), result = -1, word = 0;
    struct sigaction action = { .sa_handler = handler, .sa_flags = atoi(argv[3]) ? SA_RESTART : 0 };
    int milliseconds = atoi(argv[4]);
    struct timespec timespec = { milliseconds / 1000, milliseconds % 1000 * 1000000L };
    struct timeval timeval = { milliseconds / 1000, milliseconds % 1000 * 1000L };
    struct epoll_event event = { .events = EPOLLIN };
    struct pollfd input = { .fd = 0, .events = POLLIN };
    sigset_t none, usr1;
    char byte, contents[4] = "";
    double begin;
    fd_set set;

    sigaction(SIGUSR1, &action, NULL);
    sigemptyset(&none);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    int epoll = epoll_create1(0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    FD_ZERO(&set);
    FD_SET(0, &set);
    if (!strcmp(call, "sigsuspend") || !strcmp(call, "ppoll_mask") || !strcmp(call, "pselect_mask"))
        sigprocmask(SIG_BLOCK, &usr1, NULL);
    pid_t child = !strcmp(call, "wait") ? fork() : 1;
    if (!child) { read(0, &byte, 1); _exit(0); } /* at a byte, or when the test has ended */
    puts("ready");
    fflush(stdout);
    begin = now();
    errno = 0;
    if (!strcmp(call, "pause")) result = pause();
    if (!strcmp(call, "sigsuspend")) result = sigsuspend(&none);
    if (!strcmp(call, "nanosleep")) result = nanosleep(&timespec, NULL);
    if (!strcmp(call, "select")) result = select(0, NULL, NULL, NULL, &timeval);
    if (!strcmp(call, "pselect_mask")) result = pselect(1, &set, NULL, NULL, NULL, &none);
    if (!strcmp(call, "poll")) result = poll(NULL, 0, milliseconds);
    if (!strcmp(call, "poll_input")) result = poll(&input, 1, -1);
    if (!strcmp(call, "ppoll_mask")) result = ppoll(&input, 1, NULL, &none);
    if (!strcmp(call, "epoll")) result = epoll_wait(epoll, &event, 1, -1);
    if (!strcmp(call, "read")) result = read(0, &byte, 1);
    if (!strcmp(call, "wait")) result = waitpid(child, NULL, 0) == child;
    if (!strcmp(call, "futex")) result = syscall(SYS_futex, &word, FUTEX_WAIT, 0, &timespec, NULL, 0);
    int number = errno;
    double spent = now() - begin;
    pread(fd, contents, 3, 0);
    printf("%d %d %d %d %s\n", result, number, handled, (int)(1000 * spent), contents);
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_c(tmp_path_factory.mktemp("blocker"), BLOCKER, "-Wno-unused-result")


@pytest.fixture(scope="module")
def static_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_c(tmp_path_factory.mktemp("static"), BLOCKER, "-Wno-unused-result", "-static")


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    mounts.file("f")
    yield mounts
    mounts.close()


class Blocked:
    """The program, blocked in its call."""

    def __init__(self, program: str, mounts: Mounts, call: str, restart: bool, milliseconds: int = 600) -> None:
        self.process = subprocess.Popen(
            [program, str(mounts.old / "f"), call, str(int(restart)), str(milliseconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        wait_until(self._waits, what=f"{call} to block")

    def _waits(self) -> bool:
        words = Path(f"/proc/{self.process.pid}/syscall").read_text().split()
        return words[0] != "running" and process_state(self.process.pid) == "S"

    def end(self, byte: bool = False) -> Tuple[int, int, int, int, str]:
        """(result, errno, handler's runs, milliseconds, contents of the file)"""
        out, _ = self.process.communicate("x" if byte else None, timeout=10)
        assert self.process.returncode == 0, self.process.returncode
        result, number, handled, spent, contents = out.split()
        return int(result), int(number), int(handled), int(spent), contents


TIMED = ["nanosleep", "select", "poll", "futex"]
ENDLESS = ["read", "poll_input", "epoll", "wait", "ppoll_mask", "pselect_mask"]
EINTR = 4


@pytest.mark.parametrize("call", TIMED)
def test_timed_calls_take_their_time(mounts: Mounts, program: str, call: str) -> None:
    blocked = Blocked(program, mounts, call, restart=False)
    assert mounts.switch().moved == {"file": 1}
    result, number, handled, spent, contents = blocked.end()
    assert (result, number) == ((-1, 110) if call == "futex" else (0, 0)) and handled == 0 and contents == "new"
    assert 595 <= spent < 1500


@pytest.mark.parametrize("call", ENDLESS)
def test_endless_calls_go_on(mounts: Mounts, program: str, call: str) -> None:
    blocked = Blocked(program, mounts, call, restart=False)
    for _ in range(2):  # epoll_wait fails with EINTR after any stop if nobody prevents it
        mounts.switch()
    assert blocked.process.poll() is None
    result, number, handled, _, contents = blocked.end(byte=True)
    assert (result, number, handled, contents) == (1, 0, 0, "new")


@pytest.mark.parametrize("call", ["pause", "sigsuspend", *TIMED, *ENDLESS])
def test_signal_during_the_blackout(mounts: Mounts, program: str, call: str) -> None:
    """Its handler runs once, and the call ends as it does without us: EINTR."""
    # So long that no machine is too slow to come in between.
    blocked = Blocked(program, mounts, call, restart=False, milliseconds=60000)
    report = mounts.switch(when_stopped=lambda: os.kill(blocked.process.pid, signal.SIGUSR1))
    assert report.left == [] and mounts.users() == []
    result, number, handled, spent, contents = blocked.end(byte=True)
    assert result == (0 if call == "wait" else -1)
    assert (number, handled, contents) == (EINTR, 1, "new") and spent < 59000


@pytest.mark.parametrize("call", ["read", "wait"])
def test_restarted_after_a_signal(mounts: Mounts, program: str, call: str) -> None:
    blocked = Blocked(program, mounts, call, restart=True)
    mounts.switch(when_stopped=lambda: os.kill(blocked.process.pid, signal.SIGUSR1))
    result, number, handled, _, contents = blocked.end(byte=True)
    assert (result, number, handled, contents) == (1, 0, 1, "new")


@pytest.mark.parametrize("call", ["nanosleep", "read"])
def test_static_program(mounts: Mounts, static_program: str, call: str) -> None:
    blocked = Blocked(static_program, mounts, call, restart=False)
    assert mounts.switch().moved == {"file": 1}
    result, number, _, _, contents = blocked.end(byte=True)
    assert (result, number, contents) == (int(call == "read"), 0, "new")


@pytest.mark.parametrize("disposition", ["SIG_IGN", "SIG_DFL", "lambda *a: None"])
def test_sigtrap_keeps_its_disposition(mounts: Mounts, disposition: str) -> None:
    victim = Victim()
    try:
        victim.run("import os, signal; from signal import SIG_IGN, SIG_DFL")
        victim.run(
            f"signal.signal(5, {disposition}); signal.pthread_sigmask(0, [5, 10]);"
            f"fd = os.open({str(mounts.old / 'f')!r}, 0)"
        )
        masks = "[l for l in open('/proc/self/status') if l.startswith(('Sig', 'Shd'))]"
        before = victim.run(masks)
        assert mounts.switch().moved == {"file": 1}
        assert victim.run(masks) == before and victim.run("os.read(fd, 3)") == b"new"
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
                assert mounts.switch(when_stopped=signal_it).left == []
                mounts.old, mounts.new = mounts.new, mounts.old
        assert victim.run("stop = True; [t.join() for t in threads]; errors") == []
        wait_until(lambda: victim.run("len(got)") > 0, 2)
        assert tasks_stopped(victim.pid) == []
    finally:
        victim.close()
