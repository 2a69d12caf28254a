"""spfs-client: what restorers and their action scripts call; requests are passed on as they are."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
from typing import Any, NoReturn, Optional, Sequence

from spfs import __version__
from spfs.cli.arguments import Parser
from spfs.client import ManagerClient, find_manager
from spfs.errors import SpfsError, UsageError, reason
from stubfs.errors import StubfsError, printable

_ANSWER_TIME = 60.0  # seconds for a file system to answer


class NotInTime(SpfsError):
    """What was waited for did not come."""

    exit_code = 4


EPILOG = """\
examples:
  spfs-client manage 'mode;all;mode=stub' --socket-path /run/spfs-manager/4711/control.sock
  spfs-client manage 'replace;all;mode=release' --socket-path "$SPFS_MANAGER_SOCK"
  spfs-client manage 'replace;id=87;source=srv:/export;type=nfs4;flags=0' --options rw,vers=4.2
  spfs-client manage 'replace;id=87;source=srv:/export;type=nfs4;flags=0\\0rw,vers=4.2'
  spfs-client mode --mode proxy --path_to_send /mnt/real --socket-path /run/spfs-manager-99/fs-1.sock
  spfs-client rules --rule 'hold operations=fsync' --socket-path /run/data.sock
  spfs-client wait-held --operation fsync --timeout 10 --socket-path /run/data.sock
"""


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="spfs-client",
        description="Send one request to a manager of delayed mounts, or to one stand-in file system.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    manage = commands.add_parser("manage", help="send a request to a manager")
    manage.add_argument(
        "request",
        metavar="REQUEST",
        help=r"COMMAND;key=value;...  or a JSON object. A literal \0 in it begins the second string: mount options",
    )
    manage.add_argument("--options", help="the second string: the mount options of a mount or replace request")
    manage.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long (default: never)")
    manage.add_argument(
        "--socket-path",
        metavar="PATH",
        help="the manager's socket (default: $SPFS_MANAGER_SOCK, or the only running manager)",
    )
    manage.set_defaults(run=_manage)

    mode = commands.add_parser("mode", help="change the mode of one file system, by its own control socket")
    mode.add_argument("--mode", required=True, choices=("restore", "stub", "proxy"))
    mode.add_argument("--path_to_send", "--path-to-send", metavar="DIR", help="with proxy: the directory to serve")
    mode.add_argument("--missing", choices=("leave", "carry"),
                      help="with proxy: leave behind, or copy there, the files of restore mode that the directory "
                      "lacks (default: leave)")  # fmt: skip
    mode.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long (default: never)")
    mode.add_argument("--socket-path", metavar="PATH", required=True, help="the file system's control socket")
    mode.set_defaults(run=_mode)

    rules = _of_filesystem(commands, "rules", "show or set one file system's rules: serve, hold, fail, delay")
    rules.add_argument(
        "--rule", metavar="RULE", action="append", default=[],
        help="replaces all earlier rules: ACTION key=value ..., see stubfs --help; may be repeated",
    )  # fmt: skip
    rules.add_argument("--none", action="store_true", help="remove all rules")
    rules.set_defaults(run=_rules)

    held = _of_filesystem(commands, "held", "list the requests that one file system holds, as JSON")
    _filter(held)
    held.set_defaults(run=_held)

    wait = _of_filesystem(commands, "wait-held", "wait until one file system holds this many requests at the same time")
    wait.add_argument("--count", type=int, default=1, metavar="N", help="how many (default: 1)")
    wait.add_argument("--timeout", type=float, metavar="SECONDS", help="wait at most this long (exit code 4)")
    _filter(wait)
    wait.set_defaults(run=_wait_held)
    return result


def _of_filesystem(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    description = text[0].upper() + text[1:] + "."
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description)
    command.add_argument("--socket-path", metavar="PATH", required=True, help="the file system's control socket")
    return command


def _filter(command: argparse.ArgumentParser) -> None:
    command.add_argument("--operation", action="append", default=[], metavar="NAME", help="only these operations")
    command.add_argument("--path", metavar="PATTERN", help="only on matching paths, relative to the mountpoint")
    command.add_argument("--pid", action="append", default=[], type=int, help="only of these processes")


def _manage(options: argparse.Namespace) -> None:
    text, separator, second = options.request, "", ""
    if not text.startswith("{"):
        text, separator, second = text.partition(r"\0")
    second = second[: -len(r"\0")] if second.endswith(r"\0") else second
    if second and options.options is not None:
        raise UsageError("cannot send the request: mount options are given twice", r"either after \0 or by --options")
    strings = options.options if options.options is not None else second if separator and second else None
    with ManagerClient(find_manager(options.socket_path), options.timeout) as client:
        reply = client.request_text(text, strings)
    if reply.status < 0:
        message = reply.data.get("message") or os.strerror(-reply.status)
        raise SpfsError(message, reply.data.get("hint", ""), -reply.status)
    if text.startswith("{"):
        print(json.dumps(reply.data, indent=2))


def _mode(options: argparse.Namespace) -> None:
    from stubfs.client import FilesystemClient

    if (options.mode == "proxy") != (options.path_to_send is not None):
        what = "cannot change the mode: --path_to_send is needed with --mode proxy, and only there"
        raise UsageError(what, "it names the directory that requests shall go to")
    directory: Optional[int] = None
    try:
        if options.path_to_send is not None:
            try:
                directory = os.open(options.path_to_send, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise SpfsError(
                    f"cannot change the mode: {options.path_to_send}: {reason(error)}",
                    "it must be a directory",
                    error.errno or errno.EIO,
                ) from error
        with FilesystemClient(options.socket_path, options.timeout) as filesystem:
            filesystem.mode(options.mode, directory, missing=options.missing)
    finally:
        if directory is not None:
            os.close(directory)


def _rules(options: argparse.Namespace) -> None:
    from stubfs.client import FilesystemClient
    from stubfs.rules import Rule

    if options.rule and options.none:
        raise UsageError("cannot set the rules: --rule and --none contradict each other")
    with FilesystemClient(options.socket_path, _ANSWER_TIME) as filesystem:
        if options.rule or options.none:
            filesystem.set_rules([Rule.parse(text) for text in options.rule])
        else:
            for rule in filesystem.rules():
                print(printable(str(rule)))


def _held(options: argparse.Namespace) -> None:
    from stubfs.client import FilesystemClient

    with FilesystemClient(options.socket_path, _ANSWER_TIME) as filesystem:
        listed = filesystem.held(options.operation, options.path, options.pid)
    print(json.dumps([dataclasses.asdict(item) for item in listed], indent=2))


def _wait_held(options: argparse.Namespace) -> None:
    from stubfs.client import FilesystemClient

    with FilesystemClient(options.socket_path, _ANSWER_TIME) as filesystem:
        try:
            filesystem.wait_held(options.count, options.timeout, options.operation, options.path, options.pid)
        except StubfsError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            raise NotInTime(error.message, error.hint) from error


def main(arguments: Optional[Sequence[str]] = None) -> NoReturn:
    try:
        options = parser().parse_args(arguments)
        options.run(options)
    except StubfsError as error:
        print(f"spfs-client: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
