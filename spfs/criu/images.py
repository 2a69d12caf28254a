"""CRIU's images, as far as they name files: read by pycriu, given back as dataclasses; nothing of spfs here.

What is where in them (CRIU 4.1): files.img has an entry for each open file, directory, mapping, executable, working
and root directory, socket and watch; a fifo's path is in the REG entry beside it. Only processes in a mount namespace
of their own have mounts in their images, and a mount's id in the entries of their files.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
import quopri
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Dict, Iterator, List, Optional, Tuple

from spfs.errors import MissingFeatureError, SpfsError, reason

_NOBODY = -1  # the mount id of an entry that has none


@dataclass(frozen=True)
class ImageFile:
    """A file that an entry names. ``path``: from the root of its mount namespace.

    ``kind``: reg (whatever its type), socket or watch. ``mode``, ``size`` (bytes): None where the images do not tell.
    ``id``: of its entry. ``mount``: its mount's id, None for processes in CRIU's own mount namespace.
    """

    id: int
    kind: str
    path: str
    mode: Optional[int] = None
    size: Optional[int] = None
    mount: Optional[int] = None


@dataclass(frozen=True)
class ImageMount:
    """``root``: the directory of the file system that is shown there; ``external``: CRIU's key for it, or ""."""

    id: int
    parent: int
    device: int
    root: str
    mountpoint: str
    external: str = ""


@dataclass(frozen=True)
class Remap:
    """An open file without its name. ``kind``: GHOST (it is in the images), LINKED (it has a name made for the dump,
    which is the file of the entry ``stand_in``) or PROCFS."""

    original: int
    stand_in: int
    kind: str


class Images:
    """The images in ``directory``. Each is read when it is asked for, once."""

    def __init__(self, directory: str) -> None:
        """MissingFeatureError without pycriu, SpfsError if there are no images."""
        self.directory = directory
        self._images = pycriu_images()
        if not os.path.exists(os.path.join(directory, "inventory.img")):
            raise SpfsError(
                f"cannot read images: {directory}: there is no inventory.img",
                "give the directory that criu dump wrote its images to",
                errno.ENOENT,
            )

    def entries(self, name: str) -> List[Dict[str, Any]]:
        """Of the image ``name``.img; none if there is no such image. SpfsError if it cannot be read."""
        path = os.path.join(self.directory, f"{name}.img")
        try:
            with open(path, "rb") as file:
                found: List[Dict[str, Any]] = self._images.load(file)["entries"]
                return found
        except FileNotFoundError:
            return []
        except Exception as error:  # protobuf's, struct's, pycriu's own: they have no common base
            raise SpfsError(
                f"cannot read image: {path}: {reason(error) or type(error).__name__}",
                "it is damaged, or of a CRIU that the installed pycriu does not know",
                errno.EINVAL,
            ) from error

    @functools.cached_property
    def files(self) -> List[ImageFile]:
        return [found for entry in self._entries_of_files for found in _files(entry)]

    @functools.cached_property
    def _entries_of_files(self) -> List[Dict[str, Any]]:
        return self.entries("files")

    @functools.cached_property
    def mounts(self) -> Dict[int, ImageMount]:
        """By id, of all mount namespaces of the processes; none for processes in CRIU's own."""
        found: Dict[int, ImageMount] = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(self.directory), "mountpoints-*.img"))):
            for entry in self.entries(os.path.basename(path)[: -len(".img")]):
                mount = _mount(entry)
                found[mount.id] = mount
        return found

    @functools.cached_property
    def remaps(self) -> List[Remap]:
        return [
            Remap(int(entry["orig_id"]), int(entry["remap_id"]), str(entry.get("remap_type", "LINKED")))
            for entry in self.entries("remap-fpath")
        ]

    def uses(self) -> Dict[int, List[str]]:
        """Entry id → what for: "fd 3 of 4711", "working directory of 4711", "mapping of 4711" …"""
        found: Dict[int, List[str]] = {}
        # The descriptor of a fifo is that of the entry that has its data; another one has the path.
        paths = {int(entry["id"]): int(entry["fifo"]["regf_id"]) for entry in self._entries_of_files if "fifo" in entry}
        for pid in self._pids():
            for id, use in self._uses_of(pid):
                uses = found.setdefault(paths.get(id, id), [])
                if f"{use} of {pid}" not in uses:
                    uses.append(f"{use} of {pid}")
        return found

    def _pids(self) -> List[int]:
        return [int(entry["pid"]) for entry in self.entries("pstree")]

    def _uses_of(self, pid: int) -> Iterator[Tuple[int, str]]:
        for ids in self.entries(f"ids-{pid}"):
            for entry in self.entries(f"fdinfo-{ids.get('files_id')}"):
                yield int(entry["id"]), f"fd {entry['fd']}"
        for entry in self.entries(f"fs-{pid}"):
            yield int(entry["cwd_id"]), "working directory"
            yield int(entry["root_id"]), "root directory"
        for entry in self.entries(f"mm-{pid}"):
            yield int(entry["exe_file_id"]), "program"
            for vma in entry.get("vmas", []):
                if int(vma["status"]) & _VMA_FILE:
                    yield int(vma["shmid"]), "mapping"


_VMA_FILE = 1 << 6 | 1 << 7  # VMA_FILE_PRIVATE, VMA_FILE_SHARED: criu/include/image.h


def pycriu_images() -> ModuleType:
    """pycriu's reader; MissingFeatureError, with what to install, where it is missing."""
    # Debian's package is for the system's Python: neither a virtual environment made of that one looks there, nor does
    # an interpreter that was started without site-packages.
    beside = os.path.join(sys.base_prefix, "lib", "python3", "dist-packages")
    added = beside not in sys.path
    if added:
        sys.path.append(beside)
    try:
        with warnings.catch_warnings():
            # protobuf's C part announces what a later Python will not take: not a matter of ours.
            warnings.simplefilter("ignore")
            import pycriu.images
    except ImportError as error:
        raise MissingFeatureError(
            f"cannot read CRIU's images: there is no Python module pycriu ({error})",
            "install it: apt-get install python3-pycriu (it comes with CRIU; PyPI has none)",
            errno.ENOSYS,
        ) from error
    finally:
        if added:
            sys.path.remove(beside)
    module: ModuleType = pycriu.images
    return module


def _files(entry: Dict[str, Any]) -> Iterator[ImageFile]:
    if "reg" in entry:
        reg = entry["reg"]
        yield ImageFile(
            int(entry["id"]), "reg", _absolute(reg["name"]), reg.get("mode"), _number(reg.get("size")), _mount_id(reg)
        )
    elif "usk" in entry:
        socket = entry["usk"]
        name = quopri.decodestring(socket.get("name", b""))
        if name and not name.startswith(b"\0"):  # an abstract one is on no file system
            path = os.path.join(socket.get("name_dir", "/"), os.fsdecode(name.rstrip(b"\0")))
            mode = socket.get("file_perms", {}).get("mode")
            yield ImageFile(int(entry["id"]), "socket", _absolute(path), mode, None, _mount_id(socket))
    for kind, key in (("ify", "wd"), ("ffy", "mark")):
        for watch in entry.get(kind, {}).get(key, []):
            handle = watch.get("f_handle") or watch.get("ie", {}).get("f_handle") or {}
            if handle.get("path"):
                yield ImageFile(int(entry["id"]), "watch", _absolute(handle["path"]), None, None, _mount_id(handle))


def _absolute(path: str) -> str:
    """Images of some kinds name paths as "./a" or "a"."""
    return os.path.normpath("/" + path).replace("//", "/")


def _number(value: Any) -> Optional[int]:
    return None if value is None else int(value)


def _mount_id(entry: Dict[str, Any]) -> Optional[int]:
    number = int(entry.get("mnt_id", _NOBODY))
    return None if number <= 0 else number


def _mount(entry: Dict[str, Any]) -> ImageMount:
    return ImageMount(
        id=int(entry["mnt_id"]),
        parent=int(entry["parent_mnt_id"]),
        device=int(entry["root_dev"]),
        root=str(entry["root"]),
        mountpoint=_absolute(str(entry["mountpoint"])),
        external=str(entry.get("ext_key", "")),
    )
