"""The requests about one object, by its handle or its path; what is about names is in ``entries``.

Methods raise OSError for the errno to answer with.
"""

from __future__ import annotations

import errno
import os
from typing import Callable, Tuple, TypeVar

from stubfs import ioctls, protocol, syscalls
from stubfs.backing import Backing, allowed_flags
from stubfs.handles import HandleTable
from stubfs.lanes import Worker
from stubfs.nodes import NodeTable
from stubfs.objects import Objects, as_far_as_may_be, backing_if_any, backing_of, fd_link
from stubfs.protocol import BODY, Opcode, SetattrValid
from stubfs.request import Request

_T = TypeVar("_T")
_BASIC_STATS = 0x7FF  # STATX_BASIC_STATS, linux/stat.h
_COPIED_AT_ONCE = 64 * 2**20  # bytes
# As plain ints: each "&" with an IntFlag costs a microsecond.
_MODE, _UID, _SIZE, _FH = (
    int(flag) for flag in (SetattrValid.MODE, SetattrValid.UID, SetattrValid.SIZE, SetattrValid.FH)
)
_GID, _ATIME, _MTIME = int(SetattrValid.GID), int(SetattrValid.ATIME), int(SetattrValid.MTIME)
_ATIME_NOW, _MTIME_NOW = int(SetattrValid.ATIME_NOW), int(SetattrValid.MTIME_NOW)
_HAS_TIMES, _HAS_OWNER = _ATIME | _MTIME, _UID | _GID
_ANY = _MODE | _HAS_OWNER | _SIZE | _HAS_TIMES
_CAPABILITY = b"security.capability"


class Answers:
    def __init__(self, nodes: NodeTable, handles: HandleTable, objects: Objects) -> None:
        self._nodes = nodes
        self._handles = handles
        self._objects = objects

    def _status(self, request: Request) -> os.stat_result:
        try:
            return self._even_if_removed(request, self._status_by_path, os.fstat)
        except PermissionError:
            return self._objects.by_fd(request, os.fstat)

    def _status_by_path(self, request: Request) -> os.stat_result:
        status = self._objects.by_path(request, Backing.stat)
        self._objects.check(request, status)
        return status

    def _even_if_removed(self, request: Request, look: Callable[[Request], _T], by_fd: Callable[[int], _T]) -> _T:
        """fstat(2) of an open file needs no name, nor does it matter if somebody else has removed it."""
        try:
            return look(request)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise
            return self._objects.by_own_fd(request.node, by_fd, error)

    def statx(self, worker: Worker, request: Request) -> None:
        """Asked by who wants to know of a birth time."""
        flags, _, fh, sync, mask = protocol.STATX_IN.unpack_from(request.buffer, BODY)

        def look(fd: int) -> bytes:
            return syscalls.statx(fd, b"", syscalls.AT_EMPTY_PATH | sync, mask | _BASIC_STATS)

        if flags & protocol.GETATTR_FH:
            found = look(self._objects.by_handle(worker, request, fh).fd)
        else:
            found = self._even_if_removed(request, lambda request: self._objects.by_fd(request, look), look)
        request.answer(protocol.statx_out(request.node, found))

    # --- by the object

    def statfs(self, worker: Worker, request: Request) -> None:
        request.answer(protocol.statfs_out(self._objects.by_fd(request, os.fstatvfs)))

    def access(self, worker: Worker, request: Request) -> None:
        (mask,) = protocol.U32.unpack_from(request.buffer, BODY)
        self._objects.by_fd(request, lambda fd: syscalls.faccessat2(fd, b"", mask, syscalls.AT_EMPTY_PATH))
        request.answer()

    def readlink(self, worker: Worker, request: Request) -> None:
        request.answer(self._objects.by_fd(request, lambda fd: os.readlink(b"", dir_fd=fd)))

    def setxattr(self, worker: Worker, request: Request) -> None:
        size, flags = protocol.SETXATTR_IN.unpack_from(request.buffer, BODY)
        name = request.name(BODY + protocol.SETXATTR_IN.size)
        start = BODY + protocol.SETXATTR_IN.size + len(name) + 1
        value = bytes(request.buffer[start : start + size])
        backing_of(request).may_have_xattrs = True
        self._objects.by_fd(request, lambda fd: os.setxattr(fd_link(fd), name, value, flags))
        # An ACL changes the mode, of which the kernel knows nothing (fuse_set_acl() in fs/fuse/acl.c).
        request.device.invalidate_attributes(request.node)
        request.answer()

    def removexattr(self, worker: Worker, request: Request) -> None:
        name = request.name()
        self._objects.by_fd(request, lambda fd: os.removexattr(fd_link(fd), name))
        request.device.invalidate_attributes(request.node)
        request.answer()

    def getxattr(self, worker: Worker, request: Request) -> None:
        size, _ = protocol.GETXATTR_IN.unpack_from(request.buffer, BODY)
        name = request.name(BODY + protocol.GETXATTR_IN.size)
        if name == _CAPABILITY and not backing_of(request).may_have_xattrs:
            request.fail(errno.ENODATA)  # asked before every truncation
            return
        self._answer_sized(request, size, self._objects.by_fd(request, lambda fd: os.getxattr(fd_link(fd), name)))

    def listxattr(self, worker: Worker, request: Request) -> None:
        size, _ = protocol.GETXATTR_IN.unpack_from(request.buffer, BODY)
        names = self._objects.by_fd(request, lambda fd: os.listxattr(fd_link(fd)))
        self._answer_sized(request, size, b"".join(os.fsencode(name) + b"\0" for name in names))

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
        request.device.send(protocol.attr_reply(request.unique, request.node, status))
        return status

    def setattr(self, worker: Worker, request: Request) -> None:
        (valid, _, fh, size, _, atime, mtime, _, atime_nsec, mtime_nsec, _, mode, _, uid, gid, _) = (
            protocol.SETATTR_IN.unpack_from(request.buffer, BODY)
        )

        def change(fd: int) -> os.stat_result:
            link = fd_link(fd)
            if valid & _MODE:
                os.chmod(link, mode & 0o7777)
            if not valid & _ANY:
                _take_set_id_bits(link)
            if valid & _HAS_OWNER:
                os.chown(link, uid if valid & _UID else -1, gid if valid & _GID else -1)
            if valid & _SIZE:
                if valid & _FH:
                    os.ftruncate(fd, size)
                else:
                    os.truncate(link, size)
            if valid & _HAS_TIMES:
                # By the link, not futimens: it also takes an O_PATH fd.
                syscalls.utimensat_following(
                    link.encode(),
                    _time(valid, _ATIME, _ATIME_NOW, atime, atime_nsec),
                    _time(valid, _MTIME, _MTIME_NOW, mtime, mtime_nsec),
                )
            return os.fstat(fd)

        if valid & _FH:
            caller = worker.identity.current
            file = self._objects.by_handle(worker, request, fh)
            worker.identity.assume(caller)  # again, where the file had to be opened anew in its opener's name
            status = as_far_as_may_be(change, file.fd)
        else:
            status = self._objects.by_fd(request, change)
        request.device.send(protocol.attr_reply(request.unique, request.node, status))

    def open(self, worker: Worker, request: Request) -> None:
        flags, _ = protocol.OPEN_IN.unpack_from(request.buffer, BODY)
        self._open(worker, request, flags, False)

    def opendir(self, worker: Worker, request: Request) -> None:
        self._open(worker, request, os.O_RDONLY | os.O_DIRECTORY, True)

    def _open(self, worker: Worker, request: Request, flags: int, is_directory: bool) -> None:
        backing = backing_of(request)
        allowed = allowed_flags(flags)
        self._handles.check_room()
        try:
            fd = self._objects.by_path(request, lambda backing, path: self._open_checked(request, path, allowed))
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.EACCES):
                raise
            fd = self._objects.by_fd(request, lambda own: os.open(fd_link(own), allowed))
        credentials = worker.identity.current
        file = self._handles.add(request.node, is_directory, flags, backing, fd, credentials, request.tid)
        if not request.answer(protocol.OPEN_OUT.pack(file.fh, self._objects.open_flags(request, file), 0)):
            self._handles.release(file.fh)

    def _open_checked(self, request: Request, path: bytes, flags: int) -> int:
        fd = backing_of(request).open(path, flags)
        try:
            self._objects.check(request, os.fstat(fd))
        except OSError:
            os.close(fd)
            raise
        return fd

    # --- by handle

    def read(self, worker: Worker, request: Request) -> None:
        fh, offset, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.buffer, BODY)
        file = self._objects.by_handle(worker, request, fh)
        self._has_pages(request.node)
        length = os.preadv(file.fd, [worker.output[: min(size, len(worker.output))]], offset)
        request.device.reply_data(request.unique, worker.output[:length])

    def write(self, worker: Worker, request: Request) -> None:
        fh, offset, size, write_flags, _, flags, _ = protocol.WRITE_IN.unpack_from(request.buffer, BODY)
        start = BODY + protocol.WRITE_IN.size
        data = memoryview(request.buffer)[start : start + size]
        file = self._objects.by_handle(worker, request, fh)
        self._has_pages(request.node)
        # In the caller's name: it decides whether the file keeps its set-id bits.
        worker.act_for(request)
        if flags & os.O_APPEND and not write_flags & protocol.WRITE_CACHE:
            written, at = file.append(data)
            request.answer(protocol.WRITE_OUT.pack(written, 0))
            if written and at != offset:
                # The file has grown by somebody else's doing, or it is another one by now: the kernel, which goes by
                # the size that it knows of, has put the data at that place into its cache. It has locked the pages
                # until now.
                request.device.invalidate(request.node, offset, written)
        else:
            request.answer(protocol.WRITE_OUT.pack(file.write_at(data, offset), 0))

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
        fd = self._objects.by_handle(worker, request, fh).fd
        worker.act_for(request)
        syscalls.fallocate(fd, mode, offset, length)
        request.answer()

    def copy_file_range(self, worker: Worker, request: Request) -> None:
        source, start, _, target, to, length, flags = protocol.COPY_FILE_RANGE_IN.unpack_from(request.buffer, BODY)
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        from_fd = self._objects.by_handle(worker, request, source).fd
        to_fd = self._objects.by_handle(worker, request, target).appending(False)
        worker.act_for(request)
        # Not all of it at once: nothing but the end of this call ends it.
        copied = os.copy_file_range(from_fd, to_fd, min(length, _COPIED_AT_ONCE), start, to)
        wide = request.opcode == Opcode.COPY_FILE_RANGE_64
        request.answer(protocol.U64.pack(copied) if wide else protocol.WRITE_OUT.pack(copied, 0))

    def lseek(self, worker: Worker, request: Request) -> None:
        """SEEK_DATA and SEEK_HOLE; the kernel answers the others itself."""
        fh, offset, whence, _ = protocol.LSEEK_IN.unpack_from(request.buffer, BODY)
        fd = self._objects.by_handle(worker, request, fh).fd
        found = _seek(fd, offset, whence)
        hole = (offset, found) if whence == os.SEEK_DATA else (found, os.fstat(fd).st_size)
        if hole[0] < hole[1] and self._may_be_dirty(request.node):
            # What has been stored there through a mapping may not have come to us: the kernel sends it when it drops
            # the pages, and another thread takes it.
            request.device.invalidate(request.node, hole[0], hole[1] - hole[0])
            found = _seek(fd, offset, whence)
        if whence == os.SEEK_DATA and found >= os.fstat(fd).st_size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        request.answer(protocol.U64.pack(found))

    def _may_be_dirty(self, number: int) -> bool:
        """Whether the kernel may have pages that differ from the file: of a mapping, which keeps its handle open."""
        node = self._nodes.get(number)
        return node is not None and node.has_pages and self._handles.is_open_for_both(number)

    def ioctl(self, worker: Worker, request: Request) -> None:
        fh, _, command, _, in_size, _ = protocol.IOCTL_IN.unpack_from(request.buffer, BODY)
        start = BODY + protocol.IOCTL_IN.size
        fd = self._objects.by_handle(worker, request, fh).fd
        worker.act_for(request)
        answer = ioctls.perform(fd, command, bytes(request.buffer[start : start + in_size]))
        # It may have changed the time of change, of which the kernel knows nothing, either.
        request.device.invalidate_attributes(request.node)
        request.answer(protocol.IOCTL_OUT.pack(0, 0, 0, 0) + answer)

    def readdir(self, worker: Worker, request: Request) -> None:
        fh, offset, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.buffer, BODY)
        file = self._objects.by_handle(worker, request, fh)
        pack = protocol.PACK_DIRENT
        entries = []
        with file.lock:
            if file.position != offset:
                os.lseek(file.fd, offset - (offset >> 63 << 64), os.SEEK_SET)
                file.position = offset
            data = syscalls.getdents64(file.fd, size)
            number_of = self._nodes.entry_numbers(request.node, file.generation, os.fstat(file.fd).st_dev)
            following = file.position
            for following, inode, kind, name in protocol.native_dirents(data):
                length = len(name)
                entry = pack[length](number_of(name, inode), following, length, kind, name)
                size -= len(entry)
                if size < 0:
                    # FUSE's entries are a little larger than the system's: the rest is read again next time.
                    following = -1
                    break
                entries.append(entry)
            file.position = following & 0xFFFFFFFFFFFFFFFF if following != -1 else -1
        request.answer(b"".join(entries))


def _seek(fd: int, offset: int, whence: int) -> int:
    """lseek(2); but where there is no more data, the end of the file. ENXIO only for an offset behind that."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        size = os.fstat(fd).st_size
        if error.errno != errno.ENXIO or offset >= size:
            raise
        return size


def _take_set_id_bits(link: str) -> None:
    """What a chown(2) to -1 and -1 does. The kernel also asks like that before somebody writes, who may be no owner:
    the write itself takes them then."""
    try:
        os.chown(link, -1, -1)
    except PermissionError:
        pass


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> Tuple[int, int]:
    if not valid & given:
        return 0, syscalls.UTIME_OMIT
    if valid & now:
        return 0, syscalls.UTIME_NOW
    return seconds - (seconds >> 63 << 64), nanoseconds
