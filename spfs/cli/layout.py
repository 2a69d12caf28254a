"""Tables as text: aligned columns, a line each; for pipes as wide as they are, for a screen so that they fit on it."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

from stubfs.errors import printable

_GAP = 2  # columns of a terminal between two cells
_CUT = "…"


class Table(NamedTuple):
    """The names of the columns, the rows, and how many there are beyond these."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    more: int = 0


class Line(NamedTuple):
    text: str
    heading: bool = False


def aligned(table: Table, width: Optional[int] = None) -> List[Line]:
    """The table's lines. With a ``width`` the longest cells are cut in their middle until the lines are no longer."""
    # rich's tables take seconds for thousands of rows; how wide a terminal shows a text is all that we need of it.
    from rich.cells import cell_len

    cells = [[printable(cell) for cell in row] for row in (table.columns, *table.rows)]
    sizes = [[cell_len(cell) for cell in row] for row in cells]
    widths = [max(column) for column in zip(*sizes)]
    if width is not None:
        widths = shares(widths, width - _GAP * (len(widths) - 1))
        cells = [
            [cell if size <= most else _cut(cell, most) for cell, size, most in zip(*row)]
            for row in zip(cells, sizes, [widths] * len(cells))
        ]
        sizes = [[cell_len(cell) for cell in row] for row in cells]
    lines = []
    for number, (row, taken) in enumerate(zip(cells, sizes)):
        padded = (cell + " " * (most - size) for cell, size, most in zip(row, taken, widths))
        lines.append(Line((" " * _GAP).join(padded).rstrip(), heading=not number))
    if table.more:
        lines.append(Line(f"and {table.more} more"))
    return lines


def screenful(tables: Sequence[Table], width: int, height: int) -> List[Line]:
    """All of them, with an empty line between; of those with the most rows as many as there is room for."""
    rows = [len(table.rows) + bool(table.more) for table in tables]
    granted = shares(rows, height - 2 * len(tables) + 1)
    lines: List[Line] = []
    for table, wanted, most in zip(tables, rows, granted):
        if lines:
            lines.append(Line(""))
        if wanted > most:
            shown = max(0, most - 1)
            table = Table(table.columns, table.rows[:shown], table.more + len(table.rows) - shown)
        lines += aligned(table, width)
    return lines[: max(0, height)]


def shares(wanted: Sequence[int], room: int) -> List[int]:
    """What each gets of ``room``: who wants little all of it, the others alike."""
    granted = [0] * len(wanted)
    for number, index in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        granted[index] = max(0, min(wanted[index], room // (len(wanted) - number)))
        room -= granted[index]
    return granted


def _cut(text: str, most: int) -> str:
    """Its beginning and its end: names that are alike in the one differ in the other."""
    from rich.cells import set_cell_size

    if most < 1:
        return ""
    end, begin = _halves(most - 1)
    return set_cell_size(text, begin).rstrip() + _CUT + set_cell_size(text[::-1], end).rstrip()[::-1]


def _halves(number: int) -> Tuple[int, int]:
    return number // 2, number - number // 2
