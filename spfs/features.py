"""What this machine can do, found out by trying it once, each with the reason and what to do if it cannot.

Used by the manager at its start, by ``spfs`` and by the tests' gating, so that all say the same. Nothing is decided by
version numbers. Probes are lazy, remembered, and leave nothing behind.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import Callable, Dict, List, Tuple

from spfs.errors import MissingFeatureError, reason
from spfs.linux import mountapi, mountinfo, openat2, probes

_CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h


@dataclass(frozen=True)
class Feature:
    """``reason`` and ``hint`` are empty for what is available."""

    name: str
    available: bool
    reason: str = ""
    hint: str = ""


def _root() -> None:
    if os.geteuid() != 0:
        raise OSError(errno.EPERM, f"running as user {os.geteuid()}, not as root")
    with open("/proc/self/status") as status:
        capabilities = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if not capabilities >> _CAP_SYS_ADMIN & 1:
        raise OSError(errno.EPERM, "root without CAP_SYS_ADMIN, as in an unprivileged container")


def _fuse() -> None:
    os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))


def _libfuse() -> None:
    name = os.environ.get("FUSE_LIBRARY_PATH", "libfuse.so.2")
    try:
        probes.load_library(name)
    except OSError as error:
        raise OSError(errno.ENOENT, f"cannot load {name}: {error}") from error


def _fusepy() -> None:
    # Found, not imported: its import loads libfuse, which is another feature.
    if importlib.util.find_spec("fuse") is None:
        raise OSError(errno.ENOENT, "there is no Python module fuse")


def _mount_api() -> None:
    fs_fd = mountapi.fsopen("tmpfs")
    try:
        mountapi.fsconfig(fs_fd, mountapi.FsConfig.CMD_CREATE)
        mount_fd = mountapi.fsmount(fs_fd)
    finally:
        os.close(fs_fd)
    try:
        os.close(mountapi.open_tree(mount_fd))
    finally:
        os.close(mount_fd)


def _mount_beneath() -> None:
    try:
        mountapi.move_mount(-1, -1, flags=mountapi.MoveMount.BENEATH)
    except OSError as error:
        # The kernel looks at the flags before it looks at the descriptors: EINVAL means an unknown flag.
        if error.errno != errno.EBADF:
            raise


def _ptrace() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            signal.pause()
        finally:
            os._exit(0)
    try:
        probes.seize(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _pidfd_getfd() -> None:
    # Another process' descriptor is what is wanted, but our own takes the same way, also past a seccomp filter.
    ends = os.pipe()
    pidfd = os.pidfd_open(os.getpid())
    try:
        os.close(probes.pidfd_getfd(pidfd, ends[0]))
    finally:
        for fd in (pidfd, *ends):
            os.close(fd)


def _kcmp() -> None:
    ends = os.pipe()
    try:
        if not probes.kcmp_files(ends[0], ends[0]) or probes.kcmp_files(*ends):
            raise OSError(errno.EPROTO, "kcmp gives wrong answers")
    finally:
        for fd in ends:
            os.close(fd)


def _openat2() -> None:
    os.close(openat2.openat2(mountapi.AT_FDCWD, "/", os.O_PATH, openat2.RESOLVE_IN_ROOT))


def _criu() -> None:
    from spfs.criu import command

    program = command.find()
    done = subprocess.run([program, "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(errno.ENOTSUP, f"criu check says: {said[-1] if said else done.returncode}")


def _pycriu() -> None:
    from spfs.criu.images import pycriu_images

    pycriu_images()


def _podman() -> None:
    if shutil.which("podman") is None:
        raise OSError(errno.ENOENT, "there is no podman")


def _runc() -> None:
    if shutil.which("runc") is None:
        raise OSError(errno.ENOENT, "there is no runc")


def _freezer(fstype: str, option: str, file: str) -> None:
    with open("/proc/self/mountinfo", "rb") as table:
        mounts = mountinfo.parse(table.read())
    found = [m for m in mounts if m.fstype == fstype and (not option or option in m.super_options.split(","))]
    if not found:
        raise OSError(errno.ENOENT, f"no {fstype} {option + ' ' if option else ''}hierarchy is mounted")
    # Only a cgroup beneath the root one can be frozen, so make one.
    directory = os.path.join(found[0].mountpoint, f"spfs-probe-{os.getpid()}")
    os.mkdir(directory)
    try:
        os.stat(os.path.join(directory, file))
    finally:
        os.rmdir(directory)


_PROBES: Dict[str, Tuple[Callable[[], None], str]] = {
    "root": (_root, "run it as root, in the initial user namespace"),
    "fuse": (_fuse, "load the module: modprobe fuse; in a container, pass the device /dev/fuse in"),
    "libfuse": (_libfuse, "install libfuse 2: apt-get install libfuse2, or set FUSE_LIBRARY_PATH"),
    "fusepy": (_fusepy, "pip install fusepy"),
    "mount_api": (_mount_api, "needs Linux 5.2 and root; a seccomp filter may forbid fsopen"),
    "mount_beneath": (_mount_beneath, "needs Linux 6.5; without it the mounts are switched while all is frozen"),
    "ptrace": (_ptrace, "needs CAP_SYS_PTRACE; see kernel.yama.ptrace_scope, and the container's seccomp filter"),
    "pidfd_getfd": (_pidfd_getfd, "needs Linux 5.6; a seccomp filter may forbid it"),
    "kcmp": (_kcmp, "needs a kernel with CONFIG_KCMP; a seccomp filter may forbid it"),
    "openat2": (_openat2, "needs Linux 5.6; a seccomp filter may forbid it"),
    "criu": (_criu, "apt-get install criu; one that is as new as the kernel"),
    "pycriu": (_pycriu, "apt-get install python3-pycriu (it comes with CRIU; PyPI has none)"),
    "runc": (_runc, "apt-get install runc"),
    "podman": (_podman, "apt-get install podman"),
    "freezer1": (lambda: _freezer("cgroup", "freezer", "freezer.state"), "mount the cgroup v1 freezer, or use v2"),
    "freezer2": (lambda: _freezer("cgroup2", "", "cgroup.freeze"), "mount cgroup2 (Linux 5.2), or use v1's freezer"),
}

NAMES: Tuple[str, ...] = tuple(_PROBES)


@functools.lru_cache(maxsize=None)
def probe(name: str) -> Feature:
    """The feature ``name`` (one of NAMES; KeyError otherwise), tried at the first call."""
    attempt, hint = _PROBES[name]
    try:
        attempt()
    except (OSError, MissingFeatureError) as error:
        return Feature(name, False, reason(error), hint)
    return Feature(name, True)


def require(*names: str) -> None:
    """MissingFeatureError for the first of ``names`` that this machine lacks."""
    for name in names:
        feature = probe(name)
        if not feature.available:
            raise MissingFeatureError(
                f"cannot go on: {name} is not available: {feature.reason}", feature.hint, errno.ENOSYS
            )


def warnings() -> List[str]:
    """Settings of this machine that harm a file system whose requests wait: one sentence each."""
    found = []
    timeout = _sysctl("fs/fuse/max_request_timeout")
    if timeout:
        found.append(
            f"fs.fuse.max_request_timeout is {timeout} s: the kernel ends a file system that holds a request"
            " for longer (set it to 0: sysctl fs.fuse.max_request_timeout=0)"
        )
    if _sysctl("kernel/hung_task_panic"):
        found.append(
            "kernel.hung_task_panic is on: a process that waits for a held request can panic the machine"
            " (sysctl kernel.hung_task_panic=0)"
        )
    return found


def _sysctl(name: str) -> int:
    """Its number; 0 where it does not exist or cannot be read."""
    try:
        with open(f"/proc/sys/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
