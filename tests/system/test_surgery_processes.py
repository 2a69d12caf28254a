"""Processes of all sorts hold something of the mount, are operated on, and go on."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Iterator, List

import pytest
from surgery_kit import Mounts, Victim, compile_c, tasks_stopped

from spfs.testing import process_state, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

x86_64_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the assembly of another architecture")


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    mounts.file("f")
    yield mounts
    mounts.close()


@pytest.fixture
def victim(mounts: Mounts) -> Iterator[Victim]:
    victim = Victim()
    victim.run(f"import ctypes, os, signal; libc = ctypes.CDLL(None); fd = os.open({str(mounts.old / 'f')!r}, 0)")
    yield victim
    victim.close()


# Neither a C library nor anything else that was not written here: opens its argument, says so, waits for a byte, and
# writes what it reads from the file.
BARE = r"""
static long call(long number, long a, long b, long c)
{
    long result;
    asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
asm(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");
void begin(long *stack)
{
    char buffer[4];
    int fd = call(2, stack[2], 0, 0);
    call(1, 1, (long)"ready\n", 6);
    call(0, 0, (long)buffer, 1);
    call(0, fd, (long)buffer, 3);
    call(1, 1, (long)buffer, 3);
    call(231, 0, 0, 0);
    for (;;) {}
}
"""


@x86_64_only
@pytest.mark.parametrize("on_the_mount", [False, True])
def test_without_a_c_library(mounts: Mounts, tmp_path: Path, on_the_mount: bool) -> None:
    """No borrowed "syscall; ret", and for a program on the mount nothing executable but the vDSO."""
    program = compile_c(tmp_path, BARE, "-nostdlib", "-static", "-fno-stack-protector", "-fcf-protection=none")
    if on_the_mount:
        mounts.both(lambda root: shutil.copy(program, root / "program"))
        program = str(mounts.old / "program")
    with subprocess.Popen(
        [program, str(mounts.old / "f")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        report = mounts.switch()
        assert report.left == [] and report.moved["file"] == 1 and mounts.users() == []
        assert report.moved.get("exe", 0) == int(on_the_mount)
        assert process.communicate(b"x", timeout=10)[0] == b"new" and process.returncode == 0


LIBRARY = "int from_library(int number) { return number + 1; }\nint counter = 5;\n"
DYNAMIC = r"""
#include <stdio.h>
#include <unistd.h>
extern int counter, from_library(int);
int main(void)
{
    char byte;
    counter += 10;
    puts("ready");
    fflush(stdout);
    read(0, &byte, 1);
    printf("%d %d\n", from_library(1), counter);
    return 0;
}
"""


def test_interpreter_and_libraries_on_the_mount(mounts: Mounts, tmp_path: Path) -> None:
    """A dynamically linked program whose interpreter, C library and own library lie on the mount, too."""
    for name in ("library", "main"):
        (tmp_path / name).mkdir()
    library = compile_c(tmp_path / "library", LIBRARY, "-shared", "-fPIC")
    shutil.copy(library, tmp_path / "libown.so")
    interpreter = str(mounts.old / "interpreter")
    program = compile_c(
        tmp_path / "main", DYNAMIC, "-Wno-unused-result", f"-L{tmp_path}", f"-Wl,--dynamic-linker={interpreter}",
        "-Wl,--no-as-needed", str(tmp_path / "libown.so"), f"-Wl,-rpath,{mounts.old}", "-Wl,--disable-new-dtags",
    )  # fmt: skip
    maps = Path("/proc/self/maps").read_text()
    loader = re.search(r"/\S*/ld-linux\S*", maps)
    libc = re.search(r"/\S*/libc[.-]\S*so\S*", maps)
    assert loader is not None and libc is not None

    def fill(root: Path) -> None:
        shutil.copy(program, root / "program")
        shutil.copy(loader[0], root / "interpreter")
        shutil.copy(libc[0], root / "libc.so.6")
        # The path with which it was linked is the library's name: it has no other.
        (root / tmp_path.relative_to("/")).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "libown.so", root / "libown.so")

    mounts.both(fill)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(mounts.old)}
    with subprocess.Popen(
        [str(mounts.old / "program")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        text = Path(f"/proc/{process.pid}/maps").read_text()
        assert {f"{mounts.old}/{name}" in text for name in ("program", "interpreter", "libc.so.6")} == {True}
        report = mounts.switch()
        assert report.left == [] and report.moved["exe"] == 1 and mounts.users() == []
        assert process.communicate(b"x", timeout=10)[0] == b"2 15\n" and process.returncode == 0


MANY_THREADS = r"""
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Hundreds of threads with small stacks and alternate signal stacks, as runtimes of languages have them: some sleep,
   some compute, some are sent signals all the time. */
static int fd, ready, stop, wrong, handled;
static pthread_t threads[400];

static void handler(int number) { __atomic_fetch_add(&handled, 1, __ATOMIC_SEQ_CST); }

static void *work(void *argument)
{
    long index = (long)argument;
    char contents[4];
    stack_t stack = { .ss_sp = malloc(16384), .ss_size = 16384 };
    sigaltstack(&stack, NULL);
    __atomic_fetch_add(&ready, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&ready, __ATOMIC_SEQ_CST) < 400) usleep(1000);
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        if (pread(fd, contents, 3, 0) != 3 || (memcmp(contents, "old", 3) && memcmp(contents, "new", 3)))
            __atomic_fetch_add(&wrong, 1, __ATOMIC_SEQ_CST);
        if (index % 4) usleep(20000);
        else if (index % 40 == 0) pthread_kill(threads[(index * 7 + 1) % 400], SIGURG);
        else usleep(1000);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART | SA_ONSTACK };
    pthread_attr_t attributes;
    char byte;
    fd = open(argv[1], O_RDONLY);
    sigaction(SIGURG, &action, NULL);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 32768);
    for (long i = 399; i >= 0; i--) pthread_create(&threads[i], &attributes, work, (void *)i);
    while (__atomic_load_n(&ready, __ATOMIC_SEQ_CST) < 400) usleep(1000);
    puts("ready");
    fflush(stdout);
    read(0, &byte, 1);
    stop = 1;
    for (int i = 0; i < 400; i++) pthread_join(threads[i], NULL);
    printf("%d wrong %d\n", wrong, handled > 0);
    return 0;
}
"""


def test_hundreds_of_threads(mounts: Mounts, tmp_path: Path) -> None:
    program = compile_c(tmp_path, MANY_THREADS, "-pthread", "-Wno-unused-result")
    with subprocess.Popen(
        [program, str(mounts.old / "f")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(3):
            assert mounts.switch().moved == {"file": 1}
            assert tasks_stopped(process.pid) == [] and mounts.users() == []
            mounts.reverse()
        assert process.communicate(b"x", timeout=30)[0] == b"0 wrong 1\n" and process.returncode == 0


IN_HANDLER = r"""
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Waits, or computes, in a signal handler that runs on a stack of two pages with nothing beneath. */
static int fd, compute;
static char contents[4];

static void handler(int number)
{
    char byte;
    write(1, "ready\n", 6);
    if (compute) while (contents[0] != 'n') pread(fd, contents, 3, 0);
    else read(0, &byte, 1);
    pread(fd, contents, 3, 0);
}

int main(int argc, char **argv)
{
    long size = 32768;
    char *memory = mmap(NULL, size + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + 4096;
    stack_t stack = { .ss_sp = memory, .ss_size = size }, after;
    struct sigaction action = { .sa_handler = handler, .sa_flags = SA_ONSTACK };
    mprotect(memory, size, PROT_READ | PROT_WRITE);
    fd = open(argv[1], O_RDONLY);
    compute = argv[2][0] == 'c';
    sigaltstack(&stack, NULL);
    sigaction(SIGUSR1, &action, NULL);
    double sum = 1.5;
    for (int i = 0; i < 10; i++) sum *= 1.25;
    raise(SIGUSR1);
    sigaltstack(NULL, &after);
    printf("%s %.3f %d\n", contents, sum, after.ss_sp == stack.ss_sp && after.ss_flags == 0);
    return 0;
}
"""


@pytest.mark.parametrize("how", ["waits", "computes"])
def test_in_a_handler_on_an_alternate_stack(mounts: Mounts, tmp_path: Path, how: str) -> None:
    program = compile_c(tmp_path, IN_HANDLER, "-Wno-unused-result")
    with subprocess.Popen(
        [program, str(mounts.old / "f"), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert mounts.switch().moved == {"file": 1}
        assert process.communicate(b"x", timeout=20)[0] == b"new 13.970 1\n" and process.returncode == 0


SETTINGS = {
    "not dumpable": "libc.prctl(4, 0, 0, 0, 0)",
    "no new privileges": "libc.prctl(38, 1, 0, 0, 0)",
    "real-time class": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))",
    "idle class": "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))",
    "another user": "os.setgroups([]); os.setresgid(1234, 1234, 1234); os.setresuid(1234, 1234, 1234)",
    "no capabilities": "[libc.prctl(24, n, 0, 0, 0) for n in range(41)]; os.setresuid(1234, 1234, 1234)",
    "no time slack, and its parent's death is a signal": "libc.prctl(29, 1, 0, 0, 0); libc.prctl(1, 9, 0, 0, 0)",
    "no memory to be locked": "__import__('resource').setrlimit(8, (0, 0))",
    "no file may grow": "__import__('resource').setrlimit(1, (0, 0))",
    "all signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))",
}


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_settings(mounts: Mounts, victim: Victim, setting: str) -> None:
    victim.run(SETTINGS[setting])
    status = Path(f"/proc/{victim.pid}/status")
    kept = ("Uid", "Gid", "Cap", "NoNewPrivs", "Seccomp", "SigBlk", "SigIgn", "SigCgt", "Threads")

    def settings() -> List[str]:
        return [line for line in status.read_text().splitlines() if line.startswith(kept)]

    before = settings()
    try:
        policy = os.sched_getscheduler(victim.pid), os.sched_getparam(victim.pid).sched_priority
        assert mounts.switch().moved == {"file": 1} and mounts.users() == []
        assert settings() == before
        assert (os.sched_getscheduler(victim.pid), os.sched_getparam(victim.pid).sched_priority) == policy
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    assert victim.run("os.read(fd, 3)") == b"new"


@pytest.mark.parametrize(
    "options",
    [
        ["--user", "--map-root-user", "--mount", "--propagation", "unchanged"],
        ["--pid", "--fork", "--kill-child", "--mount-proc"],
        ["--mount", "--net", "--ipc", "--uts", "--cgroup"],
    ],
    ids=["user", "pid", "others"],
)
def test_in_namespaces(mounts: Mounts, options: List[str]) -> None:
    victim = Victim(["unshare", *options])
    try:
        victim.run(f"import os; fd = os.open({str(mounts.old / 'f')!r}, 0); os.chdir({str(mounts.old)!r})")
        assert mounts.switch().moved == {"file": 1, "cwd": 1} and mounts.users() == []
        assert victim.run("os.read(fd, 3)") == b"new"
    finally:
        victim.close()


def test_restricted_by_landlock(mounts: Mounts, victim: Victim) -> None:
    """What it may do beneath a directory above the mountpoint holds for the new mount; what beneath the old one's root,
    for that one alone: the kernel tells nobody, and nobody can change it."""
    read = 0x4 | 0x8  # LANDLOCK_ACCESS_FS_READ_FILE, _READ_DIR
    mounts.both(lambda root: (root / "directory").mkdir())
    victim.run(
        f"""
import struct
libc = ctypes.CDLL(None, use_errno=True)
handled = struct.pack('Q', {read | 0x2})
def restrict(*paths):
    rules = libc.syscall(444, handled, 8, 0)
    for access, path in paths if rules >= 0 else ():
        parent = os.open(path, os.O_PATH)
        assert libc.syscall(445, rules, 1, struct.pack('=Qi', access, parent), 0) == 0, ctypes.get_errno()
        os.close(parent)
    return rules < 0 or libc.syscall(446, rules, 0)
libc.prctl(38, 1, 0, 0, 0); os.chdir({str(mounts.old)!r})
"""
    )
    above = str(mounts.old.parent)
    if victim.run(f"restrict(({read}, {above!r}), ({read | 0x2}, {str(mounts.old)!r}))"):
        pytest.skip("the kernel has no Landlock")
    victim.run("os.close(os.open('f', os.O_WRONLY))")
    report = mounts.switch()
    assert (report.moved, report.left) == ({"file": 1, "cwd": 1}, []) and mounts.users() == []
    assert victim.run("os.read(fd, 3), os.read(os.open('f', os.O_RDONLY), 3), os.listdir('directory')") == (
        b"new", b"new", []
    )
    with pytest.raises(AssertionError, match="PermissionError"):
        victim.run("os.open('f', os.O_WRONLY)")


def test_unprivileged_in_a_root_of_its_own(mounts: Mounts, victim: Victim) -> None:
    """It may not change its root: that stays, all else goes, and it works on."""
    mounts.both(lambda root: (root / "directory").mkdir())
    victim.run(f"import json; os.chroot({str(mounts.old)!r}); os.chdir('/directory')")
    victim.run("os.setgroups([]); os.setresgid(1234, 1234, 1234); os.setresuid(1234, 1234, 1234)")
    report = mounts.switch()
    assert [left.kind for left in report.left] == ["root"] and "cannot go there" in report.left[0].reason
    assert report.moved == {"file": 1, "cwd": 1}
    assert victim.run("os.read(fd, 3), os.stat('/').st_dev != os.stat('.').st_dev") == (b"new", True)


def test_memory_and_directories_of_another_process(mounts: Mounts, tmp_path: Path) -> None:
    """CLONE_VM, CLONE_FS and CLONE_FILES without CLONE_THREAD: two processes, one of everything."""
    program = compile_c(tmp_path, SHARING, "-Wno-unused-result")
    with subprocess.Popen([program, str(mounts.old)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        report = mounts.switch()
        assert report.moved == {"file": 1, "cwd": 1, "private mapping": 1} and report.left == []
        assert len(report.processes) == 2 and mounts.users() == []
        assert process.communicate(b"x", timeout=10)[0] == b"new new aew 1\n" and process.returncode == 0


SHARING = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static int fd, down[2];
static char *map, first[4], where[4096];

static int other(void *unused)
{
    char byte;
    read(down[0], &byte, 1);
    map[0] = 'a'; /* seen by the other one */
    pread(fd, first, 3, 0);
    return getcwd(where, sizeof(where)) == NULL;
}

int main(int argc, char **argv)
{
    char byte, second[4] = "";
    int status;
    chdir(argv[1]);
    fd = open("f", O_RDONLY);
    map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    pipe(down);
    int child = clone(other, (char *)malloc(65536) + 65536, CLONE_VM | CLONE_FS | CLONE_FILES | SIGCHLD, NULL);
    puts("ready");
    fflush(stdout);
    read(0, &byte, 1);
    write(down[1], "x", 1);
    waitpid(child, &status, 0);
    pread(open("f", O_RDONLY), second, 3, 0);
    char *here = getcwd(NULL, 0);
    printf("%s %s %.3s %d\n", first, second, map, status == 0 && here && !strcmp(here, where));
    return 0;
}
"""


class Shell:
    """An interactive shell on a terminal of its own."""

    def __init__(self) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, "PS1": "$ ", "TERM": "dumb"})
        self._text = ""
        self.expect(r"\$ ")

    def send(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def expect(self, pattern: str) -> str:
        """Read until ``pattern`` has come; what came before it."""

        def found() -> bool:
            self._text += os.read(self._terminal, 4096).decode()
            return re.search(pattern, self._text) is not None

        while re.search(pattern, self._text) is None:
            found()
        match = re.search(pattern, self._text)
        assert match is not None
        before, self._text = self._text[: match.start()], self._text[match.end() :]
        return before

    def close(self) -> None:
        os.kill(self.pid, signal.SIGHUP)
        os.close(self._terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.close()


JOB = r"""
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    char byte, contents[4] = "";
    int fd = open(argv[1], O_RDONLY);
    printf("pid=%d.\n", getpid());
    fflush(stdout);
    while (read(0, &byte, 1) == 1 && byte != 'q') {
        pread(fd, contents, 3, 0);
        printf("<%s>\n", contents);
        fflush(stdout);
    }
    return 3;
}
"""


def test_job_control(mounts: Mounts, tmp_path: Path, shell: Shell) -> None:
    """A job in the foreground, stopped with Ctrl-Z, in the background, and again: the shell learns what it would."""
    program = compile_c(tmp_path, JOB)
    shell.send(f"{program} {mounts.old / 'f'}\n")
    shell.expect(r"pid=")
    pid = int(shell.expect(r"\.\r\n"))
    wait_until(lambda: process_state(pid) == "S")

    def move() -> None:
        report = mounts.switch()
        assert report.moved == {"file": 1}
        mounts.reverse()

    move()
    shell.send("a\n")
    assert "Stopped" not in shell.expect("<new>")
    move()
    shell.send("\x1a")
    shell.expect(r"Stopped.*\r\n\$ ")
    assert process_state(pid) == "T"
    move()
    wait_until(lambda: process_state(pid) == "T", 2)
    shell.send("jobs\n")
    assert shell.expect(r"Stopped").count("Done") == 0
    shell.expect(r"\$ ")
    shell.send("fg\n")
    shell.expect("program")
    move()
    shell.send("b\n")
    shell.expect("<old>")
    shell.send("\x1a")
    shell.expect(r"Stopped.*\r\n\$ ")
    shell.send("bg\n")  # which stops it again: it reads from the terminal
    shell.expect(r"\$ ")
    wait_until(lambda: process_state(pid) == "T")
    move()
    shell.send("fg\n")
    shell.expect("program")
    shell.send("q\n")
    shell.expect(r"\$ ")
    shell.send("echo status=$?.\n")
    shell.expect(r"status=3\.")


def test_parent_that_waits_for_everything(mounts: Mounts, victim: Victim) -> None:
    """A parent blocked in wait4(WUNTRACED | WCONTINUED) for a child that is operated on sees only what happens."""
    victim.run(
        """
r, w = os.pipe()
child = os.fork()
if not child:
    os.read(r, 1); os.read(fd, 1); os._exit(7)
"""
    )
    victim.start("os.waitpid(child, os.WUNTRACED | os.WCONTINUED)[1]")
    victim.blocked()
    child = int(Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text())
    assert mounts.switch().moved == {"file": 2}
    assert victim.process.poll() is None and process_state(victim.pid) == "S"
    os.kill(child, signal.SIGSTOP)
    assert os.WIFSTOPPED(victim.result())
    assert mounts.prepared_switch()[1].left == []  # nothing to do, and nothing seen
    victim.start("os.waitpid(child, os.WUNTRACED | os.WCONTINUED)[1]")
    os.kill(child, signal.SIGCONT)
    assert os.WIFCONTINUED(victim.result())
    victim.run("os.write(w, b'x')")
    assert victim.run("os.waitstatus_to_exitcode(os.waitpid(child, os.WUNTRACED | os.WCONTINUED)[1])") == 7
