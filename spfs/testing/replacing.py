"""The replace step without a manager: in a process of its own, which may trace the one that asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Dict

from spfs.errors import SpfsError
from stubfs import interpreter

BIND = 4096  # MS_BIND, mount(2)


def replace(control: str, pid: int, mountpoint: str, **request: Any) -> Dict[str, Any]:
    """The report of the replace. SpfsError if it failed.

    ``control``, ``pid``, ``mountpoint``: of the file system that is replaced; ``request`` as in ``requests.Replace``.
    """
    order = [control, pid, mountpoint, request]
    command = interpreter.command("spfs.testing.replacing")
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True)
    try:
        answer: Dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.strip().splitlines()
        raise SpfsError(f"cannot replace {mountpoint}: {said[-1] if said else done.returncode}") from error
    if "error" in answer:
        raise SpfsError(*answer["error"])
    report: Dict[str, Any] = answer["report"]
    return report


def main() -> None:
    from spfs import jobs
    from spfs.jobs import Context

    control, pid, mountpoint, request = json.load(sys.stdin)

    def work(context: Context) -> None:
        context.deliver(_replace(control, pid, mountpoint, request))

    # In a child: the step touches neither its parent nor the file system, and whoever asked is our parent.
    job = jobs.start("replace", work)
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)
    outcome = job.finish()
    os.waitpid(job.pid, 0)
    if outcome.error is not None:
        error = outcome.error
        print(json.dumps({"error": [error.message, error.hint, error.errno]}))
    else:
        print(json.dumps({"report": outcome.value}))


def _replace(control: str, pid: int, mountpoint: str, request: Dict[str, Any]) -> Dict[str, Any]:
    from spfs import replace as step
    from spfs.jobs import ignore_progress
    from spfs.requests import Replace
    from spfs.target import Target
    from stubfs.syscalls import device_without_sync

    target = Target.pin()
    try:
        filesystem = step.MountedFilesystem(
            mountpoint, control, pid, device_without_sync(os.fsencode(mountpoint)), mountpoint, target,
            os.path.dirname(control),
        )  # fmt: skip
        wanted = Replace(id=mountpoint, **request)
        return step.replace(wanted, filesystem, lambda stage, details: ignore_progress(stage, details, 0.0))
    finally:
        target.close()
