"""What stubfs says on machines that lack something, and in what seldom goes wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Dict, Iterator, Optional

import pytest
from stubfs_kit import command, environment, mounted
from testing_kit import unprivileged

import stubfs
from spfs.testing import DelayedMount, MountServer
from spfs.testing.replacing import replace
from stubfs import libfuse, syscalls, wire
from stubfs.client import FilesystemClient
from stubfs.errors import MissingFeatureError, StubfsError
from stubfs.fusemount import fuse_mount

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


def refused(*arguments: str, code: int, environ: Optional[Dict[str, str]] = None) -> str:
    """What the command says; nothing is mounted then."""
    done = subprocess.run(
        command(*arguments), env={**environment(), **(environ or {})}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == code and done.stderr.startswith("stubfs: cannot "), (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1 and done.stdout == "" and not os.path.ismount(arguments[-1])
    return done.stderr


class TestTheMachine:
    def test_no_fusepy(self, mnt: Path, tmp_path: Path) -> None:
        (tmp_path / "fuse.py").write_text("raise ImportError('No module named fuse')")
        path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
        said = refused(str(mnt), code=3, environ={"PYTHONPATH": path})
        assert said == "stubfs: cannot import fusepy: No module named fuse (pip install fusepy)\n"

    def test_a_library_that_is_not_there(self, mnt: Path) -> None:
        said = refused(str(mnt), code=3, environ={"FUSE_LIBRARY_PATH": "/none/libfuse.so.2"})
        assert "cannot load libfuse: /none/libfuse.so.2: " in said and "(install libfuse 2: " in said

    def test_no_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FUSE_LIBRARY_PATH", raising=False)
        monkeypatch.setattr(libfuse, "SONAME", "libnone.so.2")
        with pytest.raises(MissingFeatureError, match="cannot load libfuse: libnone.so.2: .*apt install libfuse2"):
            libfuse.load()

    @pytest.mark.parametrize(
        "source, missing",
        [
            ("", "fuse_chan_new@FUSE_2.6 is missing"),
            ("void *fuse_chan_new() { return 0; }", "fuse_chan_new failed"),
            ("void *fuse_chan_new() { return &fuse_chan_new; } void *fuse_new() { return 0; }", "fuse_new failed"),
        ],
    )
    def test_another_library(self, mnt: Path, tmp_path: Path, source: str, missing: str) -> None:
        """One that has what fusepy looks for, but not what we do, or whose allocations fail."""
        there = "int fuse_main_real() { return 0; } void *fuse_get_context() { return 0; }"
        more = "int fuse_version() { return 29; } void fuse_session_process() {} void *fuse_get_session() { return 0; }"
        (tmp_path / "fuse.c").write_text(f"{there}\n{more}\n{source}\n")
        (tmp_path / "versions").write_text("FUSE_2.6 { global: fuse*; local: *; };")
        library = str(tmp_path / "libfuse.so")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", library, f"-Wl,--version-script={tmp_path}/versions", tmp_path / "fuse.c"],
            check=True,
        )
        said = refused(str(mnt), code=3, environ={"FUSE_LIBRARY_PATH": library})
        assert f"cannot set up libfuse: {missing} (" in said and "is the library that was found libfuse 2" in said


class TestOthersThanRoot:
    def test_without_fusermount_and_on_what_is_not_theirs(self) -> None:
        with unprivileged() as user:
            (user.home / "mnt").mkdir()
            os.chown(user.home / "mnt", 65534, 65534)
            done = user.run("env", "PATH=/none", sys.executable, "-m", "stubfs", str(user.home / "mnt"))
            assert done.returncode == 3 and "cannot mount without root: fusermount: not found (install" in done.stdout
            os.chown(user.home / "mnt", 0, 0)
            done = user.python("-m", "stubfs", str(user.home / "mnt"))
            assert done.returncode == 1, done.stdout
            assert f"cannot mount on {user.home}/mnt: /usr/bin/fusermount: user has no write access" in done.stdout

    def test_without_the_right_of_fusermount(self) -> None:
        with unprivileged() as user:
            (user.home / "mnt").mkdir()
            os.chown(user.home / "mnt", 65534, 65534)
            words = ["setpriv", "--no-new-privs", sys.executable, "-m", "stubfs", str(user.home / "mnt")]
            done = user.run(*words)
            assert done.returncode == 3 and "Operation not permitted (fusermount must be setuid root" in done.stdout

    def test_an_owner_that_the_user_namespace_lacks(self) -> None:
        with unprivileged() as user:
            (user.home / "mnt").mkdir()
            os.chown(user.home / "mnt", 65534, 65534)
            done = user.in_user_namespace("-m", "stubfs", "-f", "-o", "uid=5000", str(user.home / "mnt"))
            assert done.returncode == 1, done.stdout
            assert "cannot give the top directory its owner: Invalid argument (" in done.stdout


def test_options_of_another_mode(mnt: Path) -> None:
    said = refused("--timeout", "3", str(mnt), code=2)
    assert "cannot start in mode restore: --timeout, --errno, --exempt: not used there (add --mode stub)" in said


def test_a_backing_directory_that_is_a_file(mnt: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused("--mode", "proxy", "--proxy-dir", str(tmp_path / "file"), str(mnt), code=1)
    assert f"cannot use {tmp_path}/file: Not a directory (give a directory" in said


def test_a_backing_directory_on_the_mount_itself(tmp_path: Path, mnt: Path) -> None:
    """Of one that is mounted already, by whoever gives us its device; and of one that serves."""
    device, root = fuse_mount("stubfs", "test", 0)
    try:
        syscalls.move_mount(root, os.fsencode(mnt))
        done = subprocess.run(
            command(f"/dev/fd/{device}", "-f", "--mode", "proxy", "--proxy-dir", str(mnt)),
            env=environment(), pass_fds=[device], capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 1 and "the directory is on the mount itself (give a directory of the" in done.stderr
    finally:
        os.close(device)
        os.close(root)
        syscalls.umount2(os.fsencode(mnt), syscalls.MNT_DETACH)
    with mounted(tmp_path) as filesystem:
        with pytest.raises(StubfsError, match="the directory is on the mount itself"):
            filesystem.proxy(filesystem.path)
        assert filesystem.client.status().mode == "restore"


def test_a_file_system_that_ends_instead_of_answering(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with wire.listen(path) as listener:

        def hear_and_end() -> None:
            with listener.accept()[0] as sock:
                sock.recv(1000)

        thread = threading.Thread(target=hear_and_end)
        thread.start()
        with FilesystemClient(path, 10) as client:
            with pytest.raises(StubfsError, match="cannot ask the file system for status: .*") as caught:
                client.status()
        thread.join()
    assert caught.value.hint == "its log may say why; if it is still mounted: umount -l, and mount it again"


def test_a_file_system_that_takes_too_long_to_start(mnt: Path) -> None:
    with pytest.raises(StubfsError, match=f"cannot mount on {mnt}: not ready in 0 s .give it longer: timeout="):
        stubfs.mount(mnt, timeout=0)
    assert not os.path.ismount(mnt)


def test_a_file_system_whose_process_dies_at_its_start(
    mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(StubfsError, match=f"cannot mount on {mnt}: no memory") as caught:
        stubfs.mount(mnt)
    assert caught.value.errno == errno.EIO
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(StubfsError, match=f"cannot mount on {mnt}: killed by signal 9"):
        stubfs.mount(mnt)


class TestTheKit:
    @pytest.fixture
    def server(self) -> Iterator[MountServer]:
        with MountServer() as server:
            yield server

    def test_a_directory_that_somebody_uses(self, server: MountServer) -> None:
        mount = server.mount()
        (mount.path.parent / "more").mkdir()
        (mount.path.parent / "more" / "file").write_text("")
        with pytest.raises(StubfsError, match=f"cannot remove {mount.path}: Directory not empty .take what is in it"):
            mount.close()
        with pytest.raises(StubfsError, match="cannot remove .*: Directory not empty .take what is in it"):
            server.close()
        os.unlink(mount.path.parent / "more" / "file")

    def test_a_file_system_that_does_not_die(self, server: MountServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody can be killed while the kernel waits for what hangs in it: here we do not see the end."""
        mount = server.mount()
        monkeypatch.setattr(DelayedMount, "_wait_end", lambda self, limit: False)
        with pytest.raises(StubfsError, match="cannot end the file system on .*: it hangs in the kernel .does what it"):
            mount.close()

    def test_a_replace_whose_process_dies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "python").write_text("#!/bin/sh\necho 'no memory' >&2\nexit 1\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        with pytest.raises(StubfsError, match="cannot replace /mnt: no memory"):
            replace(control="/none", pid=1, mountpoint="/mnt", source="/x", fstype="none")
