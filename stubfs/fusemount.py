"""Making and removing FUSE mounts: detached by the mount API as root, by fusermount without.

Nothing here serves requests. Used by ``stubfs`` itself and by whoever attaches the mount somewhere else.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from typing import Dict, List, Optional, Tuple

from stubfs import syscalls
from stubfs.errors import MissingFeatureError, StubfsError, UsageError, reason
from stubfs.options import FLAGS, MountOptions
from stubfs.syscalls import MountAttr

DEVICE = "/dev/fuse"
FD_PREFIX = "/dev/fd/"
_OURS = ("fuse.stubfs", "fuse.spfs")
_DEVICE_NUMBER = os.makedev(10, 229)  # Documentation/admin-guide/devices.txt


def open_device() -> int:
    """A new /dev/fuse fd, the caller's. MissingFeatureError says what to do."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = {
            errno.ENOENT: "load the module: modprobe fuse; in a container, give it the device",
            errno.ENODEV: "load the module: modprobe fuse",
            errno.EACCES: "let this user open it, or become root",
            errno.EPERM: "let the container open it: device 10:229",
        }.get(error.errno or 0, "")
        raise MissingFeatureError(
            f"cannot open {DEVICE}: {reason(error)}", hint, error.errno or errno.ENODEV
        ) from error


def device_fd_of(mountpoint: str) -> Optional[int]:
    """N of a mountpoint "/dev/fd/N", checked to be an open /dev/fuse; None for a path. UsageError if it is not."""
    if not mountpoint.startswith(FD_PREFIX):
        return None
    try:
        fd = int(mountpoint[len(FD_PREFIX) :])
        status = os.fstat(fd)
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _DEVICE_NUMBER:
            raise ValueError(f"not {DEVICE}")
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"cannot serve {mountpoint}: {reason(error)}", f"pass an open {DEVICE} of a mount as that descriptor"
        ) from error
    return fd


def fuse_mount(
    subtype: str = "stubfs",
    source: str = "stubfs",
    attributes: int = MountAttr.NOSUID | MountAttr.NODEV,
    allow_other: bool = True,
    extra: Optional[Dict[str, Optional[str]]] = None,
) -> Tuple[int, int]:
    """(device fd, mount fd) of a new detached FUSE mount, made in the calling process's namespaces.

    Both fds are the caller's and close-on-exec. Whoever serves the device must be able to see the callers' pids:
    they are numbered as in the pid namespace of this process. OSError; MissingFeatureError without /dev/fuse.
    """
    device = open_device()
    try:
        context = syscalls.fsopen("fuse")
        try:
            syscalls.fsconfig(context, "source", source)
            syscalls.fsconfig(context, "subtype", subtype)
            syscalls.fsconfig(context, "fd", str(device))
            syscalls.fsconfig(context, "rootmode", "40000")
            syscalls.fsconfig(context, "user_id", str(os.geteuid()))
            syscalls.fsconfig(context, "group_id", str(os.getegid()))
            if allow_other:
                syscalls.fsconfig(context, "allow_other")
            for key, value in (extra or {}).items():
                syscalls.fsconfig(context, key, value)
            if attributes & MountAttr.RDONLY:
                syscalls.fsconfig(context, "ro")
            syscalls.fsconfig(context, None)
            return device, syscalls.fsmount(context, attributes)
        finally:
            os.close(context)
    except BaseException:
        os.close(device)
        raise


def connection_device(device_fd: int) -> Optional[int]:
    """st_dev of the mount behind an open /dev/fuse; None where the kernel does not tell (before 6.5)."""
    with open(f"/proc/self/fdinfo/{device_fd}", "rb") as info:
        for line in info:
            if line.startswith(b"fuse_connection:"):
                return os.makedev(0, int(line.split()[1]))  # an anonymous device, set_anon_super(): major 0
    return None


def check_mountpoint(path: str) -> str:
    """The absolute path of a directory that can be mounted on. StubfsError says why not."""
    absolute = os.path.realpath(path)
    for mountpoint, fstype in _mounts():
        if mountpoint == absolute and fstype in _OURS:
            raise StubfsError(
                f"cannot mount on {path}: a stubfs is mounted there already",
                f"use it, or unmount it first: umount -l {path}",
                errno.EBUSY,
            )
    try:
        status = os.stat(absolute)
    except OSError as error:
        hint = {errno.ENOENT: f"make it: mkdir -p {path}", errno.ENOTCONN: f"unmount it first: umount -l {path}"}
        raise StubfsError(
            f"cannot mount on {path}: {reason(error)}", hint.get(error.errno or 0, ""), error.errno or errno.EIO
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise StubfsError(f"cannot mount on {path}: not a directory", "give a directory", errno.ENOTDIR)
    for own in (__file__, os.__file__, sys.prefix):
        if _is_beneath(own, absolute):
            raise StubfsError(
                f"cannot mount on {path}: this program's own files are there: {own}", "mount beside them", errno.EBUSY
            )
    return absolute


def _is_beneath(path: str, directory: str) -> bool:
    return os.path.commonpath((os.path.realpath(path), directory)) == directory


def import_nothing_from(mountpoint: str) -> None:
    """Modules are imported after the mount is made, too. To look for one there ("python -m" puts the current directory
    first) would be to wait for ourselves: not even SIGTERM ends the wait for a mount that is not served yet."""
    sys.path[:] = [place for place in sys.path if not _is_beneath(place, mountpoint)]


def _mounts() -> List[Tuple[str, str]]:
    """(mountpoint, type) of every mount in this namespace, proc(5): /proc/PID/mountinfo."""
    found = []
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        for line in mountinfo:
            fields, _, rest = line.partition(b" - ")
            path = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), fields.split(b" ")[4])
            found.append((os.fsdecode(path), os.fsdecode(rest.split(b" ")[0])))
    return found


class OwnMount:
    """A mount that we made, with the device that serves it; unmount() removes it if it still is ours."""

    def __init__(self, mountpoint: str, options: MountOptions) -> None:
        self.mountpoint = mountpoint
        try:
            try:
                self.device_fd, mount_fd = fuse_mount(
                    options.subtype, options.source, options.attributes, options.allow_other is not False, options.extra
                )
            except OSError as error:
                if error.errno != errno.EPERM:
                    raise
                self.device_fd = _fusermount(mountpoint, options)
            else:
                try:
                    syscalls.move_mount(mount_fd, os.fsencode(mountpoint))
                except OSError:
                    os.close(self.device_fd)
                    raise
                finally:
                    os.close(mount_fd)
        except OSError as error:
            raise StubfsError(
                f"cannot mount on {mountpoint}: {reason(error)}", "", error.errno or errno.EIO
            ) from error
        self._device = connection_device(self.device_fd)

    def device(self) -> Optional[int]:
        return self._device

    def unmount(self) -> None:
        """Lazily, so that whoever still uses it does not keep it on the path. Never what somebody else put there."""
        path = os.fsencode(self.mountpoint)
        try:
            if self._device is not None and syscalls.device_without_sync(path) == self._device:
                detach(self.mountpoint)
        except OSError:
            return  # not on the path any more


def detach(mountpoint: str) -> None:
    """Unmount lazily; without root a FUSE mount of our own, by fusermount. OSError as umount2(2)."""
    try:
        syscalls.umount2(os.fsencode(mountpoint), syscalls.MNT_DETACH)
    except PermissionError as error:
        import subprocess

        command = [_fusermount_path(), "-u", "-z", "--", mountpoint]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            text = os.fsdecode(done.stderr).strip().replace("\n", "; ")
            raise PermissionError(error.errno, text or error.strerror, mountpoint) from error


def unmount_dead(path: str) -> None:
    """Take a stubfs off ``path`` whose process was killed, so that it could not do that itself; else nothing.

    StubfsError if it cannot be unmounted.
    """
    absolute = os.path.realpath(path)
    try:
        os.stat(absolute)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED) or (
            not any(mountpoint == absolute and fstype in _OURS for mountpoint, fstype in _mounts())
        ):
            return
        try:
            detach(absolute)
        except OSError as failure:
            raise StubfsError(
                f"cannot unmount {path}: {reason(failure)}", f"its process was killed: umount -l {path}",
                failure.errno or errno.EIO,
            ) from failure  # fmt: skip


# Without root starting is slower anyway: what only that needs is imported there.


def _fusermount_path() -> str:
    import shutil

    path = shutil.which("fusermount") or shutil.which("fusermount3")
    if path is None:
        raise MissingFeatureError(
            "cannot mount without root: fusermount: not found", "install it: apt install fuse; or become root"
        )
    return path


_ALWAYS = ("nosuid", "nodev")  # with fusermount, which would only complain of them


def _escaped(text: str) -> str:
    """As fusermount wants what may hold a comma."""
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _fusermount(mountpoint: str, options: MountOptions) -> int:
    """The device fd of a mount made by the setuid helper, which sends it over a socket (_FUSE_COMMFD)."""
    import array
    import socket
    import subprocess

    words = [f"fsname={_escaped(options.source)}", f"subtype={_escaped(options.subtype)}"]
    words += [name for name, flag in FLAGS.items() if options.attributes & flag and name not in _ALWAYS]
    words += [key if value is None else f"{key}={value}" for key, value in options.extra.items()]
    if options.allow_other:
        words.append("allow_other")
    ours, its = socket.socketpair()
    with ours, its:
        process = subprocess.Popen(
            [_fusermount_path(), "-o", ",".join(words), "--", mountpoint],
            pass_fds=[its.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(its.fileno())},
            stderr=subprocess.PIPE,
        )
        its.close()
        try:
            _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        finally:
            _, message = process.communicate()
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return int(array.array("i", content[:4])[0])
    text = os.fsdecode(message).strip().replace("\n", "; ") or f"fusermount ended with {process.returncode}"
    if text.endswith(os.strerror(errno.EPERM)):  # what mount(2) said
        raise MissingFeatureError(
            f"cannot mount on {mountpoint}: {text}",
            "fusermount must be setuid root, and neither a container nor no_new_privs may take that away: become root",
            errno.EPERM,
        )
    raise StubfsError(f"cannot mount on {mountpoint}: {text}", "become root, or mend what fusermount says", errno.EPERM)
