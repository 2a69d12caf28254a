"""The command ``stubfs``: arguments in, exit status out. The only module that exits."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import textwrap
from dataclasses import replace
from typing import List, NoReturn, Optional, Tuple

from stubfs import __version__, daemon, fusemount, logs, options, readiness, stdio
from stubfs.errors import StubfsError, UsageError, reason
from stubfs.modes import Mode, StubOptions
from stubfs.options import MountOptions
from stubfs.rules import OPERATIONS, Rule

_EPILOG = f"""\
{options.HELP}
rules: ACTION key=value ..., the first that matches a request decides, in every mode
  serve                  serve it, also in stub mode
  hold                   as in stub mode; with seconds=N errno=NAME only for N seconds, then an error
  fail                   with errno=NAME (default: EIO)
  delay seconds=N        then go on with the next rules
  restricted by:         operations=NAME,... path=PATTERN pids=PID,... times=N (the first N of them)
  PATTERN is relative to the mountpoint; * also matches slashes. The operations:
{textwrap.fill(", ".join(sorted(OPERATIONS)), 110, initial_indent="  ", subsequent_indent="  ")}
  stubfs --mode proxy --proxy-dir /srv/data --rule 'hold operations=fsync' --rule 'delay seconds=0.05' /mnt

exit status: 0 mounted (with -f: unmounted again); 1 failed; 2 bad usage; 3 something is missing on this machine

while requests are held:
  A waiting process can be killed; no other signal disturbs it. A cgroup cannot freeze it until it has its answer.
  A process that waits behind it in the kernel, for a directory in which a file is being created, or for a file that
  is being written to, cannot be killed and is not listed.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"cannot understand the command line: {message}", "see stubfs --help")


def parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="stubfs",
        description="A FUSE file system that stands in for a mount which is not there yet.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("source", nargs="?", metavar="SOURCE",
                        help="the source shown in the mount table; in proxy mode the directory to serve")  # fmt: skip
    result.add_argument("mountpoint", metavar="MOUNTPOINT",
                        help="a directory, or /dev/fd/N: serve the mount of an open /dev/fuse")  # fmt: skip
    result.add_argument("--mode", choices=[mode.value for mode in Mode], default="restore", help="default: restore")
    result.add_argument("--proxy-dir", metavar="DIR", help="the directory to serve (with --mode proxy)")
    result.add_argument("--socket-path", metavar="PATH", help="control socket")
    result.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    stub = result.add_argument_group("stub mode", "For --mode stub; stubfsctl has the same options.")
    stub.add_argument("--timeout", metavar="SECONDS", type=float, help="fail requests that have waited this long")
    stub.add_argument("--errno", metavar="NAME", help="with this error (default: EIO)")
    stub.add_argument("--exempt", metavar="PID", type=int, action="append", default=[],
                      help="keep serving this process from the staging directory; may be repeated")  # fmt: skip
    result.add_argument("--rule", metavar="RULE", action="append", default=[],
                        help="serve, hold, fail or delay certain requests, see below; may be repeated")  # fmt: skip
    result.add_argument("-o", metavar="OPTIONS", dest="options", action="append", default=[],
                        help="mount options, see below; may be repeated")  # fmt: skip
    result.add_argument("--ready-fd", metavar="N", type=int, help="write a newline there when the mount is ready, "
                        "or an error, as JSON")
    end = result.add_mutually_exclusive_group()
    end.add_argument("--lifeline-fd", metavar="N", type=int, help="unmount and end when this pipe's other end closes")
    end.add_argument("--exit-with-pid", metavar="PID", type=int, help="unmount and end when this process has ended")
    result.add_argument("--log", metavar="FILE", help="append messages to FILE")
    result.add_argument("--record", metavar="FILE", help="append who waited, for what and how long, as JSON lines")
    result.add_argument("--log-format", choices=logs.FORMATS, default="text",
                        help="json: one object per line (default: text)")  # fmt: skip
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    result.add_argument(
        "-v", "--verbose", action="count", default=0, help="log more than problems: changes of state; twice: every step"
    )
    return result


def main(arguments: Optional[List[str]] = None) -> int:
    """Mount and serve; returns the exit status. In the background the parent returns when all is ready."""
    stdio.open_missing()
    ready = None
    try:
        given = sys.argv[1:] if arguments is None else arguments
        settings = parser().parse_args(given)
        ready = _inherited("--ready-fd", settings.ready_fd)
        _run(*_with_mount_options(settings, given), ready)
    except daemon.Interrupted as interrupted:
        return 128 + interrupted.number
    except StubfsError as known:
        error = known
    except OSError as system:
        where = f"{system.filename!s}: " if system.filename is not None else ""
        error = StubfsError(f"cannot start: {where}{reason(system)}", errno=system.errno or errno.EIO)
    print(f"stubfs: {error}", file=sys.stderr)
    if ready is not None:
        readiness.tell_error(ready, error)
    return error.exit_code


def _run(settings: argparse.Namespace, mount_options: MountOptions, ready: Optional[int]) -> NoReturn:
    mode = Mode(settings.mode)
    if mode is Mode.PROXY and settings.proxy_dir is None:
        settings.proxy_dir = settings.source
    if (mode is Mode.PROXY) != (settings.proxy_dir is not None):
        if mode is Mode.PROXY:
            raise UsageError("cannot start in mode proxy: no directory is given", "add --proxy-dir DIR")
        raise UsageError(f"cannot start in mode {mode.value}: --proxy-dir: not used there", "add --mode proxy")
    if mode is not Mode.STUB and (settings.timeout is not None or settings.errno is not None or settings.exempt):
        raise UsageError(
            f"cannot start in mode {mode.value}: --timeout, --errno, --exempt: not used there", "add --mode stub"
        )
    stub_options = StubOptions.checked(settings.timeout, settings.errno, settings.exempt)
    rules = [Rule.parse(text) for text in settings.rule]
    if settings.source is not None:
        mount_options = replace(mount_options, source=settings.source)
    device = fusemount.device_fd_of(settings.mountpoint)
    mountpoint = settings.mountpoint if device is not None else fusemount.check_mountpoint(settings.mountpoint)
    lifeline = _inherited("--lifeline-fd", settings.lifeline_fd)
    daemon.close_inherited(fd for fd in (device, ready, lifeline) if fd is not None)
    if settings.exit_with_pid is not None:
        lifeline = _pidfd(settings.exit_with_pid)
    socket_path = os.path.abspath(settings.socket_path) if settings.socket_path is not None else None
    proxy_directory = os.path.abspath(settings.proxy_dir) if settings.proxy_dir is not None else None
    record = os.path.abspath(settings.record) if settings.record is not None else None
    log_fd = _open_log(settings)
    tell = None if settings.foreground else daemon.go_background()
    daemon.make_independent()
    if device is None:
        fusemount.import_nothing_from(mountpoint)
    server = daemon.Daemon(mountpoint, mode, proxy_directory, socket_path, mount_options, stub_options, rules, record)
    daemon.warn_of_sysctls()
    if tell is not None:
        tell(0)
        stdio.let_go(-1 if log_fd is None else log_fd)
    if ready is not None:
        readiness.tell_ready(ready)
    server.serve(lifeline)


def _inherited(name: str, fd: Optional[int]) -> Optional[int]:
    try:
        if fd is not None:
            os.set_inheritable(fd, False)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot use {name} {fd}: {reason(error)}", "pass an open descriptor") from error
    return fd


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot end with process {pid}: {reason(error)}", "give the id of one that runs") from error


def _with_mount_options(
    settings: argparse.Namespace, arguments: List[str]
) -> Tuple[argparse.Namespace, MountOptions]:
    """What -o gives, as mount(8) and fstab(5) have no other place for it, goes behind what the command line says."""
    mount_options = options.parse_options(",".join(settings.options))
    if mount_options.settings:
        given = [f"--{name}={value}" for name, value in mount_options.settings.items()]
        settings = parser().parse_args([*given, *arguments])
    return settings, mount_options


def _open_log(settings: argparse.Namespace) -> Optional[int]:
    # fusepy says each failed operation, with a traceback, as a debug message.
    logging.getLogger("fuse").setLevel(logging.WARNING)
    if settings.log is None:
        logs.set_up([logs.PatientHandler()], settings.verbose, settings.log_format)
        return None
    try:
        stream = open(settings.log, "a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"cannot log to {settings.log}: {reason(error)}", "give a writable file") from error
    logs.set_up([logging.StreamHandler(stream)], settings.verbose, settings.log_format)
    return stream.fileno()
