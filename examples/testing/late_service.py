"""A service that is restarted while its mount is late, without pytest: python examples/testing/late_service.py

The service reads its configuration from the mount. It must come up when the server does, with the server's
configuration, and neither give up before nor run with nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator

from spfs.testing import delayed_mount

SERVICE = """
import signal, sys
with open(sys.argv[1]) as file:
    print("running with", file.read(), flush=True)
signal.pause()
"""


def service(configuration: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", SERVICE, str(configuration)], stdout=subprocess.PIPE, text=True)


def restarts(server: Path) -> Iterator[str]:
    """What happens, a line for each step; AssertionError for what should not."""
    with delayed_mount(server) as mount:
        for version in ("version 1", "version 2"):
            mount.stub()
            process = service(mount.path / "service.conf")
            try:
                (held,) = mount.wait_held()
                assert held.pid == process.pid and process.poll() is None
                yield f"the mount is late, and the service waits: {held.operation} of {held.name}"
                (server / "service.conf").write_text(version)
                mount.proxy(server)
                assert process.stdout is not None
                line = process.stdout.readline().strip()
                assert line == f"running with {version}", line
                yield f"the mount is there: {line}"
            finally:
                process.kill()
                process.communicate()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for line in restarts(Path(directory)):
            print(line)


if __name__ == "__main__":
    main()
