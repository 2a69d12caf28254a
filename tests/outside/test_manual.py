"""What is made from the parsers (manual pages, completion), and what is installed beside the programs (systemd)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

from spfs.cli import manual, programs

TOP = Path(__file__).parents[2]


def needed(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: install the Debian package {package}")
    return found


def spfs(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "spfs.cli.spfs", *arguments], cwd=TOP, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.mark.parametrize("name", programs.NAMES)
def test_the_page_of_a_program_has_all_that_help_has(name: str) -> None:
    page = manual.page(name, "2026-01-01")
    plain = page.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
    parser = programs.parser_of(name)
    parsers = [parser, *(subparser for _, _, subparser in programs.subcommands(parser))]
    for one in parsers:
        for action in programs.options(one):
            assert f".B {programs.invocation(one, action)}\n".replace("…", "...") in plain
            assert " ".join(programs.help_of(one, action).split())[:40] in " ".join(plain.split())
    for command, _, _ in programs.subcommands(parser):
        assert f'.SS "{name} {command}"\n' in page


@pytest.mark.parametrize("name", programs.NAMES)
def test_mandoc_has_nothing_to_say(name: str) -> None:
    command = [needed("mandoc", "mandoc"), "-Tlint", "-Wwarning"]
    done = subprocess.run(command, input=manual.page(name), capture_output=True, text=True, timeout=30)
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_a_page_is_shown_as_it_is_meant() -> None:
    shown = subprocess.run(
        [needed("mandoc", "mandoc"), "-Tascii", "-Owidth=100"], input=manual.page("spfs"), capture_output=True,
        text=True, check=True, timeout=30,
    ).stdout  # fmt: skip
    plain = re.sub(r".\x08", "", shown)
    assert re.search(r"^ +spfs replace .*\[--source SOURCE\]", plain, re.MULTILINE)
    assert re.search(r"^ +--strict\s+change nothing if anything could not be moved", plain, re.MULTILINE)
    assert "  spfs mount data /mnt/data                 stand-in at /mnt/data, restore mode" in plain


def test_pages_of_all_programs_in_a_directory(tmp_path: Path) -> None:
    assert spfs("manual", "--output", str(tmp_path / "man")) == ""
    names = sorted(path.name for path in (tmp_path / "man").iterdir())
    assert names == ["spfs-client.1", "spfs-criu.1", "spfs-manager.8", "spfs.1", "stubfs.8", "stubfsctl.1"]
    (tmp_path / "file").write_text("")
    error = spfs("manual", "--output", str(tmp_path / "file"), code=1)
    assert error.startswith("spfs: cannot write the manual page") and "--output" in error


def completed(words: List[str]) -> List[str]:
    """What bash offers for the last one."""
    script = spfs("completion", "bash")
    line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
    call = line + '; _shtab_spfs; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{call}"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices() -> None:
    assert completed(["spfs", "st"]) == ["status"]
    assert completed(["spfs", "replace", "--str"]) == ["--strict"]
    assert completed(["spfs", "mode", "s"]) == ["stub"]


def test_shells_read_the_scripts_of_all_programs(tmp_path: Path) -> None:
    for name in programs.NAMES:
        assert subprocess.run(["bash", "-n"], input=spfs("completion", "bash", name), text=True).returncode == 0
        assert spfs("completion", "zsh", name).startswith(f"#compdef {name}\n")
    assert "invalid choice: 'fish'" in spfs("completion", "fish", code=2)


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    analyze = needed("systemd-analyze", "systemd")
    unit = (TOP / "systemd" / "spfs-manager.service").read_text()
    start = re.search(r"^ExecStart=(\S+) (.*)$", unit, re.MULTILINE)
    assert start is not None
    programs.parser_of("spfs-manager").parse_args(start.group(2).split())
    # Where the program is on this machine; the pages are installed by nobody here.
    unit = unit.replace(start.group(1), "/bin/true")
    unit = re.sub(r"^Documentation=.*\n", "", unit, flags=re.MULTILINE)
    (tmp_path / "spfs-manager.service").write_text(unit)
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / "spfs-manager.service")], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    about = [line for line in (done.stdout + done.stderr).splitlines() if "spfs-manager" in line]
    assert (about, done.returncode) == ([], 0)
    (tmp_path / "spfs-manager.service").write_text(unit.replace("KillMode=process", "KillMode=sometimes"))
    done = subprocess.run([analyze, "verify", "--man=no", str(tmp_path / "spfs-manager.service")],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert "kill mode" in done.stderr  # that is what it looks at


def test_the_directories_are_those_that_systemd_tmpfiles_takes() -> None:
    tmpfiles = needed("systemd-tmpfiles", "systemd")
    lines = [line for line in (TOP / "systemd" / "spfs.conf").read_text().splitlines() if line and line[0] != "#"]
    assert {line.split()[1] for line in lines} == {"/run/spfs-manager", "/var/log/spfs"}
    # --clean with a prefix that is none of ours: it reads all, and does nothing.
    done = subprocess.run([tmpfiles, "--clean", "--prefix=/nonexistent", str(TOP / "systemd" / "spfs.conf")],
                          capture_output=True, text=True, timeout=30)  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
