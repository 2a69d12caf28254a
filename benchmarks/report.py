"""Milliseconds beside what a bare interpreter takes to start in the same run, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Mapping

from rich.console import Console
from rich.table import Table

BARE = "bare interpreter"


def show(title: str, figures: Mapping[str, float], targets: Mapping[str, float], as_json: bool, digits: int) -> None:
    """``figures``: what → milliseconds, with one for BARE. ``digits`` behind the point of the ratios."""
    if as_json:
        print(json.dumps({"milliseconds": figures, "targets": targets}, indent=2))
        return
    table = Table(title=title)
    for heading in ("", "ms", f"× {BARE}", "target ms"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, value in figures.items():
        target = targets.get(name)
        ratio = f"{value / figures[BARE]:.{digits}f}"
        table.add_row(name, f"{value:.1f}", ratio, f"{target:.0f}" if target else "")
    Console().print(table)
