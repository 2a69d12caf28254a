"""What applications rely on, on a real mount: in restore mode and in front of a directory."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set

import pytest
from stubfs_kit import Filesystem, mounted

import stubfs
from stubfs import protocol, syscalls
from stubfs.rules import Rule

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture(params=["restore", "proxy"])
def fs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    with mounted(tmp_path, request.param) as filesystem:
        yield filesystem
        assert "ERROR" not in filesystem.log.read_text()


def statx(path: Path) -> bytes:
    """With the birth time, which is at offset 80."""
    return syscalls.statx(syscalls.AT_FDCWD, bytes(path), 0, 0xFFF)


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(OSError) as caught:
        action()
    return errno.errorcode[caught.value.errno or 0]


class TestDirectories:
    def test_thousands_of_entries(self, fs: Filesystem) -> None:
        names = {f"{number:05d}" for number in range(20_000)}
        fd = fs.client.staging() if fs.client.status().mode == "restore" else os.open(fs.real, os.O_RDONLY)
        try:
            for name in names:
                os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        finally:
            os.close(fd)
        assert set(os.listdir(fs.path)) == names
        removed = 0
        with os.scandir(fs.path) as entries:  # each is removed while the listing goes on
            for entry in entries:
                if removed == 3000:
                    break
                os.unlink(entry.path)
                removed += 1
        assert len(os.listdir(fs.path)) == 17_000

    def test_positions_stay_while_others_are_removed(self, fs: Filesystem) -> None:
        names = {f"{number:04d}" for number in range(600)}
        for name in names:
            (fs.path / name).write_text("")

        def entries(fd: int, size: int) -> Dict[bytes, int]:
            data = syscalls.getdents64(fd, size)
            return {name: offset for offset, _, _, name in protocol.native_dirents(data)}

        fd = os.open(fs.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            first = entries(fd, 4096)
            place = os.lseek(fd, 0, os.SEEK_CUR)
            rest: Set[bytes] = set()
            while found := entries(fd, 4096):
                rest |= set(found)
            assert {os.fsdecode(name) for name in {*first, *rest}} == names | {".", ".."}
            assert not rest & set(first)
            for name in list(first)[5:]:
                if name not in (b".", b".."):
                    os.unlink(os.path.join(bytes(fs.path), name))
            os.lseek(fd, place, os.SEEK_SET)
            again: Set[bytes] = set()
            while found := entries(fd, 4096):
                again |= set(found)
            assert again == rest
            # In the middle of what one call gave.
            name = sorted(rest)[0]
            os.lseek(fd, 0, os.SEEK_SET)
            assert os.lseek(fd, 0, os.SEEK_CUR) == 0
            (fs.path / "new").write_text("")
            os.lseek(fd, 0, os.SEEK_SET)
            assert "new" in os.listdir(fd) and os.fsdecode(name) in os.listdir(fd)
        finally:
            os.close(fd)

    def test_link_counts_and_times(self, fs: Filesystem) -> None:
        os.utime(fs.path, ns=(1, 1))
        (fs.path / "d").mkdir()
        (fs.path / "d" / "sub").mkdir()
        assert os.stat(fs.path / "d").st_nlink in (3, 1)  # 1: file systems that do not count
        assert os.stat(fs.path).st_mtime_ns > 10**18
        os.utime(fs.path / "d", ns=(1, 1))
        os.rmdir(fs.path / "d" / "sub")
        assert os.stat(fs.path / "d").st_mtime_ns > 10**18

    def test_a_removed_working_directory(self, fs: Filesystem) -> None:
        (fs.path / "d").mkdir()

        def work() -> List[Any]:
            os.chdir(fs.path / "d")
            fd = os.open(".", os.O_RDONLY)
            os.rmdir(fs.path / "d")
            os.mkdir(fs.path / "d")  # another one of the same name
            return [
                os.stat(".").st_nlink, os.fstat(fd).st_nlink, os.listdir(fd),
                error_of(lambda: os.mkdir("x")), error_of(lambda: os.stat("x")), error_of(os.getcwd),
            ]  # fmt: skip

        assert fs.run(work).result() == [0, 0, [], "ENOENT", "ENOENT", "ENOENT"]


class TestNames:
    def test_any_byte(self, fs: Filesystem) -> None:
        top = bytes(fs.path)
        names = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."] + [b"\xff" * 255, b"a\nb"]
        for name in names:
            os.close(os.open(os.path.join(top, name), os.O_CREAT | os.O_WRONLY))
        assert sorted(os.listdir(top)) == sorted(names)
        for name in names:
            renamed = os.path.join(top, name[:200] + b"+")
            os.rename(os.path.join(top, name), renamed)
            os.unlink(renamed)
        assert os.listdir(top) == []
        assert error_of(lambda: os.mkdir(os.path.join(top, b"x" * 256))) == "ENAMETOOLONG"

    def test_deeper_than_a_path_can_say(self, fs: Filesystem) -> None:
        part = "d" * 200

        def work() -> List[Any]:
            os.chdir(fs.path)
            for _ in range(45):
                os.mkdir(part)
                os.chdir(part)
            Path("file").write_text("deep")
            os.rename("file", "other")
            os.link("other", "link")
            os.chmod("link", 0o600)
            found = [Path("link").read_text(), sorted(os.listdir(".")), os.stat("other").st_nlink]
            os.unlink("link")
            os.unlink("other")
            for _ in range(45):
                os.chdir("..")
                os.rmdir(part)
            return found

        assert fs.run(work).result(60) == ["deep", ["link", "other"], 2]
        assert os.listdir(fs.path) == []

    def test_renames(self, fs: Filesystem) -> None:
        for name in "ab":
            (fs.path / name).write_text(name)
        (fs.path / "d").mkdir()
        (fs.path / "d" / "in").write_text("in")

        def rename(old: str, new: str, flags: int) -> None:
            syscalls.renameat2(syscalls.AT_FDCWD, bytes(fs.path / old), syscalls.AT_FDCWD, bytes(fs.path / new), flags)

        assert error_of(lambda: rename("a", "b", 1)) == "EEXIST"
        rename("a", "b", 2)
        assert [(fs.path / name).read_text() for name in "ab"] == ["b", "a"]
        with open(fs.path / "d" / "in") as inside, open(fs.path / "a") as file:
            rename("a", "d", 2)  # a file and a directory change places
            assert (fs.path / "a" / "in").read_text() == inside.read() == "in"
            assert (fs.path / "d").read_text() == file.read() == "b"
            assert os.stat(fs.path / "d").st_ino == os.fstat(file.fileno()).st_ino
            (fs.path / "new").write_text("new")
            rename("new", "d", 0)  # over an open file
            os.fchmod(file.fileno(), 0o604)
            assert os.fstat(file.fileno()).st_nlink == 0 and os.fstat(file.fileno()).st_mode & 0o777 == 0o604
            assert (fs.path / "d").read_text() == "new" and os.stat(fs.path / "d").st_mode & 0o777 != 0o604
        assert sorted(os.listdir(fs.path)) == ["a", "b", "d"]  # and nothing hidden
        assert error_of(lambda: rename("a", "a/in/x", 0)) in ("EINVAL", "ENOTDIR")


class TestContents:
    def test_beyond_four_gibibytes(self, fs: Filesystem) -> None:
        size = 5 * 2**30
        fd = os.open(fs.path / "large", os.O_CREAT | os.O_RDWR)
        try:
            os.pwrite(fd, b"end", size)
            assert os.fstat(fd).st_size == size + 3 and os.pread(fd, 10, size) == b"end"
            assert os.lseek(fd, 0, os.SEEK_DATA) <= size and os.lseek(fd, size, os.SEEK_HOLE) == size + 3
            with mmap.mmap(fd, 3, offset=size) as area:
                area[:3] = b"END"
                area.flush()
            assert os.pread(fd, 10, size) == b"END"
            os.ftruncate(fd, size + 2**30)
            assert os.stat(fs.path / "large").st_size == size + 2**30
        finally:
            os.close(fd)

    def test_appending_by_many(self, fs: Filesystem) -> None:
        def append(number: int) -> Callable[[], None]:
            def run() -> None:
                fd = os.open(fs.path / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                for line in range(200):
                    os.write(fd, b"%d %d\n" % (number, line))

            return run

        processes = [fs.run(append(number)) for number in range(4)]
        for process in processes:
            process.result(60)
        lines = [tuple(map(int, line.split())) for line in (fs.path / "log").read_text().splitlines()]
        assert sorted(lines) == [(number, line) for number in range(4) for line in range(200)]

    def test_without_the_page_cache(self, fs: Filesystem) -> None:
        fd = os.open(fs.path / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 2**20) as area:
                area[:] = os.urandom(2**20)
                assert os.pwritev(fd, [area], 4096) == 2**20
                with mmap.mmap(-1, 2**20) as back:
                    assert os.preadv(fd, [back], 4096) == 2**20 and back[:] == area[:]
            with open(fs.path / "file", "rb") as cached:
                assert len(cached.read()) == 2**20 + 4096
        finally:
            os.close(fd)

    def test_mappings(self, fs: Filesystem) -> None:
        (fs.path / "file").write_bytes(b"a" * 8192)
        fd = os.open(fs.path / "file", os.O_RDWR)
        try:
            with mmap.mmap(fd, 8192) as shared, mmap.mmap(fd, 8192, mmap.MAP_PRIVATE) as private:
                private[0:1] = b"p"
                shared[1:2] = b"s"
                os.pwrite(fd, b"w", 2)
                assert private[:3] in (b"paa", b"psw") and shared[:3] == b"asw"
                shared.flush()
            assert os.pread(fd, 3, 0) == b"asw"
        finally:
            os.close(fd)

    def test_programs(self, fs: Filesystem) -> None:
        program = shutil.copy("/bin/cat", fs.path / "program")
        with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert error_of(lambda: os.open(program, os.O_WRONLY)) == "ETXTBSY"
            assert process.communicate(b"text") == (b"text", None)
        os.chmod(program, 0o644)
        with pytest.raises(PermissionError):
            subprocess.run([program], check=True)
        script = fs.path / "script"
        script.write_text("#!/bin/sh\necho $1")
        script.chmod(0o755)
        assert subprocess.run([script, "x"], capture_output=True, check=True).stdout == b"x\n"

    def test_holes(self, fs: Filesystem) -> None:
        fd = os.open(fs.path / "file", os.O_CREAT | os.O_RDWR)
        try:
            os.write(fd, b"x" * 65_536)
            try:
                syscalls.fallocate(fd, 3, 16_384, 16_384)  # PUNCH_HOLE | KEEP_SIZE
            except OSError as error:
                assert error.errno == errno.EOPNOTSUPP  # then the file system behind it cannot
                return
            assert os.pread(fd, 65_536, 0) == b"x" * 16_384 + bytes(16_384) + b"x" * 32_768
            assert os.lseek(fd, 0, os.SEEK_HOLE) == 16_384 and os.lseek(fd, 16_384, os.SEEK_DATA) == 32_768
            syscalls.fallocate(fd, 1, 0, 10**6)  # KEEP_SIZE
            assert os.fstat(fd).st_size == 65_536 and os.fstat(fd).st_blocks * 512 >= 10**6 - 4096
        finally:
            os.close(fd)

    def test_copies_in_the_kernel(self, fs: Filesystem) -> None:
        (fs.path / "from").write_bytes(os.urandom(100_000))
        with open(fs.path / "from", "rb") as source, open(fs.path / "to", "w+b") as target:
            assert os.copy_file_range(source.fileno(), target.fileno(), 60_000, 0, 0) == 60_000
            target.seek(60_000)
            assert os.sendfile(target.fileno(), source.fileno(), 60_000, 40_000) == 40_000
            # By the file system, and not by the kernel, which would read and write: a server can do it without a copy.
            fs.client.set_rules([Rule.parse("fail operations=copy_file_range errno=EIO")])
            assert error_of(lambda: os.copy_file_range(source.fileno(), target.fileno(), 10, 0, 0)) == "EIO"
        assert (fs.path / "to").read_bytes() == (fs.path / "from").read_bytes()


class TestAttributes:
    def test_birth_times(self, fs: Filesystem) -> None:
        (fs.path / "file").write_text("")
        made = protocol.STATX_TIME.unpack_from(statx(fs.path / "file"), 80)
        assert made > (10**9, 0)
        if fs.client.status().mode == "proxy":
            assert made == protocol.STATX_TIME.unpack_from(statx(fs.real / "file"), 80)
        os.utime(fs.path / "file", (1, 1))
        assert protocol.STATX_TIME.unpack_from(statx(fs.path / "file"), 80) == made
        fs.client.mode("stub")
        assert stat.S_ISDIR(int.from_bytes(statx(fs.path)[28:30], "little"))  # the top answers, as it does to stat(2)

    def test_times(self, fs: Filesystem) -> None:
        path = fs.path / "file"
        path.write_text("")
        for atime, mtime in ((123_456_789, 987_654_321), (-1, -999_999_999), (2**33 * 10**9 + 1, 5)):
            os.utime(path, ns=(atime, mtime))
            assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (atime, mtime)

        def ctime_moves(change: Callable[[], Any]) -> bool:
            before = os.stat(path).st_ctime_ns
            deadline = time.monotonic() + 0.1  # the kernel's clock for files ticks every few milliseconds
            while time.monotonic() < deadline:
                pass
            change()
            return os.stat(path).st_ctime_ns > before

        assert ctime_moves(lambda: os.chmod(path, 0o600))
        assert ctime_moves(lambda: os.link(path, fs.path / "link"))
        assert ctime_moves(lambda: os.unlink(fs.path / "link"))
        assert ctime_moves(lambda: path.write_text("x"))
        assert ctime_moves(lambda: os.setxattr(path, "user.q", b""))
        assert not ctime_moves(lambda: os.stat(path))

    def test_extended_attributes(self, fs: Filesystem) -> None:
        path = fs.path / "file"
        path.write_text("")
        values = {f"trusted.{number}": os.urandom(number) for number in range(60)}
        values["security.spfs.link_remap"] = b"some/name"
        values["trusted." + "n" * 247] = b"the longest name"
        for name, value in values.items():
            os.setxattr(path, name, value)
        assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == values
        os.removexattr(path, "trusted.5")
        assert error_of(lambda: os.getxattr(path, "trusted.5")) == "ENODATA"
        assert error_of(lambda: os.setxattr(path, "trusted.6", b"", os.XATTR_CREATE)) == "EEXIST"
        assert error_of(lambda: os.setxattr(path, "trusted.5", b"", os.XATTR_REPLACE)) == "ENODATA"

    def test_a_file_that_is_written_loses_its_capabilities(self, fs: Filesystem) -> None:
        path = fs.path / "file"
        path.write_text("text")
        capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # struct vfs_cap_data: CAP_NET_BIND_SERVICE
        for change in (lambda: path.write_text("x"), lambda: os.truncate(path, 0), lambda: os.chown(path, 1, 1)):
            os.setxattr(path, "security.capability", capability)
            assert os.getxattr(path, "security.capability")
            change()
            assert error_of(lambda: os.getxattr(path, "security.capability")) == "ENODATA"

    def test_the_file_system_itself(self, fs: Filesystem) -> None:
        if fs.client.status().mode == "proxy":
            ours, theirs = os.statvfs(fs.path), os.statvfs(fs.real)
            assert (ours.f_blocks, ours.f_files, ours.f_namemax) == (theirs.f_blocks, theirs.f_files, theirs.f_namemax)
        (fs.path / "file").write_text("")
        with open(fs.path / "file") as file:
            assert os.fstatvfs(file.fileno()).f_bsize == os.statvfs(fs.path).f_bsize > 0


class TestSpecialFiles:
    def test_a_fifo(self, fs: Filesystem) -> None:
        os.mkfifo(fs.path / "fifo", 0o640)
        writer = fs.run(lambda: (fs.path / "fifo").write_text("through"))
        assert (fs.path / "fifo").read_text() == "through" and writer.result() == 7
        assert stat.S_ISFIFO(os.stat(fs.path / "fifo").st_mode) and os.stat(fs.path / "fifo").st_size == 0

    def test_a_socket(self, fs: Filesystem) -> None:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(str(fs.path / "s"))
            server.listen()
            os.rename(fs.path / "s", fs.path / "t")
            client.connect(str(fs.path / "t"))
            peer, _ = server.accept()
            with peer:
                client.send(b"text")
                assert peer.recv(10) == b"text"
        assert error_of(lambda: os.open(fs.path / "t", os.O_RDONLY)) == "ENXIO"

    def test_device_nodes(self, fs: Filesystem) -> None:
        for kind, device in ((stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(4095, 0xFFFFF))):
            os.mknod(fs.path / str(kind), kind | 0o600, device)
            status = os.stat(fs.path / str(kind))
            assert (stat.S_IFMT(status.st_mode), status.st_rdev) == (kind, device)
        assert error_of(lambda: os.open(fs.path / str(stat.S_IFCHR), os.O_RDONLY)) == "EACCES"  # nodev

    def test_devices_where_they_are_wanted(self, tmp_path: Path) -> None:
        (tmp_path / "mnt").mkdir()
        with stubfs.mount(tmp_path / "mnt", options="dev"):
            os.mknod(tmp_path / "mnt" / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            assert (tmp_path / "mnt" / "null").read_bytes() == b""


class TestLocks:
    def test_between_processes_and_names(self, fs: Filesystem) -> None:
        (fs.path / "a").write_text("x" * 100)
        os.link(fs.path / "a", fs.path / "b")

        def refused(lock: Callable[[int], Any]) -> Callable[[], bool]:
            def run() -> bool:
                fd = os.open(fs.path / "b", os.O_RDWR)
                try:
                    lock(fd)
                except OSError as error:
                    return error.errno in (errno.EAGAIN, errno.EACCES)
                return False

            return run

        def ofd(fd: int, kind: int, start: int) -> None:
            fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, 10, 0))  # F_OFD_SETLK

        with open(fs.path / "a", "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
            ofd(file.fileno(), fcntl.F_WRLCK, 20)
            checks = [
                lambda fd: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
                lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5),
                lambda fd: ofd(fd, fcntl.F_RDLCK, 25),
                lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 50),
            ]
            processes = [fs.run(refused(check)) for check in checks]
            assert [process.result() for process in processes] == [True, True, True, False]
        for process in processes:
            process.wait()  # they had inherited the open file, and the lock lives as long as the last of it
        assert not fs.run(refused(checks[0])).result()
