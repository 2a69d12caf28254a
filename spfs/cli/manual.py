"""spfs manual: manual pages, made from the commands' parsers, so that they say what --help says."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from typing import Iterator, List, Optional

from spfs import __version__
from spfs.cli import programs
from spfs.errors import SpfsError, reason

_SEE_ALSO = {"mount": 2, "mount.nfs": 8, "criu": 8, "fuse": 4}


def run(options: argparse.Namespace) -> None:
    if options.output is None:
        sys.stdout.write(page(options.program))
        return
    for name in programs.NAMES:
        path = os.path.join(options.output, f"{name}.{_section(name)}")
        try:
            os.makedirs(options.output, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(page(name))
        except OSError as error:
            raise SpfsError(
                f"cannot write the manual page {path}: {reason(error)}", "choose another: --output", error.errno or 0
            ) from error


def _section(name: str) -> int:
    return programs.SECTIONS.get(name, 1)


def page(name: str, date: Optional[str] = None) -> str:
    """The page of a program, for man(7) macros. ``date``: of its last change (default: today)."""
    parser = programs.parser_of(name)
    date = date or time.strftime("%Y-%m-%d", time.gmtime(float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    lines = [f'.TH {name.upper()} {_section(name)} {date} "spfs {__version__}" "Delayed mounts"', ".SH NAME"]
    lines.append(f"{_plain(name)} \\- {_plain(_first_sentence(parser))}")
    lines += [".SH SYNOPSIS", *_synopsis(parser)]
    lines += [".SH DESCRIPTION", *_paragraphs(parser.description or "")]
    if programs.options(parser):
        lines += [".SH OPTIONS", *_options(parser)]
    commands = programs.subcommands(parser)
    if commands:
        lines.append(".SH COMMANDS")
    for command, _, subparser in commands:
        lines += [f'.SS "{name} {command}"', *_synopsis(subparser)]
        if subparser.description:
            lines += [".PP", *_paragraphs(subparser.description)]
        lines += _options(subparser)
        if subparser.epilog:
            lines += [".PP", ".RS 4", ".nf", *_literal(subparser.epilog), ".fi", ".RE"]
    if parser.epilog:
        lines += [".SH NOTES", ".nf", *_literal(parser.epilog), ".fi"]
    others = [f".BR {_plain(other)} ({_section(other)})" for other in programs.NAMES if other != name]
    others += [f".BR {_plain(other)} ({section})" for other, section in _SEE_ALSO.items()]
    lines += [".SH SEE ALSO", *(f"{other}," for other in others[:-1]), others[-1]]
    return "\n".join(lines) + "\n"


def _first_sentence(parser: argparse.ArgumentParser) -> str:
    text = " ".join((parser.description or "").split())
    first = re.split(r"[.:](?:\s|$)", text)[0]
    return first[:1].lower() + first[1:]


def _synopsis(parser: argparse.ArgumentParser) -> List[str]:
    name, _, rest = programs.usage(parser).partition(" ")
    return [f".B {_plain(name)}", *_sentences(rest)] if rest else [f".B {_plain(name)}"]


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(part for part in text.strip().split("\n\n") if part):
        if number:
            yield ".PP"
        yield from _sentences(" ".join(paragraph.split()))


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in programs.options(parser):
        yield ".TP"
        yield f".B {_plain(programs.invocation(parser, action))}"
        yield from _sentences(programs.help_of(parser, action) or "Which one.")


def _sentences(text: str) -> Iterator[str]:
    """One sentence a line, as troff wants them; lines that are too long are broken."""
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
        while len(sentence) > 78 and " " in sentence[:78]:
            cut = sentence[:78].rindex(" ")
            yield _plain(sentence[:cut])
            sentence = sentence[cut + 1 :]
        yield _plain(sentence)


def _literal(text: str) -> Iterator[str]:
    for line in text.strip("\n").splitlines():
        yield _plain(line.rstrip()) or "\\&"


def _plain(text: str) -> str:
    """Without what troff would take for its own."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...").replace("'", "\\(aq").replace("→", "->")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
