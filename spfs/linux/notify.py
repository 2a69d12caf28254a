"""inotify(7), fanotify(7), epoll(7): the watches of somebody else's instance, as far as they are changed by a copy."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import functools
import os
import termios

from spfs.linux.machine import EPOLL_EVENT
from stubfs.libc import bind

FAN_MARK_ADD = 0x1
FAN_MARK_MOUNT = 0x10
FAN_MARK_IGNORED_MASK = 0x20
FAN_MARK_FILESYSTEM = 0x100
EVENT_SIZE = 16  # bytes of struct inotify_event without a name

_SETNEXTWD = 0x40044900  # INOTIFY_IOC_SETNEXTWD, since Linux 4.17, with CONFIG_CHECKPOINT_RESTORE

_inotify_init = bind("inotify_init1", ctypes.c_int)
_add_watch = bind("inotify_add_watch", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_rm_watch = bind("inotify_rm_watch", ctypes.c_int, ctypes.c_int)
_fanotify_mark = bind(
    "fanotify_mark", ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p
)
_epoll_ctl = bind("epoll_ctl", ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p)
_EPOLL_ADD, _EPOLL_DEL = 1, 2


def register(instance: int, number: int, events: int, data: int) -> None:
    """epoll_ctl(2) for descriptor ``number`` of ours, with data of 64 bits."""
    _epoll_ctl(instance, _EPOLL_ADD, number, EPOLL_EVENT.pack(events, data))


def unregister(instance: int, number: int) -> None:
    """FileNotFoundError if what ``number`` refers to is not registered by that number."""
    _epoll_ctl(instance, _EPOLL_DEL, number, None)


def add_watch(instance: int, target: int, mask: int) -> int:
    """Watch what descriptor ``target`` (O_PATH will do) refers to; the watch descriptor."""
    return int(_add_watch(instance, f"/proc/self/fd/{target}".encode(), mask))


def remove_watch(instance: int, watch: int) -> None:
    """Queues an event with IN_IGNORED."""
    _rm_watch(instance, watch)


def set_next_watch(instance: int, watch: int) -> None:
    """The watch descriptor that the next watch gets, or the next one after it that is free."""
    fcntl.ioctl(instance, _SETNEXTWD, watch)


@functools.lru_cache(maxsize=None)
def can_set_next_watch() -> bool:
    instance = int(_inotify_init(os.O_CLOEXEC))
    try:
        set_next_watch(instance, 1)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return False
    finally:
        os.close(instance)
    return True


def queued(instance: int) -> int:
    """Bytes of events that were not read."""
    length = array.array("i", [0])
    fcntl.ioctl(instance, termios.FIONREAD, length)
    return length[0]


def mark(instance: int, flags: int, mask: int, target: int) -> None:
    """fanotify_mark(2) of what descriptor ``target`` (O_PATH will do) refers to."""
    _fanotify_mark(instance, flags, mask, -100, f"/proc/self/fd/{target}".encode())
