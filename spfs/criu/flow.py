"""``spfs-criu dump`` and ``spfs-criu restore``: CRIU with all that delayed mounts need around it."""

from __future__ import annotations

import errno
import os
import time
from typing import Any, Callable, Dict, List, Optional, Sequence

from spfs.client import SOCKET_VARIABLE
from spfs.criu import choice, command
from spfs.criu.delayed import DelayedMount, Wish
from spfs.criu.images import pycriu_images
from spfs.criu.log import said
from spfs.criu.manager import connect
from spfs.criu.observe import Observed
from spfs.criu.restoration import TOKEN_VARIABLE, Restoration
from spfs.errors import SpfsError, UsageError
from spfs.processes import has_ended, start_time

_END_TIMEOUT = 5.0  # seconds for the manager to see what the end of a file system process means
_LOOK_AGAIN = 0.2  # seconds between looks at how far a replace is, while it is waited for
Progress = Callable[[str, Dict[str, Any]], None]


def images_directory(arguments: Sequence[str]) -> str:
    return os.path.realpath(command.value(arguments, "-D", "--images-dir") or ".")


def dump(arguments: Sequence[str], wishes: Sequence[Wish], program: Optional[str] = None) -> List[DelayedMount]:
    """Dump by CRIU with ``arguments``, and write the record. What is delayed at the restore.

    CriuFailed if it ends with an error; the processes are then as CRIU leaves them.
    """
    tree = command.value(arguments, "-t", "--tree")
    if tree is None or not tree.isdigit():
        raise UsageError("cannot dump: which process?", "-t PID, as for criu dump")
    criu, images = command.find(program), images_directory(arguments)
    pycriu_images()  # that it is missing must be known while the processes still live
    with Observed(int(tree), wishes) as observed:
        added = command.dump_options(observed.mounts, arguments)
        command.check("dump", command.start(criu, ["dump", *arguments, *added], {}).wait(), images)
        return choice.recorded(images, observed)


class Restore:
    """One restore by CRIU with ``arguments``."""

    def __init__(
        self,
        arguments: Sequence[str],
        wishes: Sequence[Wish],
        program: Optional[str] = None,
        socket_path: Optional[str] = None,
    ) -> None:
        self._arguments = list(arguments)
        self._program = command.find(program)
        self._images = images_directory(arguments)
        if socket_path is not None:
            os.environ[SOCKET_VARIABLE] = socket_path  # for the action script, too
        self.restoration = Restoration(f"{os.getpid()}.{start_time(os.getpid())}")
        mounts = choice.at_restore(self._images, None, wishes)
        if not mounts:
            raise UsageError(
                f"cannot restore {self._images} with delayed mounts: none is written beside the images",
                "name them: --delayed KEY=MOUNTPOINT,type=…,source=…; or restore by criu itself",
            )
        self.mounts = [
            mount._replace(host=self.restoration.hidden(mount)) if mount.namespaced else mount for mount in mounts
        ]

    @property
    def ids(self) -> List[str]:
        return [self.restoration.id(mount) for mount in self.mounts]

    def run(self, let_go: Callable[[], None] = lambda: None) -> None:
        """Until CRIU has ended: with -d when the processes run, else when they have ended. ``let_go`` is called when
        they run. CriuFailed, and everything taken away again, if it fails before."""
        restoration = self.restoration
        restoration.begin(self.mounts)
        try:
            with open(restoration.script, "w") as file:
                file.write(command.action_script())
            os.chmod(restoration.script, 0o700)
            added = command.restore_options(self.mounts, self._arguments, restoration.script)
            process = command.start(
                self._program, ["restore", *self._arguments, *added], {TOKEN_VARIABLE: restoration.token}
            )
        except BaseException:
            restoration.forget()
            raise
        try:
            if not command.given(self._arguments, "-d", "--restore-detached"):
                while restoration.known and process.poll() is None:
                    time.sleep(_LOOK_AGAIN)
                if not restoration.known:
                    self._check_alive()
                    let_go()
            status = process.wait()
        except KeyboardInterrupt:
            status = process.wait()  # it was interrupted, too
        if restoration.known:
            # It has not come to post-resume, or a script of that stage has failed, which CRIU does not mind.
            restoration.release() if status == 0 else restoration.abandon()
        command.check("restore", status, self._images, said(restoration.token))
        if command.given(self._arguments, "-d", "--restore-detached"):
            self._check_alive()
            let_go()

    def _check_alive(self) -> None:
        """SpfsError if a stand-in has died meanwhile: CRIU does not mind at its last stages."""
        try:
            with connect() as restore:
                for row in restore.client.status()["mounts"]:
                    if row["id"] in self.ids and _has_ended(row["pid"]):
                        restore.client.wait(row["id"], _END_TIMEOUT)  # why: replaced already, or dead
        except SpfsError as error:
            if error.errno == errno.ENOENT:
                return  # the manager has ended with its last mount
            hint = "users of a mount without its process get ENOTCONN: end them, spfs unmount it, and restore again"
            raise SpfsError(
                f"cannot let what was restored go on: {error.message}", error.hint or hint, error.errno
            ) from error

    def wait(self, progress: Progress, timeout: Optional[float] = None) -> List[Dict[str, Any]]:
        """Until all replaces have ended; the mounts' status. SpfsError for the first one that failed, ETIMEDOUT after
        ``timeout`` seconds. ``progress`` is told each stage of each mount as it comes."""
        return follow(self.ids, progress, timeout)


def follow(ids: Sequence[str], progress: Progress, timeout: Optional[float] = None) -> List[Dict[str, Any]]:
    deadline = None if timeout is None else time.monotonic() + timeout
    rows = []
    with connect() as restore:
        for id in ids:
            seen, attempts = 0, 0
            while True:
                left = _LOOK_AGAIN if deadline is None else min(_LOOK_AGAIN, max(0.0, deadline - time.monotonic()))
                late: Optional[SpfsError] = None
                row: Dict[str, Any] = {}
                try:
                    row = restore.client.wait(id, left)
                except SpfsError as error:
                    if error.errno != errno.ETIMEDOUT:
                        raise
                    late = error
                    status = restore.client.status(id)
                    row = (status["mounts"] or status["finished"])[0]
                wanted = row["replace"] or {}
                stages = wanted.get("stages", [])
                news = list(stages[seen:])
                if wanted.get("attempts", 0) > attempts:
                    news.append({"stage": "mounting", "attempt": wanted["attempts"], **_why(wanted)})
                for stage in news:
                    progress(id, stage)
                seen, attempts = len(stages), wanted.get("attempts", 0)
                if late is None:
                    rows.append(row)
                    break
                if deadline is not None and time.monotonic() >= deadline:
                    raise late
    return rows


def _has_ended(pid: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return has_ended(pidfd, 0)
    finally:
        os.close(pidfd)


def _why(wanted: Dict[str, Any]) -> Dict[str, Any]:
    """What the latest attempt to mount said."""
    latest = (wanted.get("last_attempts") or [{}])[-1]
    return {"error": latest["error"]} if latest.get("error") else {}
