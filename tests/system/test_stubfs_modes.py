"""restore, stub and proxy as their users see them: real mounts, real processes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Iterator

import pytest
from stubfs_kit import Filesystem, as_user, mounted, wait_until
from testing_kit import let_others_in

from stubfs.errors import StubfsError

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    let_others_in(tmp_path)
    with mounted(tmp_path) as filesystem:
        yield filesystem


def error_of(action: object, *arguments: object) -> int:
    with pytest.raises(OSError) as caught:
        action(*arguments)  # type: ignore[operator]
    assert caught.value.errno is not None
    return caught.value.errno


class TestRestore:
    def test_a_small_real_file_system(self, fs: Filesystem) -> None:
        top = fs.path
        (top / "d/e").mkdir(parents=True)
        file = top / "d/e/f"
        file.write_bytes(b"x" * 200_000)
        assert file.stat().st_size == 200_000
        os.utime(file, ns=(1_000_000_001, 2_000_000_002))
        os.chmod(file, 0o4751)
        os.chown(file, 12, 34)
        status = file.stat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
        assert stat.S_IMODE(status.st_mode) == 0o751  # changing the owner takes the set-user-ID bit
        assert (status.st_uid, status.st_gid) == (12, 34)
        os.rename(file, top / "g")
        assert error_of(os.stat, file) == errno.ENOENT
        os.symlink("g", top / "link")
        assert os.readlink(top / "link") == "g" and (top / "link").stat().st_size == 200_000
        os.link(top / "g", top / "hard")
        assert os.stat(top / "hard").st_nlink == 2
        os.setxattr(top / "g", "user.name", b"value")
        assert os.getxattr(top / "g", "user.name") == b"value" and os.listxattr(top / "g") == ["user.name"]
        os.removexattr(top / "g", "user.name")
        assert error_of(os.getxattr, top / "g", "user.name") == errno.ENODATA
        assert error_of(os.rmdir, top / "d") == errno.ENOTEMPTY
        assert error_of(os.mkdir, top / "d") == errno.EEXIST
        assert sorted(os.listdir(top)) == ["d", "g", "hard", "link"]
        os.truncate(top / "g", 10)
        assert (top / "g").read_bytes() == b"x" * 10
        assert os.statvfs(top).f_bsize == 4096

    def test_names_are_bytes(self, fs: Filesystem) -> None:
        for name in (b"\xff\xfe", "grün".encode(), b"n" * 255):
            path = os.fsencode(fs.path) + b"/" + name
            os.close(os.open(path, os.O_CREAT))
            assert name in os.listdir(os.fsencode(fs.path))
            os.unlink(path)
        assert error_of(os.mkdir, fs.path / ("n" * 256)) == errno.ENAMETOOLONG

    def test_open_flags(self, fs: Filesystem) -> None:
        path = fs.path / "f"
        path.write_bytes(b"contents")
        assert error_of(os.open, path, os.O_CREAT | os.O_EXCL) == errno.EEXIST
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
        assert path.stat().st_size == 0
        appending = os.open(path, os.O_RDWR | os.O_APPEND)
        os.write(appending, b"one")
        os.lseek(appending, 0, os.SEEK_SET)
        os.write(appending, b"two")
        with mmap.mmap(appending, 3) as mapping:  # pages written back to an O_APPEND handle keep their place
            mapping[0:3] = b"ONE"
            mapping.flush()
        os.close(appending)
        assert path.read_bytes() == b"ONEtwo"
        fd = os.open(path, os.O_RDWR)
        os.posix_fallocate(fd, 0, 1 << 20)
        assert os.fstat(fd).st_size == 1 << 20
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"x", 5 << 30)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 5 << 30 and os.lseek(fd, 0, os.SEEK_HOLE) == 0
        os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)

    def test_a_large_directory_and_its_positions(self, fs: Filesystem) -> None:
        names = {f"{'n' * (i % 50)}{i}" for i in range(2_000)}
        staging = fs.client.staging()
        try:
            for name in names:
                os.close(os.open(name, os.O_CREAT, dir_fd=staging))
        finally:
            os.close(staging)
        assert set(os.listdir(fs.path)) == names
        fd = os.open(fs.path, os.O_RDONLY)
        with os.scandir(fd) as entries:
            first = next(entries).name
            assert len({first} | {entry.name for entry in entries}) == len(names)
        os.lseek(fd, 0, os.SEEK_SET)
        assert set(os.listdir(fd)) == names
        os.close(fd)

    def test_a_fifo_and_a_socket_work_between_processes(self, fs: Filesystem) -> None:
        fifo = fs.path / "fifo"
        os.mkfifo(fifo)
        writer = fs.run(lambda: fifo.write_bytes(b"through the fifo"))
        assert fifo.read_bytes() == b"through the fifo"
        assert writer.result() == 16
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
            listener.bind(str(fs.path / "socket"))
            listener.listen()
            assert stat.S_ISSOCK(os.stat(fs.path / "socket").st_mode)
            client.connect(str(fs.path / "socket"))
            connection, _ = listener.accept()
            with connection:
                client.send(b"hello")
                assert connection.recv(10) == b"hello"

    def test_what_has_lost_its_name(self, fs: Filesystem) -> None:
        path = fs.path / "f"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.unlink(path)
        assert os.listdir(fs.path) == []
        os.write(fd, b"still here")
        assert os.pread(fd, 20, 0) == b"still here"
        assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, 10)
        os.fchmod(fd, 0o640)
        os.ftruncate(fd, 5)
        os.utime(fd, ns=(1, 2))
        os.setxattr(fd, "user.x", b"y")
        assert os.getxattr(fd, "user.x") == b"y"
        assert (stat.S_IMODE(os.fstat(fd).st_mode), os.fstat(fd).st_size) == (0o640, 5)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        assert os.read(again, 10) == b"still"
        os.close(again)
        os.close(fd)
        directory = fs.path / "d"
        directory.mkdir()
        fd = os.open(directory, os.O_PATH)
        directory.rmdir()
        assert os.fstat(fd).st_nlink == 0
        assert error_of(os.stat, "x", ) == errno.ENOENT
        os.close(fd)

    def test_rename_without_replacing(self, fs: Filesystem) -> None:
        from stubfs import syscalls

        (fs.path / "a").write_text("a")
        (fs.path / "b").write_text("b")
        a, b = os.fsencode(fs.path / "a"), os.fsencode(fs.path / "b")
        assert error_of(syscalls.renameat2, -100, a, -100, b, 1) == errno.EEXIST
        syscalls.renameat2(-100, a, -100, b + b"2", 1)
        assert sorted(os.listdir(fs.path)) == ["b", "b2"]
        keeper = open(fs.path / "b")
        os.rename(fs.path / "b2", fs.path / "b")
        assert (fs.path / "b").read_text() == "a" and keeper.read() == "b"
        keeper.close()

    def test_locks_work_between_processes(self, fs: Filesystem) -> None:
        path = fs.path / "f"
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.lockf(file, fcntl.LOCK_EX)

            def attempt() -> int:
                with open(path, "r+") as other:
                    try:
                        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        pass
                    else:
                        return 1
                    try:
                        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return 0
                    return 2

            assert fs.run(attempt).result() == 0


class TestUsers:
    def test_files_belong_to_their_maker(self, fs: Filesystem) -> None:
        os.chmod(fs.path, 0o777)
        (fs.path / "private").mkdir(mode=0o700)
        (fs.path / "group").mkdir()
        os.chown(fs.path / "group", 0, 4321)
        os.chmod(fs.path / "group", 0o770)

        def work() -> object:
            made = fs.path / "mine"
            made.write_text("x")
            with pytest.raises(PermissionError):
                os.listdir(fs.path / "private")
            with pytest.raises(PermissionError):
                (fs.path / "private" / "x").touch()
            with pytest.raises(PermissionError):
                os.chown(made, 0, 0)
            (fs.path / "group" / "x").touch()  # allowed by a supplementary group alone
            return os.access(fs.path / "private", os.R_OK), os.access(fs.path / "group", os.W_OK)

        assert fs.run(as_user(1234, 1235, [4321], work)).result() == (False, True)
        status = os.stat(fs.path / "mine")
        assert (status.st_uid, status.st_gid) == (1234, 1235)
        outsider = fs.run(as_user(1234, 1235, [], lambda: os.access(fs.path / "group", os.W_OK)))
        assert outsider.result() is False
        (fs.path / "private" / "root").write_text("ours")  # and root is root again

    def test_what_has_lost_its_name_is_its_owners(self, fs: Filesystem) -> None:
        os.chmod(fs.path, 0o777)

        def work() -> object:
            fd = os.open(fs.path / "mine", os.O_CREAT | os.O_RDWR, 0o600)
            os.setxattr(fd, "user.x", b"named")
            os.unlink(fs.path / "mine")
            os.setxattr(fd, "user.x", b"nameless")
            os.fchmod(fd, 0o640)
            os.ftruncate(fd, 3)
            os.utime(fd, ns=(1, 2))
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
            with pytest.raises(PermissionError):
                os.fchown(fd, 0, 0)
            status = os.fstat(again)
            return os.getxattr(again, "user.x"), oct(status.st_mode), status.st_size, status.st_mtime_ns, status.st_uid

        result = fs.run(as_user(1234, 1235, [], work)).result()
        assert result == (b"nameless", "0o100640", 3, 2, 1234)

    def test_a_writer_loses_the_set_user_id_bit(self, fs: Filesystem) -> None:
        os.chmod(fs.path, 0o777)
        path = fs.path / "program"
        path.write_text("x")
        os.chmod(path, 0o6777)
        fs.run(as_user(1234, 1234, [], lambda: path.write_text("changed"))).result()
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o6000 == 0


class TestStub:
    def test_everything_waits_but_the_root(self, fs: Filesystem) -> None:
        (fs.path / "f").write_text("staging")
        (fs.real / "f").write_text("real")
        open_file = open(fs.path / "f", "rb", buffering=0)
        before = fs.client.mode("stub")
        assert (before.mode, before.held) == ("stub", 0)
        assert stat.S_ISDIR(os.stat(fs.path).st_mode)
        assert os.access(fs.path, os.R_OK) and os.listxattr(fs.path) == []
        waiting = [
            fs.run(lambda: (fs.path / "f").read_text()),
            fs.run(lambda: os.listdir(fs.path)),
            fs.run(lambda: os.pread(open_file.fileno(), 4, 0)),
            fs.run(lambda: (fs.path / "new").touch()),
            fs.run(lambda: os.fstat(open_file.fileno()).st_size),
        ]
        fs.wait_held(5)
        held = {item.operation: item for item in fs.client.held() if item.tid}
        assert set(held) == {"lookup", "opendir", "read", "getattr"}
        assert held["lookup"].name in ("f", "new") and held["lookup"].path == ""
        assert {item.pid for item in held.values()} <= {process.pid for process in waiting}
        assert held["read"].path == "f" and held["read"].age >= 0 and held["read"].command
        assert not any(process.finished() for process in waiting)
        fs.proxy()
        results = [process.result() for process in waiting]
        assert results[0] == "real" and results[2] == b"real" and results[4] == 4
        assert "f" in results[1] and set(results[1]) <= {"f", "new"}
        assert (fs.real / "new").exists()
        assert fs.client.status().held == 0
        open_file.close()

    @pytest.mark.parametrize("before", ["restore", "proxy"])  # only what was opened in proxy mode is flushed at all
    def test_a_process_can_close_its_files(self, fs: Filesystem, before: str) -> None:
        for top in (fs.path, fs.real):
            (top / "f").write_text("x")
        if before == "proxy":
            fs.proxy()
        opened = threading.Event()
        fs_is_stub = threading.Event()

        def open_and_close() -> None:
            fd = os.open(fs.path / "f", os.O_RDWR)
            opened.set()
            assert fs_is_stub.wait(10)
            os.close(fd)

        closing = threading.Thread(target=open_and_close, daemon=True)
        closing.start()
        assert opened.wait(10) and len(fs.client.handles()) == 1
        fs.client.mode("stub")
        fs_is_stub.set()
        closing.join(10)
        assert not closing.is_alive(), fs.client.held()
        fs.client.mode("restore")
        wait_until(lambda: not fs.client.handles(), 5)

    def test_stub_from_the_start(self, tmp_path: Path) -> None:
        with mounted(tmp_path, "stub", name="stub") as fs:
            (fs.real / "f").write_text("real")
            reader = fs.run(lambda: (fs.path / "f").read_text())
            fs.wait_held()
            fs.proxy()
            assert reader.result() == "real"


class TestProxy:
    def test_from_the_start(self, tmp_path: Path) -> None:
        with mounted(tmp_path, "proxy", name="proxy") as fs:
            (fs.real / "d").mkdir()
            (fs.path / "d" / "f").write_text("through")
            assert (fs.real / "d" / "f").read_text() == "through"
            (fs.real / "d" / "f").write_text("changed behind it")
            assert (fs.path / "d" / "f").read_text() == "changed behind it"

    def test_handles_move_with_their_flags(self, fs: Filesystem) -> None:
        for top in (fs.path, fs.real):
            (top / "d").mkdir()
            (top / "d" / "f").write_bytes(b"0123456789" if top == fs.path else b"abcdefghij")
        fd = os.open(fs.path / "d" / "f", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.write(fd, b"0123456789")
        appending = os.open(fs.path / "d" / "f", os.O_WRONLY | os.O_APPEND)
        os.lseek(fd, 3, os.SEEK_SET)
        fs.client.mode("stub")
        fs.proxy()
        assert os.read(fd, 4) == b"defg"  # where it stood, and not emptied again
        os.write(fd, b"HIJ")
        os.write(appending, b"+")
        assert (fs.real / "d" / "f").read_bytes() == b"abcdefgHIJ+"
        assert {handle.generation for handle in fs.client.handles()} == {2}
        directory = os.open(fs.path / "d", os.O_RDONLY)
        assert os.listdir(directory) == ["f"]
        for number in (fd, appending, directory):
            os.close(number)

    def test_a_file_that_the_real_side_lacks(self, fs: Filesystem) -> None:
        fd = os.open(fs.path / "f", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"staging")
        nameless = os.open(fs.path / "g", os.O_RDWR | os.O_CREAT)
        os.write(nameless, b"nameless")
        os.unlink(fs.path / "g")
        fs.client.mode("stub")
        fs.proxy()
        assert error_of(os.pread, fd, 10, 0) == errno.ESTALE
        assert os.pread(nameless, 10, 0) == b"nameless"  # its own generation is the only one it has
        os.pwrite(nameless, b"N", 0)
        assert os.fstat(nameless).st_size == 8
        assert os.listdir(fs.real) == []
        os.close(fd)
        os.close(nameless)

    def test_back_to_restore_and_on_to_another_directory(self, fs: Filesystem, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "f").write_text("other")
        (fs.real / "f").write_text("real")
        (fs.path / "f").write_text("staging")
        with open(fs.path / "f", "rb", buffering=0) as file:
            contents = []
            for change in (fs.proxy, lambda: fs.proxy(other), lambda: fs.client.mode("restore")):
                change()
                file.seek(0)
                contents.append((file.read(), (fs.path / "f").read_bytes()))
        assert contents == [(b"real", b"real"), (b"other", b"other"), (b"staging", b"staging")]

    def test_its_own_mount_is_refused(self, fs: Filesystem) -> None:
        for path, number in ((fs.path, errno.ELOOP), (Path("/etc/hostname"), errno.ENOTDIR)):
            fd = os.open(path, os.O_PATH)
            with pytest.raises(StubfsError) as caught:
                fs.client.mode("proxy", fd)
            os.close(fd)
            assert caught.value.errno == number
        with pytest.raises(StubfsError):
            fs.client.mode("proxy")
        with pytest.raises(StubfsError):
            fs.client.mode("no such mode")
        assert fs.client.status().mode == "restore"


def test_readaheads_do_not_stand_in_each_others_way(fs: Filesystem) -> None:
    """With the kernel's usual limit of 12 requests in the background the thirteenth would not be seen."""
    count = 60
    for i in range(count):
        for top in (fs.path, fs.real):
            (top / f"f{i}").write_bytes(bytes(100_000))
    files = [os.open(fs.path / f"f{i}", os.O_RDONLY) for i in range(count)]
    fs.client.mode("stub")
    for fd in files:
        os.posix_fadvise(fd, 0, 100_000, os.POSIX_FADV_WILLNEED)
    wait_until(lambda: len({item.node for item in fs.client.held() if item.operation == "read"}) == count, 10)
    fs.proxy()
    for fd in files:
        assert len(os.read(fd, 200_000)) == 100_000
        os.close(fd)


def test_inode_numbers_identify_objects(fs: Filesystem) -> None:
    (fs.path / "d").mkdir()
    fd = os.open(fs.path / "d" / "f", os.O_CREAT | os.O_RDWR)
    node = os.fstat(fd).st_ino
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    assert f"ino:\t{node}\n" in info
    assert os.stat(fs.path).st_ino == 1
    assert fs.client.nodes([1, node, 999]) == {1: "", node: "d/f", 999: None}
    os.rename(fs.path / "d", fs.path / "e")
    assert fs.client.nodes([node]) == {node: "e/f"}
    (handle,) = fs.client.handles()
    assert (handle.node, handle.path, handle.kind, handle.generation) == (node, "e/f", "file", 1)
    assert handle.flags & os.O_ACCMODE == os.O_RDWR and handle.pid == os.getpid()
    os.unlink(fs.path / "e" / "f")
    assert fs.client.nodes([node]) == {node: None}
    assert fs.client.handles()[0].path is None
    os.close(fd)


def test_nodes_are_forgotten(fs: Filesystem) -> None:
    for i in range(50):
        (fs.path / f"d{i}").mkdir()
        (fs.path / f"d{i}" / "f").touch()
    assert fs.client.status().nodes == 101
    for i in range(50):
        (fs.path / f"d{i}" / "f").unlink()
        (fs.path / f"d{i}").rmdir()
    wait_until(lambda: fs.client.status().nodes == 1, 5)
