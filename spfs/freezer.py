"""Freezing a cgroup's processes: none, v1 (freezer.state) and v2 (cgroup.freeze) behind one protocol.

Every freeze is bounded: a task that waits for a FUSE request (or in a vfork, or in D state) cannot be frozen, then v1
stays FREEZING and v2 at ``frozen 0`` for ever. Whatever fails, the cgroup is given back as it was found.
"""

from __future__ import annotations

import errno
import os
import select
import time
from contextlib import contextmanager
from types import TracebackType
from typing import Collection, Iterator, List, Optional, Protocol, Set, Type

from spfs.errors import SpfsError, reason
from spfs.linux import mountinfo

TIMEOUT = 5.0  # seconds
_POLL = 0.001  # seconds


class Freezer(Protocol):
    """Used as a context manager it gives the cgroup back as it was before: thawed, or frozen if it was frozen."""

    path: Optional[str]

    def remember(self) -> None:
        """Take note of what the cgroup is now, for ``restore``; ``freeze`` does so by itself."""

    def freeze(self, timeout: float = TIMEOUT) -> None:
        """All tasks frozen when it returns. SpfsError ETIMEDOUT, the cgroup as it was, if that takes longer."""

    def thaw(self) -> None:
        """Let the tasks run, also those of a cgroup that somebody else had frozen before (see ``restore``)."""

    def restore(self) -> None:
        """As it was before the first ``freeze`` or ``remember``; nothing without one. May be repeated."""

    def pids(self) -> List[int]:
        """The processes (thread group leaders) in the cgroup and in all beneath it."""

    def __enter__(self) -> "Freezer": ...

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None: ...


class NoFreezer:
    """Without a cgroup nothing is frozen: the processes are found by what they hold, and stopped one by one."""

    path: Optional[str] = None

    def remember(self) -> None:
        pass

    def freeze(self, timeout: float = TIMEOUT) -> None:
        pass

    def thaw(self) -> None:
        pass

    def restore(self) -> None:
        pass

    def pids(self) -> List[int]:
        return []

    def __enter__(self) -> "NoFreezer":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        pass


class _CgroupFreezer:
    """What v1 and v2 share. ``_was_frozen``: None until the first freeze; ``_changed``: by us, and not given back."""

    _state_file = ""

    def __init__(self, path: str) -> None:
        self.path: Optional[str] = path
        self._directory = path
        self._was_frozen: Optional[bool] = None
        self._changed = False

    def remember(self) -> None:
        if self._was_frozen is None:
            try:
                self._was_frozen = self._asked_to_freeze()
            except OSError as error:
                raise self._failed("look at", error) from error

    def freeze(self, timeout: float = TIMEOUT) -> None:
        try:
            if self._ancestor_frozen():
                raise SpfsError(
                    f"cannot freeze cgroup: {self.path}: a cgroup above it is frozen, so it could not be thawed",
                    "thaw that one first",
                    errno.EBUSY,
                )
            self.remember()
            self._write(True)
            if self._wait(True, timeout):
                return
            blockers = _unfrozen(self.pids())
        except BaseException as error:
            self.restore()
            if isinstance(error, OSError):
                raise self._failed("freeze", error) from error
            raise
        self.restore()
        raise SpfsError(
            f"cannot freeze cgroup: {self.path}: not frozen in {timeout:g} s{blockers}",
            "a task that waits for a file system request cannot be frozen; the cgroup is as it was before",
            errno.ETIMEDOUT,
        )

    def thaw(self) -> None:
        try:
            self._write(False)
            thawed = self._wait(False, TIMEOUT)
        except OSError as error:
            raise self._failed("thaw", error) from error
        if not thawed:
            raise SpfsError(
                f"cannot thaw cgroup: {self.path}: still frozen after {TIMEOUT:g} s",
                "is a cgroup above it frozen?",
                errno.ETIMEDOUT,
            )

    def restore(self) -> None:
        if self._was_frozen is None:
            return
        try:
            self._write(self._was_frozen)
        except FileNotFoundError:  # removed, so nobody is in it
            pass
        except OSError as error:
            raise self._failed("give back", error) from error
        self._changed = False

    def pids(self) -> List[int]:
        found: Set[int] = set()
        for directory, _, _ in os.walk(self._directory):
            found.update(_members(directory))
        found.discard(0)  # of a pid namespace that is not ours
        return sorted(found)

    def _failed(self, what: str, error: OSError) -> SpfsError:
        hint = "it was removed" if error.errno in (errno.ENOENT, errno.ENODEV) else "needs root"
        return SpfsError(f"cannot {what} cgroup: {self.path}: {reason(error)}", hint, error.errno or errno.EIO)

    def _file(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _read(self, name: str, directory: Optional[str] = None) -> str:
        with open(os.path.join(directory or self._directory, name)) as file:
            return file.read().strip()

    def _write(self, frozen: bool) -> None:
        self._changed = True
        fd = os.open(self._file(self._state_file), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, self._word(frozen))
        finally:
            os.close(fd)

    def _word(self, frozen: bool) -> bytes:
        raise NotImplementedError

    def _asked_to_freeze(self) -> bool:
        raise NotImplementedError

    def _ancestor_frozen(self) -> bool:
        raise NotImplementedError

    def _wait(self, frozen: bool, timeout: float) -> bool:
        raise NotImplementedError

    def __enter__(self) -> "_CgroupFreezer":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._changed:  # else it may be somebody else's by now
            self.restore()


class FreezerV1(_CgroupFreezer):
    """Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst. The state is brought up to date by reading it."""

    _state_file = "freezer.state"

    def _word(self, frozen: bool) -> bytes:
        return b"FROZEN" if frozen else b"THAWED"

    def _asked_to_freeze(self) -> bool:
        return self._read("freezer.self_freezing") == "1"

    def _ancestor_frozen(self) -> bool:
        return self._read("freezer.parent_freezing") == "1"

    def _wait(self, frozen: bool, timeout: float) -> bool:
        wanted = "FROZEN" if frozen else "THAWED"
        deadline = time.monotonic() + timeout
        # v1 has no notification: its files cannot be polled.
        while self._read("freezer.state") != wanted:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL)
        return True


class FreezerV2(_CgroupFreezer):
    """Documentation/admin-guide/cgroup-v2.rst: cgroup.freeze asks, cgroup.events tells and notifies by POLLPRI."""

    _state_file = "cgroup.freeze"

    def _word(self, frozen: bool) -> bytes:
        return b"1" if frozen else b"0"

    def _asked_to_freeze(self) -> bool:
        return self._read("cgroup.freeze") == "1"

    def _ancestor_frozen(self) -> bool:
        directory = os.path.dirname(self._directory)
        while os.path.exists(os.path.join(directory, "cgroup.freeze")):  # the root cgroup has none
            if self._read("cgroup.freeze", directory) == "1":
                return True
            directory = os.path.dirname(directory)
        return False

    def _wait(self, frozen: bool, timeout: float) -> bool:
        wanted = f"frozen {int(frozen)}"
        deadline = time.monotonic() + timeout
        fd = os.open(self._file("cgroup.events"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            # Reading re-arms the notification, so nothing is lost between the read and the poll.
            while wanted not in os.pread(fd, 4096, 0).decode().splitlines():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
        finally:
            os.close(fd)
        return True


def open_freezer(path: Optional[str], protect: Collection[int] = ()) -> Freezer:
    """The freezer for the cgroup at ``path``; none for None, "", "(null)" and ".../(null)", as C callers send them.

    SpfsError, nothing changed, if it is missing, not a cgroup that can be frozen, or if this process or one of
    ``protect`` is in it or beneath it: freezing those would stop who is to thaw it.
    """
    if path is None or path.rstrip("/").rpartition("/")[2] in ("", "(null)"):
        return NoFreezer()
    directory = os.path.realpath(path)
    try:
        device = os.stat(directory).st_dev
    except OSError as error:
        raise SpfsError(
            f"cannot use freezer cgroup: {path}: {reason(error)}", "make it first", error.errno or errno.EIO
        ) from error
    freezer = _freezer_at(directory, device)
    if freezer is None:
        raise SpfsError(
            f"cannot use freezer cgroup: {path}: not a cgroup that can be frozen",
            "give a directory beneath a cgroup v1 freezer hierarchy or in cgroup v2, not the root cgroup",
            errno.EINVAL,
        )
    inside = sorted({os.getpid(), *protect}.intersection(freezer.pids()))
    if inside:
        raise SpfsError(
            f"cannot use freezer cgroup: {path}: process {inside[0]}, which is needed to thaw it, is in it",
            "start the manager in a cgroup outside of it",
            errno.EBUSY,
        )
    return freezer


def _freezer_at(directory: str, device: int) -> Optional[_CgroupFreezer]:
    # By the file system, not only by the names of the files: any directory can hold those.
    with open("/proc/self/mountinfo", "rb") as file:
        fstypes = {mount.fstype for mount in mountinfo.parse(file.read()) if mount.st_dev == device}
    if "cgroup" in fstypes and os.path.exists(os.path.join(directory, "freezer.state")):
        return FreezerV1(directory)
    if "cgroup2" in fstypes and os.path.exists(os.path.join(directory, "cgroup.freeze")):
        return FreezerV2(directory)
    return None


def is_there(path: str) -> bool:
    """Is there a cgroup at ``path``? Nothing else is touched, for a path may be on a file system that hangs: False for
    one that leads to a cgroup by a symbolic link from elsewhere, too."""
    path = os.path.normpath(path)
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = mountinfo.parse(file.read())
    around = [mount for mount in mounts if path.startswith(mount.mountpoint.rstrip("/") + "/")]
    if not around:
        return False
    mountpoint = max((mount.mountpoint for mount in around), key=len)
    on_top = mountinfo.MountTable(around).top_at(mountpoint)
    return on_top is not None and on_top.fstype in ("cgroup", "cgroup2") and os.path.isdir(path)


def _members(directory: str) -> Iterator[int]:
    try:
        with open(os.path.join(directory, "cgroup.procs")) as file:
            yield from map(int, file.read().split())
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # a threaded cgroup: its processes are listed by the domain above it
            yield from _threaded_members(directory)
        elif error.errno not in (errno.ENOENT, errno.ENODEV):  # removed meanwhile
            raise


def _threaded_members(directory: str) -> Iterator[int]:
    with open(os.path.join(directory, "cgroup.threads")) as file:
        threads = file.read().split()
    for thread in threads:
        try:
            with open(f"/proc/{thread}/status") as status:
                yield next(int(line.split()[1]) for line in status if line.startswith("Tgid:"))
        except (OSError, StopIteration):  # ended
            continue


def _unfrozen(pids: List[int]) -> str:
    """Which tasks do not sleep in the freezer, for a message; best effort, wchan may be hidden."""
    blockers = []
    for pid in pids:
        with _ignore_ended():
            for thread in os.listdir(f"/proc/{pid}/task"):
                with _ignore_ended(), open(f"/proc/{pid}/task/{thread}/wchan") as file:
                    where = file.read()
                if where not in ("__refrigerator", "do_freezer_trap", "get_signal"):
                    blockers.append(f"{thread} in {where if where not in ('', '0') else 'the kernel or running'}")
    more = f" and {len(blockers) - 4} more" if len(blockers) > 4 else ""
    return f": {', '.join(blockers[:4])}{more}" if blockers else ""


@contextmanager
def _ignore_ended() -> Iterator[None]:
    try:
        yield
    except OSError:
        pass
