"""What a delayed mount must hold, as planned from images; options, records and CRIU's command line."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any, Dict, List

import pytest

from spfs.criu import command, record
from spfs.criu.delayed import DelayedMount, Place, PlannedFile, Wish
from spfs.criu.images import ImageFile, ImageMount, Images, Remap
from spfs.criu.observe import options_of
from spfs.criu.plan import from_images, plan, used_alone
from spfs.criu.stages import act
from spfs.errors import SpfsError, UsageError
from spfs.linux.mountinfo import parse_line
from stubfs.errors import StubfsError

FILE, DIRECTORY, FIFO = stat.S_IFREG | 0o640, stat.S_IFDIR | 0o711, stat.S_IFIFO | 0o600
DATA = DelayedMount("data", "nfs4", "server:/export", places=(Place("/data"),))


class Made(Images):
    """Images that were never written."""

    def __init__(self, files: List[ImageFile], mounts: List[ImageMount] = [], remaps: List[Remap] = []) -> None:
        self.files, self.mounts, self.remaps = files, {one.id: one for one in mounts}, remaps  # type: ignore[misc]


def planned(images: Images, *mounts: DelayedMount, **more: Any) -> Dict[str, List[PlannedFile]]:
    return plan(images, mounts or [DATA], **more)


def test_files_by_their_paths() -> None:
    images = Made(
        [
            ImageFile(1, "reg", "/data/a/file", FILE, 10),
            ImageFile(2, "reg", "/data", DIRECTORY),
            ImageFile(3, "reg", "/database", FILE, 1),
            ImageFile(4, "reg", "/data/fifo", FIFO),
            ImageFile(5, "reg", "/data/log", FILE),  # opened to be appended to: CRIU does not compare the size
            ImageFile(6, "reg", "/data/a/file", FILE, 10),
        ]
    )
    uses = {1: ["fd 3 of 7"], 6: ["fd 4 of 7", "fd 3 of 7"]}
    assert planned(images, uses=uses)["data"] == [
        PlannedFile("", DIRECTORY),
        PlannedFile("a/file", FILE, 10, uses=("fd 3 of 7", "fd 4 of 7")),
        PlannedFile("fifo", FIFO),
        PlannedFile("log", FILE, 0),
    ]


def test_what_is_on_another_mount_is_not_planned_but_its_mountpoint() -> None:
    images = Made([ImageFile(1, "reg", "/data/sub/tmp/file", FILE, 1), ImageFile(2, "reg", "/other/f", FILE, 2)])
    two = DelayedMount("two", "nfs4", "server:/two", places=(Place("/other", "deep/down"),))
    result = planned(images, DATA, two, others=["/", "/data/sub/tmp", "/proc"])
    assert [(file.path, stat.S_ISDIR(file.mode)) for file in result["data"]] == [("sub/tmp", True)]
    assert [file.path for file in result["two"]] == ["deep/down/f"]


def test_removed_files_sockets_and_watches() -> None:
    images = Made(
        [
            ImageFile(1, "reg", "/data/g/ghost", FILE, 4),
            ImageFile(2, "reg", "/data/l/name", FILE, 6),
            ImageFile(3, "reg", "/data/l/link_remap.3", None, None),
            ImageFile(4, "socket", "/data/s/sock", stat.S_IFSOCK | 0o755),
            ImageFile(5, "watch", "/data/w"),
            ImageFile(5, "watch", "/data/w/known"),
            ImageFile(6, "reg", "/data/w/known", FILE, 3),
        ],
        remaps=[Remap(1, 1, "GHOST"), Remap(2, 3, "LINKED")],
    )
    found = {file.path: file for file in planned(images)["data"]}
    assert sorted(found) == ["g", "l", "l/link_remap.3", "s", "w", "w/known"]
    assert all(stat.S_ISDIR(found[path].mode) for path in "glsw")
    assert found["l/link_remap.3"] == PlannedFile("l/link_remap.3", FILE, 6, original="l/name")
    assert found["w/known"] == PlannedFile("w/known", FILE, 3)


def test_a_look_tells_what_images_do_not() -> None:
    link = stat.S_IFLNK | 0o777
    images = Made([ImageFile(1, "watch", "/data/w"), ImageFile(2, "reg", "/data/l", link)])
    seen = {"w": PlannedFile("w", FILE, 7), "l": PlannedFile("l", link, None, "to/there")}
    assert planned(images, look={"data": seen.get})["data"] == [
        PlannedFile("l", link, None, "to/there"),
        PlannedFile("w", FILE, 7),
    ]


MOUNTS = [
    ImageMount(1, 0, 5, "/root", "/"),
    ImageMount(2, 1, 9, "/export", "/data", "data"),
    ImageMount(3, 1, 9, "/export/sub", "/second", "second"),
    ImageMount(4, 2, 7, "/", "/data/nested"),
]


def test_files_by_their_mounts() -> None:
    images = Made(
        [
            ImageFile(1, "reg", "/data/f", FILE, 1, 2),
            ImageFile(2, "reg", "/second/g", FILE, 1, 3),
            ImageFile(3, "reg", "/data/nested/h", FILE, 1, 4),
            ImageFile(4, "watch", "/second/w"),  # CRIU does not always tell the mount of a watch
        ],
        MOUNTS,
    )
    known = from_images(images, DATA)
    assert (known.root, known.places) == ("/export", (Place("/data", "", "data"), Place("/second", "sub", "second")))
    assert [file.path for file in planned(images, known)["data"]] == ["f", "nested", "sub/g", "sub/w"]
    with pytest.raises(SpfsError, match="no external mount on /elsewhere"):
        from_images(images, DATA._replace(places=(Place("/elsewhere"),)))


def test_only_places_that_are_used() -> None:
    images = Made([ImageFile(1, "reg", "/b/f", FILE, 1)])
    mount = DATA._replace(places=(Place("/a"), Place("/b", "sub"), Place("/b/c", "other")))
    unused = DelayedMount("unused", "nfs4", "x:/", places=(Place("/u"),))
    assert used_alone(images, [mount, unused], ["/", "/tmp"]) == [mount._replace(places=mount.places[1:2])]


@pytest.mark.parametrize(
    "text, wish",
    [
        ("data=/data", Wish("data", "/data")),
        ("data", Wish("data")),
        (
            "d=/data/,type=nfs4,source=s:/x,flags=1024,host=/h,options=rw,vers=4.2",
            Wish("d", "/data", "nfs4", "s:/x", 1024, "rw,vers=4.2", "/h"),
        ),
        ("d=/data,type=none,source=/x,options=bind,ro", Wish("d", "/data", "none", "/x", None, "bind,ro")),
    ],
)
def test_delayed_options(text: str, wish: Wish) -> None:
    assert Wish.parse(text) == wish


@pytest.mark.parametrize(
    "text",
    ["", "=x", "a b=/x", "d=rel", "d=/x,kind=nfs", "d=/x,type=", "d=/x,type=a,type=b", "d=/x,flags=many", "d/e=/x"],
)
def test_delayed_options_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Wish.parse(text)


def test_wishes_and_what_is_known() -> None:
    assert Wish.parse("data=/data,source=other:/x").onto(DATA).source == "other:/x"
    with pytest.raises(UsageError, match="at the dump it was at /data"):
        Wish.parse("data=/elsewhere").onto(DATA)
    with pytest.raises(UsageError, match="not known"):
        Wish.parse("data=/data").alone()
    assert Wish.parse("data=/data,type=nfs4,source=server:/export").alone() == DATA


def test_records(tmp_path: Path) -> None:
    assert record.read(str(tmp_path)) is None
    file = PlannedFile("\udcff/x", FILE, 4, uses=("fd 3 of 7",), original="y", owner=(7, 8))
    mounts = [DATA._replace(files=(file,), host="/h", network="container"), DelayedMount("two", "none", "/x", 4096)]
    record.write(str(tmp_path), mounts)
    assert record.read(str(tmp_path)) == mounts
    assert [path.name for path in tmp_path.iterdir()] == [record.NAME]
    with pytest.raises(SpfsError, match="cannot write"):
        record.write(str(tmp_path / "none"), mounts)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"version": 2, "mounts": []}', '{"version": 1}', '{"version": 1, "mounts": [{"key": "a"}]}',
        '{"version": 1, "mounts": [{"key": "a b", "type": "x", "source": "y"}]}',
        '{"version": 1, "mounts": [{"key": "a", "type": "x", "source": "y", "colour": "z"}]}',
        json.dumps({"version": 1, "mounts": [DATA.to_json(), DATA.to_json()]}),
        json.dumps({"version": 1, "mounts": [{**DATA.to_json(), "flags": "bind"}]}),
        json.dumps({"version": 1, "mounts": [{**DATA.to_json(), "source": 5}]}),
        json.dumps({"version": 1, "mounts": [{**DATA.to_json(), "places": ["/data"]}]}),
        json.dumps({"version": 1, "mounts": [{**DATA.to_json(), "network": "mine"}]}),
        json.dumps({"version": 1, "mounts": [{**DATA.to_json(), "files": [{"path": "x", "mode": "0644"}]}]}),
    ],
)  # fmt: skip
def test_records_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / record.NAME
    path.write_text(text)
    with pytest.raises(StubfsError) as caught:
        record.read(str(path))
    assert str(path) in str(caught.value) or "two mounts" in str(caught.value)


def test_options_of_a_mount() -> None:
    line = b"3 1 0:42 / /data ro,nosuid,relatime shared:5 - nfs4 srv:/x rw,vers=4.2,clientaddr=1.2.3.4,addr=5.6.7.8"
    assert options_of(parse_line(line)) == "vers=4.2,addr=5.6.7.8,nosuid,relatime,ro"


def test_values_of_criu_options() -> None:
    for arguments in (["-D", "x"], ["-Dx"], ["--images-dir", "x"], ["--images-dir=x", "--", "-D", "y"]):
        assert command.value(arguments, "-D", "--images-dir") == "x"
    assert command.value(["-d", "--images"], "-D", "--images-dir") is None
    with pytest.raises(UsageError):
        command.value(["-D"], "-D", "--images-dir")
    assert command.given(["-ds"], "-d", "--restore-detached") and command.given(["--file-locks"], "--file-locks", "-l")
    assert not command.given(["-D", "x", "--display-stats"], "-d", "--restore-detached")


def test_options_that_are_added() -> None:
    own = DATA._replace(host="/h", places=(Place("/data", "", "data"), Place("/b", "s", "data.1")))
    assert command.dump_options([own], []) == [
        "--link-remap", "--file-locks", "--external", "mnt[/data]:data", "--external", "mnt[/b]:data.1",
    ]  # fmt: skip
    assert command.dump_options([DATA], ["--link-remap", "-l"]) == []
    assert command.restore_options([own, DATA], ["--file-validation=buildid", "--file-locks"], "/script") == [
        "--action-script", "/script", "--external", "mnt[data]:/h", "--external", "mnt[data.1]:/h/s",
    ]  # fmt: skip


def test_an_action_that_criu_did_not_call() -> None:
    with pytest.raises(SpfsError, match="CRTOOLS_SCRIPT_ACTION") as caught:
        act({})
    assert caught.value.errno == errno.EINVAL
    act({"CRTOOLS_SCRIPT_ACTION": "network-lock"})  # one of the many where there is nothing to do
