"""Random operations of several users on stubfs and on a native directory side by side: no difference, errno for errno.

Longer, by hand: STUBFS_EXAMPLES=2000 STUBFS_STEPS=100 python -m pytest tests/system/test_stubfs_differential.py
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence, Tuple

import pytest
from differential_kit import ALICE, BOB, LARGE, ROOT, USERS, Actor, User, empty, furnish, tree
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from stubfs_kit import Filesystem, mount_new, mounted

from stubfs import syscalls
from stubfs.syscalls import UTIME_NOW, UTIME_OMIT

MOUNT_ATTR_NOATIME = 0x10  # linux/mount.h
pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
EXAMPLES = int(os.environ.get("STUBFS_EXAMPLES", "12"))
STEPS = int(os.environ.get("STUBFS_STEPS", "50"))

LONG = b"\xff" * 255
ATOMS = [b"a", b"b", b"c", b"d", b"s"]
NAMES = [
    *ATOMS, b"d/a", b"d/b", b"d/e", b"d/e/a", b"s/a", b"d/", b"./b", b".", LONG, LONG + b"x", b"a\n\x80",
]  # fmt: skip
names, users, slots = st.sampled_from(NAMES), st.sampled_from(USERS), st.integers(0, 3)
areas = st.integers(0, 1)
modes = st.sampled_from([0, 0o400, 0o600, 0o644, 0o660, 0o666, 0o755, 0o777, 0o1777, 0o2755, 0o2775, 0o4755, 0o6777])
ACCESS = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR]
WAYS = [
    0, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_NOATIME, os.O_SYNC, os.O_DIRECT, os.O_PATH
]  # fmt: skip
opening = st.builds(lambda *bits: bits[0] | bits[1], st.sampled_from(ACCESS), st.sampled_from(WAYS))
creating = st.builds(
    lambda *bits: bits[0] | bits[1] | os.O_CREAT,
    st.sampled_from(ACCESS),
    st.sampled_from([0, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW]),
)
offsets = st.sampled_from([0, 1, 10, 4095, 4096, 4097, 20_000, LARGE])
sizes = st.sampled_from([0, 1, 5, 100, 4096, 10_000])
data = st.builds(lambda fill, size: bytes([fill]) * size, st.integers(1, 255), sizes)
ids = st.sampled_from([-1, ROOT.uid, ALICE.uid, BOB.uid, 2000, 2001])
times = st.sampled_from([(0, UTIME_NOW), (0, UTIME_OMIT), (0, 0), (1, 999_999_999), (-5, 7), (2**33, 1)])
keys = st.sampled_from(["user.q", "user.long", "trusted.t", "security.spfs.link_remap", "nonsense", "system.q"])
values = st.sampled_from([b"", b"x", b"value\0\xff", b"v" * 3000])
RENAMES = [0, 0, 0, 1, 2, 4, 3]  # NOREPLACE, EXCHANGE, WHITEOUT, and two that exclude each other
FILE_FLAGS = [0, 0, 0x40, 0x80, 0xC0, 0x10, 0x20, 0x8]  # of chattr: none, d, A, dA, i, a, and S, which tmpfs has not
RWF = [0x2, 0x4, 0x8, 0x10, 0x1000]  # DSYNC, SYNC, NOWAIT, APPEND, and one that there is not: linux/fs.h
FALLOCATIONS = [0, 1, 2, 3, 8, 0x10, 0x11, 0x20]  # KEEP_SIZE, PUNCH_HOLE, COLLAPSE_, ZERO_, INSERT_RANGE


def acl(*entries: Tuple[int, int, int]) -> bytes:
    """A POSIX ACL as an extended attribute, linux/posix_acl_xattr.h: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


_NOBODY = 0xFFFFFFFF
ACLS = [
    acl((1, 6, _NOBODY), (4, 4, _NOBODY), (0x20, 4, _NOBODY)),
    acl((1, 7, _NOBODY), (2, 7, ALICE.uid), (4, 0, _NOBODY), (0x10, 7, _NOBODY), (0x20, 0, _NOBODY)),
    acl((1, 6, _NOBODY), (4, 0, _NOBODY), (8, 6, 2000), (0x10, 4, _NOBODY), (0x20, 0, _NOBODY)),
    acl((1, 6, _NOBODY), (4, 4, _NOBODY)),  # incomplete
    b"junk",
]


# In a directory that is open, whatever has become of it and of the way there.
plain = st.sampled_from([b"a", b"b", b"c", b"e", b"e/a", b"."])
WITHIN = [
    st.tuples(st.sampled_from(["stat", "lstat", "list", "unlink", "rmdir", "contents", "statfs", "readlink"]),
              st.tuples(plain)),
    st.tuples(st.just("mkdir"), st.tuples(plain, modes)),
    st.tuples(st.just("mknod"), st.tuples(plain, modes, st.just(0))),
    st.tuples(st.just("symlink"), st.tuples(st.sampled_from([b"a", b"../a"]), plain)),
    st.tuples(st.just("link"), st.tuples(plain, plain, st.booleans())),
    st.tuples(st.just("rename"), st.tuples(plain, plain, st.sampled_from(RENAMES))),
    st.tuples(st.just("chmod"), st.tuples(plain, modes)),
    st.tuples(st.just("truncate"), st.tuples(plain, offsets)),
    st.tuples(st.just("chown"), st.tuples(plain, ids, ids, st.booleans())),
    st.tuples(st.just("access"), st.tuples(plain, st.integers(0, 7))),
    st.tuples(st.just("open"), st.tuples(st.just(0), plain, creating, modes)),
]  # fmt: skip


# Where two things are wrong the kernel, which knows the types, says its own before it asks a FUSE file system.
SAID_FIRST = {
    *((operation, early, late) for operation in ("rmdir", "unlink", "rename")
      for early in ("ENOTDIR", "EISDIR", "ENOENT", "EBUSY", "EEXIST", "EINVAL", "ENAMETOOLONG")
      for late in ("EPERM", "EACCES")),
    ("mknod", "EPERM", "EACCES"),
    *((operation, "ENOENT", "EPERM") for operation in ("link_open", "link_empty")),  # no links left
    ("open", "EPERM", "EACCES"),  # O_NOATIME
    ("open", "EISDIR", "EACCES"),  # O_CREAT and a slash at the end
    ("fallocate", "ENOTSUP", "EPERM"),  # of a mode that there is not
    ("copy", "EINVAL", "EPERM"),  # onto itself
}  # fmt: skip


class Difference(AssertionError):
    pass


class Sides(RuleBasedStateMachine):
    """One operation after another, on both sides by the same user; subclassed with the sides to use."""

    actors: Dict[User, Tuple[Actor, Actor]]
    tops: Tuple[bytes, bytes]
    times: Sequence[str]  # that are to be the same
    keeps_maps: bool

    def do(self, user: User, operation: str, *arguments: Any) -> None:
        ours, theirs = self.actors[user]
        ours.ask(operation, *arguments)
        theirs.ask(operation, *arguments)
        mine, native = self.comparable(ours.answer()), self.comparable(theirs.answer())
        if mine != native and not (mine[0] == native[0] == "error" and (operation, mine[1], native[1]) in SAID_FIRST):
            raise Difference(f"{user.name}: {operation}{arguments}: stubfs {mine}, native {native}")

    def comparable(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: self.comparable(item)
                for key, item in value.items()
                if key in self.times or key not in ("atime", "mtime")
            }
        return tuple(map(self.comparable, value)) if isinstance(value, tuple) else value

    @initialize(mode=st.sampled_from([0o777, 0o1777, 0o755, 0o2777]))
    def begin(self, mode: int) -> None:
        for top in self.tops:
            os.chmod(top, mode)
            furnish(top)
        for user in USERS:
            self.do(user, "open", 0, b"a", os.O_RDWR, 0)
            self.do(user, "open", 1, b"d/b", os.O_RDWR | os.O_APPEND, 0)
            self.do(user, "open", 2, b"d", os.O_RDONLY, 0)
            if self.keeps_maps:
                self.do(user, "map_keep", 0, 0, True, True)

    def teardown(self) -> None:
        ours, theirs = (self.comparable(tree(top)) for top in self.tops)
        for user in USERS:
            for actor in self.actors[user]:
                actor.do("close_all")
        for top in self.tops:
            empty(top)
            for key in os.listxattr(top):
                os.removexattr(top, key)
            os.chown(top, 0, 0)
        different = {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}
        if different:
            raise Difference("\n".join(f"{name}: {ours.get(name)}, native {theirs.get(name)}" for name in different))

    @rule(user=users, slot=slots, name=names, flags=opening | creating, mode=modes)
    def open(self, user: User, slot: int, name: bytes, flags: int, mode: int) -> None:
        self.do(user, "open", slot, name, flags, mode)

    @rule(user=users, slot=slots, name=st.sampled_from(ATOMS), flags=creating)
    def create(self, user: User, slot: int, name: bytes, flags: int) -> None:
        self.do(user, "open", slot, name, flags, 0o666)

    @rule(user=users, slot=slots, name=names, mode=modes)
    def tmpfile(self, user: User, slot: int, name: bytes, mode: int) -> None:
        self.do(user, "tmpfile", slot, name, mode)

    @rule(user=users, slot=slots)
    def close(self, user: User, slot: int) -> None:
        self.do(user, "close", slot)

    @rule(user=users, slot=slots, size=sizes)
    def read(self, user: User, slot: int, size: int) -> None:
        self.do(user, "read", slot, size)

    @rule(user=users, slot=slots, text=data)
    def write(self, user: User, slot: int, text: bytes) -> None:
        self.do(user, "write", slot, text)

    @rule(user=users, slot=slots, size=sizes, offset=offsets)
    def pread(self, user: User, slot: int, size: int, offset: int) -> None:
        self.do(user, "pread", slot, size, offset)

    @rule(user=users, slot=slots, text=data, offset=offsets)
    def pwrite(self, user: User, slot: int, text: bytes, offset: int) -> None:
        self.do(user, "pwrite", slot, text, offset)

    @rule(user=users, slot=slots, text=data, offset=st.sampled_from([-1, 0, 10, 4096]), flags=st.sampled_from(RWF))
    def pwritev2(self, user: User, slot: int, text: bytes, offset: int, flags: int) -> None:
        self.do(user, "pwritev2", slot, text, offset, flags)

    @rule(user=users, slot=slots, offset=offsets, whence=st.sampled_from([0, 1, 2, os.SEEK_DATA, os.SEEK_HOLE]))
    def seek(self, user: User, slot: int, offset: int, whence: int) -> None:
        self.do(user, "seek", slot, offset, whence)

    @rule(user=users, slot=slots)
    def fstat(self, user: User, slot: int) -> None:
        self.do(user, "fstat", slot)

    @rule(user=users, slot=slots, size=offsets)
    def ftruncate(self, user: User, slot: int, size: int) -> None:
        self.do(user, "ftruncate", slot, size)

    @rule(user=users, slot=slots, mode=st.sampled_from(FALLOCATIONS), offset=st.sampled_from([0, 10, 4096]), size=sizes)
    def fallocate(self, user: User, slot: int, mode: int, offset: int, size: int) -> None:
        self.do(user, "fallocate", slot, mode, offset, size)

    @rule(user=users, slot=slots, mode=modes)
    def fchmod(self, user: User, slot: int, mode: int) -> None:
        self.do(user, "fchmod", slot, mode)

    @rule(user=users, slot=slots, uid=ids, gid=ids)
    def fchown(self, user: User, slot: int, uid: int, gid: int) -> None:
        self.do(user, "fchown", slot, uid, gid)

    @rule(user=users, slot=slots, atime=times, mtime=times)
    def futime(self, user: User, slot: int, atime: Tuple[int, int], mtime: Tuple[int, int]) -> None:
        self.do(user, "futime", slot, atime, mtime)

    @rule(user=users, slot=slots, flags=st.sampled_from([0, os.O_APPEND, os.O_NOATIME, os.O_DIRECT]))
    def flags(self, user: User, slot: int, flags: int) -> None:
        self.do(user, "flags", slot, flags)

    @rule(user=users, slot=slots, other=slots, size=sizes, start=offsets, to=offsets)
    def copy(self, user: User, slot: int, other: int, size: int, start: int, to: int) -> None:
        self.do(user, "copy", slot, other, size, start, to)

    @rule(user=users, slot=slots, other=slots, size=sizes)
    def sendfile(self, user: User, slot: int, other: int, size: int) -> None:
        self.do(user, "sendfile", slot, other, size)

    @rule(user=users, slot=slots, shared=st.booleans())
    def map_read(self, user: User, slot: int, shared: bool) -> None:
        self.do(user, "map_read", slot, shared)

    @rule(user=users, slot=slots, text=data, shared=st.booleans())
    def map_write(self, user: User, slot: int, text: bytes, shared: bool) -> None:
        self.do(user, "map_write", slot, text, shared)

    @precondition(lambda self: self.keeps_maps)
    @rule(user=users, slot=slots, area=areas, shared=st.booleans(), writes=st.booleans())
    def map_keep(self, user: User, slot: int, area: int, shared: bool, writes: bool) -> None:
        self.do(user, "map_keep", slot, area, shared, writes)

    @precondition(lambda self: self.keeps_maps)
    @rule(user=users, area=areas)
    def map_peek(self, user: User, area: int) -> None:
        self.do(user, "map_peek", area)

    @precondition(lambda self: self.keeps_maps)
    @rule(user=users, area=areas, text=data, offset=st.sampled_from([0, 10, 4095, 4096]))
    def map_poke(self, user: User, area: int, text: bytes, offset: int) -> None:
        self.do(user, "map_poke", area, text, offset)

    @precondition(lambda self: self.keeps_maps)
    @rule(user=users, area=areas, operation=st.sampled_from(["map_sync", "unmap"]))
    def map_end(self, user: User, area: int, operation: str) -> None:
        self.do(user, operation, area)

    @rule(user=users, slot=slots, kind=st.sampled_from([fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN]))
    def flock(self, user: User, slot: int, kind: int) -> None:
        self.do(user, "flock", slot, kind)

    @rule(
        user=users, slot=slots, ofd=st.booleans(), kind=st.sampled_from([fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK]),
        start=sizes, size=sizes,
    )  # fmt: skip
    def lock(self, user: User, slot: int, ofd: bool, kind: int, start: int, size: int) -> None:
        self.do(user, "lock", slot, ofd, kind, start, size)

    @rule(
        user=users, slot=slots, ofd=st.booleans(), kind=st.sampled_from([fcntl.F_RDLCK, fcntl.F_WRLCK]),
        start=sizes, size=sizes,
    )  # fmt: skip
    def getlock(self, user: User, slot: int, ofd: bool, kind: int, start: int, size: int) -> None:
        self.do(user, "getlock", slot, ofd, kind, start, size)

    @rule(user=users, slot=slots, flags=st.sampled_from(ACCESS))
    def reopen(self, user: User, slot: int, flags: int) -> None:
        self.do(user, "reopen", slot, flags)

    @rule(user=users, slot=slots, name=names)
    def link_open(self, user: User, slot: int, name: bytes) -> None:
        self.do(user, "link_open", slot, name)

    @rule(user=users, slot=slots, name=names)
    def link_empty(self, user: User, slot: int, name: bytes) -> None:
        self.do(user, "link_empty", slot, name)

    @rule(user=users, slot=slots, size=st.sampled_from([20, 24, 64, 200, 4096]))
    def dirread(self, user: User, slot: int, size: int) -> None:
        self.do(user, "dirread", slot, size)

    @rule(user=users, slot=slots, place=st.integers(0, 5))
    def dirseek(self, user: User, slot: int, place: int) -> None:
        self.do(user, "dirseek", slot, place)

    @rule(user=users, slot=slots, beneath=st.one_of(WITHIN))
    def within(self, user: User, slot: int, beneath: Tuple[str, Tuple[Any, ...]]) -> None:
        self.do(user, "within", slot, *beneath)

    @rule(user=users, slot=slots)
    def flist(self, user: User, slot: int) -> None:
        self.do(user, "flist", slot)

    @rule(user=users, slot=slots)
    def getflags(self, user: User, slot: int) -> None:
        self.do(user, "getflags", slot)

    @rule(user=users, slot=slots, flags=st.sampled_from(FILE_FLAGS))
    def setflags(self, user: User, slot: int, flags: int) -> None:
        self.do(user, "setflags", slot, flags)

    @rule(user=users, slot=slots, key=keys)
    def fgetxattr(self, user: User, slot: int, key: str) -> None:
        self.do(user, "fgetxattr", slot, key)

    @rule(user=users, slot=slots)
    def flistxattr(self, user: User, slot: int) -> None:
        self.do(user, "flistxattr", slot)

    @rule(user=users, slot=slots, key=keys)
    def fremovexattr(self, user: User, slot: int, key: str) -> None:
        self.do(user, "fremovexattr", slot, key)

    @rule(user=users, slot=slots, key=keys, value=values, flags=st.integers(0, 2))
    def fsetxattr(self, user: User, slot: int, key: str, value: bytes, flags: int) -> None:
        self.do(user, "fsetxattr", slot, key, value, flags)

    @rule(user=users, name=names, mode=modes)
    def mkdir(self, user: User, name: bytes, mode: int) -> None:
        self.do(user, "mkdir", name, mode)

    @rule(user=users, name=st.sampled_from([b"d", b"d/e"]))
    def mkdir_where_it_helps(self, user: User, name: bytes) -> None:
        self.do(user, "mkdir", name, 0o777)

    @rule(
        user=users, name=names, mode=modes,
        kind=st.sampled_from([stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, 0]),
        device=st.sampled_from([0, os.makedev(1, 3), os.makedev(250, 70_000)]),
    )  # fmt: skip
    def mknod(self, user: User, name: bytes, mode: int, kind: int, device: int) -> None:
        self.do(user, "mknod", name, kind | mode, device)

    @rule(user=users, name=st.sampled_from(NAMES[:10]))
    def bind(self, user: User, name: bytes) -> None:
        self.do(user, "bind", name)

    @rule(user=users, text=st.sampled_from([b"a", b"d", b"d/a", b"nowhere", b"s", b"", b"x" * 4000]), name=names)
    def symlink(self, user: User, text: bytes, name: bytes) -> None:
        self.do(user, "symlink", text, name)

    @rule(user=users, name=names)
    def readlink(self, user: User, name: bytes) -> None:
        self.do(user, "readlink", name)

    @rule(user=users, name=names, other=names, follow=st.booleans())
    def link(self, user: User, name: bytes, other: bytes, follow: bool) -> None:
        self.do(user, "link", name, other, follow)

    @rule(user=users, name=names)
    def unlink(self, user: User, name: bytes) -> None:
        self.do(user, "unlink", name)

    @rule(user=users, name=names)
    def rmdir(self, user: User, name: bytes) -> None:
        self.do(user, "rmdir", name)

    @rule(user=users, name=names, other=names, flags=st.sampled_from(RENAMES))
    def rename(self, user: User, name: bytes, other: bytes, flags: int) -> None:
        self.do(user, "rename", name, other, flags)

    @rule(user=users, name=names, operation=st.sampled_from(["list", "stat", "lstat", "contents", "statfs", "chdir"]))
    def look(self, user: User, name: bytes, operation: str) -> None:
        self.do(user, operation, name)

    @rule(user=users, name=names, mode=st.integers(0, 7))
    def access(self, user: User, name: bytes, mode: int) -> None:
        self.do(user, "access", name, mode)

    @rule(user=users, name=names, size=offsets)
    def truncate(self, user: User, name: bytes, size: int) -> None:
        self.do(user, "truncate", name, size)

    @rule(user=users, name=names, mode=modes)
    def chmod(self, user: User, name: bytes, mode: int) -> None:
        self.do(user, "chmod", name, mode)

    @rule(user=users, name=names, uid=ids, gid=ids, follow=st.booleans())
    def chown(self, user: User, name: bytes, uid: int, gid: int, follow: bool) -> None:
        self.do(user, "chown", name, uid, gid, follow)

    @rule(user=users, name=names, atime=times, mtime=times)
    def utime(self, user: User, name: bytes, atime: Tuple[int, int], mtime: Tuple[int, int]) -> None:
        self.do(user, "utime", name, atime, mtime)

    @rule(user=users, name=names, key=keys)
    def getxattr(self, user: User, name: bytes, key: str) -> None:
        self.do(user, "getxattr", name, key)

    @rule(user=users, name=names)
    def listxattr(self, user: User, name: bytes) -> None:
        self.do(user, "listxattr", name)

    @rule(user=users, name=names, key=keys, value=values, flags=st.integers(0, 2))
    def setxattr(self, user: User, name: bytes, key: str, value: bytes, flags: int) -> None:
        self.do(user, "setxattr", name, key, value, flags)

    @rule(user=users, name=names, key=keys)
    def removexattr(self, user: User, name: bytes, key: str) -> None:
        self.do(user, "removexattr", name, key)

    @rule(user=users, name=names, which=st.sampled_from(["access", "default"]), value=st.sampled_from(ACLS))
    def set_acl(self, user: User, name: bytes, which: str, value: bytes) -> None:
        self.do(user, "setxattr", name, f"system.posix_acl_{which}", value, 0)

    @rule(user=users, name=names, which=st.sampled_from(["access", "default"]))
    def get_acl(self, user: User, name: bytes, which: str) -> None:
        self.do(user, "getxattr", name, f"system.posix_acl_{which}")

    @rule(user=users, mask=st.sampled_from([0, 0o022, 0o027, 0o077]))
    def umask(self, user: User, mask: int) -> None:
        self.do(user, "umask", mask)


def compare(fs: Filesystem, native: str, times: Sequence[str], keeps_maps: bool) -> None:
    tops = os.fsencode(fs.path), os.fsencode(native)
    with ExitStack() as stack:
        pairs = {}
        for user in USERS:
            pair = Actor(user, str(fs.path)), Actor(user, native)
            for actor in pair:
                stack.callback(actor.close)
            pairs[user] = pair
        machine = type("Machine", (Sides,), {"actors": pairs, "tops": tops, "times": times, "keeps_maps": keeps_maps})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
                derandomize="STUBFS_EXAMPLES" not in os.environ,
                print_blob=False,
                phases=(Phase.generate, Phase.shrink),
            ),
        )


@contextmanager
def without_atime(path: Path) -> Iterator[Path]:
    """A tmpfs that is not written to by reading it: what the kernel reads from its cache no file system hears of."""
    path.mkdir()
    mount_new("tmpfs", path, MOUNT_ATTR_NOATIME)
    try:
        yield path
    finally:
        syscalls.umount2(os.fsencode(path), syscalls.MNT_DETACH)


@pytest.mark.timeout(100 + EXAMPLES * STEPS)
@pytest.mark.parametrize("mode", ["restore", "proxy", "mapped"])
def test_the_same_as_a_native_directory(tmp_path: Path, mode: str) -> None:
    """"mapped": in proxy mode, with mappings that stay; the time at which what is stored there counts is each file
    system's own affair."""
    times = {"restore": ["mtime"], "proxy": ["atime", "mtime"], "mapped": []}[mode]
    with without_atime(tmp_path / "native") as native, without_atime(tmp_path / "real") as real:
        with mounted(tmp_path, "restore" if mode == "restore" else "proxy", real=real) as fs:
            compare(fs, str(native), times, keeps_maps=mode == "mapped")
            assert "ERROR" not in fs.log.read_text()
