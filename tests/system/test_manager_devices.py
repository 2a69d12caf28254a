"""A device number is given to another mount as soon as its file system is gone: that one is not taken for ours."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Iterator

import pytest
from manager_kit import Manager, manager_in

from spfs import mounts
from spfs.linux import mountapi
from spfs.testing import wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with manager_in(tmp_path) as manager:
        yield manager.start()


def test_an_unmount_leaves_who_has_the_number_now(manager: Manager, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    client = manager.client()
    old = client.mount("a", str(tmp_path / "a"))
    os.kill(old["pid"], signal.SIGKILL)
    wait_until(lambda: client.status("a")["mounts"][0]["state"] == "failed")
    mountapi.umount2(str(tmp_path / "a"), mountapi.MNT_DETACH)
    new = client.mount("b", str(tmp_path / "b"))
    assert new["device"] == old["device"]
    client.unmount("a")
    (there,) = mounts.instances(new["device"])
    assert there.mountpoint == str(tmp_path / "b") and there.mount.source.startswith("spfs:b:")
    (tmp_path / "b" / "file").touch()
    client.unmount("b")
    assert mounts.instances(new["device"]) == []


@pytest.mark.parametrize("id", ["x" * 128, "ü" * 128, "\U0001f4be" * 128], ids=["ascii", "two bytes", "four bytes"])
def test_an_id_is_shown_as_far_as_there_is_room(id: str, manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    client = manager.client()
    device = client.mount(id, str(tmp_path / "a"))["device"]
    (there,) = mounts.instances(device)
    name = os.fsencode(there.mount.source)
    assert name.startswith(b"spfs:" + os.fsencode(id)[:200] + b":") and len(name) < 256
    client.unmount(id)
    assert mounts.instances(device) == []
