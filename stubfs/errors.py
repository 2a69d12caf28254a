"""The errors a user of stubfs can meet.

Below this line everything raises OSError; what reaches a user is one of these, with what failed, on what,
why, and in ``hint`` what to do. Only the command line turns them into an exit status.
"""

from __future__ import annotations

import errno as _errno
from typing import Any, Dict, Mapping, Optional


def printable(text: str) -> str:
    """On one line of any terminal: names may hold newlines, and bytes that are no characters."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


class StubfsError(Exception):
    """Base of the package's errors.

    ``message`` says what failed, on what and why; ``hint`` what to do about it (may be empty); ``errno`` is the
    number that goes over a socket; ``exit_code`` what a command ends with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", errno: int = _errno.EINVAL) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.errno = errno

    def __str__(self) -> str:
        return printable(f"{self.message} ({self.hint})" if self.hint else self.message)


class UsageError(StubfsError):
    """A command line or a request that cannot be understood; nothing was changed."""

    exit_code = 2


class MissingFeatureError(StubfsError):
    """The machine lacks something (libfuse, /dev/fuse, rights)."""

    exit_code = 3


def to_data(error: StubfsError) -> Dict[str, Any]:
    """For the way to another process."""
    return {"message": error.message, "hint": error.hint, "errno": error.errno, "exit_code": error.exit_code}


def from_data(data: Mapping[str, Any]) -> StubfsError:
    """What to_data was given, of the same kind."""
    kinds = {kind.exit_code: kind for kind in (UsageError, MissingFeatureError)}
    return kinds.get(data["exit_code"], StubfsError)(data["message"], data["hint"], data["errno"])


def reason(error: Optional[BaseException]) -> str:
    """The short text of an error for the "why" part of a message: strerror for OSError, else str()."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if error is not None else ""
