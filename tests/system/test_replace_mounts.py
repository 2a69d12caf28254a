"""What is replaced where and by what: bind mounts, other namespaces, and the kinds of real mounts."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Iterator, List, Sequence

import pytest
from manager_kit import alive
from replace_kit import TIMEOUT, Scene, paused_at, scene
from surgery_kit import Victim

from spfs.errors import SpfsError
from spfs.linux import procfs
from spfs.linux.mountapi import MS
from spfs.testing import wait_until

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace]


def fill(scene: Scene) -> None:
    scene.both("directory", stat.S_IFDIR)
    scene.file("directory/inner", b"inner contents")
    scene.file("file", b"real contents")


def options_of(pid: object, path: Path) -> "tuple[set[str], set[str]]":
    """The options of the mount and of its file system, as process ``pid`` sees them."""
    lines = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    (fields,) = [fields for fields in lines if fields[4] == str(path)]
    return set(fields[5].split(",")), set(fields[-1].split(","))


# Where


def test_bind_mounts_of_the_whole_and_of_a_directory(scene: Scene) -> None:
    scene.delay()
    fill(scene)
    whole, part = scene.base / "whole", scene.base / "part"
    for path, source in ((whole, scene.mnt), (part, scene.mnt / "directory")):
        path.mkdir()
        scene.mount("--bind", str(source), str(path))
    users = [scene.victim(cwd=path) for path in (whole, part, scene.mnt)]
    for user, name in zip(users, ("file", "inner", "directory/inner")):
        user.run(f"import os\nfile = os.open('{name}', os.O_RDONLY)")
    scene.client.mode("stub")
    report = scene.replace(bindmounts=[str(whole), str(part), str(scene.base / "nowhere")])
    assert report["left"] == [] and report["mounts"] == 3 and report["mounts_left"] == []
    assert len(report["notes"]) == 1 and "nowhere" in report["notes"][0]
    assert [scene.types(path) for path in (whole, part)] == [["tmpfs"]] * 2
    assert (part / "inner").read_bytes() == b"inner contents" and os.listdir(part) == ["inner"]
    for user, path, contents in zip(users, (whole, part, scene.mnt), (b"real", b"inner", b"inner")):
        assert user.run("os.getcwd()") == str(path)
        assert user.run(f"os.read(file, {len(contents)})") == contents
    scene.replaced()


def test_what_is_mounted_on_it_stays_there(scene: Scene) -> None:
    scene.delay()
    fill(scene)
    nested = scene.mount("-t", "tmpfs", "nested", str(scene.mnt / "directory"))
    (nested / "own").write_text("own")
    victim = scene.victim()
    victim.run(f"own = open('{nested}/own')")
    scene.client.mode("stub")
    report = scene.replace()
    assert report["left"] == [] and report["mounts_left"] == []
    assert os.listdir(nested) == ["own"] and victim.run("own.read()") == "own"
    assert victim.run(f"own.close()\n__import__('os').path.ismount('{nested}')")
    assert (scene.mnt / "file").read_bytes() == b"real contents"
    subprocess.run(["umount", str(nested)], check=True)  # the way to it is the real file system's
    assert os.listdir(scene.mnt / "directory") == ["inner"]
    scene.replaced()


@pytest.mark.parametrize("propagation", ["private", "shared"])
def test_who_is_on_what_is_mounted_on_it_has_a_path_to_it(scene: Scene, propagation: str) -> None:
    """A directory, a single file, and something that is mounted on what is mounted there."""
    parent = scene.base / "parent"
    parent.mkdir()
    scene.mount("-t", "tmpfs", "parent", str(parent))
    subprocess.run(["mount", f"--make-{propagation}", str(parent)], check=True)
    scene.mnt = parent / "mnt"
    scene.mnt.mkdir()
    scene.delay()
    fill(scene)
    nested = scene.mount("-t", "tmpfs", "nested", str(scene.mnt / "directory"))
    (nested / "deeper").mkdir()
    deeper = scene.mount("-t", "tmpfs", "deeper", str(nested / "deeper"))
    (scene.base / "single").write_text("single")
    single = scene.mount("--bind", str(scene.base / "single"), str(scene.mnt / "file"))
    victims = [scene.victim(cwd=path) for path in (nested, deeper)]
    victims[0].run(f"import os\nsingle = os.open('{single}', os.O_RDONLY)")

    def table() -> "dict[str, str]":
        """Path → mount id and propagation."""
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return {line[4]: line[0] + line[6] for line in lines if Path(line[4]).is_relative_to(scene.mnt)}

    before = table()
    scene.client.mode("stub")
    assert scene.replace()["left"] == []
    after = table()
    assert before.pop(str(scene.mnt)) != after.pop(str(scene.mnt)) and before == after and len(after) == 3
    for victim, path in zip(victims, (nested, deeper)):
        assert victim.run("__import__('os').getcwd()") == str(path)
    assert victims[0].run("os.readlink(f'/proc/self/fd/{single}'), os.read(single, 9)") == (str(single), b"single")
    scene.replaced()


WALKER = """
import os, threading
stop, seen, wrong = threading.Event(), 0, []
def walk():
    global seen
    while not stop.is_set():
        try:
            with open(nested + "/own") as own, open(single) as file:
                found = own.read(), file.read()
            found += (os.stat(nested).st_dev, os.stat(single).st_ino, os.access(nested + "/none", os.F_OK))
            if found != expected:
                wrong.append(repr(found))
        except OSError as error:
            wrong.append(repr(error))
        seen += 1
walker = threading.Thread(target=walk)
walker.start()
"""


def test_who_is_on_his_way_to_what_is_mounted_on_it_gets_there(scene: Scene) -> None:
    """Without anything of the mount open, so nobody stops him: the mount is taken off under his feet."""
    scene.delay()
    fill(scene)
    nested = scene.mount("-t", "tmpfs", "nested", str(scene.mnt / "directory"))
    (nested / "own").write_text("own")
    (scene.base / "single").write_text("single")
    single = scene.mount("--bind", str(scene.base / "single"), str(scene.mnt / "file"))
    expected = ("own", "single", nested.stat().st_dev, single.stat().st_ino, False)
    walkers = [scene.victim() for _ in range(4)]
    for walker in walkers:
        walker.run(f"nested, single, expected = {(str(nested), str(single), expected)!r}")
        walker.run(WALKER)
    scene.client.mode("stub")
    assert scene.replace()["left"] == []
    for walker in walkers:
        so_far = walker.run("seen")
        wait_until(lambda: walker.run("seen") > so_far)
        walker.run("stop.set(); walker.join()")
        assert walker.run("wrong") == []
    scene.replaced()


@pytest.mark.parametrize("whom", ["job", "helper"])
@paused_at("handing over", "handed over")
def test_killed_while_what_is_mounted_on_it_is_handed_over(scene: Scene, whom: str) -> None:
    """Neither then nor later is it missing on its path."""
    scene.delay()
    fill(scene)
    names = ["directory", "other"]
    scene.both("other", stat.S_IFDIR)
    for name in names:
        (scene.mount("-t", "tmpfs", name, str(scene.mnt / name)) / name).touch()
    victims = [scene.victim(cwd=scene.mnt / name) for name in names]
    scene.client.mode("stub")
    scene.ask()
    helper = scene.manager.reached()
    assert [os.listdir(scene.mnt / name) for name in names] == [[name] for name in names]
    job = procfs.parse_stat(procfs.read(f"/proc/{helper}/stat")).parent
    os.kill(job if whom == "job" else helper, signal.SIGKILL)
    wait_until(lambda: not alive(helper))
    scene.manager.no_more()
    with pytest.raises(SpfsError, match="was killed" if whom == "job" else "helper process .* died|give the mounts"):
        scene.wait()
    wait_until(lambda: not scene.problems(), what="everybody to run")
    for again in (False, True):
        if again:
            assert scene.replace()["left"] == []
        assert [os.listdir(scene.mnt / name) for name in names] == [[name] for name in names]
    # Of those that had not come to the real mount yet, copies are there.
    moved = 1 if scene.manager.where == "handing over" else 2
    for victim, name in list(zip(victims, names))[:moved]:
        assert victim.run("__import__('os').getcwd()") == str(scene.mnt / name)
    scene.replaced()


NAMESPACES = {
    "mnt": (["unshare", "-m", "--propagation", "private"], ["mnt"]),
    "user,mnt": (["unshare", "-Ur", "-m", "--propagation", "private"], ["user", "mnt"]),
    "mnt,pid,net": (["unshare", "-m", "-p", "-n", "-f", "--mount-proc"], ["mnt", "pid", "net"]),
}


def container(scene: Scene, prefix: Sequence[str]) -> "tuple[Victim, int]":
    """A process in namespaces of its own, and its pid; unshare -f is its parent."""
    victim = scene.victim([*prefix, "--kill-child"] if "-f" in prefix else prefix)
    victim.run("import os")
    children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
    return victim, int(children[0]) if children and "-f" in prefix else victim.pid


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", list(NAMESPACES))
def test_a_target_in_other_namespaces(scene: Scene, kind: str, named: bool) -> None:
    prefix, names = NAMESPACES[kind]
    victim, pid = container(scene, prefix)
    scene.delay(ns_pid=pid, ns_list=names if named else None)
    fill(scene)
    assert scene.types() == []  # it is there, not here
    victim.run(f"os.chdir('{scene.mnt}')\nfile = os.open('file', os.O_RDWR)")
    scene.client.mode("stub")
    report = scene.replace(freeze_cgroup=scene.cgroup("v1", pid))
    assert report["left"] == [] and report["mounts_left"] == [] and report["mounts"] == 1
    assert {one["pid"] for one in report["processes"]} == {pid}
    assert victim.run("os.read(file, 100)") == b"real contents"
    assert victim.run("os.getcwd()") == str(scene.mnt)
    assert sorted(victim.run("os.listdir('.')")) == ["directory", "file"]
    assert victim.run(f"os.stat('{scene.mnt}/file').st_ino == os.fstat(file).st_ino")
    assert scene.types() == [] and os.listdir(scene.mnt) == []
    wait_until(lambda: not alive(scene.filesystem))


def test_a_target_with_a_root_of_its_own(scene: Scene) -> None:
    """Paths are those of the chroot tree, in a mount namespace that is another one, too."""
    root = scene.base / "tree"
    (root / "data").mkdir(parents=True)
    victim, pid = container(scene, NAMESPACES["mnt"][0])
    answer = scene.client.mount(scene.id, "/data", ns_pid=pid, root=str(root))
    scene.device, scene.filesystem = answer["device"], answer["pid"]
    fill(scene)
    victim.run(f"os.chroot('{root}')\nos.chdir('/data')\nfile = os.open('/data/file', os.O_RDONLY)")
    # The source is looked up in the target's root as well.
    (root / "export").mkdir()
    command = ["nsenter", "-t", str(pid), "-m", "mount", "--bind", str(scene.export), str(root / "export")]
    subprocess.run(command, check=True)
    scene.client.mode("stub")
    report = scene.replace(source="/export")
    assert report["left"] == [] and report["mounts"] == 1
    assert victim.run("os.getcwd()") == "/data" and victim.run("os.read(file, 100)") == b"real contents"
    assert sorted(victim.run("os.listdir('/data')")) == ["directory", "file"]
    assert os.listdir(root / "data") == []
    wait_until(lambda: not alive(scene.filesystem))


@pytest.mark.parametrize("scene", ["", "prepared"], indirect=True)
def test_a_namespace_that_was_cloned_after_the_mount(scene: Scene) -> None:
    scene.delay()
    fill(scene)
    if not scene.manager.where:
        clones: List[Victim] = [container(scene, NAMESPACES["mnt"][0])[0]]
    scene.client.mode("stub")
    scene.ask()
    if scene.manager.where:
        scene.manager.reached()
        clones = [container(scene, NAMESPACES["mnt"][0])[0]]
        scene.manager.no_more()
        scene.manager.go()
    report = scene.wait()
    assert report["left"] == [] and report["mounts_left"] == []
    for clone in clones:
        assert clone.run(f"open('{scene.mnt}/file', 'rb').read()") == b"real contents"
        assert "fuse.stubfs" not in Path(f"/proc/{clone.pid}/mountinfo").read_text().split(str(scene.mnt))[-1][:80]
    scene.replaced()


# By what


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (0, {"rw"}),
        (int(MS.RDONLY | MS.NOSUID | MS.NODEV | MS.NOEXEC), {"ro", "nosuid", "nodev", "noexec"}),
        (int(MS.NOATIME), {"rw", "noatime"}),
    ],
)
def test_a_tmpfs_with_flags_and_options(scene: Scene, flags: int, wanted: "set[str]") -> None:
    scene.delay()
    victim = scene.victim(cwd=scene.mnt)
    scene.client.mode("stub")
    report = scene.replace(source="the-real-one", fstype="tmpfs", flags=flags, options="size=1m,mode=750,nr_inodes=77")
    assert report["left"] == [] and report["moved"] == {"cwd": 1}
    per_mount, per_fs = options_of("self", scene.mnt)
    assert wanted <= per_mount and {"size=1024k", "mode=750", "nr_inodes=77"} <= per_fs
    status = os.stat(scene.mnt)
    assert stat.S_IMODE(status.st_mode) == 0o750
    assert victim.run("__import__('os').stat('.').st_dev") == status.st_dev
    assert scene.types() == ["tmpfs"]
    wait_until(lambda: not alive(scene.filesystem))


@pytest.fixture
def image(tmp_path: Path) -> Iterator[str]:
    """A loop device with an ext4 file system that holds "file"."""
    contents, path = tmp_path / "contents", tmp_path / "image"
    contents.mkdir()
    (contents / "file").write_bytes(b"real contents")
    (contents / "file").chmod(0o666)
    with open(path, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(contents), str(path)], check=True, timeout=TIMEOUT)
    done = subprocess.run(["losetup", "--find", "--show", str(path)], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_an_ext4_on_a_block_device(image: str, scene: Scene) -> None:
    scene.delay()
    fill(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import mmap, os\nfile = os.open('file', os.O_RDWR)\nshared = mmap.mmap(file, 13)")
    scene.client.mode("stub")
    report = scene.replace(source=image, fstype="ext4", flags=int(MS.NOATIME), options="errors=remount-ro")
    assert report["left"] == [] and scene.types() == ["ext4"]
    assert victim.run("os.read(file, 100) == shared[0:13] == b'real contents'")
    victim.run("shared[0:4] = b'REAL'\nshared.flush()")
    assert (scene.mnt / "file").read_bytes() == b"REAL contents"
    wait_until(lambda: not alive(scene.filesystem))
    victim.close()


def test_an_overlay(scene: Scene) -> None:
    scene.delay()
    fill(scene)
    for name in ("upper", "work"):
        (scene.real / name).mkdir()
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os\nfile = os.open('file', os.O_RDWR)")
    scene.client.mode("stub")
    layers = f"lowerdir={scene.export},upperdir={scene.real}/upper,workdir={scene.real}/work"
    report = scene.replace(source="overlay", fstype="overlay", flags=0, options=layers)
    assert report["left"] == [] and scene.types() == ["overlay"]
    assert victim.run("os.read(file, 4)") == b"real"
    victim.run("os.pwrite(file, b'REAL', 0)")
    assert (scene.mnt / "file").read_bytes() == b"REAL contents"
    assert (scene.export / "file").read_bytes() == b"real contents"
    wait_until(lambda: not alive(scene.filesystem))
    victim.close()


def test_a_read_only_bind_mount(scene: Scene) -> None:
    scene.delay()
    fill(scene)
    victim = scene.victim(cwd=scene.mnt)
    victim.run("import os\nfile, writes = os.open('file', os.O_RDONLY), os.open('directory/inner', os.O_RDWR)")
    scene.client.mode("stub")
    report = scene.replace(flags=int(MS.BIND | MS.RDONLY | MS.NOEXEC))
    # What was opened for writing cannot be on a file system that is only read.
    assert [one["path"] for one in report["left"]] == ["directory/inner"]
    assert "Read-only" in report["left"][0]["reason"] or "read-only" in report["left"][0]["reason"]
    assert {"ro", "noexec"} <= options_of("self", scene.mnt)[0]
    assert victim.run("os.read(file, 100)") == b"real contents"
