"""The commands as people and scripts call them: output, exit codes, and errors of one line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from manager_kit import Manager, alive, reading, run

from spfs.restore import FileSpec, Restore
from spfs.testing import wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


def spfs(manager: Manager, *arguments: str, code: int = 0) -> str:
    """Standard output, or the one line of the error."""
    done = run("spfs.cli.spfs", *arguments, environment={"SPFS_MANAGER_SOCK": str(manager.socket)})
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith("spfs: cannot ") and done.stderr.count("\n") == 1
        return done.stderr
    assert done.stderr == ""
    return done.stdout


def client(manager: Manager, *arguments: str, code: int = 0) -> str:
    done = run("spfs.cli.client", *arguments, "--socket-path", str(manager.socket))
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_a_delayed_mount_by_hand(manager: Manager, mnt: Path) -> None:
    assert "no mounts" in spfs(manager, "status")
    assert spfs(manager, "mount", "data", str(mnt)) == ""
    (mnt / "file").write_text("x")
    assert spfs(manager, "replace", "data", "--source", "none", "--type", "tmpfs", "--hold") == ""
    assert spfs(manager, "mode", "stub", "data") == ""
    with reading(mnt / "file") as reader:
        wait_until(lambda: manager.client().held())
        lines = spfs(manager, "status", "data").splitlines()
        (row,) = [line.split() for line in lines if line.startswith(f"data  {mnt}")]
        assert row[:4] == ["data", str(mnt), "mounted", "stub"] and "held: tmpfs none" in " ".join(row)
        held = spfs(manager, "held")
        assert f"{reader.pid}" in held and "cat" in held and "file" in held
        assert "no request is held" in spfs(manager, "held", "--pid", "1")
        (entry,) = json.loads(spfs(manager, "held", "--pid", str(reader.pid), "--json"))
        assert entry["command_line"].startswith("cat /") and entry["operation"] == "lookup"
        assert "1 held requests" in spfs(manager, "unmount", "data", code=1)
        spfs(manager, "unmount", "data", "--force")
        assert reader.wait(10) == 1
    assert "gone: unmounted" in spfs(manager, "status", "data")
    pid = manager.pid
    spfs(manager, "shutdown")
    manager.wait_ended()
    assert not alive(pid)


def test_rules_and_options_of_stub_mode(manager: Manager, mnt: Path) -> None:
    spfs(manager, "mount", "data", str(mnt))
    assert "no rules" in spfs(manager, "rules", "data")
    spfs(manager, "rules", "data", "--rule", "fail operations=mkdir errno=ENOSPC", "--rule", "serve path='a b'")
    assert spfs(manager, "rules", "--all").split("\n")[1:3] == [
        "data  fail operations=mkdir errno=ENOSPC", "data  serve 'path=a b'",
    ]  # fmt: skip
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (mnt / "d").mkdir()
    assert json.loads(spfs(manager, "rules", "data", "--json"))["data"][1] == {"action": "serve", "path": "a b"}
    spfs(manager, "rules", "data", "--none")
    (mnt / "d").mkdir()
    spfs(manager, "mode", "stub", "data", "--timeout", "0.1", "--errno", "ENODATA", "--exempt", str(os.getpid()))
    assert os.listdir(mnt) == ["d"]
    with reading(mnt / "d/file") as reader:
        assert os.strerror(errno.ENODATA).encode() in reader.communicate(timeout=10)[1]
    assert "fsink: no such operation" in spfs(manager, "rules", "data", "--rule", "hold operations=fsink", code=2)
    assert "timeout is for mode=stub alone" in spfs(manager, "mode", "restore", "data", "--timeout", "5", code=1)


def test_wait_until_somebody_waits(manager: Manager, mnt: Path) -> None:
    spfs(manager, "mount", "data", str(mnt))
    spfs(manager, "mode", "stub", "data")
    assert "held" in spfs(manager, "wait", "data", "--held", "1", "--timeout", "0.05", code=4)
    with reading(mnt / "file") as reader:
        shown = spfs(manager, "wait", "data", "--held", "1", "--timeout", "20")
        assert f"{reader.pid}" in shown and "lookup" in shown
        (entry,) = json.loads(spfs(manager, "wait", "data", "--held", "1", "--json"))
        assert entry["pid"] == reader.pid
        spfs(manager, "unmount", "data", "--force")
    assert "it is gone" in spfs(manager, "wait", "data", "--held", "1", code=1)


def test_what_the_directory_lacks_is_carried_there(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    spfs(manager, "mount", "data", str(mnt))
    (mnt / "made").write_text("in restore mode")
    (tmp_path / "real").mkdir()
    assert "missing is for mode=proxy alone" in spfs(manager, "mode", "stub", "data", "--missing", "carry", code=1)
    spfs(manager, "mode", "proxy", "data", "--proxy-dir", str(tmp_path / "real"), "--missing", "carry")
    assert (tmp_path / "real/made").read_text() == (mnt / "made").read_text() == "in restore mode"


def test_everything_as_json(manager: Manager, mnt: Path) -> None:
    def answer(*arguments: str) -> Any:
        return json.loads(spfs(manager, *arguments, "--json"))

    assert answer("mount", "a", str(mnt))["id"] == "a"
    assert answer("mode", "stub", "--all") == {"mode": "stub", "mounts": ["a"]}
    assert answer("status")["mounts"][0]["mode"] == "stub"
    assert answer("held", "a") == []
    assert answer("replace", "a", "--source", "x", "--type", "tmpfs", "--hold") == {"id": "a", "replace": "held"}
    assert answer("abort", "a") == {"mounts": ["a"]}
    assert answer("unmount", "--all") == {"mounts": ["a"]}
    assert answer("shutdown") == {}
    manager.wait_ended()


def test_exit_codes_and_hints(manager: Manager, mnt: Path) -> None:
    spfs(manager, "mount", "a", str(mnt))
    spfs(manager, "replace", "a", "--source", "x", "--type", "tmpfs", "--hold")
    assert "it goes on" in spfs(manager, "wait", "a", "--timeout", "0.05", code=4)
    spfs(manager, "abort", "a")
    assert "aborted" in spfs(manager, "wait", "a", code=1)
    assert "unknown id (known: a)" in spfs(manager, "status", "ghost", code=1)
    assert "give either its id or --all" in spfs(manager, "unmount", code=2)
    assert "--release" in spfs(manager, "replace", "a", code=2)
    assert "proxy_dir is missing" in spfs(manager, "mode", "proxy", "a", code=1)
    assert "still mounted: a" in spfs(manager, "shutdown", code=1)
    done = run("spfs.cli.spfs", "wait", "a", "--json", "--socket-path", str(manager.socket))
    assert done.returncode == 1 and json.loads(done.stdout)["replace"]["phase"] == "aborted"


COMMANDS = ["status", "timeline", "held", "mount", "mode", "rules", "replace", "wait", "abort", "unmount", "shutdown"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    done = run("spfs.cli.spfs", command, "--help")
    assert done.returncode == 0 and "--json" in done.stdout and "--socket-path" in done.stdout
    assert f"  {command} " in run("spfs.cli.spfs", "--help").stdout


def test_without_a_manager(tmp_path: Path) -> None:
    done = run("spfs.cli.spfs", "status", "--socket-path", str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr.startswith("spfs: cannot reach the manager") and "spfs-manager -d" in done.stderr


def test_requests_of_action_scripts(manager: Manager, mnt: Path) -> None:
    assert client(manager, "manage", f"mount;id=1;mode=restore;mountpoint={mnt}") == ""
    assert client(manager, "manage", "mode;all;mode=stub") == ""
    base = "replace;id=1;source=none;type=tmpfs;flags=0;mode=hold"
    assert client(manager, "manage", base + r"\0size=1m,mode=700\0") == ""
    assert saved(manager)["options"] == "size=1m,mode=700"
    assert client(manager, "manage", base, "--options", "size=2m") == ""
    assert saved(manager)["options"] == "size=2m"
    assert "given twice" in client(manager, "manage", base + r"\0size=1m", "--options", "x", code=2)
    assert "unknown key 'speed'" in client(manager, "manage", "mode;all;mode=stub;speed=1", code=1)
    assert json.loads(client(manager, "manage", '{"command": "status"}'))["mounts"][0]["id"] == "1"


def saved(manager: Manager) -> Any:
    return json.loads((manager.work / "mount-1.json").read_text())["replacement"]["request"]


def test_options_are_not_shown_to_everybody(manager: Manager, mnt: Path) -> None:
    connection = manager.client()
    connection.mount("a", str(mnt))
    connection.replace("a", "//srv/share", "cifs", options="username=u,password=secret", begin="hold")
    assert "secret" not in json.dumps(connection.status()) and "secret" not in manager.log()
    assert (manager.work / "mount-1.json").stat().st_mode & 0o077 == 0


def test_the_mode_of_one_file_system_by_its_own_socket(manager: Manager, mnt: Path, tmp_path: Path) -> None:
    control = manager.client().mount("a", str(mnt))["control"]
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("real")

    def mode(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return run("spfs.cli.client", "mode", *arguments, "--socket-path", control)

    assert mode("--mode", "stub").returncode == 0
    assert mode("--mode", "proxy").returncode == 2
    failed = mode("--mode", "proxy", "--path_to_send", str(tmp_path / "none"))
    assert failed.returncode == 1 and "it must be a directory" in failed.stderr
    assert mode("--mode", "proxy", "--path_to_send", str(tmp_path / "real")).returncode == 0
    assert (mnt / "file").read_text() == "real"
    assert run("spfs.cli.client", "mode", "--mode", "stub", "--socket-path", f"{control}x").returncode == 1
    # What was done behind the manager's back is seen where it is shown.
    assert manager.row("a")["mode"] == "proxy"


def test_a_restore_by_the_library(tmp_path: Path, mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "m"
    with Restore.start(str(work)) as restore:
        pid = restore.client.status()["manager"]["pid"]
        try:
            monkeypatch.setenv("SPFS_MODE", "")
            monkeypatch.setenv("SPFS_MANAGER_SOCK", "")
            restore.set_env()
            assert os.environ["SPFS_MODE"] == "stub" and os.environ["SPFS_MANAGER_SOCK"] == f"{work}/control.sock"
            restore.mount("1", str(mnt))
            restore.create_files("1", [FileSpec("dir/file", 0o100644, 4096), FileSpec("fifo", 0o010600)])
            assert os.stat(mnt / "dir" / "file").st_size == 4096
            restore.request_replace("1", "none", "tmpfs", begin="hold")
            with Restore.start(str(work)) as again:
                assert again.client.status()["manager"]["pid"] == pid
                again.stub()
            assert restore.client.status("1")["mounts"][0]["mode"] == "stub"
        finally:
            restore.client.unmount(force=True)
    wait_until(lambda: not alive(pid), what="it ends with its last mount")
    assert not work.exists()


def test_one_file_system_by_its_own_socket(manager: Manager, mnt: Path) -> None:
    """Rules, who waits, and waiting for that, as shell scripts do it."""
    control = manager.client().mount("data", str(mnt))["control"]
    (mnt / "file").write_text("x")

    def ask(*arguments: str, code: int = 0) -> str:
        done = run("spfs.cli.client", *arguments, "--socket-path", control)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    assert ask("rules") == ""
    ask("rules", "--rule", "hold operations=read", "--rule", "fail path='a b'")
    assert ask("rules").splitlines() == ["hold operations=read", "fail 'path=a b'"]
    assert ask("held") == "[]\n"
    assert "0 after 0.1 s" in ask("wait-held", "--timeout", "0.1", code=4)
    with reading(mnt / "file") as reader:
        ask("wait-held", "--operation", "read", "--pid", str(reader.pid), "--timeout", "10")
        (held,) = json.loads(ask("held", "--path", "file"))
        assert (held["operation"], held["pid"]) == ("read", reader.pid)
        assert json.loads(ask("held", "--operation", "fsync")) == []
        ask("rules", "--none")
        assert reader.communicate(timeout=10)[0] == b"x"
    assert "fsink: no such operation" in ask("rules", "--rule", "hold operations=fsink", code=2)
    assert "contradict" in ask("rules", "--rule", "hold", "--none", code=2)
    assert "missing: carry" in ask("mode", "--mode", "stub", "--missing", "carry", code=1)
    ask("mode", "--mode", "stub")
    ask("mode", "--mode", "restore")
    assert (mnt / "file").read_text() == "x"
