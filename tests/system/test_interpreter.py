"""Processes that are started in a new interpreter: with the caller's packages, and with nothing of its directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from stubfs_kit import environment

from stubfs import interpreter

MODULES = ["signal", "socket", "json", "stubfs", "spfs", "fuse", "logging"]

SCRIPTS = {
    "stubfs.mount": """
import stubfs
with stubfs.mount("mnt") as mount:
    mount.mode("stub")
    print(mount.client.status().mode)
""",
    "spfs.testing": """
from spfs.testing import delayed_mount
with delayed_mount(path="mnt") as mount:
    mount.stub()
    print(mount.status().mode)
    assert mount.replace("real")["left"] == []
""",
    "spfs.restore": """
import os
from spfs.restore import Restore
with Restore.start("work") as restore:
    restore.mount("a", os.path.abspath("mnt"))
    restore.stub()
    print(restore.client.status()["mounts"][0]["mode"])
    restore.client.unmount(force=True)
""",
}


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "program" / "script.py"
    path.parent.mkdir()
    path.write_text(text)
    return path


@pytest.mark.needs_root
@pytest.mark.needs_fuse
@pytest.mark.parametrize("starter", SCRIPTS)
def test_modules_of_the_current_directory_are_not_imported(starter: str, tmp_path: Path) -> None:
    where = tmp_path / "where"
    for name in ("mnt", "real"):
        (where / name).mkdir(parents=True)
    for name in MODULES:
        (where / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + ' ')\n")
    program = script(tmp_path, SCRIPTS[starter].replace('"work"', repr(str(tmp_path / "work"))))
    done = subprocess.run(
        [sys.executable, program], cwd=where, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "stub\n"), done.stderr
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()


def test_what_only_the_caller_looks_at_is_found_last(tmp_path: Path) -> None:
    here = tmp_path / "program"
    program = script(
        tmp_path,
        "import subprocess, sys\n"
        "from stubfs import interpreter\n"
        "subprocess.run(interpreter.command('only_here', 'an argument'), check=True, cwd='/')\n",
    )
    (here / "only_here.py").write_text(
        "import signal, sys\n"
        "import stubfs\n"
        "def main():\n"
        "    print(hasattr(signal, 'SIGTERM'), stubfs.__file__, *sys.argv[1:])\n"
    )
    (here / "signal.py").write_text("")
    done = subprocess.run([sys.executable, program], env=environment(), capture_output=True, text=True, timeout=60)
    package = Path(interpreter.__file__).with_name("__init__.py")
    assert done.stdout == f"True {package} an argument\n", done.stderr
