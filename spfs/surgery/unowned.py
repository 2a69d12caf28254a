"""What the kernel itself has of a mount, in nobody's name: loop devices, swap files, layers of overlays. It can only be
reported.

It is told by its path, as seen in our mount namespace; to ask a loop device (LOOP_GET_STATUS64) would cause a request
to the file system.
"""

from __future__ import annotations

import glob
import os
import re
from typing import Iterator, List, Optional, Tuple

from spfs.linux import mountinfo, procfs
from spfs.references import LeftReference

KERNEL = 0  # as a pid
_DELETED = " (deleted)"
_LOOP = "the kernel has it open: detach the device (losetup --detach), and attach it again"
_SWAP = "the kernel swaps to it: swapoff, and swapon again"
_LAYER = "the kernel has it for a layer of an overlay: unmount that, and mount it again"
_LAYERS = re.compile(r"(?:^|,)(?:lowerdir|datadir|upperdir)\+?=((?:\\.|[^,\\])*)")  # overlay's options
_SEPARATOR = re.compile(r"(?<!\\)::?")


def held(device: int) -> List[LeftReference]:
    """Of the file system ``device`` (st_dev), with the path relative to its root."""
    mounts = mountinfo.parse(procfs.read("/proc/self/mountinfo"))
    found: List[LeftReference] = []
    for kind, what, path, why in (*_loop_devices(), *_swap_files(), *_layers(mounts)):
        relative = _relative(path, device, mounts)
        if relative is not None:
            found.append(LeftReference(KERNEL, "kernel", kind, what, relative, why))
    return found


def _loop_devices() -> Iterator[Tuple[str, str, str, str]]:
    for name in sorted(glob.glob("/sys/block/loop*/loop/backing_file")):
        try:
            path = os.fsdecode(procfs.read(name)).rstrip("\n")
        except OSError:
            continue  # detached just now
        if path.endswith(_DELETED):
            path = path[: -len(_DELETED)]
        yield "loop device", f"/dev/{name.split('/')[3]}", path, _LOOP


def _swap_files() -> Iterator[Tuple[str, str, str, str]]:
    for line in procfs.read("/proc/swaps").splitlines()[1:]:
        path, kind = line.split()[:2]
        if kind == b"file":
            yield "swap file", "swap", mountinfo.unescape(path), _SWAP


def _layers(mounts: List[mountinfo.Mount]) -> Iterator[Tuple[str, str, str, str]]:
    for mount in (one for one in mounts if one.fstype == "overlay"):
        for layers in _LAYERS.findall(mount.super_options):
            for layer in _SEPARATOR.split(layers):
                if layer.startswith("/"):  # others are relative to a directory that nobody knows any more
                    yield "overlay layer", f"of {mount.mountpoint}", re.sub(r"\\(.)", r"\1", layer), _LAYER


def _relative(path: str, device: int, mounts: List[mountinfo.Mount]) -> Optional[str]:
    """The path within the file system if the innermost mount that it leads through is of that."""
    through = [mount for mount in mounts if f"{path}/".startswith(mount.mountpoint.rstrip("/") + "/")]
    longest = max((len(mount.mountpoint) for mount in through), default=0)
    for mount in through:
        if len(mount.mountpoint) == longest and mount.st_dev == device:
            rest = path[len(mount.mountpoint.rstrip("/")) :]
            return (mount.root.rstrip("/") + rest).lstrip("/")
    return None
