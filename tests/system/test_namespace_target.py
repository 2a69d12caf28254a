"""Targets: pinned namespaces and roots of real processes, in life and after death."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
from mount_kit import Places, places  # noqa: F401

from spfs import nschild
from spfs.errors import SpfsError
from spfs.linux import namespaces
from spfs.target import Target
from spfs.testing import wait_until

pytestmark = pytest.mark.needs_root


def test_only_what_differs_is_pinned(places: Places) -> None:  # noqa: F811
    pid = places.namespace("-m", "-n")
    with Target.pin(pid) as target:
        assert sorted(target.namespaces) == ["mnt", "net"]
        assert target.mount_namespace == namespaces.inode(pid, "mnt") != namespaces.inode("self", "mnt")
        assert not target.dead
        assert str(pid) in target.describe()
    with Target.pin(pid, ["net", "uts"]) as target:
        assert sorted(target.namespaces) == ["net"]


def test_our_own() -> None:
    with Target.pin() as target:
        assert (target.namespaces, target.fds(), target.dead) == ({}, [], False)
        assert target.mount_namespace == namespaces.inode("self", "mnt")
        assert Target.from_inodes(target.identity()).namespaces == {}


def test_bad_requests_are_refused(places: Places, tmp_path: Path) -> None:  # noqa: F811
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "file").touch()
    pid = places.namespace("-m")
    for arguments, number, words in [
        ((ended.pid, None, None), errno.ESRCH, "no such process"),
        ((0, None, None), errno.EINVAL, "not a process id"),
        ((pid, ["mnt", "time machine"], None), errno.EINVAL, "time machine"),
        ((pid, None, "/nonesuch"), errno.ENOENT, "/nonesuch"),
        ((None, None, "/nonesuch"), errno.ENOENT, "/nonesuch"),
        ((pid, None, str(tmp_path / "file")), errno.ENOTDIR, "Not a directory"),
    ]:
        with pytest.raises(SpfsError, match=words) as caught:
            Target.pin(*arguments)  # type: ignore[arg-type]
        assert caught.value.errno == number


def test_a_zombie_cannot_be_pinned() -> None:
    zombie = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(SpfsError) as caught:
            Target.pin(zombie.pid)
        assert caught.value.errno == errno.ESRCH
    finally:
        zombie.wait()


def test_pinned_namespaces_outlive_their_process(places: Places) -> None:  # noqa: F811
    pid = places.namespace("-m")
    with Target.pin(pid) as target:
        identity = target.identity()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert target.dead
        with nschild.run(lambda: (namespaces.inode("self", "mnt"), []), target) as result:
            assert result.value == identity["mnt"]
        with pytest.raises(SpfsError, match="no process is left") as caught:
            Target.from_inodes(identity)
        assert caught.value.errno == errno.ESRCH


def test_pinned_again_through_another_process(places: Places) -> None:  # noqa: F811
    pid = places.namespace("-m", "-n")
    other = subprocess.Popen(["nsenter", "-t", str(pid), "-m", "-n", "sleep", "1000"])
    try:
        with Target.pin(pid) as target:
            identity = target.identity()
            assert set(identity) == {"mnt", "net", "pid_number", "pid_start"}
        wait_until(lambda: namespaces.inode(other.pid, "mnt") == identity["mnt"])
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with Target.from_inodes(identity) as again:
            assert again.pid == other.pid
            assert {name: again.identity()[name] for name in ("mnt", "net")} == {
                name: identity[name] for name in ("mnt", "net")
            }
    finally:
        other.kill()
        other.wait()


def test_a_reused_pid_is_not_taken_for_the_process(places: Places) -> None:  # noqa: F811
    # What a restarted manager sees after a pid was reused: the number lives, in other namespaces.
    first, second = places.namespace("-m"), places.namespace("-m")
    with Target.pin(first) as target:
        identity = {**target.identity(), "pid_number": second}
    with Target.from_inodes(identity) as again:
        assert again.pid == first


def test_a_root_is_resolved_beneath_the_targets(places: Places, tmp_path: Path) -> None:  # noqa: F811
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "link").symlink_to("/inner")  # means tree/inner to whoever is chrooted there
    (tree / "inner" / "here").touch()
    with Target.pin(None, root=str(tree)) as chrooted:
        with nschild.run(lambda: (os.listdir("/inner"), []), chrooted) as result:
            assert result.value == ["here"]
    pid = places.namespace("-m")
    with Target.pin(pid, root=str(tree)) as target:
        with nschild.run(lambda: (sorted(os.listdir("/")), []), target) as result:
            assert result.value == ["inner", "link"]
        with nschild.run(lambda: (os.listdir("/link"), []), target) as result:
            assert result.value == ["here"]
    for nothing in ("(null)", "", "/", None):
        with Target.pin(pid, root=nothing) as target:
            assert target.root is None


def test_a_process_of_our_own_namespaces_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    process = subprocess.Popen(["sleep", "1000"])
    with Target.pin(process.pid) as target:
        identity = target.identity()
        assert target.namespaces == {}
    with Target.from_inodes(identity) as again:
        assert again.pid == process.pid
    process.kill()
    process.wait()
    with Target.from_inodes(identity, str(tmp_path)) as again:
        assert again.pid is None
        with nschild.run(lambda: (os.listdir("/"), []), again) as result:
            assert result.value == ["here"]
