"""spfs-client: what restorers and their action scripts call; requests are passed on as they are."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from typing import NoReturn, Optional, Sequence

from spfs import __version__
from spfs.cli.arguments import Parser
from spfs.client import ManagerClient, find_manager
from spfs.errors import SpfsError, UsageError, reason
from stubfs.errors import StubfsError

EPILOG = """\
examples:
  spfs-client manage 'mode;all;mode=stub' --socket-path /run/spfs-manager/4711/control.sock
  spfs-client manage 'replace;all;mode=release' --socket-path "$SPFS_MANAGER_SOCK"
  spfs-client manage 'replace;id=87;source=srv:/export;type=nfs4;flags=0' --options rw,vers=4.2
  spfs-client manage 'replace;id=87;source=srv:/export;type=nfs4;flags=0\\0rw,vers=4.2'
  spfs-client mode --mode proxy --path_to_send /mnt/real --socket-path /run/spfs-manager-99/fs-1.sock
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
    manage.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after so long (default: wait)")
    manage.add_argument(
        "--socket-path",
        metavar="PATH",
        help="the manager's socket (default: $SPFS_MANAGER_SOCK, or the only manager that runs)",
    )
    manage.set_defaults(run=_manage)

    mode = commands.add_parser("mode", help="change the mode of one file system, by its own control socket")
    mode.add_argument("--mode", required=True, choices=("stub", "proxy"))
    mode.add_argument(
        "--path_to_send", "--path-to-send", metavar="DIR", help="with proxy: the directory that requests shall go to"
    )
    mode.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after so long (default: wait)")
    mode.add_argument("--socket-path", metavar="PATH", required=True, help="the file system's control socket")
    mode.set_defaults(run=_mode)
    return result


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
            filesystem.mode(options.mode, directory)
    finally:
        if directory is not None:
            os.close(directory)


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
