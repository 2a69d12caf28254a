"""Who waits beside CRIU: if it ends before it has let the processes go, no mount of ours may stay behind.

CRIU calls no script for a restore that fails, and it may be killed. As it is there, it also does what later stages ask
for: the script then needs no interpreter of its own, which at several stages would be most of what a restore costs.
"""

from __future__ import annotations

import os
import select
import signal
from typing import Callable, Optional, Tuple

from spfs.criu.log import log
from spfs.criu.restoration import Restoration
from stubfs.errors import StubfsError

Perform = Callable[[str, Optional[int]], str]
"""Do a stage's part, of which the process ``pid`` is the restored tree's first; what is to be answered."""


def start(restoration: Restoration, criu: int, perform: Perform) -> None:
    """Fork one for the CRIU process ``criu``, unless there is one already."""
    try:
        os.mkfifo(restoration.guard_path, 0o600)
    except FileExistsError:
        return
    os.mkfifo(restoration.answer_path, 0o600)
    # For both directions: no writer's close is then an end, and whoever opens the other end need not wait for us.
    asked, answers = (os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in _fifos(restoration))
    pidfd = os.pidfd_open(criu)
    pid = os.fork()
    if pid == 0:
        try:
            _detach(asked, answers, pidfd)
            _guard(restoration, asked, answers, pidfd, perform)
        finally:
            os._exit(0)
    for fd in (asked, answers, pidfd):
        os.close(fd)
    with open(restoration.pid_path, "w") as file:
        file.write(f"{pid}\n")


def _fifos(restoration: Restoration) -> Tuple[str, str]:
    return restoration.guard_path, restoration.answer_path


def _detach(*keep: int) -> None:
    """Nobody who waits for the end of CRIU's output may wait for us."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") > 0 else 1 << 20)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _guard(restoration: Restoration, asked: int, answers: int, pidfd: int, perform: Perform) -> None:
    poll = select.poll()
    poll.register(asked, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    while restoration.known:
        ready = [fd for fd, _ in poll.poll()]
        if asked not in ready:
            return _clean_up(restoration)
        for line in os.read(asked, 4096).decode().splitlines():  # a request is one write
            stage, _, pid = line.partition(" ")
            if stage == "end":
                return
            os.write(answers, f"{perform(stage, int(pid) if pid else None)}\n".encode())


def _clean_up(restoration: Restoration) -> None:
    try:
        restoration.abandon()
    except (StubfsError, OSError) as error:
        log(f"cannot clean up after this restore: {error}", restoration.token)
