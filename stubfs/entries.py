"""The requests that find, make, move and remove names.

Methods raise OSError for the errno to answer with.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Callable, Optional, Tuple

from stubfs import protocol
from stubfs.backing import Backing, allowed_flags
from stubfs.credentials import ourselves
from stubfs.handles import HandleTable, OpenFile
from stubfs.lanes import Worker
from stubfs.nested import NestedMounts
from stubfs.nodes import Node, NodeTable, Orphan
from stubfs.objects import Objects, backing_of, fd_link, stale
from stubfs.protocol import BODY, Opcode
from stubfs.request import Request

_RETRIES = 5  # of a lookup that changes of names came across
_RENAME_EXCHANGE = 2


class Entries:
    """``may_vouch``: whether the kernel may believe the attributes that answer a request, for a moment."""

    def __init__(
        self, nodes: NodeTable, handles: HandleTable, objects: Objects, nested: NestedMounts,
        may_vouch: Callable[[Request], bool],
    ) -> None:  # fmt: skip
        self._nodes = nodes
        self._handles = handles
        self._objects = objects
        self._nested = nested
        self._may_vouch = may_vouch

    # --- find

    def lookup(self, worker: Worker, request: Request) -> None:
        name = request.name()
        backing = backing_of(request)
        node: Optional[Node] = None
        tries = 0
        while node is None:
            seen = self._nodes.changes
            try:
                status = self._objects.by_path(request, Backing.stat, name)
            except OSError as error:
                if self._nodes.child(request.node, name) is not None:
                    with ourselves():
                        if self._nested.would_go(error, self._nodes.child_path(request.node, name), request.tid):
                            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
                raise
            # In the end an answer that was true a moment ago will do: the kernel asks again before it uses it.
            node = self._nodes.enter(request.node, name, status, backing.number, seen if tries < _RETRIES else None)
            tries += 1
        self._answer(request, node, status)

    def _answer(self, request: Request, node: Node, status: os.stat_result, opened: bytes = b"") -> bool:
        valid = 0
        if self._may_vouch(request):
            # Else each stat(2) would be two requests. What changes them on this mount makes the kernel forget them.
            valid = 1
            node.vouched = time.monotonic()
        elif request.state is not None and request.state.is_aside:
            node.told = time.monotonic()
        if request.device.send(protocol.entry_reply(request.unique, node.number, status, valid, opened)):
            return True
        self._nodes.forget(node.number, 1)  # nobody took the reference
        return False

    def _entered(self, request: Request, name: bytes, status: os.stat_result) -> Node:
        node = self._nodes.enter(request.node, name, status, backing_of(request).number)
        assert node is not None
        return node

    # --- make

    def create(self, worker: Worker, request: Request) -> None:
        flags, mode, umask, _ = protocol.CREATE_IN.unpack_from(request.buffer, BODY)
        self._handles.check_room()
        worker.identity.mask(umask)
        name = request.name(BODY + protocol.CREATE_IN.size)
        self._nodes.change()
        try:
            allowed = allowed_flags(flags) | flags & os.O_EXCL | os.O_CREAT
            fd = self._objects.by_path(request, lambda backing, path: backing.open(path, allowed, mode & 0o7777), name)
            file, status = self._opened(worker, request, fd, flags)
            node = self._entered(request, name, status)
        finally:
            self._nodes.change()
        self._answer_open(request, node, status, file)

    def tmpfile(self, worker: Worker, request: Request) -> None:
        flags, mode, umask, _ = protocol.CREATE_IN.unpack_from(request.buffer, BODY)
        self._handles.check_room()
        worker.identity.mask(umask)
        allowed = allowed_flags(flags) & ~os.O_TRUNC | flags & os.O_EXCL | os.O_TMPFILE
        fd = self._objects.by_fd(request, lambda directory: os.open(fd_link(directory), allowed, mode & 0o7777))
        file, status = self._opened(worker, request, fd, flags)
        self._answer_open(request, self._nodes.enter_nameless(status, file.generation), status, file)

    def _opened(self, worker: Worker, request: Request, fd: int, flags: int) -> Tuple[OpenFile, os.stat_result]:
        """The handle of a new file, which has no node yet; takes ``fd`` over."""
        try:
            status = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        credentials = worker.identity.current
        return self._handles.add(0, False, flags, backing_of(request), fd, credentials, request.tid), status

    def _answer_open(self, request: Request, node: Node, status: os.stat_result, file: OpenFile) -> None:
        self._handles.created(file, node.number)
        opened = protocol.OPEN_OUT.pack(file.fh, self._objects.open_flags(request, file), 0)
        if not self._answer(request, node, status, opened):
            self._handles.release(file.fh)

    def mknod(self, worker: Worker, request: Request) -> None:
        # The device number has the form of makedev(3), in 32 bits: new_encode_dev(), linux/kdev_t.h.
        mode, device, umask, _ = protocol.MKNOD_IN.unpack_from(request.buffer, BODY)
        worker.identity.mask(umask)
        name = request.name(BODY + protocol.MKNOD_IN.size)
        self._make(request, name, lambda backing, path: backing.mknod(path, mode, device))

    def mkdir(self, worker: Worker, request: Request) -> None:
        mode, umask = protocol.MKDIR_IN.unpack_from(request.buffer, BODY)
        worker.identity.mask(umask)
        name = request.name(BODY + protocol.MKDIR_IN.size)
        self._make(request, name, lambda backing, path: backing.mkdir(path, mode))

    def symlink(self, worker: Worker, request: Request) -> None:
        name, target = request.names()
        self._make(request, name, lambda backing, path: backing.symlink(target, path))

    def _make(self, request: Request, name: bytes, make: Callable[[Backing, bytes], os.stat_result]) -> None:
        self._nodes.change()
        try:
            status = self._objects.by_path(request, make, name)
            node = self._entered(request, name, status)
        finally:
            self._nodes.change()
        self._answer(request, node, status)

    def link(self, worker: Worker, request: Request) -> None:
        (number,) = protocol.U64.unpack_from(request.buffer, BODY)
        name = request.name(protocol.NAME_OFFSETS[Opcode.LINK])
        backing = backing_of(request)

        def link(backing: Backing, path: bytes) -> os.stat_result:
            old = self._nodes.path(number)
            if old is None:
                return self._objects.by_own_fd(number, lambda fd: backing.link_fd(fd, path), stale())
            try:
                return backing.link(old, path)
            except PermissionError:
                # Perhaps of the way to a name that the caller has not used: it may have come by another one, or by an
                # open file.
                fd = backing.pin(old)
                try:
                    return backing.link_fd(fd, path)
                finally:
                    os.close(fd)

        self._nodes.change()
        try:
            status = self._objects.by_path(request, link, name)
            node = self._nodes.link(number, request.node, name, backing.number, status)
            if node is None:
                node = self._entered(request, name, status)
        finally:
            self._nodes.change()
        self._answer(request, node, status)

    # --- remove and move

    def unlink(self, worker: Worker, request: Request) -> None:
        self._remove(request, Backing.unlink)

    def rmdir(self, worker: Worker, request: Request) -> None:
        self._remove(request, Backing.rmdir)

    def _remove(self, request: Request, remove: Callable[[Backing, bytes], None]) -> None:
        name = request.name()
        # Not for every removal: to find the mark takes three system calls.
        if backing_of(request).may_keep_names and self._objects.by_path(
            request, lambda backing, path: backing.keeps(path), name
        ):
            request.answer()
            return
        orphan = self._pin(request, request.node, name)
        self._nodes.change()
        try:
            self._objects.by_path(request, remove, name)
            if self._nodes.remove(request.node, name, orphan):
                orphan = None
        finally:
            self._nodes.change()
            _close(orphan)
        request.answer()

    def rename(self, worker: Worker, request: Request) -> None:
        (parent,) = protocol.RENAME_IN.unpack_from(request.buffer, BODY)
        self._rename(request, parent, protocol.RENAME_IN.size, 0)

    def rename2(self, worker: Worker, request: Request) -> None:
        parent, flags, _ = protocol.RENAME2_IN.unpack_from(request.buffer, BODY)
        self._rename(request, parent, protocol.RENAME2_IN.size, flags)

    def _rename(self, request: Request, parent: int, names_at: int, flags: int) -> None:
        old, new = request.names(BODY + names_at)
        orphan = self._pin(request, parent, new) if not flags & _RENAME_EXCHANGE else None

        def rename(backing: Backing, path: bytes) -> None:
            target = self._nodes.child_path(parent, new)
            if target is None:
                raise stale()
            backing.rename(path, target, flags)

        self._nodes.change(renames=True)
        try:
            self._objects.by_path(request, rename, old)
            if flags & _RENAME_EXCHANGE:
                self._nodes.exchange(request.node, old, parent, new)
            elif self._nodes.rename(request.node, old, parent, new, orphan):
                orphan = None
        finally:
            self._nodes.change(renames=True)
            _close(orphan)
        request.answer()

    def _pin(self, request: Request, parent: int, name: bytes) -> Optional[Orphan]:
        """Hold on to what is about to lose its last name, if the kernel knows it: it may be in use."""
        node = self._nodes.child(parent, name)
        if node is None or len(node.names) > 1:
            return None
        path = self._nodes.child_path(parent, name)
        backing = backing_of(request)
        try:
            return Orphan(backing.pin(path), backing.number) if path is not None else None
        except OSError:
            return None  # the operation itself will say why


def _close(orphan: Optional[Orphan]) -> None:
    if orphan is not None:
        os.close(orphan.fd)
