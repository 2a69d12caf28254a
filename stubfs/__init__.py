"""stubfs: a FUSE file system that stands in for a mount which is not there yet.

It runs alone and knows nothing of managers; ``spfs`` drives it over its control socket.
"""

__version__ = "0.1.0"
