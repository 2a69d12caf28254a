"""The managed mounts, the states that they and their replaces are in, and what may follow what; no I/O.

A mount: STARTING → MOUNTED → UNMOUNTING → (gone), or FAILED when its process died and left a dead mount behind.
A replace: HELD or WAITING → RUNNING → DONE, FAILED or ABORTED; from the last three it can be asked for again.
"""

from __future__ import annotations

import dataclasses
import errno
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

from spfs import requests
from spfs.errors import SpfsError

MAX_ATTEMPTS = 20  # attempts of the real mount that are remembered, the latest ones
MAX_FINISHED = 50  # records of mounts that are gone, kept for status and wait


class State(str, Enum):
    STARTING = "starting"
    MOUNTED = "mounted"
    UNMOUNTING = "unmounting"
    FAILED = "failed"
    GONE = "gone"


class Phase(str, Enum):
    HELD = "held"  # the client will say when
    WAITING = "waiting"  # begins when the mount leaves restore mode
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


PENDING = (Phase.HELD, Phase.WAITING)
ENDED = (Phase.DONE, Phase.FAILED, Phase.ABORTED)


@dataclass
class Replacement:
    """A replace that was asked for, and how far it is. Times: seconds since the epoch."""

    request: requests.Replace
    phase: Phase
    stage: str = ""
    since: float = 0.0
    attempts: int = 0
    last_attempts: List[Dict[str, Any]] = field(default_factory=list)
    stages: List[Dict[str, Any]] = field(default_factory=list)
    report: Optional[Dict[str, Any]] = None
    error: Optional[Dict[str, Any]] = None
    job: Optional[Dict[str, int]] = None  # pid and start time of the process that does it
    released: bool = False
    network: Dict[str, int] = field(default_factory=dict)  # identity of the target of ``net_pid``, see Target
    cgroup_seen: bool = False  # was the cgroup there when it was asked for?


@dataclass
class Managed:
    """One mount. ``mountpoint`` is the one by which processes will know it, ``attached_at`` where it was attached."""

    number: int
    id: str
    mountpoint: str
    attached_at: str
    mode: str
    since: float
    state: State = State.STARTING
    root: Optional[str] = None
    pid: int = 0
    start_time: int = 0
    device: int = 0
    source: str = ""  # as mountinfo shows it, unlike all others'
    control: str = ""
    identity: Dict[str, int] = field(default_factory=dict)
    replacement: Optional[Replacement] = None
    end: str = ""  # how it ended, once it is GONE or FAILED
    record: str = ""  # path of the file that says what became of it

    @property
    def name(self) -> str:
        """Of its files in the work directory; the id may hold any characters."""
        return f"mount-{self.number}"

    @property
    def live(self) -> bool:
        """Is there, or may there be, a mount?"""
        return self.state is not State.GONE

    @property
    def ready_to_replace(self) -> bool:
        """Clients that say neither hold nor release mean: when the restore is over."""
        wanted = self.replacement
        if self.state is not State.MOUNTED or wanted is None or wanted.phase is not Phase.WAITING:
            return False
        return wanted.released or self.mode != "restore"

    def to_json(self) -> Dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Managed":
        """KeyError, TypeError or ValueError for what to_json did not make."""
        values = dict(record)
        values["state"] = State(values["state"])
        if values["replacement"] is not None:
            inner = dict(values["replacement"])
            request = dict(inner["request"])
            lists = {key: tuple(value) for key, value in request.items() if isinstance(value, list)}
            inner["request"] = requests.Replace(**{**request, **lists})
            inner["phase"] = Phase(inner["phase"])
            values["replacement"] = Replacement(**inner)
        return cls(**values)


Tell = Callable[[Managed, str, Mapping[str, Any], Optional[float]], None]
"""Gets what happened to a mount: the event's name, what there is to say about it, and when (None: just now)."""


def _tell_nobody(managed: Managed, event: str, details: Mapping[str, Any], when: Optional[float] = None) -> None:
    pass


class Registry:
    """All mounts by id. Methods that change something raise SpfsError, and have then changed nothing.

    What they change they ``tell``, when it is done.
    """

    def __init__(self, tell: Tell = _tell_nobody) -> None:
        self._tell = tell
        self._live: Dict[str, Managed] = {}
        self.finished: List[Managed] = []
        self._last_number = 0
        self.ever_mounted = False

    def __iter__(self) -> Iterator[Managed]:
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def get(self, id: str) -> Managed:
        try:
            return self._live[id]
        except KeyError:
            known = ", ".join(list(self._live)[:10]) or "there is none"
            raise SpfsError(f"cannot find mount {id!r}: unknown id", f"known: {known}", errno.ENOENT) from None

    def last(self, id: str) -> Managed:
        """As get(), but also a mount that is gone already: the latest one of that id."""
        for managed in reversed(self.finished):
            if id not in self._live and managed.id == id:
                return managed
        return self.get(id)

    def select(self, id: Optional[str]) -> List[Managed]:
        """The one with that id; all for None."""
        return [self.get(id)] if id is not None else list(self._live.values())

    def usable(self, id: str) -> Managed:
        """As get(), for what needs the file system to be served."""
        managed = self.get(id)
        check_usable(managed)
        return managed

    def add(self, request: requests.Mount) -> Managed:
        if request.id in self._live:
            held = self._live[request.id]
            raise SpfsError(
                f"cannot mount {request.mountpoint}: id {request.id!r} is in use for {held.mountpoint}",
                "choose another id, or unmount that one",
                errno.EEXIST,
            )
        self._last_number += 1
        managed = Managed(
            number=self._last_number,
            id=request.id,
            mountpoint=request.ns_mountpoint or request.mountpoint,
            attached_at=request.mountpoint,
            mode=request.mode,
            since=time.time(),
            root=request.root,
        )
        self._live[managed.id] = managed
        return managed

    def adopt(self, managed: Managed) -> None:
        """Take over a record of an earlier manager."""
        self._last_number = max(self._last_number, managed.number)
        if managed.live:
            self._live[managed.id] = managed
            self.ever_mounted = True
        else:
            self.finished.append(managed)

    def discard(self, managed: Managed) -> None:
        """The mount never came to be."""
        del self._live[managed.id]

    def mounted(self, managed: Managed, pid: int, start_time: int, device: int, identity: Dict[str, int]) -> None:
        managed.state = State.MOUNTED
        managed.pid, managed.start_time, managed.device, managed.identity = pid, start_time, device, identity
        managed.since = time.time()
        self.ever_mounted = True
        self._tell(managed, "mounted", {"mode": managed.mode, "pid": pid, "device": device}, None)

    def mode_changed(self, managed: Managed, mode: str) -> None:
        if mode != managed.mode:
            former, managed.mode = managed.mode, mode
            managed.since = time.time()
            self._tell(managed, "mode", {"mode": mode, "former": former}, None)

    def failed(self, managed: Managed, why: str) -> None:
        """Its process died: the mount is dead, but there."""
        managed.state, managed.end = State.FAILED, why
        self._tell(managed, "failed", {"why": why}, None)

    def gone(self, managed: Managed, why: str) -> Optional[Managed]:
        """The mount is no more. Returns a finished record that had to make room."""
        del self._live[managed.id]
        managed.state, managed.end, managed.since = State.GONE, why, time.time()
        self.finished.append(managed)
        self._tell(managed, "gone", {"why": why}, None)
        return self.finished.pop(0) if len(self.finished) > MAX_FINISHED else None

    def ask_replace(
        self, request: requests.Replace, network: Optional[Dict[str, int]] = None, cgroup_seen: bool = False
    ) -> Managed:
        """A replace was asked for; see ready_to_replace for whether to start it. Others as of Replacement."""
        managed = self.usable(request.id)
        old = managed.replacement
        if old is not None and old.phase is Phase.RUNNING:
            if old.request == request:
                return managed  # a caller that asks twice
            raise _running(managed, "replace it by something else")
        if old is not None and old.phase in PENDING and old.request == request:
            return managed
        held = request.mode == "hold"
        managed.replacement = Replacement(
            request,
            Phase.HELD if held else Phase.WAITING,
            since=time.time(),
            released=request.mode == "release",
            network=network or {},
            cgroup_seen=cgroup_seen,
        )
        asked = dataclasses.asdict(request)
        del asked["id"], asked["options"]  # some options hold passwords
        self._tell(managed, "replace-asked", asked, None)
        return managed

    def begin(self, id: Optional[str], mode: str) -> List[Managed]:
        """Hold or let go what was asked for before; the mounts that it concerns."""
        chosen = []
        for managed in self.select(id):
            wanted = managed.replacement
            if wanted is None or (id is None and wanted.phase in (Phase.DONE, Phase.ABORTED)):
                if id is not None:
                    raise SpfsError(
                        f"cannot {mode} the replace of mount {id!r}: none was asked for",
                        "send a replace request with source, type and flags first",
                        errno.EINVAL,
                    )
                continue
            if wanted.phase is Phase.RUNNING and mode == "hold":
                if id is not None:
                    raise _running(managed, "hold it")
                continue
            if id is None and managed.state is not State.MOUNTED:
                continue  # a dead one must not keep the others from being let go
            if wanted.phase is not Phase.RUNNING:
                chosen.append(managed)
        for managed in chosen:
            check_usable(managed)
        for managed in chosen:
            wanted = managed.replacement
            assert wanted is not None
            managed.replacement = Replacement(
                wanted.request,
                Phase.HELD if mode == "hold" else Phase.WAITING,
                since=time.time(),
                released=mode == "release",
                network=wanted.network,
                cgroup_seen=wanted.cgroup_seen,
            )
            self._tell(managed, f"replace-{mode}", {}, None)
        return chosen

    def check_mode_change(self, managed: Managed) -> None:
        """While a replace is at work on the processes, the mode is its business."""
        check_usable(managed)
        wanted = managed.replacement
        if wanted is not None and wanted.phase is Phase.RUNNING and wanted.stage not in ("", "mounting", "mounted"):
            raise _running(managed, "change its mode")

    def replace_started(self, managed: Managed, job_pid: int, job_start_time: int) -> None:
        wanted = _wanted(managed)
        wanted.phase, wanted.since = Phase.RUNNING, time.time()
        wanted.job = {"pid": job_pid, "start_time": job_start_time}
        self._tell(managed, "replace-started", {"pid": job_pid}, None)

    def replace_progress(self, managed: Managed, stage: str, details: Dict[str, Any], when: float) -> None:
        wanted = _wanted(managed)
        wanted.stage = stage
        if stage == "mounting":
            if "attempt" in details:
                wanted.attempts = max(wanted.attempts, int(details["attempt"]))
            wanted.last_attempts = [*wanted.last_attempts, {**details, "time": when}][-MAX_ATTEMPTS:]
            self._tell(managed, "attempt" if "attempt" in details else "waiting", details, when)
            if wanted.stages and wanted.stages[-1]["stage"] == stage:
                return
            details = {}
        else:
            self._tell(managed, "stage", {"stage": stage, **details}, when)
        wanted.stages.append({"stage": stage, "time": when, **details})
        if stage == "proxy":
            self.mode_changed(managed, "proxy")
        elif stage == "refused":  # and the doors shut again
            self.mode_changed(managed, str(details["mode"]))

    def replace_ended(
        self, managed: Managed, phase: Phase, report: Optional[Dict[str, Any]], error: Optional[Dict[str, Any]]
    ) -> None:
        wanted = _wanted(managed)
        wanted.phase, wanted.report, wanted.error, wanted.job = phase, report, error, None
        wanted.since = time.time()
        self._tell(managed, "replace-ended", {"phase": phase.value, "report": report, "error": error}, None)

    def was_replaced(self, managed: Managed, by_real: bool) -> bool:
        """The file system has ended and is mounted nowhere: because it was replaced? ``by_real``: is what was to
        replace it on its path? A replace whose process was killed when all was done is known by that."""
        wanted = managed.replacement
        if wanted is None or wanted.phase in (Phase.DONE, Phase.HELD):
            return wanted is not None and wanted.phase is Phase.DONE
        if by_real and wanted.phase is Phase.WAITING:
            report = {"moved": {}, "left": [], "mounts_left": [], "ended": True, "notes": []}
            self.replace_ended(managed, Phase.DONE, report, None)
        return by_real


def check_usable(managed: Managed) -> None:
    """SpfsError unless requests to the file system make sense now."""
    if managed.state is State.MOUNTED:
        return
    why, hint, number = {
        State.STARTING: ("it is still being mounted", "wait for the answer to the mount request", errno.EBUSY),
        State.UNMOUNTING: ("it is being unmounted", "", errno.EBUSY),
        State.FAILED: (managed.end, "unmount it, and mount again", errno.ENOTCONN),
        State.GONE: ("it is gone", "", errno.ENOENT),
    }[managed.state]
    raise SpfsError(f"cannot use mount {managed.id!r} on {managed.mountpoint}: {why}", hint, number)


def _wanted(managed: Managed) -> Replacement:
    if managed.replacement is None:
        raise ValueError(f"no replace was asked for mount {managed.id!r}")
    return managed.replacement


def _running(managed: Managed, what: str) -> SpfsError:
    return SpfsError(
        f"cannot {what}: mount {managed.id!r} on {managed.mountpoint}: a replace is running",
        "wait for it, or abort it",
        errno.EBUSY,
    )
