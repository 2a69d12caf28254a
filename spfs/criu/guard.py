"""Who waits beside CRIU: if it ends before it has let the processes go, no mount of ours may stay behind.

CRIU calls no script for a restore that fails, and it may be killed.
"""

from __future__ import annotations

import logging
import os
import select
import signal

from spfs.criu.restoration import Restoration
from stubfs.errors import StubfsError

log = logging.getLogger(__name__)


def start(restoration: Restoration, criu: int) -> None:
    """Fork one for the CRIU process ``criu``, unless there is one already."""
    try:
        os.mkfifo(restoration.guard_path, 0o600)
    except FileExistsError:
        return
    fifo = os.open(restoration.guard_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    pidfd = os.pidfd_open(criu)
    if os.fork() == 0:
        try:
            _detach(fifo, pidfd)
            _guard(restoration, fifo, pidfd)
        finally:
            os._exit(0)
    os.close(fifo)
    os.close(pidfd)


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


def _guard(restoration: Restoration, fifo: int, pidfd: int) -> None:
    poll = select.poll()
    poll.register(fifo, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    ready = [fd for fd, _ in poll.poll()]
    if fifo in ready:
        return
    try:
        restoration.abandon()
    except (StubfsError, OSError) as error:
        log.error("cannot clean up after restore %s: %s", restoration.token, error)
