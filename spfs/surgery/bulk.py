"""statx of many paths at once, without requests to their file systems."""

from __future__ import annotations

import os
from typing import List, Optional, Sequence, Tuple

from spfs.linux import statx
from spfs.linux.calls import CallTable, address_of, run_local


def objects(paths: Sequence[str]) -> List[Optional[statx.Object]]:
    """What each path refers to; None for what cannot be examined."""
    if not paths:
        return []
    table = CallTable()
    buffer, _names = add_statx(table, paths)
    outcome = run_local(table)
    return [
        None if result < 0 else statx.decode(buffer, index * statx.SIZE) for index, result in enumerate(outcome)
    ]


def add_statx(table: CallTable, paths: Sequence[str]) -> Tuple[bytearray, bytearray]:
    """Append a statx call for each path: the buffer for the answers, and the names, both to be kept until it runs."""
    encoded = [os.fsencode(path) + b"\0" for path in paths]
    names = bytearray(b"".join(encoded))
    buffer = bytearray(statx.SIZE * len(paths))
    name, answer = address_of(names), address_of(buffer)
    for path in encoded:
        table.add("statx", statx.AT_FDCWD, name, statx.AT_STATX_DONT_SYNC, statx.MASK, answer)
        name += len(path)
        answer += statx.SIZE
    return buffer, names
