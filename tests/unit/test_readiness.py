"""What a file system process tells whoever has started it."""

from __future__ import annotations

import errno
import os
from typing import Iterator, Tuple

import pytest

from spfs import fsprocess
from spfs.errors import SpfsError
from stubfs import readiness
from stubfs.errors import MissingFeatureError, StubfsError, UsageError


@pytest.fixture
def pipe() -> Iterator[Tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)


def test_ready(pipe: Tuple[int, int]) -> None:
    readiness.tell_ready(pipe[1])
    readiness.wait(pipe[0], 10)
    with pytest.raises(OSError):
        os.fstat(pipe[1])


@pytest.mark.parametrize("kind", [StubfsError, UsageError, MissingFeatureError])
def test_an_error_comes_as_it_was(pipe: Tuple[int, int], kind: "type[StubfsError]") -> None:
    readiness.tell_error(pipe[1], kind("cannot\nmount \udcff", "try again", errno.EBUSY))
    with pytest.raises(kind) as caught:
        readiness.wait(pipe[0], 10)
    error = caught.value
    assert type(error) is kind
    assert (error.message, error.hint, error.errno) == ("cannot\nmount \udcff", "try again", errno.EBUSY)


def test_a_long_error_comes_whole(pipe: Tuple[int, int]) -> None:
    """In several reads: it is known to be whole when the other end is closed."""
    readiness.tell_error(pipe[1], StubfsError("x" * 60000))
    with pytest.raises(StubfsError, match="^x{60000}$"):
        readiness.wait(pipe[0], 10)


def test_nobody_waits_any_more() -> None:
    read, write = os.pipe()
    os.close(read)
    readiness.tell_ready(write)
    with pytest.raises(OSError):
        os.fstat(write)


def test_silence_and_death(pipe: Tuple[int, int]) -> None:
    with pytest.raises(TimeoutError, match="not ready in 0.01 s"):
        readiness.wait(pipe[0], 0.01)
    os.close(pipe[1])
    with pytest.raises(EOFError):
        readiness.wait(pipe[0], 10)
    with pytest.raises(SpfsError, match="cannot start the file system: a: it has died .see /log"):
        fsprocess.wait_ready("a", pipe[0], "/log")


def test_an_error_keeps_its_number_and_hint(pipe: Tuple[int, int]) -> None:
    readiness.tell_error(pipe[1], StubfsError("cannot serve /mnt: no", "do something", errno.ENODEV))
    with pytest.raises(SpfsError) as caught:
        fsprocess.wait_ready("a", pipe[0], "/log")
    assert str(caught.value) == "cannot start the file system: a: cannot serve /mnt: no (do something)"
    assert caught.value.errno == errno.ENODEV
