"""spfs: delayed mounts for people."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from typing import Any, Callable, Mapping, NoReturn, Optional, Sequence, Union

from spfs import __version__
from spfs.cli import live, programs, switch, tables, timeline
from spfs.cli.arguments import Parser
from spfs.client import ManagerClient, RequestFailed, find_manager
from spfs.errors import SpfsError, UsageError, reason
from stubfs.errors import StubfsError
from stubfs.rules import Rule

DESCRIPTION = """\
A delayed mount is a stand-in for a network mount that cannot be there yet. It is mounted in restore mode (files can
be created on it), put into stub mode (whoever touches it waits), and replaced by the real file system, under the
processes that use it, as soon as that can be mounted.

All commands except "switch" (and "timeline" of a file) talk to a manager: start one with "spfs-manager -d"."""

EPILOG = """\
a delayed mount by hand:
  spfs-manager -d
  spfs mount data /mnt/data                 stand-in at /mnt/data, restore mode
  spfs mode stub data                       from now on whoever touches it waits
  spfs replace data --source srv:/export --type nfs4 --options vers=4.2 --wait
  spfs status

exit codes: 0 done; 1 failed; 2 bad usage; 3 something is missing on this machine; 4 not done in time"""

Show = Callable[[Any], None]
Run = Callable[[argparse.Namespace, ManagerClient], None]
RunAlone = Callable[[argparse.Namespace], None]  # of a command that may need no manager
Add = Callable[[str, Union[Run, RunAlone], str], argparse.ArgumentParser]
"""Adds a command of that name, with its help."""


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="spfs", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    printed = Parser(add_help=False)
    printed.add_argument("--json", action="store_true", help="print the answer as JSON")
    shared = Parser(add_help=False, parents=[printed])
    shared.add_argument(
        "--socket-path",
        metavar="PATH",
        help="the manager's socket (default: $SPFS_MANAGER_SOCK, or the only running manager)",
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Union[Run, RunAlone], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[shared], help=text, description=_sentence(text))
        command.set_defaults(run=run, connect=True)
        return command

    _add_views(add)
    _add_mount(add)
    _add_mode(add)
    _add_rules(add)
    _add_replace(add)
    _add_endings(add)
    alone = commands.add_parser("switch", parents=[printed], help=switch.TEXT, description=_sentence(switch.TEXT))
    switch.add_arguments(alone)
    alone.set_defaults(run=switch.run, connect=False)
    _add_shutdown(add)
    _add_about_programs(commands)
    return result


def _add_views(add: Add) -> None:
    status = add("status", _status, "show the mounts, their modes, who waits, and how far their replaces are")
    status.add_argument("id", nargs="?", help="only this mount")
    status.add_argument("-w", "--watch", action="store_true", help="keep showing it, until Ctrl-C; with --json: "
                        "one line per change, and one a second while requests are held")  # fmt: skip

    metrics = add("metrics", _metrics, "show the manager's counters as Prometheus metrics")
    metrics.add_argument("--textfile", metavar="FILE", help="write them to FILE, replaced atomically, for the "
                         "textfile collector of the node exporter (a name that ends in .prom)")  # fmt: skip

    drawn = add("timeline", timeline.run, "show the history of a mount: who waited, for what, how long; the replace")
    timeline.add_arguments(drawn)
    drawn.set_defaults(connect=False)

    held = add("held", _held, "list the held requests and the processes that wait for them")
    held.add_argument("id", nargs="?", help="only on this mount")
    held.add_argument("--pid", type=int, help="only of this process")


def _add_mount(add: Add) -> None:
    mount = add("mount", _mount, "mount a stand-in")
    mount.add_argument("id", help="a name of your choice, by which the other commands know the mount")
    mount.add_argument("mountpoint", help="an existing directory, as the target process sees it")
    mount.add_argument("--mode", choices=("restore", "stub", "proxy"), default="restore", help="default: restore")
    mount.add_argument("--proxy-dir", metavar="DIR", help="with proxy: the directory to serve")
    mount.add_argument("--ns-pid", type=int, metavar="PID", help="mount in the namespaces of this process")
    mount.add_argument("--ns-list", metavar="NAMES", help="only these of its namespaces, e.g. user,net,mnt")
    mount.add_argument("--root", metavar="DIR", help="root directory of the target, as --ns-pid sees it")
    mount.add_argument("--options", metavar="OPTIONS", help="the stand-in's own mount options")


def _add_mode(add: Add) -> None:
    mode = add("mode", _mode, "change the mode; returns when the change is in force")
    mode.add_argument("mode", choices=("restore", "stub", "proxy"))
    _whom(mode)
    mode.add_argument("--proxy-dir", metavar="DIR", help="with proxy: the directory to serve")
    mode.add_argument("--ns-pid", type=int, metavar="PID", help="look up --proxy-dir in this process's mount namespace")
    mode.add_argument(
        "--missing", choices=("leave", "carry"), default="leave",
        help="proxy: leave behind, or copy to DIR, the files of restore mode that DIR lacks (default: leave)",
    )  # fmt: skip
    mode.add_argument("--timeout", type=float, metavar="SECONDS", help="stub: fail requests that have waited this long")
    mode.add_argument("--errno", metavar="NAME", help="stub: with this error (default: EIO)")
    mode.add_argument(
        "--exempt", type=int, metavar="PID", action="append", default=[],
        help="stub: keep serving this process; may be repeated",
    )  # fmt: skip


def _add_rules(add: Add) -> None:
    rules = add("rules", _rules, "serve, hold, fail or delay some requests in every mode, or show the rules")
    _whom(rules)
    rules.add_argument(
        "--rule", metavar="RULE", action="append", default=[],
        help="replaces all earlier rules: ACTION key=value ..., see stubfs --help; may be repeated",
    )  # fmt: skip
    rules.add_argument("--none", action="store_true", help="remove all rules")


def _add_replace(add: Add) -> None:
    replace = add("replace", _replace, "replace the stand-in by the real file system, or release one on hold")
    _whom(replace)
    replace.add_argument("--source", help="what to mount, e.g. server:/export, or a directory")
    replace.add_argument("--type", metavar="FSTYPE", help="its type, e.g. nfs4; none for a bind mount")
    replace.add_argument("--options", metavar="OPTIONS", default="", help="its mount options; bind for a bind mount")
    replace.add_argument("--flags", type=int, default=0, help="mount(2) flags as a number (default: 0)")
    # Those whose destination is the request's key, and passed on as it is.
    more = [
        replace.add_argument("--bind", dest="bindmounts", action="append", default=[], metavar="DIR",
                             help="a bind mount of the stand-in (all are replaced) that must be found; may be "
                             "repeated"),
        replace.add_argument("--freeze", dest="freeze_cgroup", metavar="CGROUP",
                             help="freezer cgroup of the processes, v1 or v2"),
        replace.add_argument("--net-pid", type=int, metavar="PID",
                             help="mount in this process's network namespace (default: the mount's)"),
        replace.add_argument("--strict", action="store_true", help="change nothing if anything could not be moved"),
        replace.add_argument("--missing", choices=("leave", "carry"), default="leave",
                             help="leave behind, or copy to the real file system, the files of restore mode that it "
                             "lacks (default: leave)"),
        replace.add_argument("--timeout", type=float, metavar="SECONDS",
                             help="give up if it cannot be mounted within this time (default: never)"),
    ]  # fmt: skip
    replace.set_defaults(keys=[action.dest for action in more])
    when = replace.add_mutually_exclusive_group()
    when.add_argument("--hold", action="store_const", const="hold", dest="begin", help="do not start before --release")
    when.add_argument("--release", action="store_const", const="release", dest="begin",
                      help="start now, also in restore mode, or release one that is on hold")  # fmt: skip
    replace.add_argument("--wait", action="store_true", help="wait until it is done, and show its report")


def _add_endings(add: Add) -> None:
    wait = add("wait", _wait, "wait until the replace or mode change of a mount has ended, and show its report")
    wait.add_argument("id", help="which mount")
    wait.add_argument("--held", type=int, metavar="COUNT", help="wait for this many held requests instead")
    wait.add_argument("--timeout", type=float, metavar="SECONDS", help="wait at most this long (exit code 4)")

    abort = add("abort", _abort, "cancel a replace or mount that is pending or running; everything stays as it was")
    _whom(abort)

    unmount = add("unmount", _unmount, "unmount a stand-in everywhere it is mounted")
    _whom(unmount)
    unmount.add_argument("--force", action="store_true", help="even if it is in use: waiting processes get an error")


def _add_shutdown(add: Add) -> None:
    shutdown = add("shutdown", _shutdown, "end the manager")
    shutdown.add_argument("--unmount", action="store_true", help="unmount everything first")
    shutdown.add_argument("--force", action="store_true", help="leave the mounts to a later manager; with --unmount: "
                          "unmount even what is in use")  # fmt: skip


def _add_about_programs(commands: Any) -> None:
    def add(name: str, run: RunAlone, text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=_sentence(text))
        command.set_defaults(run=run, connect=False, json=False)
        return command

    completion = add("completion", _completion, "print a shell completion script for a program")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    manual = add("manual", _manual, "print the manual page of a program, or write all of them")
    manual.add_argument("-o", "--output", metavar="DIR", help="write the pages of all programs to DIR")
    for command in (completion, manual):
        command.add_argument("program", nargs="?", choices=programs.NAMES, default="spfs", help="default: spfs")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _whom(command: argparse.ArgumentParser) -> None:
    command.add_argument("id", nargs="?", help="which mount")
    command.add_argument("--all", action="store_true", help="all mounts")


def _chosen(options: argparse.Namespace) -> Optional[str]:
    """The id; None for all."""
    if (options.id is None) != options.all:
        raise UsageError(f"cannot {options.command}: which mount?", "give either its id or --all")
    chosen: Optional[str] = options.id
    return chosen


def _print(options: argparse.Namespace, answer: Any, show: Optional[Show] = None) -> None:
    if options.json:
        print(json.dumps(answer, indent=2))
    elif show is not None:
        show(answer)


def _status(options: argparse.Namespace, client: ManagerClient) -> None:
    if options.watch:
        return live.watch(client, options.id, options.json)
    _print(options, live.full_status(client, options.id), tables.status)


def _held(options: argparse.Namespace, client: ManagerClient) -> None:
    answer = client.request("held", id=options.id)
    entries = [entry for entry in answer["held"] if options.pid in (None, entry.get("pid"))]
    if options.json:
        entries = timeline.called(entries)
    _print(options, entries, tables.held)
    if answer["not_answering"]:
        silent = ", ".join(answer["not_answering"])
        raise SpfsError(f"cannot list all held requests: {silent}: not answering", "see status", errno.ETIMEDOUT)


def _metrics(options: argparse.Namespace, client: ManagerClient) -> None:
    from spfs.cli import metrics

    metrics.write(options, client)


def _completion(options: argparse.Namespace) -> None:
    from spfs.cli import completion

    completion.run(options)


def _manual(options: argparse.Namespace) -> None:
    from spfs.cli import manual

    manual.run(options)


def _mount(options: argparse.Namespace, client: ManagerClient) -> None:
    answer = client.mount(
        options.id,
        options.mountpoint,
        options.mode,
        proxy_dir=options.proxy_dir,
        ns_pid=options.ns_pid,
        ns_list=options.ns_list.split(",") if options.ns_list else None,
        root=options.root,
        options=options.options,
    )
    _print(options, answer)


def _mode(options: argparse.Namespace, client: ManagerClient) -> None:
    changed = client.mode(
        options.mode, _chosen(options), proxy_dir=options.proxy_dir, ns_pid=options.ns_pid,
        timeout=options.timeout, errno=options.errno, exempt=options.exempt, missing=options.missing,
    )  # fmt: skip
    _print(options, {"mode": options.mode, "mounts": changed})


def _rules(options: argparse.Namespace, client: ManagerClient) -> None:
    id = _chosen(options)
    if options.rule and options.none:
        raise UsageError("cannot set the rules: --rule and --none contradict each other", "give one of them")
    if options.rule or options.none:
        _print(options, {"mounts": client.set_rules([Rule.parse(text) for text in options.rule], id)})
        return
    found = {mount: [rule.as_json() for rule in rules] for mount, rules in client.rules(id).items()}
    _print(options, found, tables.rules)


def _replace(options: argparse.Namespace, client: ManagerClient) -> None:
    id = _chosen(options)
    if options.source is None and options.type is None:
        if options.begin is None:
            raise UsageError(
                "cannot replace: --source and --type are missing", "or let go what was asked before: --release"
            )
        _print(options, {"mounts": client.begin(options.begin, id)})
    elif id is None or options.source is None or options.type is None:
        raise UsageError("cannot replace: an id, --source and --type are needed together", "give all three")
    else:
        phase = client.replace(
            id,
            options.source,
            options.type,
            options.flags,
            options.options,
            begin=options.begin,
            **{key: getattr(options, key) for key in options.keys},
        )
        if not options.wait:
            _print(options, {"id": id, "replace": phase})
    if options.wait and id is not None:
        _print(options, live.wait(client, id, None), tables.report)


def _wait(options: argparse.Namespace, client: ManagerClient) -> None:
    if options.held is not None:
        client.wait_held(options.id, options.held, options.timeout)
        _held(argparse.Namespace(**vars(options), pid=None), client)
    else:
        _print(options, live.wait(client, options.id, options.timeout), tables.report)


def _abort(options: argparse.Namespace, client: ManagerClient) -> None:
    _print(options, {"mounts": client.abort(_chosen(options))})


def _unmount(options: argparse.Namespace, client: ManagerClient) -> None:
    answer = client.unmount(_chosen(options), options.force)
    _print(options, answer, _unmounted)


def _unmounted(answer: Mapping[str, Any]) -> None:
    if answer.get("ended") is False:
        print(f"{answer['id']}: off every path; its process ends when the last user has gone")


def _shutdown(options: argparse.Namespace, client: ManagerClient) -> None:
    client.shutdown(options.unmount, options.force)
    _print(options, {})


def _give_up_output() -> NoReturn:
    """What Python still has for standard output goes nowhere, or it would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def main(arguments: Optional[Sequence[str]] = None) -> NoReturn:
    as_json = False
    try:
        options = parser().parse_args(arguments)
        as_json = options.json
        if options.connect:
            with ManagerClient(find_manager(options.socket_path)) as client:
                options.run(options, client)
        else:
            options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except StubfsError as error:
        if as_json and isinstance(error, RequestFailed):
            print(json.dumps({**error.data, "errno": error.errno}, indent=2))
        print(f"spfs: {error}", file=sys.stderr)
        sys.exit(4 if error.errno == errno.ETIMEDOUT else error.exit_code)
    except BrokenPipeError:
        _give_up_output()
    except OSError as error:
        print(f"spfs: cannot print the answer: {reason(error)}", file=sys.stderr)
        _give_up_output()
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
