"""What goes over a file system's control socket: frozen dataclasses, as JSON objects with the same names.

A request is ``{"command": ..., ...}``; a reply is four bytes of native int, 0 or a negative errno, then the answer
or ``{"message", "hint"}``. Paths are relative to the file system's root, which is "", and decoded as by os.fsdecode.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

STATUS = struct.Struct("=i")


@dataclass(frozen=True)
class FilesystemStatus:
    """``since``: when the mode came into force, seconds since the epoch; held, handles, nodes: how many.

    ``staged``: the latest directory, in force or before stub mode, is the one of restore mode.
    """

    mode: str
    since: float
    generation: int
    held: int
    handles: int
    nodes: int
    pid: int
    mountpoint: str
    staged: bool


@dataclass(frozen=True)
class HeldRequest:
    """``path`` is the node's (None: nameless), ``name`` the one the request carries beneath it; ``age`` in seconds.

    ``tid`` and ``pid`` are 0 for what the kernel asks on nobody's behalf, a readahead for instance.
    """

    unique: int
    operation: str
    node: int
    path: Optional[str]
    name: Optional[str]
    tid: int
    pid: int
    uid: int
    gid: int
    age: float
    command: str

    def __str__(self) -> str:
        where = "/".join(part for part in (self.path, self.name) if part) or ("the root" if self.path == "" else "?")
        who = f"process {self.pid} ({self.command})" if self.pid else "the kernel"
        return f"{self.operation} of {where} by {who}, for {self.age:.1f} s"


@dataclass(frozen=True)
class Handle:
    """An open file; ``kind`` is "file" or "directory", ``flags`` as open(2) was given, ``pid`` the opener's thread."""

    fh: int
    node: int
    path: Optional[str]
    kind: str
    flags: int
    generation: int
    pid: int


def encode(message: Dict[str, Any]) -> bytes:
    # ASCII with escapes: a file name's undecodable bytes are lone surrogates, which UTF-8 cannot carry.
    return json.dumps(message, separators=(",", ":")).encode("ascii")


def decode(payload: bytes) -> Dict[str, Any]:
    """ValueError for what is no JSON object."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    return message


def as_dict(message: Any) -> Dict[str, Any]:
    """A dataclass of this module; flat, so that no deep copy is made of each."""
    return dict(vars(message))


Reply = Tuple[Dict[str, Any], Tuple[int, ...]]
