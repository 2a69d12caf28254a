"""The table of open files: fh -> node, generation, flags, backing fd; reopening after a change of generation.

A handle owns its backing fds: the current one, and those of former generations, which close only with the handle,
because an operation on them may still be under way. All of them close with the RELEASE of the handle.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from typing import Dict, List, Optional, Tuple

from stubfs.backing import Backing, allowed_flags, reopen_flags
from stubfs.credentials import Credentials, ThreadIdentity, acting_as, insist, ourselves
from stubfs.nodes import NodeTable

_log = logging.getLogger(__name__)
_RWF_APPEND, _RWF_NOAPPEND = 0x10, 0x20  # linux/fs.h; the second one from Linux 6.9 on


class OpenFile:
    __slots__ = (
        "fh", "node", "is_directory", "flags", "generation", "fd", "former", "credentials", "tid", "position",
        "lock", "opposite", "in_staging",
    )  # fmt: skip

    def __init__(
        self, fh: int, node: int, is_directory: bool, flags: int, generation: int, fd: int,
        credentials: Credentials, tid: int, in_staging: bool,
    ) -> None:  # fmt: skip
        self.fh = fh
        self.node = node  # 0 while a CREATE is under way
        self.is_directory = is_directory
        self.flags = flags  # as the opener gave them
        self.generation = generation  # number of the backing directory that fd is in
        self.fd = fd
        self.former: List[int] = []
        self.credentials = credentials  # the opener's: reopening happens in its name
        self.tid = tid
        self.position = -1  # of a directory: the offset at which fd stands; -1: unknown
        self.lock = threading.Lock()  # reopening, and a directory's position
        self.opposite = -1  # of fd, as to O_APPEND; -1: not needed yet
        self.in_staging = in_staging  # where it was opened

    def appending(self, wanted: bool) -> int:
        """An fd whose pwrite(2) goes to the end of the file, or obeys the offset.

        The opener may change its own mind with fcntl(2), and a page that is written back has its place. PermissionError
        if the file has been closed to everybody since it was opened.
        """
        if bool(self.flags & os.O_APPEND) == wanted:
            return self.fd
        with self.lock:
            if self.opposite < 0:
                try:
                    with acting_as(self.credentials):  # a server may trust nobody else
                        self.opposite = self._reopen(wanted)
                except PermissionError:
                    with ourselves():  # it is open already: nobody's rights matter any more
                        self.opposite = self._reopen(wanted)
            return self.opposite

    def _reopen(self, appending: bool) -> int:
        return os.open(
            f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC | (os.O_APPEND if appending else 0)
        )

    # The flags of pwritev2(2) do the same without another fd, but not on a FUSE file system: its server is not told.

    def append(self, data: memoryview) -> Tuple[int, int]:
        """How many bytes were written, and at which offset. For one thread at a time, which the kernel's lock of a file
        that is written to takes care of."""
        try:
            fd = self.appending(True)
        except PermissionError:
            fd = self.fd
            written = os.pwritev(fd, [data], -1, _RWF_APPEND)
        else:
            written = os.write(fd, data)
        return written, os.lseek(fd, 0, os.SEEK_CUR) - written

    def write_at(self, data: memoryview, offset: int) -> int:
        try:
            fd = self.appending(False)
        except PermissionError:
            return os.pwritev(self.fd, [data], offset, _RWF_NOAPPEND)
        return os.pwrite(fd, data, offset)

    def close(self) -> None:
        fds = [self.fd, self.opposite, *self.former]
        self.fd = self.opposite = -1
        self.former = []
        for fd in fds:
            if fd >= 0:
                try:
                    os.close(fd)
                except OSError:
                    pass  # an error of writing back; FLUSH has reported it to whoever closed


def _open(backing: Backing, path: bytes, flags: int) -> int:
    try:
        return backing.open(path, flags)
    except PermissionError:
        own = backing.pin(path)
        try:
            return insist(lambda fd: os.open(f"/proc/self/fd/{fd}", flags), own)
        finally:
            os.close(own)


class HandleTable:
    def __init__(self, nodes: NodeTable) -> None:
        self._nodes = nodes
        # After a change of the backing directory each file is opened a second time.
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._newest = 0  # number of a recent descriptor: the kernel gives the lowest one that is free
        self._is_full = False
        self._lock = threading.Lock()
        self._files: Dict[int, OpenFile] = {}
        self._of_node: Dict[int, Dict[int, OpenFile]] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._files)

    def add(
        self, node: int, is_directory: bool, flags: int, backing: Backing, fd: int, credentials: Credentials, tid: int
    ) -> OpenFile:
        """A handle that owns ``fd`` from now on."""
        with self._lock:
            fh = self._next
            self._next += 1
            file = OpenFile(
                fh, node, is_directory, flags, backing.number, fd, credentials, tid, backing.is_staging
            )
            self._files[fh] = file
            self._newest = fd
            if node:
                self._of_node.setdefault(node, {})[fh] = file
            return file

    def check_room(self) -> None:
        """To be called before a file is opened or made. OSError ENFILE if open files would leave too few descriptors
        for what must go on: paths, the control socket, the change to another directory."""
        if self._newest < self._most:
            return
        self._newest = os.open("/", os.O_PATH | os.O_CLOEXEC)
        os.close(self._newest)
        is_full, self._is_full = self._is_full, self._newest >= self._most
        if self._is_full:
            if not is_full:
                _log.warning("%d files are open: no more can be (raise RLIMIT_NOFILE of the file system)", len(self))
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def created(self, file: OpenFile, node: int) -> None:
        """The node of a file that was opened before it had one."""
        with self._lock:
            file.node = node
            self._of_node.setdefault(node, {})[file.fh] = file

    def get(self, fh: int) -> OpenFile:
        """OSError EBADF if there is no such handle."""
        file = self._files.get(fh)
        if file is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return file

    def _of(self, node: int) -> Optional[OpenFile]:
        """Any open file of the node; one that can be written to, if there is one. To be called with the lock."""
        found = None
        for file in self._of_node.get(node, {}).values():
            found = file
            if file.flags & os.O_ACCMODE != os.O_RDONLY:
                break
        return found

    def is_open_for_both(self, node: int) -> bool:
        """Whether somebody has it open for reading and writing, as a shared mapping that is stored to needs it."""
        with self._lock:
            return any(
                file.flags & os.O_ACCMODE == os.O_RDWR for file in self._of_node.get(node, {}).values()
            )

    # Who is in the table has not been closed, and is not while the lock is held; later its number may be another fd's.

    def duplicate(self, node: int, generation: Optional[int] = None) -> Optional[int]:
        """An fd of an open file of the node, the caller's; of this generation, if one is given."""
        with self._lock:
            file = self._of(node)
            if file is None or generation is not None and file.generation != generation:
                return None
            return os.dup(file.fd)

    def pin(self, node: int) -> Optional[Tuple[int, int]]:
        """An O_PATH fd, the caller's, of what an open file of the node has open, and the number of its generation."""
        with self._lock:
            file = self._of(node)
            if file is None:
                return None
            return os.open(f"/proc/self/fd/{file.fd}", os.O_PATH | os.O_CLOEXEC), file.generation

    def use(self, fh: int, backing: Backing, identity: ThreadIdentity) -> OpenFile:
        """The handle, with its fd in ``backing``'s generation.

        A file whose name was removed stays in its own generation. OSError: ESTALE if the new generation has no such
        file, or what opening it gives its opener.
        """
        file = self.get(fh)
        if file.generation == backing.number:
            return file
        with file.lock:
            if file.generation == backing.number:
                return file
            path = self._nodes.path(file.node)
            if path is None:
                return file
            identity.assume(file.credentials)
            flags = allowed_flags(reopen_flags(file.flags))
            if file.is_directory:
                flags |= os.O_DIRECTORY
            try:
                fd = _open(backing, path, flags)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO):
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path) from error
                raise
            file.former.append(file.fd)
            if file.opposite >= 0:
                file.former.append(file.opposite)
                file.opposite = -1
            file.fd, file.position = fd, -1
            file.generation = backing.number  # last: who sees it without the lock goes on to use fd
            return file

    def release(self, fh: int) -> None:
        with self._lock:
            file = self._files.pop(fh, None)
            if file is not None and file.node:
                siblings = self._of_node.get(file.node)
                if siblings is not None:
                    siblings.pop(fh, None)
                    if not siblings:
                        del self._of_node[file.node]
        if file is not None:
            file.close()

    def snapshot(self) -> List[Tuple[OpenFile, Optional[bytes]]]:
        """Every open file, with its node's path (None: it has no name any more)."""
        with self._lock:
            files = list(self._files.values())
        return [(file, self._nodes.path(file.node)) for file in files]
