"""What a request is about: the path of its node, or the fd that is left of one without a name.

Methods raise OSError for the errno to answer with; ESTALE for what has neither.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Callable, Optional, TypeVar

from stubfs import protocol
from stubfs.backing import Backing
from stubfs.credentials import insist
from stubfs.handles import HandleTable, OpenFile
from stubfs.lanes import Worker
from stubfs.modes import State
from stubfs.nodes import NodeTable
from stubfs.protocol import ROOT_NODE
from stubfs.request import Request

_T = TypeVar("_T")
_RETRIES = 5  # of an operation by path that a rename came across
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)


def stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def backing_if_any(request: Request) -> Optional[Backing]:
    """Of the state that the request is served under; None in stub mode."""
    state: Optional[State] = request.state
    return state.backing if state is not None else None


def backing_of(request: Request) -> Backing:
    state: Optional[State] = request.state
    if state is None or state.backing is None:
        raise stale()
    return state.backing


def fd_link(fd: int) -> str:
    """A path to the very object, whatever its names: proc(5), /proc/PID/fd."""
    return f"/proc/self/fd/{fd}"


def as_far_as_may_be(action: Callable[[int], _T], fd: int) -> _T:
    """``action`` on the object ``fd``, which it must not leave, with all that the caller has over it."""
    try:
        return action(fd)
    except PermissionError:
        return insist(action, fd)


class Objects:
    """``has_locked_pages``: whether a request that waits, for whatever reason, keeps pages of a node locked."""

    def __init__(self, nodes: NodeTable, handles: HandleTable, has_locked_pages: Callable[[int], bool]) -> None:
        self._nodes = nodes
        self._handles = handles
        self._has_locked_pages = has_locked_pages

    def by_handle(self, worker: Worker, request: Request, fh: int) -> OpenFile:
        """The open file, with its fd in the request's generation where that is possible."""
        backing = backing_if_any(request)
        if backing is None:
            return self._handles.get(fh)
        return self._handles.use(fh, backing, worker.identity)

    def by_path(self, request: Request, action: Callable[[Backing, bytes], _T], name: bytes = b"") -> _T:
        """``action`` on the path of the node, or of ``name`` in it; again if a rename took it away meanwhile.

        Of a file with several names, one that somebody else has removed is left for another.
        """
        if name == b"..":  # which the kernel resolves itself; nobody gets it by name
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        backing = backing_of(request)
        tries = 0
        while tries < _RETRIES:
            renames = self._nodes.renames
            path = self._nodes.child_path(request.node, name) if name else self._nodes.path(request.node)
            if path is None:
                break
            try:
                return action(backing, path)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                if renames != self._nodes.renames:
                    tries += 1
                elif name or not self._nodes.lose(request.node):
                    raise
        raise stale()

    def open_flags(self, request: Request, file: OpenFile) -> int:
        """FOPEN_* for the reply to ``request``, which has opened ``file``."""
        flags = 0
        state = request.state
        reads = file.flags & os.O_ACCMODE == os.O_RDONLY
        if file.in_staging or reads and state is not None and state.vouches:
            # Closing has nothing to report, and no rule is for it: from Linux 5.16 on it is no request then.
            flags |= protocol.FOPEN_NOFLUSH
        if state is not None and state.is_aside:
            # For the others it is stub mode: they must not find in the page cache what this one reads.
            flags |= protocol.FOPEN_DIRECT_IO
        if self._has_locked_pages(request.node):
            # Else the kernel drops all pages of the file, and the opener waits, unkillable, for the locked ones.
            flags |= protocol.FOPEN_KEEP_CACHE
        return flags

    def by_fd(self, request: Request, action: Callable[[int], _T]) -> _T:
        """``action`` on an fd of the node's object, which may be an O_PATH one: go by fd_link() of it.

        So nothing but the rights to the object itself matter: whoever has got hold of it may have come by a way that
        is closed to others.
        """
        if self._nodes.path(request.node) is None:
            return self.by_own_fd(request.node, lambda own: as_far_as_may_be(action, own), stale())
        fd = self._handles.duplicate(request.node, backing_of(request).number)
        try:
            if fd is None:
                fd = self.by_path(request, Backing.pin)
                self.check(request, os.fstat(fd))
            return as_far_as_may_be(action, fd)
        finally:
            if fd is not None:
                os.close(fd)

    def by_own_fd(self, node: int, action: Callable[[int], _T], otherwise: OSError) -> _T:
        """``action`` on an fd that we have of the node anyway, of an open file or of a removed name; else the error."""
        fd = self._handles.duplicate(node)
        if fd is None:
            left = self._nodes.remains(node)
            if left is None:
                raise otherwise
            fd = left.fd
        try:
            return action(fd)
        finally:
            os.close(fd)

    def check(self, request: Request, status: os.stat_result) -> None:
        """ESTALE if what was found at the node's path is something else, by somebody else's doing.

        The kernel then looks the name up again. An answer of another type would make it refuse the inode for good.
        """
        node = self._nodes.get(request.node)
        if node is None or node.number == ROOT_NODE:
            return
        identity = (backing_of(request).number, status.st_dev, status.st_ino)
        if node.kind != stat.S_IFMT(status.st_mode) or (
            node.kind != stat.S_IFDIR
            and node.identity is not None
            and node.identity[0] == identity[0]
            and node.identity != identity
        ):
            raise stale()
