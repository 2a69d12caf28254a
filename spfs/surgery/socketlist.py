"""The unix sockets of the network namespaces that processes are in."""

from __future__ import annotations

import logging
import os
import stat
import threading
from typing import Callable, Dict, Iterable, List, Sequence, Set, Tuple, TypeVar

from spfs.linux import namespaces, procfs, sockdiag
from spfs.linux.sockdiag import UnixSocket
from spfs.surgery.bulk import objects

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
    """Who has the sockets of these numbers open: (process, descriptor) for each of them."""
    found: Dict[int, Set[Tuple[int, int]]] = {number: set() for number in numbers}
    for pid in procfs.processes():
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # it has ended, or is none of ours to look at
        for name, thing in zip(names, objects([f"/proc/{pid}/fd/{name}" for name in names])):
            if thing is not None and stat.S_ISSOCK(thing.mode) and thing.inode in found and pid != os.getpid():
                found[thing.inode].add((pid, int(name)))
    return found
