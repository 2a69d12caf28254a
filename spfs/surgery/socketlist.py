"""Unix sockets that are bound on the old mount: they keep it in use without a descriptor of it. They are reported.

An accepted socket has the path of its listener, and so holds the mount as well.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Dict, Iterable, List

from spfs.linux import namespaces, sockdiag

_log = logging.getLogger(__name__)


def bound_on(device: int, pids: Iterable[int]) -> Dict[int, int]:
    """The sockets bound on ``device`` in any network namespace of ``pids``: the number in the socket's /proc link →
    the inode number of its path on the device (32 bits of it, which is all that the kernel tells)."""
    found: Dict[int, int] = {}
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
            sockets = _sockets_of(pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            if not os.path.exists(f"/proc/{pid}"):
                seen.discard(namespace)  # it has ended in between: by way of another process
                continue
            # The kernel has no unix_diag, in no namespace.
            _log.warning("unix sockets on the old mount cannot be found: %s", error)
            return found
        except OSError as error:
            _log.debug("the sockets of process %d's network namespace cannot be listed: %s", pid, error)
            continue
        found.update({one.number: one.inode for one in sockets if one.device == device})
    return found


def _sockets_of(pid: int) -> List[sockdiag.BoundSocket]:
    if namespaces.inode(pid, "net") == namespaces.inode("self", "net"):
        return sockdiag.bound_sockets()
    found: List[sockdiag.BoundSocket] = []
    failures: List[OSError] = []

    def work() -> None:
        # A network namespace is joined by a thread alone, and that ends here.
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                namespaces.setns(fd, namespaces.CLONE_NEWNET)
            finally:
                os.close(fd)
            found.extend(sockdiag.bound_sockets())
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="sockets")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return found
