"""The requests about one object, by its handle or its path; what is about names is in ``entries``.

None of them goes through libfuse, which has no path for files without a name, drops readdir offsets and knows no
fallocate and lseek. Methods raise OSError for the errno to answer with.
"""

from __future__ import annotations

import errno
import os
from typing import Optional, Tuple

from stubfs import protocol, syscalls
from stubfs.backing import Backing, allowed_flags, list_xattrs
from stubfs.handles import HandleTable, OpenFile
from stubfs.lanes import Worker
from stubfs.nodes import NodeTable
from stubfs.objects import Objects, backing_if_any, backing_of
from stubfs.protocol import BODY, Opcode, SetattrValid
from stubfs.request import Request

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


class Answers:
    def __init__(self, nodes: NodeTable, handles: HandleTable, objects: Objects) -> None:
        self._nodes = nodes
        self._handles = handles
        self._objects = objects

    def _status(self, request: Request) -> os.stat_result:
        try:
            return self._objects.by_path(request, Backing.stat)
        except OSError as error:
            # fstat(2) of an open file needs no name and no right to the way there.
            fd = self._objects.own_fd(request.node) if error.errno in _BY_FD else None
            if fd is None:
                raise
            return os.fstat(fd)

    def statfs(self, worker: Worker, request: Request) -> None:
        fd = self._objects.own_fd(request.node)
        status = os.fstatvfs(fd) if fd is not None else self._objects.by_path(request, Backing.statvfs)
        request.answer(protocol.statfs_out(status))

    def access(self, worker: Worker, request: Request) -> None:
        (mask,) = protocol.U32.unpack_from(request.buffer, BODY)
        fd = self._objects.nameless_fd(request.node)
        if fd is not None:
            syscalls.faccessat2(fd, b"", mask, syscalls.AT_EMPTY_PATH)
        else:
            self._objects.by_path(request, lambda backing, path: backing.access(path, mask))
        request.answer()

    def readlink(self, worker: Worker, request: Request) -> None:
        fd = self._objects.nameless_fd(request.node)
        if fd is not None:
            request.answer(os.readlink(b"", dir_fd=fd))
        else:
            request.answer(self._objects.by_path(request, Backing.readlink))

    def setxattr(self, worker: Worker, request: Request) -> None:
        size, flags = protocol.SETXATTR_IN.unpack_from(request.buffer, BODY)
        name = request.name(BODY + protocol.SETXATTR_IN.size)
        start = BODY + protocol.SETXATTR_IN.size + len(name) + 1
        value = bytes(request.buffer[start : start + size])
        fd = self._objects.nameless_fd(request.node)
        backing_of(request).may_have_capabilities = True
        if fd is not None:
            os.setxattr(_FD_LINK.format(fd), name, value, flags)
        else:
            self._objects.by_path(request, lambda backing, path: backing.setxattr(path, name, value, flags))
        request.answer()

    def removexattr(self, worker: Worker, request: Request) -> None:
        name = request.name()
        fd = self._objects.nameless_fd(request.node)
        if fd is not None:
            os.removexattr(_FD_LINK.format(fd), name)
        else:
            self._objects.by_path(request, lambda backing, path: backing.removexattr(path, name))
        request.answer()

    def getxattr(self, worker: Worker, request: Request) -> None:
        """GETXATTR and LISTXATTR: asked before the first write to every file, so not by way of libfuse."""
        size, _ = protocol.GETXATTR_IN.unpack_from(request.buffer, BODY)
        listing = request.opcode == Opcode.LISTXATTR
        name = b"" if listing else request.name(BODY + protocol.GETXATTR_IN.size)
        backing = backing_of(request)
        if name == _CAPABILITY and not backing.may_have_capabilities:
            request.fail(errno.ENODATA)  # asked before every truncation
            return
        fd = self._fd_now(request)
        if fd is not None:
            # By the link, not the fd alone: that may be an O_PATH one.
            value = list_xattrs(_FD_LINK.format(fd)) if listing else os.getxattr(_FD_LINK.format(fd), name)
        elif listing:
            value = self._objects.by_path(request, Backing.listxattr)
        else:
            value = self._objects.by_path(request, lambda backing, path: backing.getxattr(path, name))
        self._answer_sized(request, size, value)

    def _fd_now(self, request: Request) -> Optional[int]:
        """An fd of the node in the generation that the request is served from, or the one that a nameless node has."""
        fd = self._objects.nameless_fd(request.node)
        if fd is not None:
            return fd
        file = self._handles.of_node(request.node)
        return file.fd if file is not None and file.generation == backing_of(request).number else None

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

    def getattr(self, worker: Worker, request: Request) -> os.stat_result:
        """Answers; returns what it answered."""
        flags, _, fh = protocol.GETATTR_IN.unpack_from(request.buffer, BODY)
        if flags & protocol.GETATTR_FH:
            status = os.fstat(self._objects.by_handle(worker, request, fh).fd)
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
            fd = self._objects.by_handle(worker, request, fh).fd
            worker.identity.assume(worker.identity.of(request.uid, request.gid, request.tid))
        else:
            fd = self._objects.nameless_fd(request.node)
        if valid & _MODE:
            if fd is None:
                self._objects.by_path(request, lambda backing, path: backing.chmod(path, mode & 0o7777))
            else:
                os.chmod(_FD_LINK.format(fd), mode & 0o7777)
        if valid & _HAS_OWNER:
            owner = uid if valid & _UID else -1
            group = gid if valid & _GID else -1
            if fd is None:
                self._objects.by_path(request, lambda backing, path: backing.chown(path, owner, group))
            else:
                os.chown(_FD_LINK.format(fd), owner, group)
        if valid & _SIZE:
            if fd is None:
                self._objects.by_path(request, lambda backing, path: backing.truncate(path, size))
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
                self._objects.by_path(request, lambda backing, path: backing.utimens(path, *times))
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
        try:
            fd = self._objects.by_path(request, lambda backing, path: backing.open(path, flags))
        except OSError as error:
            own = self._objects.own_fd(request.node) if error.errno == errno.ESTALE else None
            if own is None:
                raise
            fd = os.open(_FD_LINK.format(own), allowed_flags(flags))
        credentials = worker.identity.of(request.uid, request.gid, request.tid)
        file = self._handles.add(request.node, is_directory, flags, backing, fd, credentials, request.tid)
        if not request.answer(protocol.OPEN_OUT.pack(file.fh, self._objects.open_flags(request, file), 0)):
            self._handles.release(file.fh)

    # --- by handle

    def read(self, worker: Worker, request: Request) -> None:
        fh, offset, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.buffer, BODY)
        file = self._objects.by_handle(worker, request, fh)
        self._has_pages(request.node)
        length = os.preadv(file.fd, [worker.output[: min(size, len(worker.output))]], offset)
        request.device.reply_data(request.unique, worker.output[:length])

    def write(self, worker: Worker, request: Request) -> None:
        fh, offset, size, flags, _, _, _ = protocol.WRITE_IN.unpack_from(request.buffer, BODY)
        start = BODY + protocol.WRITE_IN.size
        data = memoryview(request.buffer)[start : start + size]
        file = self._objects.by_handle(worker, request, fh)
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
        backing = backing_if_any(request)
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
        fd = self._objects.by_handle(worker, request, fh).fd
        if flags & protocol.FSYNC_FDATASYNC:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        request.answer()

    def fallocate(self, worker: Worker, request: Request) -> None:
        fh, offset, length, mode, _ = protocol.FALLOCATE_IN.unpack_from(request.buffer, BODY)
        syscalls.fallocate(self._objects.by_handle(worker, request, fh).fd, mode, offset, length)
        request.answer()

    def lseek(self, worker: Worker, request: Request) -> None:
        fh, offset, whence, _ = protocol.LSEEK_IN.unpack_from(request.buffer, BODY)
        request.answer(protocol.U64.pack(os.lseek(self._objects.by_handle(worker, request, fh).fd, offset, whence)))

    def readdir(self, worker: Worker, request: Request) -> None:
        fh, offset, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.buffer, BODY)
        file = self._objects.by_handle(worker, request, fh)
        entries = []
        with file.lock:
            if file.position != offset:
                os.lseek(file.fd, offset - (offset >> 63 << 64), os.SEEK_SET)
                file.position = offset
            data = syscalls.getdents64(file.fd, size)
            following = file.position
            for following, entry in self._dirents(request.node, file, data):
                if size < len(entry):
                    # FUSE's entries are a little larger than the system's: the rest is read again next time.
                    following = -1
                    break
                size -= len(entry)
                entries.append(entry)
            file.position = following & 0xFFFFFFFFFFFFFFFF if following != -1 else -1
        request.answer(b"".join(entries))

    def _dirents(self, parent: int, directory: OpenFile, data: bytes) -> "list[Tuple[int, bytes]]":
        entries = []
        device = os.fstat(directory.fd).st_dev
        for offset, inode, kind, name in protocol.native_dirents(data, len(data)):
            number = self._entry_number(parent, name)
            if number is None:
                number = self._nodes.entry_number(directory.generation, device, inode)
            entries.append((offset, protocol.dirent(number, offset, kind, name)))
        return entries

    def _entry_number(self, parent: int, name: bytes) -> Optional[int]:
        if name == b".":
            return parent
        if name == b"..":
            node = self._nodes.get(parent)
            return node.names[0][0].number if node is not None and node.names else parent
        known = self._nodes.child(parent, name)
        return known.number if known is not None else None


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> Tuple[int, int]:
    if not valid & given:
        return 0, syscalls.UTIME_OMIT
    if valid & now:
        return 0, syscalls.UTIME_NOW
    return seconds - (seconds >> 63 << 64), nanoseconds
