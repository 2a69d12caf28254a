"""Changes of mode and of rules: put to the file systems without blocking, answered when they are in force."""

from __future__ import annotations

import errno
import functools
import logging
import os
from typing import Any, Callable, Dict, List, Optional, Sequence

from spfs import requests
from spfs.connection import Call
from spfs.errors import SpfsError
from spfs.jobs import Context, Outcome
from spfs.mountwork import Done
from spfs.registry import Managed, State
from spfs.replacing import Replaces
from spfs.replies import Reply
from stubfs import wire
from stubfs.errors import StubfsError
from stubfs.rules import Rule

log = logging.getLogger(__name__)

MODE_TIMEOUT = 60.0  # seconds; leaving restore mode writes back the dirty pages of mapped staging files


class ModeChanges(Replaces):
    def change_mode(self, chosen: List[Managed], request: requests.Mode, done: Done) -> None:
        """``done`` when the change is in force everywhere."""
        for managed in chosen:
            self.registry.check_mode_change(managed)
        change: Dict[str, Any] = {"command": "mode", "mode": request.mode}
        if request.mode != "proxy":
            change.update(timeout=request.timeout, errno=request.errno, exempt=list(request.exempt) or None)
            return self._change_all(chosen, change, -1, done)
        change["missing"] = request.missing
        assert request.proxy_dir is not None
        path = request.proxy_dir

        def work(context: Context) -> None:
            from spfs import filesystem

            filesystem.open_directory(context, path, request.ns_pid)

        def ended(outcome: Outcome) -> None:
            if outcome.error is not None:
                return done(outcome.error, {})
            self._change_all(chosen, change, outcome.fds.steal(0), done)

        self.start_job("mode change", work, ended)

    def set_rules(self, chosen: List[Managed], rules: Sequence[Rule], done: Done) -> None:
        """``done`` when they are in force everywhere."""
        for managed in chosen:
            self.registry.check_mode_change(managed)
        self._change_all(chosen, {"command": "rules", "rules": [rule.as_json() for rule in rules]}, -1, done)

    def _change_all(self, chosen: List[Managed], change: Dict[str, Any], directory: int, done: Done) -> None:
        """``change``: the request to the file systems. Takes ``directory``, sent with it, over (-1: none)."""
        errors: List[StubfsError] = []
        waiting = {managed.number for managed in chosen}

        def one_done(managed: Managed, error: Optional[StubfsError]) -> None:
            waiting.discard(managed.number)
            if error is not None:
                errors.append(error)
            if not waiting:
                finish()

        def finish() -> None:
            if directory >= 0:
                os.close(directory)
            about = {key: value for key, value in change.items() if key in ("mode", "rules")}
            done(errors[0] if errors else None, {**about, "mounts": [managed.id for managed in chosen]})

        if not chosen:
            return finish()
        for managed in chosen:
            self._change_one(managed, change, directory, functools.partial(one_done, managed))

    def _change_one(
        self, managed: Managed, change: Dict[str, Any], directory: int, done: Callable[[Optional[StubfsError]], None]
    ) -> None:
        """One after the other for each file system: the last one asked for is the one in force at the end."""
        running = self._running.get(managed.number)
        what = change["command"]
        if running is None:
            gone = f"cannot change the {what} of mount {managed.id!r}: it is gone"
            return done(SpfsError(gone, "see status", errno.ENOENT))

        def begin() -> None:
            fds = [directory] if directory >= 0 else []
            Call(self._loop, managed.control, change, ended, MODE_TIMEOUT, fds)

        def ended(reply: Reply, fds: wire.Descriptors) -> None:
            error = None
            if reply.status == 0:
                self._changed(managed, change)
            else:
                why = reply.data.get("message", os.strerror(-reply.status))
                error = SpfsError(
                    f"cannot change the {what} of mount {managed.id!r}: {why}", reply.data.get("hint", ""),
                    -reply.status,
                )  # fmt: skip
                log.warning("%s", error)
            running.mode_changes.popleft()
            done(error)
            if running.mode_changes:
                running.mode_changes[0]()
            else:
                self._wake(managed)
                self.start_if_ready(managed)

        running.mode_changes.append(begin)
        if len(running.mode_changes) == 1:
            begin()

    def _changed(self, managed: Managed, change: Dict[str, Any]) -> None:
        mode = change.get("mode")
        if mode is None:
            log.info("mount %s: %d rules", managed.id, len(change["rules"]))
            return
        if mode != managed.mode:
            log.info("mount %s: %s mode", managed.id, mode)
        self.registry.mode_changed(managed, mode)

    def mode_seen(self, managed: Managed, mode: str) -> None:
        """The file system says which mode it is in; somebody may have changed it by its own control socket."""
        if managed.state is State.MOUNTED and not self._running[managed.number].mode_changes:
            self.registry.mode_changed(managed, mode)
            self.start_if_ready(managed)
