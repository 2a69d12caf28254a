"""The commands in the tutorial and the how-to pages, run as they stand there; the site, built."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from manager_kit import Manager, manager_in
from prometheus_client.parser import text_string_to_metric_families

from spfs.cli import metrics

TOP = Path(__file__).parents[2]
PAGES = [TOP / "docs" / "tutorial.md", *sorted((TOP / "docs" / "howto").glob("*.md"))]
PRIVATE = "mount -t tmpfs run /run; cd /run"
"""Where managers are found, and what the pages use: nobody else's."""


def blocks(page: Path) -> List[str]:
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.needs_root
@pytest.mark.needs_fuse
@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_commands_of_a_page(page: Path, tmp_path: Path) -> None:
    commands = blocks(page)
    assert commands, "a page of tasks without a command"
    script = tmp_path / "script"
    # A "!" does not end a script by set -e, whatever follows it; here it shall.
    text = re.sub(r"^! (.*)$", r"if \1; then echo 'should have failed'; exit 1; fi", "\n".join(commands), flags=re.M)
    script.write_text(f"set -eu\n{PRIVATE}\nset -x\n{text}\nset +x\n[ -z \"$(jobs -pr)\" ]\n")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("SPFS_MANAGER_SOCK", None)
    done = subprocess.run(
        # In a pid namespace of its own: whatever becomes of the script, everything ends with it.
        ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
         "bash", str(script)], env=environment, cwd=TOP,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=TOP, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text()
    for expected in ("spfs timeline", "spfs-manager", "stubfs", "--exit-with-spfs", "--textfile FILE"):
        assert expected in commands
    for page in (tmp_path / "site").rglob("*.html"):
        # Readable where there is no network: nothing is fetched from elsewhere.
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\"\s>]+)", page.read_text())
        assert fetched == [], page


@pytest.mark.needs_root
@pytest.mark.needs_fuse
def test_every_metric_is_in_the_reference(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    page = (TOP / "docs" / "reference" / "metrics.md").read_text()
    with manager_in(tmp_path) as manager:
        text = metric_text(manager.start(), tmp_path / "mnt")
    names = {
        family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(text)
    }
    assert names == {name for name in re.findall(r"`(spfs_\w+)`", page)}


def metric_text(manager: Manager, mnt: Path) -> str:
    client = manager.client()
    client.mount("a", str(mnt), "stub")
    client.replace("a", "none", "tmpfs", begin="hold")
    return metrics.text_of(client.metrics()).decode()


def test_every_event_is_in_the_reference() -> None:
    page = (TOP / "docs" / "reference" / "records.md").read_text()
    listed = set(re.findall(r"^\| `([^|]*)` \|", page, re.MULTILINE))
    named = {name for cell in listed for name in cell.replace("`", "").split(", ")}
    told = set()
    for path in (TOP / "spfs").rglob("*.py"):
        told |= set(re.findall(r"_?tell\(managed, \"([a-z-]+)\"", path.read_text()))
    told |= set(re.findall(r"line\(\"(\w+)\"", (TOP / "stubfs" / "waits.py").read_text()))
    told |= {"replace-hold", "replace-release", "attempt", "waiting"}  # put together where they are told
    assert told == named
