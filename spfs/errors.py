"""The errors a user of spfs can meet: the same shape as stubfs', so that one handler serves both.

Below the domain modules everything raises OSError; see ``stubfs.errors``.
"""

from __future__ import annotations

from stubfs.errors import MissingFeatureError, StubfsError, UsageError, reason

__all__ = ["MissingFeatureError", "SpfsError", "UsageError", "reason"]


class SpfsError(StubfsError):
    """Base of the controller side's errors: message, hint, errno, exit_code."""
