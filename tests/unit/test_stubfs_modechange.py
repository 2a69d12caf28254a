"""A change of mode that cannot be completed leaves everything as it was."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import Iterator

import pytest

from stubfs.backing import Staging
from stubfs.held import HeldTable
from stubfs.modes import Mode, ModeSwitch, State
from stubfs.protocol import IN_HEADER, Opcode
from stubfs.request import Device, Request


class Server:
    """Serves nothing; has no thread left for the invalidation."""

    state: State

    def drain(self, state: State, timeout: float) -> bool:
        return True

    def drop_caches(self, state: State) -> None:
        raise RuntimeError("can't start new thread")


@pytest.fixture
def staging() -> Iterator[Staging]:
    made = Staging(1)
    yield made
    made.close()
    made.discard()


@pytest.mark.parametrize("mode", [Mode.STUB, Mode.PROXY])
def test_as_before(staging: Staging, mode: Mode) -> None:
    server, held = Server(), HeldTable()
    switch = ModeSwitch(server, held, staging)
    before = switch.begin(Mode.RESTORE, None)
    directory = os.open(tempfile.gettempdir(), os.O_PATH) if mode is Mode.PROXY else None
    with pytest.raises(RuntimeError, match="new thread"):
        switch.change(mode, directory)
    assert server.state is before and switch.generation == staging.number
    if directory is not None:
        with pytest.raises(OSError):
            os.fstat(directory)
    # What is held is still let go.
    ended = threading.Timer(5, held.end)
    ended.start()
    try:
        data = IN_HEADER.pack(IN_HEADER.size, Opcode.READ, 7, 2, 0, 0, 0, 0, 0)
        request = Request(Device(-1), data)
        request.parse(len(data))
        held.add(request, "a former state")
        assert held.next() is request
    finally:
        ended.cancel()
