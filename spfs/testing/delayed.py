"""One mount in the hands of a test: what is on it, whom it lets wait, what goes wrong on it, and who waits."""

from __future__ import annotations

import errno as errno_module
import os
import select
import signal
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

from spfs.testing import files, places
from spfs.testing.files import PathLike
from stubfs.client import FilesystemClient
from stubfs.errors import MissingFeatureError, StubfsError, UsageError, reason
from stubfs.messages import FilesystemStatus, HeldRequest
from stubfs.rules import Rule

DEFAULT_OWN_LIMIT = 60.0  # seconds
_CALL_LIMIT = 60.0  # seconds for the file system to answer
_END_LIMIT = 5.0  # seconds for it to end


@dataclass(eq=False)
class RuleInForce:
    """A rule of a mount, until end(); as a context manager, until its end."""

    rule: Rule
    _mount: "DelayedMount"
    _pidfds: Tuple[int, ...]

    def end(self) -> None:
        """What it holds goes on. Nothing happens if it has been ended already."""
        self._mount._end_rule(self)

    def __enter__(self) -> "RuleInForce":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.end()

    def has_processes(self) -> bool:
        """Whether there still is a process that it is for."""
        poll = select.poll()
        for fd in self._pidfds:
            poll.register(fd, select.POLLIN)
        return not self._pidfds or len(poll.poll(0)) < len(self._pidfds)

    def close(self) -> None:
        fds, self._pidfds = self._pidfds, ()
        for fd in fds:
            os.close(fd)


class DelayedMount:
    """A mounted file system; a context manager that ends with close(). Can be used from several threads.

    It begins with the files that are created on it, or those of ``proxy``. ``stub`` lets everybody wait who touches
    it, ``hang``, ``fail`` and ``slow`` are for some requests only: by operation (as ``held`` names them), by path
    (a pattern relative to the root, or beginning with the mountpoint; ``*`` matches slashes), by process, for the
    first so many ``times``. The one set last decides first. ``release`` ends it all. All are in force on return; what
    waits is let go by then.

    ``own_limit``: after so many seconds of waiting this process itself gets ETIMEDOUT (None: never), so that a test
    that touches its own hanging mount fails instead of hanging where no signal reaches it.

    Errors: StubfsError, with the file system's message and errno.
    """

    def __init__(
        self, path: str, socket_path: str, place: str, pidfd: int, log: int, own_limit: Optional[float]
    ) -> None:
        """``place``: the directory that clear() of ``spfs.testing.places`` is to remove. Owns both descriptors."""
        self.path = Path(path)
        self.socket_path = socket_path
        self.closed = False
        self._owner = os.getpid()
        self._place = place
        self._pidfd = pidfd
        self._log = log
        self._own_limit = own_limit
        self._mode = "restore"
        self._real: Optional[str] = None
        self._stub_limited = False
        self._rules: List[RuleInForce] = []  # the latest first

    def __enter__(self) -> "DelayedMount":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DelayedMount {self.path} {'closed' if self.closed else self._mode}>"

    def _pattern(self, path: Optional[PathLike]) -> Optional[str]:
        return None if path is None else files.inside(str(self.path), path)

    def _client(self) -> FilesystemClient:
        if self.closed:
            raise StubfsError(f"cannot use {self.path}: it is closed", "", errno_module.ENOTCONN)
        # One per call: calls that wait must not keep those of other threads waiting.
        return FilesystemClient(self.socket_path, _CALL_LIMIT)

    # -- what is on it

    def create_file(
        self, path: PathLike, content: Union[str, bytes] = b"", *, size: Optional[int] = None, mode: int = 0o644
    ) -> Path:
        """A file at ``path``, relative to the root or beginning with the mountpoint, and its parents; its path. With a
        ``size``: a hole of it.

        Without a request to the mount, so also while everybody waits. EEXIST if there is something, and EROFS when a
        real directory is served, which it is then to be made in.
        """
        data = content.encode() if isinstance(content, str) else content
        if size is not None and data:
            raise UsageError(f"cannot create {path}: it cannot have content and a size")
        return self._create(path, stat.S_IFREG | mode, data, size)

    def create_dir(self, path: PathLike, mode: int = 0o755) -> Path:
        """As create_file."""
        return self._create(path, stat.S_IFDIR | mode)

    def create_fifo(self, path: PathLike, mode: int = 0o644) -> Path:
        """As create_file."""
        return self._create(path, stat.S_IFIFO | mode)

    def _create(self, path: PathLike, mode: int, content: bytes = b"", size: Optional[int] = None) -> Path:
        if self._real is not None:
            raise StubfsError(
                f"cannot create {path}: {self.path} serves {self._real}", "make it there", errno_module.EROFS
            )
        name = files.inside(str(self.path), path).lstrip("/")
        with self._client() as client:
            root = client.staging()
        try:
            files.create(root, name, mode, content, size)
        except OSError as error:
            raise StubfsError(
                f"cannot create {path} on {self.path}: {reason(error)}", "", error.errno or errno_module.EIO
            ) from error
        finally:
            os.close(root)
        return self.path / name

    # -- what becomes of requests

    def stub(
        self, timeout: Optional[float] = None, errno: Union[None, int, str] = None, exempt: Sequence[int] = ()
    ) -> None:
        """Let everybody wait: for ``timeout`` seconds, then for an ``errno`` (EIO), or until release() or proxy().

        ``exempt``: processes that are served as before. The root's own attributes are answered all the same.
        """
        before = (self._mode, self._stub_limited)
        with self._client() as client:
            self._mode, self._stub_limited = "stub", timeout is not None
            try:
                self._send_rules(client)
                client.mode("stub", timeout=timeout, errno=errno, exempt=exempt)
            except BaseException:
                self._mode, self._stub_limited = before
                raise

    def proxy(self, directory: PathLike) -> None:
        """Serve ``directory`` from now on: who waits in stub mode goes on with what is there."""
        fd = _open_directory(directory)
        try:
            with self._client() as client:
                client.mode("proxy", fd)
                self._mode, self._real = "proxy", os.path.abspath(directory)
                self._send_rules(client)
        finally:
            os.close(fd)

    def release(self) -> None:
        """End all rules and stub mode: whoever waits is served, by what was served before."""
        for rule in self._rules:
            rule.close()
        self._rules = []
        if self._mode == "stub":
            if self._real is not None:
                return self.proxy(self._real)
            with self._client() as client:
                client.mode("restore")
                self._mode = "restore"
                self._send_rules(client)
        else:
            with self._client() as client:
                self._send_rules(client)

    def hang(
        self, operations: Sequence[str] = (), path: Optional[PathLike] = None, pids: Sequence[int] = (), *,
        seconds: Optional[float] = None, errno: Union[None, int, str] = None, times: Optional[int] = None,
    ) -> RuleInForce:  # fmt: skip
        """Let requests wait; with ``seconds``, so long, and then for an ``errno`` (EIO)."""
        return self._add(Rule("hold", operations, self._pattern(path), pids, errno, seconds, times))

    def fail(
        self, errno: Union[int, str] = "EIO", operations: Sequence[str] = (), path: Optional[PathLike] = None,
        pids: Sequence[int] = (), *, times: Optional[int] = None,
    ) -> RuleInForce:  # fmt: skip
        """Answer requests with an ``errno``, given by its number or name."""
        return self._add(Rule("fail", operations, self._pattern(path), pids, errno, times=times))

    def slow(
        self, seconds: float, operations: Sequence[str] = (), path: Optional[PathLike] = None,
        pids: Sequence[int] = (), *, times: Optional[int] = None,
    ) -> RuleInForce:  # fmt: skip
        """Answer each request so many ``seconds`` later."""
        return self._add(Rule("delay", operations, self._pattern(path), pids, seconds=seconds, times=times))

    def serve(
        self, operations: Sequence[str] = (), path: Optional[PathLike] = None, pids: Sequence[int] = (), *,
        times: Optional[int] = None,
    ) -> RuleInForce:  # fmt: skip
        """Serve requests in spite of stub mode and of what was set before."""
        return self._add(Rule("serve", operations, self._pattern(path), pids, times=times))

    def _add(self, rule: Rule) -> RuleInForce:
        pidfds: List[int] = []
        try:
            for pid in rule.pids:
                pidfds.append(os.pidfd_open(pid))
        except OSError as error:
            for fd in pidfds:
                os.close(fd)
            raise StubfsError(
                f"cannot tell the requests of process {pid}: {reason(error)}", "", error.errno or errno_module.EIO
            ) from error
        added = RuleInForce(rule, self, tuple(pidfds))
        with self._client() as client:
            self._rules.insert(0, added)
            try:
                self._send_rules(client)
            except BaseException:
                self._rules.remove(added)
                added.close()
                raise
        return added

    def _end_rule(self, rule: RuleInForce) -> None:
        if rule in self._rules:
            self._rules.remove(rule)
            rule.close()
            if not self._has_ended():
                with self._client() as client:
                    self._send_rules(client)

    def _send_rules(self, client: FilesystemClient) -> None:
        for gone in [rule for rule in self._rules if not rule.has_processes()]:
            self._rules.remove(gone)
            gone.close()
        rules: List[Rule] = []
        for entry in self._rules:
            limited = self._limited(entry.rule)
            rules += ([limited] if limited is not None else []) + [entry.rule]
        if self._mode == "stub" and not self._stub_limited:
            limited = self._limited(Rule("hold"))
            rules += [limited] if limited is not None else []
        client.set_rules(rules)

    def _limited(self, rule: Rule) -> Optional[Rule]:
        """The same for this process only, and not for ever; None if it needs none."""
        unlimited = rule.action == "hold" and rule.seconds is None and rule.times is None
        if not unlimited or self._own_limit is None or (rule.pids and os.getpid() not in rule.pids):
            return None
        return replace(rule, pids=[os.getpid()], seconds=self._own_limit, errno="ETIMEDOUT")

    # -- who waits

    def held(
        self, operations: Sequence[str] = (), path: Optional[PathLike] = None, pids: Sequence[int] = ()
    ) -> List[HeldRequest]:
        """The requests that wait, the oldest first; those that are delayed among them."""
        with self._client() as client:
            return client.held(operations, self._pattern(path), pids)

    def wait_held(
        self, count: int = 1, timeout: Optional[float] = 30.0, operations: Sequence[str] = (),
        path: Optional[PathLike] = None, pids: Sequence[int] = (),
    ) -> List[HeldRequest]:  # fmt: skip
        """Wait until at least ``count`` requests are held at once, and return them. An event, no polling.

        TimeoutError after ``timeout`` seconds (None: never) says who waits instead.
        """
        pattern = self._pattern(path)
        with self._client() as client:
            try:
                client.wait_held(count, timeout, operations, pattern, pids)
            except StubfsError as error:
                if error.errno != errno_module.ETIMEDOUT:
                    raise
                everybody = "\n".join(map(str, self.held())) or "nobody waits"
                raise TimeoutError(f"{self.path}: {error.message}\n{everybody}") from error
            return client.held(operations, pattern, pids)

    def status(self) -> FilesystemStatus:
        with self._client() as client:
            return client.status()

    @property
    def rules(self) -> List[Rule]:
        """As they were set, the one that decides first at the top."""
        return [entry.rule for entry in self._rules]

    def log(self) -> str:
        """What the file system has logged."""
        return os.pread(self._log, os.fstat(self._log).st_size, 0).decode(errors="replace")

    # -- the end

    def replace(
        self, directory: Optional[PathLike] = None, *, source: Optional[str] = None, type: Optional[str] = None,
        options: str = "", flags: int = 0, strict: bool = False, timeout: Optional[float] = 60.0,
    ) -> Dict[str, Any]:  # fmt: skip
        """Put the real file system in this one's place, under the processes that use it; what was moved and left.

        A ``directory``, or as in mount(2) ``source``, ``type``, ``options`` and ``flags``. Whoever waits goes on, on
        the real one. Needs root, in a user namespace of one's own at least; this process is moved as all others.
        """
        if (directory is None) == (source is None) or (source is None) != (type is None):
            raise UsageError("cannot replace: give a directory, or both source and type")
        from spfs import features
        from spfs.testing import replacing

        root = features.probe("root")
        if not root.available:
            raise MissingFeatureError(
                f"cannot replace {self.path}: {root.reason}",
                "run the tests as root, or in a namespace: unshare --user --map-root-user --mount pytest",
                errno_module.EPERM,
            )
        if directory is not None:
            os.close(_open_directory(directory))
        places.note_replaced(self._place, str(self.path))
        # Rules would keep what is replaced from letting go.
        self._rules, ended = [], self._rules
        for rule in ended:
            rule.close()
        with self._client() as client:
            client.set_rules([])
            status = client.status()
        report = replacing.replace(
            control=self.socket_path, pid=status.pid, mountpoint=str(self.path), strict=strict, timeout=timeout,
            source=os.path.abspath(directory) if directory is not None else source or "",
            type="none" if directory is not None else type or "", options=options,
            flags=replacing.BIND if directory is not None else flags,
        )  # fmt: skip
        self._mode, self._real = "replaced", os.path.abspath(directory) if directory is not None else source
        return report

    def _has_ended(self) -> bool:
        return self._wait_end(0)

    def _wait_end(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def crash(self) -> None:
        """Kill the file system's process: who waits and who comes gets ENOTCONN or ECONNABORTED, until close()."""
        if not self._has_ended():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._wait_end(_END_LIMIT)

    def close(self) -> None:
        """Unmount, lazily; who waits gets EIO. Nothing is left of it. StubfsError if that cannot be.

        Only in the process that has made it; in others nothing happens.
        """
        if self.closed or os.getpid() != self._owner:
            return  # a child that a test has forked runs the test's clean-up, too, if an exception gets out of it
        self.closed = True
        for rule in self._rules:
            rule.close()
        self._rules = []
        try:
            if not self._has_ended():
                try:
                    with FilesystemClient(self.socket_path, _CALL_LIMIT) as client:
                        client.quit()
                except StubfsError:
                    pass  # it ends just now, or does not answer: then it is killed
                if not self._wait_end(_END_LIMIT):
                    with suppress(ProcessLookupError):  # it has ended just now
                        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                    if not self._wait_end(_END_LIMIT):
                        raise StubfsError(
                            f"cannot end the file system on {self.path}: it hangs in the kernel",
                            "does what it serves hang?", errno_module.EBUSY,
                        )  # fmt: skip
            try:
                places.clear(self._place)
            except OSError as error:
                raise StubfsError(
                    f"cannot remove {self.path}: {reason(error)}", places.IN_THE_WAY, error.errno or errno_module.EIO
                ) from error
        finally:
            os.close(self._pidfd)
            os.close(self._log)


def _open_directory(path: PathLike) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StubfsError(
            f"cannot serve {path}: {reason(error)}", "give a directory", error.errno or errno_module.EIO
        ) from error
