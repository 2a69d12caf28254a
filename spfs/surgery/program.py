"""A table of calls under construction, with the data it needs and the descriptors it receives, for one base address.

Laid out as messages and data, then the table: an entry that refers to another one's result is completed when the
table's place is known.
"""

from __future__ import annotations

import errno
from typing import Callable, List, NamedTuple, Sequence, Set, Tuple, Union

from spfs.linux.arch import LOAD_ARGUMENT_0, LOAD_ARGUMENT_2
from spfs.linux.calls import ENTRY, CallTable, result_address
from spfs.surgery import message
from spfs.tracee import LAST, PAIR, USER, add_last

_F_GETFD, _F_SETFD = 1, 2
_LINE = 64  # bytes to which messages are aligned


class Result(NamedTuple):
    """An argument: the address of another entry's result, for LOAD_ARGUMENT_*."""

    entry: int


class Program:
    """``groups``: our descriptors that are to be sent, message by message. ``exchanged``: what the calls replace."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.groups: List[Sequence[int]] = []
        self.exchanged: Set[int] = set()
        self.image = b""
        self._data = bytearray()
        self._calls = CallTable(pending=-errno.ECANCELED)  # so does a program read that was not run to its end
        self._references: List[Tuple[int, int, int]] = []  # entry, argument, entry whose result it takes
        self._expectations: List[Tuple[int, Callable[[int], None]]] = []
        self.add("close", base + PAIR, load=LOAD_ARGUMENT_0)  # see Tracee.run

    def add(self, name: str, *arguments: Union[int, Result], load: int = 0) -> int:
        """Append a call; the index of its entry. ``load`` as in ``CallTable.add``."""
        plain: List[int] = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, Result):
                self._references.append((len(self._calls), position, argument.entry))
                plain.append(0)
            else:
                plain.append(argument)
        return self._calls.add(name, *plain, load=load)

    def exchange(self, number: int, slot: int) -> int:
        """Put the descriptor at ``slot`` in the place of ``number``; the entry whose result is ``number`` then."""
        state = self.add("fcntl", number, _F_GETFD)
        entry = self.add("dup3", slot, number, 0, load=LOAD_ARGUMENT_0)
        # FD_CLOEXEC as it is now, not as it was when the process was examined.
        self.add("fcntl", number, _F_SETFD, Result(state), load=LOAD_ARGUMENT_2)
        return entry

    def expect(self, entry: int, told: Callable[[int], None]) -> None:
        """Have ``told`` called with the entry's result when the program has run."""
        self._expectations.append((entry, told))

    def put(self, data: bytes) -> int:
        """Have ``data`` in the task's memory, aligned to eight bytes; its address."""
        address = self.base + USER + len(self._data)
        self._data += data + bytes(-len(data) % 8)
        return address

    def receive(self, fds: Sequence[int]) -> List[int]:
        """Have the task receive ``fds`` of ours: where in its memory each of its own will be found."""
        self._data += bytes(-len(self._data) % _LINE)
        address = self.base + USER + len(self._data)
        data, slots = message.receive(self._calls, self.base, address, len(fds))
        self._data += data
        self.groups.append(fds)
        return slots

    @property
    def table(self) -> int:
        """The address of the table, when all is added."""
        return self.base + USER + -(-len(self._data) // _LINE) * _LINE

    @property
    def end(self) -> int:
        return self.table + (len(self._calls) + LAST) * ENTRY

    def __len__(self) -> int:
        return len(self._calls)

    def seal(self) -> None:
        """When all is added: make the ``image``, which is to be written at ``base + USER``."""
        last = CallTable()
        add_last(last, self.base)
        table = self._calls.encode() + last.encode()
        for entry, position, other in self._references:
            start = entry * ENTRY + 8 * (position + 1)
            table[start : start + 8] = result_address(self.table, other).to_bytes(8, "little")
        self._data += bytes(-len(self._data) % _LINE)
        self.image = bytes(self._data + table)

    def settle(self, outcome: Sequence[int]) -> None:
        """Tell the results, in the order of the entries."""
        for entry, told in self._expectations:
            told(outcome[entry])
