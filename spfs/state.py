"""The manager's work directory: its lock, and what a manager started on it later needs, as JSON files."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
from typing import Any, Dict, Iterator, Optional, Tuple

from spfs.errors import SpfsError, reason

log = logging.getLogger(__name__)

VERSION = 1
_LOCK = "lock"
# The directory may be one that somebody keeps other things in: nothing but these is read, or removed.
_RECORD = re.compile(r"mount-\d+\.json")
_OURS = re.compile(r"lock|mount-\d+(\.json(\.new)?|\.result(\.new)?|-[0-9T]+-\d+\.jsonl)")
_LOG = re.compile(r"(spfs-manager|stubfs-\d+)\.log")


def write_atomically(path: str, data: bytes, mode: int = 0o600) -> None:
    """Whoever reads ``path`` sees the old contents or the new, also after a crash. ``mode``: whatever the umask is."""
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


class WorkDirectory:
    """A directory of one manager's own, locked for as long as the object (or its process) lives."""

    def __init__(self, path: str) -> None:
        """SpfsError: not a directory, somebody else's, or another manager works in it."""
        self.path = path
        self.created = False
        try:
            try:
                self._make(path)
            except FileExistsError:
                pass
            status = os.stat(path)
            if status.st_uid != os.geteuid():
                raise SpfsError(
                    f"cannot use the work directory {path}: it belongs to uid {status.st_uid}",
                    "choose another: --work-dir",
                    errno.EPERM,
                )
            if self.created is False and status.st_mode & 0o022:
                raise SpfsError(
                    f"cannot use the work directory {path}: others may write to it", f"chmod go-w {path}", errno.EPERM
                )
            self._lock = self._take_lock()
            try:
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            except OSError:
                self.close(remove=not any(True for _ in self.load()))
                raise
        except OSError as error:
            raise SpfsError(
                f"cannot use the work directory {path}: {reason(error)}",
                "choose another: --work-dir",
                error.errno or errno.EIO,
            ) from error

    def _make(self, path: str) -> None:
        parent = os.path.dirname(path)
        if not os.path.isdir(parent):
            os.makedirs(parent, 0o755)
        os.mkdir(path, 0o700)
        self.created = True

    def _take_lock(self) -> int:
        while True:
            fd = os.open(self.file(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(self.file(_LOCK))):
                    return fd
            except FileNotFoundError:
                pass  # a manager that ended took its lock file with it, between our open and our lock
            except BlockingIOError as error:
                owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
                os.close(fd)
                raise SpfsError(
                    f"cannot use the work directory {self.path}: the manager with pid {owner or 'unknown'} works in it",
                    "use that one, or choose another: --work-dir",
                    errno.EBUSY,
                ) from error
            os.close(fd)

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def save(self, name: str, record: Dict[str, Any]) -> None:
        write_atomically(self.file(f"{name}.json"), json.dumps({"version": VERSION, **record}).encode())

    def load(self) -> Iterator[Tuple[str, Dict[str, Any]]]:
        """(name, record) of everything saved; what cannot be read is logged and left alone."""
        for entry in sorted(os.listdir(self.path)):
            if not _RECORD.fullmatch(entry):
                continue
            record = self.read(entry)
            if record is not None and record.pop("version", None) == VERSION:
                yield entry[: -len(".json")], record
            else:
                log.error("cannot take over %s: not a record of this version", self.file(entry))

    def read(self, name: str) -> Optional[Dict[str, Any]]:
        """The JSON object in the file ``name``; None if there is none."""
        try:
            with open(self.file(name), "rb") as file:
                record = json.loads(file.read())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.error("cannot read %s: %s", self.file(name), error)
            return None
        return record if isinstance(record, dict) else None

    def forget(self, *names: str) -> None:
        for name in names:
            try:
                os.unlink(self.file(name))
            except FileNotFoundError:
                pass

    def forget_directory(self, name: str) -> None:
        """Remove the empty directory ``name``, if there is one."""
        try:
            os.rmdir(self.file(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            log.error("cannot remove %s: %s", self.file(name), reason(error))

    def _is_empty_log(self, name: str) -> bool:
        return bool(_LOG.fullmatch(name)) and os.lstat(self.file(name)).st_size == 0

    def close(self, remove: bool) -> None:
        """Unlock. ``remove``: nothing is left that a later manager needs; our own files go, and the directory if we
        made it and nothing else (a log) is in it."""
        if remove:
            # The lock file goes while it is locked: whoever opened it before finds another one at the name.
            for entry in os.listdir(self.path):
                if _OURS.fullmatch(entry) or self._is_empty_log(entry):
                    self.forget(entry)
            if self.created:
                try:
                    os.rmdir(self.path)
                except OSError:
                    pass
        os.close(self._lock)
