"""The manager of all restores by CRIU, unless $SPFS_MANAGER_SOCK names another one: started where none runs."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, List

from spfs.errors import SpfsError
from spfs.managerstart import SOCKET_VARIABLE, ManagerStart

if TYPE_CHECKING:
    from spfs.restore import Restore

# spfs.restore is imported where it is used: while a manager starts, there is time for that.

STATE = "/run/spfs-criu"
WORK_DIR = "/run/spfs-manager/criu"
_starting: List[ManagerStart] = []


def make_directory(path: str) -> None:
    """One through which CRIU gets to a hidden mount, also as root of a user namespace with other ids; not listed."""
    os.makedirs(path, exist_ok=True)
    os.chmod(path, 0o711)


def start_early() -> None:
    """Begin to start one that is needed soon, if none seems to be there; ``connect`` waits for it."""
    if os.environ.get(SOCKET_VARIABLE) or os.path.exists(_socket()):
        return
    make_directory(STATE)
    _starting.append(ManagerStart(WORK_DIR, _socket()))


def connect(start: bool = False) -> Restore:
    """To the manager that serves restores by CRIU; with ``start`` to one that is started if need be.

    One that was killed has left its work directory: another one is started there in any case, and takes over. ENOENT
    if there is none, and was none.
    """
    from spfs.client import ManagerClient
    from spfs.restore import Restore

    named = os.environ.get(SOCKET_VARIABLE)
    if named:
        return Restore(ManagerClient(named))
    if not start and not os.path.isdir(WORK_DIR):
        return Restore(ManagerClient(_socket()))
    make_directory(STATE)
    fd = os.open(STATE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # of two restores at a time one starts it
        while _starting:
            _starting.pop().wait()
        return Restore.start(WORK_DIR)
    except SpfsError as error:
        # One that is ending still has its work directory.
        raise SpfsError(error.message, error.hint, errno.EBUSY) from error
    finally:
        os.close(fd)


def _socket() -> str:
    return os.path.join(WORK_DIR, "control.sock")
