"""Everything that CRIU restores, restored onto a delayed mount and replaced: the same as with an undisturbed twin.

The twin does the same on a directory of its own, and is neither dumped nor restored. What both say must be equal.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

import pytest
from criu_kit import Subject, World, world

__all__ = ["world"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.needs_ptrace, pytest.mark.needs_criu]


@dataclass(frozen=True)
class Kind:
    """``setup``: statements before the dump; ``report``: statements after the replace, the last one an expression.
    ``top``: the mount. ``left``: kinds of references that may stay on the stand-in, working. ``after``: the report is
    asked for when the replace is done, for what is seen of the server before."""

    setup: str
    report: str
    left: Tuple[str, ...] = ()
    after: bool = False


STATE = """
def state(fd):
    try:
        fd.fileno
        fd = fd.fileno()
    except AttributeError:
        pass
    lines = dict(line.split(":", 1) for line in open(f"/proc/self/fdinfo/{fd}") if ":" in line)
    # CRIU 4.1 restores directories without O_DIRECTORY, on any file system.
    position = os.lseek(fd, 0, 1) if stat.S_ISREG(os.fstat(fd).st_mode) else 0
    return position, oct(int(lines["flags"], 8) & ~os.O_DIRECTORY)

def tell(fd, size=100):
    here = os.lseek(fd, 0, 1)
    return here, os.pread(fd, size, 0), os.read(fd, size), oct(os.fstat(fd).st_mode), os.fstat(fd).st_nlink
"""

KINDS = {
    "files": Kind(
        """
        open(top + "/file", "wb").write(b"0123456789" * 500)
        open(top + "/log", "wb").write(b"begin:")
        os.mkdir(top + "/a"); os.mkdir(top + "/a/b c")
        open(top + "/a/b c/\\u00fc", "wb").write(b"umlaut")
        r = os.open(top + "/file", os.O_RDONLY | os.O_NOATIME); os.lseek(r, 4998, 0)
        w = os.open(top + "/file", os.O_WRONLY | os.O_DSYNC); os.lseek(w, 17, 0)
        a = os.open(top + "/log", os.O_WRONLY | os.O_APPEND)
        n = os.open(top + "/a/b c/\\u00fc", os.O_RDWR | os.O_NONBLOCK); os.set_inheritable(n, True)
        x = os.open(top + "/new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_TRUNC, 0o640)
        os.write(x, b"x" * 70000)
        t = os.open(top + "/file", os.O_PATH)
        fds = [r, w, a, n, x]
        """,
        """
        before = [state(fd) for fd in fds]
        os.write(w, b"here"), os.write(a, b"end"), os.write(n, b"UM"), os.write(x, b"tail")
        (before, [state(fd) for fd in fds], os.readlink(f"/proc/self/fd/{t}") == top + "/file",
         os.read(r, 10), os.pread(n, 10, 0), os.pread(x, 10, 69998),
         open(top + "/file", "rb").read()[:30], open(top + "/log", "rb").read(), os.get_inheritable(n),
         [oct(os.fstat(fd).st_mode) for fd in fds])
        """,
    ),
    "descriptions shared": Kind(
        """
        open(top + "/file", "wb").write(b"0123456789")
        fd = os.open(top + "/file", os.O_RDWR); two = os.dup(fd); other = os.open(top + "/file", os.O_RDWR)
        """,
        """
        os.lseek(fd, 3, 0)
        state(fd), state(two), state(other)
        """,
    ),
    "directories": Kind(
        """
        os.mkdir(top + "/d", 0o711); os.mkdir(top + "/d/e"); open(top + "/d/f", "w").write("f")
        fd = os.open(top + "/d", os.O_RDONLY | os.O_DIRECTORY); root = os.open(top, os.O_RDONLY)
        os.chdir(top + "/d/e")
        """,
        """
        (sorted(os.listdir(fd)), sorted(os.listdir(root)), os.path.relpath(os.getcwd(), top), state(fd),
         oct(os.stat(".").st_mode), os.listdir("."), open("../f").read(), oct(os.fstat(root).st_mode))
        """,
    ),
    "the root as working directory": Kind(
        "os.chmod(top, 0o750); open(top + '/f', 'w').write('f'); os.chdir(top)",
        "os.getcwd() == top, open('f').read(), oct(os.stat('.').st_mode), os.listdir('.')",
    ),
    "fifos": Kind(
        """
        os.mkfifo(top + "/fifo", 0o622); os.mkfifo(top + "/empty")
        both = os.open(top + "/fifo", os.O_RDWR); os.write(both, b"in the fifo" * 300)
        reader = os.open(top + "/empty", os.O_RDONLY | os.O_NONBLOCK); writer = os.open(top + "/empty", os.O_WRONLY)
        """,
        """
        os.write(both, b"!"); os.write(writer, b"through")
        os.read(both, 10000), os.read(reader, 100), state(both), state(reader), oct(os.fstat(both).st_mode)
        """,
    ),
    "mappings": Kind(
        """
        import mmap
        open(top + "/m", "wb").write(bytes(range(256)) * 64); open(top + "/p", "wb").write(b"private." * 2048)
        def mapped(name, **how):
            with open(top + "/" + name, "r+b") as file:
                return mmap.mmap(file.fileno(), 0, **how)
        shared = mapped("m"); shared[5000] = 1; shared[0] = 77
        private = mapped("p", flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        private[4096:4100] = b"MINE"
        reading = mapped("m", flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        """,
        """
        shared[9000] = 99
        file = open(top + "/p", "r+b"); file.seek(8192); file.write(b"changed"); file.flush()
        (shared[:], private[:], reading[:] == shared[:], open(top + "/m", "rb").read() == shared[:],
         open(top + "/p", "rb").read()[4090:4110])
        """,
    ),
    "unlinked files": Kind(
        """
        os.mkdir(top + "/d")
        gone = os.open(top + "/d/gone", os.O_RDWR | os.O_CREAT); os.write(gone, b"without a name"); os.lseek(gone, 3, 0)
        os.unlink(top + "/d/gone")
        """,
        "(tell(gone), os.write(gone, b'more'), os.pread(gone, 100, 0), os.listdir(top + '/d'))",
    ),
    "unlinked files with another name": Kind(
        """
        fd = os.open(top + "/name", os.O_RDWR | os.O_CREAT); os.write(fd, b"linked"); os.lseek(fd, 2, 0)
        os.link(top + "/name", top + "/other"); os.unlink(top + "/name")
        """,
        "(tell(fd), os.pwrite(fd, b'L', 0), open(top + '/other', 'rb').read(), os.listdir(top))",
        after=True,  # CRIU's name for it, link_remap.N, is removed from the server in the end
    ),
    "locks": Kind(
        """
        import fcntl
        open(top + "/flock", "w").write("x" * 100); open(top + "/posix", "w").write("x" * 100)
        f, p = os.open(top + "/flock", os.O_RDWR), os.open(top + "/posix", os.O_RDWR)
        fcntl.flock(f, fcntl.LOCK_EX)
        fcntl.lockf(p, fcntl.LOCK_EX, 10, 5); fcntl.lockf(p, fcntl.LOCK_SH, 20, 50)
        """,
        """
        def locked(name, how):
            if os.fork() == 0:
                try:
                    fd = os.open(top + "/" + name, os.O_RDWR)
                    how(fd)
                    os._exit(1)
                except BlockingIOError:
                    os._exit(2)
            return os.waitstatus_to_exitcode(os.wait()[1])
        busy = fcntl.LOCK_NB | fcntl.LOCK_EX
        (locked("flock", lambda fd: fcntl.flock(fd, busy)), locked("posix", lambda fd: fcntl.lockf(fd, busy, 1, 5)),
         locked("posix", lambda fd: fcntl.lockf(fd, busy, 1, 20)),
         locked("posix", lambda fd: fcntl.lockf(fd, busy, 1, 50)), state(f), state(p))
        """,
    ),
    "sockets": Kind(
        """
        import socket
        listener = socket.socket(socket.AF_UNIX); listener.bind(top + "/listener"); listener.listen(3)
        os.chmod(top + "/listener", 0o640)
        client = socket.socket(socket.AF_UNIX); client.connect(top + "/listener"); server = listener.accept()[0]
        client.send(b"under way")
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); datagrams.bind(top + "/datagrams")
        """,
        """
        another = socket.socket(socket.AF_UNIX); another.connect(top + "/listener")
        another.send(b"new")
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); sender.sendto(b"datagram", top + "/datagrams")
        (server.recv(100), listener.accept()[0].recv(100), datagrams.recv(100),
         oct(os.stat(top + "/listener").st_mode))
        """,
    ),
    "watches": Kind(
        """
        import ctypes, select
        libc = ctypes.CDLL(None)
        os.mkdir(top + "/watched"); open(top + "/file", "w").close()
        notify = libc.inotify_init1(os.O_NONBLOCK)
        w1, w2 = libc.inotify_add_watch(notify, (top + "/watched").encode(), 0x100), \
            libc.inotify_add_watch(notify, (top + "/file").encode(), 0x2)
        """,
        """
        open(top + "/watched/new", "w").close()
        with open(top + "/file", "w") as file:
            file.write("x")
        select.select([notify], [], [], 10)
        (w1, w2, os.read(notify, 4096))
        """,
    ),
    "symbolic links": Kind(
        """
        os.symlink("somewhere/else", top + "/link"); open(top + "/file", "w").write("f")
        link = os.open(top + "/link", os.O_PATH | os.O_NOFOLLOW)
        """,
        "(os.readlink('', dir_fd=link), stat.S_ISLNK(os.fstat(link).st_mode), open(top + '/file').read())",
    ),
    "devices": Kind(
        """
        os.mknod(top + "/null", stat.S_IFCHR | 0o622, os.makedev(1, 3)); os.mkdir(top + "/dev")
        os.mknod(top + "/dev/zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
        null, zero = os.open(top + "/null", os.O_RDWR), os.open(top + "/dev/zero", os.O_RDONLY)
        """,
        """
        (os.write(null, b"gone"), os.read(null, 10), os.read(zero, 3),
         [(oct(os.fstat(fd).st_mode), os.fstat(fd).st_rdev, state(fd)) for fd in (null, zero)])
        """,
    ),
    "a process tree with threads": Kind(
        """
        import threading
        open(top + "/file", "wb").write(b"0123456789"); shared = os.open(top + "/file", os.O_RDWR)
        os.mkdir(top + "/child")
        ask, asked = os.pipe(); answer, answered = os.pipe()
        if os.fork() == 0:
            own = os.open(top + "/file", os.O_RDONLY); os.lseek(own, 5, 0); os.chdir(top + "/child")
            while os.read(ask, 1):
                here = os.lseek(shared, 0, 1), os.read(own, 2), os.path.relpath(os.getcwd(), top)
                os.write(answered, repr(here).encode())
            os._exit(0)
        # The library's thread holds its own lock while it waits, and reads from the mount when it is told to.
        go, done, said = threading.Event(), threading.Event(), []
        def thread():
            with open(top + "/file", "rb") as file:
                file.seek(7)
                go.wait()
                said.append(file.read())
                done.set()
        threading.Thread(target=thread, daemon=True).start()
        """,
        """
        os.lseek(shared, 4, 0); os.write(asked, b"x"); go.set(); done.wait(20)
        os.read(answer, 100), said
        """,
    ),
}


def dedented(text: str) -> str:
    lines = text.strip("\n").splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:] for line in lines)


def set_up(subject: Subject, top: Path, kind: Kind) -> None:
    subject.run(f"import os, stat\ntop = {str(top)!r}\n{STATE}\n{dedented(kind.setup)}")


def both(world: World, kind: Kind) -> Tuple[Subject, Subject]:
    """The subject on its mount and the twin, both set up."""
    twin_top = world.base / "twin-mnt"
    twin_top.mkdir()
    world.mount_tmpfs(twin_top)
    twin_top.chmod(0o755)
    world.bind()
    subject, twin = world.subject(), world.subject("twin")
    set_up(subject, world.mnt, kind)
    set_up(twin, twin_top, kind)
    return subject, twin


@pytest.mark.parametrize("name", KINDS)
def test_as_its_twin(world: World, name: str) -> None:
    kind = KINDS[name]
    subject, twin = both(world, kind)
    world.dump(subject, "--delayed", world.delayed)
    world.unbind()
    world.server_goes()
    world.restore()
    subject.start("os.stat(top + '/x')" if kind.after else dedented(kind.report))
    world.somebody_waits()
    world.server_comes()
    report = world.wait()["data"]
    if kind.after:
        with pytest.raises(AssertionError, match="No such file"):
            subject.result()
        subject.start(dedented(kind.report))
    got, wanted = subject.result(), twin.run(dedented(kind.report))
    assert got == wanted, report
    assert {one["kind"] for one in report["left"]} <= set(kind.left), report
    world.replaced()
    assert os.listdir(world.export) == os.listdir(world.base / "twin-mnt")
