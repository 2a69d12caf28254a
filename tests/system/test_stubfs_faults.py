"""Hung real file systems, sudden deaths, bad command lines: the others go on, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Iterator, List, Optional

import pytest
from stubfs_kit import LIMIT, Filesystem, abort, command, environment, mount_new, mounted, wait_until
from testing_kit import let_others_in

from stubfs import fusemount, messages, syscalls, wire
from stubfs.client import FilesystemClient
from stubfs.errors import StubfsError

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path) as filesystem:
        yield filesystem


class TestHungBackingStore:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[Filesystem]:
        with mounted(tmp_path, "proxy", name="server") as filesystem:
            for i in range(20):
                (filesystem.real / f"f{i}").write_text("contents")
            yield filesystem

    def test_one_hung_request_leaves_the_others_served(self, server: Filesystem, tmp_path: Path) -> None:
        with mounted(tmp_path, "restore", name="client") as client:
            (client.path / "quick").write_text("x")
            keeper = open(client.path / "quick", "rb", buffering=0)
            os.unlink(client.path / "quick")  # nameless, so it stays in the staging directory
            client.proxy(server.path)
            assert (client.path / "f0").read_text() == "contents"
            server.client.mode("stub")
            hung = [client.run(partial(Path.read_text, client.path / f"f{i}")) for i in range(20)]
            server.wait_held(20)
            durations: List[float] = []
            for _ in range(50):
                start = time.perf_counter()
                assert keeper.read() in (b"x", b"")
                durations.append(time.perf_counter() - start)
            assert sorted(durations)[25] < 0.05
            assert client.client.status().mode == "proxy"
            assert not any(process.finished() for process in hung)
            # Whoever hangs in the real file system can be killed as well.
            hung[0].kill()
            hung[0].wait(3)
            server.proxy()
            assert [process.result() for process in hung[1:]] == ["contents"] * 19
            keeper.close()
            threads = len(os.listdir(f"/proc/{client.daemon.pid}/task"))
            assert threads < 20, "idle threads are not given up"

    def test_a_change_of_mode_does_not_wait_for_ever(self, server: Filesystem, tmp_path: Path) -> None:
        with mounted(tmp_path, "restore", name="client") as client:
            client.proxy(server.path)
            server.client.mode("stub")
            hung = client.run(lambda: os.stat(client.path / "f1").st_size)
            server.wait_held(1)
            start = time.monotonic()
            client.client.mode("stub")
            assert time.monotonic() - start < 8
            server.proxy()
            assert not hung.finished(0.1)  # its next request is held
            client.proxy(server.path)
            assert hung.result() == 8
            assert os.stat(client.path / "f2").st_size == 8


class TestEnds:
    def test_killed(self, fs: Filesystem) -> None:
        fs.client.mode("stub")
        waiting = fs.run(lambda: os.path.exists(fs.path / "f"))
        fs.wait_held()
        fs.daemon.kill()
        fs.daemon.wait(5)
        assert waiting.result() is False  # ENOTCONN
        with pytest.raises(OSError) as caught:
            os.stat(fs.path)
        assert caught.value.errno == errno.ENOTCONN
        assert "umount -l" in refused(str(fs.path))
        # The socket file of a dead one is replaced by the next.
        syscalls.umount2(os.fsencode(fs.path), syscalls.MNT_DETACH)
        with mounted(fs.base.parent, "stub", name=fs.base.name) as again:
            assert again.client.status().mode == "stub"

    @pytest.mark.parametrize("how", ["client", "SIGTERM", "SIGINT"])
    def test_quit_while_requests_are_held(self, fs: Filesystem, how: str) -> None:
        (fs.path / "f").write_text("x")
        fs.client.mode("stub")

        def attempt() -> Optional[int]:
            try:
                os.stat(fs.path / "f")
            except OSError as error:
                return error.errno
            return None

        waiting = [fs.run(attempt) for _ in range(5)]
        fs.wait_held(5)
        if how == "client":
            fs.client.quit()
        else:
            fs.daemon.send_signal(getattr(signal, how))
        assert fs.daemon.wait(5) == 0
        for process in waiting:
            assert process.result() in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
        assert not os.path.exists(fs.socket_path)
        assert str(fs.path) not in Path("/proc/self/mountinfo").read_text()

    def test_quit_leaves_what_somebody_else_mounted_over_it(self, fs: Filesystem) -> None:
        mount_new("tmpfs", fs.path)
        (fs.path / "theirs").touch()
        fs.client.quit()
        fs.daemon.wait(5)
        assert (fs.path / "theirs").exists()
        for _ in range(2):
            syscalls.umount2(os.fsencode(fs.path), syscalls.MNT_DETACH)

    def test_serves_after_a_lazy_unmount_until_the_last_user_is_gone(self, fs: Filesystem) -> None:
        with open(fs.path / "f", "w+") as file:
            syscalls.umount2(os.fsencode(fs.path), syscalls.MNT_DETACH)
            file.write("still served")
            file.flush()
            assert os.fstat(file.fileno()).st_size == 12
            assert fs.daemon.poll() is None
        assert fs.daemon.wait(5) == 0

    def test_aborted_connection(self, fs: Filesystem) -> None:
        fs.client.mode("stub")
        waiting = fs.run(lambda: os.path.exists(fs.path / "f"))
        fs.wait_held()
        abort(fs.device)
        assert waiting.result() is False
        assert fs.daemon.wait(5) == 0

    def test_somebody_elses_mount(self, tmp_path: Path) -> None:
        """/dev/fd/N: served, never mounted or unmounted; nothing else is inherited."""
        device, mount_fd = fusemount.fuse_mount()
        path = tmp_path / "mnt"
        path.mkdir()
        read, write = os.pipe()
        os.set_inheritable(write, True)
        stray_read, stray_write = os.pipe()
        try:
            process = subprocess.Popen(
                command(f"/dev/fd/{device}", "-f", "--socket-path", str(tmp_path / "sock"), "--ready-fd", str(write)),
                env=environment(), pass_fds=[device, write, stray_write],
            )  # fmt: skip
            for fd in (write, stray_write):
                os.close(fd)
            assert os.read(read, 10) == b"\n" and os.read(read, 10) == b""
            assert os.read(stray_read, 1) == b"", "kept open by the file system"
            os.close(device)
            syscalls.move_mount(mount_fd, os.fsencode(path))
            (path / "f").write_text("x")
            with FilesystemClient(str(tmp_path / "sock"), LIMIT) as client:
                assert client.status().mountpoint == f"/dev/fd/{device}"
                client.quit()
            assert process.wait(5) == 0
            assert str(path) in Path("/proc/self/mountinfo").read_text()
        finally:
            for fd in (read, stray_read, mount_fd):
                os.close(fd)
            syscalls.umount2(os.fsencode(path), syscalls.MNT_DETACH)
        assert not (tmp_path / "sock").exists()

    def test_in_the_background(self, tmp_path: Path) -> None:
        path, sock = tmp_path / "mnt", str(tmp_path / "sock")
        path.mkdir()
        done = subprocess.run(
            command(str(path), "--socket-path", sock, "--log", str(tmp_path / "log")),
            env=environment(), capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        (path / "f").write_text("usable at once")
        with FilesystemClient(sock, LIMIT) as client:
            pid = client.status().pid
            assert os.getsid(pid) != os.getsid(0) and os.readlink(f"/proc/{pid}/cwd") == "/"
            client.quit()
        wait_until(lambda: not Path(f"/proc/{pid}/fd").exists() or not os.path.exists(f"/proc/{pid}/exe"), 5)


def refused(*arguments: str, **settings: object) -> str:
    """The one line that a start is refused with."""
    done = subprocess.run(
        command(*arguments), env={**environment(), **settings.pop("env", {})},  # type: ignore[dict-item]
        capture_output=True, text=True, timeout=LIMIT, **settings,  # type: ignore[call-overload]
    )  # fmt: skip
    assert done.returncode not in (0, None) and done.stdout == ""
    lines: List[str] = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("stubfs: cannot "), done.stderr
    return lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_as_soon_as_it_is_ready(tmp_path: Path, number: int) -> None:
    """Before the loop is there, which sees to it: the mount goes, and is not left without a server."""
    code = (
        "import os, sys; from stubfs import cli, daemon; serve = daemon.Daemon.serve; "
        f"daemon.Daemon.serve = lambda self, lifeline: (os.kill(os.getpid(), {int(number)}), serve(self, lifeline)); "
        f"sys.exit(cli.main(['-f', '--lifeline-fd', '0', {str(tmp_path)!r}]))"
    )
    with subprocess.Popen([*command()[:1], "-c", code], env=environment(), stdin=subprocess.PIPE) as process:
        try:
            if number == signal.SIGHUP:  # as when the terminal is closed: nothing happens
                wait_until(lambda: os.path.ismount(tmp_path), LIMIT)
                assert process.stdin is not None and os.listdir(tmp_path) == []
                process.stdin.close()
            assert process.wait(LIMIT) == 0
        finally:
            process.kill()
    assert not os.path.ismount(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["fusemount.OwnMount.__init__", "session.Session.start"])
def test_a_signal_while_it_starts(tmp_path: Path, number: int, moment: str) -> None:
    """When it has been mounted, and is not ready yet."""
    code = (
        f"import os, sys; from stubfs import cli, fusemount, session; real = {moment}\n"
        f"def then_kill(*given): real(*given); os.kill(os.getpid(), {int(number)})\n"
        f"{moment} = then_kill; sys.exit(cli.main(['-f', {str(tmp_path)!r}]))"
    )
    ended = subprocess.run([*command()[:1], "-c", code], env=environment(), timeout=LIMIT, capture_output=True)
    assert (ended.returncode, ended.stderr) == (128 + number, b"")
    assert not os.path.ismount(tmp_path)


class TestRefusals:
    def test_mountpoints(self, tmp_path: Path, fs: Filesystem) -> None:
        assert "No such file or directory (make it: mkdir -p" in refused(str(tmp_path / "none"))
        (tmp_path / "file").touch()
        assert "not a directory" in refused(str(tmp_path / "file"))
        assert "mounted there already" in refused(str(fs.path))
        assert "/dev/fd/999" in refused("/dev/fd/999")
        assert "not /dev/fuse" in refused("/dev/fd/0", stdin=subprocess.DEVNULL)
        fs.client.mode("stub")  # also where a look at the place could block
        assert "mounted there already" in refused(str(fs.path))

    def test_a_device_without_a_mount(self) -> None:
        device = os.open("/dev/fuse", os.O_RDWR)
        try:
            assert "is it the device of a mount" in refused(f"/dev/fd/{device}", "-f", pass_fds=[device])
        finally:
            os.close(device)

    def test_options(self, tmp_path: Path) -> None:
        path = str(tmp_path)
        assert "--proxy-dir DIR" in refused(path, "--mode", "proxy")
        assert "add --mode proxy" in refused(path, "--proxy-dir", path)
        assert "give a directory" in refused(path, "--mode", "proxy", "--proxy-dir", f"{path}/none")
        assert "-o nonsense" in refused(path, "-o", "ro,nonsense")
        assert "--help" in refused(path, "--mode", "other")
        assert "--help" in refused()
        assert "--ready-fd 77" in refused(path, "--ready-fd", "77")
        assert "cannot log to" in refused(path, "--log", f"{path}/none/log")

    def test_sockets(self, tmp_path: Path, fs: Filesystem) -> None:
        path = tmp_path / "other"
        path.mkdir()
        assert "at most 107 bytes" in refused(str(path), "--socket-path", "/tmp/" + "s" * 103)
        assert "choose another" in refused(str(path), "--socket-path", fs.socket_path)
        (tmp_path / "occupied").write_text("a file")
        assert "choose another" in refused(str(path), "--socket-path", str(tmp_path / "occupied"))
        assert (tmp_path / "occupied").read_text() == "a file"
        assert "make its directory" in refused(str(path), "--socket-path", str(tmp_path / "none" / "sock"))
        assert os.listdir(path) == []

    def test_what_the_machine_lacks(self, tmp_path: Path) -> None:
        path = str(tmp_path)
        assert "apt install libfuse2" in refused(path, env={"FUSE_LIBRARY_PATH": "/none/libfuse.so.2"})
        without_device = (
            "import os, sys; import stubfs.fusemount as m; m.DEVICE = '/none/fuse'; "
            f"from stubfs.cli import main; sys.exit(main([{path!r}]))"
        )
        done = subprocess.run(
            [*command()[:1], "-c", without_device], env=environment(), capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode == 3 and "modprobe fuse" in done.stderr and done.stderr.count("\n") == 1
        without_descriptors = (
            "import resource, sys; from stubfs.cli import main; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); "
            f"sys.exit(main([{path!r}]))"
        )
        done = subprocess.run(
            [*command()[:1], "-c", without_descriptors], env=environment(), capture_output=True, text=True,
            timeout=LIMIT,
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.startswith("stubfs: cannot start: ")
        assert done.stderr.endswith(": Too many open files\n") and done.stderr.count("\n") == 1
        gone = f"{path}/gone"
        nowhere = (
            f"import os, sys; from stubfs.cli import main; os.mkdir({gone!r}); os.chdir({gone!r}); os.rmdir({gone!r}); "
            f"sys.exit(main([{path!r}, '--socket-path', 'relative']))"
        )
        done = subprocess.run(
            [*command()[:1], "-c", nowhere], env=environment(), capture_output=True, text=True, timeout=LIMIT
        )
        assert (done.returncode, done.stderr) == (1, "stubfs: cannot start: No such file or directory\n")
        without_root = (
            "import os, sys; from stubfs.cli import main; import fuse, resource, stubfs.session; "
            "os.environ['PATH'] = ''; os.setgid(65534); os.setuid(65534); "
            f"sys.exit(main([{path!r}]))"
        )
        let_others_in(tmp_path)
        os.chmod(tmp_path, 0o777)
        done = subprocess.run(
            [*command()[:1], "-c", without_root], env=environment(), capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode != 0 and done.stderr.count("\n") == 1 and "stubfs: cannot " in done.stderr
        assert path not in Path("/proc/self/mountinfo").read_text()

    def test_nothing_is_left_of_a_failed_start(self, tmp_path: Path) -> None:
        sock = tmp_path / "sock"
        refused(str(tmp_path), "--socket-path", str(sock), env={"FUSE_LIBRARY_PATH": "/none/libfuse.so.2"})
        read, write = os.pipe()
        refused(str(tmp_path / "none"), "--ready-fd", str(write), pass_fds=[write])
        os.close(write)
        with os.fdopen(read) as pipe:
            assert json.load(pipe) == {
                "message": f"cannot mount on {tmp_path}/none: No such file or directory",
                "hint": f"make it: mkdir -p {tmp_path}/none", "errno": errno.ENOENT, "exit_code": 1,
            }  # fmt: skip
        assert not sock.exists() and str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


class TestControlSocket:
    def exchange(self, fs: Filesystem, packet: bytes) -> "tuple[int, dict[str, object]]":
        sock = wire.connect(fs.socket_path, LIMIT)
        with sock:
            wire.send(sock, packet)
            answer = wire.receive(sock, messages.STATUS.size)
            assert answer is not None
            return messages.STATUS.unpack(answer[0])[0], json.loads(answer[1])

    def test_bad_requests(self, fs: Filesystem) -> None:
        for packet in (b"garbage", b"\xff" * 5, b"[]", b'{"command": 5}', b'{"command": "none"}', b'{"memfd": 5}',
                       b'{"command": "nodes"}', b'{"command": "nodes", "nodes": ["1"]}', b'{"command": "mode"}',
                       b"[" * 50_000, b"x" * 150_000):  # fmt: skip
            status, answer = self.exchange(fs, packet)
            assert status < 0 and answer["message"], packet[:40]
        assert fs.client.status().mode == "restore"

    def test_clients_that_come_and_go(self, fs: Filesystem) -> None:
        for _ in range(50):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(fs.socket_path)
            sock.send(b'{"command": "status"}')
            sock.close()
        assert fs.client.status().mode == "restore"
        wait_until(lambda: len(os.listdir(f"/proc/{fs.daemon.pid}/task")) < 12, 5)

    def test_many_answers_travel_whole(self, fs: Filesystem) -> None:
        staging = fs.client.staging()
        for i in range(5_000):
            os.close(os.open(f"{'n' * 40}{i}", os.O_CREAT, dir_fd=staging))
        os.close(staging)
        numbers = [entry.stat().st_ino for entry in os.scandir(fs.path)]
        names = fs.client.nodes(numbers)  # most of them forgotten already, or not: whatever is known has its name
        assert len(names) == 5_000

    def test_only_the_owner(self, fs: Filesystem) -> None:
        assert os.stat(fs.socket_path).st_mode & 0o777 == 0o600
        os.chmod(fs.socket_path, 0o666)
        let_others_in(fs.base)

        def attempt() -> int:
            os.setuid(65534)
            try:
                FilesystemClient(fs.socket_path, 5).status()
            except StubfsError as error:
                return error.errno
            return 0

        assert fs.run(attempt).result() in (errno.EPERM, errno.EACCES)

    def test_no_file_system_there(self, tmp_path: Path) -> None:
        with pytest.raises(StubfsError) as caught:
            FilesystemClient(str(tmp_path / "none"))
        assert caught.value.errno == errno.ENOENT and "--socket-path" in caught.value.hint
        with pytest.raises(StubfsError) as caught:
            FilesystemClient("/tmp/" + "s" * 120)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_more_open_files_than_it_can_have(tmp_path: Path) -> None:
    """Who opens one too many gets an error; all else goes on, and no open file is lost in a change of mode."""
    limit = ["setpriv", "--bounding-set=-sys_resource", "prlimit", "--nofile=300:300"]
    with mounted(tmp_path, "restore", under=limit) as fs:
        for top in (fs.path, fs.real):
            (top / "a" / "b").mkdir(parents=True)
            (top / "file").write_text(top.name)
        opened: List[int] = []
        try:
            with pytest.raises(OSError) as caught:
                while len(opened) < 300:
                    opened.append(os.open(fs.path / "file", os.O_RDONLY))
            assert caught.value.errno == errno.ENFILE and len(opened) > 100
            with pytest.raises(OSError) as caught:
                os.open(fs.path / "new", os.O_RDWR | os.O_CREAT)
            assert caught.value.errno == errno.ENFILE and not (fs.path / "new").exists()
            (fs.path / "a" / "b" / "c").mkdir()
            fs.client.mode("stub")
            fs.proxy()
            assert {os.pread(fd, 10, 0) for fd in opened} == {b"real"}
            while len(opened) > 10:
                os.close(opened.pop())
            wait_until(lambda: len(fs.client.handles()) == len(opened), LIMIT)
            opened.append(os.open(fs.path / "file", os.O_RDONLY))
            assert fs.log.read_text().count("RLIMIT_NOFILE") == 1
        finally:
            for fd in opened:
                os.close(fd)


def test_thousands_of_held_requests_cost_next_to_nothing(fs: Filesystem) -> None:
    fs.client.mode("stub")

    def resident() -> int:
        for line in Path(f"/proc/{fs.daemon.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("no VmRSS")

    before = resident()

    def wait_in_threads() -> None:
        threading.stack_size(64 << 10)
        # Names of its own: a second lookup of one name would wait for the first, in the kernel.
        names = [fs.path / f"{os.getpid()}-{i}" for i in range(1000)]
        threads = [threading.Thread(target=os.path.exists, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    children = [fs.run(wait_in_threads) for _ in range(4)]
    wait_until(lambda: fs.client.status().held == 4000, 60)
    assert resident() - before < 5 << 10
    assert len(os.listdir(f"/proc/{fs.daemon.pid}/task")) < 15
    listed = fs.client.held()
    assert len(listed) == 4000 and {item.pid for item in listed} == {child.pid for child in children}
    fs.proxy()
    start = time.monotonic()
    wait_until(lambda: fs.client.status().held == 0, 10)
    assert time.monotonic() - start < 3
    for child in children:
        child.result()
