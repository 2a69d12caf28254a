"""What the manager's jobs do with one file system: start and attach it, pin again, take it away. Runs inside a job.

Everything here may block. On any failure all that was done is undone; what succeeds outlives the job.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

from spfs import fsprocess, requests
from spfs.errors import SpfsError, reason
from spfs.jobs import Context
from spfs.processes import has_ended, is_frozen, open_process, start_time
from spfs.registry import Managed
from spfs.target import Target
from spfs.targetpacket import pack_target
from stubfs.errors import StubfsError
from stubfs.fusemount import fuse_mount
from stubfs.options import parse_options

# Imported where they are used: spfs.mounts, spfs.nschild, spfs.freezer, stubfs.client. A first mount is waited for by
# somebody, and what is imported here comes before the file system process is started, the rest while that starts.

LAST_USE_TIMEOUT = 0.5  # seconds for one to notice that nobody uses its mount any more, after which somebody does


@dataclass(frozen=True)
class Settings:
    """What else than the request the mount job needs to know. ``log``: file that the process's log and error output go
    to; ``record``: the one into which it writes who waited."""

    control: str
    log: str
    record: Optional[str] = None
    log_options: Tuple[str, ...] = ()


def mount(context: Context, request: requests.Mount, settings: Settings) -> None:
    """Make the mount, start the process that serves it, attach it in the target. Delivers pid, start_time, device,
    source, identity and the pinned target (``pack_target``)."""
    with ExitStack() as undo:
        target = Target.pin(request.ns_pid, request.ns_list, request.root)
        undo.callback(target.close)
        source = _unique_source(request.id)
        options = parse_options(request.options)
        device_fd, mount_fd = fuse_mount(options.subtype, source, options.attributes, extra=options.extra)
        undo.callback(os.close, mount_fd)
        try:
            pid, ready = _start(request, settings, device_fd)
        finally:
            os.close(device_fd)
        try:
            pidfd = os.pidfd_open(pid)
            undo.callback(os.close, pidfd)
            undo.callback(fsprocess.end, pid, pidfd)
            from spfs import mounts

            fsprocess.wait_ready(request.id, ready, settings.log)
        finally:
            os.close(ready)
        device = os.fstat(mount_fd).st_dev
        started = start_time(pid)
        made = {"pid": pid, "start_time": started, "device": device, "source": source}
        context.progress("started", {**made, "identity": target.identity()})
        undo.callback(_detach, device, source, target)  # before: a cancel may come when it has just been attached
        mounts.attach(mount_fd, target, request.mountpoint)
        packed, fds = pack_target(target)
        context.deliver({**made, "target": packed}, fds)
        undo.pop_all()  # the rest is closed by the end of this process


def _unique_source(id: str) -> str:
    """The mount's name in mountinfo: a device number may be another mount's by the time that it is looked for."""
    # fsconfig(2) takes at most 255 bytes; cut anywhere, what is left of a character is shown as it is.
    return os.fsdecode(b"spfs:%b:%b" % (os.fsencode(id)[:200], secrets.token_hex(4).encode()))


def _start(request: requests.Mount, settings: Settings, device_fd: int) -> Tuple[int, int]:
    """Start the process that serves the open device; its pid, and the pipe on which it tells that it is ready."""
    arguments = [f"/dev/fd/{device_fd}", "-f", "--mode", request.mode, "--socket-path", settings.control]
    if settings.record is not None:
        arguments += ["--record", settings.record]
    if request.proxy_dir is not None:
        arguments += ["--proxy-dir", request.proxy_dir]
    if request.options:
        arguments += ["-o", request.options]
    return fsprocess.start([*arguments, *settings.log_options], device_fd, settings.log)


def _detach(device: int, source: str, target: Target) -> List[Dict[str, object]]:
    """Take the mount away wherever that can be done; the places where it cannot.

    A container that was started meanwhile has a copy of it, locked by its user namespace, which only goes with the
    container (mount_namespaces(7)). SpfsError if it is still there in the target's own namespace.
    """
    from spfs import mounts

    left = mounts.unmount(device, [target], source=source or None)
    own = [instance for instance in left if instance.namespace == target.mount_namespace]
    if own:
        raise SpfsError(
            f"cannot unmount: {', '.join(instance.mountpoint for instance in own)}: still there",
            "locked in its mount namespace, or hidden below another mount",
            errno.EBUSY,
        )
    return [{"mountpoint": instance.mountpoint, "namespace": instance.namespace} for instance in left]


def open_directory(context: Context, path: str, ns_pid: Optional[int]) -> None:
    """Deliver a descriptor of the directory ``path``, as process ``ns_pid`` sees it."""
    from spfs import nschild

    with Target.pin(ns_pid, ["mnt"] if ns_pid is not None else None) as target:

        def open_there() -> Tuple[None, List[int]]:
            return None, [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]

        try:
            with nschild.run(open_there, target, join=("mnt",)) as result:
                context.deliver({}, [result.steal(0)])
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise SpfsError(
                f"cannot use the proxy directory: {path}: {reason(error)}",
                f"it is looked up in the mount namespace of {target.describe()}",
                error.errno or errno.EIO,
            ) from error


def unmount(context: Context, managed: Managed, force: bool, target: Target) -> None:
    """Take every instance of the mount away, in all namespaces. Delivers ``ended``: has its process ended, too? and
    ``left``: copies in other namespaces that cannot be taken away.

    Without ``force`` EBUSY if somebody uses it. With ``force`` those who wait get an error, and the process ends.
    """
    try:
        pidfd = open_process(managed.pid, managed.start_time)
    except ProcessLookupError:
        pidfd = -1
    if pidfd >= 0 and not force:
        try:
            _check_unused(managed)
        except StubfsError as error:
            dying = error.errno in (errno.ECONNREFUSED, errno.ECONNRESET)  # killed just now: nobody uses it
            if not dying or not has_ended(pidfd, LAST_USE_TIMEOUT):
                raise
    left = _detach(managed.device, managed.source, target)
    if pidfd < 0:
        return context.deliver({"ended": True, "left": left})
    if force:
        fsprocess.end(managed.pid, pidfd)
    context.deliver({"ended": has_ended(pidfd, LAST_USE_TIMEOUT), "left": left})


def _check_unused(managed: Managed) -> None:
    from stubfs.client import FilesystemClient

    with FilesystemClient(managed.control, timeout=fsprocess.END_TIMEOUT) as filesystem:
        status = filesystem.status()
    if status.held or status.handles:
        raise SpfsError(
            f"cannot unmount {managed.id!r} on {managed.mountpoint}: it is in use: {status.handles} open files, "
            f"{status.held} held requests",
            "force it: those who wait get an error",
            errno.EBUSY,
        )


def look_after_end(context: Context, managed: Managed, target: Target) -> None:
    """For when its process has ended. Delivers ``instances``: in how many places the mount still is, and ``by_real``:
    is there now, in its place, what it was to be replaced by?"""
    from spfs import mounts

    found = len(mounts.instances(managed.device, [target], managed.source or None))
    wanted = managed.replacement
    by_real = False
    if not found and wanted is not None:
        try:
            by_real = _is_on_path(managed.mountpoint, wanted.request, target)
        except OSError:
            pass  # who was to be replaced is gone, and so is the place
    context.deliver({"instances": found, "by_real": by_real})


def _is_on_path(path: str, wanted: requests.Replace, target: Target) -> bool:
    from spfs import mounts
    from spfs.linux import statx
    from spfs.mountoptions import MountOptions

    with ExitStack() as stack:
        fd = mounts.open_root(target, path, fsprocess.END_TIMEOUT)
        stack.callback(os.close, fd)
        there = statx.examine("", fd, statx.AT_EMPTY_PATH)
        if not statx.is_mount_root(fd):
            return False
        if MountOptions.parse(wanted.flags, wanted.options).bind:
            source_fd = mounts.open_root(target, wanted.source, fsprocess.END_TIMEOUT)
            stack.callback(os.close, source_fd)
            source = statx.examine("", source_fd, statx.AT_EMPTY_PATH)
            return (there.device, there.inode) == (source.device, source.inode)
        here = {one.mount_id: one.mount for one in mounts.instances(there.device, [target])}
        mount = here.get(there.mount_id)
        return mount is not None and (mount.fstype, mount.source) == (wanted.type, wanted.source)


def take_over(
    context: Context, identity: Dict[str, int], root: Optional[str], control: str, freeze_cgroup: Optional[str]
) -> None:
    """After a restart of the manager: let go what a killed replace left, pin again, ask for the mode.

    Delivers ``target`` (None if nobody is left in its namespaces) and ``mode``.
    """
    from stubfs.client import FilesystemClient

    thaw(freeze_cgroup)
    with FilesystemClient(control, timeout=fsprocess.END_TIMEOUT) as filesystem:
        mode = str(filesystem.status().mode)
    try:
        target = Target.from_inodes(identity, root)
    except SpfsError as error:
        if error.errno != errno.ESRCH:
            raise
        return context.deliver({"mode": mode, "target": None})
    packed, fds = pack_target(target)
    context.deliver({"mode": mode, "target": packed}, fds)


def thaw(cgroup: Optional[str]) -> None:
    """Thaw what a replace that was killed had frozen; nothing for None, nor for one that is gone."""
    if is_frozen(cgroup):
        from spfs import freezer

        freezer.open_freezer(cgroup).thaw()
