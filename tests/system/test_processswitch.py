"""The command ``switch``: processes moved between two mounts that both exist, and neither of which is ours."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

from spfs.errors import SpfsError
from spfs.linux import mountapi
from spfs.processswitch import SwitchRequest, switch

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

HOLDER = """
import json, os, sys
os.chdir(sys.argv[1] + "/dir")
kept = os.open("../file", os.O_RDWR)
os.lseek(kept, 2, os.SEEK_SET)
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps({"read": os.pread(kept, 4, 0).decode(), "offset": os.lseek(kept, 0, os.SEEK_CUR),
                      "device": os.fstat(kept).st_dev, "cwd": os.stat(".").st_dev}), flush=True)
"""


@pytest.fixture
def two_mounts(tmp_path: Path) -> Iterator[Tuple[Path, Path]]:
    places = tmp_path / "old", tmp_path / "new"
    for place in places:
        place.mkdir()
        mountapi.mount("tmpfs", str(place), "tmpfs")
        (place / "dir").mkdir()
        (place / "file").write_text("OLD." if place.name == "old" else "NEW.")
    yield places
    for place in places:
        mountapi.umount2(str(place), mountapi.MNT_DETACH)


@pytest.fixture
def holder(two_mounts: Tuple[Path, Path]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(two_mounts[0])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def ask(process: "subprocess.Popen[str]") -> dict[str, object]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    answer: dict[str, object] = json.loads(process.stdout.readline())
    return answer


@pytest.mark.parametrize("by", ["source", "device"])
def test_the_processes_are_moved_and_the_mounts_stay(
    by: str, two_mounts: Tuple[Path, Path], holder: "subprocess.Popen[str]"
) -> None:
    old, new = two_mounts
    device, wanted = old.stat().st_dev, new.stat().st_dev
    stages: List[str] = []
    request = SwitchRequest(
        str(new), None, source=str(old) if by == "source" else None, device=device if by == "device" else None
    )
    report = switch(request, lambda stage, details: stages.append(stage))
    assert report["left"] == []
    assert report["moved"] == {"file": 1, "cwd": 1}
    assert stages == ["prepared"]
    assert ask(holder) == {"read": "NEW.", "offset": 2, "device": wanted, "cwd": wanted}
    assert old.stat().st_dev == device


def test_a_name_that_was_reused_is_not_the_file(two_mounts: Tuple[Path, Path], holder: "subprocess.Popen[str]") -> None:
    old, new = two_mounts
    os.unlink(old / "file")
    (old / "file").write_text("another")
    wanted = new.stat().st_dev
    report = switch(SwitchRequest(str(new), None, source=str(old)), lambda stage, details: None)
    # It has no name any more: what it held goes along as a file without a name, not as the other one's counterpart.
    assert report["left"] == [] and report["moved"] == {"file": 1, "cwd": 1}
    found = ask(holder)
    assert found["device"] == wanted and found["read"] == "OLD."


@pytest.mark.parametrize(
    "target, source, number",
    [("new/missing", "old", errno.ENOENT), ("new/file", "old", errno.ENOTDIR), ("new", "missing", errno.ENOENT),
     ("old/dir", "old", errno.EINVAL)],
)  # fmt: skip
def test_what_cannot_be_switched(target: str, source: str, number: int, two_mounts: Tuple[Path, Path]) -> None:
    top = two_mounts[0].parent
    with pytest.raises(SpfsError) as raised:
        switch(SwitchRequest(str(top / target), None, source=str(top / source)), lambda stage, details: None)
    assert raised.value.errno == number
    assert str(top / target) in str(raised.value) or str(top / source) in str(raised.value)
