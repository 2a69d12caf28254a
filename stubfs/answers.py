"""The requests that the loop answers itself: what carries a handle, and the frequent ones by path.

Faster than through libfuse, and right where libfuse 2 is not: files without a name, readdir offsets, exact times.
What allots or moves node numbers stays with libfuse. Methods raise OSError for the errno to answer with.
"""

from __future__ import annotations

import errno
import os
from typing import Callable, Optional, Tuple, TypeVar

from stubfs import protocol, syscalls
from stubfs.backing import Backing, allowed_flags, list_xattrs
from stubfs.handles import HandleTable, OpenFile
from stubfs.lanes import Worker
from stubfs.modes import State
from stubfs.nodes import NodeTable
from stubfs.protocol import BODY, Opcode, SetattrValid
from stubfs.request import Request

_T = TypeVar("_T")
_RETRIES = 5  # of an operation by path that a rename came across
_BY_FD = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ESTALE)
# As plain ints: each "&" with an IntFlag costs a microsecond.
_MODE, _UID, _SIZE, _FH = (
    int(flag) for flag in (SetattrValid.MODE, SetattrValid.UID, SetattrValid.SIZE, SetattrValid.FH)
)
_GID, _ATIME, _MTIME = int(SetattrValid.GID), int(SetattrValid.ATIME), int(SetattrValid.MTIME)
_ATIME_NOW, _MTIME_NOW = int(SetattrValid.ATIME_NOW), int(SetattrValid.MTIME_NOW)
_HAS_TIMES, _HAS_OWNER = _ATIME | _MTIME, _UID | _GID
_CAPABILITY = b"security.capability"
_FD_LINK = "/proc/self/fd/{}"


def _stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def backing_of(request: Request) -> Optional[Backing]:
    state: Optional[State] = request.state
    return state.backing if state is not None else None


class Answers:
    def __init__(self, nodes: NodeTable, handles: HandleTable) -> None:
        self._nodes = nodes
        self._handles = handles

    # --- finding the object

    def _use(self, worker: Worker, request: Request, fh: int) -> OpenFile:
        backing = backing_of(request)
        if backing is None:
            return self._handles.get(fh)
        return self._handles.use(fh, backing, worker.identity)

    def _by_path(self, request: Request, action: Callable[[Backing, bytes], _T], name: bytes = b"") -> _T:
        """``action`` on the path of the node, or of ``name`` in it; again if a rename took it away meanwhile.

        ESTALE: it has no path.
        """
        backing = backing_of(request)
        if backing is None:
            raise _stale()
        for _ in range(_RETRIES):
            renames = self._nodes.renames
            path = self._nodes.child_path(request.node, name) if name else self._nodes.path(request.node)
            if path is None:
                break
            try:
                return action(backing, path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR) or renames == self._nodes.renames:
                    raise
        raise _stale()

    def _own_fd(self, node: int) -> Optional[int]:
        """An fd that we have of the node anyway: of an open file, or what was kept of a removed name."""
        file = self._handles.of_node(node)
        if file is not None:
            return file.fd
        known = self._nodes.get(node)
        return known.orphan.fd if known is not None and known.orphan is not None else None

    def is_nameless(self, node: int) -> bool:
        """Whether libfuse would have no path for the node."""
        return self._nodes.path(node) is None

    def _status(self, request: Request) -> os.stat_result:
        try:
            return self._by_path(request, Backing.stat)
        except OSError as error:
            # fstat(2) of an open file needs no name and no right to the way there.
            fd = self._own_fd(request.node) if error.errno in _BY_FD else None
            if fd is None:
                raise
            return os.fstat(fd)

    def nameless(self, worker: Worker, request: Request) -> None:
        """What libfuse has no path for, by the fd that is left of the object. ESTALE without one."""
        fd = self._own_fd(request.node)
        if fd is None:
            raise _stale()
        link = _FD_LINK.format(fd)
        opcode = request.opcode
        if opcode == Opcode.STATFS:
            status = os.fstatvfs(fd)
            request.answer(protocol.statfs_out(status))
        elif opcode == Opcode.ACCESS:
            (mask,) = protocol.U32.unpack_from(request.buffer, BODY)
            syscalls.faccessat2(fd, b"", mask, syscalls.AT_EMPTY_PATH)
            request.answer()
        elif opcode == Opcode.SETXATTR:
            size, flags = protocol.SETXATTR_IN.unpack_from(request.buffer, BODY)
            name = request.name(BODY + protocol.SETXATTR_IN.size)
            start = BODY + protocol.SETXATTR_IN.size + len(name) + 1
            backing = backing_of(request)
            if backing is not None:
                backing.may_have_capabilities = True
            os.setxattr(link, name, bytes(request.buffer[start : start + size]), flags)
            request.answer()
        elif opcode == Opcode.REMOVEXATTR:
            os.removexattr(link, request.name())
            request.answer()
        elif opcode == Opcode.READLINK:
            request.answer(os.readlink(b"", dir_fd=fd))
        else:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def getxattr(self, worker: Worker, request: Request) -> None:
        """GETXATTR and LISTXATTR: asked before the first write to every file, so not by way of libfuse."""
        size, _ = protocol.GETXATTR_IN.unpack_from(request.buffer, BODY)
        listing = request.opcode == Opcode.LISTXATTR
        name = b"" if listing else request.name(BODY + protocol.GETXATTR_IN.size)
        backing = backing_of(request)
        if name == _CAPABILITY and backing is not None and not backing.may_have_capabilities:
            request.fail(errno.ENODATA)  # asked before every truncation
            return
        fd = self._fd_now(request)
        if fd is not None:
            # By the link, not the fd alone: that may be an O_PATH one.
            value = list_xattrs(_FD_LINK.format(fd)) if listing else os.getxattr(_FD_LINK.format(fd), name)
        elif listing:
            value = self._by_path(request, Backing.listxattr)
        else:
            value = self._by_path(request, lambda backing, path: backing.getxattr(path, name))
        self._answer_sized(request, size, value)

    def _fd_now(self, request: Request) -> Optional[int]:
        """An fd of the node in the generation that the request is served from, or the one that a nameless node has."""
        if self.is_nameless(request.node):
            fd = self._own_fd(request.node)
            if fd is None:
                raise _stale()
            return fd
        file, backing = self._handles.of_node(request.node), backing_of(request)
        return file.fd if file is not None and backing is not None and file.generation == backing.number else None

    @staticmethod
    def _answer_sized(request: Request, size: int, value: bytes) -> None:
        """As getxattr(2) and listxattr(2): a size of 0 asks for the length."""
        if not size:
            request.answer(protocol.GETXATTR_OUT.pack(len(value), 0))
        elif len(value) > size:
            request.fail(errno.ERANGE)
        else:
            request.answer(value)

    # --- by path or by handle

    def lookup(self, worker: Worker, request: Request) -> Optional[os.stat_result]:
        """None: answered. Else the attributes of what has no number yet: libfuse must allot one.

        Without an entry cache most lookups are of what is known.
        """
        name = request.name()
        status = self._by_path(request, Backing.stat, name)
        node = self._nodes.look_up(request.node, name, status.st_mode)
        if node is None:
            return status
        if not request.answer(protocol.entry_out(node.number, node.generation, status)):
            self._nodes.take_back(node.number, from_library=False)
        return None

    def create(self, worker: Worker, request: Request) -> Tuple[OpenFile, os.stat_result]:
        """Open a new file, which has no node yet; the caller gives it one and answers."""
        flags, mode, _, _ = protocol.CREATE_IN.unpack_from(request.buffer, BODY)
        name = request.name(BODY + protocol.CREATE_IN.size)
        fd = self._by_path(request, lambda backing, path: backing.create(path, flags, mode), name)
        backing = backing_of(request)
        assert backing is not None
        try:
            status = os.fstat(fd)
            credentials = worker.identity.of(request.uid, request.gid, request.tid)
        except BaseException:
            os.close(fd)
            raise
        return self._handles.add(0, False, flags, backing, fd, credentials, request.tid), status

    def getattr(self, worker: Worker, request: Request) -> os.stat_result:
        """Answers; returns what it answered."""
        flags, _, fh = protocol.GETATTR_IN.unpack_from(request.buffer, BODY)
        if flags & protocol.GETATTR_FH:
            status = os.fstat(self._use(worker, request, fh).fd)
        else:
            status = self._status(request)
        request.answer(protocol.attr_out(request.node, status))
        return status

    def setattr(self, worker: Worker, request: Request) -> None:
        (valid, _, fh, size, _, atime, mtime, _, atime_nsec, mtime_nsec, _, mode, _, uid, gid, _) = (
            protocol.SETATTR_IN.unpack_from(request.buffer, BODY)
        )
        fd: Optional[int] = None
        if valid & _FH:
            fd = self._use(worker, request, fh).fd
            worker.identity.assume(worker.identity.of(request.uid, request.gid, request.tid))
        elif self.is_nameless(request.node):
            fd = self._own_fd(request.node)
            if fd is None:
                raise _stale()
        if valid & _MODE:
            if fd is None:
                self._by_path(request, lambda backing, path: backing.chmod(path, mode & 0o7777))
            else:
                os.chmod(_FD_LINK.format(fd), mode & 0o7777)
        if valid & _HAS_OWNER:
            owner = uid if valid & _UID else -1
            group = gid if valid & _GID else -1
            if fd is None:
                self._by_path(request, lambda backing, path: backing.chown(path, owner, group))
            else:
                os.chown(_FD_LINK.format(fd), owner, group)
        if valid & _SIZE:
            if fd is None:
                self._by_path(request, lambda backing, path: backing.truncate(path, size))
            elif valid & _FH:
                os.ftruncate(fd, size)
            else:
                os.truncate(_FD_LINK.format(fd), size)
        if valid & _HAS_TIMES:
            times = (
                _time(valid, _ATIME, _ATIME_NOW, atime, atime_nsec),
                _time(valid, _MTIME, _MTIME_NOW, mtime, mtime_nsec),
            )
            if fd is None:
                self._by_path(request, lambda backing, path: backing.utimens(path, *times))
            else:
                # By the link, not futimens: it also takes an O_PATH fd.
                syscalls.utimensat_following(_FD_LINK.format(fd).encode(), *times)
        status = os.fstat(fd) if fd is not None else self._status(request)
        request.answer(protocol.attr_out(request.node, status))

    def open(self, worker: Worker, request: Request) -> None:
        flags, _ = protocol.OPEN_IN.unpack_from(request.buffer, BODY)
        self._open(worker, request, flags, False)

    def opendir(self, worker: Worker, request: Request) -> None:
        self._open(worker, request, os.O_RDONLY | os.O_DIRECTORY, True)

    def _open(self, worker: Worker, request: Request, flags: int, is_directory: bool) -> None:
        backing = backing_of(request)
        if backing is None:
            raise _stale()
        try:
            fd = self._by_path(request, lambda backing, path: backing.open(path, flags))
        except OSError as error:
            own = self._own_fd(request.node) if error.errno == errno.ESTALE else None
            if own is None:
                raise
            fd = os.open(_FD_LINK.format(own), allowed_flags(flags))
        credentials = worker.identity.of(request.uid, request.gid, request.tid)
        file = self._handles.add(request.node, is_directory, flags, backing, fd, credentials, request.tid)
        if not request.answer(protocol.OPEN_OUT.pack(file.fh, file.open_flags(), 0)):
            self._handles.release(file.fh)

    # --- by handle

    def read(self, worker: Worker, request: Request) -> None:
        fh, offset, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.buffer, BODY)
        file = self._use(worker, request, fh)
        self._has_pages(request.node)
        length = os.preadv(file.fd, [worker.output[: min(size, len(worker.output))]], offset)
        request.device.reply_data(request.unique, worker.output[:length])

    def write(self, worker: Worker, request: Request) -> None:
        fh, offset, size, flags, _, _, _ = protocol.WRITE_IN.unpack_from(request.buffer, BODY)
        start = BODY + protocol.WRITE_IN.size
        data = memoryview(request.buffer)[start : start + size]
        file = self._use(worker, request, fh)
        self._has_pages(request.node)
        fd = file.fd
        if flags & protocol.WRITE_CACHE:
            fd = file.without_append()
        elif flags & protocol.WRITE_KILL_SUIDGID:
            # The caller may not keep set-id bits; written in its name, the file loses them as on any file system.
            worker.identity.assume(worker.identity.of(request.uid, request.gid, request.tid))
        written = os.pwrite(fd, data, offset)
        request.answer(protocol.WRITE_OUT.pack(written, 0))

    def _has_pages(self, number: int) -> None:
        node = self._nodes.get(number)
        if node is not None:
            node.has_pages = True

    def flush(self, worker: Worker, request: Request) -> None:
        """Report what close(2) of the backing file would: a server's errors of writing back."""
        (fh,) = protocol.U64.unpack_from(request.buffer, BODY)
        backing = backing_of(request)
        if backing is not None and not backing.is_staging:
            file = self._handles.get(fh)
            if file.generation == backing.number and file.flags & os.O_ACCMODE != os.O_RDONLY:
                os.close(os.dup(file.fd))
        request.answer()

    def release(self, worker: Worker, request: Request) -> None:
        (fh,) = protocol.U64.unpack_from(request.buffer, BODY)
        self._handles.release(fh)
        request.answer()

    def fsync(self, worker: Worker, request: Request) -> None:
        fh, flags, _ = protocol.FSYNC_IN.unpack_from(request.buffer, BODY)
        fd = self._use(worker, request, fh).fd
        if flags & protocol.FSYNC_FDATASYNC:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        request.answer()

    def fallocate(self, worker: Worker, request: Request) -> None:
        fh, offset, length, mode, _ = protocol.FALLOCATE_IN.unpack_from(request.buffer, BODY)
        syscalls.fallocate(self._use(worker, request, fh).fd, mode, offset, length)
        request.answer()

    def lseek(self, worker: Worker, request: Request) -> None:
        fh, offset, whence, _ = protocol.LSEEK_IN.unpack_from(request.buffer, BODY)
        request.answer(protocol.U64.pack(os.lseek(self._use(worker, request, fh).fd, offset, whence)))

    def readdir(self, worker: Worker, request: Request) -> None:
        fh, offset, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.buffer, BODY)
        file = self._use(worker, request, fh)
        entries = []
        with file.lock:
            if file.position != offset:
                os.lseek(file.fd, offset - (offset >> 63 << 64), os.SEEK_SET)
                file.position = offset
            data = syscalls.getdents64(file.fd, size)
            following = file.position
            for following, entry in self._dirents(request.node, data):
                if size < len(entry):
                    # FUSE's entries are a little larger than the system's: the rest is read again next time.
                    following = -1
                    break
                size -= len(entry)
                entries.append(entry)
            file.position = following & 0xFFFFFFFFFFFFFFFF if following != -1 else -1
        request.answer(b"".join(entries))

    def _dirents(self, parent: int, data: bytes) -> "list[Tuple[int, bytes]]":
        entries = []
        for offset, kind, name in protocol.native_dirents(data, len(data)):
            known = self._nodes.child(parent, name)
            number = known.number if known is not None else protocol.UNKNOWN_INO
            entries.append((offset, protocol.dirent(number, offset, kind, name)))
        return entries


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> Tuple[int, int]:
    if not valid & given:
        return 0, syscalls.UTIME_OMIT
    if valid & now:
        return 0, syscalls.UTIME_NOW
    return seconds - (seconds >> 63 << 64), nanoseconds
