"""Who has given capabilities up, or kept some, gets what it would get in the directory itself."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, Tuple

import pytest
from stubfs_kit import Filesystem, Process, mounted, outcome

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
        inner = Process(act)  # a thread that has asked for nothing yet: as whom, is believed for a moment
        try:
            return inner.result()
        finally:
            inner.close()

    def act() -> Any:
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

    def prepare(top: Path) -> None:
        top.chmod(0o777)
        secret_in(top)
        (top / "roots").touch(0o600)

    actions: "dict[str, Action]" = {
        "look": look,
        "read": lambda: Path("roots").read_text(),
        "chown": lambda: os.chown("secret", 0, 0),
        "write": lambda: Path("own").write_text("x"),
        "mknod": lambda: os.mknod("device", 0o20600, os.makedev(1, 3)),
        "listxattr": lambda: os.listxattr("secret"),
    }
    in_both(fs, tmp_path, prepare, actions, id_map)


def in_both(
    fs: Filesystem,
    tmp_path: Path,
    prepare: Callable[[Path], None],
    actions: "dict[str, Action]",
    id_map: str = "0 100000 1000",
) -> None:
    """What the root of a namespace gets, in the directory itself and here."""
    native = tmp_path / "native"
    native.mkdir()
    found = {}
    for top in (native, fs.path):
        top.chmod(0o755)
        prepare(top)
        # The change of a file's owner may be what the next one is about: each finds what the one before has left.
        found[top] = {name: in_user_namespace(fs, top, id_map, action) for name, action in actions.items()}
    assert found[fs.path] == found[native]


def test_files_of_a_namespace_are_in_the_power_of_its_root(fs: Filesystem, tmp_path: Path) -> None:
    def prepare(top: Path) -> None:
        for name, uid, gid in (("theirs", 100033, 100033), ("group", 100033, 5), ("hosts", 5, 5), ("roots", 0, 0)):
            (top / name).write_text("text")
            os.setxattr(top / name, "user.key", b"value")
            os.chown(top / name, uid, gid)
            (top / name).chmod(0)

    def each(action: Callable[[str], Any]) -> Action:
        return lambda: [outcome(lambda name=name: action(name)) for name in ("theirs", "group", "hosts", "roots")]

    in_both(
        fs, tmp_path, prepare,
        {
            "read": each(lambda name: Path(name).read_text()),
            "write": each(lambda name: Path(name).write_text("more")),
            "truncate": each(lambda name: os.truncate(name, 2)),
            "access": each(lambda name: os.access(name, os.R_OK)),
            "xattr": each(lambda name: os.setxattr(name, "user.key", b"x")),
            "read xattr": each(lambda name: os.getxattr(name, "user.key")),
            "times": each(lambda name: os.utime(name, (1, 1))),
            "mode": each(lambda name: os.chmod(name, 0o2640)),
            "seen": each(lambda name: oct(os.stat(name).st_mode)),
            "by descriptor": each(lambda name: os.fchmod(os.open(name, os.O_RDONLY), 0o600)),
            "owner": each(lambda name: os.chown(name, 7, 7)),
            "owners": each(lambda name: (os.stat(name).st_uid, os.stat(name).st_gid)),
        },
    )  # fmt: skip


def test_directories_of_a_namespace_are_in_the_power_of_its_root(fs: Filesystem, tmp_path: Path) -> None:
    def prepare(top: Path) -> None:
        for name, owner in (("theirs", 100033), ("hosts", 5)):
            (top / name / "inner").mkdir(parents=True)
            (top / name / "file").write_text("text")
            (top / name / "secret").write_text("the host's")
            (top / name / "secret").chmod(0o600)
            for path in (top / name, top / name / "inner", top / name / "file"):
                os.chown(path, owner, owner)
            (top / name / "inner").chmod(0)
            (top / name).chmod(0)

    def each(action: Callable[[str], Any]) -> Action:
        return lambda: [outcome(lambda name=name: action(name)) for name in ("theirs", "hosts")]

    in_both(
        fs, tmp_path, prepare,
        {
            "list": each(lambda name: sorted(os.listdir(name))),
            "stat": each(lambda name: os.stat(f"{name}/file").st_size),
            "the host's": each(lambda name: Path(f"{name}/secret").read_text()),
            "over the host's": each(lambda name: os.close(os.open(f"{name}/secret", os.O_CREAT | os.O_WRONLY))),
            "make": each(lambda name: Path(f"{name}/new").write_text("new")),
            "make deeper": each(lambda name: os.mkdir(f"{name}/inner/d")),
            "fifo": each(lambda name: os.mkfifo(f"{name}/fifo")),
            "link": each(lambda name: os.symlink("x", f"{name}/link")),
            "temporary": each(lambda name: os.close(os.open(name, os.O_TMPFILE | os.O_RDWR))),
            "remove": each(lambda name: os.unlink(f"{name}/file")),
            "remove the host's": each(lambda name: os.unlink(f"{name}/secret")),
            "remove a directory": each(lambda name: os.rmdir(f"{name}/inner/d")),
            "list at last": each(lambda name: sorted(os.listdir(name))),
        },
    )  # fmt: skip


def test_what_it_has_open_it_has_open_after_a_change_of_mode(tmp_path: Path) -> None:
    with mounted(tmp_path, "restore") as fs:
        for top in (fs.path, fs.real):
            top.chmod(0o755)
            (top / "theirs").write_text(top.name)
            os.chown(top / "theirs", 100033, 100033)
            (top / "theirs").chmod(0)
        (go, goes), (opened, opens) = os.pipe(), os.pipe()

        def work() -> str:
            with open("theirs") as file:
                os.write(opens, b"x")
                os.read(go, 1)
                return file.read()

        def change() -> None:
            os.read(opened, 1)
            fs.proxy()
            os.write(goes, b"x")

        thread = threading.Thread(target=change)
        thread.start()
        try:
            assert in_user_namespace(fs, fs.path, "0 100000 1000", work) == "real"
        finally:
            os.write(opens, b"x")  # also if it could not be opened
            thread.join()
            for fd in (go, goes, opened, opens):
                os.close(fd)
