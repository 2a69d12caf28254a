"""Everything happens with the caller's ids, groups and umask; and nothing leads out of the tree."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import stat
import struct
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from stubfs_kit import Filesystem, as_user, mount_new, mounted, outcome, wait_until

from stubfs import cli, syscalls
from stubfs.credentials import Credentials, ThreadIdentity

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
ALICE, BOB, STAFF = 1001, 1002, 2000


@pytest.fixture(params=["restore", "proxy"])
def fs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    with mounted(tmp_path, request.param) as filesystem:
        filesystem.path.chmod(0o777)
        yield filesystem


def beneath(fs: Filesystem, uid: int, groups: List[int], action: Callable[[], Any]) -> Any:
    """What a user's process gets that works in the mount, which it need not be able to find."""

    def enter() -> Any:
        top = os.open(fs.path, os.O_PATH)

        def work() -> Any:
            os.fchdir(top)
            return action()

        return as_user(uid, uid, groups, lambda: outcome(work))()

    return fs.run(enter).result()


def test_files_belong_to_who_makes_them(fs: Filesystem) -> None:
    def make() -> None:
        os.umask(0o027)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir("dir", 0o777)
        os.mkfifo("fifo", 0o666)
        os.symlink("file", "link")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("sock")

    beneath(fs, ALICE, [STAFF], make)
    for name, mode in (("file", 0o640), ("dir", 0o750), ("fifo", 0o640), ("link", 0o777), ("sock", 0o750)):
        status = os.lstat(fs.path / name)
        assert (name, status.st_uid, status.st_gid, status.st_mode & 0o777) == (name, ALICE, ALICE, mode)


def test_supplementary_groups(fs: Filesystem) -> None:
    (fs.path / "shared").write_text("text")
    os.chown(fs.path / "shared", 0, STAFF)
    (fs.path / "shared").chmod(0o640)
    read = Path("shared").read_text
    assert beneath(fs, ALICE, [STAFF], read) == "text"
    assert beneath(fs, ALICE, [STAFF + 1], read) == "EACCES"
    assert beneath(fs, ALICE, list(range(5000, 5100)) + [STAFF], read) == "text"


def test_each_thread_has_groups_of_its_own(fs: Filesystem) -> None:
    """setgroups(2) itself changes one thread; only the C library's changes them all."""
    (fs.path / "shared").write_text("text")
    os.chown(fs.path / "shared", 0, STAFF)
    (fs.path / "shared").chmod(0o640)

    def both() -> Tuple[List[Any], List[Any]]:
        os.chdir(fs.path)
        results: List[List[Any]] = [[], []]
        turn = threading.Barrier(2)

        def run(number: int, groups: List[int]) -> None:
            syscalls.setgroups(groups)
            syscalls.setfsgid(ALICE)
            syscalls.setfsuid(ALICE)
            for _ in range(20):
                turn.wait()
                results[number].append(outcome(Path("shared").read_text))

        threads = [threading.Thread(target=run, args=args) for args in ((0, [STAFF]), (1, []))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results[0], results[1]

    assert fs.run(both).result() == (["text"] * 20, ["EACCES"] * 20)


def acl(*entries: Tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF


def test_an_acl_that_grants_more_than_the_mode(fs: Filesystem) -> None:
    secret = fs.path / "secret"
    secret.write_text("text")
    granted = acl((1, 6, NOBODY), (2, 4, ALICE), (4, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY))
    os.setxattr(secret, "system.posix_acl_access", granted)
    assert os.getxattr(secret, "system.posix_acl_access") == granted
    assert stat.S_IMODE(secret.stat().st_mode) == 0o640  # the mask shows as the group's bits
    assert beneath(fs, ALICE, [], Path("secret").read_text) == "text"
    assert beneath(fs, BOB, [], Path("secret").read_text) == "EACCES"
    assert beneath(fs, ALICE, [], lambda: os.access("secret", os.R_OK)) is True
    assert beneath(fs, BOB, [], lambda: os.access("secret", os.R_OK)) is False
    assert beneath(fs, ALICE, [], lambda: Path("secret").write_text("x")) == "EACCES"


def test_a_default_acl_counts_in_place_of_the_umask(fs: Filesystem) -> None:
    top = fs.path / "d"
    top.mkdir()
    top.chmod(0o777)
    default = acl((1, 7, NOBODY), (2, 7, BOB), (4, 7, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY))
    os.setxattr(top, "system.posix_acl_default", default)

    def make() -> None:
        os.umask(0o077)
        os.close(os.open("d/file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir("d/sub", 0o777)
        os.close(os.open("plain", os.O_CREAT | os.O_WRONLY, 0o666))

    beneath(fs, ALICE, [], make)
    modes = [stat.S_IMODE(os.stat(fs.path / name).st_mode) for name in ("d/file", "d/sub", "plain")]
    assert modes == [0o660, 0o770, 0o600]
    assert os.getxattr(top / "sub", "system.posix_acl_default") == default
    assert beneath(fs, BOB, [], lambda: Path("d/file").write_text("bob's")) == 5


def test_a_setgid_directory_gives_its_group(fs: Filesystem) -> None:
    top = fs.path / "d"
    top.mkdir()
    os.chown(top, 0, STAFF)
    top.chmod(0o2777)
    beneath(fs, ALICE, [], lambda: (Path("d/file").write_text(""), os.mkdir("d/sub")))
    assert os.stat(top / "file").st_gid == os.stat(top / "sub").st_gid == STAFF
    assert os.stat(top / "sub").st_mode & stat.S_ISGID


def test_a_sticky_directory(fs: Filesystem) -> None:
    top = fs.path / "d"
    top.mkdir()
    top.chmod(0o1777)
    beneath(fs, ALICE, [], lambda: Path("d/file").write_text(""))
    assert beneath(fs, BOB, [], lambda: os.unlink("d/file")) == "EPERM"
    assert beneath(fs, BOB, [], lambda: os.rename("d/file", "d/other")) == "EPERM"
    assert beneath(fs, ALICE, [], lambda: os.unlink("d/file")) is None


def test_set_id_bits_are_lost_when_others_write(fs: Filesystem) -> None:
    program = fs.path / "program"

    def fresh() -> None:
        program.write_bytes(b"text")
        program.chmod(0o6777)

    def bits() -> int:
        return stat.S_IMODE(program.stat().st_mode) & 0o7000

    def opened(action: Callable[[int], Any]) -> Callable[[], None]:
        def run() -> None:
            fd = os.open("program", os.O_RDWR)
            action(fd)
            os.close(fd)

        return run

    for change in (
        opened(lambda fd: os.write(fd, b"x")),
        opened(lambda fd: os.ftruncate(fd, 1)),
        lambda: os.truncate("program", 1),
        opened(lambda fd: syscalls.fallocate(fd, 0, 0, 100)),
        lambda: os.close(os.open("program", os.O_WRONLY | os.O_TRUNC)),
    ):
        fresh()
        beneath(fs, ALICE, [], change)
        assert bits() == 0
        fresh()
        beneath(fs, ALICE, [], lambda: os.stat("program"))  # the thread that serves has been Alice
        beneath(fs, 0, [], change)
        assert bits() == 0o6000  # root may keep them
    fresh()
    os.chown(program, ALICE, ALICE)
    assert bits() == 0  # any change of owner
    fresh()
    os.chown(program, -1, -1)
    assert bits() == 0  # and none at all


def test_who_has_got_into_a_directory_need_not_find_the_way_again(fs: Filesystem) -> None:
    """A daemon goes to its directory, then drops its privileges: what is above it does not matter any more."""
    inner = fs.path / "private" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").write_text("text")
    (inner / "sub").mkdir()
    inner.chmod(0o777)
    (fs.path / "private").chmod(0o700)

    def work() -> List[Any]:
        os.chdir(inner)
        directory = os.open("sub", os.O_RDONLY)

        def rest() -> List[Any]:
            Path("mine").write_text("mine")
            os.mkdir("made")
            os.rename("mine", "made/mine")
            os.link("made/mine", "again")
            os.chmod("again", 0o600)
            os.utime("again", (1, 1))
            os.symlink("again", "soft")
            return [
                os.stat(".").st_mode & 0o777, Path("file").read_text(), Path("soft").read_text(),
                sorted(os.listdir(".")), os.stat("again").st_nlink, os.stat("again").st_mtime, os.listdir(directory),
                outcome(lambda: os.stat(inner)), os.statvfs(".").f_bsize > 0, os.readlink("soft"),
                os.unlink("again"), os.access("made", os.W_OK), os.truncate("made/mine", 1),
            ]  # fmt: skip

        return as_user(ALICE, ALICE, [], rest)()

    names = ["again", "file", "made", "soft", "sub"]
    expected = [0o777, "text", "mine", names, 2, 1, [], "EACCES", True, "again", None, True, None]
    assert fs.run(work).result() == expected


def test_a_file_is_linked_by_the_name_that_is_used(fs: Filesystem) -> None:
    """Not by another one, which the caller cannot get to; nor by any, where it has the file open."""
    os.close(os.open(fs.path / "mine", os.O_CREAT | os.O_WRONLY))
    os.chown(fs.path / "mine", ALICE, ALICE)
    (fs.path / "closed").mkdir(0o700)
    os.link(fs.path / "mine", fs.path / "closed" / "also")
    (fs.path / "closed" / "open").write_text("")
    (fs.path / "closed" / "open").chmod(0o666)
    opened = os.open(fs.path / "closed" / "open", os.O_RDWR)

    def link() -> Any:
        os.link("mine", "second")
        return os.stat("second").st_nlink, outcome(
            lambda: os.link(f"/proc/self/fd/{opened}", "third", src_dir_fd=opened, follow_symlinks=True)
        )

    assert beneath(fs, ALICE, [], link) == (3, None)
    assert os.stat(fs.path / "third").st_ino == os.fstat(opened).st_ino
    os.close(opened)


def test_an_open_file_needs_no_permission_any_more(fs: Filesystem) -> None:
    (fs.path / "file").write_text("text")
    os.chown(fs.path / "file", ALICE, ALICE)

    def work() -> Any:
        fd = os.open("file", os.O_RDWR | os.O_APPEND)
        os.chmod("file", 0)
        os.write(fd, b"+")
        os.ftruncate(fd, 3)
        return os.pread(fd, 10, 0), os.fstat(fd).st_size, outcome(lambda: os.open("file", os.O_RDONLY))

    assert beneath(fs, ALICE, [], work) == (b"tex", 3, "EACCES")


def test_nobody_unmounts_by_being_refused(fs: Filesystem) -> None:
    """The kernel takes off what is mounted on a name when a lookup of it fails."""
    closed = fs.path / "closed"
    top = closed / "a b" / "mnt"
    top.mkdir(parents=True)
    (closed / "plain").mkdir()
    mount_new("tmpfs", top)
    try:
        (top / "file").write_text("nested")
        closed.chmod(0o700)
        paths = ["closed/a b/mnt/file", "closed/a b", "closed/plain"]
        found = [beneath(fs, ALICE, [], lambda path=path: os.stat(path)) for path in paths]
        assert found == ["ENOMEM", "ENOMEM", "EACCES"]
        assert os.path.ismount(top) and (top / "file").read_text() == "nested"
    finally:
        syscalls.umount2(os.fsencode(top), syscalls.MNT_DETACH)
    assert beneath(fs, ALICE, [], lambda: os.stat("closed/a b")) == "EACCES"


def squash_root(store: Path, mountpoint: Path) -> None:
    """Serve ``store`` as a server with root_squash does: whoever comes as root is nobody."""
    genuine = ThreadIdentity.of

    def of(self: ThreadIdentity, uid: int, gid: int, tid: int) -> Credentials:
        return genuine(self, *(uid, gid, tid) if uid else (65534, 65534, 0))

    ThreadIdentity.of = of  # type: ignore[method-assign]
    cli.main(["-f", "--mode", "proxy", "--proxy-dir", str(store), str(mountpoint)])


def test_where_root_has_no_rights(tmp_path: Path) -> None:
    store, squashed = tmp_path / "store", tmp_path / "squashed"
    for path in (store, squashed):
        path.mkdir()
    os.chown(store, ALICE, ALICE)
    store.chmod(0o700)
    with mounted(tmp_path, "restore") as fs:
        fs.run(lambda: squash_root(store, squashed))
        wait_until(lambda: os.path.ismount(squashed), 20)
        try:
            assert outcome(lambda: os.listdir(squashed)) == "EACCES"
            fs.proxy(squashed)

            def work() -> Any:
                Path("file").write_text("text")
                os.mkdir("d")
                Path("d/x").write_text("x")
                os.chmod("d/x", 0o600)
                os.rename("d/x", "d/y")
                os.truncate("d/y", 0)
                log = os.open("log", os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.fcntl(log, fcntl.F_SETFL, os.O_APPEND)
                os.pwrite(log, b"appended", 100)
                assert os.pread(log, 100, 0) == b"appended"
                os.close(log)
                return Path("file").read_text(), sorted(os.listdir(".")), os.stat("d/y").st_uid

            assert beneath(fs, ALICE, [], work) == ("text", ["d", "file", "log"], ALICE)
            assert beneath(fs, 0, [], lambda: os.listdir(".")) == "EACCES"
            assert beneath(fs, BOB, [], lambda: Path("file").read_text()) == "EACCES"
            assert os.stat(store / "d" / "y").st_uid == ALICE
        finally:
            syscalls.umount2(os.fsencode(squashed), syscalls.MNT_DETACH)


def test_no_race_leads_out_of_the_tree(tmp_path: Path) -> None:
    """Somebody swaps a directory, and files, for links to the outside while they and names beneath are used."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("outside")
    (outside / "secret").touch()
    marks = [os.stat(path) for path in (outside, outside / "file")]
    with mounted(tmp_path, "proxy") as fs:
        real = fs.real
        (real / "d").mkdir()
        for name in ("d/file", "top", "d/inner"):
            (real / name).write_text("inside")
        for name, target in (("d", outside), ("top", outside / "file"), ("d/inner", outside / "file")):
            os.symlink(target, real / f"{name}-link")

        def swap(directory: int, name: bytes) -> Callable[[], None]:
            def run() -> None:
                while True:
                    syscalls.renameat2(directory, name, directory, name + b"-link", 2)

            return run

        behind = os.open(real, os.O_PATH), os.open(real / "d", os.O_PATH)
        mount = os.open(fs.path, os.O_PATH | os.O_DIRECTORY)
        inner = os.open(fs.path / "d", os.O_PATH | os.O_DIRECTORY)
        for swapped in ((behind[0], b"d"), (behind[0], b"top"), (behind[1], b"inner")):
            fs.run(swap(*swapped))
        kinds = ((inner, "file"), (mount, "top"), (inner, "inner"))
        source, deadline = random.Random(7), time.monotonic() + 6
        seen = {(name, what): 0 for _, name in kinds for what in ("inside", "error")}
        flags = os.O_NOFOLLOW  # or the kernel would follow the link, as it should, and not us

        def read(at: int, name: str) -> None:
            fd = os.open(name, os.O_RDONLY | flags, dir_fd=at)
            try:
                assert os.read(fd, 100) in (b"inside", b"")
            finally:
                os.close(fd)

        def truncate(at: int, name: str) -> None:
            os.close(os.open(name, os.O_RDWR | os.O_TRUNC | flags, dir_fd=at))

        def write(at: int, name: str) -> None:
            fd = os.open(name, os.O_WRONLY | flags, dir_fd=at)
            try:
                os.write(fd, b"inside")
            finally:
                os.close(fd)

        def beside(at: int, name: str) -> None:
            os.close(os.open("new", os.O_CREAT | os.O_WRONLY | flags, dir_fd=at))
            os.unlink("new", dir_fd=at)

        def directory(at: int, name: str) -> None:
            os.mkdir("dir", dir_fd=at)
            os.rmdir("dir", dir_fd=at)

        def link(at: int, name: str) -> None:
            os.link(name, "hard", src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
            os.unlink("hard", dir_fd=at)

        def owner(at: int, name: str) -> None:
            os.chown(name, 5, 5, dir_fd=at, follow_symlinks=False)

        def times(at: int, name: str) -> None:
            os.utime(name, (5, 5), dir_fd=at, follow_symlinks=False)

        def mode(at: int, name: str) -> None:
            fd = os.open(name, os.O_PATH | flags, dir_fd=at)
            try:
                os.chmod(f"/proc/self/fd/{fd}", 0o600)
                os.setxattr(f"/proc/self/fd/{fd}", "trusted.mark", b"")
            finally:
                os.close(fd)

        def look(at: int, name: str) -> None:
            assert os.stat(name, dir_fd=at, follow_symlinks=False).st_ino != marks[1].st_ino
            assert "secret" not in os.listdir(f"/proc/self/fd/{at}")

        actions: List[Callable[[int, str], None]] = [
            write, truncate, beside, directory, link, owner, times, mode, look
        ]  # fmt: skip
        try:
            while time.monotonic() < deadline:
                for at, name in kinds:
                    for action in (write, read, source.choice(actions)):
                        try:
                            action(at, name)
                            seen[name, "inside"] += 1
                        except OSError:
                            seen[name, "error"] += 1
        finally:
            for fd in (*behind, inner, mount):
                os.close(fd)
        # Both happened with each: the link was in the way, and it was not.
        assert min(seen.values()) > 50, seen
    assert sorted(os.listdir(outside)) == ["file", "secret"] and (outside / "file").read_text() == "outside"
    for before, path in zip(marks, (outside, outside / "file")):
        after = os.stat(path)
        assert (after.st_mode, after.st_uid, after.st_mtime_ns, after.st_ctime_ns, after.st_nlink) == (
            before.st_mode, before.st_uid, before.st_mtime_ns, before.st_ctime_ns, before.st_nlink
        )  # fmt: skip
    assert os.listxattr(outside / "file") == []


def test_links_are_the_readers_own_affair(fs: Filesystem, tmp_path: Path) -> None:
    """The kernel follows a link in the name space of whoever follows it; the file system never does."""
    outside = tmp_path / "outside"
    outside.write_text("outside")
    os.symlink(outside, fs.path / "link")
    assert (fs.path / "link").read_text() == "outside"  # as on any file system
    os.symlink("/proc/self/root", fs.path / "magic")
    assert os.readlink(fs.path / "magic") == "/proc/self/root"
