"""All commands of the package by name, for what is made from their parsers: completion, manual pages, the reference."""

from __future__ import annotations

import argparse
import importlib
from typing import Iterator, List, Tuple

_MODULES = {
    "spfs": "spfs.cli.spfs",
    "spfs-manager": "spfs.cli.manager",
    "spfs-client": "spfs.cli.client",
    "spfs-criu": "spfs.cli.criu",
    "stubfs": "stubfs.cli",
    "stubfsctl": "stubfs.ctl",
}
NAMES = tuple(_MODULES)
SECTIONS = {"spfs-manager": 8, "stubfs": 8}
"""Of the manual; 1 for the others."""


def parser_of(name: str) -> argparse.ArgumentParser:
    parser = importlib.import_module(_MODULES[name]).parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def subcommands(parser: argparse.ArgumentParser) -> List[Tuple[str, str, argparse.ArgumentParser]]:
    """(name, what it is for, its parser)."""
    return [found for action in parser._actions for found in _choices(action)]


def _choices(action: argparse.Action) -> Iterator[Tuple[str, str, argparse.ArgumentParser]]:
    if isinstance(action, argparse._SubParsersAction):
        texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, parser in action.choices.items():
            yield name, texts.get(name, ""), parser


def options(parser: argparse.ArgumentParser) -> List[argparse.Action]:
    """Arguments and options, in their order; without those that are not to be seen."""
    return [
        action for action in parser._actions
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction)
    ]  # fmt: skip


def invocation(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """As --help shows it: ``-o FILE, --output FILE``."""
    return parser._get_formatter()._format_action_invocation(action)


def usage(parser: argparse.ArgumentParser) -> str:
    """On one line."""
    return " ".join(parser.format_usage().split()[1:])


def help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""
