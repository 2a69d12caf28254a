"""What every kind of reference has in common: the moments of a switch at which it can do something.

A kind is a class of these hooks, each of which does nothing unless the kind has something to do then. To add a kind:
a module with its class, and a line in ``spfs.surgery.kinds.registry``.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Callable, Dict, Iterable, Iterator, List, NamedTuple, Tuple

from spfs.linux import statx
from spfs.linux.procfs import FdInfo
from spfs.linux.sockdiag import UnixSocket
from spfs.surgery import socketlist
from spfs.surgery.records import Description, FdTable, Holding, Process

if TYPE_CHECKING:  # both import this package
    from spfs.surgery.counterparts import Counterparts
    from spfs.surgery.errands import Errands
    from spfs.surgery.program import Program


class Use(NamedTuple):
    """A descriptor of the old mount that needs more than to be exchanged."""

    process: Process
    table: FdTable
    number: int
    description: Description

    @property
    def problem(self) -> "str | None":
        return self.process.problem or self.description.problem


class Scene:
    """Everybody at once, for what concerns several references: the ``uses`` are of descriptions that are special.
    ``errands``: what processes can be had to call for us; None while they run."""

    def __init__(self, processes: Iterable[Process]) -> None:
        self.processes = list(processes)
        self.errands: "Errands | None" = None
        self.uses: List[Use] = [
            Use(process, table, number, description)
            for process in self.processes
            for table in process.tables
            for number, description in table.held.items()
            if description.special
        ]

    def tables(self) -> Iterator[Tuple[Process, FdTable]]:
        return ((process, table) for process in self.processes for table in process.tables)

    def holdings(self) -> Iterator[Tuple[Process, FdTable, Holding]]:
        return ((process, table, holding) for process, table in self.tables() for holding in table.holdings)


class Survey:
    """What is looked at once for all kinds: ``pids``, all processes that will be examined."""

    def __init__(self, pids: List[int]) -> None:
        self.pids = pids

    @functools.cached_property
    def sockets(self) -> List[UnixSocket]:
        """Of all their network namespaces."""
        return socketlist.of_processes(self.pids)

    @functools.cached_property
    def in_flight(self) -> Dict[int, socketlist.Flight]:
        """The descriptors in the queues of these sockets, by their numbers."""
        return socketlist.in_flight(self.sockets)


class Found(NamedTuple):
    """A descriptor that is not of the old mount. ``info``: its fdinfo, read when first asked for (OSError).

    ``copy``: our descriptor of it, the same one for all that share the description; the examiner's (OSError; -1 for a
    table that is out of reach).
    """

    table: FdTable
    number: int
    object: statx.Object
    info: Callable[[], FdInfo]
    copy: Callable[[], int]
    pidfd: int  # of the task whose table it is, -1 if it is out of reach; the examiner's


class Handler:
    """One kind. An instance serves one switch between ``device`` (st_dev) and another mount."""

    def __init__(self, device: int) -> None:
        self.device = device

    # While everything is examined; nothing here may cause a request to the file system.

    def survey(self, survey: Survey) -> None:
        """Before the processes are examined: what the kernel lists without regard to processes."""

    def note(self, table: FdTable, number: int, description: Description, info: FdInfo) -> None:
        """A descriptor of the mount."""

    def look(self, found: Found) -> None:
        """A descriptor that is not of the mount: note in ``found.table.holdings`` what it holds of it."""

    def provide(self, counterparts: "Counterparts", process: Process) -> None:
        """Open on the new mount what will be needed. Not for descriptions, which ``Counterparts`` does itself."""

    # When requests to the file system are served, and everybody still runs.

    def rehearse(self, scene: Scene) -> None:
        """Find out ahead what can only be had from the file systems themselves, which may take their time."""

    # While nobody runs.

    def changed(self, process: Process) -> bool:
        """Whether there is something else by now than what was noted; the process is examined again then."""
        return False

    def judge(self, scene: Scene) -> None:
        """Set the problems of what cannot go because something else stays. Also called when all was examined."""

    def transfer(self, scene: Scene) -> None:
        """What we can do ourselves, by our copies; the mounts have been switched."""

    def conclude(self, scene: Scene) -> None:
        """When all is done, and still nobody runs."""

    # What a task is made to do. Built ahead of time, and once more if something has changed.

    def before(self, program: "Program", table: FdTable, number: int) -> None:
        """Calls to be made before descriptor ``number`` is exchanged."""

    def finish(self, program: "Program", table: FdTable) -> None:
        """Calls to be made when all is exchanged (``program.exchanged``), and no received descriptor is left."""


def kernel_device(device: int) -> int:
    """dev_t as the kernel prints it in fdinfo (MKDEV: 20 bits for the minor number)."""
    return os.major(device) << 20 | os.minor(device)


def from_kernel_device(number: int) -> int:
    return os.makedev(number >> 20, number & 0xFFFFF)
