"""``spfs switch``: what running programs hold, moved from one directory to another one; no manager is needed.

The work is done by a process of its own. This one stays behind to be told of an interrupt, and to say what happened.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import select
import signal
from types import FrameType
from typing import Any, Callable, Dict, Optional

from spfs import features, jobs
from spfs.cli import tables
from spfs.errors import SpfsError
from spfs.jobs import Context

TEXT = "move what running programs hold (open files, mappings, directories) to another mounted file system"
EPILOG = """\
A file at SOURCE/path becomes the one at TARGET/path, with its offset, flags and so on; make the copies first. What
cannot be moved, for instance because TARGET has no such file, stays where it is, keeps working, and is listed.

  rsync -a /srv/old/ /srv/new/
  spfs switch --pid 4711 --source /srv/old --target /srv/new --dry-run
  spfs switch --pid 4711 --source /srv/old --target /srv/new"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.epilog, command.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    who = command.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "--pid", type=int, action="append", default=[], help="this process and what it forks meanwhile; may be repeated"
    )
    who.add_argument("--cgroup", metavar="DIR", help="the processes of this freezer cgroup, which is frozen meanwhile")
    who.add_argument("--all", action="store_true", help="every process of this machine that uses SOURCE")
    command.add_argument("--source", required=True, metavar="DIR", help="the directory to move away from")
    command.add_argument("--target", required=True, metavar="DIR", help="directory to move to, on another file system")
    command.add_argument("--ns-pid", type=int, metavar="PID", help="look up both directories as this process sees them")
    command.add_argument("--strict", action="store_true", help="change nothing if anything could not be moved")
    command.add_argument("--dry-run", action="store_true", help="only list what would be moved, and what would not")


def run(options: argparse.Namespace) -> None:
    features.require("root")
    here = os.getcwd()  # the job works elsewhere. Joined and no more: ".." behind a symbolic link is the kernel's
    cgroup = None if options.cgroup is None else os.path.join(here, options.cgroup)
    source, target = options.source, options.target
    if options.ns_pid is None:  # else they are as that process sees them, from its root
        source, target = (os.path.join(here, path) if path else "" for path in (source, target))

    def work(context: Context) -> None:
        from spfs import processswitch as step

        request = step.SwitchRequest(
            target,
            cgroup,
            source=source,
            ns_pid=options.ns_pid,
            pids=tuple(options.pid),
            only_cgroup=cgroup is not None,
            strict=options.strict and not options.dry_run,
        )
        protect = (os.getppid(),)
        if options.dry_run:
            context.deliver({"references": [dataclasses.asdict(one) for one in step.examine(request, protect)]})
        else:
            context.deliver(step.switch(request, context.progress, protect))

    answer = _in_process(work)
    if options.json:
        print(json.dumps(answer, indent=2))
    elif options.dry_run:
        tables.references(answer["references"])
    else:
        tables.switched(answer)
    if options.strict and not options.dry_run and answer["left"]:
        raise SpfsError(
            f"cannot move everything: {len(answer['left'])} of the references stay, for reasons that showed only when"
            " the first ones had been moved",
            "they are listed; ask again when the reasons are gone",
            errno.EBUSY,
        )


def _in_process(work: Callable[[Context], None]) -> Dict[str, Any]:
    """The answer of a process that does ``work``; it is told of interrupts, and gives up or comes to its end."""
    job = jobs.start("switch", work)

    def cancel(number: int, frame: Optional[FrameType]) -> None:
        job.cancel()

    former = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        poll = select.poll()
        poll.register(job.pidfd, select.POLLIN)
        poll.register(job.sock, select.POLLIN)
        while job.pidfd not in {fd for fd, _ in poll.poll()}:
            if not job.read():
                poll.unregister(job.sock)
        outcome = job.finish()
        os.waitpid(job.pid, 0)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if outcome.error is not None:
        raise outcome.error
    return outcome.value
