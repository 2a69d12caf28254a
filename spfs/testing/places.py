"""The directory in which a test run has its mounts and sockets, and how all of it is taken away, whoever was killed.

Nothing in it is ever deleted but what was made for the purpose: what is mounted is unmounted first, directories are
removed only when they are empty. It says whose it is, so that later runs clear away what a dead one has left.
"""

from __future__ import annotations

import os
import time
from typing import List

from spfs.linux import mountinfo
from spfs.linux.mountinfo import Mount
from stubfs.fusemount import detach

_PREFIX = "spfs-test-"
_OWNER = "owner"
_REPLACED = "replaced"
_FSTYPE = "fuse.stubfs"
_STAGING = "stubfs-"  # without root, a file system keeps its staging files in a temporary directory (stubfs.backing)
IN_THE_WAY = "take what is in it away, and remove it"  # the hint of an error that remove() or clear() causes
_LONGEST_BASE = 75  # bytes; a socket's path has at most 107, unix(7)
_ORPHANED = 3600.0  # seconds; a directory without an owner is one that is just being made, or whose maker was killed


def make() -> str:
    """A new directory, this process's; others may pass through it. Also removes those of processes that are gone."""
    base = os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(base)) > _LONGEST_BASE or not os.path.isdir(base):
        base = "/tmp"
    base = os.path.realpath(base)
    _sweep(base)
    path = os.path.join(base, _PREFIX + os.urandom(4).hex())
    os.mkdir(path)
    os.chmod(path, 0o711)
    os.symlink(_identity(os.getpid()), os.path.join(path, _OWNER))
    return path


def _identity(pid: int) -> str:
    """Process ids are reused, and other containers that see the directory have their own."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        start = stat.read().rpartition(b") ")[2].split()[19].decode()  # field 22, proc(5); the name may hold anything
    return f"{pid} {start} {os.stat('/proc/self/ns/pid').st_ino}"


def _sweep(base: str) -> None:
    for entry in os.scandir(base):
        if not entry.name.startswith(_PREFIX):
            continue
        try:
            if entry.stat(follow_symlinks=False).st_uid == os.geteuid() and _is_abandoned(entry.path):
                remove(entry.path)
        except OSError:
            continue  # another run has just done it, or cannot either


def _is_abandoned(path: str) -> bool:
    try:
        pid, start, namespace = os.readlink(os.path.join(path, _OWNER)).split()
    except FileNotFoundError:
        return time.time() - os.stat(path).st_mtime > _ORPHANED
    except ValueError:
        return False  # not one of ours
    if namespace != str(os.stat("/proc/self/ns/pid").st_ino):
        return False
    try:
        return _identity(int(pid)) != f"{pid} {start} {namespace}"
    except OSError:
        return True


def note_replaced(directory: str, mountpoint: str) -> None:
    """Something else than the file system will be on ``mountpoint``: who clears ``directory`` is to take it away, but
    not what was there before."""
    link = os.path.join(directory, _REPLACED)
    if not os.path.islink(link):
        below = [mount for mount in _mounts() if mount.mountpoint == mountpoint and mount.fstype != _FSTYPE]
        os.symlink(f"{len(below)} {mountpoint}", link)


def clear(directory: str) -> None:
    """Remove one mount's directory, with what is mounted there. OSError if something is in the way."""
    _detach_all(directory)
    for entry in list(os.scandir(directory)):
        if entry.name.startswith(_STAGING) and entry.is_dir(follow_symlinks=False):
            import shutil

            shutil.rmtree(entry.path)  # never of a mount: those beneath are off
        elif entry.is_dir(follow_symlinks=False):
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(directory)


def remove(path: str) -> None:
    """Remove a run's directory, with all mounts that are left. OSError if something is in the way."""
    _detach_all(path)
    for entry in list(os.scandir(path)):
        if entry.is_dir(follow_symlinks=False):
            clear(entry.path)
        elif entry.name != _OWNER:
            os.unlink(entry.path)
    try:
        os.unlink(os.path.join(path, _OWNER))  # last of all: what is left until here, a later run removes
    except FileNotFoundError:
        pass
    os.rmdir(path)


def _detach_all(directory: str) -> None:
    for mountpoint in reversed(_mounted(directory)):
        detach(mountpoint)


def _mounts() -> List[Mount]:
    with open("/proc/self/mountinfo", "rb") as table:
        return mountinfo.parse(table.read())


def _mounted(directory: str) -> List[str]:
    """What is mounted beneath a directory, or was mounted elsewhere on behalf of it, in the kernel's order."""
    inside = directory + "/"
    mounts = _mounts()
    found = [
        mount.mountpoint
        for mount in mounts
        if mount.mountpoint.startswith(inside)
        or mount.fstype == _FSTYPE and (mount.source + "/").startswith(inside)
    ]
    try:
        below, _, mountpoint = os.readlink(os.path.join(directory, _REPLACED)).partition(" ")
    except FileNotFoundError:
        return found
    if not mountpoint.startswith(inside):
        there = [mount for mount in mounts if mount.mountpoint == mountpoint and mount.fstype != _FSTYPE]
        found += [mountpoint for _ in there[int(below) :]]
    return found
