"""Tables of calls behind the data they need, at the beginning of a tracee's scratch memory."""

from __future__ import annotations

import array
from typing import Generator, Sequence

from spfs.linux.calls import ENTRY, CallTable, results
from spfs.tracee import USER, Tracee, Wait


def run_table(
    tracee: Tracee, calls: CallTable, data: bytes = b"", fds: Sequence[Sequence[int]] = ()
) -> "Generator[Wait, None, array.array[int]]":
    """Run a table that lies behind ``data`` at USER; its results."""
    if not len(calls):
        return array.array("q")
    data += bytes(-len(data) % ENTRY)
    table = tracee.base + USER + len(data)
    tracee.write(tracee.base + USER, data + calls.encode())
    yield from tracee.run(table, len(calls), fds)
    return results(tracee.read(table, len(calls) * ENTRY))
