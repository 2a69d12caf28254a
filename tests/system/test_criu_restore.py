"""Processes restored by CRIU onto delayed mounts: blocked until the real file system is there, and moved onto it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator

import pytest
from criu_kit import World

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_criu]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_the_main_road(world: World) -> None:
    (world.export / "file").write_bytes(b"hello, world")
    world.bind()
    subject = world.subject()
    subject.run(f"import os; fd = os.open({str(world.mnt / 'file')!r}, os.O_RDWR); os.lseek(fd, 7, 0)")
    assert "data on" in world.dump(subject, "--delayed", world.delayed)
    world.unbind()
    world.server_goes()

    world.restore()
    assert world.types() == ["fuse.stubfs"]
    subject.start("os.read(fd, 100)")
    world.somebody_waits()
    assert not subject.answered

    world.server_comes()
    assert subject.result() == b"world"
    reports = world.wait()
    assert reports["data"]["moved"] == {"file": 1} and not reports["data"]["left"], reports
    world.replaced()
    assert subject.run("os.fstat(fd).st_dev") == os.stat(world.real).st_dev
