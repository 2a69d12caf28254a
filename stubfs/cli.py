"""The command ``stubfs``: arguments in, exit status out. The only module that exits."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import List, NoReturn, Optional

from stubfs import daemon, mount, stdio
from stubfs.errors import StubfsError, UsageError, reason
from stubfs.modes import Mode


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"cannot understand the command line: {message}", "see stubfs --help")


def parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="stubfs",
        description="A FUSE file system that stands in for a mount which is not there yet.",
        allow_abbrev=False,
    )
    result.add_argument("source", nargs="?", help="name shown as the mount's source (as mount(8) calls helpers)")
    result.add_argument("mountpoint", help="a directory, or /dev/fd/N: serve the mount of an open /dev/fuse")
    result.add_argument("--mode", choices=[mode.value for mode in Mode], default="restore", help="default: restore")
    result.add_argument("--proxy-dir", metavar="DIR", help="the real directory (with --mode proxy)")
    result.add_argument("--socket-path", metavar="PATH", help="control socket")
    result.add_argument("-f", "--foreground", action="store_true", help="do not go into the background")
    result.add_argument("-o", metavar="OPTIONS", dest="options", default="", help="mount options")
    result.add_argument("--ready-fd", metavar="N", type=int, help="write one newline there when all is ready")
    result.add_argument("--log", metavar="FILE", help="append messages to FILE")
    result.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice: each step")
    return result


def main(arguments: Optional[List[str]] = None) -> int:
    """Mount and serve; returns the exit status. In the background the parent returns when all is ready."""
    stdio.open_missing()
    try:
        return _run(parser().parse_args(arguments))
    except StubfsError as error:
        print(f"stubfs: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename!s}: " if error.filename is not None else ""
        print(f"stubfs: cannot start: {where}{reason(error)}", file=sys.stderr)
        return StubfsError.exit_code


def _run(settings: argparse.Namespace) -> int:
    mode = Mode(settings.mode)
    if (mode is Mode.PROXY) != (settings.proxy_dir is not None):
        if mode is Mode.PROXY:
            raise UsageError("cannot start in mode proxy: no directory is given", "add --proxy-dir DIR")
        raise UsageError(f"cannot start in mode {mode.value}: --proxy-dir: not used there", "add --mode proxy")
    options = mount.parse_options(settings.options)
    if settings.source is not None:
        options = mount.MountOptions(settings.source, options.subtype, options.attributes, options.allow_other)
    device = mount.device_fd_of(settings.mountpoint)
    mountpoint = settings.mountpoint if device is not None else mount.check_mountpoint(settings.mountpoint)
    ready = settings.ready_fd
    if ready is not None:
        try:
            os.set_inheritable(ready, False)
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot use --ready-fd {ready}: {reason(error)}", "pass an open descriptor") from error
    kept = [fd for fd in (device, ready) if fd is not None]
    daemon.close_inherited(kept)
    socket_path = os.path.abspath(settings.socket_path) if settings.socket_path is not None else None
    proxy_directory = os.path.abspath(settings.proxy_dir) if settings.proxy_dir is not None else None
    log_fd = _open_log(settings)
    tell = None if settings.foreground else daemon.go_background()
    daemon.make_independent()
    server = daemon.Daemon(mountpoint, mode, proxy_directory, socket_path, options)
    daemon.warn_of_sysctls()
    if tell is not None:
        tell(0)
        stdio.let_go(-1 if log_fd is None else log_fd)
    if ready is not None:
        try:
            os.write(ready, b"\n")
        except OSError:
            pass  # nobody wants to know any more
        os.close(ready)
    try:
        server.run()
    finally:
        server.leave()
        logging.shutdown()
        # A thread may be inside read(2) of the device, or of a real file system that hangs: join none of them.
        os._exit(0)


def _open_log(settings: argparse.Namespace) -> Optional[int]:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(settings.verbose, 2)]
    form = "%(asctime)s stubfs[%(process)d] %(levelname)s %(name)s: %(message)s"
    # fusepy says each failed operation, with a traceback, as a debug message.
    logging.getLogger("fuse").setLevel(logging.WARNING)
    if settings.log is None:
        logging.basicConfig(level=level, format=form, handlers=[stdio.PatientHandler()])
        return None
    try:
        stream = open(settings.log, "a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"cannot log to {settings.log}: {reason(error)}", "give a writable file") from error
    logging.basicConfig(level=level, format=form, stream=stream)
    return stream.fileno()
