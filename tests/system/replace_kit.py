"""One delayed mount with everything around it: manager, mountpoint, real side, processes, cgroups; and pauses.

The processes are those of ``surgery_kit`` and programs in C. A scene is taken down by ``close``, which first looks at
what has become of its processes, cgroups and mounts: whatever a test did, they run and nothing else is mounted.
"""

from __future__ import annotations

import os
import select
import stat
import subprocess
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import pytest
from manager_kit import ENVIRONMENT, Manager, alive
from surgery_kit import Victim

from spfs import mounts
from spfs.linux import mountapi, procfs
from spfs.linux.mountapi import MS
from spfs.surgery.bulk import objects
from spfs.testing import wait_until

TIMEOUT = 30.0  # seconds for what takes a fraction of one on an idle machine

FREEZERS = [
    pytest.param("none"),
    pytest.param("v1", marks=pytest.mark.needs_cgroup1),
    pytest.param("v2", marks=pytest.mark.needs_cgroup2),
]
_CGROUPS = {"v1": ("/sys/fs/cgroup/freezer",), "v2": ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")}

# Where a replace can be made to stand still: the stages that it tells, and three moments within the blackout. (Others
# are only met by what has mounts on it: see PAUSED.)
PAUSES = ("begun", "prepared", "proxy", "frozen", "stopped", "exchanged", "operated", "switched", "verified")

# The manager with a replace step that waits at one point, each time it gets there, until it is told to go on. The
# point is reached when somebody reads the first fifo, and is left when somebody has written to the second.
PAUSED = """
import errno, os, select, sys
from spfs import freezer, jobs, mountnested, mountswitch, mountworker
from spfs.linux import mountapi
from spfs.surgery import scheduler

where, directory = sys.argv.pop(1), sys.argv.pop(1)

def pause(point):
    if point == where and os.path.exists(directory):
        # Opened before it is told, so that whoever is told finds a reader.
        go = os.open(directory + "/go", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(directory + "/reached", "w") as told:
            told.write(str(os.getpid()))
        poll = select.poll()
        poll.register(go, select.POLLIN)
        poll.poll()
        os.close(go)

def before(owner, name, point):
    real = getattr(owner, name)
    def replacement(*given, **named):
        pause(point)
        return real(*given, **named)
    setattr(owner, name, replacement)

def after(owner, name, point):
    real = getattr(owner, name)
    def replacement(*given, **named):
        result = real(*given, **named)
        pause(point)
        return result
    setattr(owner, name, replacement)

def progress(self, stage, details=None, real=jobs.Context.progress):
    real(self, stage, details)
    pause(stage)

jobs.Context.progress = progress
after(freezer.FreezerV1, "freeze", "frozen")
after(freezer.FreezerV2, "freeze", "frozen")
before(mountswitch.PreparedSwitch, "commit", "stopped")
after(mountswitch.PreparedSwitch, "commit", "exchanged")
after(scheduler, "run", "operated")
# In the helper of a mount namespace: what is mounted on the old mount is being moved, and has been.
before(mountworker.Worker, "_unmount_covering", "handing over")
after(mountnested, "hand_over", "handed over")
if where == "stuck":
    # As when a call within the blackout does not return.
    from spfs import blackoutguard
    blackoutguard.LIMIT = 0.5
    before(mountswitch.PreparedSwitch, "commit", "stuck")
if where == "bare":
    # As before Linux 6.5: between the umount of the old and the move of the new one, nothing is on the path.
    def refuse(mount_fd, dirfd, path="", flags=0, real=mountapi.move_mount):
        if flags & mountapi.MoveMount.BENEATH:
            raise OSError(errno.ENOSYS, "Function not implemented")
        real(mount_fd, dirfd, path, flags)
    mountapi.move_mount = refuse
    after(mountapi, "umount2", "bare")
from spfs.cli import manager
manager.main()
"""


class PausingManager(Manager):
    """``where``: one of PAUSES, or any other stage; "" for none. ``prefix``: a command that the manager is run by."""

    def __init__(self, base: Path, where: str = "", prefix: Sequence[str] = ()) -> None:
        super().__init__(base)
        self.where = where
        self._prefix = prefix
        self._pauses = self._told_to_pause = base / "pauses"
        self._pauses.mkdir()
        for name in ("reached", "go"):
            os.mkfifo(self._pauses / name)

    def start(self, *arguments: str, environment: Optional[Dict[str, str]] = None) -> "PausingManager":
        command = [*self._prefix, sys.executable, "-c", PAUSED, self.where, str(self._told_to_pause)]
        command += ["-d", "-vv", "--work-dir", str(self.work), *arguments]
        subprocess.run(command, env={**os.environ, **ENVIRONMENT, **(environment or {})}, check=True, timeout=TIMEOUT)
        self.pid = self.client().status()["manager"]["pid"]
        return self

    def reached(self, timeout: float = TIMEOUT) -> int:
        """Wait until the replace stands still; the pid of its process."""
        return int(_read_fifo(self._pauses / "reached", timeout))

    def go(self) -> None:
        """Go on, once, from where it stands still."""
        with open(self._pauses / "go", "w") as file:
            file.write("go")

    def no_more(self) -> None:
        """From now on nothing is paused. To be called while the replace stands still, or is not there."""
        if self._pauses == self._told_to_pause:
            self._pauses = self._pauses.rename(self._pauses.with_name("no-pauses"))


def _read_fifo(path: Path, timeout: float) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError(f"nothing was written to {path} within {timeout} s")
        # Its end comes with the writer's close, which has been about to happen since the first byte.
        os.set_blocking(fd, True)
        with open(fd, closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


class Scene:
    """A delayed mount on ``mnt``, whose real side is the directory ``export`` of a tmpfs, bound in its place.

    Times are in seconds. ``close`` raises AssertionError for what a test must not leave behind.
    """

    def __init__(self, base: Path, where: str = "", prefix: Sequence[str] = ()) -> None:
        self.id = f"{base.name}-{os.getpid()}"  # tests that run at the same time have scenes of their own
        self.base, self.mnt, self.real = base, base / "mnt", base / "real"
        self.export = self.real / "export"
        self.manager = PausingManager(base, where, prefix)
        self.processes: List[Victim] = []
        self.may_be_traced: List[int] = []
        self.device = self.filesystem = 0
        self.control = ""
        self._mounted: List[Path] = []
        self._cgroups: List[Path] = []
        self._stack = ExitStack()
        self.mnt.mkdir()
        self.real.mkdir()
        self.mount("-t", "tmpfs", "-o", "mode=755", "real", str(self.real))
        self.export.mkdir()
        self.export.chmod(0o777)
        self.manager.start()
        self.client = self.manager.client(TIMEOUT)

    # The mount and its two sides

    def mount(self, *arguments: str) -> Path:
        """mount(8), on the last argument; taken away in the end."""
        subprocess.run(["mount", *arguments], check=True, timeout=TIMEOUT)
        self.expect_mount(Path(arguments[-1]))
        return Path(arguments[-1])

    def expect_mount(self, path: Path) -> None:
        """That something is mounted there belongs to the test."""
        if path not in self._mounted:
            self._mounted.append(path)

    def delay(self, mode: str = "restore", **options: Any) -> "Scene":
        """Put the delayed mount on ``mnt``."""
        self.expect_mount(self.mnt)
        answer = self.client.mount(self.id, str(self.mnt), mode, **options)
        self.device, self.filesystem, self.control = answer["device"], answer["pid"], answer["control"]
        return self

    def scaffold(self, **sizes: Optional[int]) -> None:
        """Create files (of that size), directories (None) and fifos (-1) for the restore; "__" in a name is "/"."""
        kinds = {None: stat.S_IFDIR, -1: stat.S_IFIFO}
        records = []
        for name, size in sizes.items():
            kind = kinds.get(size, stat.S_IFREG)
            record: Dict[str, Any] = {"path": name.replace("__", "/"), "mode": kind | 0o777}
            records.append({**record, "size": size} if kind == stat.S_IFREG else record)
        self.client.create(self.id, records)

    def file(self, name: str, contents: bytes = b"real contents") -> str:
        """A file of zeros on the delayed mount and one with ``contents`` on the real side; its path."""
        self.client.create(self.id, [{"path": name, "mode": stat.S_IFREG | 0o666, "size": len(contents)}])
        self.real_file(name, contents)
        return str(self.mnt / name)

    def real_file(self, name: str, contents: bytes = b"real contents") -> Path:
        path = self.export / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        path.chmod(0o666)
        return path

    def both(self, name: str, kind: int) -> str:
        """A directory or a fifo on both sides; its path."""
        self.client.create(self.id, [{"path": name, "mode": kind | 0o777}])
        path = self.export / name
        os.mkdir(path) if kind == stat.S_IFDIR else os.mkfifo(path)
        path.chmod(0o777)
        return str(self.mnt / name)

    # Processes

    def victim(self, prefix: Sequence[str] = (), **options: Any) -> Victim:
        """A Python process, in the scene's directory; killed in the end."""
        made = Victim(prefix, **options)
        self.processes.append(made)
        self._stack.callback(made.close)
        return made

    def cleanup(self, callback: Callable[[], object]) -> None:
        """To be called in the end, when the delayed mount is gone."""
        self._stack.callback(callback)

    def cgroup(self, kind: str, *members: int) -> Optional[str]:
        """A cgroup that can be frozen, with ``members`` in it; removed in the end. None for "none"."""
        if kind == "none":
            return None
        top = next(path for path in _CGROUPS[kind] if os.path.exists(f"{path}/cgroup.procs"))
        path = Path(top, f"spfs-test-{os.getpid()}-replace-{len(self._cgroups)}")
        path.mkdir()
        self._cgroups.append(path)
        for pid in members:
            (path / "cgroup.procs").write_text(str(pid))
        return str(path)

    # The replace

    def ask(self, **options: Any) -> str:
        """Ask for the real side to be bound in the mount's place, or for what ``options`` say."""
        given = {"source": str(self.export), "fstype": "none", "flags": int(MS.BIND), "begin": "release", **options}
        return self.client.replace(self.id, **given)

    def wait(self, timeout: float = TIMEOUT) -> Dict[str, Any]:
        """The report of the replace, when it has ended well; else its error is raised."""
        return dict(self.client.wait(self.id, timeout)["replace"]["report"])

    def replace(self, **options: Any) -> Dict[str, Any]:
        self.ask(**options)
        return self.wait()

    def row(self) -> Dict[str, Any]:
        return self.manager.row(self.id)

    def held_by(self, *pids: int) -> None:
        """Wait until a request of each process is held."""
        wanted = set(pids)
        wait_until(lambda: wanted <= {one["pid"] for one in self.client.held(self.id)}, TIMEOUT, "requests held")

    def replaced(self) -> None:
        """The real side, and it alone, is on the path; FUSE is gone."""
        assert self.types() == ["tmpfs"], self.types()
        assert os.stat(self.mnt).st_dev == os.stat(self.real).st_dev
        # Ends by itself only when nobody holds anything of its file system. The device number may be another's then.
        wait_until(lambda: not alive(self.filesystem), what="the file system process to end")
        assert self.instances() == []

    def untouched(self, mode: str = "stub") -> None:
        """Nothing has changed: the delayed mount is there, in that mode."""
        assert self.types() == ["fuse.stubfs"], self.types()
        assert (self.row()["mode"], self.row()["state"]) == (mode, "mounted")
        assert alive(self.filesystem)

    def types(self, path: Optional[Path] = None) -> List[str]:
        """The types of the file systems mounted just there."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.partition(" - ")[2].split()[0] for line in lines if line.split()[4] == str(path or self.mnt)]

    def instances(self) -> List[mounts.Instance]:
        """Where the delayed mount is, in all mount namespaces."""
        return [one for one in mounts.instances(self.device) if one.mount.source.startswith(f"spfs:{self.id}:")]

    def users(self) -> Dict[int, List[str]]:
        """Who still holds what of the delayed mount, of all processes; no file system is asked."""
        found: Dict[int, List[str]] = {}
        device = f" {os.major(self.device):02x}:{os.minor(self.device):02x} "
        for pid in procfs.processes():
            links = list(_links(pid))
            held = [link for link, thing in zip(links, objects(links)) if thing and thing.device == self.device]
            held += [line for line in _maps(pid) if device in line]
            if held and pid != os.getpid():
                found[pid] = held
        return found

    # The end

    def problems(self) -> List[str]:
        """What no test may cause, whatever it does: a stopped, traced or frozen process, a mount of nobody's."""
        found: List[str] = []
        pids = [victim.pid for victim in self.processes if victim.process.poll() is None]
        for pid in pids:
            found += [f"process {pid}: {state}" for state in standing_still(pid) if pid not in self.may_be_traced]
        for path in self._cgroups:
            for name, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
                if (path / name).exists() and (path / name).read_text().strip() != thawed:
                    found.append(f"cgroup {path}: {(path / name).read_text().strip()}")
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            place = Path(line.split()[4])
            if self.base in place.parents and place not in self._mounted:
                found.append(f"mount {line}")
        return found

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._take_down)
            found: List[str] = []

            def none() -> bool:
                found[:] = self.problems()
                return not found

            try:
                wait_until(none, 5)
            except TimeoutError:
                raise AssertionError("left behind:\n  " + "\n  ".join(found)) from None

    def _take_down(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._unmount)
            stack.callback(self._remove_cgroups)
            stack.callback(self._stack.close)
            stack.callback(self._end_manager)
            for path in self._cgroups:
                _thaw(path)
            # Killed first and waited for last: one that waits for a lock of the kernel's dies when the mount is gone.
            for victim in self.processes:
                victim.process.kill()

    def _end_manager(self) -> None:
        self.manager.no_more()
        if self.manager.pid and alive(self.manager.pid):
            self.manager.client(TIMEOUT).unmount(force=True)
        self.manager.clean_up()
        left = [name for name in os.listdir(self.manager.work) if name.endswith((".sock", ".result"))]
        assert not left, left
        log = self.manager.log()
        # Whatever a test provokes, the manager has an answer for it: a traceback is always a defect.
        assert "Traceback" not in log, log

    def _unmount(self) -> None:
        for path in reversed(self._mounted):
            while self.types(path):
                mountapi.umount2(str(path), mountapi.MNT_DETACH | mountapi.UMOUNT_NOFOLLOW)

    def _remove_cgroups(self) -> None:
        for path in reversed(self._cgroups):
            wait_until(lambda: not (path / "cgroup.procs").read_text(), what=f"{path} to be empty")
            path.rmdir()


def standing_still(pid: int) -> List[str]:
    """What is wrong with the tasks of a process: stopped, traced, or with blocked freezing. Empty if it runs."""
    found: List[str] = []
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            status = Path(f"/proc/{pid}/task/{tid}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            if fields["State"][0] in "Tt" or fields["TracerPid"] != "0":
                found.append(f"task {tid} is {fields['State']}, traced by {fields['TracerPid']}")
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def _links(pid: int) -> Iterator[str]:
    yield from (f"/proc/{pid}/{name}" for name in ("root", "exe"))
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            yield f"/proc/{tid}/cwd"
            yield from (f"/proc/{tid}/fd/{name}" for name in os.listdir(f"/proc/{tid}/fd"))
    except OSError:
        pass


def _maps(pid: int) -> List[str]:
    try:
        return Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []


def _thaw(path: Path) -> None:
    for name, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        if (path / name).exists():
            (path / name).write_text(thawed)


@contextmanager
def scene_at(base: Path, where: str = "", prefix: Sequence[str] = ()) -> Iterator[Scene]:
    made = Scene(base, where, prefix)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def scene(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Its parameter, if any, is the point where the replace pauses."""
    with scene_at(tmp_path, getattr(request, "param", "")) as made:
        yield made


def paused_at(*points: str) -> pytest.MarkDecorator:
    """The test gets a scene whose replace pauses at the point, for each of them."""
    return pytest.mark.parametrize("scene", points, indirect=True)


def statements(text: str) -> str:
    """A block of a test's source as statements of their own."""
    return textwrap.dedent(text)
