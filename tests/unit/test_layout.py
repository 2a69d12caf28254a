"""Tables on a screen: what gives way where there is no room, and that nothing is wider or longer than it."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from rich.cells import cell_len

from spfs.cli.layout import Table, aligned, screenful, shares


def texts(*tables: Table, width: int, height: int) -> "list[str]":
    return [line.text for line in screenful(tables, width, height)]


def test_columns_are_aligned_and_as_wide_as_they_must_be() -> None:
    lines = aligned(Table(["ID", "WHY"], [["a", "x" * 500], ["日本", "y"]], more=3))
    assert [line.text for line in lines] == ["ID    WHY", "a     " + "x" * 500, "日本  y", "and 3 more"]
    assert [line.heading for line in lines] == [True, False, False, False]


def test_the_longest_cells_are_cut_in_their_middle() -> None:
    table = Table(["ID", "MOUNTPOINT", "HELD"], [["data", "/srv/projects/of/somebody/data", "0"]])
    assert texts(table, width=30, height=9) == [
        "ID    MOUNTPOINT          HELD",
        "data  /srv/proj…ody/data  0",
    ]
    assert texts(Table(["A", "B"], [["日本語日本語", "b"]]), width=10, height=9)[1] == "日…語    b"


def test_each_table_keeps_lines_of_a_screen_that_is_too_short() -> None:
    many = Table(["MOUNT"], [[f"m{number}"] for number in range(50)])
    few = Table(["WAITS"], [["cat"], ["dd"]], more=7)
    assert texts(many, few, width=80, height=11) == [
        "MOUNT", "m0", "m1", "m2", "m3", "and 46 more", "", "WAITS", "cat", "dd", "and 7 more",
    ]  # fmt: skip
    assert texts(many, few, width=80, height=7) == ["MOUNT", "m0", "and 49 more", "", "WAITS", "cat", "and 8 more"]


def test_who_wants_little_gets_all_of_it() -> None:
    assert shares([3, 100, 5, 60], 48) == [3, 20, 5, 20]
    assert shares([3, 2], 100) == [3, 2]
    assert shares([3, 2], -1) == [0, 0] and shares([], 5) == []


cell = some.sampled_from(["a", "/a/mountpoint/with/a/long/name", "日本語日本語", "\t<b>\x1b[1m", "e\u0301" * 9, "0"])


# A machine with much else to do needs more than a second to think of tables.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(some.lists(some.lists(some.tuples(cell, cell, cell), max_size=12), min_size=1, max_size=3),
       some.integers(1, 120), some.integers(0, 40))  # fmt: skip
def test_no_line_is_too_long_and_there_are_not_too_many(
    rows: "list[list[tuple[str, str, str]]]", width: int, height: int
) -> None:
    lines = texts(*(Table(["A", "LONGER", "C"], some_rows) for some_rows in rows), width=width, height=height)
    assert len(lines) <= height
    assert all(cell_len(line) <= max(width, len("and 12 more"), 2 * 2) for line in lines)
