"""spfs metrics: what the manager has counted, in Prometheus' text format, on standard output or as a file.

The manager knows numbers; that they are metrics is known here, so that it need not load a library for it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, Dict, Iterator, List, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from spfs.client import ManagerClient
from spfs.errors import SpfsError, reason
from spfs.state import write_atomically

_STATES = ("starting", "mounted", "unmounting", "failed")
_EVENTS = {
    "mount": ("spfs_mounts_asked", "Mounts that were asked for"),
    "mounted": ("spfs_mounts_made", "Mounts that came to be"),
    "failed": ("spfs_mounts_failed", "Mounts whose file system process died"),
    "gone": ("spfs_mounts_gone", "Mounts that are gone: unmounted or replaced"),
    "attempt": ("spfs_real_mount_failures", "Attempts to mount a real file system that failed"),
    "taken-over": ("spfs_mounts_taken_over", "Mounts of an earlier manager that this one looks after"),
}


class ManagerCollector(Collector):
    """The metrics of one answer of a manager."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self._answer = answer

    def collect(self) -> Iterator[Metric]:
        manager = self._answer["manager"]
        info = GaugeMetricFamily("spfs_manager_info", "The manager", labels=["version", "pid"])
        info.add_metric([manager["version"], str(manager["pid"])], 1)
        yield info
        yield _gauge("spfs_manager_start_time_seconds", "When it was started, since the epoch", manager["started"])
        yield _gauge("spfs_manager_clients", "Clients that are connected", manager["clients"])
        yield from _process(manager["pid"])
        yield from _mounts(self._answer["mounts"])
        yield from _counters(self._answer["counters"])


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _process(pid: int) -> Iterator[Metric]:
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times, memory, files = process.cpu_times(), process.memory_info().rss, process.num_fds()
    except psutil.Error:
        return  # it ended after its answer
    yield CounterMetricFamily("spfs_manager_cpu_seconds", "Its processor time", value=times.user + times.system)
    yield _gauge("spfs_manager_resident_memory_bytes", "Its memory", memory)
    yield _gauge("spfs_manager_open_fds", "Its file descriptors", files)


def _mounts(mounts: List[Dict[str, Any]]) -> Iterator[Metric]:
    counts = GaugeMetricFamily("spfs_mounts", "Mounts that are there, by state", labels=["state"])
    for state in _STATES:
        counts.add_metric([state], sum(mount["state"] == state for mount in mounts))
    yield counts
    labels = ["id", "mountpoint"]
    mode = GaugeMetricFamily("spfs_mount_mode", "1 for the mode that a mount is in", labels=[*labels, "mode"])
    text = "When the mode was entered, since the epoch"
    since = GaugeMetricFamily("spfs_mount_mode_since_seconds", text, labels=labels)
    held = GaugeMetricFamily("spfs_mount_held_requests", "Requests that wait on a mount", labels=labels)
    answering = GaugeMetricFamily("spfs_mount_answering", "1 if the file system process answers", labels=labels)
    pending = GaugeMetricFamily("spfs_mount_replace", "1 for the phase of a mount's replace", labels=[*labels, "phase"])
    for mount in mounts:
        who = [_label(mount["id"]), _label(mount["mountpoint"])]
        mode.add_metric([*who, mount["mode"]], 1)
        since.add_metric(who, mount["since"])
        answering.add_metric(who, mount["held"] is not None)
        if mount["held"] is not None:
            held.add_metric(who, mount["held"])
        if mount["replace"] is not None:
            pending.add_metric([*who, mount["replace"]], 1)
    yield from (mode, since, held, answering, pending)


def _label(value: str) -> str:
    """A path is bytes, a label is text."""
    return os.fsencode(value).decode(errors="replace")


def _counters(counters: Mapping[str, Any]) -> Iterator[Metric]:
    for event, (name, text) in _EVENTS.items():
        yield CounterMetricFamily(name, text, value=counters["events"].get(event, 0))
    replaces = CounterMetricFamily("spfs_replaces", "Replaces that ended, by how", labels=["phase"])
    for phase in ("done", "failed", "aborted"):
        replaces.add_metric([phase], counters["replaces"].get(phase, 0))
    yield replaces
    moved = CounterMetricFamily("spfs_references_moved", "References of processes that were moved", labels=["kind"])
    for kind, count in sorted(counters["moved"].items()):
        moved.add_metric([kind], count)
    yield moved
    yield CounterMetricFamily("spfs_references_left", "References that stayed on a stand-in", value=counters["left"])
    blackout = counters["blackout"]
    total, buckets = 0, []
    for bound, count in zip([*map(str, blackout["bounds"]), "+Inf"], blackout["counts"]):
        total += count
        buckets.append((bound, float(total)))
    yield HistogramMetricFamily(
        "spfs_blackout_seconds", "For how long processes stood still", buckets=buckets, sum_value=blackout["sum"]
    )
    stages = CounterMetricFamily("spfs_blackout_stage_seconds", "Of that, by stage", labels=["stage"])
    for stage, spent in blackout["stages"].items():
        stages.add_metric([stage], spent)
    yield stages


def text_of(answer: Mapping[str, Any]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ManagerCollector(answer))
    return generate_latest(registry)


def write(options: argparse.Namespace, client: ManagerClient) -> None:
    answer = client.metrics()
    data = json.dumps(answer, indent=2).encode() + b"\n" if options.json else text_of(answer)
    if options.textfile is None:
        sys.stdout.buffer.write(data)
        return
    path = os.path.abspath(options.textfile)
    try:
        # The exporter, which is somebody else, may look at any moment: all of it or nothing.
        write_atomically(path, data, 0o644)
    except OSError as error:
        raise SpfsError(
            f"cannot write the metrics: {path}: {reason(error)}", "choose another: --textfile", error.errno or 0
        ) from error
