"""Who has given capabilities up, or kept some, gets what it would get in the directory itself."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any, Callable, Iterator, Tuple

import pytest
from stubfs_kit import Filesystem, mounted

from stubfs import syscalls

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
OWNER, OTHER = 1001, 1002
CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, SYS_ADMIN = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 21
PR_SET_KEEPCAPS, CLONE_NEWUSER = 8, 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)
Action = Callable[[], Any]


@pytest.fixture(params=["restore", "proxy"])
def fs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    with mounted(tmp_path, request.param) as filesystem:
        yield filesystem
        assert "ERROR" not in filesystem.log.read_text()


def outcome(action: Action) -> Any:
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def root_without(capabilities: int) -> Callable[[], None]:
    def become() -> None:
        mine = syscalls.Capabilities()
        mine.set(mine.effective(0) & ~capabilities, mine.permitted(0) & ~capabilities)

    return become


def user_with(capabilities: int) -> Callable[[], None]:
    def become() -> None:
        assert not _libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(OTHER, OTHER, OTHER)
        os.setresuid(OTHER, OTHER, OTHER)
        syscalls.Capabilities().set(capabilities, capabilities)

    return become


def set_user_id_root() -> None:
    os.setresgid(OTHER, 0, 0)
    os.setresuid(OTHER, 0, 0)


def look() -> Any:
    return outcome(lambda: Path("secret").read_text())


CASES: "dict[str, Tuple[Callable[[], None], Action, Any]]" = {
    "root": (root_without(0), look, "text"),
    "root that must not read everything": (root_without(DAC_OVERRIDE | DAC_READ_SEARCH), look, "EACCES"),
    "root that must not change modes": (root_without(FOWNER), lambda: os.chmod("secret", 0), "EPERM"),
    "root that must not give away": (root_without(CHOWN), lambda: os.chown("secret", OTHER, OTHER), "EPERM"),
    "root that sees no trusted attributes": (root_without(SYS_ADMIN), lambda: os.listxattr("secret"), []),
    "user": (user_with(0), look, "EACCES"),
    "user who sees no trusted attributes": (user_with(0), lambda: os.listxattr("secret"), []),
    "user who sees them": (user_with(SYS_ADMIN), lambda: os.listxattr("secret"), ["trusted.mark"]),
    "user who may read everything": (user_with(DAC_READ_SEARCH), look, "text"),
    "who may read may not write": (user_with(DAC_READ_SEARCH), lambda: os.truncate("secret", 0), "EACCES"),
    "user who may change modes": (user_with(FOWNER), lambda: os.chmod("secret", 0o400), None),
    "user who may give away": (user_with(CHOWN), lambda: os.chown("secret", OTHER, OTHER), None),
    "set-user-id program on its caller's behalf": (
        set_user_id_root,
        lambda: (os.access("secret", os.R_OK), os.access("secret", os.R_OK, effective_ids=True)),
        (False, True),
    ),
}


def secret_in(top: Path) -> None:
    path = top / "secret"
    path.unlink(missing_ok=True)
    path.write_text("text")
    os.chown(path, OWNER, OWNER)
    path.chmod(0)
    os.setxattr(path, "trusted.mark", b"1")


def done(fs: Filesystem, top: Path, become: Callable[[], None], action: Action) -> Any:
    def work() -> Any:
        os.chdir(top)
        become()
        return outcome(action)

    return fs.run(work).result()


@pytest.mark.parametrize("case", CASES)
def test_what_a_process_may(fs: Filesystem, tmp_path: Path, case: str) -> None:
    become, action, expected = CASES[case]
    native = tmp_path / "native"
    native.mkdir()
    for top in (native, fs.path):
        top.chmod(0o755)
        secret_in(top)
        found = done(fs, top, become, action)
        assert found == expected, top


def test_one_after_the_other(fs: Filesystem) -> None:
    """The thread that serves them has none of what the one before had."""
    secret_in(fs.path)
    fs.path.chmod(0o755)
    for _ in range(3):
        assert done(fs, fs.path, user_with(DAC_READ_SEARCH), look) == "text"
        assert done(fs, fs.path, user_with(0), look) == "EACCES"
        assert done(fs, fs.path, root_without(DAC_OVERRIDE | DAC_READ_SEARCH), look) == "EACCES"
        assert done(fs, fs.path, root_without(0), look) == "text"


def in_user_namespace(fs: Filesystem, top: Path, id_map: str, action: Action) -> Any:
    """``action`` by the root of a namespace with these ids."""
    made, mapped = os.pipe(), os.pipe()

    def work() -> Any:
        os.chdir(top)
        assert not _libc.unshare(CLONE_NEWUSER)
        os.write(made[1], b"x")
        os.read(mapped[0], 1)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        return outcome(action)

    try:
        process = fs.run(work)
        os.read(made[0], 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text(id_map)
        os.write(mapped[1], b"x")
        return process.result()
    finally:
        for fd in (*made, *mapped):
            os.close(fd)


@pytest.mark.parametrize("id_map", ["0 0 1", "0 0 4294967295", "0 100000 1000"])
def test_root_of_a_user_namespace(fs: Filesystem, tmp_path: Path, id_map: str) -> None:
    """It has power over files of the ids that its namespace has, and never over others."""
    native = tmp_path / "native"
    native.mkdir()
    found = {}
    for top in (native, fs.path):
        top.chmod(0o777)
        secret_in(top)
        (top / "roots").touch(0o600)
        found[top] = [
            in_user_namespace(fs, top, id_map, action)
            for action in (
                look,
                lambda: Path("roots").read_text(),
                lambda: os.chown("secret", 0, 0),
                lambda: Path("own").write_text("x"),
                lambda: os.mknod("device", 0o20600, os.makedev(1, 3)),
                lambda: os.listxattr("secret"),
            )
        ]
    assert found[fs.path] == found[native]
