"""With strict, anything that cannot be moved ends the replace with everything as it was, whatever kind it is of."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Dict, List

import pytest
from replace_kit import Scene, scene
from surgery_kit import Victim

from spfs.errors import SpfsError

__all__ = ["scene"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_cgroup1]

IMPORTS = "import errno, fcntl, mmap, os, resource, select, signal, socket, threading"

# What a process does in restore mode that cannot be moved, the words of the refusal, and what makes it movable: of the
# process, or of the real side ("rm NAME", "touch NAME").
UNMOVABLE: Dict[str, List[str]] = {
    "a file that the real side lacks": [
        "missing = os.open('missing', os.O_RDWR | os.O_CREAT)", "there is no such file", "touch missing",
    ],
    "a directory that the real side lacks": [
        "os.mkdir('missing'); missing = os.open('missing', os.O_RDONLY)", "there is no such", "mkdir missing",
    ],
    "another type on the real side": [
        "os.mkdir('other'); other = os.open('other', os.O_RDONLY)", "it is a regular file there", "replace other",
    ],
    "a working directory that the real side lacks": [
        "os.mkdir('left'); os.chdir('left')", "there is no such", "os.chdir('/')",
    ],
    "a mapping that the real side lacks": [
        "m = os.open('mapped', os.O_RDWR | os.O_CREAT); os.ftruncate(m, 4096)\n"
        "mapped = mmap.mmap(m, 4096); os.close(m)",
        "there is no such file",
        "mapped.close()",
    ],
    "a listener that somebody waits for": [
        "s = socket.socket(socket.AF_UNIX); s.bind('socket'); s.listen(); w = socket.socket(socket.AF_UNIX);"
        "w.connect('socket')",
        "wait in it",
        "s.accept()[0].close(); w.close()",
    ],
    "a datagram that nobody has read": [
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind('socket'); s.sendto(b'x', 'socket')",
        "messages wait in it",
        "s.recv(9)",
    ],
    "an urgent byte in a connection": [
        "s = socket.socket(socket.AF_UNIX); s.bind('socket'); s.listen(); w = socket.socket(socket.AF_UNIX);"
        "w.connect('socket'); c = s.accept()[0]; w.send(b'!', socket.MSG_OOB)",
        "an urgent byte",
        "c.recv(1, socket.MSG_OOB)",
    ],
    "in flight to nobody": [
        "a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [file]); a.close()",
        "it is in flight in a socket",
        "b.close()",
    ],
    "a process without room for a descriptor": [
        "resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10)); extra = []\n"
        "try:\n while True: extra.append(os.dup(0))\nexcept OSError: pass",
        "Too many open files",
        "[os.close(fd) for fd in extra]; extra.clear()",
    ],
    "a process without room for memory": [
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))",
        "Cannot allocate memory",
        "resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1:] * 2)",
    ],
}


def everything(scene: Scene, *victims: Victim) -> Dict[str, Any]:
    """What the processes hold, what is mounted, and what is on the real side."""
    found: Dict[str, Any] = {"mounts": Path("/proc/self/mountinfo").read_text()}
    for victim in victims:
        proc = Path(f"/proc/{victim.pid}")
        held = {name: os.readlink(proc / "fd" / name) for name in sorted(os.listdir(proc / "fd"))}
        info = {name: (proc / "fdinfo" / name).read_text() for name in held}
        places = [os.readlink(proc / name) for name in ("cwd", "root", "exe")]
        found[str(victim.pid)] = held, info, places, (proc / "maps").read_text(), (proc / "limits").read_text()
        found[f"tasks of {victim.pid}"] = sorted(os.listdir(proc / "task"))
    for path in (scene.export, *sorted(scene.export.rglob("*"))):
        status = path.lstat()
        found[str(path)] = status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink
    return found


@pytest.mark.parametrize("kind", ["none", "v1"])
@pytest.mark.parametrize("what", list(UNMOVABLE))
def test_nothing_has_changed(scene: Scene, what: str, kind: str) -> None:
    make, words, unmake = UNMOVABLE[what]
    scene.delay()
    scene.file("file")
    scene.real_file("other", b"")
    victim, bystander = scene.victim(cwd=scene.mnt), scene.victim(cwd=scene.mnt)
    for one in (victim, bystander):
        one.run(f"{IMPORTS}; file = os.open('file', os.O_RDWR); os.lseek(file, 3, os.SEEK_SET)")
    victim.run(make)
    group = scene.cgroup(kind, victim.pid, bystander.pid)
    scene.client.mode("stub")
    before = everything(scene, victim, bystander)
    scene.ask(strict=True, freeze_cgroup=group)
    with pytest.raises(SpfsError) as caught:
        scene.wait()
    assert words in caught.value.message and f"of process {victim.pid}" in caught.value.message
    assert everything(scene, victim, bystander) == before
    scene.untouched()
    bystander.start("os.pread(file, 99, 0)")
    scene.held_by(bystander.pid)  # what is asked waits as before
    command, _, name = unmake.partition(" ")
    if command in ("touch", "mkdir", "replace"):
        path = scene.export / name
        path.unlink() if command == "replace" else None
        path.touch() if command == "touch" else path.mkdir()
        os.chmod(path, stat.S_IMODE(path.stat().st_mode) | 0o666)
    else:
        victim.run(unmake)
    assert scene.replace(strict=True, freeze_cgroup=group)["left"] == []
    assert bystander.result() == b"real contents"
    assert victim.run("os.read(file, 99)") == b"l contents"
    scene.replaced()
