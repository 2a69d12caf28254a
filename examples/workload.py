"""A program that uses a directory the way applications do, and notices whatever goes wrong while it does.

    python workload.py ROLE DIRECTORY [UID]

It opens what its role needs, prints "ready", starts to work at the first line on standard input and ends at the next
line (or end of file) with a JSON report on standard output: operations done, longest time for one, and each thing that
was not as it must be: an error, an EINTR, a byte that is not the real file's. No error may ever be seen: that is the
whole point of a delayed mount.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import threading
import time
from typing import Callable, Dict, List, NoReturn, Optional

RECORD = 64
RECORDS = 2048
PAGE = mmap.PAGESIZE
PACE = 0.0005  # seconds between two steps of a thread: a busy application, not a denial of service


def record(number: int) -> bytes:
    """What the real file holds at a place; the staging file holds zeros there."""
    return f"record {number:08d} ".encode().ljust(RECORD - 1, b"#") + b"\n"


def records() -> bytes:
    return b"".join(map(record, range(RECORDS)))


# What must be there, name -> size; directories have None, the fifo -1. The real side has it too, with contents.
LAYOUT: Dict[str, Optional[int]] = {
    "etc": None,
    "etc/deep": None,
    "etc/deep/item": RECORD,
    "records": RECORD * RECORDS,
    "slots": PAGE * 2,
    "log": 0,
    "queue": -1,
}


class Work:
    """The loop of a role: counts, times and collects what is wrong, in however many threads."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.operations = 0
        self.longest = 0.0
        self.wrong: List[str] = []
        self._lock = threading.Lock()

    def repeat(self, step: Callable[[int], object]) -> None:
        number = 0
        while True:  # at least once, however soon the end comes
            begin = time.monotonic()
            try:
                step(number)
            except Exception as error:  # every kind of failure belongs in the report
                with self._lock:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                return
            with self._lock:
                self.operations += 1
                self.longest = max(self.longest, time.monotonic() - begin)
            number += 1
            if self.stop.wait(PACE):
                return

    def report(self) -> Dict[str, object]:
        return {"operations": self.operations, "longest": self.longest, "wrong": self.wrong}


def expect(found: bytes, wanted: bytes, where: str) -> None:
    if found != wanted:
        raise ValueError(f"{where}: {found[:24]!r} instead of {wanted[:24]!r}")


def wait_for_start() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def run(work: Work, *steps: Callable[[int], object]) -> Dict[str, object]:
    threads = [threading.Thread(target=work.repeat, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    work.stop.set()
    for thread in threads:
        thread.join()
    return work.report()


def reader(work: Work) -> Dict[str, object]:
    """Four threads: by offset, through one shared offset, by stat, and by opening anew."""
    by_offset = os.open("records", os.O_RDONLY)
    in_order = os.open("records", os.O_RDONLY | os.O_CLOEXEC)
    wait_for_start()

    def at_offset(number: int) -> None:
        place = number * 37 % RECORDS
        expect(os.pread(by_offset, RECORD, place * RECORD), record(place), f"record {place}")

    def sequential(number: int) -> None:
        if number % RECORDS == 0:
            os.lseek(in_order, 0, os.SEEK_SET)
        expect(os.read(in_order, RECORD), record(number % RECORDS), f"record {number % RECORDS} in sequence")

    def status(number: int) -> None:
        size = os.fstat(by_offset).st_size
        if size != RECORD * RECORDS:
            raise ValueError(f"size {size}")

    def anew(number: int) -> None:
        with open("records", "rb", buffering=0) as file:
            expect(file.read(RECORD), record(0), "first record of a newly opened file")

    return run(work, at_offset, sequential, status, anew)


def mapper(work: Work) -> Dict[str, object]:
    """Shared and private mappings, and a forked child that has the same ones."""
    with open("records", "rb") as file:
        shared = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        private = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    with open("slots", "r+b") as writable:
        slots = mmap.mmap(writable.fileno(), PAGE * 2, mmap.MAP_SHARED)
    wait_for_start()
    private[RECORD * 100 : RECORD * 101] = b"P" * RECORD  # a page of our own, which must survive
    child = os.fork()
    slot = 0 if child else 1

    def look(number: int) -> None:
        place = number * 41 % RECORDS
        expect(shared[place * RECORD : (place + 1) * RECORD], record(place), f"shared mapping, record {place}")
        wanted = b"P" * RECORD if place == 100 else record(place)
        expect(private[place * RECORD : (place + 1) * RECORD], wanted, f"private mapping, record {place}")

    def count(number: int) -> None:
        slots[slot * 8 : slot * 8 + 8] = number.to_bytes(8, "little")
        expect(slots[slot * 8 : slot * 8 + 8], number.to_bytes(8, "little"), "what was just written to a mapping")

    if child == 0:
        # The parent's pipe ends the child: one process group leader's standard input for both would be a race.
        signal.signal(signal.SIGTERM, lambda *_: work.stop.set())
        look_thread = threading.Thread(target=work.repeat, args=(look,))
        look_thread.start()
        work.repeat(count)
        look_thread.join()
        os._exit(1 if work.wrong else 0)
    report = run(work, look, count)
    os.kill(child, signal.SIGTERM)
    if os.waitpid(child, 0)[1] != 0:
        work.wrong.append("the forked child found something wrong")
    return report


def appender(work: Work) -> Dict[str, object]:
    """Two processes that append through one open file description; every line must be in the file afterwards."""
    log = os.open("log", os.O_RDWR | os.O_APPEND)
    wait_for_start()
    reading, writing = os.pipe()
    child = os.fork()
    name = "parent" if child else "child"

    def append(number: int) -> None:
        line = f"{name} {number}\n".encode()
        if os.write(log, line) != len(line):
            raise ValueError("short write")

    if child == 0:
        signal.signal(signal.SIGTERM, lambda *_: work.stop.set())
        work.repeat(append)
        os.write(writing, json.dumps(work.report()).encode())
        os._exit(0)
    run(work, append)
    os.kill(child, signal.SIGTERM)
    of_child = json.loads(os.read(reading, 65536))
    os.waitpid(child, 0)
    work.wrong += of_child["wrong"]
    report = work.report()
    report["appended"] = {"parent": report["operations"], "child": of_child["operations"]}
    return report


def queue(work: Work) -> Dict[str, object]:
    """A writer and a reader of a fifo: numbers in order, none lost, none doubled."""
    keep_open = os.open("queue", os.O_RDWR)  # so that the two opens below need not meet
    writing, reading = os.open("queue", os.O_WRONLY), os.open("queue", os.O_RDONLY)
    wait_for_start()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, lambda *_: work.stop.set())
        work.repeat(lambda number: os.write(writing, number.to_bytes(8, "little")))
        os._exit(1 if work.wrong else 0)

    def take(number: int) -> None:
        expect(os.read(reading, 8), number.to_bytes(8, "little"), f"number {number} of the fifo")

    report = run(work, take)
    os.kill(child, signal.SIGTERM)
    os.set_blocking(reading, False)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        try:
            os.read(reading, 65536)  # the writer may be waiting for room
        except BlockingIOError:
            time.sleep(0.001)
    os.close(keep_open)
    return report


def resident(work: Work) -> Dict[str, object]:
    """A process that lives in a directory of the mount and knows files by relative names only."""
    os.chdir("etc/deep")
    wait_for_start()

    def item(number: int) -> None:
        with open("item", "rb", buffering=0) as file:
            expect(file.read(), record(7), "etc/deep/item by relative name")
        with open("../../records", "rb", buffering=0) as file:
            expect(file.read(RECORD), record(0), "../../records")

    return run(work, item)


ROLES = {role.__name__: role for role in (reader, mapper, appender, queue, resident)}


def main() -> NoReturn:
    role, directory, *user = sys.argv[1:]
    if user:
        # Only now: an ordinary user need not be able to read the interpreter of root's virtual environment.
        os.setgroups([])
        os.setgid(int(user[0]))
        os.setuid(int(user[0]))
    os.chdir(directory)
    print(json.dumps(ROLES[role](Work())), flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
