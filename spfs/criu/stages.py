"""What is done at the stages at which CRIU calls its action script: as little as possible, and the same if repeated.

pre-restore   mount and create files. Later is too late: CRIU copies mounts into the namespaces that it makes.
post-restore  all processes are there, and stand still: block, and say whose network and cgroup it is. The last stage
              whose failure undoes the restore, so nobody runs who was not blocked; but CRIU itself still removes what
              it has made on the mounts.
pre-resume    it has: block CRIU, too.
post-resume   CRIU traces nobody any more: the replaces may begin.
post-dump     write beside the images what is delayed at their restore.

Through its RPC (runc, podman) CRIU 4.1 calls a script named in a configuration file twice at each stage.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import Callable, Dict, List, Mapping, Optional

from spfs.criu import cgroups, guard, manager, record
from spfs.criu.delayed import DelayedMount
from spfs.criu.log import log
from spfs.criu.restoration import TOKEN_VARIABLE, Restoration
from spfs.errors import SpfsError
from spfs.processes import start_time
from stubfs.errors import StubfsError

CONFIGURATION = "/etc/spfs/criu.json"
CONFIGURATION_VARIABLE = "SPFS_CRIU_CONFIG"


class Call:
    """One call of the script. ``environment`` as CRIU gives it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.stage = environment.get("CRTOOLS_SCRIPT_ACTION", "")
        if not self.stage:
            raise SpfsError(
                "cannot act: CRTOOLS_SCRIPT_ACTION is not set",
                "this is a script for CRIU: --action-script 'spfs-criu action'",
                errno.EINVAL,
            )
        self.images = os.path.realpath(environment.get("CRTOOLS_IMAGE_DIR", "."))
        self.pid = int(environment["CRTOOLS_INIT_PID"]) if "CRTOOLS_INIT_PID" in environment else None
        self._environment = environment
        self.criu = _criu()

    @functools.cached_property
    def restoration(self) -> Restoration:
        token = self._environment.get(TOKEN_VARIABLE) or f"{self.criu}.{start_time(self.criu)}"
        return Restoration(token)

    def configured(self) -> Optional[List[DelayedMount]]:
        """What the administrator says."""
        return record.read(self._environment.get(CONFIGURATION_VARIABLE) or CONFIGURATION)


def act(environment: Mapping[str, str]) -> None:
    """SpfsError if the stage could not do its part."""
    call = Call(environment)
    stage = _STAGES.get(call.stage)
    if stage is not None:
        stage(call)


def _for_script(call: Call, stage: str, pid: Optional[int]) -> str:
    """Do a later stage of the same restore; exit code and message for the script."""
    call.pid = pid
    try:
        _STAGES[stage](call)
    except (StubfsError, OSError) as error:
        log(f"{stage}: {error}", call.restoration.token)
        return f"{getattr(error, 'exit_code', 1)} spfs-criu: {stage}: {error}"
    return "0"


def _pre_restore(call: Call) -> None:
    restoration = call.restoration
    if not restoration.known:
        from spfs.criu import choice

        mounts = choice.at_restore(call.images, call.configured())
        if not mounts:
            return
        restoration.begin(mounts)
    cgroups.leave()
    try:
        manager.start_early()
        restoration.prepare()
        guard.start(restoration, call.criu, lambda stage, pid: _for_script(call, stage, pid))
    except BaseException:
        restoration.forget()
        raise


def _post_restore(call: Call) -> None:
    if call.restoration.known:
        own = _own(call.criu, call.pid)
        if call.pid is not None:
            call.restoration.settle(call.pid, own)
        call.restoration.block(exempt=own)


def _pre_resume(call: Call) -> None:
    if call.restoration.known:
        call.restoration.block()
        call.restoration.hide()


def _post_resume(call: Call) -> None:
    if call.restoration.known:
        call.restoration.release()


def _post_dump(call: Call) -> None:
    if call.pid is not None and not os.path.exists(os.path.join(call.images, record.NAME)):
        from spfs.criu import choice

        choice.at_dump(call.images, call.pid, call.configured())


_STAGES: Dict[str, Callable[[Call], None]] = {
    "pre-restore": _pre_restore,
    "post-restore": _post_restore,
    "pre-resume": _pre_resume,
    "post-resume": _post_resume,
    "post-dump": _post_dump,
}


def _own(criu: int, restored: Optional[int]) -> List[int]:
    """CRIU's own processes: in user namespaces it works by children. Those that it restores are not among them."""
    found = [criu]
    for pid in found:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            found += [child for child in map(int, file.read().split()) if child not in (restored, os.getpid())]
    return found


def _criu() -> int:
    """The CRIU process that called: it has started us through a shell, or one more."""
    pid = os.getppid()
    candidate = pid
    while candidate > 1:
        with open(f"/proc/{candidate}/stat", "rb") as file:
            stat = file.read()
        name = stat[stat.index(b"(") + 1 : stat.rindex(b")")]
        if name == b"criu":
            return candidate
        candidate = int(stat[stat.rindex(b")") + 2 :].split()[1])
    return pid
