"""Requests as clients send them, byte for byte, and what of bad ones is refused with which words."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct
from typing import Any, Dict, List

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spfs import protocol, replies, requests
from spfs.protocol import BadRequest, parse
from spfs.requests import COMMANDS, Begin, Mode, Mount, Replace, Rules, Switch
from stubfs.rules import Rule

# What existing clients send: the packet, and what it means.
KNOWN = [
    (
        b"mount;id=87;mode=restore;mountpoint=/data;ns_pid=17345;ns_list=user,net,mnt;root=/vz/root/102\0",
        Mount("87", "restore", "/data", ns_pid=17345, ns_list=("user", "net", "mnt"), root="/vz/root/102"),
    ),
    (
        b"mount;id=87;mode=restore;mountpoint=/tmp/.criu.mntns.x/9-0/data;ns_mountpoint=/data;ns_pid=17345\0",
        Mount("87", "restore", "/tmp/.criu.mntns.x/9-0/data", ns_pid=17345, ns_mountpoint="/data"),
    ),
    (
        b"mount;id=1;mode=restore;mountpoint=/d;ns_pid=9;ns_list=user,net,mnt;root=(null)\0",
        Mount("1", "restore", "/d", ns_pid=9, ns_list=("user", "net", "mnt")),
    ),
    (b"mount;id=1;mode=proxy;proxy_dir=/real;mountpoint=/d\0", Mount("1", "proxy", "/d", proxy_dir="/real")),
    (b"mount;id=1;mode=stub;mountpoint=/d\0max_read=4096\0", Mount("1", "stub", "/d", options="max_read=4096")),
    (
        b"replace;id=87;source=srv:/export;type=nfs4;flags=1024;bindmounts=/a,/b,;"
        b"freeze_cgroup=/sys/fs/cgroup/freezer/102\0rw,vers=4.2,addr=192.0.2.7\0",
        Replace(
            "87",
            "srv:/export",
            "nfs4",
            1024,
            bindmounts=("/a", "/b"),
            freeze_cgroup="/sys/fs/cgroup/freezer/102",
            options="rw,vers=4.2,addr=192.0.2.7",
        ),
    ),
    (
        b"replace;id=7;source=s:/e;type=nfs;flags=0;bindmounts=(null);freeze_cgroup=/sys/fs/cgroup/freezer/(null)\0\0",
        Replace("7", "s:/e", "nfs", 0),
    ),
    (
        b"replace;id=7;source=s:/e;type=nfs;flags=18446744073709551615;bindmounts=/a,(null),\0\0",
        Replace("7", "s:/e", "nfs", (1 << 64) - 1, ("/a",)),
    ),
    (
        b"replace;id=7;source=s:/e;type=nfs;flags=0;freeze_cgroup=/sys/fs/cgroup/freezer/(null)/;mode=hold;",
        Replace("7", "s:/e", "nfs", 0, mode="hold"),
    ),
    (
        b"replace;id=7;source=s:/e;type=nfs;flags=0;freeze_cgroup=/sys/fs/cgroup/freezer//102/;;mode=release\0",
        Replace("7", "s:/e", "nfs", 0, freeze_cgroup="/sys/fs/cgroup/freezer//102", mode="release"),
    ),
    (b"replace;id=7;source=a=b;type=nfs;flags=0\0", Replace("7", "a=b", "nfs", 0)),
    (b"mode;all;mode=stub\0", Mode("stub")),
    (b"mode;mode=stub;all;\0", Mode("stub")),
    (b"mode;id=3;mode=proxy;proxy_dir=/real;ns_pid=4\0", Mode("proxy", "3", "/real", 4)),
    (b"replace;all;mode=release\0", Begin("release")),
    (b"replace;id=3;mode=hold", Begin("hold", "3")),
    (b"switch;target=/new;freeze_cgroup=/cg;source=/old\0", Switch("/new", "/cg", source="/old")),
    (b"switch;target=/new;freeze_cgroup=/cg;device=64769;ns_pid=5\0", Switch("/new", "/cg", device=64769, ns_pid=5)),
]


@pytest.mark.parametrize("packet, request_", KNOWN, ids=lambda value: repr(value)[:50])
def test_requests_of_existing_clients_are_understood(packet: bytes, request_: object) -> None:
    assert parse(packet) == request_


REFUSED = [
    (b"\0", "unknown command ''"),
    (b"format;id=1\0", "unknown command 'format'"),
    (b"status\0", "send it as JSON"),
    (b"Mode;all;mode=stub\0", "unknown command 'Mode'"),
    (b"\xff\xfe\xfd", "unknown command"),
    (b"mode;all;mode=stub;speed=9\0", "unknown key 'speed'"),
    (b"mode;all;mode=stub;mode=stub\0", "key 'mode' is given twice"),
    (b"mode;all;all;mode=stub\0", "key 'all' is given twice"),
    (b"mode;all;mode=\0", "key 'mode' has an empty value"),
    (b"mode;all\0", "key mode is missing"),
    (b"mode;mode=stub\0", "key id is missing (or all)"),
    (b"mode;all;id=1;mode=stub\0", "not together with an id"),
    (b"mode;everything;mode=stub\0", "'everything' is not key=value"),
    (b"mode;all;mode=frozen\0", "must be restore or stub or proxy"),
    (b"mode;all;mode=proxy\0", "key proxy_dir is missing"),
    (b"mode;all;mode=stub\0rw\0", "unknown key 'options'"),
    (b"mode;all;mode=stub\0\0more\0", "more than two strings"),
    (b"mode;all;mode=stub;options=rw\0", "unknown key 'options'"),
    (b"mount;id=1;mode=restore\0", "key mountpoint is missing"),
    (b"mount;id=1;mode=proxy;mountpoint=/d\0", "key proxy_dir is missing"),
    (b"mount;id=1;mode=restore;mountpoint=data\0", "must be an absolute path"),
    (b"mount;id=(null);mode=restore;mountpoint=/d\0", "key id has no value"),
    (b"replace;id=7;source=s;type=t;flags=18446744073709551616\0", "must be a decimal number that is not negative"),
    (b"mount;id=1;mode=restore;mountpoint=/d;ns_pid=0\0", "not a process id"),
    (b"mount;id=1;mode=restore;mountpoint=/d;ns_pid=-4\0", "decimal number"),
    (b"mount;id=1;mode=restore;mountpoint=/d;ns_pid=4x\0", "decimal number"),
    (b"mount;id=1;mode=restore;mountpoint=/d;ns_pid=4;ns_list=mnt,disk\0", "'disk' is no namespace"),
    (b"mount;id=1;mode=restore;mountpoint=/d;ns_pid=4;ns_list=mnt,mnt\0", "given twice"),
    (b"mount;id=1;mode=restore;mountpoint=/d;ns_list=mnt\0", "key ns_pid is missing"),
    (b"mount;all;mode=restore;mountpoint=/d\0", "give its id"),
    (b"mount;id=" + b"x" * 200 + b";mode=restore;mountpoint=/d\0", "printable characters"),
    (b"replace;id=1;source=s;type=t\0", "key flags is missing"),
    (b"replace;id=1;source=s;type=t;flags=0x400\0", "decimal number"),
    (b"replace;id=1;source=s;type=t;flags=1;mode=now\0", "must be hold or release"),
    (b"replace;id=1;source=s;type=t;flags=1;bindmounts=a\0", "absolute path"),
    (b"replace;id=1;source=s;type=t;flags=1;bindmounts=\0", "empty value"),
    (b"replace;id=1;source=s;type=t;flags=1;strict=1\0", "unknown key 'strict'"),
    (b"replace;id=1\0", "key source is missing"),
    (b"switch;target=/t;freeze_cgroup=/c\0", "exactly one of"),
    (b"switch;target=/t;freeze_cgroup=/c;source=/s;device=5\0", "exactly one of"),
    (b"{", "not JSON"),
    (b"{}", "unknown command None"),
    (b'{"command": ["mode"]}', "unknown command"),
    (b'{"command": "mode", "mode": "stub", "all": true, "mode": "proxy"}', "'mode' is given twice"),
    (b'{"command": "mode", "mode": "stub", "all": "yes"}', "must be true or false"),
    (b'{"command": "mode", "mode": 3, "all": true}', "key mode: 3"),
    (b'{"command": "status", "id": "1", "depth": 2}', "unknown key 'depth'"),
    (b'{"command": "wait", "id": "1", "timeout": "5"}', "number of seconds"),
    (b'{"command": "wait", "id": "1", "timeout": true}', "number of seconds"),
    (b'{"command": "unmount", "id": "1", "force": 1}', "must be true or false"),
    (b'{"command": "create", "id": "1", "files": "a"}', "list of objects"),
    (b'{"command": "mount", "id": "1", "mode": "stub", "mountpoint": "/a\\u0000b"}', "holds a NUL"),
    (b'{"command": "mount", "id": "1", "mode": "stub", "mountpoint": "/\\ud800"}', "'mountpoint' holds no char"),
    (b'{"command": "replace", "id": "1", "source": "s", "type": "t", "flags": 0, "bindmounts": ["/a", "/b\\u0000"]}',
     "key 'bindmounts' holds a NUL"),
    (b'{"command": "create", "id": "1", "files": [{"path": "a\\udc00", "mode": 33188}]}', "'files' holds no character"),
    (b'{"command": "create", "id": "1", "files": [{"path": "a", "x\\u0000": {}}]}', "'files' holds a NUL"),
    (b'{"command": "mount", "id": "", "mode": "stub", "mountpoint": "/a"}', "empty value"),
    (b"{" * 100_000, "not JSON"),
]


@pytest.mark.parametrize("packet, words", REFUSED, ids=lambda value: repr(value)[:50])
def test_a_bad_request_is_refused_by_name(packet: bytes, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(packet)
    assert words in str(caught.value)
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value).isprintable()


def test_values_in_json_may_hold_what_text_cannot() -> None:
    message: Dict[str, Any] = {
        "command": "replace",
        "id": "semi;colon",
        "source": "//srv/share;x",
        "type": "cifs",
        "flags": 0,
        "bindmounts": ["/a,b", "/c"],
        "options": "password=a;b",
        "strict": True,
    }
    request = parse(json.dumps(message).encode())
    assert request == Replace(
        "semi;colon", "//srv/share;x", "cifs", 0, ("/a,b", "/c"), options="password=a;b", strict=True
    )


def test_json_may_end_like_a_c_string() -> None:
    assert parse(b'{"command": "status"}\0') == requests.Status()


def test_paths_that_are_not_utf8_survive() -> None:
    text = parse(b"mount;id=1;mode=restore;mountpoint=/\xff\0")
    message = replies.encode_data({"command": "mount", "id": "1", "mode": "restore", "mountpoint": "/\udcff"})
    assert isinstance(text, Mount) and text.mountpoint == "/\udcff"
    assert parse(message) == text


keys = st.sampled_from(sorted({key for kind in COMMANDS.values() for key in kind.__dataclass_fields__}))
words = st.one_of(st.sampled_from(["stub", "hold", "/data", "7", "(null)", ""]), st.text(max_size=8))
items = st.one_of(st.builds("{}={}".format, keys, words), st.just("all"), st.text(max_size=12))


@given(st.sampled_from(protocol.TEXT_COMMANDS), st.lists(items, max_size=8), st.binary(max_size=8))
@example("mode", ["all", "mode=stub"], b"")
def test_any_text_is_either_understood_or_refused(command: str, parts: "list[str]", tail: bytes) -> None:
    packet = ";".join([command, *parts]).encode(errors="surrogatepass") + b"\0" + tail
    try:
        request = parse(packet)
    except BadRequest:
        return
    assert isinstance(request, (Mount, Mode, Replace, Begin, Switch))
    # What was understood means the same with empty items and a trailing ";" added.
    head, _, rest = packet.partition(b"\0")
    assert parse(head.replace(b";", b";;") + b";\0" + rest) == request


@given(st.binary(max_size=64))
def test_any_bytes_are_refused_or_understood_but_never_raise_anything_else(packet: bytes) -> None:
    for data in (packet, b"{" + packet, b'{"command": "' + packet + b'"}'):
        try:
            parse(data)
        except BadRequest as error:
            assert error.message


names = st.text(st.sampled_from("a/.\0\ud800\udcff\n"), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | names.map("/".__add__) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def strings(value: Any) -> List[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


@given(st.sampled_from(sorted(COMMANDS)), st.dictionaries(keys, json_values, max_size=6))
def test_any_json_is_either_understood_or_refused(command: str, values: Dict[str, Any]) -> None:
    try:
        request = parse(json.dumps({"command": command, **values}).encode())
    except BadRequest:
        return
    hash(getattr(request, "id", None))
    assert isinstance(getattr(request, "bindmounts", ()), tuple)
    # Whatever it is used for, a path or an argument, the system can be given it.
    assert b"\0" not in os.fsencode(texts := "".join(strings(dataclasses.asdict(request)))), texts


def test_a_reply_is_four_bytes_and_json() -> None:
    status, data = replies.error_reply("cannot", "do", errno.EBUSY)
    packet = replies.encode_status(status) + replies.encode_data(data)
    assert struct.unpack("=i", packet[:4]) == (-errno.EBUSY,)
    assert replies.decode_reply(packet[:4], packet[4:]) == (-errno.EBUSY, {"message": "cannot", "hint": "do"})


def test_an_error_is_never_status_zero() -> None:
    assert replies.error_reply("x", "", 0).status == -errno.EIO


def test_options_of_stub_mode_and_rules() -> None:
    options = b'"timeout": 5, "errno": "EIO", "exempt": [7]'
    assert parse(b'{"command": "mode", "mode": "stub", "all": true, ' + options + b"}") == Mode(
        "stub", timeout=5.0, errno=errno.EIO, exempt=(7,)
    )
    rules = b'[{"action": "fail", "operations": ["read"], "errno": "ENODATA"}]'
    assert parse(b'{"command": "rules", "id": "a", "rules": ' + rules + b"}") == Rules(
        "a", (Rule("fail", operations=["read"], errno=errno.ENODATA),)
    )
    assert parse(b'{"command": "rules", "all": true}') == Rules()


@pytest.mark.parametrize(
    "packet, words",
    [
        (b"mode;all;mode=stub;timeout=5", "unknown key 'timeout'"),
        (b'{"command": "mode", "mode": "restore", "id": "a", "timeout": 5}', "timeout is for mode=stub alone"),
        (b'{"command": "mode", "mode": "stub", "id": "a", "errno": "EIO"}', "errno is for a timeout"),
        (b'{"command": "mode", "mode": "stub", "id": "a", "timeout": 5, "errno": 512}', "from 1 to 511"),
        (b'{"command": "mode", "mode": "stub", "id": "a", "exempt": [0]}', "list of process ids"),
        (b'{"command": "rules", "id": "a", "rules": {}}', "list of objects"),
        (b'{"command": "rules", "id": "a", "rules": [{"action": "stop"}]}', "no such action"),
        (b'{"command": "rules", "rules": []}', "key id is missing"),
    ],
)
def test_bad_options_and_rules(packet: bytes, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(packet)
    assert words in str(caught.value)
