"""Rules and filters: what they mean, how they are written, and what is refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from stubfs import protocol
from stubfs.callers import Processes, ThreadGroup
from stubfs.errors import StubfsError, UsageError
from stubfs.held import Wait
from stubfs.modes import StubOptions
from stubfs.protocol import Opcode
from stubfs.request import Device, Request
from stubfs.rules import Action, Matcher, RequestFilter, Rule, activate, decide

PATHS = {2: [b"data/a"], 3: [b"data/\xff"], 4: [], 5: [b"old", b"new"]}


def request(opcode: int = Opcode.READ, node: int = 2, tid: int = 0, body: bytes = b"\0" * 64) -> Request:
    data = protocol.IN_HEADER.pack(40 + len(body), opcode, 2, node, 0, 0, tid, 0, 0) + body
    result = Request(Device(-1), data)
    result.parse(len(data))
    return result


def paths_of(item: Request) -> List[bytes]:
    return PATHS.get(item.node, [b""])


def action(rules: List[Rule], item: Request) -> Optional[Action]:
    treatment = decide(activate(rules), item, paths_of)
    return treatment.action if treatment is not None else None


def matches(item: Request, **filter: Any) -> bool:
    return Matcher(RequestFilter(**filter)).matches(item, paths_of)


class TestFilters:
    def test_operations(self) -> None:
        assert matches(request()) and matches(request(), operations=["read"])
        assert matches(request(Opcode.RENAME2), operations=["rename", "read"])
        assert not matches(request(), operations=["write"])
        for opcode in (Opcode.RELEASE, Opcode.FORGET, Opcode.INTERRUPT, Opcode.INIT):
            assert not matches(request(opcode)), "nobody waits for it"

    def test_paths(self) -> None:
        assert matches(request(), path="data/*") and matches(request(), path="*") and not matches(request(), path="a")
        assert matches(request(node=3), path="data/" + os.fsdecode(b"\xff"))
        assert not matches(request(node=4), path="*")
        assert matches(request(node=5), path="new") and matches(request(node=5), path="old")
        assert matches(request(node=1), path="") and not matches(request(), path="DATA/*")

    def test_processes(self) -> None:
        tids: List[int] = []
        thread = threading.Thread(target=lambda: tids.append(threading.get_native_id()))
        thread.start()
        thread.join()
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            assert matches(request(tid=os.getpid()), pids=[os.getpid()])
            assert matches(request(tid=other.pid), pids=[os.getpid(), other.pid])
            assert not matches(request(tid=other.pid), pids=[os.getpid()])
            assert not matches(request(tid=0), pids=[os.getpid()])
            assert not matches(request(tid=tids[0]), pids=[os.getpid()]), "it has ended"
            group = ThreadGroup(other.pid)
        finally:
            other.communicate(b"")
        assert other.pid not in group
        assert Processes().of(other.pid) == (other.pid, "") and Processes().of(0) == (0, "")
        with pytest.raises(StubfsError) as caught:
            Matcher(RequestFilter(pids=[other.pid]))
        assert caught.value.errno == errno.ESRCH

    def test_threads_of_a_process(self) -> None:
        seen: List[bool] = []
        thread = threading.Thread(
            target=lambda: seen.append(matches(request(tid=threading.get_native_id()), pids=[os.getpid()]))
        )
        thread.start()
        thread.join()
        assert seen == [True]

    def test_the_process_of_a_thread(self) -> None:
        found: List[object] = []
        thread = threading.Thread(target=lambda: found.append(Processes().of(threading.get_native_id())))
        thread.start()
        thread.join()
        processes = Processes()
        command = Path("/proc/self/comm").read_text()[:-1]
        assert found == [(os.getpid(), command)] == [processes.of(os.getpid())]


class TestDecisions:
    def test_the_first_decides(self) -> None:
        rules = [Rule("serve", path="data/a"), Rule("fail", operations=["read"]), Rule("hold")]
        assert action(rules, request()) is Action.SERVE
        assert action(rules, request(node=3)) is Action.FAIL
        assert action(rules, request(Opcode.OPEN, node=3)) is Action.HOLD
        assert action([], request()) is None and action([Rule("hold", path="x")], request()) is None

    def test_what_must_not_wait(self) -> None:
        page = request(Opcode.WRITE, body=protocol.WRITE_IN.pack(1, 0, 1, protocol.WRITE_CACHE, 0, 0, 0) + b"x")
        for rule in (Rule("hold"), Rule("hold", operations=["write"]), Rule("delay", seconds=1)):
            assert action([rule], page) is None
        assert action([Rule("fail")], page) is Action.FAIL
        flush, root = request(Opcode.FLUSH), request(Opcode.GETATTR, node=1)
        for item in (flush, root):
            assert action([Rule("hold")], item) is None
            assert action([Rule("delay", seconds=1)], item) is Action.DELAY
        assert action([Rule("hold", operations=["flush"])], flush) is Action.HOLD
        assert action([Rule("hold", operations=["getattr"])], root) is Action.HOLD

    def test_the_first_few_times(self) -> None:
        rules = activate([Rule("fail", times=2)])
        decided = [decide(rules, request(), paths_of) for _ in range(3)]
        assert [item is not None for item in decided] == [True, True, False]
        # One that is looked at again after a change of mode has had its turn already.
        rules, held = activate([Rule("hold", times=1)]), request()
        assert decide(rules, held, paths_of) is not None
        held.wait = Wait(0.0)
        held.wait.rule = rules[0]
        assert decide(rules, held, paths_of) is not None and decide(rules, request(), paths_of) is None

    def test_by_many_threads(self) -> None:
        rules, found = activate([Rule("fail", times=100)]), []

        def decide_often() -> None:
            found.extend(decide(rules, request(), paths_of) for _ in range(100))

        threads = [threading.Thread(target=decide_often) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(item is not None for item in found) == 100


class TestForms:
    @pytest.mark.parametrize(
        "text, rule",
        [
            ("hold operations=fsync", Rule("hold", operations=["fsync"])),
            ("fail errno=ENOSPC path='a b/*' times=2", Rule("fail", errno=errno.ENOSPC, path="a b/*", times=2)),
            ("delay seconds=0.05 pids=1,2", Rule("delay", seconds=0.05, pids=[1, 2])),
            ("hold seconds=5 errno=110", Rule("hold", seconds=5, errno="ETIMEDOUT")),
            ("serve operations=read,open,", Rule("serve", operations=("read", "open"))),
        ],
    )
    def test_text_and_json(self, text: str, rule: Rule) -> None:
        assert Rule.parse(text) == rule
        assert Rule.from_json(rule.as_json()) == rule and Rule.parse(str(rule)) == rule

    @pytest.mark.parametrize(
        "text, why",
        [
            ("", "ACTION key=value"), ("'", "ACTION key=value"), ("stop", "no such action"),
            ("hold fsync", "not key=value"), ("hold path=a path=b", "given twice"), ("hold color=red", "no such key"),
            ("hold operations=fsink", "fsink: no such operation"), ("hold path=/a", "without a slash in front"),
            ("hold pids=x", "not a number"), ("hold pids=0", "list of process ids"),
            ("fail errno=EFOO", "name like EIO"), ("fail errno=512", "from 1 to 511"),
            ("fail errno=0", "from 1 to 511"), ("delay", "say how long"), ("delay seconds=-1", "not negative"),
            ("delay seconds=nan", "not negative"), ("fail seconds=1", "only with"),
            ("hold errno=EIO", "only with fail"), ("serve errno=EIO", "only with fail"),
            ("fail times=0", "number of req"),
        ],
    )  # fmt: skip
    def test_bad_ones(self, text: str, why: str) -> None:
        with pytest.raises(UsageError) as caught:
            Rule.parse(text)
        assert why in str(caught.value) and str(caught.value).startswith("cannot use ")

    @pytest.mark.parametrize(
        "item",
        [None, [], "hold", {}, {"action": 5}, {"action": ["hold"]}, {"action": "hold", "operations": "fsync"},
         {"action": "hold", "operations": [5]}, {"action": "hold", "pids": [True]}, {"action": "hold", "path": 5},
         {"action": "fail", "errno": True}, {"action": "delay", "seconds": "1"}, {"action": "fail", "times": 1.5}],
    )  # fmt: skip
    def test_bad_json(self, item: object) -> None:
        with pytest.raises(UsageError, match="cannot use"):
            Rule.from_json(item)

    @pytest.mark.parametrize(
        "options", [{"errno": "EIO"}, {"timeout": -1}, {"timeout": "1"}, {"timeout": 1, "errno": "?"}, {"exempt": 5}]
    )
    def test_options_of_stub_mode(self, options: Dict[str, object]) -> None:
        with pytest.raises(UsageError, match="options of stub mode"):
            StubOptions.checked(options.get("timeout"), options.get("errno"), options.get("exempt"))

    def test_options_of_stub_mode_are_rules(self) -> None:
        options = StubOptions.checked(2, "ENODATA", [os.getpid()])
        assert [active.rule for active in (*options.first(), *options.last())] == [
            Rule("serve", pids=[os.getpid()]), Rule("hold", seconds=2, errno=errno.ENODATA),
        ]  # fmt: skip
        assert StubOptions.checked(None, None, None) == StubOptions() and not StubOptions().last()
