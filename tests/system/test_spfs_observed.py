"""What machines watch: metrics, structured logs and their levels, readiness for a service manager."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Dict, List, Tuple

import pytest
from manager_kit import ENVIRONMENT, Manager, alive, manager_in, reading, run
from prometheus_client.parser import text_string_to_metric_families

from spfs.testing import wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]
BIND = 4096  # MS_BIND


def samples(text: str) -> Dict[Tuple[str, ...], float]:
    """By name and labels. The parser refuses what Prometheus would."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter", "histogram"), family
        for sample in family.samples:
            labels = [f"{key}={value}" for key, value in sorted(sample.labels.items()) if key != "mountpoint"]
            found[(sample.name, *labels)] = sample.value
    return found


def metrics(manager: Manager, *arguments: str) -> str:
    done = run("spfs.cli.spfs", "metrics", *arguments, "--socket-path", str(manager.socket))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_metrics_of_a_replace(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    before = samples(metrics(manager))
    assert before["spfs_mounts", "state=mounted"] == 0 and before["spfs_manager_resident_memory_bytes",] > 1e6
    client = manager.client()
    client.mount("a", str(mnt))
    (mnt / "file").write_text("0123")
    with open(mnt / "file") as file:
        client.mode("stub")
        with reading(mnt / "file") as reader:
            wait_until(client.held)
            now = samples(metrics(manager))
            assert now["spfs_mounts", "state=mounted"] == now["spfs_mount_answering", "id=a"] == 1
            assert now["spfs_mount_held_requests", "id=a"] == 1 and now["spfs_mount_mode", "id=a", "mode=stub"] == 1
            client.replace("a", str(tmp_path / "real"), "none", BIND, begin="release")
            wait_until(lambda: manager.row("a")["replace"]["attempts"])
            assert samples(metrics(manager))["spfs_mount_replace", "id=a", "phase=running"] == 1
            (tmp_path / "real").mkdir()
            (tmp_path / "real" / "file").write_text("real")
            report = client.wait("a")["replace"]["report"]
            reader.wait(10)
        assert file.read() == "real"
    after = samples(metrics(manager))
    subprocess.run(["umount", mnt], check=True)
    assert after["spfs_replaces_total", "phase=done"] == 1 and after["spfs_replaces_total", "phase=failed"] == 0
    assert after["spfs_references_moved_total", "kind=file"] == report["moved"]["file"] == 1
    assert after["spfs_real_mount_failures_total",] >= 1
    assert after["spfs_blackout_seconds_count",] == after["spfs_blackout_seconds_bucket", "le=+Inf"] == 1
    assert after["spfs_blackout_seconds_sum",] == pytest.approx(report["blackout"])
    assert after["spfs_blackout_seconds_bucket", "le=0.005"] == (1 if report["blackout"] <= 0.005 else 0)
    assert after["spfs_blackout_stage_seconds_total", "stage=mounts"] == pytest.approx(report["stages"]["mounts"])


def test_a_file_for_the_node_exporter(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    manager.client().mount("a", str(odd), "stub")
    path = tmp_path / "spfs.prom"
    path.write_text("old")
    with open(path) as old:
        old_mask = os.umask(0o077)
        try:
            assert metrics(manager, "--textfile", str(path)) == ""
        finally:
            os.umask(old_mask)
        assert old.read() == "old"  # whoever reads meanwhile has a whole file
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and os.listdir(tmp_path).count("spfs.prom.new") == 0
    assert samples(path.read_text())["spfs_mounts", "state=mounted"] == 1
    done = run("spfs.cli.spfs", "metrics", "--textfile", "/nonexistent/x.prom", "--socket-path", str(manager.socket))
    assert done.returncode == 1 and "cannot write the metrics: /nonexistent/x.prom: No such file" in done.stderr
    answer = json.loads(metrics(manager, "--json"))
    assert answer["counters"]["events"]["mounted"] == 1 and answer["mounts"][0]["held"] == 0


def test_the_manager_needs_none_of_what_draws_and_measures(manager: Manager, mnt: Path) -> None:
    manager.client().mount("a", str(mnt))
    manager.client().metrics()
    for pid in (manager.pid, manager.row("a")["pid"]):
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "psutil" not in mapped  # the only one of them with a shared object
    code = "import sys, spfs.cli.manager, stubfs.cli; print([m for m in sys.modules if m.split('.')[0] in %r])"
    heavy = ("rich", "prometheus_client", "psutil", "shtab", "http", "asyncio")
    done = subprocess.run([sys.executable, "-c", code % (heavy,)], env={**os.environ, **ENVIRONMENT},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "[]\n"


def log_of(path: Path) -> List[Dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_logs_as_json(mnt: Path, tmp_path: Path) -> None:
    with manager_in(tmp_path) as manager:
        manager.start("--log-format", "json", "--log-dir", str(tmp_path / "logs"))
        client = manager.client()
        client.mount("a", str(mnt))
        client.mode("stub", "a")
        client.unmount("a")
        wait_until(lambda: manager.row("a")["state"] == "gone")
        entries = log_of(tmp_path / "logs" / "spfs-manager.log")
        assert {"info", "debug"} <= {str(entry["level"]) for entry in entries}
        (mounted,) = [entry for entry in entries if str(entry["message"]).startswith("mounted a on")]
        assert mounted["logger"] == "spfs.supervisor" and mounted["pid"] == manager.pid
        when = datetime.strptime(str(mounted["time"]), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
        assert abs((datetime.now(timezone.utc) - when).total_seconds()) < 60
        stubs = log_of(tmp_path / "logs" / "stubfs-1.log")
        assert any("mode stub" in str(entry["message"]) for entry in stubs)


@pytest.mark.parametrize("level, expected", [(0, set()), (1, {"INFO"}), (2, {"INFO", "DEBUG"})])
def test_levels_of_the_log(mnt: Path, tmp_path: Path, level: int, expected: "set[str]") -> None:
    """Nothing when all is well; -v: changes of state, a line each; -vv: also the steps."""
    work = tmp_path / "m"
    arguments = ["-d", *["-v"] * level, "--work-dir", str(work), "--log-dir", str(tmp_path / "logs")]
    assert run("spfs.cli.manager", *arguments).returncode == 0
    with manager_in(tmp_path) as manager:
        manager.pid = manager.client().status()["manager"]["pid"]
        manager.client().mount("a", str(mnt))
        manager.client().mode("stub", "a")
        manager.client().unmount("a")
        wait_until(lambda: manager.row("a")["state"] == "gone")
        lines = (tmp_path / "logs" / "spfs-manager.log").read_text().splitlines()
        found = {line.split()[3] for line in lines}
        # Warnings are about the machine, and come a second after the start.
        assert found - {"WARNING"} == expected
        changes = [line for line in lines if " INFO " in line and "spfs.controller" not in line]
        assert len(changes) == (3 if level else 0), changes  # mounted, stub mode, gone


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told_when_the_socket_accepts(tmp_path: Path, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        address = f"@spfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        notify.bind("\0" + address[1:] if abstract else address)
        notify.settimeout(20)
        command = [sys.executable, "-m", "spfs.cli.manager", "--work-dir", str(tmp_path / "m")]
        with subprocess.Popen(command, env={**os.environ, **ENVIRONMENT, "NOTIFY_SOCKET": address}) as process:
            try:
                assert notify.recv(100) == b"READY=1"
                done = run("spfs.cli.spfs", "status", "--socket-path", str(tmp_path / "m" / "spfs-manager.sock"))
                assert f"no mounts (manager {process.pid}, " in done.stdout
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
    assert not alive(process.pid)
