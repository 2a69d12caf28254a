"""The replace step without a manager: in a process of its own, which may trace the one that asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, Dict, Optional

import spfs
from spfs.errors import SpfsError

BIND = 4096  # MS_BIND, mount(2)


@dataclass(frozen=True)
class Order:
    """``control``, ``pid``, ``mountpoint``: of the file system that is replaced. The rest as in ReplaceRequest."""

    control: str
    pid: int
    mountpoint: str
    source: str
    fstype: str
    options: str = ""
    flags: int = 0
    strict: bool = False
    timeout: Optional[float] = None


def replace(**order: Any) -> Dict[str, Any]:
    """The report of the replace. SpfsError if it failed."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(spfs.__file__)))
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "spfs.testing.replacing"], input=json.dumps(asdict(Order(**order))),
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        answer: Dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.strip().splitlines()
        raise SpfsError(f"cannot replace {order['mountpoint']}: {said[-1] if said else done.returncode}") from error
    if "error" in answer:
        raise SpfsError(*answer["error"])
    report: Dict[str, Any] = answer["report"]
    return report


def main() -> None:
    from spfs import jobs
    from spfs.jobs import Context

    order = Order(**json.load(sys.stdin))

    def work(context: Context) -> None:
        context.deliver(_replace(order))

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


def _replace(order: Order) -> Dict[str, Any]:
    from spfs import replace as step
    from spfs.jobs import ignore_progress
    from spfs.target import Target
    from stubfs.syscalls import device_without_sync

    target = Target.pin()
    try:
        filesystem = step.MountedFilesystem(
            order.mountpoint, order.control, order.pid, device_without_sync(os.fsencode(order.mountpoint)),
            order.mountpoint, target, os.path.dirname(order.control),
        )  # fmt: skip
        request = step.ReplaceRequest(
            order.source, order.fstype, order.flags, order.options, strict=order.strict, timeout=order.timeout
        )
        return step.replace(request, filesystem, lambda stage, details: ignore_progress(stage, details, 0.0))
    finally:
        target.close()


if __name__ == "__main__":
    main()
