"""The form of the manager's replies, and of all JSON on its socket; no I/O. Apart from the requests, which only the
manager reads: clients are waited for, and do not import those.
"""

from __future__ import annotations

import errno
import json
import struct
from typing import Any, Dict, Mapping, NamedTuple

STATUS_LENGTH = 4  # bytes in front of a reply: 0 or a negative errno, a native int


class Reply(NamedTuple):
    """``status``: 0 or a negative errno. ``data``: the answer, or for an error ``message`` and ``hint``."""

    status: int
    data: Dict[str, Any]


def error_reply(message: str, hint: str = "", number: int = errno.EINVAL) -> Reply:
    return Reply(-abs(number or errno.EIO), {"message": message, **({"hint": hint} if hint else {})})


def encode_status(status: int) -> bytes:
    return struct.pack("=i", status)


def encode_data(data: Mapping[str, Any]) -> bytes:
    # Paths may hold surrogates: ASCII escapes bring them through unharmed.
    return json.dumps(data, ensure_ascii=True).encode()


def decode_reply(prefix: bytes, payload: bytes) -> Reply:
    """ValueError for what is no reply of a manager."""
    (status,) = struct.unpack("=i", prefix)
    data = json.loads(payload) if payload else {}
    if not isinstance(data, dict):
        raise ValueError("the data of a reply must be an object")
    return Reply(status, data)
