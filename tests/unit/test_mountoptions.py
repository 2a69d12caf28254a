"""Option strings, flags, and what mount helpers print."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spfs.errors import SpfsError
from spfs.linux.mountapi import MS, MountAttr
from spfs.mountoptions import MountOptions, helper_errno, split


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (",,rw,", ["rw"]),
        ("rw,vers=4.2,addr=192.0.2.7", ["rw", "vers=4.2", "addr=192.0.2.7"]),
        ('context="a,b",ro', ['context="a,b"', "ro"]),
        (r"lowerdir=/a\,b:/c,ro", [r"lowerdir=/a\,b:/c", "ro"]),
        (r"x=a\\,ro", [r"x=a\\", "ro"]),
    ],
)
def test_split(text: str, words: list[str]) -> None:
    assert split(text) == words


def test_an_open_quote_is_refused() -> None:
    with pytest.raises(SpfsError, match="not closed") as caught:
        split('context="a,b')
    assert caught.value.errno == errno.EINVAL


@given(st.lists(st.text(alphabet="abc=/.1", min_size=1)))
def test_splitting_undoes_joining(words: list[str]) -> None:
    assert split(",".join(words)) == words


@pytest.mark.parametrize("flag", [MS.REMOUNT, MS.MOVE, MS.SHARED, MS.PRIVATE, MS.SLAVE, MS.UNBINDABLE, MS.REC])
def test_flags_that_change_a_mount_are_refused(flag: MS) -> None:
    with pytest.raises(SpfsError, match=f"MS_{flag.name}") as caught:
        MountOptions.parse(int(flag), "")
    assert caught.value.errno == errno.EINVAL


def test_words_become_flags_and_the_later_one_wins() -> None:
    options = MountOptions.parse(int(MS.NOEXEC), "nosuid,exec,dev,noatime,relatime,size=1m,_netdev,x-systemd.automount")
    assert options.flags == MS.NOSUID | MS.RELATIME
    assert options.words == ("size=1m",)
    assert options.attributes == MountAttr.NOSUID


def test_read_only_is_for_both_the_mount_and_the_super_block() -> None:
    options = MountOptions.parse(int(MS.RDONLY | MS.SYNCHRONOUS | MS.NODIRATIME), 'a="b,c",d')
    assert options.attributes == MountAttr.RDONLY | MountAttr.NODIRATIME
    assert options.parameters() == [("ro", None), ("sync", None), ("a", "b,c"), ("d", None)]
    assert options.helper_options == 'ro,sync,nodiratime,a="b,c",d'
    assert options.data == 'a="b,c",d'


def test_access_time_modes_and_the_old_magic() -> None:
    assert MountOptions.parse(0xC0ED0000 | int(MS.NOATIME), "").attributes == MountAttr.NOATIME
    both = MountOptions.parse(int(MS.NOATIME | MS.STRICTATIME), "")
    assert both.attributes == MountAttr.STRICTATIME


@pytest.mark.parametrize(
    ("status", "text", "number"),
    [
        (32, "mount.nfs: Connection refused", errno.ECONNREFUSED),
        (32, "mount.nfs: Connection timed out", errno.ETIMEDOUT),
        (32, "mount.nfs: No route to host", errno.EHOSTUNREACH),
        (32, "mount.nfs: Network is unreachable for srv:/x on /mnt", errno.ENETUNREACH),
        (32, "mount.nfs: requested NFS version or transport protocol is not supported for /m", errno.EPROTONOSUPPORT),
        (32, "mount.nfs: Failed to resolve server srv: Temporary failure in name resolution", errno.EAGAIN),
        (32, "mount.nfs: access denied by server while mounting srv:/x", errno.EPERM),
        (32, "mount.nfs: an incorrect mount option was specified for /m", errno.EINVAL),
        (32, "mount error(2): No such file or directory", errno.ENOENT),
        (1, "read: Connection reset by peer", errno.ECONNREFUSED),
        (127, "/bin/sh: 1: nonesuch: not found", errno.ENODEV),
        (1, "usage: mount.foo", errno.EINVAL),
        (32, "", errno.EIO),
        (-9, "", errno.EIO),
    ],
)
def test_a_helpers_words_become_an_errno(status: int, text: str, number: int) -> None:
    assert errno.errorcode[helper_errno(status, text)] == errno.errorcode[number]


def test_a_bind_mount_takes_flags_only() -> None:
    options = MountOptions.parse(int(MS.BIND), "rw,ro,nosuid")
    assert options.bind and options.words == ()
    assert options.attributes == MountAttr.RDONLY | MountAttr.NOSUID
    assert MountOptions.parse(int(MS.BIND | MS.RDONLY), "rw").attributes == MountAttr(0)
    assert MountOptions.parse(0, "bind,ro").flags == MS.BIND | MS.RDONLY
    assert MountOptions.parse(0, "rbind").flags == MS.BIND | MS.REC
    with pytest.raises(SpfsError, match="size=1m"):
        MountOptions.parse(int(MS.BIND), "size=1m")
