"""FUSE mounts exchanged for a real one: in several namespaces, with all that can be on and around them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Sequence

import pytest
from mount_kit import SWITCHED, Places, daemons, mounts_at, places, read_in  # noqa: F401

from spfs import mountclones, mounts, mountswitch
from spfs.errors import SpfsError
from spfs.instances import Instance
from spfs.linux import mountapi
from spfs.target import Target
from spfs.testing import process_state, wait_until
from stubfs.fusemount import fuse_mount

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


def fuse(places: Places, propagation: str = "private") -> int:  # noqa: F811
    """A FUSE mount at mnt with directories a/b and nest in it; its device."""
    places.base(propagation)
    os.makedirs(places.path("source/a/b"))
    os.mkdir(places.path("source/nest"))
    return places.bindfs("source", "mnt")


def real(places: Places) -> int:  # noqa: F811
    return places.tmpfs("a/b", "nest", who="REAL")


def on(pid: object, path: str) -> List[str]:
    """The types of the mounts stacked at exactly ``path``."""
    return [line[line.index("-") + 1] for line in mounts_at(pid, path) if line[4] == path]


@contextmanager
def reader(path: str) -> Iterator["tuple[int, Callable[[], List[str]]]"]:
    """A process that reads ``path`` as fast as it can.

    Its pid, and a call that ends it and returns each different thing that it saw, in order.
    """
    program = (
        "import os,sys\nlast=None\nprint('on',flush=True)\n"
        "while os.getppid()==int(sys.argv[2]):\n"
        "  try: seen=open(sys.argv[1]).read()\n"
        "  except OSError as e: seen=repr(e)\n"
        "  if seen!=last: print(seen,flush=True)\n"
        "  last=seen"
    )
    process = subprocess.Popen(
        ["python3", "-c", program, path, str(os.getpid())], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    lines = [process.stdout.readline().strip()]

    def end() -> List[str]:
        process.kill()
        assert process.stdout is not None
        return lines + process.stdout.read().splitlines()

    with process:
        try:
            yield process.pid, end
        finally:
            process.kill()


@pytest.mark.parametrize("propagation", ["private", "shared"])
def test_a_reader_in_a_loop_sees_no_error(places: Places, propagation: str) -> None:  # noqa: F811
    device = fuse(places, propagation)
    with reader(places.path("mnt/who")) as (pid, end):
        with mounts.prepare_switch(mounts.instances(device), real(places)) as prepared:
            if SWITCHED == "exchanged":  # then the path is bare for a moment: a matter of the freezer
                os.kill(pid, signal.SIGSTOP)
                wait_until(lambda: process_state(pid) == "T")
            outcome = prepared.commit()
            os.kill(pid, signal.SIGCONT)
            assert list(outcome.switched.values()) == [SWITCHED] and outcome.left == ()
            assert prepared.verify() == []
        wait_until(lambda: on("self", places.path("mnt")) == ["tmpfs"])
        assert set(end()) <= {"FUSE", "REAL"}
    assert read_in("self", places.path("mnt/who")) == "REAL"


@pytest.mark.parametrize("way", ["attached ahead", "attached late"])
@pytest.mark.parametrize("propagation", ["private", "shared"])
def test_what_is_mounted_on_it_is_itself_moved_and_never_missing(
    places: Places, monkeypatch: pytest.MonkeyPatch, propagation: str, way: str  # noqa: F811
) -> None:
    if SWITCHED == "exchanged":
        pytest.skip("what is mounted on an exchanged mount is copied")
    move, detached = mountapi.move_mount, []

    def attached_only(mount_fd: int, dirfd: int, path: str = "", flags: int = 0) -> None:
        # As before Linux 6.15. In the helper all that is put on anything before the first "beneath".
        if flags & mountapi.MoveMount.BENEATH:
            detached.append(mount_fd)
        elif path == "nest" and not detached:
            raise OSError(errno.EINVAL, "Invalid argument")
        move(mount_fd, dirfd, path, flags)

    if way == "attached late":
        monkeypatch.setattr(mountapi, "move_mount", attached_only)
    device = fuse(places, propagation)
    nested = places.path("mnt/nest")
    places.mount("-t", "tmpfs", "nested", nested)
    Path(nested, "who").write_text("NESTED")
    places.mount("--bind", places.path("mnt"), places.path("second"))  # a peer, on which it is not mounted
    (before,) = mounts_at("self", nested)
    with reader(f"{nested}/who") as (_, end):
        with mounts.prepare_switch(mounts.instances(device), real(places)) as prepared:
            prepared.prepare_nested()
            assert list(prepared.commit().switched.values()) == [SWITCHED] * 2
            assert prepared.verify() == []
        assert end() == ["NESTED"]
    (after,) = mounts_at("self", nested)
    assert (after[0], after[6]) == (before[0], before[6]) and after[1] != before[1]
    assert on("self", places.path("mnt")) == ["tmpfs"]
    # The new ones are peers as the old ones were: what is mounted on one comes to the other.
    places.mount("-t", "tmpfs", "later", places.path("mnt/a"))
    assert on("self", places.path("second/a")) == (["tmpfs"] if propagation == "shared" else [])


def test_it_is_fast_once_it_is_prepared(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    ratios = []
    for _ in range(5):
        found, mount_fd, start = mounts.instances(device), real(places), time.monotonic()
        with mounts.prepare_switch(found, mount_fd) as prepared:
            preparing = time.monotonic() - start
            ratios.append(prepared.commit().seconds / preparing)
            prepared.undo()
    assert sorted(ratios)[2] < 0.5  # no figure in seconds: machines differ, and other tests run at the same time


def test_a_stopped_file_system_is_asked_nothing(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    (daemon,) = daemons(f"bindfs {places.path('source')}")
    os.kill(daemon, signal.SIGSTOP)
    try:
        with mounts.prepare_switch(mounts.instances(device), real(places), timeout=5) as prepared:
            prepared.commit()
            assert prepared.verify() == []
        assert read_in("self", places.path("mnt/who")) == "REAL"
    finally:
        os.kill(daemon, signal.SIGCONT)


@pytest.mark.parametrize(
    ("propagation", "arguments"),
    [
        ("private", ("-m",)),
        ("private", ("-m", "-n", "-p", "-f")),
        ("shared", ("-m", "--propagation", "unchanged")),
        ("shared", ("-m", "--propagation", "slave")),
        ("shared", ("-m", "--propagation", "private")),
        ("shared", ("-m", "-U", "-r", "--propagation", "unchanged")),
    ],
)
@pytest.mark.parametrize("way", ["direct", "used up"])
def test_bind_mounts_nested_mounts_and_copies_in_a_namespace(
    places: Places,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    propagation: str,
    arguments: "tuple[str, ...]",
    way: str,
) -> None:
    if way == "used up":  # as on kernels before 6.15, and with mounts made by mount(2)
        clone = mountapi.open_tree

        def attached_only(dirfd: int, path: str = "", flags: int = 0) -> int:
            if flags & mountapi.OPEN_TREE_CLONE and dirfd == mount_fd and os.getcwd() != "/":
                raise OSError(errno.EINVAL, "Invalid argument")
            return clone(dirfd, path, flags)

        monkeypatch.setattr(mountclones.mountapi, "open_tree", attached_only)
        monkeypatch.chdir(places.directory)
    device = fuse(places, propagation)
    mount_fd = real(places)
    places.mount("--bind", places.path("mnt"), places.path("whole"))
    places.mount("--bind", places.path("mnt/a"), places.path("part"))
    places.mount("-o", "remount,bind,ro", places.path("part"))
    places.mount("-t", "tmpfs", "nested", places.path("mnt/nest"))
    places.mount("-t", "tmpfs", "deeper", places.path("mnt/nest/deeper"))
    Path(places.path("mnt/nest/deeper/kept")).touch()
    pid = places.namespace(*arguments)
    before = {who: len(mounts_at(who, str(places.directory))) for who in ("self", pid)}
    found = mounts.instances(device)
    assert len(found) == 6

    with mounts.prepare_switch(found, mount_fd) as prepared:
        assert {root.prefix for root in prepared.roots.values()} == {"", "a"}
        prepared.prepare_nested()
        outcome = prepared.commit()
        assert (len(outcome.switched), outcome.left) == (6, ())
        assert prepared.verify() == []
        for one in found:
            # The root that references go to is on the very mount that is on the path.
            path = one.mountpoint if one.namespace == found[0].namespace else f"/proc/{pid}/root{one.mountpoint}"
            expected = os.open(path, os.O_PATH)
            ids = [Path(f"/proc/self/fdinfo/{fd}").read_text().split("mnt_id:")[1].split()[0]
                   for fd in (expected, prepared.roots[one.mount_id].fd)]
            os.close(expected)
            assert ids[0] == ids[1], one
    for who in ("self", pid):
        assert len(mounts_at(who, str(places.directory))) == before[who]  # none lost, none doubled
        root = f"/proc/{who}/root"
        for name in ("mnt", "whole"):
            assert read_in(who, places.path(f"{name}/who")) == "REAL"
        assert os.listdir(f"{root}{places.path('mnt/nest/deeper')}") == ["kept"]
        assert os.listdir(f"{root}{places.path('part')}") == ["b"]
        assert "ro" in mounts_at(who, places.path("part"))[0][5].split(",")
        assert "ro" not in mounts_at(who, places.path("mnt"))[0][5].split(",")


@pytest.mark.parametrize("propagation", ["private", "shared"])
@pytest.mark.parametrize("committed", [False, True])
def test_undone_everything_is_as_before(places: Places, propagation: str, committed: bool) -> None:  # noqa: F811
    device = fuse(places, propagation)
    places.mount("--bind", places.path("mnt/a"), places.path("part"))
    places.mount("-t", "tmpfs", "nested", places.path("mnt/nest"))
    pid = places.namespace("-m", "--propagation", "unchanged")
    before = [(one.mountpoint, one.namespace, len(one.nested)) for one in mounts.instances(device)]
    mount_fd = real(places)
    prepared = mounts.prepare_switch(mounts.instances(device), mount_fd)
    prepared.prepare_nested()
    helpers = [helper.pid for helper in prepared._helpers.values()]
    if committed:
        prepared.commit()
        assert mounts.instances(device) == []
    prepared.undo()
    after = [(one.mountpoint, one.namespace, len(one.nested)) for one in mounts.instances(device)]
    assert sorted(after) == sorted(before)
    assert mounts.instances(os.fstat(mount_fd).st_dev) == []
    assert not any(os.path.exists(f"/proc/{helper}") for helper in helpers)
    assert read_in(pid, places.path("mnt/who")) == "FUSE"


def test_a_locked_mount_is_covered_and_said_to_be_left(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    places.mount("-t", "tmpfs", "nested", places.path("mnt/nest"))
    Path(places.path("mnt/nest/who")).write_text("NESTED")
    pid = places.namespace("-m", "-U", "-r", "--propagation", "private")
    with mounts.prepare_switch(mounts.instances(device), real(places)) as prepared:
        outcome = prepared.commit()
        assert sorted(outcome.switched.values()) == sorted([SWITCHED, "covered"])
        ((left, why),) = outcome.left
        assert left.pid == pid and "locked" in why
        assert [one.mount_id for one in prepared.verify()] == [left.mount_id]
    assert read_in(pid, places.path("mnt/who")) == "REAL"
    assert on(pid, places.path("mnt")) == ["fuse", "tmpfs"]
    assert on("self", places.path("mnt")) == ["tmpfs"]
    for who in (os.getpid(), pid):  # there it is locked, too: a copy shows the same
        assert read_in(who, places.path("mnt/nest/who")) == "NESTED"


@pytest.mark.parametrize("propagation", ["private", "shared"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_where_beneath_is_refused_the_mounts_are_exchanged(
    places: Places, monkeypatch: pytest.MonkeyPatch, number: int, propagation: str  # noqa: F811
) -> None:
    move, shared = mountapi.move_mount, propagation == "shared"

    def old_kernel(mount_fd: int, dirfd: int, path: str = "", flags: int = 0) -> None:
        if flags & mountapi.MoveMount.BENEATH:
            raise OSError(number, os.strerror(number))
        move(mount_fd, dirfd, path, flags)

    device = fuse(places, propagation)
    for nested in ("mnt/nest", "mnt/nest/deeper"):
        places.mount("-t", "tmpfs", "nested", places.path(nested))
    pid = places.namespace("-m", "--propagation", "unchanged")

    def there(kind: str) -> None:
        for who in ("self", pid):
            found = {line[4]: line[line.index("-") + 1] for line in mounts_at(who, places.path("mnt"))}
            names = {"mnt": kind, "mnt/nest": "tmpfs", "mnt/nest/deeper": "tmpfs"}
            assert found == {places.path(name): fstype for name, fstype in names.items()}
            assert len(mounts_at(who, places.path("mnt"))) == 3

    monkeypatch.setattr(mountapi, "move_mount", old_kernel)
    with mounts.prepare_switch(mounts.instances(device), real(places)) as prepared:
        outcome = prepared.commit()
        assert sorted(outcome.switched.values()) == ["exchanged", "propagated" if shared else "exchanged"]
        assert prepared.verify() == []
        there("tmpfs")
        prepared.undo()
    there("fuse")


def test_missing_places_on_the_real_side_change_nothing(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    places.mount("-t", "tmpfs", "nested", places.path("mnt/nest"))
    with mounts.prepare_switch(mounts.instances(device), places.tmpfs("a")) as prepared:
        with pytest.raises(SpfsError, match="mnt/nest has no place on the real file system") as caught:
            prepared.prepare_nested()
        assert caught.value.errno == errno.ENOENT
    places.mount("--bind", places.path("mnt/a"), places.path("part"))
    with pytest.raises(SpfsError, match="cannot replace mount .*part of a .*No such file") as caught:
        mounts.prepare_switch(mounts.instances(device), places.tmpfs("nest"))
    assert caught.value.errno == errno.ENOENT
    link = places.tmpfs("nest")
    os.symlink("/etc", f"/proc/self/fd/{link}/a")
    with pytest.raises(SpfsError, match="part of a") as caught:
        mounts.prepare_switch(mounts.instances(device), link)
    assert caught.value.errno == errno.ELOOP
    assert {tuple(on("self", places.path(name))) for name in ("mnt", "part")} == {("fuse",)}


def test_a_covered_mount_is_left(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    places.mount("-t", "tmpfs", "over", places.path("mnt"))
    with mounts.prepare_switch(mounts.instances(device), real(places)) as prepared:
        outcome = prepared.commit()
        ((left, why),) = outcome.left
        assert left.covered and "another mount" in why and outcome.switched == {}
    assert on("self", places.path("mnt")) == ["fuse", "tmpfs"]


@pytest.mark.parametrize("between", [False, True])
def test_a_part_of_it_mounted_on_itself(places: Places, between: bool) -> None:  # noqa: F811
    device = fuse(places)
    inner = places.path("mnt/nest")
    if between:
        places.mount("-t", "ramfs", "between", inner)
        inner += "/inner"
    places.mount("--bind", places.path("mnt/a"), inner)
    found = mounts.instances(device)
    assert sorted((one.root, one.inside) for one in found) == [("", False), ("a", True)]
    with mounts.prepare_switch(found, real(places)) as prepared:
        outcome = prepared.commit()
        assert len(outcome.switched) == 2
        assert prepared.verify() == []
    assert os.listdir(inner) == ["b"]
    assert on("self", inner) == ["tmpfs"]
    assert on("self", places.path("mnt/nest")) == (["ramfs"] if between else ["tmpfs"])


def test_a_namespace_that_ends_in_between(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    pid = places.namespace("-m")
    found = mounts.instances(device)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    wait_until(lambda: len(mounts.instances(device)) == 1)
    with mounts.prepare_switch(found, real(places)) as prepared:
        ((left, why),) = prepared.left
        assert left.pid == pid and "gone" in why
        assert list(prepared.commit().switched.values()) == [SWITCHED]
        assert prepared.verify() == []


def test_one_that_was_cloned_in_between_is_told(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    fd = real(places)
    with mounts.prepare_switch(mounts.instances(device), fd) as prepared:
        pid = places.namespace("-m")
        prepared.commit()
        (missed,) = prepared.verify()
        assert missed.pid == pid
        with mounts.prepare_switch([missed], fd) as again:
            again.commit()
            assert again.verify() == []
    assert read_in(pid, places.path("mnt/who")) == "REAL"


def test_a_helper_that_was_killed(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    pid = places.namespace("-m")
    prepared = mounts.prepare_switch(mounts.instances(device), real(places))
    victim = next(helper.pid for helper in prepared._helpers.values())
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(SpfsError, match="cannot switch the mounts"):
        prepared.commit()
    with pytest.raises(SpfsError, match="cannot give the mounts back"):
        prepared.undo()
    assert time.monotonic() - start < 5
    assert on("self", places.path("mnt")) == on(pid, places.path("mnt")) == ["fuse"]


@pytest.mark.parametrize("root", [None, "tree"])
@pytest.mark.parametrize("arguments", [("-m",), ("-m", "-n", "-p", "-f", "-U", "-r", "--mount-proc")], ids=" ".join)
def test_one_that_was_attached_in_the_namespace(
    places: Places, root: Optional[str], arguments: "tuple[str, ...]"  # noqa: F811
) -> None:
    places.base()
    os.makedirs(places.path("tree/data"))
    pid = places.namespace(*arguments)
    old = places.tmpfs(who="OLD")
    with Target.pin(pid, root=places.path(root) if root else None) as target:
        mounts.attach(old, target, "/data" if root else places.path("tree/data"))
    device = os.fstat(old).st_dev
    with mounts.prepare_switch(mounts.instances(device), real(places)) as prepared:
        # Of a less privileged namespace, but not locked: it was not copied there.
        assert list(prepared.commit().switched.values()) == [SWITCHED]
        assert prepared.verify() == []
    assert read_in(pid, places.path("tree/data/who")) == "REAL"
    assert on(pid, places.path("tree/data")) == ["tmpfs"]


def test_a_fuse_mount_made_detached_and_attached_elsewhere(places: Places) -> None:  # noqa: F811
    places.base()
    os.mkdir(places.path("data"))
    pid = places.namespace("-m", "-n", "-U", "-r")
    device_fd, mount_fd = fuse_mount(subtype="stubfs", source="late")
    try:
        with Target.pin(pid) as target:
            mounts.attach(mount_fd, target, places.path("data"))
        os.close(mount_fd)  # or it would hold the mount
        mount_fd = -1
        (line,) = mounts_at(pid, places.path("data"))
        assert line[-3:-1] == ["fuse.stubfs", "late"]
        major, minor = line[2].split(":")
        with mounts.prepare_switch(mounts.instances((int(major), int(minor))), real(places)) as prepared:
            assert list(prepared.commit().switched.values()) == [SWITCHED]  # and nobody ever answered a request
            assert prepared.verify() == []
    finally:
        for fd in (device_fd, mount_fd):
            if fd >= 0:
                os.close(fd)


def test_failing_half_way_nothing_is_left(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    device = fuse(places)
    pids = [places.namespace("-m") for _ in range(2)]
    before = {pid: mounts_at(pid, str(places.directory)) for pid in pids}
    fds = set(os.listdir("/proc/self/fd"))
    started: List[int] = []
    pin = mountswitch.pin_namespace

    def second_fails(instance: Instance, targets: Sequence[Target] = ()) -> Target:
        started.append(instance.namespace)
        if len(started) == 3:
            raise SpfsError("cannot enter", errno=errno.EPERM)
        return pin(instance, targets)

    monkeypatch.setattr(mountswitch, "pin_namespace", second_fails)
    with pytest.raises(SpfsError, match="cannot enter"):
        mounts.prepare_switch(mounts.instances(device), real(places))
    assert len(set(os.listdir("/proc/self/fd")) - fds) <= 1  # the real mount, which is the test's
    assert {pid: mounts_at(pid, str(places.directory)) for pid in pids} == before
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [child for child in children if int(child) not in pids]


def test_what_covers_it_meanwhile_is_never_unmounted(places: Places) -> None:  # noqa: F811
    device = fuse(places)
    with mounts.prepare_switch(mounts.instances(device), real(places)) as prepared:
        places.mount("-t", "ramfs", "over", places.path("mnt"))
        outcome = prepared.commit()
        ((left, why),) = outcome.left
        assert outcome.switched == {} and why == "another mount covers it by now"
        assert prepared.verify() == mounts.instances(device) != []
    assert on("self", places.path("mnt"))[-1] == "ramfs"


def test_a_switch_that_was_killed_half_way_leaves_nothing_beneath(places: Places) -> None:  # noqa: F811
    """The real mount was put beneath, and the old one not taken off: the next switch makes that one the only one."""
    device = fuse(places)
    places.mount("-t", "tmpfs", "nested", places.path("mnt/nest"))
    real_fd = real(places)
    with mounts.prepare_switch(mounts.instances(device), real_fd) as prepared:
        prepared.prepare_nested()
        prepared._ask_all("place", prepared._leaders, time.monotonic() + 10)
    assert sorted(on("self", places.path("mnt"))) == (["fuse", "tmpfs"] if SWITCHED == "beneath" else ["fuse"])
    for undone in (True, False):
        with mounts.prepare_switch(mounts.instances(device), real_fd) as prepared:
            outcome = prepared.commit()
            assert set(outcome.switched.values()) == {"propagated" if SWITCHED == "beneath" else "exchanged"}
            assert prepared.verify() == []
            assert on("self", places.path("mnt")) == on("self", places.path("mnt/nest")) == ["tmpfs"]
            assert read_in(os.getpid(), places.path("mnt/who")) == "REAL"
            (root,) = prepared.roots.values()
            assert os.fstat(root.fd).st_dev == os.stat(places.path("mnt")).st_dev
            if undone:
                prepared.undo()
                assert read_in(os.getpid(), places.path("mnt/who")) == "FUSE"
                device = os.stat(places.path("mnt")).st_dev


def test_another_part_of_the_real_one_beneath_the_old_mount_is_covered(places: Places) -> None:  # noqa: F811
    places.base()
    os.mkdir(places.path("mnt"))
    real_fd = real(places)
    part = mountapi.open_tree(real_fd, "nest", mountapi.OPEN_TREE_CLONE)
    mountapi.move_mount(part, mountapi.AT_FDCWD, places.path("mnt"))
    os.close(part)
    device = places.bindfs("source", "mnt")
    with mounts.prepare_switch(mounts.instances(device), real_fd) as prepared:
        assert list(prepared.commit().switched.values()) == ["exchanged"]
        assert prepared.verify() == []
        assert read_in(os.getpid(), places.path("mnt/who")) == "REAL"
        assert on("self", places.path("mnt")) == ["tmpfs", "tmpfs"]
