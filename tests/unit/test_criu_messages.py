"""What spfs-criu says where it cannot do what it was asked for."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

from spfs.cli import criu
from spfs.criu import choice, command, flow, listing, manager, record, restoration
from spfs.criu.delayed import DelayedMount, Place, Wish
from spfs.criu.images import Images
from spfs.criu.observe import Observed
from spfs.errors import MissingFeatureError, SpfsError, UsageError

DATA = DelayedMount("data", "nfs4", "server:/export", places=(Place("/data"),))


def test_options_of_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        criu.main(["files", "/images", "--deep"])
    said = "spfs-criu: cannot understand the command line: --deep (see spfs-criu files --help)\n"
    assert ended.value.code == 2 and capsys.readouterr().err == said


def test_a_dump_of_nobody() -> None:
    with pytest.raises(UsageError, match="cannot dump: which process. .-t PID"):
        flow.dump(["-D", "/images"], [])


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "criu").write_text("")
    with pytest.raises(SpfsError, match="cannot start .*/criu: Permission denied .is that CRIU's program"):
        command.start(str(tmp_path / "criu"), [], {})


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(MissingFeatureError, match="cannot find no-such-criu .install it .*or name it: --criu PATH"):
        command.find("no-such-criu")


def test_a_configuration_without_places(tmp_path: Path) -> None:
    with pytest.raises(SpfsError, match="cannot delay data: its configuration has no places .give .places"):
        choice.at_dump(str(tmp_path), 1, [DelayedMount("data", "nfs4", "server:/export")])
    with pytest.raises(SpfsError, match="cannot restore delayed mount data: nobody says where it is .give its places"):
        choice.at_restore(str(tmp_path), [DelayedMount("data", "nfs4", "server:/export")])


def test_mounts_that_cannot_be_delayed() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with pytest.raises(SpfsError, match=f"cannot look at the mounts of process {gone.pid}: No such .*-t PID"):
        Observed(gone.pid, [])
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        with pytest.raises(UsageError, match="cannot delay a: no mountpoint .--delayed a=MOUNTPOINT"):
            Observed(process.pid, [Wish("a", None)])
        with pytest.raises(SpfsError, match="cannot delay a: nothing is mounted on /none .give a mountpoint as"):
            Observed(process.pid, [Wish("a", "/none")])
        with pytest.raises(UsageError, match="cannot delay a: /proc is proc, which has nothing .*--delayed a=/proc,"):
            Observed(process.pid, [Wish("a", "/proc")])


@contextmanager
def process_with(mounts: str, directory: Path) -> Iterator[int]:
    """In a mount namespace of its own, where a shell has made them."""
    script = f"set -e; cd '{directory}'; {mounts}; echo; exec cat >/dev/null"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


@pytest.mark.needs_root
def test_mounts_that_are_hidden_or_more_than_what_is_to_be_delayed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "whole").mkdir()
    with process_with("mount -t tmpfs one a/b; mount -t tmpfs two a", tmp_path) as pid:
        with pytest.raises(SpfsError, match=f"cannot look into {tmp_path}/a/b of process {pid}: No such .*hidden"):
            Observed(pid, [Wish("data", f"{tmp_path}/a/b", "nfs4", "server:/export")])
    with process_with("mount -t tmpfs one whole; mkdir whole/part; mount --bind whole/part a", tmp_path) as pid:
        with Observed(pid, [Wish("data", f"{tmp_path}/whole", "nfs4", "server:/export")]) as observed:
            assert [place.mountpoint for place in observed.mounts[0].places] == [f"{tmp_path}/whole", f"{tmp_path}/a"]
        what = f"cannot delay data: {tmp_path}/whole shows / of .* not within /part, that is to be seen on {tmp_path}/a"
        with pytest.raises(SpfsError, match=f"{what} .name the mount that shows the most"):
            Observed(pid, [Wish("data", f"{tmp_path}/a", "nfs4", "server:/export")])


def test_a_container_restored_by_stock_criu_that_has_not_said_where() -> None:
    mount = DelayedMount("data", "nfs4", "server:/export", places=(Place("/data", "", "data"),))
    made = restoration.Restoration("1.1")
    with pytest.raises(SpfsError, match="cannot restore delayed mount data on /data: nobody says where it is mounted"):
        made._base(mount)


@pytest.mark.needs_root
def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpfsError, match=f"cannot bind delayed mount {tmp_path} to /none: No such .*as at the dump"):
        restoration._bind(str(tmp_path), Place("/none"))


@pytest.mark.needs_root
@pytest.mark.needs_fuse
def test_a_manager_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "STATE", str(tmp_path / "state"))
    monkeypatch.setattr(manager, "WORK_DIR", "/proc/none")
    monkeypatch.delenv("SPFS_MANAGER_SOCK", raising=False)
    with pytest.raises(SpfsError, match="^cannot use the work directory /proc/none: No such .*choose another"):
        manager.connect(start=True)


def test_files_of_what_is_not_delayed(tmp_path: Path) -> None:
    record.write(str(tmp_path), [DATA])
    with pytest.raises(SpfsError, match="cannot list the files of /other: not one of those .*known are: data ./data"):
        listing.listed(str(tmp_path), "/other")


@pytest.mark.needs_criu
class TestImages:
    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(SpfsError, match="cannot read images: .*: there is no inventory.img .give the directory"):
            Images(str(tmp_path))

    def test_damaged(self, tmp_path: Path) -> None:
        for name in ("inventory", "files"):
            (tmp_path / f"{name}.img").write_bytes(b"damaged")
        with pytest.raises(SpfsError, match="cannot read image: .*/files.img: .* .it is damaged, or of a CRIU"):
            Images(str(tmp_path)).entries("files")

    def test_no_record_and_no_name(self, tmp_path: Path) -> None:
        (tmp_path / "inventory.img").write_bytes(b"")
        with pytest.raises(UsageError, match="cannot list files: nothing is written beside .*spfs-criu files IMAGES"):
            listing.listed(str(tmp_path))

    def test_a_restore_without_delayed_mounts(self, tmp_path: Path) -> None:
        record.write(str(tmp_path), [])
        with pytest.raises(UsageError, match="cannot restore .* with delayed mounts: none is written .*name them"):
            flow.Restore(["-D", str(tmp_path)], [])
