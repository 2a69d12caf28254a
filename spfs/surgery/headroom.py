"""How much memory a process may be made to take for a moment: at the limit of a cgroup the kernel would kill it.

Looked up ahead of time, since few have a limit; what is left of it is asked in the blackout, of those that have one.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Iterable, List

from spfs.linux import memcg
from spfs.surgery.records import Memory, Process
from spfs.tracee import PAGE

_log = logging.getLogger(__name__)

_SLACK = 512 << 10  # bytes, for page tables, our code, and what the kernel charges in advance


def apportion(processes: Iterable[Process]) -> None:
    """Find the limits of all that have mappings to be exchanged, who will be at it at the same time."""
    memories: List[Memory] = [process.memory for process in processes if process.memory is not None]
    memories = [memory for memory in memories if memory.regions]
    unknown = [memory for memory in memories if memory.cgroups is None]
    hierarchies = list(memcg.hierarchies()) if unknown else []
    for memory in unknown:
        try:
            memory.cgroups = memcg.limited(memory.tid, hierarchies)
        except (OSError, ValueError) as error:
            _log.debug("process %d: limits of its memory are not known: %s", memory.tid, error)
            memory.cgroups = []
    users = Counter(cgroup for memory in memories for cgroup in memory.cgroups or ())
    for memory in memories:
        memory.sharers = max((users[cgroup] for cgroup in memory.cgroups or ()), default=1)


def allowance(memory: Memory, wanted: int) -> int:
    """Bytes, of whole pages, that the process can take now: ``wanted`` at most, its share at least."""
    most = wanted
    for cgroup in memory.cgroups or ():
        room = cgroup.room(memory.sharers * wanted + _SLACK)
        most = min(most, max(0, room - _SLACK) // memory.sharers)
    return most - most % PAGE
