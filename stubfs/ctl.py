"""The command ``stubfsctl``: what a file system's control socket can do, for shells."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from dataclasses import asdict
from typing import Any, Callable, Dict, List, NoReturn, Optional

from stubfs import __version__
from stubfs.client import FilesystemClient
from stubfs.errors import StubfsError, UsageError, printable, reason
from stubfs.rules import Rule

_NOT_IN_TIME = 4
_CALL_LIMIT = 60.0  # seconds for the file system to answer

_DESCRIPTION = """\
Control and watch a file system that was started as "stubfs --socket-path SOCKET MOUNTPOINT"."""

_EPILOG = """\
in a script, to see how a program behaves when its server hangs:
  stubfs --exit-with-pid $$ --socket-path /tmp/sock --mode proxy --proxy-dir /srv/data /mnt
  stubfsctl /tmp/sock rules --rule 'hold operations=fsync'
  program /mnt/file &
  stubfsctl /tmp/sock wait-held --timeout 10 --pid $!
  stubfsctl /tmp/sock rules --none
  wait $!

exit codes: 0 done; 1 failed; 2 bad usage; 3 something is missing on this machine; 4 not done in time"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"cannot understand the command line: {message}", "see stubfsctl --help")


def parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="stubfsctl", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    result.add_argument("socket", metavar="SOCKET", help="what stubfs was given as --socket-path")
    printed = _Parser(add_help=False)
    printed.add_argument("--json", action="store_true", help="print the answer as JSON")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Callable[[argparse.Namespace, FilesystemClient], None], text: str) -> _Parser:
        sentence = f"{text[0].upper()}{text[1:]}."
        command: _Parser = commands.add_parser(name, help=text, description=sentence, parents=[printed])
        command.set_defaults(run=run)
        return command

    add("status", _status, "show the mode and the number of held requests")
    mode = add("mode", _mode, "change the mode; returns when the change is in force")
    mode.add_argument("mode", choices=("restore", "stub", "proxy"))
    mode.add_argument("--proxy-dir", metavar="DIR", help="proxy: the directory to serve")
    mode.add_argument("--timeout", metavar="SECONDS", type=float, help="stub: fail requests that have waited this long")
    mode.add_argument("--errno", metavar="NAME", help="stub: with this error (default: EIO)")
    mode.add_argument("--exempt", metavar="PID", type=int, action="append", default=[],
                      help="stub: keep serving this process; may be repeated")  # fmt: skip
    rules = add("rules", _rules, "serve, hold, fail or delay some requests in every mode, or show the rules")
    chosen = rules.add_mutually_exclusive_group()
    chosen.add_argument("--rule", metavar="RULE", action="append", default=[],
                        help="replaces all earlier rules: ACTION key=value ..., see stubfs --help; may be repeated"
                        )  # fmt: skip
    chosen.add_argument("--none", action="store_true", help="remove all rules")
    held = add("held", _held, "list the held requests, oldest first")
    wait = add("wait-held", _wait_held, "wait until this many requests are held at the same time, and list them")
    wait.add_argument("count", nargs="?", type=int, default=1, help="default: 1")
    wait.add_argument("--timeout", metavar="SECONDS", type=float, help="wait at most this long (exit code 4)")
    for command in (held, wait):
        command.add_argument("--operations", metavar="NAME,...", default="", help="only these operations")
        command.add_argument("--path", metavar="PATTERN", help="only on matching paths, relative to the mountpoint")
        command.add_argument("--pid", metavar="PID", type=int, action="append", default=[],
                             help="only of this process; may be repeated")  # fmt: skip
    add("quit", _quit, "unmount and end; waiting processes get EIO")
    return result


def main(arguments: Optional[List[str]] = None) -> int:
    try:
        settings = parser().parse_args(arguments)
        with FilesystemClient(settings.socket, _CALL_LIMIT) as client:
            settings.run(settings, client)
            sys.stdout.flush()
        return 0
    except StubfsError as error:
        print(f"stubfsctl: {error}", file=sys.stderr)
        return _NOT_IN_TIME if error.errno == errno.ETIMEDOUT else error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains at its end
        return StubfsError.exit_code
    except KeyboardInterrupt:
        return 130


def _print(settings: argparse.Namespace, answer: Any, lines: List[str]) -> None:
    if settings.json:
        print(json.dumps(answer, indent=2))
    else:
        for line in lines:
            print(printable(line))


def _status(settings: argparse.Namespace, client: FilesystemClient) -> None:
    status: Dict[str, Any] = asdict(client.status())
    _print(settings, status, [f"{name}: {value}" for name, value in status.items()])


def _mode(settings: argparse.Namespace, client: FilesystemClient) -> None:
    if (settings.mode == "proxy") != (settings.proxy_dir is not None):
        raise UsageError(f"cannot change the mode: {settings.mode}: --proxy-dir goes with proxy, and is needed there")
    directory = None
    if settings.proxy_dir is not None:
        try:
            directory = os.open(settings.proxy_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(
                f"cannot use {settings.proxy_dir}: {reason(error)}", "give a directory of the real file system"
            ) from error
    try:
        status = client.mode(settings.mode, directory, settings.timeout, settings.errno, settings.exempt)
    finally:
        if directory is not None:
            os.close(directory)
    _print(settings, asdict(status), [])


def _rules(settings: argparse.Namespace, client: FilesystemClient) -> None:
    if settings.rule or settings.none:
        client.set_rules([Rule.parse(text) for text in settings.rule])
    rules = client.rules()
    _print(settings, [rule.as_json() for rule in rules], [] if settings.rule else [str(rule) for rule in rules])


def _filter(settings: argparse.Namespace) -> Dict[str, Any]:
    operations = [name for name in settings.operations.split(",") if name]
    return {"operations": operations, "path": settings.path, "pids": settings.pid}


def _held(settings: argparse.Namespace, client: FilesystemClient) -> None:
    listed = client.held(**_filter(settings))
    _print(settings, [asdict(request) for request in listed], [str(request) for request in listed])


def _wait_held(settings: argparse.Namespace, client: FilesystemClient) -> None:
    client.wait_held(settings.count, settings.timeout, **_filter(settings))
    _held(settings, client)


def _quit(settings: argparse.Namespace, client: FilesystemClient) -> None:
    client.quit()
    _print(settings, {}, [])
