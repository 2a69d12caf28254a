"""libfuse 2 and fusepy without libfuse's own loop: they negotiate with the kernel.

fusepy's FUSE object is used as it is; only ``fuse_main_real``, which would mount and loop, is replaced by taking its
operations over. Replies go through a channel whose ``send`` is ours. Every other request is answered by the loop.
The only module that knows libfuse; besides ``syscalls`` the only one with ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from typing import Any

from stubfs.errors import MissingFeatureError, reason
from stubfs.protocol import BUFFER_SIZE

_log = logging.getLogger(__name__)
SONAME = "libfuse.so.2"
_WHICH_LIBRARY = "is the library that was found libfuse 2, version 2.9? and is there memory?"

_RECEIVE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_SEND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
# struct iovec[], at most three of them, as (base, length, base, length, ...): quicker than structures.
_VECTORS = [ctypes.c_size_t * (2 * count) for count in range(4)]
_DESTROY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _ChannelOperations(ctypes.Structure):
    _fields_ = [("receive", _RECEIVE), ("send", _SEND), ("destroy", _DESTROY)]


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("argc", ctypes.c_int),
        ("argv", ctypes.POINTER(ctypes.c_char_p)),
        ("allocated", ctypes.c_int),
    ]


def load() -> Any:
    """The fusepy module with its library loaded. MissingFeatureError says what to install."""
    if "FUSE_LIBRARY_PATH" not in os.environ:
        try:
            ctypes.CDLL(SONAME)
            # Else fusepy looks for the library with ldconfig and the compiler, which takes longer than all the rest.
            os.environ["FUSE_LIBRARY_PATH"] = SONAME
        except OSError as error:
            raise MissingFeatureError(
                f"cannot load libfuse: {SONAME}: {reason(error)}", "install libfuse 2: apt install libfuse2"
            ) from error
    try:
        import fuse
    except ImportError as error:
        raise MissingFeatureError(
            f"cannot import fusepy: {reason(error)}", "pip install fusepy"
        ) from error
    except OSError as error:  # fusepy: no library found; ctypes: FUSE_LIBRARY_PATH names none
        raise MissingFeatureError(
            f"cannot load libfuse: {os.environ.get('FUSE_LIBRARY_PATH', SONAME)}: {reason(error)}",
            "install libfuse 2: apt install libfuse2; unset FUSE_LIBRARY_PATH",
        ) from error
    return fuse


class _Operations:
    """What fusepy wants to have. Not its own class of this name, whose defaults claim success for what is not there."""

    use_ns = True

    def __call__(self, operation: str, path: str) -> None:
        """``init``, in the answer to INIT, and ``destroy``; nothing else gets here."""

    def init(self, path: str) -> None:
        """There for fusepy to find."""


class Session:
    """One libfuse instance on a /dev/fuse fd that it neither reads, writes nor closes."""

    OPTIONS = {"atomic_o_trunc": True, "big_writes": True}

    def __init__(self, device_fd: int) -> None:
        module = load()
        library = ctypes.CDLL(module._libfuse._name)
        self._reply = b""
        # The channel's callbacks must live as long as libfuse may call them.
        self._send_callback = _SEND(self._send)
        self._channel_operations = _ChannelOperations(
            _RECEIVE(lambda channel, buffer, size: -1), self._send_callback, _DESTROY(lambda channel: None)
        )
        channel_new = _versioned(library, "fuse_chan_new", "FUSE_2.6")
        channel_new.restype = ctypes.c_void_p
        channel_new.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p]
        self._channel = channel_new(ctypes.byref(self._channel_operations), device_fd, BUFFER_SIZE, None)
        if not self._channel:
            raise MissingFeatureError("cannot set up libfuse: fuse_chan_new failed", _WHICH_LIBRARY)
        self._new = _versioned(library, "fuse_new", "FUSE_2.6")
        self._new.restype = ctypes.c_void_p
        self._new.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
        ]  # fmt: skip
        library.fuse_get_session.restype = ctypes.c_void_p
        library.fuse_get_session.argtypes = [ctypes.c_void_p]
        self._process: Any = library.fuse_session_process
        self._process.restype = None
        self._process.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
        self._session: Any = None
        self._fuse: Any = None
        self._kept: Any = None

        operations = _Operations()
        genuine = module._libfuse.fuse_main_real
        module._libfuse.fuse_main_real = self._take_over
        try:
            self._bridge = module.FUSE(operations, "/", fsname=False, **self.OPTIONS)
        finally:
            module._libfuse.fuse_main_real = genuine
        if not self._fuse:
            raise MissingFeatureError("cannot set up libfuse: fuse_new failed", _WHICH_LIBRARY)
        # FUSE() believes that the file system has ended when fuse_main_real returns, and drops them.
        self._bridge.operations = operations
        self._session = library.fuse_get_session(self._fuse)

    def _take_over(self, argc: int, argv: Any, operations: Any, size: int, user_data: None) -> int:
        arguments = _Arguments(argc - 1, ctypes.cast(argv, ctypes.POINTER(ctypes.c_char_p)), 0)
        self._kept = operations  # libfuse copies the table, but not what keeps its callbacks alive
        self._fuse = self._new(self._channel, ctypes.byref(arguments), operations, size, None)
        return 0  # for anything else FUSE() has no more than an exception with that number

    def process(self, request: bytes) -> bytes:
        """libfuse's reply to INIT, which nobody but the caller gets; b"" for none. For one thread at a time."""
        self._reply = b""
        self._process(self._session, request, len(request), self._channel)
        return self._reply

    def _send(self, channel: int, vectors: int, count: int) -> int:
        try:
            raw = _VECTORS[count].from_address(vectors)
            reply = ctypes.string_at(raw[0], raw[1])
            for i in range(2, 2 * count, 2):
                reply += ctypes.string_at(raw[i], raw[i + 1])
            self._reply = reply
            return 0
        except Exception:  # it would be printed by ctypes, and libfuse told that the reply was sent
            _log.exception("cannot take a reply of libfuse")
            return -errno.EIO


_dlvsym = ctypes.CDLL(None).dlvsym
_dlvsym.restype = ctypes.c_void_p
_dlvsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]


def _versioned(library: ctypes.CDLL, name: str, version: str) -> Any:
    """Of a function that libfuse has in several versions, this one: dlsym may find the oldest."""
    address = _dlvsym(library._handle, name.encode(), version.encode())
    if not address:
        raise MissingFeatureError(f"cannot set up libfuse: {name}@{version} is missing", _WHICH_LIBRARY)
    # A prototype without types, which the caller sets: a new object each time.
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)
