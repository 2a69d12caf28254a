"""stubfs: a FUSE file system that stands in for a mount which is not there yet.

It runs alone and knows nothing of managers; ``spfs`` drives it over its control socket. For scripts: ``stubfs.mount``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stubfs.mounted import Mount as Mount
    from stubfs.mounted import mount as mount

__all__ = ["Mount", "__version__", "mount"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # What the command itself has no use for is not imported at its start.
    if name in ("mount", "Mount"):
        from stubfs import mounted

        return getattr(mounted, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
