"""What the site has beyond the pages that are written: the commands, from their parsers; and the nav of explanations.

A hook of mkdocs; nothing else imports it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from spfs.cli import programs

COMMANDS = "reference/commands.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every page at the top that is neither home nor tutorial explains something: its title is its first heading."""
    pages = sorted(Path(config.docs_dir).glob("*.md"))
    explained = [page.name for page in pages if page.name not in ("index.md", "tutorial.md")]
    assert config.nav is not None
    config.nav.append({"Explanation": explained})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, COMMANDS, content="\n".join(_commands())))
    hook = files.get_file_from_path("site.py")
    if hook is not None:
        files.remove(hook)
    return files


def _commands() -> Iterator[str]:
    yield "# Commands\n\nMade from the programs themselves; `spfs manual` prints the same as manual pages.\n"
    for name in programs.NAMES:
        parser = programs.parser_of(name)
        yield f"## {name}\n"
        yield from _described(parser)
        for command, _, subparser in programs.subcommands(parser):
            yield f"### {name} {command}\n"
            yield from _described(subparser)


def _described(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"```text\n{programs.usage(parser)}\n```\n"
    if parser.description:
        yield _escaped(parser.description) + "\n"
    shown = [action for action in programs.options(parser) if action.dest != "help"]
    if shown:
        yield "| option | |\n|---|---|"
        for action in shown:
            text = " ".join(programs.help_of(parser, action).split())
            yield f"| `{programs.invocation(parser, action).replace('|', '&#124;')}` | {_escaped(text)} |"
        yield ""
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip(chr(10))}\n```\n"


def _escaped(text: str) -> str:
    return re.sub(r"([*_<>|`\[\]])", r"\\\1", text)
