"""Binding a unix socket by the address of another one, as a process sees the world."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from typing import Optional

from spfs.linux import namespaces, sockdiag
from spfs.surgery import socketlist
from spfs.surgery.records import Process
from spfs.surgery.socketcopy import borrowed
from stubfs.syscalls import fchmodat


def check(old: int, directory: int, name: str) -> None:
    """OSError for what would keep ``bind`` from it, as far as that can be known before the mounts are switched."""
    with borrowed(old) as one:
        _beginning(one.getsockname())
    _replaceable(directory, name)
    if os.fstatvfs(directory).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def bind(process: Process, old: int, new: int, directory: int, name: str) -> None:
    """Bind ``new`` by the address of ``old``, as the process sees the world; a socket left there is replaced.

    ``directory``, ``name``: where that must lead to.
    """
    with borrowed(old) as one:
        address = one.getsockname()
    find_hidden(directory, name)
    there = _replaceable(directory, name)
    if there is not None:
        os.unlink(name, dir_fd=directory)  # as every server does before it binds
    mode = stat.S_IMODE(there.st_mode) if there is not None else 0o777 & ~process.status.umask
    uid, gid = (there.st_uid, there.st_gid) if there is not None else (process.status.uid, process.status.gid)
    try:
        _bind_as_seen(process, new, directory, address, mode)
    except BaseException:
        if there is not None:
            os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=directory)
            fchmodat(directory, os.fsencode(name), mode)  # follows no link that somebody puts there just now
            os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
        raise
    os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)


def hide(directory: int, name: str, mode: int) -> str:
    """Give the node another name for a moment; that name. It tells whose it is, and its permissions, in case that
    nobody is there any more to give them back."""
    hidden = f".spfs-{mode:03o}-{_mark(name)}"
    os.rename(name, hidden, src_dir_fd=directory, dst_dir_fd=directory)
    return hidden


def find_hidden(directory: int, name: str) -> None:
    """If there is nothing by that name because one was killed who had hidden it, give it back."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
        return
    except FileNotFoundError:
        pass
    readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        for entry in os.listdir(readable):
            match = re.fullmatch(r"\.spfs-([0-7]{3,4})-" + _mark(name), entry)
            if match is not None and stat.S_ISSOCK(os.stat(entry, dir_fd=readable, follow_symlinks=False).st_mode):
                fchmodat(readable, os.fsencode(entry), int(match.group(1), 8))
                os.rename(entry, name, src_dir_fd=readable, dst_dir_fd=readable)
    finally:
        os.close(readable)


def _mark(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def _replaceable(directory: int, name: str) -> Optional[os.stat_result]:
    """The status of a socket that nobody uses any more; None if there is nothing. OSError for anything else."""
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(there.st_mode):
        raise OSError(errno.EEXIST, "something that is no socket has its name there")
    if any((s.device, s.inode) == (there.st_dev, there.st_ino & 0xFFFFFFFF) for s in sockdiag.unix_sockets()):
        raise OSError(errno.EADDRINUSE, "another socket is bound there")
    return there


def _bind_as_seen(process: Process, new: int, directory: int, address: str, mode: int) -> None:
    assert process.tables
    tid = process.tables[0].tid
    namespace = os.open(f"/proc/{tid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    root = os.open(f"/proc/{tid}/root", os.O_PATH | os.O_CLOEXEC)
    beneath = _beginning(address)

    def bind() -> None:
        os.fchdir(root)
        os.chroot(".")
        if beneath is not None:
            os.fchdir(directory)
            for _ in range(beneath):
                os.chdir("..")
        wanted, found = os.fstat(directory), os.stat(os.path.dirname(address) or ".")
        if (wanted.st_dev, wanted.st_ino) != (found.st_dev, found.st_ino):
            raise OSError(errno.EXDEV, f"its address {address} does not lead to the new mount")
        os.umask(0o777 & ~mode)  # of this thread alone, as the directories
        with borrowed(new) as one:
            one.bind(address)

    try:
        socketlist.in_thread(bind, [(namespace, namespaces.CLONE_NEWNS)])
    finally:
        os.close(root)
        os.close(namespace)


def _beginning(address: str) -> Optional[int]:
    """For an address relative to a directory that the process may have left since: how many levels that one is above
    the directory of the socket. None for an absolute address."""
    if address.startswith("/"):
        return None
    parts = [part for part in address.split("/")[:-1] if part not in ("", ".")]
    if ".." in parts:
        raise OSError(errno.EXDEV, f"where its address {address} begins is not known")
    return len(parts)
