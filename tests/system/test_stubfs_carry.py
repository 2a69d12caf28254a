"""What restore mode has and the real side lacks, left or carried over; what the real side has is never touched."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, Tuple

import pytest
from stubfs_kit import Filesystem, environment, mounted
from testing_kit import let_others_in

from stubfs.errors import StubfsError

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    with mounted(tmp_path) as filesystem:
        yield filesystem


def proxy(fs: Filesystem, missing: str) -> None:
    fd = os.open(fs.real, os.O_PATH | os.O_DIRECTORY)
    try:
        fs.client.mode("proxy", fd, missing=missing)
    finally:
        os.close(fd)


Entry = Tuple[int, int, int, int, int, object]


def tree(top: Path) -> Dict[str, Entry]:
    """path -> type and mode, owner, group, links, modification time, and contents, target or device."""
    found: Dict[str, Entry] = {}
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = Path(directory, name)
            status = path.lstat()
            content: object = status.st_rdev
            if path.is_symlink():
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = path.read_bytes(), {key: os.getxattr(path, key) for key in os.listxattr(path)}
            links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
            key = str(path.relative_to(top))
            found[key] = (status.st_mode, status.st_uid, status.st_gid, links, status.st_mtime_ns, content)
    return found


def build(top: Path) -> None:
    """Of all kinds."""
    (top / "d/e").mkdir(parents=True)
    (top / "d/e/file").write_bytes(b"contents" * 1000)
    os.setxattr(top / "d/e/file", "user.name", b"value")
    os.chown(top / "d/e/file", 1000, 1001)
    os.chmod(top / "d/e/file", 0o4755)
    os.link(top / "d/e/file", top / "hard")
    os.symlink("d/e/file", top / "link")
    os.link(top / "link", top / "d/link too", follow_symlinks=False)
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "socket", stat.S_IFSOCK | 0o660)
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (top / os.fsdecode(b"\xff name")).write_bytes(b"")
    with open(top / "sparse", "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"in the middle")
    os.chmod(top / "d", 0o1710)
    for path in ("d/e/file", "d/e", "d"):
        os.utime(top / path, ns=(1_000_000_001, 2_000_000_002))


def test_carried_with_all_that_belongs_to_it(fs: Filesystem) -> None:
    build(fs.path)
    expected = tree(fs.path)
    proxy(fs, "carry")
    found = tree(fs.real)
    sparse = (fs.real / "sparse").stat()
    assert found == expected and sparse.st_blocks * 512 < 1 << 20
    assert found["hard"][3] == 2 and (fs.real / "hard").samefile(fs.real / "d/e/file")
    assert (fs.path / "d/e/file").read_bytes() == b"contents" * 1000


def test_what_the_real_side_has_stays(fs: Filesystem) -> None:
    for name in ("file", "d/file", "other"):
        for top, text in ((fs.path, "staging"), (fs.real, "real")):
            (top / name).parent.mkdir(exist_ok=True)
            (top / name).write_text(text)
    os.unlink(fs.real / "other")
    (fs.real / "other").mkdir()  # of another kind
    os.symlink("/etc", fs.real / "way out")
    (fs.path / "way out").mkdir()
    (fs.path / "way out/file").write_text("must not get there")
    (fs.path / "d/missing").write_text("carried")
    proxy(fs, "carry")
    assert (fs.real / "file").read_text() == (fs.real / "d/file").read_text() == "real"
    assert os.listdir(fs.real / "other") == [] and (fs.real / "d/missing").read_text() == "carried"
    assert not os.path.exists("/etc/file") and os.readlink(fs.real / "way out") == "/etc"


def test_open_files_go_on(fs: Filesystem) -> None:
    with open(fs.path / "f", "w+") as file:
        file.write("written in restore mode")
        file.flush()
        proxy(fs, "carry")
        file.write(", and on the real side")
        file.flush()
        file.seek(0)
        assert file.read() == (fs.real / "f").read_text() == "written in restore mode, and on the real side"


def test_left(fs: Filesystem) -> None:
    with open(fs.path / "f", "w+") as file:
        file.write("x")
        file.flush()
        proxy(fs, "leave")
        with pytest.raises(OSError) as caught:
            file.read(1) or os.pread(file.fileno(), 1, 0)
        assert caught.value.errno == errno.ESTALE
    assert os.listdir(fs.path) == os.listdir(fs.real) == []


def test_from_stub_mode_while_somebody_waits(fs: Filesystem) -> None:
    (fs.path / "f").write_text("carried")
    fs.client.mode("stub")
    process = fs.run((fs.path / "f").read_text)
    fs.client.wait_held(1, 10)
    proxy(fs, "carry")
    assert process.result() == "carried"


def test_who_listens_on_a_socket_is_found_by_its_name(fs: Filesystem) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(fs.path / "socket"))
        listener.listen()
        os.chown(fs.path / "socket", 1000, 1001)
        os.chmod(fs.path / "socket", 0o620)
        proxy(fs, "carry")
        status = os.stat(fs.real / "socket")
        assert (status.st_uid, status.st_gid, status.st_mode) == (1000, 1001, stat.S_IFSOCK | 0o620)
        client.settimeout(5)
        client.connect(str(fs.path / "socket"))
        listener.accept()[0].close()


@pytest.mark.parametrize("mode", ["restore", "stub"])
def test_a_failure_changes_nothing(fs: Filesystem, mode: str) -> None:
    (fs.path / "a").mkdir()
    (fs.path / "a/file").write_text("x")
    (fs.path / "b").mkdir()
    (fs.path / "b/file").write_text("x")
    (fs.real / "b").mkdir()
    os.system(f"chattr +i {fs.real / 'b'}")
    try:
        fs.client.mode(mode)
        with pytest.raises(StubfsError) as caught:
            proxy(fs, "carry")
        assert "missing=carry: b/file: " in caught.value.message
        assert os.listdir(fs.real) == ["b"] and fs.client.status().mode == mode
        fs.client.mode("restore")
        assert (fs.path / "a/file").read_text() == "x"
    finally:
        os.system(f"chattr -i {fs.real / 'b'}")
    proxy(fs, "carry")
    assert (fs.real / "a/file").read_text() == (fs.real / "b/file").read_text() == "x"


def test_a_second_real_directory(fs: Filesystem) -> None:
    proxy(fs, "carry")
    with pytest.raises(StubfsError, match="left for another directory already"):
        proxy(fs, "carry")
    with pytest.raises(StubfsError, match="leave or carry"):
        fs.client.mode("stub", missing="carry")


AS_SQUASHED = """
import os, sys
from stubfs.carry import Carrying
Carrying(*(os.open(path, os.O_PATH | os.O_DIRECTORY) for path in sys.argv[1:])).run()
"""


def test_as_the_owner_where_root_may_not(tmp_path: Path) -> None:
    """As on a server that squashes root: one who may neither write into what is not his, nor give anything away."""
    staging, target = tmp_path / "staging", tmp_path / "target"
    for path in (staging / "d", target / "d"):
        path.mkdir(parents=True)
        os.chown(path, 1234, 1235)
    for name in ("f", "d/f"):
        (staging / name).write_text("x")
        os.chown(staging / name, 1234, 1235)
        os.utime(staging / name, (1, 2))
    let_others_in(tmp_path)
    target.chmod(0o777)
    rights = "-dac_override,-dac_read_search,-chown,-fowner"
    subprocess.run(
        ["setpriv", "--bounding-set", rights, sys.executable, "-c", AS_SQUASHED, str(staging), str(target)],
        env=environment(), check=True, timeout=20,
    )  # fmt: skip
    for name in ("f", "d/f"):
        status = (target / name).stat()
        assert (status.st_uid, status.st_gid, status.st_mtime) == (1234, 1235, 2)
        assert (target / name).read_text() == "x"
