"""The probes: what they say of this machine, and of one that lacks something."""

from __future__ import annotations

import errno
import os
from typing import Iterator

import pytest

from spfs import features
from spfs.errors import MissingFeatureError


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    features.probe.cache_clear()
    yield
    features.probe.cache_clear()


@pytest.mark.parametrize("name", features.NAMES)
def test_each_is_there_or_says_why_not(name: str) -> None:
    feature = features.probe(name)
    assert feature.name == name
    assert feature.available == (feature.reason == "") == (feature.hint == "")


@pytest.mark.needs_root
def test_without_root_it_says_so() -> None:
    pid = os.fork()
    if pid == 0:
        os.setresuid(65534, 65534, 65534)
        feature = features.probe("root")
        said = not feature.available and "65534" in feature.reason and "root" in feature.hint
        os._exit(0 if said and not features.probe("mount_api").available else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "/nonesuch/libfuse.so.2")
    feature = features.probe("libfuse")
    assert not feature.available
    assert "/nonesuch/libfuse.so.2" in feature.reason
    with pytest.raises(MissingFeatureError, match="libfuse is not available.*install libfuse 2") as caught:
        features.require("openat2", "libfuse")
    assert (caught.value.errno, caught.value.exit_code) == (errno.ENOSYS, 3)


def test_what_is_there_is_not_complained_of() -> None:
    features.require("openat2")


def test_harmful_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"fs/fuse/max_request_timeout": 30, "kernel/hung_task_panic": 1}
    monkeypatch.setattr(features, "_sysctl", lambda name: values[name])
    timeout, panic = features.warnings()
    assert "max_request_timeout is 30 s" in timeout and "hung_task_panic" in panic
    monkeypatch.setattr(features, "_sysctl", lambda name: 0)
    assert features.warnings() == []
    monkeypatch.undo()
    assert features._sysctl("no/such/setting") == 0
