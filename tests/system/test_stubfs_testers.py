"""Other people's testers of file systems: fio verifies what it has written, stress-ng checks what it does."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Iterator, List

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
