"""The kit for tests of programs on mounts that are late, slow, broken or hang. It needs no pytest.

``delayed_mount`` makes one mount, a ``MountServer`` several; ``DelayedMount`` is what a test works with. The pytest
plugin (``spfs.pytest_plugin``) has them as fixtures. The rest is what tests of all sorts need: ``wait_until``,
``process_state``, and ``snapshot`` for what is left behind. Nothing here is used by the manager or the file system.
"""

from spfs.testing.delayed import DelayedMount, RuleInForce
from spfs.testing.leftovers import MARK, Snapshot, snapshot
from spfs.testing.server import MountServer, delayed_mount
from spfs.testing.waiting import process_state, wait_until
from stubfs.errors import MissingFeatureError, StubfsError
from stubfs.messages import HeldRequest

__all__ = [
    "MARK", "DelayedMount", "HeldRequest", "MissingFeatureError", "MountServer", "RuleInForce", "Snapshot",
    "StubfsError", "delayed_mount", "process_state", "snapshot", "wait_until",
]  # fmt: skip
