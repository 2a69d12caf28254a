"""Other people's testers of file systems: fio verifies what it has written, stress-ng checks what it does."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from stubfs_kit import Filesystem, mounted

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
FIO = {
    "buffered": ["--rw=randrw", "--bsrange=512-128k"],
    "mapped": ["--rw=randrw", "--bs=4k", "--ioengine=mmap"],
    "direct": ["--rw=randwrite", "--bs=4k", "--direct=1"],
    "asynchronous": ["--rw=randrw", "--bs=16k", "--direct=1", "--ioengine=libaio", "--iodepth=16"],
    "appended": ["--rw=write", "--bs=7k", "--file_append=1"],
}
STRESSORS = [
    "access", "aiol", "chattr", "chdir", "chmod", "chown", "dentry", "dir", "dirdeep", "dirmany", "dup",
    "fallocate", "fcntl", "filename", "flock", "fpunch", "getdent", "hdd", "inode-flags", "iomix", "lease", "link",
    "locka", "lockf", "lockofd", "mknod", "open", "readahead", "rename", "revio", "seek", "sendfile", "splice",
    "symlink", "sync-file", "touch", "utime", "xattr",
]  # fmt: skip


@pytest.fixture(params=["restore", "proxy"])
def fs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    with mounted(tmp_path, request.param) as filesystem:
        yield filesystem
        assert "ERROR" not in filesystem.log.read_text()


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: apt install {name}")
    return found


def run(arguments: List[str]) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("kind", FIO)
def test_fio_finds_what_it_has_written(fs: Filesystem, kind: str) -> None:
    done = run(
        [program("fio"), "--name=job", f"--directory={fs.path}", "--size=4m", "--numjobs=2", "--verify=crc32c"]
        + ["--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--output-format=json", *FIO[kind]]
    )
    jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    assert [job["error"] for job in jobs] == [0, 0]
    assert all(job["read"]["total_ios"] and job["write"]["total_ios"] for job in jobs)


@pytest.mark.timeout(120)
def test_stress_ng_has_nothing_to_say(fs: Filesystem) -> None:
    arguments = [program("stress-ng"), "--verify", "--temp-path", str(fs.path), "--timeout", "10", "--hdd-bytes", "4m"]
    for name in STRESSORS:
        arguments += [f"--{name}", "1", f"--{name}-ops", "20"]
    for name in ("fallocate", "iomix", "readahead", "sync-file"):
        arguments += [f"--{name}-bytes", "2m"]
    done = run([*arguments, "--dirdeep-bytes", "1m", "--sendfile-size", "64k"])
    text = done.stdout + done.stderr
    assert "successful run completed" in text
    assert not [line for line in text.splitlines() if "fail:" in line or "skipping" in line]


def test_dbench_gets_the_answers_that_its_recording_got(fs: Filesystem) -> None:
    """Operations of office programs, by several clients at once; it ends with an error at the first unexpected one."""
    load = Path("/usr/share/dbench/client.txt")
    done = run([program("dbench"), "--timelimit=4", f"--loadfile={load}", f"--directory={fs.path}", "3"])
    assert "Throughput" in done.stdout
    assert not [line for line in done.stdout.splitlines() if "failed" in line or "error" in line.lower()]


@pytest.mark.parametrize("journal", ["wal", "delete", "truncate"])
def test_a_database_with_several_writers(fs: Filesystem, journal: str) -> None:
    """POSIX locks, shared memory in a mapped file, fsync, names that come and go."""
    path = str(fs.path / "base")
    with closing(sqlite3.connect(path)) as base:
        assert base.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        base.execute("create table entries (writer integer, number integer, text blob)")

    def write(writer: int) -> Callable[[], None]:
        def run() -> None:
            with closing(sqlite3.connect(path, timeout=60)) as base:
                for number in range(25):
                    with base:
                        base.execute("begin immediate")
                        base.execute("insert into entries values (?, ?, randomblob(3000))", (writer, number))

        return run

    for process in [fs.run(write(writer)) for writer in range(4)]:
        process.result(60)
    with closing(sqlite3.connect(path)) as base:
        assert base.execute("pragma integrity_check").fetchone() == ("ok",)
        found = base.execute("select writer, number from entries order by writer, number").fetchall()
    assert found == [(writer, number) for writer in range(4) for number in range(25)]


def test_trees_are_copied_with_all_that_belongs_to_them(fs: Filesystem, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / "file").write_bytes(os.urandom(50_000))
    os.link(source / "file", source / "link")
    with open(source / "holes", "wb") as file:
        file.seek(2**20)
        file.write(b"end")
    os.symlink("nowhere", source / "dangling")
    os.mkfifo(source / "fifo", 0o640)
    os.mknod(source / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.chown(source / "file", 1001, 1002)
    (source / "file").chmod(0o4751)
    os.setxattr(source / "file", "trusted.mark", b"value")
    for name in ("file", "empty", "dangling"):
        os.utime(source / name, ns=(5, 123_456_789), follow_symlinks=False)
    copied, unpacked = fs.path / "copied", fs.path / "unpacked"
    run(["cp", "--archive", "--reflink=auto", "--sparse=always", str(source), str(copied)])
    unpacked.mkdir()
    tar = ["tar", "--xattrs", "--xattrs-include=*", f"--file={fs.path}/archive"]
    run([*tar, "--create", f"--directory={copied}", "."])
    run([*tar, "--extract", "--preserve-permissions", f"--directory={unpacked}"])

    def of(top: Path, times: bool) -> Dict[str, Any]:
        found: Dict[str, Any] = {}
        for path in sorted(top.iterdir()):
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
            mtime = status.st_mtime_ns if times and path.name in ("file", "empty", "dangling") else None
            found[path.name] = (
                status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_rdev, content, mtime,
                os.listxattr(path, follow_symlinks=False),
            )  # fmt: skip
        return found

    assert of(copied, True) == of(source, True)
    assert of(unpacked, False) == of(source, False)  # its format has whole seconds
    assert (copied / "holes").stat().st_blocks * 512 < 2**20


def test_a_compiler_and_its_programs(fs: Filesystem) -> None:
    (fs.path / "part.c").write_text('#include <stdio.h>\nvoid part(void) { puts("from the archive"); }\n')
    (fs.path / "main.c").write_text("void part(void); int main(void) { part(); return 0; }\n")
    for arguments in (["-c", "part.c"], ["-c", "main.c"], ["-static", "-o", "whole", "main.o", "part.o"]):
        done = subprocess.run([program("cc"), *arguments], cwd=fs.path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert subprocess.check_output([fs.path / "whole"]) == b"from the archive\n"
