"""Making the kernel ask for attributes once more, before requests go on that it asked with for the former ones.

The kernel dismisses attributes that it asked for before it was told others of the same file, or to forget them
(fuse_change_attributes_i() in fs/fuse/inode.c). A read(2) or lseek(2) that was held while somebody exempt looked at the
file would go by what that one was told: it would end where the former file does. So before it gets its answer, we ask,
by the descriptor that it has: in /proc.

A process of its own does that: one that waits for an answer of its own cannot be killed.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from typing import List, Mapping

from stubfs import syscalls
from stubfs.callers import Processes

_log = logging.getLogger(__name__)
_LIMIT = 2.0  # seconds: a real file system that hangs must not stop a change of mode for good
_STATX_SIZE = 0x200  # linux/stat.h


def refresh(device: int, waiting: Mapping[int, List[int]]) -> None:
    """``waiting``: thread ids of those who wait with a node open, by its number. ``device``: st_dev of the mount.

    OSError if there can be no process. To be called where nothing that the answers need is waited for.
    """
    pid = os.fork()
    if not pid:
        try:
            os.closerange(0, 2**31 - 1)  # the mount's device above all
            _ask(device, waiting)
        finally:
            os._exit(0)
    ended = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        if poll.poll(int(_LIMIT * 1000)):
            os.waitpid(pid, 0)
        else:
            _log.warning("the sizes of %d files that are waited for could not be asked for", len(waiting))
            os.kill(pid, signal.SIGKILL)
            threading.Thread(target=os.waitpid, args=(pid, 0), name="reaper", daemon=True).start()
    finally:
        os.close(ended)


def _ask(device: int, waiting: Mapping[int, List[int]]) -> None:
    processes = Processes()
    left = set(waiting)
    for pid in {processes.of(tid)[0] for tids in waiting.values() for tid in tids}:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # it is gone, and waits for nothing
        for name in names:
            link = f"/proc/{pid}/fd/{name}".encode()
            try:
                found, node = syscalls.identity_without_sync(link)
                if found == device and node in left:
                    left.remove(node)
                    syscalls.statx(syscalls.AT_FDCWD, link, syscalls.AT_STATX_FORCE_SYNC, _STATX_SIZE)
            except OSError:
                pass  # closed meanwhile; or whoever waits will be told the same
