"""The real file system, mounted detached: no path shows it until ``spfs.mounts`` puts it in its place.

By fsopen(2) where the options can be given one by one, by mount(2) in a private mount namespace where they cannot, or
by the type's mount helper. Which network and whose paths: the target's. What fails for want of a network is for
``Retry`` to try again.
"""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Callable, FrozenSet, Optional, Tuple, Type, TypeVar

from spfs import nschild, workshop
from spfs.errors import SpfsError, reason
from spfs.linux import mountapi, namespaces, statx
from spfs.linux.mountapi import MS, FsConfig
from spfs.mountoptions import MountOptions, helper_errno
from spfs.nschild import Answer
from spfs.target import Target

T = TypeVar("T")

_HELPER_PLACES = ("/sbin", "/usr/sbin", "/usr/local/sbin")
# Their options in one string follow rules of their own (",," is a comma in a cifs password), which only mount(2) knows.
_ONE_STRING = ("cifs", "smb3")
# Options that a mount helper adds for the kernel: whoever gives them has them from mountinfo and needs no helper.
_KERNEL_OPTIONS = ("addr", "ip", "fd", "trans")
# Made there by mount(2)'s old interface, or with a value that holds a comma: another way may do.
_TRY_ANOTHER_WAY = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.E2BIG)


def make(
    source: str,
    fstype: str,
    flags: int,
    options: str,
    target: Target,
    timeout: Optional[float] = None,
    *,
    user_namespace: bool = False,
    helper_directory: Optional[str] = None,
) -> int:
    """The fd of a new detached mount's root; the caller's. One attempt, of at most ``timeout`` seconds.

    Kernel file systems are mounted in ``target``'s network and mount namespaces and root; in its user namespace if
    ``user_namespace`` and the type allows that. Mount helpers are *our* programs, so they see our root, with the
    target's network. OSError as mount(2), a helper's failure as an errno that fits with its words as strerror;
    SpfsError for what cannot be asked for; TimeoutError after ``timeout``. ``helper_directory``: made for a helper to
    mount on and removed again; who gives it can remove it, too, should we be killed (None: a temporary one).
    """
    wanted = MountOptions.parse(flags, options)
    if wanted.bind:
        return _in_child(lambda: (None, [_bind(source, wanted)]), target, ("mnt",), timeout)
    helper = _helper(fstype)
    if helper and not wanted.has(*_KERNEL_OPTIONS):
        return _with_helper(helper, source, fstype, wanted, target, timeout, helper_directory)
    if fstype.startswith(("fuse.", "fuseblk.")) and not wanted.has("fd"):
        raise SpfsError(
            f"cannot mount {source}: type {fstype}: there is no /sbin/mount.fuse to start its program",
            "install the package fuse3 (or fuse)",
            errno.ENODEV,
        )
    join = ("net", "mnt", "user") if user_namespace else ("net", "mnt")
    try:
        return _in_child(lambda: _by_kernel(source, fstype, wanted), target, join, timeout)
    except OSError as error:
        # Most types, NFS and ext4 among them, cannot be mounted in a user namespace (FS_USERNS_MOUNT).
        if error.errno != errno.EPERM or "user" not in join or "user" not in target.namespaces:
            raise
    return _in_child(lambda: _by_kernel(source, fstype, wanted), target, ("net", "mnt"), timeout)


def _bind(source: str, wanted: MountOptions) -> int:
    flags = mountapi.OPEN_TREE_CLONE
    if wanted.flags & MS.REC:
        flags |= mountapi.AT_RECURSIVE
    mount_fd = mountapi.open_tree(mountapi.AT_FDCWD, source, flags)
    if wanted.attributes:
        mountapi.mount_setattr(mount_fd, set=wanted.attributes)
    return mount_fd


def _helper(fstype: str) -> Optional[str]:
    base = fstype.partition(".")[0] if fstype.startswith(("fuse.", "fuseblk.")) else fstype
    if not base or "/" in base:
        return None
    for place in _HELPER_PLACES:
        path = f"{place}/mount.{base}"
        if os.access(path, os.X_OK):
            return path
    return None


def _with_helper(
    helper: str,
    source: str,
    fstype: str,
    wanted: MountOptions,
    target: Target,
    timeout: Optional[float],
    directory: Optional[str],
) -> int:
    # Made and removed by us: the child may be killed, and helpers want a path that they can resolve. Mounted on is it
    # only in the child's mount namespace.
    if directory is None:
        directory = tempfile.mkdtemp(prefix="spfs-mount-")
    else:
        os.makedirs(directory, 0o700, exist_ok=True)  # there already: its maker was killed
    place = directory
    try:
        return _in_child(lambda: _by_helper(helper, source, fstype, wanted, place), target, ("net",), timeout)
    finally:
        os.rmdir(place)


def _in_child(work: Callable[[], Answer], target: Target, join: Tuple[str, ...], timeout: Optional[float]) -> int:
    with nschild.run(work, target, join, timeout, root="mnt" in join, group=True) as result:
        return result.steal()


def _by_kernel(source: str, fstype: str, wanted: MountOptions) -> Answer:
    if fstype in _ONE_STRING:
        return None, [_by_mount(source, fstype, wanted)]
    try:
        return None, [_by_fsopen(source, fstype, wanted)]
    except _Refused as refused:
        try:
            return None, [_by_mount(source, fstype, wanted)]
        except OSError as error:
            # The old interface says EINVAL and no more; the new one had words for it.
            text = f"{error.strerror}: {refused.strerror}" if refused.log else error.strerror
            raise OSError(error.errno, text, error.filename) from error


class _Refused(OSError):
    """A parameter that fsconfig did not take. ``log``: did the kernel say why?"""

    log = False


def _by_fsopen(source: str, fstype: str, wanted: MountOptions) -> int:
    try:
        fs_fd = mountapi.fsopen(fstype)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise OSError(errno.ENODEV, f"the kernel has no file system type {fstype}", source) from error
        if error.errno in (errno.ENOSYS, errno.EPERM):  # older than 5.2, or hidden by a seccomp filter
            raise _Refused(error.errno, error.strerror, source) from error
        raise
    try:
        try:
            if source:
                mountapi.fsconfig(fs_fd, FsConfig.SET_STRING, "source", source)
            for key, value in wanted.parameters():
                kind = FsConfig.SET_FLAG if value is None else FsConfig.SET_STRING
                mountapi.fsconfig(fs_fd, kind, key, value)
        except OSError as error:
            raise _explained(error, fs_fd, source, _Refused) from error
        try:
            mountapi.fsconfig(fs_fd, FsConfig.CMD_CREATE)
        except OSError as error:
            raise _explained(error, fs_fd, source, OSError) from error
        return mountapi.fsmount(fs_fd, wanted.attributes)
    finally:
        os.close(fs_fd)


def _explained(error: OSError, fs_fd: int, source: str, kind: Type[OSError]) -> OSError:
    """The error with the kernel's messages about it; of ``kind`` if another way may do."""
    # Lines are "e text", "w text" or "i text" (Documentation/filesystems/mount_api.rst).
    log = "; ".join(line[2:] for line in mountapi.fs_log(fs_fd) if line[:2] in ("e ", "w "))
    if error.errno not in _TRY_ANOTHER_WAY:
        kind = OSError
    explained = kind(error.errno, f"{error.strerror}: {log}" if log else error.strerror, source)
    if isinstance(explained, _Refused):
        explained.log = bool(log)
    return explained


def _take(path: str, base_fd: int, source: str) -> int:
    """A detached copy of what was mounted at ``path``, which is unmounted there.

    OSError EIO if nothing was: if ``path`` still is on the mount of ``base_fd``.
    """
    here = mountapi.open_tree(mountapi.AT_FDCWD, path, mountapi.AT_NO_AUTOMOUNT)
    try:
        # By mount id, and without a request to a file system that may hang. Not from /proc, which is the target's.
        if _mount_id(here) == _mount_id(base_fd):
            raise OSError(errno.EIO, "the mount helper reported success, but nothing is mounted", source)
        mount_fd = mountapi.open_tree(here, "", mountapi.OPEN_TREE_CLONE)
    finally:
        os.close(here)
    # The daemon of a FUSE file system stays in this namespace: with its mount here it would keep itself alive.
    mountapi.umount2(path, mountapi.MNT_DETACH)
    return mount_fd


def _mount_id(fd: int) -> int:
    return statx.examine("", fd, statx.AT_EMPTY_PATH).mount_id


def _by_mount(source: str, fstype: str, wanted: MountOptions) -> int:
    base = workshop.enter()
    os.mkdir("mount", 0o700)
    try:
        mountapi.mount(source, "mount", fstype, wanted.flags, wanted.data or None)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise OSError(errno.ENODEV, f"the kernel has no file system type {fstype}", source) from error
        raise OSError(error.errno, error.strerror, source) from error
    return _take("mount", base, source)


def _by_helper(helper: str, source: str, fstype: str, wanted: MountOptions, directory: str) -> Answer:
    workshop.private_namespace()
    base = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    command = [helper, source, directory]
    if fstype.startswith(("fuse.", "fuseblk.")):
        command += ["-t", fstype]
    if wanted.helper_options:
        command += ["-o", wanted.helper_options]
    # A file and not a pipe: a FUSE daemon keeps it open for good, and the end of a pipe would never come.
    output = os.memfd_create("mount-helper", os.MFD_CLOEXEC)
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/root"}
    try:
        process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            check=False,
            # One that hangs must not outlive us when we are killed. A daemon that it leaves is not concerned: the
            # setting is the helper's own and is not inherited (prctl(2)).
            preexec_fn=lambda: namespaces.die_with_parent(signal.SIGKILL),
        )
    except OSError as error:
        raise OSError(error.errno, f"cannot start mount helper: {error.strerror}", helper) from error
    if process.returncode != 0:
        text = os.pread(output, 4096, 0).decode(errors="replace")
        words = "; ".join(line.strip() for line in text.splitlines() if line.strip())
        number = helper_errno(process.returncode, text)
        status = f"{helper} ended with status {process.returncode}"
        raise OSError(number, f"{words} ({status})" if words else f"{os.strerror(number)} ({status})", source)
    return None, [_take(directory, base, source)]


@dataclass(frozen=True)
class RetryPolicy:
    """Delays in seconds. They double from ``first`` to ``limit``; each is shortened by up to ``jitter`` of itself."""

    first: float = 0.05
    limit: float = 5.0
    jitter: float = 0.25
    permission_attempts: int = 20  # EPERM: as many times, then it is taken for an answer
    not_yet: FrozenSet[int] = frozenset()  # what else means for this source that it is late

    def retryable(self, number: Optional[int], refusals: int) -> bool:
        if number == errno.EPERM:
            return refusals < self.permission_attempts
        return number in _NETWORK_ERRORS or number in self.not_yet

    def delay(self, attempt: int) -> float:
        """The delay after the ``attempt``-th (from 1) failure."""
        full = min(self.limit, self.first * 2.0 ** min(attempt - 1, 32))
        return full * (1 - self.jitter * random.random())


_NETWORK_ERRORS = frozenset(
    [
        errno.ECONNREFUSED,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EPROTONOSUPPORT,
        errno.EAGAIN,
        errno.EIO,
    ]
)


def not_yet(fstype: str) -> FrozenSet[int]:
    """What else than the network's errors means, for that type, that its server is late."""
    # What rpcbind's answer "no such program" becomes when an NFS server has not registered yet (net/sunrpc/clnt.c).
    return frozenset([errno.EOPNOTSUPP]) if fstype in ("nfs", "nfs4") else frozenset()


@dataclass(frozen=True)
class Attempt:
    """A failed attempt: its number from 1 on, the errno, the text, and in how many seconds the next one follows."""

    number: int
    errno: int
    error: str
    next: float


class Retry:
    """Tries until it works, fails for good, ``timeout`` seconds are over, or ``abort_fd`` becomes readable.

    ``abort_fd`` stays the caller's. ``report`` is told of each failure that is tried again.
    """

    def __init__(
        self,
        policy: RetryPolicy = RetryPolicy(),
        *,
        timeout: Optional[float] = None,
        abort_fd: Optional[int] = None,
        report: Callable[[Attempt], None] = lambda attempt: None,
    ) -> None:
        self._policy = policy
        self._timeout = timeout
        self._abort_fd = abort_fd
        self._report = report

    def run(self, attempt: Callable[[Optional[float]], T], what: str) -> T:
        """The result of ``attempt``, which is given the seconds that are left (None: any number).

        ``what``: for messages, as "srv:/export (nfs4)". SpfsError with the last errno; ECANCELED if aborted. Nothing
        else is caught.
        """
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        number = refusals = 0
        while True:
            number += 1
            try:
                return attempt(nschild.deadline_left(deadline))
            except OSError as error:
                refusals += error.errno == errno.EPERM
                if not self._policy.retryable(error.errno, refusals):
                    raise _for_good(what, number, error) from error
                delay = self._policy.delay(number)
                left = nschild.deadline_left(deadline)
                if left is not None and left <= delay:
                    raise SpfsError(
                        f"cannot mount {what}: not within {self._timeout:g} s, after {number} attempts:"
                        f" {reason(error)}",
                        "is the server up, and does the target's network reach it?",
                        errno.ETIMEDOUT,
                    ) from error
                self._report(Attempt(number, error.errno or errno.EIO, reason(error), delay))
            self._sleep(delay, what, number)

    def _sleep(self, seconds: float, what: str, number: int) -> None:
        poll = select.poll()
        if self._abort_fd is not None:
            poll.register(self._abort_fd, select.POLLIN)
        if poll.poll(seconds * 1000):
            raise SpfsError(
                f"cannot mount {what}: given up after {number} attempts: aborted",
                "ask again when the server can be reached",
                errno.ECANCELED,
            )


_HINTS = {
    errno.ENODEV: "check the type; is the kernel module, or the package with its mount helper, installed?",
    errno.EINVAL: "check the options; the kernel log may say more",
    errno.ENOENT: "check the source",
    errno.EPERM: "the server, or this machine's policy, does not allow it",
    errno.EACCES: "the server does not allow it",
}


def _for_good(what: str, number: int, error: OSError) -> SpfsError:
    attempts = f", at attempt {number}" if number > 1 else ""
    code = error.errno or errno.EIO
    return SpfsError(f"cannot mount {what}{attempts}: {reason(error)}", _HINTS.get(code, ""), code)
