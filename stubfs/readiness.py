"""What a file system process that is starting tells on --ready-fd: that it is ready, or which error has ended it.

As on a notification descriptor of s6, only a newline says that it is ready. An error comes without one, as JSON.
"""

from __future__ import annotations

import errno
import os
import select
import time

from stubfs import messages
from stubfs.errors import StubfsError, from_data, to_data


def tell_ready(fd: int) -> None:
    """Takes ``fd`` over, as tell_error does."""
    _tell(fd, b"\n")


def tell_error(fd: int, error: StubfsError) -> None:
    _tell(fd, messages.encode(to_data(error)))


def _tell(fd: int, said: bytes) -> None:
    try:
        os.write(fd, said)
    except OSError:
        pass  # nobody wants to know any more
    os.close(fd)


def wait(fd: int, seconds: float) -> None:
    """Until it is ready. The error that it tells is raised, of its own kind; TimeoutError if it says nothing in time,
    EOFError if it has ended without a word. ``fd``, the pipe's other end, stays the caller's."""
    said = b""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        part = os.read(fd, 65536)
        said += part
        if said == b"\n":
            return
        if not part:
            raise from_data(messages.decode(said)) if said else EOFError
    raise TimeoutError(errno.ETIMEDOUT, f"not ready in {seconds:g} s")
