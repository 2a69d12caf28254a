"""Everything at once, against a replace: other replaces and switches, mode changes, storms of processes and threads."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from manager_kit import run
from replace_kit import FREEZERS, TIMEOUT, Scene, paused_at, scene, scene_at
from surgery_kit import Victim

from spfs.errors import SpfsError

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]

CONTENTS = b"real contents"


@pytest.fixture
def scenes(tmp_path: Path) -> Iterator[List[Scene]]:
    """Three delayed mounts, each with a manager of its own."""
    with ExitStack() as stack:
        made = []
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            made.append(stack.enter_context(scene_at(tmp_path / str(number))))
        yield made


@pytest.mark.parametrize("kind", FREEZERS)
def test_mounts_of_several_managers_with_the_same_users(scenes: "List[Scene]", kind: str) -> None:
    """Replaced at once, and strictly: each waits until the others have let go of the processes and of their cgroup."""
    users = [scenes[0].victim() for _ in range(3)]
    group = scenes[0].cgroup(kind, *(user.pid for user in users))
    for user in users:
        user.run("import os; held = []")
    for one in scenes:
        one.delay()
        path = one.file("file", CONTENTS)
        for user in users:
            user.run(f"held.append(os.open({path!r}, os.O_RDONLY))")
        one.client.mode("stub")
    for one in scenes:
        one.ask(freeze_cgroup=group, strict=True)
    for one in scenes:
        report = one.wait()
        assert (report["moved"], report["left"]) == ({"file": 3}, [])
        one.replaced()
    for user in users:
        assert user.run("[os.pread(fd, 99, 0) for fd in held]") == 3 * [CONTENTS]


def in_use(scene: Scene, **options: Any) -> Victim:
    """A process with a file and a directory of the mount, which is in stub mode."""
    scene.delay(**options)
    scene.file("file", CONTENTS)
    user = scene.victim(cwd=scene.mnt)
    user.run("import os, threading; file = os.open('file', os.O_RDONLY); here = os.open('.', os.O_RDONLY)")
    scene.client.mode("stub")
    return user


def complete(scene: Scene, user: Victim, **options: Any) -> None:
    assert scene.replace(**options)["left"] == []
    assert user.run("os.pread(file, 99, 0)") == CONTENTS
    scene.replaced()


@paused_at("prepared", "stopped", "operated")
def test_asked_twice_and_a_switch_from_the_same_mount(scene: Scene, tmp_path: Path) -> None:
    """A second replace is the one that is at work, or refused. The switch of another command waits for its turn; what
    it finds then goes where it says."""
    user = in_use(scene)
    scene.ask()
    scene.manager.reached()
    scene.ask()
    with pytest.raises(SpfsError, match="a replace is running") as caught:
        scene.ask(strict=True)
    assert caught.value.errno == errno.EBUSY
    elsewhere = scene.mount("-t", "tmpfs", "elsewhere", str(_made(tmp_path / "elsewhere")))
    (elsewhere / "file").write_bytes(b"elsewhere")
    with ThreadPoolExecutor(1) as pool:
        command = ["switch", "--json", "--pid", str(user.pid), "--source", str(scene.mnt), "--target", str(elsewhere)]
        told = pool.submit(run, "spfs.cli.spfs", *command)
        scene.manager.no_more()
        scene.manager.go()
        assert scene.wait()["left"] == []
        said = told.result(60)
    assert "Traceback" not in said.stderr
    assert user.run("os.pread(file, 99, 0)") in (CONTENTS, b"elsewhere")
    scene.replaced()


def _made(path: Path) -> Path:
    path.mkdir()
    return path


@paused_at("begun", "proxy", "stopped", "switched")
@pytest.mark.parametrize("mode", ["stub", "proxy", "restore"])
def test_mode_changes_that_are_asked_meanwhile(scene: Scene, mode: str) -> None:
    """Refused, or done when the replace has ended: never in its middle."""
    user = in_use(scene)
    scene.ask()
    scene.manager.reached()
    options = {"proxy_dir": str(scene.export)} if mode == "proxy" else {}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(scene.manager.client(TIMEOUT).mode, mode, **options)
        # Whatever has become of it by then, the answer is the same.
        scene.client.status()
        scene.manager.no_more()
        scene.manager.go()
        error = asked.exception(TIMEOUT)
    assert error is None or isinstance(error, SpfsError) and "cannot" in error.message, error
    assert scene.wait()["left"] == []
    assert user.run("os.pread(file, 99, 0)") == CONTENTS
    scene.replaced()
