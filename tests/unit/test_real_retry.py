"""Trying the real mount again: which errors, how often, how long, and how it is ended."""

from __future__ import annotations

import errno
import os
import threading
from typing import Callable, List, Optional

import pytest

from spfs.errors import SpfsError
from spfs.realmount import Attempt, Retry, RetryPolicy

FAST = RetryPolicy(first=0.001, limit=0.004, permission_attempts=3)


def failing(*numbers: int) -> Callable[[Optional[float]], str]:
    """An attempt that fails with each of ``numbers`` and then works."""
    left = list(numbers)

    def attempt(seconds: Optional[float]) -> str:
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        return "mounted"

    return attempt


def test_network_errors_are_tried_again_and_each_is_reported() -> None:
    seen: List[Attempt] = []
    numbers = [errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EIO, errno.EPERM]
    assert Retry(FAST, report=seen.append).run(failing(*numbers), "srv:/x (nfs4)") == "mounted"
    assert [one.errno for one in seen] == numbers
    assert [one.number for one in seen] == [1, 2, 3, 4, 5]
    assert all(0 < one.next <= 0.004 for one in seen)
    assert seen[0].error == "Connection refused"


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.ENOENT, errno.EACCES])
def test_other_errors_end_it_at_once(number: int) -> None:
    seen: List[Attempt] = []
    with pytest.raises(SpfsError, match=r"cannot mount srv:/x \(nfs4\)") as caught:
        Retry(FAST, report=seen.append).run(failing(number), "srv:/x (nfs4)")
    assert (caught.value.errno, seen) == (number, [])
    assert caught.value.hint


def test_eperm_is_tried_a_bounded_number_of_times() -> None:
    with pytest.raises(SpfsError, match="at attempt 3") as caught:
        Retry(FAST).run(failing(*[errno.EPERM] * 9), "x")
    assert caught.value.errno == errno.EPERM


def test_the_time_limit_ends_it_with_the_last_error() -> None:
    with pytest.raises(SpfsError, match=r"not within 0.02 s, after \d+ attempts: Connection refused") as caught:
        Retry(FAST, timeout=0.02).run(failing(*[errno.ECONNREFUSED] * 1000), "x")
    assert caught.value.errno == errno.ETIMEDOUT


def test_an_abort_ends_the_wait_between_two_attempts() -> None:
    ours, theirs = os.pipe()
    try:
        slow = Retry(RetryPolicy(first=60, limit=60), abort_fd=ours, report=lambda attempt: timer.start())
        timer = threading.Timer(0.01, lambda: os.write(theirs, b"x"))
        with pytest.raises(SpfsError, match="aborted") as caught:
            slow.run(failing(errno.ECONNREFUSED), "x")
        timer.join()
        assert caught.value.errno == errno.ECANCELED
    finally:
        os.close(ours)
        os.close(theirs)


def test_delays_double_to_the_limit_with_jitter() -> None:
    policy = RetryPolicy()
    for attempt, full in [(1, 0.05), (2, 0.1), (5, 0.8), (8, 5.0), (1000, 5.0)]:
        assert all(0.75 * full <= policy.delay(attempt) <= full for _ in range(50))
    assert len({policy.delay(3) for _ in range(20)}) > 1
