"""The unix sockets of the network namespaces that processes are in."""

from __future__ import annotations

import array
import logging
import os
import socket
import stat
import threading
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Set, Tuple, TypeVar

from spfs.linux import namespaces, process, procfs, sockdiag, statx
from spfs.linux.sockdiag import UnixSocket
from spfs.surgery import bulk, turns
from stubfs.wire import MAX_FDS

T = TypeVar("T")

_log = logging.getLogger(__name__)


def of_processes(pids: Iterable[int]) -> List[UnixSocket]:
    """The sockets of every network namespace that one of ``pids`` is in; the kernel is asked, no file system."""
    found: List[UnixSocket] = []
    seen = set()
    for pid in pids:
        try:
            namespace = namespaces.inode(pid, "net")
        except OSError:
            continue  # it has ended
        if namespace in seen:
            continue
        # Not tried again through others that fail: each attempt could make the kernel look for a module.
        seen.add(namespace)
        try:
            found += _sockets_of(pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            if not os.path.exists(f"/proc/{pid}"):
                seen.discard(namespace)  # it has ended in between: by way of another process
                continue
            # The kernel has no unix_diag, in no namespace.
            _log.warning("unix sockets on the old mount cannot be found: %s", error)
            return found
        except OSError as error:
            _log.debug("the sockets of process %d's network namespace cannot be listed: %s", pid, error)
    return found


def _sockets_of(pid: int) -> List[UnixSocket]:
    if namespaces.inode(pid, "net") == namespaces.inode("self", "net"):
        return sockdiag.unix_sockets()
    with open(f"/proc/{pid}/ns/net", "rb") as file:
        return in_thread(sockdiag.unix_sockets, [(file.fileno(), namespaces.CLONE_NEWNET)])


def in_thread(work: Callable[[], T], places: Sequence[Tuple[int, int]]) -> T:
    """Run ``work`` in a thread of its own in namespaces (descriptor, kind), which it leaves by its end. A thread can
    join a mount namespace when it shares its directories with no other (setns(2))."""
    found: List[T] = []
    failures: List[BaseException] = []

    def body() -> None:
        try:
            namespaces.unshare(namespaces.CLONE_FS)
            for fd, kind in places:
                namespaces.setns(fd, kind)
            found.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body, name="sockets")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return found[0]


def holders(numbers: Iterable[int]) -> Dict[int, Set[Tuple[int, int]]]:
    """Who has the sockets of these numbers open: (process, descriptor) for each of them; no copies of surgeons."""
    found: Dict[int, Set[Tuple[int, int]]] = {number: set() for number in numbers}
    surgeons = turns.others() if found else ()
    for pid in procfs.processes() if found else ():
        for fd, number in _sockets(pid):
            if number in found and pid != os.getpid() and pid not in surgeons:
                found[number].add((pid, fd))
    return found


def has_socket(pid: int, number: int) -> bool:
    return any(number == one for _, one in _sockets(pid))


def _sockets(pid: int) -> Iterator[Tuple[int, int]]:
    """Descriptor and number of each that the process has."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return  # it has ended, or is none of ours to look at
    for name, thing in zip(names, bulk.objects([f"/proc/{pid}/fd/{name}" for name in names])):
        if thing is not None and stat.S_ISSOCK(thing.mode):
            yield int(name), thing.inode


class Flight(NamedTuple):
    """Descriptors in the queue of a socket: what the first message carries, and whether that is all."""

    objects: List[statx.Object]
    is_complete: bool


def in_flight(sockets: Iterable[UnixSocket]) -> Dict[int, Flight]:
    """For each of ``sockets`` in whose queue there are descriptors, what can be seen of them while others read it."""
    found: Dict[int, Flight] = {}
    queued = [one.number for one in sockets if one.queued and one.state != sockdiag.LISTENING]
    for number, users in holders(queued).items():
        for pid, fd in sorted(users)[:1]:
            try:
                lines = procfs.parse_fdinfo(procfs.read(f"/proc/{pid}/fdinfo/{fd}")).lines
                count = sum(int(line.split()[1]) for line in lines if line.startswith("scm_fds:"))
                if count:
                    objects = _peeked(pid, fd)
                    found[number] = Flight(objects, len(objects) == count)
            except OSError:
                continue  # it has ended, or the descriptor is another one by now
    return found


def _peeked(pid: int, fd: int) -> List[statx.Object]:
    pidfd = process.pidfd_open(pid)
    try:
        # Not a copy that lasts: to others who look at the same time it would be one more socket with the descriptor.
        with socket.socket(fileno=process.pidfd_getfd(pidfd, fd, 0)) as wrapped:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            _, ancillary, _, _ = wrapped.recvmsg(1, socket.CMSG_SPACE(4 * MAX_FDS), flags)
    finally:
        os.close(pidfd)
    objects: List[statx.Object] = []
    for level, kind, data in ancillary:
        if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            continue
        numbers = array.array("i")
        numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        for number in numbers:
            objects.append(statx.examine("", number, statx.AT_EMPTY_PATH))
            os.close(number)
    return objects
