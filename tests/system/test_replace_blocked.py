"""Processes that wait for the delayed mount when the real one comes: they get the real contents, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest
from replace_kit import FREEZERS, TIMEOUT, Scene, paused_at, scene
from surgery_kit import compile_c

from spfs.testing import process_state, wait_until
from stubfs.rules import Rule

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]

# Calls by the system's own interface: nobody repeats what the kernel has interrupted (Python would).
CALLER = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile int handled;
static void handler(int number) { (void) number; handled++; }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }

/* program HELD CALL [PATH]: opens and maps HELD, says so, waits for a line, makes CALL, and tells how it ended */
int main(int argc, char **argv)
{
    const char *call = argv[2], *path = argc > 3 ? argv[3] : "";
    struct sigaction action = { .sa_handler = handler };
    struct timespec duration = { 0, 800000000 };
    struct timeval limit = { 0, 800000 };
    struct stat status;
    char buffer[64] = "", seen[64] = "", byte;
    long result = -1, size = 0;
    int word = 0;
    sigset_t usr2;

    int held = open(argv[1], O_RDWR);
    char *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, held, 0);
    if (held < 0 || map == MAP_FAILED)
        return 1;
    lseek(held, 3, SEEK_SET);
    sigaction(SIGUSR1, &action, NULL);
    action.sa_flags = SA_RESTART;
    sigaction(SIGUSR2, &action, NULL);
    puts("ready");
    fflush(stdout);
    if (read(0, &byte, 1) != 1)
        return 1;
    double begin = now();
    errno = 0;
    if (!strcmp(call, "read")) {
        result = read(held, buffer, 5);
    } else if (!strcmp(call, "map")) {
        memcpy(buffer, map, 5);
        result = 5;
    } else if (!strcmp(call, "open")) {
        int fd = open(path, O_RDONLY);
        result = fd < 0 ? -1 : read(fd, buffer, 5);
    } else if (!strcmp(call, "create")) {
        int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0600);
        result = fd < 0 ? -1 : write(fd, "made", 4);
    } else if (!strcmp(call, "write")) {
        int fd = open(path, O_WRONLY | O_APPEND);
        result = fd < 0 ? -1 : write(fd, "added", 5);
    } else if (!strcmp(call, "stat")) {
        result = stat(path, &status);
        size = status.st_size;
    } else if (!strcmp(call, "mkdir")) {
        result = mkdir(path, 0700);
    } else if (!strcmp(call, "pause")) {
        result = pause();
    } else if (!strcmp(call, "select")) {
        result = select(0, NULL, NULL, NULL, &limit);
    } else if (!strcmp(call, "nanosleep")) {
        result = nanosleep(&duration, NULL);
    } else if (!strcmp(call, "poll")) {
        result = poll(NULL, 0, 800);
    } else if (!strcmp(call, "futex")) {
        result = syscall(SYS_futex, &word, FUTEX_WAIT, 0, &duration, NULL, 0);
    } else if (!strcmp(call, "sigtimedwait")) {
        sigemptyset(&usr2);
        sigaddset(&usr2, SIGUSR2);
        sigprocmask(SIG_BLOCK, &usr2, NULL);
        result = sigtimedwait(&usr2, NULL, NULL);
    } else if (!strcmp(call, "stdin")) {
        result = read(0, buffer, 5);
    }
    int number = errno;
    double seconds = now() - begin;
    long place = lseek(held, 0, SEEK_CUR);
    pread(held, seen, 5, 0);
    printf("{\"result\": %ld, \"errno\": %d, \"handled\": %d, \"seconds\": %f, \"buffer\": \"%s\", \"size\": %ld,"
           " \"place\": %ld, \"contents\": \"%s\", \"map\": \"%.5s\"}\n",
           result, number, handled, seconds, buffer, size, place, seen, map);
    return 0;
}
"""


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program, static: nothing of it depends on what this machine's C library does with signals."""
    return compile_c(tmp_path_factory.mktemp("caller"), CALLER, "-static", "-Wno-unused-result")


class Call:
    """A process of the program; ``go`` makes its call."""

    def __init__(self, program: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    @property
    def pid(self) -> int:
        return self.process.pid

    def go(self, text: str = "\n") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def waits(self) -> None:
        """Until it sleeps in its call, and no longer in the read(0, ...) before it."""
        wait_until(lambda: process_state(self.pid) == "S" and not self._reads(), what="it to wait in its call")

    def _reads(self) -> bool:
        # x86-64: read is 0, and its third argument is 1 only before the call.
        return Path(f"/proc/{self.pid}/syscall").read_text().split()[:4:3] in (["0", "0x1"], ["running"])

    def result(self) -> Dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program has ended: {self.process.wait()}"
        return dict(json.loads(line))


@pytest.fixture
def calls(scene: Scene, caller: str) -> "Iterator[Calls]":
    made = Calls(scene, caller)
    try:
        yield made
    finally:
        for call in made.made:
            call.process.kill()
            scene.cleanup(call.process.communicate)


class Calls:
    """Programs that hold the file "held" of a scene."""

    def __init__(self, scene: Scene, program: str) -> None:
        self._scene, self._program = scene, program
        self.made: list[Call] = []
        scene.delay()
        scene.file("held", b"0123456789")
        for name, contents in {"other": b"other", "third": b"third\n", "log": b"first\n"}.items():
            scene.real_file(name, contents)

    def start(self, call: str, path: str = "") -> Call:
        held = str(self._scene.mnt / "held")
        self.made.append(Call(self._program, held, call, str(self._scene.mnt / path)))
        return self.made[-1]


WAITING: Dict[str, Tuple[str, Dict[str, object]]] = {
    # by name: the path, and what the call must have brought
    "read": ("", {"result": 5, "buffer": "34567", "place": 8}),
    "map": ("", {"buffer": "01234"}),
    "open": ("other", {"result": 5, "buffer": "other"}),
    "create": ("made", {"result": 4}),
    "write": ("log", {"result": 5}),
    "stat": ("third", {"result": 0, "size": 6}),
    "mkdir": ("directory", {"result": 0}),
}


@pytest.mark.parametrize("kind", FREEZERS)
def test_whoever_waits_gets_the_real_contents(scene: Scene, calls: Calls, kind: str) -> None:
    started = {name: calls.start(name, path) for name, (path, _) in WAITING.items() if name != "map"}
    scene.client.mode("stub")
    creating = ("create", "mkdir")
    for name in started.keys() - creating:
        started[name].go()
    scene.held_by(*[started[name].pid for name in started.keys() - creating])
    for name in creating:
        started[name].go()
    # Of those who create something in one directory, all but one wait in the kernel.
    wait_until(lambda: {"create", "mkdir", "lookup"} & {one["operation"] for one in scene.client.held(scene.id)})
    group = scene.cgroup(kind, *[call.pid for call in started.values()])
    report = scene.replace(freeze_cgroup=group)
    for name, call in started.items():
        seen = call.result()
        expected = {"errno": 0, "handled": 0, "contents": "01234", **WAITING[name][1]}
        assert {key: seen[key] for key in expected} == expected, name
    assert report["left"] == []
    assert (scene.export / "log").read_bytes() == b"first\nadded"
    assert (scene.export / "made").read_bytes() == b"made" and (scene.export / "directory").is_dir()
    for call in started.values():
        assert call.process.wait(TIMEOUT) == 0
    scene.replaced()


def test_whoever_waits_for_a_page_gets_the_real_one(scene: Scene, calls: Calls) -> None:
    call = calls.start("map")
    scene.client.mode("stub")
    call.go()
    wait_until(lambda: scene.client.held(scene.id), what="the page to be asked for")
    report = scene.replace()
    assert call.result()["buffer"] == "01234" and report["left"] == []
    assert call.process.wait(TIMEOUT) == 0
    scene.replaced()


def test_who_is_killed_while_blocked_dies_at_once_and_the_others_go_on(scene: Scene, calls: Calls) -> None:
    killed, other = calls.start("open", "other"), calls.start("read")
    scene.client.mode("stub")
    for call in (killed, other):
        call.go()
    scene.held_by(killed.pid, other.pid)
    scene.cgroup("v1", killed.pid, other.pid)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.process.wait(TIMEOUT) == -signal.SIGKILL
    assert scene.replace(freeze_cgroup=scene.cgroup("v1", other.pid))["left"] == []
    assert other.result()["buffer"] == "34567" and other.process.wait(TIMEOUT) == 0
    scene.replaced()


# Within the blackout


@pytest.mark.parametrize("name", ["pause", "select", "nanosleep", "poll", "futex", "sigtimedwait"])
@pytest.mark.parametrize("kind", [FREEZERS[0], FREEZERS[1]])
@paused_at("exchanged")
def test_a_handled_signal_during_the_blackout(scene: Scene, calls: Calls, name: str, kind: str) -> None:
    """It is delivered once, when the process runs on, and ends the call as it would have without us."""
    call = calls.start(name)
    call.go()
    call.waits()
    scene.client.mode("stub")
    scene.ask(freeze_cgroup=scene.cgroup(kind, call.pid))
    scene.manager.reached()
    assert process_state(call.pid) == "t"
    os.kill(call.pid, signal.SIGUSR1)
    scene.manager.go()
    seen = call.result()
    assert (seen["result"], seen["errno"], seen["handled"]) == (-1, 4, 1)
    assert seen["contents"] == "01234" and seen["place"] == 3
    assert scene.wait()["left"] == []
    assert call.process.wait(TIMEOUT) == 0
    scene.replaced()


@pytest.mark.parametrize("kind", [FREEZERS[0], FREEZERS[2]])
@paused_at("operated")
def test_calls_with_a_time_limit_neither_end_early_nor_twice(scene: Scene, calls: Calls, kind: str) -> None:
    """Nor is pause() ended at all; a signal that waits for sigtimedwait() ends it with its number."""
    named = {name: calls.start(name) for name in ("pause", "select", "nanosleep", "poll", "futex", "stdin")}
    wanted = calls.start("sigtimedwait")
    scene.client.mode("stub")
    scene.ask(freeze_cgroup=scene.cgroup(kind, wanted.pid, *[call.pid for call in named.values()]), begin="hold")
    begin = time.monotonic()
    for call in (*named.values(), wanted):
        call.go()
        call.waits()
    scene.client.begin("release", scene.id)
    scene.manager.reached()
    os.kill(wanted.pid, signal.SIGUSR2)
    # The blackout lasts on into the time limit of the calls, or beyond: that is the test's own doing.
    stood_still = time.monotonic() - begin
    scene.manager.no_more()
    scene.manager.go()
    assert wanted.result()["result"] == signal.SIGUSR2
    for name in ("select", "nanosleep", "poll", "futex"):
        seen = named[name].result()
        result = (-1, 110) if name == "futex" else (0, 0)
        assert (seen["result"], seen["errno"], seen["handled"]) == (*result, 0), name
        assert 0.799 <= seen["seconds"] < max(0.8, stood_still) + 5, name
    named["stdin"].go("later")
    assert named["stdin"].result()["buffer"] == "later"
    assert scene.wait()["left"] == []
    assert process_state(named["pause"].pid) == "S" and named["pause"].process.poll() is None
    os.kill(named["pause"].pid, signal.SIGUSR1)
    assert named["pause"].result()["handled"] == 1
    for call in calls.made:
        assert call.process.wait(TIMEOUT) == 0
    scene.replaced()


@paused_at("exchanged")
def test_a_signal_that_restarts_the_call(scene: Scene, calls: Calls) -> None:
    call = calls.start("stdin")
    call.go()
    scene.client.mode("stub")
    scene.ask()
    scene.manager.reached()
    os.kill(call.pid, signal.SIGUSR2)
    scene.manager.go()
    assert scene.wait()["left"] == []
    call.go("later")
    seen = call.result()
    assert (seen["buffer"], seen["handled"], seen["errno"]) == ("later", 1, 0)
    assert call.process.wait(TIMEOUT) == 0


@pytest.mark.parametrize("kind", FREEZERS)
@paused_at("exchanged")
def test_who_is_killed_within_the_blackout(scene: Scene, calls: Calls, kind: str) -> None:
    killed, other = calls.start("pause"), calls.start("read")
    scene.client.mode("stub")
    scene.ask(freeze_cgroup=scene.cgroup(kind, killed.pid, other.pid))
    scene.manager.reached()
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: process_state(killed.pid) in ("", "Z"), what="it to die, although it is traced")
    scene.manager.go()
    assert scene.wait()["left"] == []
    assert killed.process.wait(TIMEOUT) == -signal.SIGKILL
    other.go()
    assert other.result()["buffer"] == "34567" and other.process.wait(TIMEOUT) == 0
    scene.replaced()


@pytest.mark.parametrize("kind", FREEZERS)
@paused_at("exchanged")
def test_who_is_stopped_before_stays_stopped_and_goes_on_with_sigcont(scene: Scene, calls: Calls, kind: str) -> None:
    call = calls.start("read")
    os.kill(call.pid, signal.SIGSTOP)
    wait_until(lambda: process_state(call.pid) == "T")
    scene.client.mode("stub")
    scene.ask(freeze_cgroup=scene.cgroup(kind, call.pid))
    scene.manager.reached()
    scene.manager.go()
    assert scene.wait()["left"] == []
    wait_until(lambda: process_state(call.pid) == "T", what="its stop to be given back")
    os.kill(call.pid, signal.SIGCONT)
    call.go()
    assert call.result()["buffer"] == "34567" and call.process.wait(TIMEOUT) == 0
    scene.replaced()


@pytest.mark.parametrize("frozen", FREEZERS)
@pytest.mark.parametrize("operation", ["open", "read"])
def test_whoever_starts_a_program_on_another_mount_that_hangs(
    scene: Scene, tmp_path: Path, frozen: str, operation: str
) -> None:
    """When it reads the program's beginning, to seize it would be to wait with it, while everybody stands still."""
    scene.delay()
    path = scene.file("file", b"real contents")
    hung = tmp_path / "hung"
    hung.mkdir()
    scene.client.mount("hung", str(hung))
    (hung / "program").write_bytes(Path("/bin/cat").read_bytes())
    (hung / "program").chmod(0o755)
    other = scene.victim()
    other.run(f"file = open({path!r})")
    scene.client.set_rules([Rule("hold", operations=[operation])], "hung")
    with open(path) as given:
        starting = subprocess.Popen(["sh", "-c", f"exec {hung}/program"], stdin=given, stdout=subprocess.PIPE)
    group = None
    try:
        pid = wait_until(lambda: [one["pid"] for one in scene.client.held("hung")], TIMEOUT)[0]
        group = scene.cgroup(frozen, other.pid) if frozen != "none" else None
        begin = time.monotonic()
        report = scene.replace(**({"freeze_cgroup": group} if group else {}))
        assert time.monotonic() - begin < 10 and report["blackout"] < 5
        assert [(one["pid"], one["reason"].split(" (")[0]) for one in report["left"]] == [(pid, "it starts a program")]
        assert other.run("file.read()") == "real contents"
        scene.client.set_rules([], "hung")
        assert starting.communicate(timeout=TIMEOUT)[0] == b"real contents"
    finally:
        starting.kill()
        starting.wait()
        scene.client.unmount("hung", force=True)
    scene.replaced()
