"""The states of mounts and replaces as tables: what may follow what, and what is refused."""

from __future__ import annotations

import errno
import json
from typing import Callable, List, Optional

import pytest

from spfs.errors import SpfsError
from spfs.registry import MAX_ATTEMPTS, MAX_FINISHED, Managed, Phase, Registry, State, check_usable
from spfs.requests import Mount, Replace


def registry_with(*ids: str, mode: str = "restore") -> Registry:
    registry = Registry()
    for number, id in enumerate(ids):
        managed = registry.add(Mount(id, mode, f"/{id}"))
        registry.mounted(managed, 100 + number, 1, 40 + number, {})
    return registry


def ask(registry: Registry, id: str = "a", mode: Optional[str] = None, source: str = "s") -> Managed:
    return registry.ask_replace(Replace(id, source, "tmpfs", 0, mode=mode))


@pytest.mark.parametrize(
    "asked, mode, ready",
    [
        ("hold", "restore", False),
        ("hold", "stub", False),
        ("release", "restore", True),
        ("release", "stub", True),
        (None, "restore", False),
        (None, "stub", True),
        (None, "proxy", True),
    ],
)
def test_when_a_replace_begins(asked: Optional[str], mode: str, ready: bool) -> None:
    registry = registry_with("a", mode=mode)
    assert ask(registry, mode=asked).ready_to_replace is ready


def test_a_client_that_never_says_when_means_when_restore_mode_is_left() -> None:
    registry = registry_with("a")
    managed = ask(registry)
    registry.mode_changed(managed, "stub")
    assert managed.ready_to_replace


def running(registry: Registry, managed: Managed) -> None:
    registry.replace_started(managed, 7, 8)


def ended(phase: Phase) -> Callable[[Registry, Managed], None]:
    def end(registry: Registry, managed: Managed) -> None:
        registry.replace_started(managed, 7, 8)
        registry.replace_ended(managed, phase, None, None)

    return end


def pending(registry: Registry, managed: Managed) -> None:
    """Left as it was asked for."""


@pytest.mark.parametrize(
    "state, begin, phase",
    [
        (pending, "release", Phase.WAITING),
        (pending, "hold", Phase.HELD),
        (running, "release", Phase.RUNNING),
        (ended(Phase.FAILED), "release", Phase.WAITING),
        (ended(Phase.ABORTED), "release", Phase.WAITING),
        (ended(Phase.DONE), "release", Phase.WAITING),
        (ended(Phase.FAILED), "hold", Phase.HELD),
    ],
)
def test_holding_and_releasing_one(state: Callable[[Registry, Managed], None], begin: str, phase: Phase) -> None:
    registry = registry_with("a")
    managed = ask(registry)
    state(registry, managed)
    registry.begin("a", begin)
    assert managed.replacement is not None and managed.replacement.phase is phase
    assert managed.ready_to_replace is (phase is Phase.WAITING)


def test_releasing_all_leaves_alone_what_is_done_aborted_or_was_never_asked_for() -> None:
    registry = registry_with("held", "failed", "done", "aborted", "none", "running")
    for id in ("held", "failed", "done", "aborted", "running"):
        ask(registry, id, "hold")
    for id, phase in (("failed", Phase.FAILED), ("done", Phase.DONE), ("aborted", Phase.ABORTED)):
        ended(phase)(registry, registry.get(id))
    running(registry, registry.get("running"))
    assert [managed.id for managed in registry.begin(None, "release")] == ["held", "failed"]
    assert registry.begin(None, "hold") == [registry.get("held"), registry.get("failed")]


def test_a_dead_mount_does_not_keep_the_others_from_being_let_go() -> None:
    registry = registry_with("dead", "a")
    for id in ("dead", "a"):
        ask(registry, id, "hold")
    ended(Phase.FAILED)(registry, registry.get("dead"))
    registry.failed(registry.get("dead"), "killed")
    assert [managed.id for managed in registry.begin(None, "release")] == ["a"]
    with pytest.raises(SpfsError, match="killed"):
        registry.begin("dead", "release")


def test_holding_a_running_replace_is_refused() -> None:
    registry = registry_with("a")
    running(registry, ask(registry))
    with pytest.raises(SpfsError) as caught:
        registry.begin("a", "hold")
    assert caught.value.errno == errno.EBUSY


def test_releasing_what_was_never_asked_for_is_refused() -> None:
    with pytest.raises(SpfsError, match="none was asked for"):
        registry_with("a").begin("a", "release")


def test_a_replace_asked_for_twice_is_one() -> None:
    registry = registry_with("a")
    managed = ask(registry, mode="release")
    running(registry, managed)
    before = managed.replacement
    assert ask(registry, mode="release").replacement is before
    with pytest.raises(SpfsError) as caught:
        ask(registry, source="another")
    assert caught.value.errno == errno.EBUSY
    assert managed.replacement is before


def test_a_later_replace_request_takes_the_place_of_one_that_has_not_begun() -> None:
    registry = registry_with("a")
    ask(registry, mode="hold")
    managed = ask(registry, source="another")
    assert managed.replacement is not None and managed.replacement.request.source == "another"


@pytest.mark.parametrize(
    "stage, allowed", [("", True), ("mounting", True), ("prepared", False), ("proxy", False), ("frozen", False)]
)
def test_the_mode_is_the_replaces_business_once_it_is_at_work(stage: str, allowed: bool) -> None:
    registry = registry_with("a", mode="stub")
    managed = ask(registry)
    running(registry, managed)
    if stage:
        registry.replace_progress(managed, stage, {}, 1.0)
    if allowed:
        registry.check_mode_change(managed)
    else:
        with pytest.raises(SpfsError, match="a replace is running"):
            registry.check_mode_change(managed)


def test_attempts_are_counted_and_the_latest_kept() -> None:
    registry = registry_with("a", mode="stub")
    managed = ask(registry)
    running(registry, managed)
    for attempt in range(1, 31):
        registry.replace_progress(managed, "mounting", {"attempt": attempt, "error": "refused"}, float(attempt))
    wanted = managed.replacement
    assert wanted is not None
    assert wanted.attempts == 30
    assert [entry["attempt"] for entry in wanted.last_attempts] == list(range(31 - MAX_ATTEMPTS, 31))
    assert [entry["stage"] for entry in wanted.stages] == ["mounting"]


def test_the_stage_proxy_is_a_change_of_mode() -> None:
    registry = registry_with("a", mode="stub")
    managed = ask(registry)
    running(registry, managed)
    registry.replace_progress(managed, "proxy", {}, 1.0)
    assert managed.mode == "proxy"


@pytest.mark.parametrize(
    "state, number",
    [
        (State.STARTING, errno.EBUSY),
        (State.UNMOUNTING, errno.EBUSY),
        (State.FAILED, errno.ENOTCONN),
        (State.GONE, errno.ENOENT),
    ],
)
def test_a_mount_that_is_not_served_cannot_be_used(state: State, number: int) -> None:
    managed = registry_with("a").get("a")
    managed.state = state
    with pytest.raises(SpfsError) as caught:
        check_usable(managed)
    assert caught.value.errno == number


def test_an_id_is_used_once_at_a_time() -> None:
    registry = registry_with("a")
    with pytest.raises(SpfsError) as caught:
        registry.add(Mount("a", "restore", "/elsewhere"))
    assert caught.value.errno == errno.EEXIST and "'a' is in use for /a" in str(caught.value)
    registry.gone(registry.get("a"), "unmounted")
    assert registry.add(Mount("a", "restore", "/elsewhere")).number == 2


def test_an_unknown_id_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpfsError) as caught:
        registry_with("a", "b").get("c")
    assert caught.value.errno == errno.ENOENT and "known: a, b" in str(caught.value)


def test_finished_mounts_are_remembered_up_to_a_limit() -> None:
    registry = Registry()
    forgotten: List[Optional[Managed]] = []
    for _ in range(MAX_FINISHED + 2):
        managed = registry.add(Mount("a", "restore", "/a"))
        registry.mounted(managed, 1, 1, 1, {})
        forgotten.append(registry.gone(managed, "replaced"))
    assert len(registry.finished) == MAX_FINISHED and not len(registry)
    assert [managed.number for managed in forgotten if managed is not None] == [1, 2]
    assert registry.last("a").number == MAX_FINISHED + 2


def test_a_record_survives_being_saved() -> None:
    registry = registry_with("a", mode="stub")
    managed = registry.ask_replace(Replace("a", "s", "t", 1, ("/x",), "/cg", "hold", "rw", True, 5.0))
    running(registry, managed)
    registry.replace_progress(managed, "mounting", {"attempt": 1}, 1.0)
    again = Managed.from_json(json.loads(json.dumps(managed.to_json())))
    assert again == managed


@pytest.mark.parametrize("record", [{}, {"state": "odd"}, {"state": "gone", "replacement": None, "colour": 1}])
def test_a_record_of_something_else_is_refused(record: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Managed.from_json(record)  # type: ignore[arg-type]


def test_options_are_told_to_nobody() -> None:
    """Some hold passwords."""
    told = []
    registry = Registry(lambda managed, event, details, when=None: told.append((event, dict(details))))
    registry.mounted(registry.add(Mount("a", "stub", "/a")), 1, 1, 1, {})
    registry.ask_replace(Replace("a", "//srv/x", "cifs", 0, options="password=secret", strict=True))
    event, details = told[-1]
    assert event == "replace-asked" and details["source"] == "//srv/x" and details["strict"] is True
    assert "secret" not in str(told)


def test_numbers_go_on_after_a_takeover() -> None:
    registry = Registry()
    old = registry_with("a").get("a")
    old.number = 41
    registry.adopt(old)
    older = registry_with("c").get("c")
    registry.adopt(older)
    assert older.number == 1
    assert registry.add(Mount("b", "restore", "/b")).number == 42 and registry.ever_mounted


@pytest.mark.parametrize(
    "state, by_real, replaced, phase",
    [
        (ended(Phase.DONE), False, True, Phase.DONE),
        (ended(Phase.WAITING), True, True, Phase.DONE),  # its process was killed when all was done
        (ended(Phase.WAITING), False, False, Phase.WAITING),
        (ended(Phase.FAILED), True, True, Phase.FAILED),
        (ended(Phase.FAILED), False, False, Phase.FAILED),
    ],
)
def test_what_became_of_a_mount_whose_file_system_has_ended(
    state: Callable[[Registry, Managed], None], by_real: bool, replaced: bool, phase: Phase
) -> None:
    registry = registry_with("a", mode="stub")
    managed = ask(registry)
    state(registry, managed)
    assert registry.was_replaced(managed, by_real) is replaced
    assert managed.replacement is not None and managed.replacement.phase is phase
    if phase is Phase.DONE and by_real:
        assert managed.replacement.report is not None and managed.replacement.report["left"] == []


def test_a_mount_that_was_not_to_be_replaced_yet_was_not() -> None:
    registry = registry_with("a")
    assert not registry.was_replaced(registry.get("a"), True)
    assert not registry.was_replaced(ask(registry, mode="hold"), True)
