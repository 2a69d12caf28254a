"""spfs: delayed mounts. The controller side: manager, client, replace step, restore helpers."""

from stubfs import __version__

__all__ = ["__version__"]
