"""A program with a time limit against one without, on a file server that hangs.

Run it with: pytest examples/testing/test_timeout.py
"""

from __future__ import annotations

import subprocess
import sys
from typing import Callable

from spfs.testing import DelayedMount

WITHOUT = "import sys; print(open(sys.argv[1]).read())"

# Who waits for a file server gets no signal but a fatal one. So a time limit means: somebody else does the waiting.
WITH = """
import subprocess, sys
try:
    print(subprocess.run(["cat", sys.argv[1]], capture_output=True, text=True, timeout=0.5).stdout)
except subprocess.TimeoutExpired:
    sys.exit("the file server does not answer")
"""


def start(program: str, path: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_time_limit(delayed_mount: Callable[..., DelayedMount]) -> None:
    mount = delayed_mount()
    path = mount.create_file("report.txt", "all is well")
    mount.hang(["open"])
    with start(WITHOUT, path) as without, start(WITH, path) as limited:
        mount.wait_held(2, operations=["open"])
        assert limited.communicate()[1] == "the file server does not answer\n" and limited.returncode == 1
        assert without.poll() is None and [request.pid for request in mount.held()] == [without.pid]
        mount.release()
        assert without.communicate()[0] == "all is well\n"
