"""One request as it was read from /dev/fuse, and the device that takes its reply."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Optional, Tuple, Union

from stubfs.protocol import BODY, HEADER_FIELDS, INVAL_INODE_OUT, NOTIFY_INVAL_INODE, OUT_HEADER, text_at

if TYPE_CHECKING:
    from stubfs.credentials import Credentials
    from stubfs.held import Wait
    from stubfs.modes import State

_log = logging.getLogger(__name__)


class Device:
    """The /dev/fuse fd of one mount; the session's owner closes it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def reply(self, unique: int, error: int, payload: bytes = b"") -> bool:
        """Answer with ``payload``, or with an errno. False: nobody waits for the answer any more."""
        return self.send(OUT_HEADER.pack(OUT_HEADER.size + len(payload), -error, unique) + payload)

    def send(self, reply: bytes) -> bool:
        """As reply(), with the header in front."""
        try:
            os.write(self.fd, reply)
        except OSError as failure:
            return self._lost(OUT_HEADER.unpack_from(reply)[2], failure)
        return True

    def reply_data(self, unique: int, data: memoryview) -> bool:
        """reply() for large payloads: without another copy."""
        try:
            os.writev(self.fd, [OUT_HEADER.pack(OUT_HEADER.size + len(data), 0, unique), data])
        except OSError as failure:
            return self._lost(unique, failure)
        return True

    @staticmethod
    def _lost(unique: int, failure: OSError) -> bool:
        # ENOENT: the request was ended meanwhile (interrupted, aborted); ENODEV: the mount is gone.
        if failure.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
            _log.error("the kernel refused the answer to request %d: %s", unique, failure)
        return False

    def invalidate(self, node: int, offset: int = 0, length: int = 0) -> None:
        """Drop the kernel's cached attributes and pages of ``node``; a length of 0 means to the end.

        Dirty pages are written back first, through requests that another thread must serve, and pages that
        a request under way has locked are waited for.
        """
        self._notify(NOTIFY_INVAL_INODE, INVAL_INODE_OUT.pack(node, offset, length))

    def _notify(self, code: int, body: bytes) -> None:
        """As in fuse_notify() of fs/fuse/dev.c; no inode of that number is no error."""
        try:
            os.write(self.fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), code, 0) + body)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                raise

    def invalidate_attributes(self, node: int) -> None:
        """Make the kernel ask for them again. Waits for nobody: also while a request on the node is being served."""
        self.invalidate(node, -1)


class Request:
    """The header's fields, the bytes, and under which state it is being served.

    A worker uses one object over and over for what it reads; what is held is a copy.
    """

    __slots__ = (
        "device", "opcode", "unique", "node", "uid", "gid", "tid", "buffer", "length", "state", "wait", "credentials",
    )  # fmt: skip

    def __init__(self, device: Device, buffer: Union[bytes, memoryview]) -> None:
        self.device = device
        self.buffer = buffer
        self.length = 0
        self.opcode = self.unique = self.node = self.uid = self.gid = self.tid = 0
        self.state: Optional["State"] = None
        # Of a copy that is, or was, held:
        self.wait: Optional["Wait"] = None
        self.credentials: Optional["Credentials"] = None  # the caller's, which cannot change while it waits

    def parse(self, length: int) -> None:
        """Take the header over from the buffer, of which ``length`` bytes are valid."""
        self.length = length
        self.opcode, self.unique, self.node, self.uid, self.gid, self.tid = HEADER_FIELDS.unpack_from(self.buffer)

    def copy(self) -> "Request":
        """A request that lives on when the worker's buffer takes the next one; as small as possible."""
        data = bytes(self.buffer[: self.length])
        kept = Request(self.device, data)
        kept.parse(self.length)
        return kept

    def name(self, offset: int = BODY) -> bytes:
        """The NUL-terminated name at ``offset`` of the request."""
        return text_at(self.buffer, offset, self.length)

    def names(self, offset: int = BODY) -> Tuple[bytes, bytes]:
        """The two NUL-terminated strings from ``offset`` on: two names, or a name and a link's target."""
        first, second, _ = bytes(self.buffer[offset : self.length]).split(b"\0", 2)
        return first, second

    def answer(self, payload: bytes = b"") -> bool:
        return self.device.reply(self.unique, 0, payload)

    def fail(self, number: int) -> bool:
        return self.device.reply(self.unique, number)
