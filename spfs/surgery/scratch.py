"""The scratch memory of a task that is made to run calls: where it is, and how many descriptors it can receive."""

from __future__ import annotations

import errno
from typing import Optional, Tuple

from spfs.surgery.records import FdTable
from spfs.tracee import PAGE, Script, Tracee
from stubfs.wire import MAX_FDS

FIRST_BASE = 1 << 44  # far from where programs, libraries, heaps and stacks are put
BASE_STEP = 1 << 28
_PLACES = 100  # that are tried, up to the end of a 47-bit address space: a surgeon that was killed leaves one behind


def room(table: FdTable, least: int) -> Tuple[int, Optional[int]]:
    """How many descriptors its process can receive at once, and the soft RLIMIT_NOFILE that takes (None: its own)."""
    spare = table.limit - sum(1 for number in table.numbers if number < table.limit)
    descriptors = None
    if spare < least and table.hard_limit > table.limit:
        descriptors = min(table.hard_limit, table.limit + MAX_FDS + least)
        spare += descriptors - table.limit
    return max(1, min(MAX_FDS, spare - least + 1)), descriptors


def open_scratch(tracee: Tracee, base: int, need: int, descriptors: Optional[int]) -> Script:
    """``need`` bytes of scratch memory at ``base``, or somewhere behind it if something is there."""
    for attempt in range(_PLACES):
        try:
            yield from tracee.open(base + attempt * BASE_STEP * 4096, _round_up(need), descriptors)
            return
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
    raise OSError(errno.ENOMEM, "no room for the scratch memory", str(tracee.pid))


def _round_up(size: int) -> int:
    return -(-size // PAGE) * PAGE
