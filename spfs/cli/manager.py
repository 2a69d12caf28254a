"""spfs-manager: the command that starts the manager, in the foreground or as a daemon."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import resource
import socket
import sys
from typing import List, NoReturn, Optional, Sequence

from spfs import __version__
from spfs.cli.arguments import Parser
from spfs.controller import Controller
from spfs.errors import MissingFeatureError, SpfsError, reason
from spfs.state import WorkDirectory
from stubfs import logs, stdio, wire
from stubfs.errors import StubfsError

DESCRIPTION = """\
Start the manager of delayed mounts. It mounts stand-in file systems, switches their modes and, once the
real file system can be mounted, puts it in their place and moves the processes over to it.

It is driven over a socket: by "spfs" (for people), "spfs-client" (for scripts) and by restorers such as CRIU."""

EPILOG = """\
The manager may end or be killed at any time: mounts and waiting processes stay as they are, and a manager that is
started again with the same --work-dir takes them over.
"""


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="spfs-manager",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("-v", "--verbose", action="count", default=0, help="log more than what goes wrong: changes of state; twice: "
        "every step")  # fmt: skip
    add("-d", "--daemon", action="store_true", help="go to the background; returns once the socket accepts")
    add("--work-dir", metavar="DIR", help="directory for state, made if missing (default: /run/spfs-manager-PID)")
    add("--socket-path", metavar="PATH", help="socket to listen on (default: WORK_DIR/spfs-manager.sock)")
    add("--log-dir", metavar="DIR", help="directory for logs, also of the file systems (default: the work directory)")
    add("--log", metavar="FILE", help="the manager's log, relative to the log directory (default: standard error; "
        "with -d: spfs-manager.log)")  # fmt: skip
    add("--log-format", choices=logs.FORMATS, default="text", help="json: one object per line (default: text)")
    add("--exit-with-spfs", action="store_true", help="end after the last mount is gone; also if "
        "nothing was mounted and the last client has been gone for half a minute")  # fmt: skip
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return result


def main(arguments: Optional[Sequence[str]] = None) -> NoReturn:
    stdio.open_missing()
    try:
        options = parser().parse_args(arguments)
        if options.daemon:
            sys.exit(_start_daemon(options))
        _serve(options, ready=-1)
    except StubfsError as error:
        print(f"spfs-manager: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _start_daemon(options: argparse.Namespace) -> int:
    """Our exit code: 0 once the daemon's socket accepts, else the daemon's, which has told why on standard error."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        os.setsid()
        _serve(options, ready=tell)
        return 0
    os.close(tell)
    with open(ready, "rb") as pipe:
        if pipe.read(1):
            return 0
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) or 1


def _serve(options: argparse.Namespace, ready: int) -> None:
    _check_rights()
    _raise_limit()
    work_dir = os.path.abspath(options.work_dir or f"/run/spfs-manager-{os.getpid()}")
    socket_path = os.path.abspath(options.socket_path or os.path.join(work_dir, "spfs-manager.sock"))
    work = WorkDirectory(work_dir)
    try:
        _check_length(work.file("fs-1000000.sock"), "--work-dir")
        listener = _listen(socket_path)
    except BaseException:
        work.close(remove=not any(True for _ in work.load()))
        raise
    try:
        log_dir = os.path.abspath(options.log_dir) if options.log_dir else None
        _start_log(options, log_dir, work_dir)
        log_options = ["-v"] * options.verbose + ["--log-format", options.log_format]
        controller = Controller(
            work, listener, socket_path, log_dir, log_options, exit_with_spfs=options.exit_with_spfs
        )
        os.chdir("/")  # all paths are absolute by now; nothing is to be kept busy, or to be found, where we were
        if ready >= 0:
            # Nobody who waits for the end of our output, as system(3) in a pipe does, may wait for the daemon.
            stdio.let_go()
            os.write(ready, b"\n")
            os.close(ready)
        else:
            _notify_service_manager()
    except BaseException:
        listener.close()
        os.unlink(socket_path)
        work.close(remove=not any(True for _ in work.load()))
        raise
    controller.run()


def _notify_service_manager() -> None:
    """sd_notify(3): a service of Type=notify is started when it says so."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # of the abstract namespace, unix(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.send(b"READY=1")
    except OSError as error:
        logging.getLogger(__name__).warning("cannot tell the service manager that we are ready: %s", reason(error))


def _check_rights() -> None:
    if os.geteuid() == 0 and os.path.exists("/dev/fuse"):
        return  # without an import for what is nearly always fine
    from spfs import features

    for name in ("root", "fuse"):
        feature = features.probe(name)
        if not feature.available:
            raise MissingFeatureError(f"cannot start the manager: {feature.reason}", feature.hint, errno.EPERM)


def _raise_limit() -> None:
    """Each mount takes half a dozen descriptors, each client one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_length(path: str, option: str) -> None:
    if len(os.fsencode(path)) > wire.MAX_PATH:
        raise SpfsError(
            f"cannot make sockets in {os.path.dirname(path)}: their paths would be longer than {wire.MAX_PATH} bytes",
            f"choose a shorter one: {option}",
            errno.ENAMETOOLONG,
        )


def _listen(path: str) -> socket.socket:
    _check_length(path, "--socket-path")
    try:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        return wire.listen(path)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = "another manager listens there, or it is another kind of file: choose another --socket-path"
        else:
            hint = "choose another: --socket-path"
        raise SpfsError(f"cannot listen on {path}: {reason(error)}", hint, error.errno or errno.EIO) from error


def _start_log(options: argparse.Namespace, log_dir: Optional[str], work_dir: str) -> None:
    handlers: List[logging.Handler] = []
    if log_dir is not None:
        try:
            os.makedirs(log_dir, exist_ok=True)  # the file systems log there, too
        except OSError as error:
            raise SpfsError(f"cannot write logs to {log_dir}: {reason(error)}", "choose another: --log-dir") from error
    name = options.log or ("spfs-manager.log" if options.daemon else None)
    if name is not None:
        path = os.path.join(log_dir or (os.getcwd() if options.log else work_dir), name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            raise SpfsError(f"cannot write the log {path}: {reason(error)}", "choose another: --log") from error
    logging.raiseExceptions = False  # a full disk is no reason for a traceback on standard error
    logs.set_up(handlers or [logs.PatientHandler()], options.verbose, options.log_format)


if __name__ == "__main__":
    main()
