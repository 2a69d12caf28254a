"""A process that has imported the file system and forks one per mount: a mount then costs no start of Python.

Its arguments are a socket, a pidfd and a directory; started by ``spfs.testing.server``. Ends when the socket
is shut down or the process of the pidfd has ended, however it did; then it removes the directory and its mounts.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
from typing import Any, Dict, NoReturn

from spfs.testing import places
from stubfs import daemon, libfuse, logs, messages, stdio, wire
from stubfs.errors import StubfsError, reason, to_data
from stubfs.modes import Mode
from stubfs.options import MountOptions

_END_TIME = 3.0  # seconds for file systems to end by themselves when their owner has ended


def main() -> None:
    owner, directory = int(sys.argv[2]), sys.argv[3]
    sock = socket.socket(fileno=int(sys.argv[1]))
    for fd in (sock.fileno(), owner):
        os.set_inheritable(fd, False)
    daemon.close_inherited([sock.fileno(), owner])
    os.chdir("/")
    try:
        libfuse.load()
    except StubfsError:
        pass  # those who are asked for a mount say so
    # Ctrl-C of a terminal does not reach this session; whoever is told to end all the same does so with its owner.
    children: Dict[int, int] = {}  # pidfd -> pid
    gc.freeze()  # so that collections in the children do not copy our pages
    try:
        _serve(sock, owner, children)
    finally:
        _end(children)
        try:
            places.remove(directory)
        except OSError as error:
            print(f"cannot remove {directory}: {reason(error)}", file=sys.stderr)


def _serve(sock: socket.socket, owner: int, children: Dict[int, int]) -> None:
    while True:
        poll = select.poll()
        for fd in (sock.fileno(), owner, *children):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        for pidfd in ready & children.keys():
            os.waitpid(children.pop(pidfd), 0)
            os.close(pidfd)
        if owner in ready:
            return
        if sock.fileno() in ready:
            packet = wire.receive(sock)
            if packet is None:
                return
            _, payload, descriptors = packet
            with descriptors:
                pid = _fork(messages.decode(payload), descriptors, owner)
                children[os.pidfd_open(pid)] = pid


def _fork(request: Dict[str, Any], descriptors: wire.Descriptors, owner: int) -> int:
    connection, log = descriptors.steal(0), descriptors.steal(1)
    try:
        pid = os.fork()
        if not pid:
            _file_system(request, connection, log, owner)
        return pid
    finally:
        os.close(connection)
        os.close(log)


def _file_system(request: Dict[str, Any], connection: int, log: int, owner: int) -> NoReturn:
    """In the child: tell on ``connection`` how the start went, and serve until the mount or the owner is gone."""
    status = 1
    try:
        stdio.let_go(log)
        daemon.close_inherited([connection, owner])
        daemon.make_independent()
        logging.getLogger("fuse").setLevel(logging.WARNING)  # fusepy has a traceback for each operation that fails
        logs.set_up([logging.StreamHandler()], 1, "text")
        tell = socket.socket(fileno=connection)
        try:
            options = MountOptions(source=request["source"], allow_other=request["allow_other"])
            server = daemon.Daemon(request["mountpoint"], Mode.RESTORE, None, request["socket"], options)
        except StubfsError as error:
            status = error.exit_code
            wire.send(tell, messages.encode(to_data(error)), prefix=messages.STATUS.pack(-error.errno))
        else:
            with tell:
                wire.send(tell, messages.encode({"pid": os.getpid()}), prefix=messages.STATUS.pack(0))
            server.serve(owner)
    except BaseException:
        logging.exception("the file system has failed")
    finally:
        os._exit(status)


def _end(children: Dict[int, int]) -> None:
    """They have seen their owner's end themselves, or are told so."""
    for number, limit in ((signal.SIGTERM, _END_TIME), (signal.SIGKILL, None)):
        for pidfd in children:
            signal.pidfd_send_signal(pidfd, number)
        for pidfd, pid in list(children.items()):
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if poll.poll(None if limit is None else limit * 1000):
                os.waitpid(pid, 0)
                os.close(pidfd)
                del children[pidfd]
