"""A mount as the answers of the manager show it: in whole, in short, and how what was asked of it has ended."""

from __future__ import annotations

import errno
from typing import Any, Dict, Optional

from spfs import replies
from spfs.registry import ENDED, Managed, State
from spfs.replies import Reply


def describe(managed: Managed) -> Dict[str, Any]:
    """One row of ``status``. Mount options are left out: some hold passwords."""
    row: Dict[str, Any] = {
        "id": managed.id,
        "mountpoint": managed.mountpoint,
        "state": managed.state.value,
        "mode": managed.mode,
        "since": managed.since,
        "pid": managed.pid,
        "device": managed.device,
        "control": managed.control,
        "namespaces": managed.identity,
        "root": managed.root,
        "end": managed.end,
        "record": managed.record,
        "replace": None,
    }
    wanted = managed.replacement
    if wanted is not None:
        row["replace"] = {
            "phase": wanted.phase.value,
            "source": wanted.request.source,
            "type": wanted.request.type,
            "freeze_cgroup": wanted.request.freeze_cgroup,
            "stage": wanted.stage,
            "since": wanted.since,
            "attempts": wanted.attempts,
            "last_attempts": wanted.last_attempts,
            "stages": wanted.stages,
            "report": wanted.report,
            "error": wanted.error,
        }
    return row


def outcome(managed: Managed) -> Reply:
    row = describe(managed)
    wanted = managed.replacement
    error = wanted.error if wanted is not None and wanted.phase in ENDED else None
    if error is None and managed.state is State.FAILED:
        error = {"message": f"mount {managed.id!r} is dead: {managed.end}", "hint": "", "errno": errno.ENOTCONN}
    if error is not None:
        reply = replies.error_reply(error["message"], error["hint"], error["errno"])
        return Reply(reply.status, {**row, **reply.data})
    return Reply(0, row)


def in_short(managed: Managed, held: Optional[int]) -> Dict[str, Any]:
    """One row of ``metrics``; ``held``: how many requests it holds, None if it did not say."""
    wanted = managed.replacement
    return {
        "id": managed.id,
        "mountpoint": managed.mountpoint,
        "state": managed.state.value,
        "mode": managed.mode,
        "since": managed.since,
        "held": held,
        "replace": wanted.phase.value if wanted is not None else None,
    }
