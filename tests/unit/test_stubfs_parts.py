"""The backing directory, mount options, messages and the client, without a mount."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Iterator

import pytest

from stubfs import messages, options, syscalls, wire
from stubfs.backing import Backing, allowed_flags, reopen_flags
from stubfs.client import FilesystemClient
from stubfs.credentials import ROOT, Credentials, ThreadIdentity
from stubfs.errors import StubfsError, UsageError
from stubfs.objects import fd_link
from stubfs.syscalls import MountAttr


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Backing]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    top = tmp_path / "inside"
    (top / "d").mkdir(parents=True)
    os.symlink("../outside", top / "relative")
    os.symlink(tmp_path / "outside", top / "absolute")
    os.symlink("../../outside/secret", top / "d" / "file")
    os.symlink("/proc/self/root", top / "magic")
    backing = Backing(os.open(top, os.O_PATH), 1, is_staging=False)
    yield backing
    backing.close()


class TestContainment:
    """What FUSE asks for never has a link on its way: the kernel follows those itself. A path with one is an attack."""

    @pytest.mark.parametrize("path", [b"relative/secret", b"absolute/secret", b"magic/etc", b"d/../../outside/secret"])
    def test_no_way_out(self, inside: Backing, path: bytes) -> None:
        attempts = [
            lambda: inside.stat(path), lambda: inside.open(path, os.O_RDONLY), lambda: inside.unlink(path),
            lambda: inside.open(path + b"2", os.O_WRONLY | os.O_CREAT, 0o600), lambda: inside.mkdir(path + b"2", 0o700),
            lambda: inside.rename(b"d", path), lambda: inside.rename(path, b"x"), lambda: inside.link(path, b"x"),
            lambda: inside.link(b"d", path), lambda: inside.link_fd(inside.fd, path),
            lambda: inside.symlink(b"x", path), lambda: inside.mknod(path, stat.S_IFIFO, 0),
            lambda: inside.rmdir(path), lambda: inside.pin(path), lambda: inside.open(path, os.O_PATH),
        ]  # fmt: skip
        for attempt in attempts:
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR, errno.EXDEV)

    @pytest.mark.parametrize("path", [b"d/file", b"absolute"])
    def test_the_last_component_is_not_followed(self, inside: Backing, path: bytes, tmp_path: Path) -> None:
        assert stat.S_ISLNK(inside.stat(path).st_mode)
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT):
            with pytest.raises(OSError) as caught:
                inside.open(path, flags, 0o600 if flags & os.O_CREAT else 0)
            assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
        fd = inside.pin(path)
        try:
            assert stat.S_ISLNK(os.fstat(fd).st_mode)
            syscalls.utimensat_following(fd_link(fd).encode(), (1, 0), (1, 0))
            os.chown(fd_link(fd), 1, 1)
            assert os.fstat(fd).st_mtime == 1 and os.fstat(fd).st_uid == 1
        finally:
            os.close(fd)
        status = (tmp_path / "outside" / "secret").stat()
        assert status.st_mtime > 1 and status.st_uid != 1
        assert (tmp_path / "outside" / "secret").read_text() == "secret"


def test_a_fifo_in_the_place_of_a_file_blocks_nobody(inside: Backing) -> None:
    inside.mknod(b"fifo", stat.S_IFIFO | 0o600, 0)
    os.close(inside.open(b"fifo", allowed_flags(os.O_RDONLY)))
    with pytest.raises(OSError) as caught:
        inside.open(b"fifo", allowed_flags(os.O_WRONLY))
    assert caught.value.errno == errno.ENXIO


def test_a_reopened_file_is_not_emptied() -> None:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY
    assert reopen_flags(flags) == os.O_RDWR | os.O_APPEND


class TestMountOptions:
    def test_as_mount_gives_them(self) -> None:
        text = "rw,suid,noexec,fsname=a/b,subtype=spfs,relatime,x-systemd.automount,X-mount.mkdir,allow_other,user=me"
        parsed = options.parse_options(text)
        assert parsed.attributes == MountAttr.NODEV | MountAttr.NOEXEC
        assert (parsed.source, parsed.subtype, parsed.allow_other) == ("a/b", "spfs", True)
        assert options.parse_options("").attributes == MountAttr.NOSUID | MountAttr.NODEV
        assert options.parse_options("rw,ro").attributes & MountAttr.RDONLY

    def test_those_of_fuse(self) -> None:
        parsed = options.parse_options("default_permissions,max_read=4096")
        assert parsed.extra == {"default_permissions": None, "max_read": "4096"}

    def test_our_own(self) -> None:
        parsed = options.parse_options("mode=proxy,proxy_dir=/a,socket-path=/b,timeout=5,uid=1,gid=root,umask=027")
        assert parsed.settings == {"mode": "proxy", "proxy-dir": "/a", "socket-path": "/b", "timeout": "5"}
        assert (parsed.uid, parsed.gid, parsed.umask) == (1, 0, 0o027)

    @pytest.mark.parametrize(
        "text, why",
        [
            ("uid=no-such-user", "there is no user of that name"), ("uid=-1", "there is no user of that name"),
            ("gid=no such", "there is no group of that name"), ("uid=4294967295", "the largest user id is 4294967294"),
            ("gid=99999999999", "the largest group id is 4294967294"), ("umask=9", "an octal number up to 777"),
            ("umask=1777", "an octal number up to 777"), ("umask=-1", "an octal number up to 777"),
            ("max_read=many", "a number of bytes is needed"),
        ],
    )  # fmt: skip
    def test_bad_values(self, text: str, why: str) -> None:
        with pytest.raises(UsageError, match=f"-o {text}: {why}"):
            options.parse_options(text)

    @pytest.mark.parametrize("text", ["other", "fsname=", "ro=1", "rw,=x", "remount", "allow_root", "commentary"])
    def test_unknown(self, text: str) -> None:
        with pytest.raises(UsageError, match="no such option"):
            options.parse_options(text)


class TestMessages:
    def test_any_name_survives(self) -> None:
        name = os.fsdecode(b"\xff\xfe grun")
        assert messages.decode(messages.encode({"path": name})) == {"path": name}

    @pytest.mark.parametrize("payload", [b"", b"[]", b"1", b"\xff", b"{", b"[" * 100_000])
    def test_no_objects(self, payload: bytes) -> None:
        with pytest.raises(ValueError):
            messages.decode(payload)


class TestClient:
    """Against a file system that answers wrongly, late or not at all."""

    def serve(self, tmp_path: Path, *answers: bytes) -> str:
        path = str(tmp_path / "sock")
        listener = wire.listen(path)

        def run() -> None:
            with listener:
                connection, _ = listener.accept()
                with connection:
                    for answer in answers:
                        wire.receive(connection)
                        connection.send(answer)
                    while wire.receive(connection) is not None:
                        pass  # without an answer

        threading.Thread(target=run, daemon=True).start()
        return path

    def test_an_error_with_its_hint(self, tmp_path: Path) -> None:
        status = messages.STATUS.pack(-errno.EBUSY)
        path = self.serve(tmp_path, status + b'{"message": "cannot", "hint": "wait"}')
        with FilesystemClient(path, 5) as client, pytest.raises(StubfsError) as caught:
            client.status()
        assert (caught.value.errno, str(caught.value)) == (errno.EBUSY, "cannot (wait)")

    @pytest.mark.parametrize("answer", [b"ab", messages.STATUS.pack(0) + b"no JSON"])
    def test_nonsense(self, tmp_path: Path, answer: bytes) -> None:
        with FilesystemClient(self.serve(tmp_path, answer), 5) as client, pytest.raises(StubfsError) as caught:
            client.status()
        assert caught.value.errno == errno.EPROTO

    def test_too_late(self, tmp_path: Path) -> None:
        with FilesystemClient(self.serve(tmp_path), 0.05) as client:
            with pytest.raises(StubfsError) as caught:
                client.held()
            assert caught.value.errno == errno.ETIMEDOUT
            with pytest.raises(StubfsError):
                client.held()  # the late answer is not taken for this one's


def test_root_needs_no_look_at_its_groups() -> None:
    identity = ThreadIdentity()
    assert identity.of(0, 0, os.getpid()) == ROOT
    identity.assume(ROOT)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_thread_takes_an_identity_and_gives_it_back(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o700)
    backing = Backing(os.open(tmp_path / "d", os.O_PATH), 1, is_staging=False)
    results = []

    def run() -> None:
        identity = ThreadIdentity()
        identity.assume(Credentials(1234, 1234, (5, 6)))
        try:
            backing.open(b"x", os.O_WRONLY | os.O_CREAT, 0o600)
        except PermissionError:
            results.append("refused")
        identity.assume(ROOT)
        os.close(backing.open(b"x", os.O_WRONLY | os.O_CREAT, 0o600))
        results.append("allowed")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    backing.close()
    assert results == ["refused", "allowed"]
