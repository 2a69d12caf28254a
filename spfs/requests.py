"""What the manager can be asked: a dataclass for each request, whose fields are the request's keys. No I/O.

Nothing else lists the keys: ``spfs.protocol`` reads packets by the fields, ``spfs.client`` passes on what it is given,
records hold them, and the jobs get the request as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Type, Union

from stubfs.rules import Rule


@dataclass(frozen=True)
class Mount:
    id: str
    mode: str
    mountpoint: str
    proxy_dir: Optional[str] = None
    ns_pid: Optional[int] = None
    ns_list: Optional[Tuple[str, ...]] = None
    root: Optional[str] = None
    ns_mountpoint: Optional[str] = None
    options: str = ""


@dataclass(frozen=True)
class Mode:
    """``id`` None: of all file systems. ``timeout``, ``errno``, ``exempt`` are for stub mode, ``missing`` for proxy."""

    mode: str
    id: Optional[str] = None
    proxy_dir: Optional[str] = None
    ns_pid: Optional[int] = None
    timeout: Optional[float] = None
    errno: Optional[int] = None
    exempt: Tuple[int, ...] = ()
    missing: str = "leave"


@dataclass(frozen=True)
class Rules:
    """``rules``: as objects, see ``stubfs.rules``; None asks for those that are in force. ``id`` None: all of them."""

    id: Optional[str] = None
    rules: Optional[Tuple[Rule, ...]] = None


@dataclass(frozen=True)
class Replace:
    """What to mount in the file system's place: ``source``, ``type``, ``flags``, ``options`` as in mount(2).

    ``mode``: hold, release, or None for clients that never say when. ``strict``: change nothing if anything could not
    be moved. ``missing``: files of restore mode that the real file system lacks are left, or carried over ("carry").
    ``timeout``: seconds to go on trying the real mount; None: until it is there. ``remove``: names on the real file
    system that only served those who have been moved; kept if anything is left. ``net_pid``: the process in whose
    network namespace it is mounted; None: the target of the file system's own mount.
    """

    id: str
    source: str
    type: str
    flags: int
    bindmounts: Tuple[str, ...] = ()
    freeze_cgroup: Optional[str] = None
    mode: Optional[str] = None
    options: str = ""
    strict: bool = False
    missing: str = "leave"
    timeout: Optional[float] = None
    remove: Tuple[str, ...] = ()
    net_pid: Optional[int] = None


@dataclass(frozen=True)
class Begin:
    """``replace`` without a source: hold or let go what was asked before; ``id`` None: all of it."""

    mode: str
    id: Optional[str] = None


@dataclass(frozen=True)
class Switch:
    target: str
    freeze_cgroup: Optional[str] = None
    source: Optional[str] = None
    device: Optional[int] = None
    ns_pid: Optional[int] = None


@dataclass(frozen=True)
class Status:
    id: Optional[str] = None


@dataclass(frozen=True)
class Held:
    id: Optional[str] = None


@dataclass(frozen=True)
class Wait:
    """``timeout`` in seconds; None: as long as it takes."""

    id: str
    timeout: Optional[float] = None


@dataclass(frozen=True)
class Changes:
    """Wait until the manager's count of events is not ``since`` any more, ``timeout`` seconds at most."""

    since: int
    timeout: Optional[float] = None


@dataclass(frozen=True)
class Metrics:
    pass


@dataclass(frozen=True)
class Abort:
    id: Optional[str] = None


@dataclass(frozen=True)
class Unmount:
    id: Optional[str] = None
    force: bool = False


@dataclass(frozen=True)
class Create:
    """``files``: mappings with path, mode and perhaps size or target, as ``spfs.restore.FileSpec`` takes them."""

    id: str
    files: Tuple[Dict[str, Any], ...]


@dataclass(frozen=True)
class Staging:
    id: str


@dataclass(frozen=True)
class Shutdown:
    unmount: bool = False
    force: bool = False


Request = Union[
    Mount, Mode, Rules, Replace, Begin, Switch, Status, Held, Wait, Changes, Metrics, Abort, Unmount, Create, Staging,
    Shutdown,
]  # fmt: skip
COMMANDS: Dict[str, Type[Any]] = {
    "mount": Mount,
    "mode": Mode,
    "rules": Rules,
    "replace": Replace,
    "switch": Switch,
    "status": Status,
    "held": Held,
    "wait": Wait,
    "changes": Changes,
    "metrics": Metrics,
    "abort": Abort,
    "unmount": Unmount,
    "create": Create,
    "staging": Staging,
    "shutdown": Shutdown,
}
