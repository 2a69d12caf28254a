"""Programs of other languages' run times, with their threads, signals, compiled code and mapped archives."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import pytest
from surgery_kit import Mounts, Victim, compile_c, mounts, tasks_stopped, victim

from spfs.linux import procfs
from spfs.testing import wait_until

__all__ = ["mounts", "victim"]

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_ptrace]

TIMEOUT = 60.0  # seconds for what takes few


def needs(*programs: str) -> pytest.MarkDecorator:
    lacking = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")


@contextmanager
def running(command: Sequence[str], where: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The program, when it has said that it is ready; killed in the end."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=where, bufsize=0) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def there_and_back(mounts: Mounts, process: "subprocess.Popen[bytes]") -> List[Dict[str, int]]:
    """Switch, back, and once more, while it works; what was moved each time."""
    moved = []
    for last in (False, False, True):
        report = mounts.switch()
        assert report.left == [] and mounts.users() == []
        assert tasks_stopped(process.pid) == [] and process.poll() is None
        moved.append(report.moved)
        if not last:
            mounts.reverse()
    return moved


def result(process: "subprocess.Popen[bytes]") -> str:
    """What it says when it is told to end."""
    output, _ = process.communicate(b"x", timeout=TIMEOUT)
    assert process.returncode == 0
    return output.decode().strip()


JAVA = """
import java.io.*;
import java.nio.*;
import java.nio.channels.FileChannel;
import java.nio.file.*;
import java.util.concurrent.atomic.*;

/* Hundreds of threads that read, some that compute and allocate so that code is compiled and garbage collected. */
public class Main {
    static volatile boolean stop;
    static final AtomicLong wrong = new AtomicLong(), done = new AtomicLong();

    static boolean known(byte[] contents) {
        String text = new String(contents);
        return text.equals("old") || text.equals("new");
    }

    static void read(FileChannel channel) throws Exception {
        while (!stop) {
            ByteBuffer buffer = ByteBuffer.allocate(3);
            if (channel.read(buffer, 0) != 3 || !known(buffer.array())) wrong.incrementAndGet();
            done.incrementAndGet();
            Thread.sleep(2);
        }
    }

    static void compute() {
        long expected = 0, sum = 0;
        for (int i = 0; i < 100000; i++) expected += Integer.toString(i).hashCode() ^ i;
        while (!stop) {
            sum = 0;
            for (int i = 0; i < 100000; i++) sum += Integer.toString(i).hashCode() ^ i;
            if (sum != expected) wrong.incrementAndGet();
        }
    }

    interface Work { void run() throws Exception; }

    static Thread start(Work work) {
        Thread thread = new Thread(() -> {
            try { work.run(); } catch (Throwable error) { error.printStackTrace(); wrong.incrementAndGet(); }
        });
        thread.start();
        return thread;
    }

    public static void main(String[] arguments) throws Exception {
        FileChannel channel = FileChannel.open(Paths.get("f"), StandardOpenOption.READ, StandardOpenOption.WRITE);
        MappedByteBuffer mapping = channel.map(FileChannel.MapMode.READ_ONLY, 0, 3);
        Thread[] threads = new Thread[202];
        for (int i = 0; i < threads.length; i++)
            threads[i] = start(i < 200 ? () -> read(channel) : () -> compute());
        while (done.get() < 1000) Thread.sleep(5);
        System.out.println("ready");
        System.in.read();
        stop = true;
        for (Thread thread : threads) thread.join();
        byte[] mapped = new byte[3];
        mapping.get(mapped);
        /* From the archive, which is another one by now. */
        Object later = Class.forName("Later").getDeclaredConstructor().newInstance();
        System.out.println(wrong.get() + " wrong, " + new String(mapped) + ", " + later);
    }
}
"""
LATER = 'public class Later { public String toString() { return "loaded"; } }'


@needs("java", "javac")
@pytest.mark.timeout(180)
def test_java(mounts: Mounts, tmp_path: Path) -> None:
    mounts.file("f", b"old", b"new")
    sources = [tmp_path / "Main.java", tmp_path / "Later.java"]
    for path, source in zip(sources, (JAVA, LATER)):
        path.write_text(source)
    subprocess.run(["javac", "-d", str(tmp_path / "classes"), *map(str, sources)], check=True)
    archive = shutil.make_archive(str(tmp_path / "program"), "zip", tmp_path / "classes")
    mounts.both(lambda root: shutil.copy(archive, root / "program.jar"))
    command = ["java", "-Xmx64m", "-XX:+UseG1GC", "-cp", f"{mounts.old}/program.jar", "Main"]
    with running(command, mounts.old) as process:
        assert len(os.listdir(f"/proc/{process.pid}/task")) > 200
        for moved in there_and_back(mounts, process):
            assert moved == {"cwd": 1, "file": 2, "shared mapping": 1}  # f and the archive
        assert result(process) == "0 wrong, new, loaded"


GO = """
package main

import (
    "fmt"
    "os"
    "runtime"
    "sync"
    "sync/atomic"
    "syscall"
    "time"
)

// Many goroutines on more threads than there are processors; some never call anything, so that only a signal
// (SIGURG) makes them give way, which the run time sends all the time.
func main() {
    runtime.GOMAXPROCS(8)
    file, err := os.Open("f")
    if err != nil {
        panic(err)
    }
    mapping, err := syscall.Mmap(int(file.Fd()), 0, 3, syscall.PROT_READ, syscall.MAP_SHARED)
    if err != nil {
        panic(err)
    }
    var stop, wrong, done int64
    var group sync.WaitGroup
    for i := 0; i < 300; i++ {
        group.Add(1)
        go func() {
            defer group.Done()
            for atomic.LoadInt64(&stop) == 0 {
                contents := make([]byte, 3)
                n, err := file.ReadAt(contents, 0)
                if n != 3 || err != nil || string(contents) != "old" && string(contents) != "new" {
                    atomic.AddInt64(&wrong, 1)
                }
                atomic.AddInt64(&done, 1)
                time.Sleep(time.Millisecond)
            }
        }()
    }
    for i := 0; i < 3; i++ {
        group.Add(1)
        go func() {
            defer group.Done()
            for atomic.LoadInt64(&stop) == 0 {
                sum := uint64(0)
                for n := uint64(0); n < 20000000; n++ {
                    sum += n * n
                }
                if sum != SUM {
                    atomic.AddInt64(&wrong, 1)
                }
            }
        }()
    }
    for atomic.LoadInt64(&done) < 1000 {
        time.Sleep(time.Millisecond)
    }
    fmt.Println("ready")
    os.Stdin.Read(make([]byte, 1))
    atomic.StoreInt64(&stop, 1)
    group.Wait()
    fmt.Printf("%d wrong, %s\\n", wrong, mapping)
}
"""


@needs("go")
@pytest.mark.timeout(180)
def test_go(mounts: Mounts, tmp_path: Path) -> None:
    """A static program that lies on the mount itself."""
    mounts.file("f", b"old", b"new")
    number = 20000000 - 1
    total = number * (number + 1) * (2 * number + 1) // 6 % 2**64
    source = tmp_path / "main.go"
    source.write_text(GO.replace("SUM", str(total)))
    program = tmp_path / "program"
    environment = {"CGO_ENABLED": "0", "GO111MODULE": "off", "GOCACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    subprocess.run(
        ["go", "build", "-o", str(program), str(source)], check=True, env={**os.environ, **environment}
    )
    mounts.both(lambda root: shutil.copy(program, root / "program"))
    with running([f"{mounts.old}/program"], mounts.old) as process:
        for moved in there_and_back(mounts, process):
            assert (moved["exe"], moved["cwd"], moved["file"], moved["shared mapping"]) == (1, 1, 1, 1)
            assert moved["private mapping"] >= 2  # text and data
        assert result(process) == "0 wrong, new"


NODE = """
const fs = require('fs'), { Worker, isMainThread, workerData } = require('worker_threads');
const state = new Int32Array(isMainThread ? new SharedArrayBuffer(12) : workerData.state);  // stop, wrong, done
const known = contents => ['old', 'new'].includes(contents.toString());
const note = right => { if (!right) Atomics.add(state, 1, 1); Atomics.add(state, 2, 1); };
if (!isMainThread) {
    const buffer = Buffer.alloc(3);
    while (!Atomics.load(state, 0)) {
        note(fs.readSync(workerData.fd, buffer, 0, 3, 0) === 3 && known(buffer));
        Atomics.wait(state, 0, 0, 1);
    }
} else (async () => {
    const file = await fs.promises.open('f'), events = [];
    const watcher = fs.watch('.', (kind, name) => events.push(name));
    const workers = [...Array(6)].map(() =>
        new Worker(__filename, { workerData: { fd: file.fd, state: state.buffer } }));
    const ended = Promise.all(workers.map(worker => new Promise(resolve => worker.on('exit', resolve))));
    const pool = (async () => {  // by the threads of the run time's own pool
        while (!Atomics.load(state, 0)) {
            const reads = [...Array(8)].map(() => file.read(Buffer.alloc(3), 0, 3, 0));
            (await Promise.all(reads)).forEach(read => note(read.bytesRead === 3 && known(read.buffer)));
        }
    })();
    while (Atomics.load(state, 2) < 1000) await new Promise(resolve => setTimeout(resolve, 5));
    process.stdout.write('ready\\n');
    await new Promise(resolve => process.stdin.once('data', resolve));
    Atomics.store(state, 0, 1); Atomics.notify(state, 0);
    await Promise.all([pool, ended]);
    fs.writeFileSync('made', '');
    while (!events.includes('made')) await new Promise(resolve => setTimeout(resolve, 5));
    watcher.close();
    console.log(`${Atomics.load(state, 1)} wrong, watched`);
    process.exit(0);
})();
"""


@needs("node")
@pytest.mark.timeout(180)
def test_node(mounts: Mounts, tmp_path: Path) -> None:
    """Its own threads, those of the pool, compiled code, and a directory that is watched."""
    mounts.file("f", b"old", b"new")
    (tmp_path / "main.js").write_text(NODE)
    with running(["node", str(tmp_path / "main.js")], mounts.old) as process:
        for moved in there_and_back(mounts, process):
            assert moved == {"cwd": 1, "file": 1, "inotify watch": 1}
        assert result(process) == "0 wrong, watched"


def tracers(pid: int) -> "set[int]":
    return {procfs.parse_status(procfs.read(f"/proc/{tid}/status")).tracer for tid in procfs.tasks(pid)}


@needs("strace")
def test_under_strace(mounts: Mounts, victim: Victim) -> None:
    """Left, said why, and none the worse for it; moved when strace has let go. What strace sees are its own calls."""
    victim.run(
        f"""
os.chdir({str(mounts.old)!r})
fd = os.open({mounts.file("f")!r}, os.O_RDONLY)
stop = threading.Event()
threads = [threading.Thread(target=lambda: [os.pread(fd, 3, 0) for _ in iter(lambda: stop.wait(0.001), True)])
           for _ in range(3)]
[thread.start() for thread in threads]
"""
    )
    command = ["strace", "-f", "-qq", "-e", "trace=fchdir,dup3,recvmsg", "-o", f"{mounts.new}/calls", "-p"]
    with subprocess.Popen([*command, str(victim.pid)]) as strace:
        wait_until(lambda: tracers(victim.pid) == {strace.pid}, what="all threads to be traced")
        report = mounts.switch()
        assert {left.what for left in report.left} == {"cwd", f"fd {victim.run('fd')}"} and report.moved == {}
        assert all(f"is traced by process {strace.pid} (strace)" in left.reason for left in report.left)
        assert victim.run("os.read(fd, 3)") == b"old" and tracers(victim.pid) == {strace.pid}
        strace.send_signal(signal.SIGINT)
    wait_until(lambda: tracers(victim.pid) == {0}, what="strace to let go")
    assert Path(mounts.new, "calls").read_text() == ""
    assert mounts.switch().moved == {"cwd": 1, "file": 1} and mounts.users() == []
    assert victim.run("stop.set(); [thread.join() for thread in threads]; os.pread(fd, 3, 0)") == b"new"


SPINNING = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

/* never gives its processor away; ended by the kernel should nobody bring it to an end */
int main(int argc, char **argv)
{
    struct rlimit limit = { 10000000, 10000000 }; /* microseconds */
    struct sched_param priority = { .sched_priority = 50 };
    cpu_set_t processor;
    char contents[4] = "";
    volatile int count = 0;
    int fd = open(argv[1], O_RDONLY);
    CPU_ZERO(&processor);
    CPU_SET(sched_getcpu(), &processor);
    if (setrlimit(RLIMIT_RTTIME, &limit) || sched_setaffinity(0, sizeof(processor), &processor)) return 1;
    if (sched_setscheduler(0, SCHED_FIFO, &priority)) return 2;
    write(1, "ready\n", 6);
    while (contents[0] != 'n') {
        if (++count % 100000 == 0) pread(fd, contents, 3, 0);
    }
    write(1, contents, 3);
    return 0;
}
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="it leaves no processor to others")
def test_spinning_in_a_real_time_class(mounts: Mounts, tmp_path: Path) -> None:
    program = compile_c(tmp_path, SPINNING, "-Wno-unused-result")
    with running([program, mounts.file("f")], tmp_path) as process:
        assert mounts.switch().moved == {"file": 1} and mounts.users() == []
        assert result(process) == "new"
