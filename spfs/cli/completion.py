"""spfs completion: scripts by which a shell completes the commands, made from their parsers by shtab."""

from __future__ import annotations

import argparse
import sys

import shtab

from spfs.cli import programs

_FILES = {"DIR": shtab.DIRECTORY, "CGROUP": shtab.DIRECTORY, "FILE": shtab.FILE, "PATH": shtab.FILE}


def run(options: argparse.Namespace) -> None:
    parser = programs.parser_of(options.program)
    _mark(parser)
    sys.stdout.write(shtab.complete(parser, options.shell).rstrip() + "\n")


def _mark(parser: argparse.ArgumentParser) -> None:
    """Tell shtab which values are names of files."""
    for action in programs.options(parser):
        name = "DIR" if action.dest == "mountpoint" else action.metavar
        if isinstance(name, str) and name in _FILES:
            action.complete = _FILES[name]  # type: ignore[attr-defined]
    for _, _, subparser in programs.subcommands(parser):
        _mark(subparser)
