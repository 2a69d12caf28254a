"""Where the reading of a directory goes on, on another file system."""

from __future__ import annotations

from typing import List, Optional

import pytest

from spfs.surgery.kinds.directories import Entry, Listings, continued


def listing(text: str, first: int) -> List[Entry]:
    """A letter per entry; the offsets behind them count from ``first``."""
    return [Entry(letter.encode(), first + index) for index, letter in enumerate(text)]


@pytest.mark.parametrize(
    ("old", "new", "delivered", "expected"),
    [
        ("abcd", "abcd", 2, 101),
        ("abcd", "bacd", 2, 101),  # the same ones, in whatever order
        ("abcd", "acbd", 2, None),
        ("abcd", "ab", 2, 101),
        ("abcd", "a", 2, None),
        ("abcd", "dcbaxy", 4, 105),  # at the end is at the end
        ("abcd", "", 4, 0),
        ("abcd", "abcd", 9, None),  # an offset that is nobody's
    ],
)
def test_position(old: str, new: str, delivered: int, expected: Optional[int]) -> None:
    listings = Listings(listing(old, 1), listing(new, 100))
    assert continued(delivered, listings) == expected
