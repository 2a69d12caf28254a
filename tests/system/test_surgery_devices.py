"""Device nodes on a mount, open while it is exchanged."""

from __future__ import annotations

import os
import stat

import pytest
from surgery_kit import Mounts, Victim, mounts, victim

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

ZERO, FULL, KMSG = os.makedev(1, 5), os.makedev(1, 7), os.makedev(1, 11)


def test_devices_without_state(mounts: Mounts, victim: Victim) -> None:
    mounts.both(lambda root: os.mknod(root / "zero", stat.S_IFCHR | 0o666, ZERO))
    path = str(mounts.old / "zero")
    victim.run(f"z, n = os.open({path!r}, os.O_RDWR), os.open({path!r}, os.O_RDONLY | os.O_NONBLOCK)")
    assert mounts.switch().moved == {"device": 2} and mounts.users() == []
    assert victim.run("os.read(z, 2), os.write(z, b'x'), os.get_blocking(n)") == (b"\0\0", 1, False)


def test_another_device_there(mounts: Mounts, victim: Victim) -> None:
    os.mknod(mounts.old / "d", stat.S_IFCHR | 0o666, ZERO)
    os.mknod(mounts.new / "d", stat.S_IFCHR | 0o666, FULL)
    victim.run(f"d = os.open({str(mounts.old / 'd')!r}, os.O_RDWR)")
    (left,) = mounts.switch().left
    assert "another device" in left.reason and victim.run("os.write(d, b'x')") == 1


def test_device_with_state(mounts: Mounts, victim: Victim) -> None:
    """Another opening would begin to read the kernel's messages anew."""
    mounts.both(lambda root: os.mknod(root / "kmsg", stat.S_IFCHR | 0o666, KMSG))
    victim.run(f"k = os.open({str(mounts.old / 'kmsg')!r}, os.O_RDONLY | os.O_NONBLOCK)")
    (left,) = mounts.switch().left
    assert left.kind == "device" and "(1:11)" in left.reason
