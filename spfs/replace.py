"""The replace step: the real mount made, the file system's requests let through to it, mounts and processes moved.

Here is only the order, and what undoes what; each step has a module of its own. Runs in a process by itself, the
only one that uses ptrace and setns.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

from spfs import mounts, realmount
from spfs.errors import SpfsError, reason
from spfs.freezer import Freezer, open_freezer
from spfs.instances import Instance
from spfs.linux import openat2, procfs, statx
from spfs.mountoptions import MountOptions
from spfs.mountswitch import PreparedSwitch, SwitchOutcome, prepare_switch
from spfs.processes import has_ended
from spfs.realmount import Attempt, Retry, RetryPolicy, not_yet
from spfs.references import MountRoot, Remains
from spfs.requests import Replace
from spfs.surgery.census import users_of
from spfs.switch import Refused, Switch, SwitchReport
from spfs.target import Target
from stubfs.carry import Carrying
from stubfs.client import FilesystemClient
from stubfs.errors import StubfsError

Progress = Callable[[str, Dict[str, object]], None]

CONTROL_TIMEOUT = 60.0  # seconds for the file system process to answer
PATH_TIMEOUT = 10.0  # seconds for the path to the mountpoint to be resolved
_UNREACHABLE = (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE)
_END_TIMEOUT = 1.0  # seconds
LAST_REFERENCE_TIMEOUT = 5.0  # seconds; RELEASE comes a moment after the last close
FREEZE_TIMEOUT = 2.0  # seconds for one attempt: as long do those wait that were frozen first
FREEZE_ATTEMPTS = 5  # a task that waits for the (slow) real file system cannot be frozen
LATECOMER_ROUNDS = 3  # a mount namespace cloned while the mounts were switched has the old ones
TRACER_POLL = 0.05  # seconds
DONE_BEFORE = "an earlier replace had done it, and was killed before it could say so: what it moved is not known"


@dataclass(frozen=True)
class MountedFilesystem:
    """A file system process and where its mount is. ``device`` is its st_dev; the target stays the caller's.

    ``source``: of its mounts, as mountinfo shows it, if that is unlike all others' ("": not known to be).
    """

    id: str
    control: str
    pid: int
    device: int
    mountpoint: str
    target: Target
    source: str = ""


def replace(
    request: Replace,
    filesystem: MountedFilesystem,
    progress: Progress,
    *,
    wait_for_tracers: bool = False,
    helper_directory: Optional[str] = None,
    network: Optional[Target] = None,
) -> Dict[str, object]:
    """Replace the file system's mount by the real one and move the processes; the report.

    ``wait_for_tracers``: begin when no process of the cgroup is traced any more, as a restorer does until it is done.
    ``helper_directory``: see ``realmount.make``. ``network``: in whose network namespace to mount it (None: the file
    system's own target); the caller's.

    SpfsError on failure. Up to the progress "proxy" nothing has then been changed: the file system still is in the
    mode it was in. After it the processes go on through the file system, and the replace can be asked for again.
    """
    protect = (filesystem.pid, os.getppid())
    with ExitStack() as stack:
        freezer = stack.enter_context(open_freezer(request.freeze_cgroup, protect))
        ended = _Ended(filesystem)
        stack.callback(ended.close)
        if wait_for_tracers:
            _wait_for_tracers(freezer, progress)
        target = filesystem.target if network is None else filesystem.target.in_network_of(network)
        real_fd = _real_mount(request, target, helper_directory, progress)
        stack.callback(os.close, real_fd)
        progress("mounted", {})
        try:
            with ended.explained(filesystem), FilesystemClient(filesystem.control, timeout=CONTROL_TIMEOUT) as client:
                step = _Step(request, filesystem, freezer, client, real_fd, protect, progress, ended)
                result = step.run()
                # Our last descriptors of the old mount are closed; what is left now is other processes'.
                left = result["left"] or result["mounts_left"]
                result["ended"] = ended.wait(0 if left else LAST_REFERENCE_TIMEOUT)
                if not result["ended"]:
                    step.note_open_files()
                return {**result, "notes": step.notes}
        except SpfsError:
            if ended.wait(0) and _was_done_before(filesystem, real_fd):
                return {"moved": {}, "left": [], "mounts_left": [], "ended": True, "notes": [DONE_BEFORE]}
            raise


def _was_done_before(filesystem: MountedFilesystem, real_fd: int) -> bool:
    """The file system has just ended: because an earlier replace, which was killed at its end, had moved everything?"""
    if _instances(filesystem):
        return False
    try:
        there = mounts.open_root(filesystem.target, filesystem.mountpoint, PATH_TIMEOUT)
    except OSError:
        return False
    try:
        return _is_same(there, real_fd) and not users_of(filesystem.device)
    finally:
        os.close(there)


class _Step:
    """From the real mount to the report; what one step made and the next one needs."""

    def __init__(
        self,
        request: Replace,
        filesystem: MountedFilesystem,
        freezer: Freezer,
        client: FilesystemClient,
        real_fd: int,
        protect: Tuple[int, ...],
        progress: Progress,
        ended: "_Ended",
    ) -> None:
        self._request = request
        self._filesystem = filesystem
        self._freezer = freezer
        self._client = client
        self._real_fd = real_fd
        self._root_fd = real_fd  # of what is left where no mount of the old file system is any more
        self._protect = protect
        self._progress = progress
        self._ended = ended
        self._proxied = False
        self._former_mode = ""
        self._bare = False  # nothing is mounted on the path
        self._late: Set[int] = set()  # old mounts whose new root was known only after the switch
        self.notes: List[str] = []
        self._carried: List[str] = []

    def run(self) -> Dict[str, object]:
        moved, mounted, left = self._moved()
        self._progress("verified", {"mounts": len(mounted.switched), "left": len(left)})
        for path in self._request.remove:
            self._remove(path, bool(moved.left or left))
        return {
            **moved.data(),
            "carried": self._carried,
            "mounts": len(mounted.switched),
            "mounts_left": [{"mount": one.describe(), "reason": why} for one, why in left],
        }

    def _remove(self, path: str, needed: bool) -> None:
        if needed:
            self.notes.append(f"{path}: not removed: not all references to the stand-in could be moved")
            return
        parent, name = os.path.split(path)
        try:
            beneath = openat2.RESOLVE_BENEATH | openat2.RESOLVE_NO_SYMLINKS
            directory = openat2.openat2(self._real_fd, parent or ".", os.O_PATH | os.O_DIRECTORY, beneath)
            try:
                os.unlink(name, dir_fd=directory)
            finally:
                os.close(directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.notes.append(f"{path}: not removed: {reason(error)}")

    def note_open_files(self) -> None:
        """What the file system still has open, also for those whom /proc does not show (in flight, io_uring …)."""
        try:
            for handle in self._client.handles():
                path = "a file without a name" if handle.path is None else handle.path or "the root directory"
                self.notes.append(f"{path}: still open in the file system (opened by process {handle.pid})")
        except (StubfsError, OSError):
            pass  # it has ended after all

    def _moved(self) -> Tuple[SwitchReport, SwitchOutcome, List[Tuple[Instance, str]]]:
        found = _instances(self._filesystem)
        self._note_missing_bindmounts(found)
        with ExitStack() as stack:
            if not found:
                self._look_at_the_path(stack)
            prepared = stack.enter_context(
                prepare_switch(found, self._real_fd, [self._filesystem.target])
            )
            if self._request.missing == "carry":
                self._carry(stack)
            outcomes: List[SwitchOutcome] = []

            def when_stopped() -> None:
                try:
                    outcomes.append(prepared.commit())
                except SpfsError:
                    prepared.undo()
                    raise
                copied = (number for number, how in outcomes[0].switched.items() if how == "propagated")
                self._late.update(copied)

            for attempt in range(1, FREEZE_ATTEMPTS + 1):
                with self._switch(prepared) as switch:
                    preparation = switch.prepare()
                    self._progress(
                        "prepared",
                        {"processes": len(preparation.processes), "references": dict(preparation.references)},
                    )
                    self._let_through(prepared)
                    try:
                        report = switch.execute(when_stopped)
                        break
                    except Refused:
                        self._hold_again()
                        raise
                    except SpfsError as error:
                        # The freezer's time limit: a task was inside a request to the real file system.
                        if error.errno != errno.ETIMEDOUT or outcomes or attempt == FREEZE_ATTEMPTS:
                            raise
                        self._progress("frozen", {"attempt": attempt, "error": error.message})
            self._ended.expected = True
            if prepared.mountpoints and (report.left or outcomes[0].left):
                self._uncover()
            known = {"blackout": report.blackout, "blackout_began": report.began, "moved": dict(report.moved)}
            self._progress("switched", known)
            prepared.verify()
            # Still within: what is prepared keeps the old file system, and nobody else's gets its device number. If
            # nothing was mounted, no namespace can have been cloned with it.
            left = self._mounts_of_latecomers(outcomes[0]) if found else []
            return report, outcomes[0], left

    def _carry(self, stack: ExitStack) -> None:
        """Before counterparts are opened: those of what is carried must be there. Undone if we fail before "proxy"."""
        status = self._client.status()
        if not status.staged:
            return  # an earlier attempt has done it
        if status.mode == "restore":
            self._client.mode("stub")  # nothing more comes to it, and what is dirty has been written
            stack.callback(self._restore_again)
        staging = self._client.staging()
        try:
            carrying = Carrying(staging, self._root_fd)
            carrying.run()
        except OSError as error:
            raise SpfsError(
                f"cannot carry {error.filename} of restore mode to {self._request.source}: {reason(error)}",
                "nothing has changed there; leave what is missing, or mend it",
                error.errno or errno.EIO,
            ) from error
        finally:
            os.close(staging)
        stack.callback(self._put_back, carrying)
        self._carried = [os.fsdecode(path) for path in carrying.carried]
        self._progress("carried", {"files": len(self._carried)})

    def _put_back(self, carrying: Carrying) -> None:
        if not self._proxied:
            carrying.undo()

    def _restore_again(self) -> None:
        if not self._proxied:
            try:
                self._client.mode("restore")
            except StubfsError as error:  # what ended the replace is what is to be told
                self._progress("stub", {"error": error.message})

    def _look_at_the_path(self, stack: ExitStack) -> None:
        """For a file system that is on no path any more: what is on its path?"""
        filesystem = self._filesystem
        try:
            there = mounts.open_root(filesystem.target, filesystem.mountpoint, PATH_TIMEOUT)
        except OSError as error:
            self.notes.append(f"{filesystem.mountpoint}: nothing can be mounted there: {reason(error)}")
            return
        stack.callback(os.close, there)
        if _is_same(there, self._real_fd):
            # An earlier replace has put it there. What was left then must come to that mount: on another one of the
            # same file system its paths would be unreachable.
            self._root_fd = there
        elif statx.is_mount_root(there):
            self.notes.append(f"{filesystem.mountpoint}: something else is mounted there, and stays")
        else:
            # In proxy mode an earlier replace has been here, and was killed just then (see ``mountworker._exchange``);
            # else somebody has unmounted it, and wants nothing to be there.
            self._bare = self._client.status().mode == "proxy"

    def _switch(self, prepared: PreparedSwitch) -> Switch:
        # References on a mount that was unmounted lazily are on none of the mounts found: any root will do for them.
        default = MountRoot(self._root_fd)
        return Switch(
            self._filesystem.device,
            _Names(self._client),
            lambda mount_id: prepared.roots.get(mount_id, default),
            self._freezer,
            strict=self._request.strict,
            exclude={*self._protect, *prepared.helpers},
            late=self._late,
            freeze_timeout=FREEZE_TIMEOUT,
        )

    def _let_through(self, prepared: PreparedSwitch) -> None:
        """From here on requests go to the real file system; those that were held first of all."""
        if not self._proxied:
            self._former_mode = self._client.status().mode
            # Also if it was proxy before, to what an earlier replace or somebody else had named.
            self._client.mode("proxy", self._root_fd)
            self._proxied = True
            self._progress("proxy", {})
        if self._bare:
            mounts.attach(self._real_fd, self._filesystem.target, self._filesystem.mountpoint)
            self._bare = False
            self.notes.append(f"{self._filesystem.mountpoint}: nothing was mounted there any more; now it is")
        prepared.prepare_nested()
        if prepared.mountpoints:
            self._client.cover(prepared.mountpoints, self._filesystem.device)

    def _uncover(self) -> None:
        """For those that stay on the file system: they are on no way from which they could start anew."""
        try:
            self._client.cover((), self._filesystem.device)
        except StubfsError:  # it has ended
            pass

    def _hold_again(self) -> None:
        """Back to the mode in which nothing gets through, if that is where we came from."""
        if self._former_mode == "stub":
            self._client.mode("stub")
            self._progress("refused", {"mode": "stub"})

    def _mounts_of_latecomers(self, outcome: SwitchOutcome) -> List[Tuple[Instance, str]]:
        """Mounts of namespaces that were cloned meanwhile. Their processes have been moved by the rounds of Switch."""
        left = list(outcome.left)
        known = {one.mount_id for one, _ in left}
        for _ in range(LATECOMER_ROUNDS):
            found = _instances(self._filesystem)
            late = [one for one in found if one.mount_id not in known]
            if not late:
                break
            with prepare_switch(late, self._real_fd, [self._filesystem.target]) as prepared:
                more = prepared.commit()
                prepared.verify()
            left += more.left
            known |= {one.mount_id for one, _ in more.left}
        return left

    def _note_missing_bindmounts(self, found: Iterable[Instance]) -> None:
        there = {os.path.normpath(one.mountpoint) for one in found}
        for path in self._request.bindmounts:
            if not any(place == path or place.endswith("/" + path.strip("/")) for place in there):
                self.notes.append(f"bind mount {path}: the file system is not mounted there")


def _is_same(first: int, second: int) -> bool:
    """Are the two descriptors of the same directory?"""
    one, other = (statx.examine("", fd, statx.AT_EMPTY_PATH) for fd in (first, second))
    return (one.device, one.inode) == (other.device, other.inode)


class _Names:
    """The file system process knows what its inode numbers stand for."""

    def __init__(self, client: FilesystemClient) -> None:
        self._client = client

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        return self._client.nodes(nodes)

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        found = self._client.remains(nodes)
        return {node: Remains(fd, on_target=not in_staging) for node, (fd, in_staging) in found.items()}


def _instances(filesystem: MountedFilesystem) -> List[Instance]:
    """Where it is mounted, as far as its target's processes tell."""
    return mounts.instances(filesystem.device, [filesystem.target], filesystem.source or None)


class _Ended:
    """Whether the file system process has ended, by a pidfd taken when it is known to be the right one."""

    def __init__(self, filesystem: MountedFilesystem) -> None:
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(filesystem.pid)
        except ProcessLookupError as error:
            # Nowhere mounted any more, it may have ended as it should: then it is seen whether all was done before.
            if _instances(filesystem):
                raise _dead(filesystem) from error
        self.expected = False  # once nothing refers to the file system any more, its process ends as it should

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)

    def wait(self, timeout: float) -> bool:
        return self._pidfd < 0 or has_ended(self._pidfd, timeout)

    @contextmanager
    def explained(self, filesystem: MountedFilesystem) -> Iterator[None]:
        """What fails because the process has ended is said to fail because of that."""
        try:
            yield
        except (StubfsError, OSError) as error:
            # One that ends takes its socket away before, and its threads take a moment.
            if not self.expected and self.wait(_END_TIMEOUT if error.errno in _UNREACHABLE else 0):
                raise _dead(filesystem) from error
            raise


def _dead(filesystem: MountedFilesystem) -> SpfsError:
    return SpfsError(
        f"cannot replace mount {filesystem.id!r} on {filesystem.mountpoint}: its file system process"
        f" {filesystem.pid} has ended",
        "its users get ENOTCONN; unmount it, and see its log",
        errno.ENOTCONN,
    )


def _wait_for_tracers(freezer: Freezer, progress: Progress) -> None:
    """Until no process of the cgroup is traced: who restores them still has them."""
    told = None
    while True:
        traced = {pid: by for pid in freezer.pids() for by in [_tracer(pid)] if by}
        if not traced:
            return
        if traced != told:
            progress("mounting", {"waiting": f"process {min(traced)} is traced by {traced[min(traced)]}"})
            told = traced
        time.sleep(TRACER_POLL)  # the kernel tells nobody when a tracer lets go


def _tracer(pid: int) -> int:
    """Its tracer's pid; 0 if it is not traced, or has ended."""
    try:
        return procfs.parse_status(procfs.read(f"/proc/{pid}/status")).tracer
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _real_mount(request: Replace, target: Target, helper_directory: Optional[str], progress: Progress) -> int:
    """The detached real mount's fd, the caller's; tried until it is there."""

    def report(failed: Attempt) -> None:
        details: Dict[str, object] = {"attempt": failed.number, "errno": failed.errno, "error": failed.error}
        progress("mounting", {**details, "next": failed.next})

    def attempt(timeout: Optional[float]) -> int:
        return realmount.make(
            request.source,
            request.type,
            request.flags,
            request.options,
            target,
            timeout,
            helper_directory=helper_directory,
        )

    # A directory that is to be bound there can be late, too: it is not there yet, as a server that does not answer yet.
    bind = MountOptions.parse(request.flags, request.options).bind
    policy = RetryPolicy(not_yet=frozenset([errno.ENOENT]) if bind else not_yet(request.type))
    what = f"{request.source} ({request.type})"
    real_fd = Retry(policy, timeout=request.timeout, report=report).run(attempt, what)
    if not stat.S_ISDIR(os.fstat(real_fd).st_mode):
        os.close(real_fd)
        raise SpfsError(
            f"cannot mount {what}: its root is not a directory",
            "a single file cannot take the place of a mount",
            errno.ENOTDIR,
        )
    return real_fd
