"""What a delayed mount adds to a restore by CRIU: 10 and 1,000 open files, with and without; and making files in bulk.

``python -m benchmarks.criu [--json] [--rounds N]``. As root, where there is a CRIU (``tests/in-trixie ./bootstrap
python -m benchmarks.criu``). Medians, in milliseconds. Restored is a process that holds the files: by ``criu restore
-d`` onto a mount where they are; and onto a delayed mount by CRIU with our action script, whose manager it starts
("cold") or serves already ("warm", as one does that is run as a service). All are restores of one dump; the process is
killed in between. Beside them what a bare interpreter takes in the same run: the targets are those of an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, List

from rich.console import Console
from rich.table import Table

from spfs.client import ManagerClient
from spfs.criu import command
from spfs.criu.manager import WORK_DIR
from spfs.linux import mountapi
from spfs.managerstart import ManagerStart
from spfs.restore import FileSpec, Restore
from spfs.testing import process_state, wait_until

CASES = [(10, 150.0), (1000, 300.0)]  # files, milliseconds more that are meant to be enough
BULK = 1000
BULK_TARGET = 60.0
_HOLDER = """
import os, sys, time
os.closerange(3, 65536)
fds = [os.open(f"{sys.argv[1]}/{number}", os.O_RDWR) for number in range(int(sys.argv[2]))]
open(sys.argv[3], "w").close()
time.sleep(100000)
"""


class Case:
    """A process with ``files`` open files on a mount, dumped twice: what is restored must have been killed before."""

    def __init__(self, files: int, base: Path, stack: ExitStack) -> None:
        self.files = files
        self.mnt, self.images, self._real = base / "mnt", base / "images", base / "real"
        for path in (self.mnt, self.images, self._real):
            path.mkdir()
        mountapi.mount("benchmark", str(self._real), "tmpfs")
        stack.callback(mountapi.umount2, str(self._real), mountapi.MNT_DETACH)
        for number in range(files):
            (self._real / str(number)).write_bytes(b"x" * 100)
        self.script = base / "action"
        self.script.write_text(command.action_script())
        self.script.chmod(0o755)
        self.bind()
        stack.callback(self._unmount_all)
        ready = base / "ready"
        with subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(self.mnt), str(files), str(ready)], start_new_session=True, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as holder:  # fmt: skip
            wait_until(ready.exists, 60)
            self._run([
                sys.executable, "-m", "spfs.cli.criu", "dump", "-t", str(holder.pid), "-D", str(self.images),
                "--delayed", f"data={self.mnt},type=none,source={self._real},flags=4096",
            ])  # fmt: skip
        self.pid = holder.pid
        stack.callback(self._kill, self.pid)

    def bind(self) -> None:
        mountapi.mount(str(self._real), str(self.mnt), None, int(mountapi.MS.BIND))

    def unbind(self) -> None:
        mountapi.umount2(str(self.mnt), mountapi.MNT_DETACH)

    def _unmount_all(self) -> None:
        while os.stat(self.mnt).st_dev != os.stat(self.mnt.parent).st_dev:
            self.unbind()

    def restore(self, *options: str) -> float:
        begun = time.perf_counter()
        self._run(["criu", "restore", "-d", "-D", str(self.images), *options])
        return 1000 * (time.perf_counter() - begun)

    def plain(self) -> float:
        """Where the files are. Leaves nothing mounted."""
        taken = self.restore()
        self._kill(self.pid)
        self.unbind()
        return taken

    def delayed(self, keep: bool) -> float:
        """``keep``: the manager. Leaves the real mount on the path."""
        taken = self.restore("--action-script", str(self.script), "--file-validation", "filesize")
        with ManagerClient(f"{WORK_DIR}/control.sock", 60) as client:
            status = client.status()
            manager = status["manager"]["pid"]
            row = next(one for one in status["mounts"] if one["mountpoint"] == str(self.mnt))
            report = client.wait(row["id"], 60)["replace"]["report"]
            if report["left"]:
                raise AssertionError(f"not everything was moved: {report['left'][:3]}")
        self._kill(self.pid)
        if not keep:
            wait_until(lambda: process_state(manager) in ("", "Z"), 60, "the manager to end with its last mount")
        return taken

    @staticmethod
    def _run(arguments: List[str]) -> None:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            raise AssertionError(f"{' '.join(arguments)}: {done.returncode}: {done.stderr.decode()}")

    @staticmethod
    def _kill(pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        wait_until(lambda: not process_state(pid), 60, "the pid to be free again")


def measure(files: int, target: float, rounds: int) -> Dict[str, Any]:
    samples: Dict[str, List[float]] = {"plain": [], "cold": [], "warm": [], "interpreter": []}
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spfs-bench-criu-", dir="/run")))
        case = Case(files, base, stack)
        for _ in range(rounds):
            samples["plain"].append(case.plain())
            samples["interpreter"].append(_timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)))
            samples["cold"].append(case.delayed(keep=False))
        with _manager():
            for _ in range(rounds):
                case.plain()
                samples["warm"].append(case.delayed(keep=True))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    more = {f"{name} more": medians[name] - medians["plain"] for name in ("cold", "warm")}
    return {"files": files, **medians, **more, "target": target}


class _manager:
    """One that serves until told to end, where the action script looks for it."""

    def __enter__(self) -> None:
        ManagerStart(WORK_DIR, f"{WORK_DIR}/control.sock", exit_with_spfs=False).wait()

    def __exit__(self, *exception: object) -> None:
        with ManagerClient(f"{WORK_DIR}/control.sock", 60) as client:
            pid = client.status()["manager"]["pid"]
            client.shutdown(unmount=True, force=True)
        wait_until(lambda: process_state(pid) in ("", "Z"), 60)


def bulk(rounds: int) -> Dict[str, Any]:
    """Milliseconds to make BULK files through the staging directory."""
    samples: List[float] = []
    with ExitStack() as stack:
        base = stack.enter_context(tempfile.TemporaryDirectory(prefix="spfs-bench-criu-", dir="/run"))
        restore = stack.enter_context(Restore.start(os.path.join(base, "work")))
        for number in range(rounds):
            mountpoint = os.path.join(base, str(number))
            os.mkdir(mountpoint)
            restore.mount(str(number), mountpoint)
            stack.callback(restore.client.unmount, str(number), True)
            files = [FileSpec(f"d{one % 10}/{one}", 0o100644, 4096) for one in range(BULK)]
            samples.append(_timed(lambda: restore.create_files(str(number), files)))
    return {"files": BULK, "bulk": statistics.median(samples), "target": BULK_TARGET}


def _timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=5, help="restores of each kind (default: 5)")
    options = parser.parse_args()
    command.find()
    results = [measure(files, target, options.rounds) for files, target in CASES]
    made = bulk(options.rounds)
    if options.json:
        print(json.dumps({"restore": results, "creation": made}, indent=2))
        return 0
    table = Table(title="Restore by CRIU, medians, ms")
    for heading in ("files", "without", "delayed, cold", "more", "delayed, warm", "more", "target", "python"):
        table.add_column(heading, justify="right")
    for one in results:
        columns = ("plain", "cold", "cold more", "warm", "warm more", "target", "interpreter")
        table.add_row(str(one["files"]), *(f"{one[column]:.0f}" for column in columns))
    Console().print(table)
    print(f"{made['files']} files made in bulk: {made['bulk']:.1f} ms (target: {made['target']:.0f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
