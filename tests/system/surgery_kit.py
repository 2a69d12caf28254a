"""Two file systems, processes that do what they are told, and a switch between the two."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import pytest

from spfs.freezer import Freezer, NoFreezer
from spfs.references import MountRoot, Remains
from spfs.surgery.bulk import objects
from spfs.switch import Preparation, Switch, SwitchReport
from spfs.testing import process_state, wait_until

SERVE = r"""
import ast, json, sys
names = {}
for line in sys.stdin:
    try:
        tree = ast.parse(json.loads(line))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<told>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<told>", "eval"), names) if last else None
        print(json.dumps(["value", repr(value)]), flush=True)
    except BaseException as error:
        print(json.dumps(["error", repr(error)]), flush=True)
"""


class Victim:
    """A Python process that runs the statements it is sent; the value of a last expression comes back."""

    def __init__(self, prefix: Sequence[str] = (), **options: Any) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, statements: str) -> None:
        """Send without waiting for the answer, for what blocks."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(statements) + "\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the victim has ended: {self.process.wait()}"
        kind, text = json.loads(line)
        assert kind == "value", text
        return ast.literal_eval(text)

    def run(self, statements: str) -> Any:
        self.start(statements)
        return self.result()

    def blocked(self) -> None:
        """Wait until it sleeps."""
        wait_until(lambda: process_state(self.pid) == "S" and self._in_call(), what="the victim to block")

    def _in_call(self) -> bool:
        call = Path(f"/proc/{self.pid}/syscall").read_text()
        # Not in the read(0, ...) in which it waits to be told.
        return not call.startswith(("running", "0 0x0 "))

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
        self.process.kill()
        self.process.wait()


class Tree:
    """Resolves inode numbers by a walk through the whole tree at ``top``, whatever is mounted over it by then."""

    def __init__(self, top: Path) -> None:
        self._top = top

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        names = {self._top.stat().st_ino: ""}
        names.update({path.lstat().st_ino: str(path.relative_to(self._top)) for path in self._top.rglob("*")})
        return {node: names.get(node) for node in nodes}

    def remains(self, nodes: Iterable[int]) -> Dict[int, Remains]:
        return {}


class Mounts:
    """Two mounts of ``fstype``, ``old`` and ``new``."""

    def __init__(self, directory: Path, fstype: str = "tmpfs", options: str = "mode=777") -> None:
        self.old, self.new = directory / "old", directory / "new"
        for path in (self.old, self.new):
            path.mkdir()
            subprocess.run(["mount", "-t", fstype, "-o", options, "test", str(path)], check=True)
        self._kept: Dict[Path, int] = {}
        self.device = self.old.stat().st_dev

    def close(self) -> None:
        for root in self._kept.values():
            os.close(root)
        for path in (self.old, self.new):
            subprocess.run(["umount", "-l", str(path)], check=True)

    def reverse(self) -> None:
        """The new one is the old one from here on."""
        self.old, self.new = self.new, self.old
        self.device = self.old.stat().st_dev

    def file(self, name: str, old: bytes = b"old contents", new: Optional[bytes] = b"new contents") -> str:
        """A file on both; its path on the old one."""
        (self.old / name).write_bytes(old)
        (self.old / name).chmod(0o666)
        if new is not None:
            (self.new / name).write_bytes(new)
            (self.new / name).chmod(0o666)
        return str(self.old / name)

    def both(self, make: Callable[[Path], object]) -> None:
        make(self.old)
        make(self.new)

    def switch(self, **options: Any) -> SwitchReport:
        return self.prepared_switch(**options)[1]

    def prepared_switch(
        self,
        freezer: Optional[Freezer] = None,
        between: Callable[[], None] = lambda: None,
        when_stopped: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> "tuple[Preparation, SwitchReport]":
        """The whole switch; ``between`` is called after prepare, ``when_stopped`` while all stand still."""
        roots = {path: self._kept.get(path, -1) for path in (self.old, self.new)}
        opened = {path: os.open(path, os.O_PATH) for path, root in roots.items() if root < 0}
        roots.update(opened)
        try:
            new, tree = MountRoot(roots[self.new]), Tree(Path(f"/proc/self/fd/{roots[self.old]}"))
            with Switch(self.device, tree, lambda mount: new, freezer or NoFreezer(), **options) as switch:
                preparation = switch.prepare()
                between()
                report = switch.execute(when_stopped)
            return preparation, report
        finally:
            for root in opened.values():
                os.close(root)

    def keep_roots(self) -> None:
        """Before something is mounted over them. Whoever else moves something has us for one of their users then."""
        self._kept = self._kept or {path: os.open(path, os.O_PATH) for path in (self.old, self.new)}

    def users(self) -> List[int]:
        """Who still holds something of the old mount, by what /proc shows (and no file system is asked)."""
        device, found = self.device, []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            on_it = [thing for thing in objects(list(_links(pid))) if thing is not None and thing.device == device]
            if pid != os.getpid() and (on_it or _maps(pid, device)):
                found.append(pid)
        return found


def _links(pid: int) -> Iterator[str]:
    yield from (f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe"))
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            yield f"/proc/{tid}/cwd"
            yield from (f"/proc/{tid}/fd/{name}" for name in os.listdir(f"/proc/{tid}/fd"))
    except OSError:
        pass


def _maps(pid: int, device: int) -> bool:
    try:
        return f" {os.major(device):02x}:{os.minor(device):02x} " in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()


@pytest.fixture
def victim() -> Iterator[Victim]:
    victim = Victim()
    victim.run("import ctypes, fcntl, mmap, os, select, signal, socket, struct, sys, threading, time")
    yield victim
    victim.close()


def tasks_stopped(pid: int) -> List[str]:
    """The states of a process's tasks that are neither running nor sleeping."""
    states = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        data = Path(f"/proc/{pid}/task/{tid}/stat").read_bytes()
        states.append(chr(data[data.rindex(b")") + 2]))
    return [state for state in states if state not in "RSD"]


@contextmanager
def traced(pid: int) -> Iterator[int]:
    """By another process, whose pid is given."""
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from spfs.linux import ptrace; ptrace.seize({pid}, 0); print('on', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as tracer:
        assert tracer.stdout is not None and tracer.stdout.readline() == "on\n"
        yield tracer.pid
        tracer.communicate("\n")


COMPILER_FLAGS = ["-O1", "-Wall", "-Werror"]


def compile_c(directory: Path, source: str, *flags: str) -> str:
    """A program from C source; its path."""
    path = directory / "program"
    (directory / "program.c").write_text(source)
    subprocess.run(
        ["cc", *COMPILER_FLAGS, *flags, "-o", str(path), str(directory / "program.c")], check=True
    )
    return str(path)
