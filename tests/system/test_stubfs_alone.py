"""stubfs as mount(8), users without root and Python scripts use it."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from stubfs_kit import TOP, Process, as_user, environment, outcome, wait_until
from testing_kit import let_others_in

import stubfs
from spfs.linux import namespaces
from stubfs import cli, fusemount, readiness, syscalls
from stubfs.errors import StubfsError, UsageError

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
ALICE = 1001
NOBODY = 65534  # fusermount serves those alone who have a name
CLONE_NEWNS = 0x20000


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "a mountpoint"
    path.mkdir()
    return path


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[None]:
    """The command where mount(8) finds it, which keeps no PATH, so that its shell has a standard one. Only for us."""
    directory = tmp_path / "bin"
    directory.mkdir()
    command = directory / "stubfs"
    start = f"import sys; sys.path.insert(0, {str(TOP)!r}); from stubfs.cli import main; sys.exit(main())"
    command.write_text(f"#!{sys.executable}\n{start}\n")
    command.chmod(0o755)
    # A thread's own: the test's other threads, if any, stay where they are.
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        private_mounts()
        subprocess.run(["mount", "--bind", str(directory), "/usr/local/bin"], check=True)
        yield
    finally:
        namespaces.setns(before, CLONE_NEWNS)
        os.close(before)


def private_mounts() -> None:
    syscalls.unshare(CLONE_NEWNS)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount(*arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """mount(8), which calls the command by way of /sbin/mount.fuse."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise AssertionError(done.stderr)
    return done


def umount(path: Path) -> None:
    subprocess.run(["umount", str(path)], check=True, timeout=30)


def mount_line(path: Path) -> List[str]:
    """(options, type, source) of what is mounted there."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split(" ")[4].replace("\\040", " ") == str(path):
            return [fields.split(" ")[5], *rest.split(" ")]
    raise AssertionError(f"nothing is mounted on {path}")


@pytest.mark.usefixtures("installed")
class TestMountCommand:
    def test_a_restore_mount(self, mountpoint: Path) -> None:
        mount("-t", "fuse.stubfs", "a source", str(mountpoint), "-o", f"uid={ALICE},gid=7,umask=027,nosuid,noatime")
        try:
            options, kind, source, *_ = mount_line(mountpoint)
            assert (kind, source) == ("fuse.stubfs", "a\\040source") and "nosuid" in options.split(",")
            status = os.stat(mountpoint)
            assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (ALICE, 7, 0o750)
            (mountpoint / "file").write_text("text")
            assert (mountpoint / "file").read_text() == "text"
        finally:
            umount(mountpoint)
        assert os.listdir(mountpoint) == []

    def test_an_fstab_line(self, mountpoint: Path, tmp_path: Path) -> None:
        real, table, log = tmp_path / "real", tmp_path / "fstab", tmp_path / "log"
        real.mkdir()
        (real / "file").write_text("text")
        where = str(mountpoint).replace(" ", "\\040")
        table.write_text(f"{real} {where} fuse.stubfs mode=proxy,ro,noauto,nofail,_netdev,x-test,log={log} 0 0\n")
        mount("--fstab", str(table), str(mountpoint))
        try:
            assert (mountpoint / "file").read_text() == "text"
            assert mount_line(mountpoint)[2] == str(real)
            with pytest.raises(OSError) as caught:
                (mountpoint / "new").write_text("")
            assert caught.value.errno == errno.EROFS
            mount("-i", "-o", "remount,rw", str(mountpoint))
            (mountpoint / "new").write_text("")
            assert (real / "new").exists() and log.exists()
        finally:
            umount(mountpoint)

    def test_what_fails_says_why(self, mountpoint: Path) -> None:
        bad_option = mount("-t", "fuse.stubfs", "x", str(mountpoint), "-o", "nonsense", check=False)
        assert bad_option.returncode and "-o nonsense: no such option" in bad_option.stderr
        bad_mode = mount("-t", "fuse.stubfs", "x", str(mountpoint), "-o", "mode=nonsense", check=False)
        assert bad_mode.returncode and "invalid choice: 'nonsense'" in bad_mode.stderr
        no_directory = mount("-t", "fuse.stubfs", "/nowhere", str(mountpoint), "-o", "mode=proxy", check=False)
        assert no_directory.returncode and "cannot use /nowhere" in no_directory.stderr
        assert str(mountpoint) not in Path("/proc/self/mountinfo").read_text()


def test_options_that_the_kernel_looks_after(mountpoint: Path, tmp_path: Path) -> None:
    let_others_in(tmp_path)
    program = shutil.copy("/bin/true", tmp_path / "true")
    with stubfs.mount(mountpoint, "proxy", tmp_path, options="noexec,default_permissions,max_read=4096") as fs:
        with pytest.raises(PermissionError):
            subprocess.run([f"{fs.path}/true"], check=True)
        assert "max_read=4096" in mount_line(mountpoint)[3] and "default_permissions" in mount_line(mountpoint)[3]
        os.mkfifo(tmp_path / "fifo", 0o600)

        def may_open() -> bool:
            try:
                os.close(os.open(f"{fs.path}/fifo", os.O_RDONLY | os.O_NONBLOCK))
            except PermissionError:
                return False
            return True

        with closing(Process(as_user(ALICE, ALICE, [], may_open))) as process:
            assert process.result() is False  # without default_permissions the kernel would not have asked
    assert program


class closing:
    """A process that is gone afterwards."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def __enter__(self) -> Process:
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.close()


def where_users_may_mount(tmp_path: Path, action: Callable[[], Any]) -> Any:
    """What root gets in a mount namespace whose /dev/fuse is open to all, as it is on most machines."""
    let_others_in(tmp_path)
    device = tmp_path / "fuse-device"
    os.mknod(device, 0o20666, os.makedev(10, 229))
    os.chmod(device, 0o666)

    def enter() -> Any:
        private_mounts()
        subprocess.run(["mount", "--bind", str(device), "/dev/fuse"], check=True)
        return action()

    with closing(Process(enter)) as process:
        return process.result(60)


def serve_as_nobody(mountpoint: Path, *arguments: str) -> int:
    """The pid of a file system of that user's, mounted. Forked: a user may not be able to run this interpreter."""
    for module in ("array", "fuse", "resource", "shutil", "socket", "tempfile"):
        importlib.import_module(module)  # nor to read its library
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            tempfile.tempdir = None  # as TMPDIR says now, not when this process first asked
            options = ["-f", "--ready-fd", str(tell), *arguments, str(mountpoint)]
            os._exit(as_user(NOBODY, NOBODY, [], lambda: cli.main(options))())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    os.close(tell)
    assert os.read(ready, 1) == b"\n"
    os.close(ready)
    return pid


def test_without_root(tmp_path: Path, mountpoint: Path) -> None:
    private = tmp_path / "tmp"
    private.mkdir()
    for path in (private, mountpoint):
        os.chown(path, NOBODY, NOBODY)

    def as_nobody() -> List[Any]:
        (mountpoint / "file").write_text("text")
        os.link(mountpoint / "file", mountpoint / "link")
        found: List[Any] = [
            mount_line(mountpoint)[1:3], sorted(os.listdir(mountpoint)), os.stat(mountpoint / "link").st_nlink,
            os.stat(mountpoint / "file").st_uid, (mountpoint / "link").read_text(), len(os.listdir(private)),
        ]  # fmt: skip
        found.append(outcome(lambda: os.mknod(mountpoint / "device", 0o20600, os.makedev(1, 3))))
        found.append(outcome(lambda: os.chown(mountpoint / "file", 0, 0)))
        subprocess.run(["fusermount", "-u", str(mountpoint)], check=True)
        return found

    def work() -> List[Any]:
        os.environ["TMPDIR"] = str(private)
        pid = serve_as_nobody(mountpoint)
        others = outcome(lambda: os.listdir(mountpoint))  # not even root
        with closing(Process(as_user(NOBODY, NOBODY, [], as_nobody))) as process:
            found = process.result()
        _, status = os.waitpid(pid, 0)
        return [others, *found, os.waitstatus_to_exitcode(status), os.listdir(private)]

    expected = [["fuse.stubfs", "stubfs"], ["file", "link"], 2, NOBODY, "text", 1, "EPERM", "EPERM"]
    assert where_users_may_mount(tmp_path, work) == ["EACCES", *expected, 0, []]


def test_options_without_root(tmp_path: Path, mountpoint: Path) -> None:
    os.chown(mountpoint, NOBODY, NOBODY)

    def work() -> List[Any]:
        pid = serve_as_nobody(mountpoint, "-o", "ro,noexec,max_read=8192", "a, b\\c")
        options, kind, source, kernels = mount_line(mountpoint)
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        return [
            {"ro", "noexec", "nosuid", "nodev"} <= set(options.split(",")), kind, source, "max_read=8192" in kernels,
            os.waitstatus_to_exitcode(status), str(mountpoint) in Path("/proc/self/mountinfo").read_text(),
        ]  # fmt: skip

    # mountinfo writes a space and a backslash in octal.
    assert where_users_may_mount(tmp_path, work) == [True, "fuse.stubfs", "a,\\040b\\134c", True, 0, False]


class TestPython:
    def test_a_context_manager(self, mountpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "file").write_text("real")
        with stubfs.mount(mountpoint) as fs:
            (mountpoint / "file").write_text("staged")
            assert fs.path == str(mountpoint) and os.path.ismount(fs.path)
            assert fs.pid != os.getpid() and fs.mode("stub").mode == "stub"
            assert fs.mode("proxy", tmp_path / "real").mode == "proxy"
            assert (mountpoint / "file").read_text() == "real"
            with pytest.raises(StubfsError, match="cannot use /nowhere"):
                fs.mode("proxy", "/nowhere")
        assert os.listdir(mountpoint) == []
        fs.close()  # a second time: nothing

    def test_errors_have_a_type_and_leave_nothing(self, mountpoint: Path) -> None:
        with pytest.raises(UsageError, match="-o nonsense"):
            stubfs.mount(mountpoint, options="nonsense")
        with pytest.raises(UsageError, match="'nonsense': no such mode"):
            stubfs.mount(mountpoint, "nonsense")
        with pytest.raises(StubfsError, match="cannot mount on /nowhere") as caught:
            stubfs.mount("/nowhere")
        assert caught.value.errno == errno.ENOENT and caught.value.hint == "make it: mkdir -p /nowhere"
        with stubfs.mount(mountpoint):
            with pytest.raises(StubfsError, match="is mounted there already"):
                stubfs.mount(mountpoint)

    def test_it_ends_with_who_made_it(self, mountpoint: Path, tmp_path: Path) -> None:
        """By kill -9: nothing of it stays, in the directory of temporary files either."""
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        made = f"import stubfs, sys; fs = stubfs.mount({str(mountpoint)!r})"
        script = f"{made}; print(fs.pid, flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", script], env={**environment(), "TMPDIR": str(temporary)}, cwd=TOP,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            assert os.path.ismount(mountpoint)
            process.send_signal(signal.SIGKILL)
        wait_until(lambda: not os.path.ismount(mountpoint) and not os.path.exists(f"/proc/{pid}"), 10)
        assert os.listdir(temporary) == []

    def test_its_process_is_killed(self, mountpoint: Path) -> None:
        with stubfs.mount(mountpoint) as fs:
            os.kill(fs.pid, signal.SIGKILL)
            wait_until(lambda: outcome(lambda: os.listdir(mountpoint)) == "ENOTCONN", 10)
        assert not os.path.ismount(mountpoint) and os.listdir(mountpoint) == []
        with pytest.raises(StubfsError, match="it has been closed"):
            fs.mode("stub")
        with pytest.raises(StubfsError, match="it has been closed"):
            fs.pid

    def test_its_process_is_killed_and_it_cannot_be_unmounted(
        self, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where somebody else has mounted it, and there is no root."""
        mount = stubfs.mount(mountpoint)

        def refuse(path: str) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)

        with monkeypatch.context() as patch:
            patch.setattr(fusemount, "detach", refuse)
            os.kill(mount.pid, signal.SIGKILL)
            with pytest.raises(StubfsError, match=f"cannot unmount {mountpoint}: .*umount -l") as caught:
                mount.close()
        assert caught.value.errno == errno.EPERM
        fusemount.unmount_dead(str(mountpoint))

    def test_a_start_that_takes_too_long(self, mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Killed after it has mounted, and before it serves."""

        def too_long(ready: int, timeout: float) -> None:
            wait_until(lambda: str(mountpoint).replace(" ", "\\040") in Path("/proc/self/mountinfo").read_text(), 10)
            raise TimeoutError(errno.ETIMEDOUT, "not ready")

        monkeypatch.setattr(readiness, "wait", too_long)
        with pytest.raises(StubfsError, match="give it longer"):
            stubfs.mount(mountpoint)
        assert not os.path.ismount(mountpoint)

    def test_a_forked_child_leaves_it_to_its_parent(self, mountpoint: Path) -> None:
        with stubfs.mount(mountpoint) as fs:
            with closing(Process(fs.close)) as process:
                process.result()
                process.wait()
            (mountpoint / "file").write_text("text")
            assert fs.mode("stub").mode == "stub"
        assert not os.path.ismount(mountpoint)

    def test_somebody_unmounts_it(self, mountpoint: Path) -> None:
        with stubfs.mount(mountpoint):
            umount(mountpoint)
        assert not os.path.ismount(mountpoint)

    def test_a_busy_interpreter_gets_its_answers(self, mountpoint: Path) -> None:
        """What would hang for good if a thread of this process served the mount."""
        import mmap

        with stubfs.mount(mountpoint):
            (mountpoint / "file").write_bytes(b"x" * 8192)
            with open(mountpoint / "file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as area:
                began = time.monotonic()
                assert area[5000] == ord("x")  # a page fault, with the interpreter's lock held
                assert time.monotonic() - began < 60


def test_on_the_current_directory(mountpoint: Path) -> None:
    """Where "python -m" would look for modules first: in the mount, before it is served."""
    command = [sys.executable, "-m", "stubfs", ".", "--record", "../record"]
    try:
        subprocess.run(command, cwd=mountpoint, env=environment(), check=True, timeout=30)
        assert os.path.ismount(mountpoint) and os.listdir(mountpoint) == []
    finally:
        umount(mountpoint)


def test_not_on_what_it_runs_from() -> None:
    for directory in (TOP, Path(sys.prefix)):
        with pytest.raises(StubfsError, match="this program's own files are there"):
            fusemount.check_mountpoint(str(directory))


def test_exit_codes(tmp_path: Path) -> None:
    def status(*arguments: str, **variables: str) -> int:
        return subprocess.run(
            [sys.executable, "-m", "stubfs", *arguments], env={**environment(), **variables}, capture_output=True,
            timeout=30,
        ).returncode  # fmt: skip

    assert status("--help") == status("--version") == 0
    assert status(str(tmp_path / "none")) == 1
    assert status(str(tmp_path), "-o", "nonsense") == status() == status("--mode", "proxy", str(tmp_path)) == 2
    assert status(str(tmp_path), FUSE_LIBRARY_PATH="/none/libfuse.so.2") == 3
