"""A delayed mount from end to end: what spfs is for, with real processes that check every byte.

    python examples/delayed_mount.py
    python examples/delayed_mount.py --source server:/export --type nfs4 --options vers=4.2

Needs root. Without --source the real file system is a tmpfs that is made here, late. With it, the example makes the
files it needs on that file system once it has been mounted in the stand-in's place, beneath a directory of its own.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))
import workload  # noqa: E402

from spfs.client import ManagerClient  # noqa: E402
from spfs.errors import SpfsError  # noqa: E402
from spfs.linux import mountapi  # noqa: E402
from spfs.restore import FileSpec, Restore  # noqa: E402
from spfs.testing import MARK, snapshot, wait_until  # noqa: E402
from stubfs.errors import StubfsError  # noqa: E402

NOBODY = 65534
ID = "example"
BEGIN = time.monotonic()


def say(step: str) -> None:
    print(f"{time.monotonic() - BEGIN:7.3f} s  {step}", flush=True)


class Application:
    """The processes of the workload, each a child of ours with a pipe to its standard input and output."""

    def __init__(self, directory: str) -> None:
        self.processes: Dict[str, subprocess.Popen[str]] = {}
        for role in workload.ROLES:
            # The resident is an ordinary user: nothing may depend on the rights of root.
            user = [str(NOBODY)] if role == "resident" else []
            self.processes[role] = subprocess.Popen(
                [sys.executable, workload.__file__, role, directory, *user],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

    def expect(self, line: str) -> None:
        for role, process in self.processes.items():
            assert process.stdout is not None
            if process.stdout.readline().strip() != line:
                raise SystemExit(f"the {role} did not start")

    def users(self) -> List[int]:
        """The processes that need the file system in every step. Not the fifo's: its queue is in the kernel."""
        return [process.pid for role, process in self.processes.items() if role != "queue"]

    def tell(self, word: str) -> None:
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()

    def reports(self) -> Dict[str, Dict[str, Any]]:
        return {role: json.loads(process.communicate()[0]) for role, process in self.processes.items()}

    def close(self) -> None:
        for process in self.processes.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its forked children, too
            except ProcessLookupError:
                pass
            process.communicate()


class Server:
    """The real file system: a tmpfs of ours that comes late, or the one that the user named."""

    def __init__(self, arguments: argparse.Namespace, work: str) -> None:
        self.embedded = arguments.source is None
        self.source: str = arguments.source or f"{work}/server/export"
        self.fstype: str = arguments.type or "none"
        self.options: str = arguments.options
        self.flags = 0 if arguments.source else int(mountapi.MS.BIND)
        self.place = f"{work}/server"
        self._prepared: bool = arguments.prepared
        os.mkdir(self.place)

    def prepare(self) -> None:
        """Put the files there; the embedded server is not to be seen yet, a real one is left as it was mounted."""
        if self.embedded or self._prepared:
            return
        with tempfile.TemporaryDirectory() as directory:
            command = ["mount", "-t", self.fstype, self.source, directory]
            subprocess.run(command + (["-o", self.options] if self.options else []), check=True)
            try:
                fill(directory)
            finally:
                subprocess.run(["umount", directory], check=True)

    def come(self) -> None:
        """The embedded server's contents appear in one moment, as those of a server that has been started."""
        if not self.embedded:
            return
        fs = mountapi.fsopen("tmpfs")
        mountapi.fsconfig(fs, mountapi.FsConfig.CMD_CREATE)
        mount = mountapi.fsmount(fs)
        os.mkdir("export", dir_fd=mount)
        fill(f"/proc/self/fd/{mount}/export")
        mountapi.move_mount(mount, mountapi.AT_FDCWD, self.place)
        os.close(mount)
        os.close(fs)

    def close(self) -> None:
        if os.path.ismount(self.place):
            mountapi.umount2(self.place, mountapi.MNT_DETACH)


def fill(directory: str) -> None:
    """The layout of the workload with its contents."""
    top = Path(directory, "application")
    if top.exists():
        shutil.rmtree(top)
    top.mkdir()
    for name, size in workload.LAYOUT.items():
        path = top / name
        if size is None:
            path.mkdir()
        elif size == -1:
            os.mkfifo(path)
        else:
            contents = {"records": workload.records(), "etc/deep/item": workload.record(7)}
            path.write_bytes(contents.get(name) or bytes(size))
        path.chmod(0o777)


def scaffold() -> List[FileSpec]:
    """What the processes must find before the real file system is there: names, types and sizes, but no contents."""
    files = []
    for name, size in workload.LAYOUT.items():
        kind = stat.S_IFDIR if size is None else stat.S_IFIFO if size == -1 else stat.S_IFREG
        files.append(FileSpec(f"application/{name}", kind | 0o777, size if kind == stat.S_IFREG else None))
    return files


def make_cgroup(kind: str) -> Optional[str]:
    """A cgroup that can be frozen, for the processes; None if there is none, or none is wanted."""
    places = {"v1": "/sys/fs/cgroup/freezer", "v2": "/sys/fs/cgroup/unified", "pure v2": "/sys/fs/cgroup"}
    for name, place in places.items():
        marks = ("cgroup.procs",) if "v2" in name else ("cgroup.procs", "tasks")
        if kind in ("auto", name[-2:]) and all(os.path.exists(f"{place}/{mark}") for mark in marks):
            path = f"{place}/spfs-example-{os.getpid()}"
            os.mkdir(path)
            return path
    if kind in ("auto", "none"):
        return None
    raise SystemExit(f"there is no cgroup {kind} freezer on this machine (--freezer none does without)")


def check_log(directory: str, reports: Dict[str, Dict[str, Any]]) -> None:
    """Every line that was appended is in the real file, in order, and nothing else."""
    lines = Path(directory, "log").read_bytes().splitlines()
    for name, count in reports["appender"]["appended"].items():
        found = [line for line in lines if line.startswith(name.encode() + b" ")]
        if found != [f"{name} {number}".encode() for number in range(count)]:
            reports["appender"]["wrong"].append(f"of {count} lines of the {name}, {len(found)} are in the file")
    if len(lines) != sum(reports["appender"]["appended"].values()):
        reports["appender"]["wrong"].append("lines in the file that nobody wrote")


def show(report: Dict[str, Any]) -> None:
    moved = ", ".join(f"{count} {kind}" for kind, count in sorted(report["moved"].items()))
    print(f"             moved: {report['mounts']} mount, and of {len(report['processes'])} processes: {moved}")
    for reference in report["left"]:
        print(f"             left: {reference['what']} of process {reference['pid']}: {reference['reason']}")
    stages = ", ".join(f"{name} {seconds * 1000:.1f}" for name, seconds in report["stages"].items())
    print(f"             blackout: {report['blackout'] * 1000:.1f} ms ({stages})", flush=True)


def mounted_at(path: str) -> List[str]:
    """The types of the file systems that are mounted there, the visible one last."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.partition(" - ")[2].split()[0] for line in lines if line.split()[4] == path]


def run(arguments: argparse.Namespace, work: str, cleanup: ExitStack) -> int:
    mountpoint = f"{work}/mnt"
    os.mkdir(mountpoint)
    server = Server(arguments, work)
    cleanup.callback(server.close)
    server.prepare()

    restore = cleanup.enter_context(Restore.start(f"{work}/manager"))
    client = restore.client
    cleanup.callback(take_away, client)
    say("manager started")
    restore.mount(ID, mountpoint)
    say(f"restore: a FUSE mount is on {mountpoint}, in the place of {server.source}")
    restore.create_files(ID, scaffold())
    say(f"restore: {len(workload.LAYOUT)} directories, files and a fifo created on it")

    application = Application(f"{mountpoint}/application")
    cleanup.callback(application.close)
    application.expect("ready")
    cgroup = make_cgroup(arguments.freezer)
    if cgroup is not None:
        cleanup.callback(remove_cgroup, cgroup)
        for process in application.processes.values():
            Path(cgroup, "cgroup.procs").write_text(str(process.pid))
    say(f"restore: {len(application.processes)} processes have opened, mapped and entered them; freezer: {cgroup}")

    restore.stub()
    application.tell("go")
    held = wait_until(lambda: everybody_waits(client, application), 20, "every process waits")
    say(f"stub: they work, and wait: {len(held)} requests are held, for instance")
    for request in held[:5]:
        # Readahead is the kernel's own: it names no process.
        who = f"process {request['pid']}" if request["pid"] else "the kernel, for a page that a process wants,"
        print(f"             {who} waits in {request['operation']} of {request['path'] or '/'}")

    restore.request_replace(
        ID, server.source, server.fstype, server.flags, server.options, freeze_cgroup=cgroup, begin="release"
    )
    if server.embedded:
        wait_until(lambda: attempts(client) >= 3, 20, "three attempts to mount")
        say(f"mount: the server is late: {attempts(client)} attempts have failed: {last_error(client)}")
        server.come()
        say("mount: the real file system is there")
    report = client.wait(ID, timeout=arguments.timeout)["replace"]["report"]
    cleanup.callback(mountapi.umount2, mountpoint, mountapi.MNT_DETACH)
    say("proxy: the held requests went on, with the real contents")
    say("replace: the mount, and all that the processes hold on it, are the real file system's now")
    show(report)
    kinds = mounted_at(mountpoint)
    say(f"FUSE is gone: on {mountpoint} is {' and '.join(kinds)}; its process has ended: {report['ended']}")
    time.sleep(1)
    application.tell("stop")
    reports = application.reports()
    check_log(f"{mountpoint}/application", reports)
    say("the processes ran on for a second, and have ended; what they saw:")
    for role, seen in reports.items():
        wrong = "; ".join(seen["wrong"]) or "nothing wrong"
        print(f"             {role:9} {seen['operations']:7} operations, longest {seen['longest']:.3f} s: {wrong}")
    ok = not any(seen["wrong"] for seen in reports.values()) and not report["left"]
    return 0 if ok and report["ended"] and len(kinds) == 1 and "fuse.stubfs" not in kinds else 1


def everybody_waits(client: ManagerClient, application: Application) -> List[Dict[str, Any]]:
    """The held requests, once all processes that need the file system wait for it; else nothing."""
    held = client.held(ID)
    waiting = {request["pid"] for request in held}
    return held if all(pid in waiting or waits_for_page(pid) for pid in application.users()) else []


def waits_for_page(pid: int) -> bool:
    """Pages are read ahead in the kernel's name, so that a request does not tell who waits for one."""
    tasks = [f"/proc/{pid}/task/{tid}/stat" for tid in os.listdir(f"/proc/{pid}/task")]
    return any(Path(stat).read_bytes().rpartition(b")")[2].split()[0] == b"D" for stat in tasks)


def attempts(client: ManagerClient) -> int:
    return int(client.status(ID)["mounts"][0]["replace"]["attempts"])


def last_error(client: ManagerClient) -> str:
    return str(client.status(ID)["mounts"][0]["replace"]["last_attempts"][-1]["error"])


def take_away(client: ManagerClient) -> None:
    """Whatever happened: no mount and no manager stays."""
    try:
        client.unmount(force=True)
        client.shutdown(unmount=True)
    except SpfsError as error:
        # The usual case: with --exit-with-spfs it has ended after its last mount.
        if error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE):
            raise


def remove_cgroup(path: str) -> None:
    wait_until(lambda: not Path(path, "cgroup.procs").read_text(), 5, "empty cgroup")
    os.rmdir(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="A delayed mount from end to end.")
    parser.add_argument("--source", help="the real file system, as in mount(8); default: a tmpfs made by the example")
    parser.add_argument("--type", help="its type, for instance nfs4")
    parser.add_argument("--options", default="", help="its mount options")
    parser.add_argument("--prepared", action="store_true", help="the files are on it already (see --prepare)")
    parser.add_argument("--prepare", metavar="DIR", help="only put the files into DIR, of that file system")
    parser.add_argument("--freezer", choices=("auto", "v1", "v2", "none"), default="auto")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for the real file system")
    arguments = parser.parse_args()
    if bool(arguments.source) != bool(arguments.type):
        parser.error("--source and --type go together")
    if arguments.prepare:
        fill(arguments.prepare)
        return 0
    if os.geteuid() != 0:
        print("delayed_mount: must be run as root: it mounts, and moves files of other users", file=sys.stderr)
        return 3

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that whatever ends us, everything is taken away
    work = tempfile.mkdtemp(prefix="spfs-example-")
    os.chmod(work, 0o711)  # one of the processes is not root
    os.environ[MARK] = work
    before = snapshot(work, work)
    try:
        with ExitStack() as cleanup:
            status = run(arguments, work, cleanup)
        wait_until(lambda: not snapshot(work, work).added_since(before), 10, "everything gone")
    except TimeoutError:
        print("left behind:", *snapshot(work, work).added_since(before), sep="\n  ", file=sys.stderr)
        return 1
    except StubfsError as error:
        print(f"delayed_mount: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if not any(os.path.ismount(f"{work}/{name}") for name in ("mnt", "server")):
            shutil.rmtree(work)
    say("nothing is left behind: no process, mount, cgroup, file or descriptor")
    return status


if __name__ == "__main__":
    sys.exit(main())
