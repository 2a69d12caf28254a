"""The manager's work directory: whose it is, what is taken over from it, and what is left of it."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from spfs.errors import SpfsError
from spfs.state import VERSION, WorkDirectory, write_atomically


def test_it_is_one_managers_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "work")
    first = WorkDirectory(path)
    with pytest.raises(SpfsError, match=f"the manager with pid {os.getpid()} works in it") as caught:
        WorkDirectory(path)
    assert caught.value.errno == errno.EBUSY
    first.close(remove=True)
    assert not os.path.exists(path)
    WorkDirectory(path).close(remove=True)


def test_a_lock_file_that_another_has_taken_away_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager that ends takes it along, between our open and our lock of it: then it locks nobody out."""
    import fcntl

    lock = tmp_path / "lock"
    flock = fcntl.flock
    locked = []

    def flock_late(fd: int, operation: int) -> None:
        if not locked:
            lock.unlink()
            lock.touch()
        locked.append(fd)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    tmp_path.chmod(0o700)
    work = WorkDirectory(str(tmp_path))
    monkeypatch.undo()
    assert len(locked) == 2 and lock.read_text() == f"{os.getpid()}\n"
    with pytest.raises(SpfsError, match="works in it"):
        WorkDirectory(str(tmp_path))
    work.close(remove=True)


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_one_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(SpfsError, match="others may write to it"):
        WorkDirectory(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_only_records_of_this_version_are_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o700)
    work = WorkDirectory(str(tmp_path))
    work.save("mount-2", {"id": "b"})
    others = {
        "mount-1.json": json.dumps({"version": VERSION + 1, "id": "a"}), "mount-3.json": "{", "mount-4.json": "[]",
        "mount-x.json": json.dumps({"version": VERSION}),
    }  # fmt: skip
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    assert list(work.load()) == [("mount-2", {"id": "b"})]
    for name in ("mount-1.json", "mount-3.json", "mount-4.json"):
        assert f"cannot take over {tmp_path}/{name}" in caplog.text
    work.close(remove=False)
    assert {name: (tmp_path / name).read_text() for name in others} == others


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    umask = os.umask(0o777)
    try:
        write_atomically(str(path), b"first", 0o644)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomically(str(path), b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]
