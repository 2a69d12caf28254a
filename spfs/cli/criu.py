"""spfs-criu: CRIU with delayed mounts. Its imports are late: CRIU calls it as action script at many stages."""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List, NoReturn, Optional, Sequence

DESCRIPTION = """\
Dump and restore processes whose network file systems are not there yet when they are restored. CRIU restores them
onto stand-ins; whoever touches one waits, until the real file system is mounted and takes the stand-in's place."""

EPILOG = """\
  spfs-criu dump -t PID -D images --delayed data=/data [CRIU's options]
  spfs-criu restore -D images -d --wait [CRIU's options]

All other options are passed on to CRIU. Without --delayed, dump takes all network file systems that the
process has mounted. What dump finds out is written beside the images (spfs-criu.json), so that restore needs no
such options; --delayed KEY,source=… given to restore names another server.

exit codes: 0 done; 1 failed (criu's own status if criu failed); 2 bad usage; 3 something is missing on this machine;
4 not done in time"""

DELAYED = (
    "KEY=MOUNTPOINT[,type=FSTYPE][,source=SOURCE][,flags=NUMBER][,host=DIR][,network=host|container]"
    "[,options=OPTIONS]: a mount that is to be delayed, as the processes see it, and what shall be mounted in the end, "
    "in whose network namespace; may be repeated"
)


def parser() -> Any:
    import argparse

    from spfs import __version__
    from spfs.cli.arguments import Parser

    raw = argparse.RawDescriptionHelpFormatter
    result = Parser(prog="spfs-criu", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, usage: Optional[str] = None) -> Any:
        return commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", usage=usage, allow_abbrev=False
        )

    dump = add("dump", "run criu dump, and write beside the images what is to be delayed", _USAGE.format("dump"))
    restore = add("restore", "run criu restore onto stand-ins, which are then replaced", _USAGE.format("restore"))
    for command in (dump, restore):
        command.add_argument("--delayed", action="append", default=[], metavar="KEY=MOUNTPOINT,…", help=DELAYED)
        command.add_argument("--criu", metavar="PATH", help="the CRIU to use (default: criu)")
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.set_defaults(run=_dump if command is dump else _restore)
    restore.add_argument("--wait", action="store_true", help="return when the real file systems are in place")
    restore.add_argument("--timeout", type=float, metavar="SECONDS",
                         help="with --wait: at most this long (exit code 4)")  # fmt: skip
    restore.add_argument("--socket-path", metavar="PATH", help="the manager's socket (default: $SPFS_MANAGER_SOCK, or "
                         "one for all restores by CRIU, which is started if needed)")  # fmt: skip

    act = add("action", "CRIU's action script: for runc, podman and criu restore --action-script")
    act.add_argument("--script", action="store_true", help="print a shell script that does the same faster, to be "
                     "installed and named in CRIU's configuration")  # fmt: skip
    act.set_defaults(run=_action)

    files = add("files", "list what a delayed mount must hold for CRIU")
    files.add_argument("images", metavar="IMAGES", help="the directory of the images")
    files.add_argument("mount", nargs="?", metavar="KEY|MOUNTPOINT", help="only of this mount; for images without a "
                       "record any mountpoint")  # fmt: skip
    files.add_argument("--json", action="store_true", help="print JSON")
    files.set_defaults(run=_files)
    return result


_USAGE = "spfs-criu {} [--delayed KEY=MOUNTPOINT,…] [OPTION …] [CRIU'S OPTIONS …]"


def _dump(options: Any, criu: List[str]) -> None:
    from spfs.criu import flow
    from spfs.criu.delayed import Wish

    mounts = flow.dump(criu, [Wish.parse(text) for text in options.delayed], options.criu)
    if options.json:
        _print_json([mount.to_json() for mount in mounts])
        return
    from stubfs.errors import printable

    for mount in mounts:
        places = ", ".join(place.mountpoint for place in mount.places)
        print(printable(f"{mount.key} on {places}: {mount.type} {mount.source}, {len(mount.files or ())} files"))


def _restore(options: Any, criu: List[str]) -> None:
    from spfs.cli import tables
    from spfs.criu import flow
    from spfs.criu.delayed import Wish

    restore = flow.Restore(criu, [Wish.parse(text) for text in options.delayed], options.criu, options.socket_path)

    def progress(id: str, stage: Dict[str, Any]) -> None:
        details = ", ".join(f"{key} {value}" for key, value in stage.items() if key not in ("stage", "time"))
        print(f"spfs-criu: {id}: {stage.get('stage')}{': ' + details if details else ''}", file=sys.stderr)

    def let_go() -> None:
        if not options.wait:
            return _print_json(restore.ids) if options.json else _waiting(restore)
        rows = restore.wait(progress, options.timeout)
        if options.json:
            return _print_json(rows)
        for row in rows:
            tables.report(row)

    restore.run(let_go)


def _waiting(restore: Any) -> None:
    from stubfs.errors import printable

    for mount, id in zip(restore.mounts, restore.ids):
        where = f"{id} on {mount.places[0].mountpoint}"
        print(printable(f"{where}: waits for {mount.type} {mount.source} (spfs wait {id})"))


def _action(options: Any, rest: List[str]) -> None:
    if options.script:
        from spfs.criu import command

        print(command.action_script(), end="")
        return
    action()


def action() -> NoReturn:
    """What CRIU calls, by our shell script or by ``spfs-criu action``."""
    from spfs.criu import stages
    from spfs.criu.log import log
    from spfs.criu.restoration import TOKEN_VARIABLE
    from stubfs import stdio
    from stubfs.errors import StubfsError

    stdio.open_missing()  # CRIU calls without a standard input
    try:
        stages.act(os.environ)
    except (StubfsError, OSError) as error:
        message = f"{os.environ.get('CRTOOLS_SCRIPT_ACTION', 'action')}: {error}"
        print(f"spfs-criu: {message}", file=sys.stderr)
        log(message, os.environ.get(TOKEN_VARIABLE, "-"))
        sys.exit(getattr(error, "exit_code", 1))
    sys.exit(0)


def _files(options: Any, rest: List[str]) -> None:
    from spfs.cli import tables
    from spfs.criu import listing

    mounts = listing.listed(os.path.realpath(options.images), options.mount)
    if options.json:
        return _print_json([mount.to_json() for mount in mounts])
    tables.planned(mounts)


def _print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=2))


def main(arguments: Optional[Sequence[str]] = None) -> NoReturn:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["action"]:
        action()
    import errno

    from spfs.errors import UsageError
    from stubfs.errors import StubfsError

    try:
        options, rest = parser().parse_known_args(given)
        if rest and options.command not in ("dump", "restore"):
            raise UsageError(
                f"cannot understand the command line: {' '.join(rest)}", f"see spfs-criu {options.command} --help"
            )
        options.run(options, rest)
        sys.stdout.flush()
    except StubfsError as error:
        print(f"spfs-criu: {error}", file=sys.stderr)
        sys.exit(4 if error.errno == errno.ETIMEDOUT else error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
