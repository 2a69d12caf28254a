"""One mount's life: read, triage, serve or hold; the change of modes; the end.

Threads: one lane reads /dev/fuse, one works off what stub mode held, each replaced when stuck (``lanes``); control
clients call in from threads of their own. Lock order: a mode change's lock, then the tables' own; none is held
across an operation on a backing directory.
"""

from __future__ import annotations

import enum
import errno
import io
import logging
import os
import threading
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from stubfs import caches, protocol, syscalls
from stubfs.answers import Answers
from stubfs.backing import Staging
from stubfs.credentials import ROOT
from stubfs.entries import Entries
from stubfs.handles import HandleTable
from stubfs.held import HeldTable
from stubfs.interrupts import Interrupts
from stubfs.lanes import Lane, Monitor, Worker
from stubfs.libfuse import Session as LibfuseSession
from stubfs.modes import Mode, ModeSwitch, State, StubOptions
from stubfs.nested import NestedMounts
from stubfs.nodes import NodeTable, Orphan
from stubfs.objects import Objects
from stubfs.protocol import BODY, ROOT_NODE, InitFlags, Opcode, opcode_name
from stubfs.refresh import refresh
from stubfs.request import Device, Request
from stubfs.rules import Action, Rule

_log = logging.getLogger(__name__)

_MINOR_VERSION = 31  # of the protocol that the loop speaks; libfuse 2.9 would say 19, and lose RENAME2
_ADDED_FLAGS = (
    InitFlags.BIG_WRITES
    # Else lookups in one directory wait for each other, unkillable, when one of them is held.
    | InitFlags.PARALLEL_DIROPS
    | InitFlags.MAX_PAGES
    # The umask comes with what makes files: where there is a default ACL it does not count.
    | InitFlags.DONT_MASK
    # Else every write asks for security.capability first. Set-id bits are ours to remove then.
    | InitFlags.HANDLE_KILLPRIV_V2
)
# Locks stay with the kernel: /proc shows them, and whoever moves the files to another mount finds them there.
# ASYNC_DIO: who reads or writes with O_DIRECT would wait unkillable, and without an INTERRUPT (fuse_direct_IO()).
_REMOVED_FLAGS = InitFlags.POSIX_LOCKS | InitFlags.FLOCK_LOCKS | InitFlags.ASYNC_DIO
# Seconds for which somebody may wait for a CPU with an answer in hand: the attributes in it are valid from then on.
_CALLERS_DELAY = 1.0
_READ_LATE = 0.05  # seconds that a request may have lain in the kernel's queue
_MAX_BACKGROUND = 65535  # with the default of 12, twelve held readaheads would keep all others from reaching us
_Handler = Callable[[Worker, Request], object]


class _Manner(enum.Enum):
    """How requests of a kind are served."""

    BY_CALLER = "with the caller's credentials"
    BY_HANDLE = "what an open file may do was decided when it was opened"
    AT_ONCE = "never held: nobody waits for them, or the answer is the same in every mode"


_BY_CALLER, _BY_HANDLE, _AT_ONCE = _Manner


class Session:
    """Serves the mount behind ``device_fd``, which stays the caller's; ``own_device`` is its st_dev, if known.

    start() calls ``on_end`` at its end.
    """

    def __init__(
        self, device_fd: int, mode: Mode, staging: Staging, directory: Optional[int] = None,
        options: StubOptions = StubOptions(), rules: Sequence[Rule] = (), own_device: Optional[int] = None,
    ) -> None:  # fmt: skip
        self.device = Device(device_fd)
        self._requests = io.FileIO(device_fd, closefd=False)  # whose readinto() is quicker than os.readv()
        self.nodes = NodeTable()
        self.handles = HandleTable(self.nodes)
        self.held = HeldTable(self.paths_of)
        self.staging = staging
        self.ready = threading.Event()  # INIT has been answered
        self._own_device = own_device
        self._ended = threading.Event()
        self._on_end: Callable[[], None] = lambda: None
        self._root_status = os.fstat(self.staging.fd)
        self.switch = ModeSwitch(self, self.held, self.staging)
        self.state: State
        self.switch.begin(mode, directory, options, rules)
        self._libfuse = LibfuseSession(device_fd)
        self._interrupts = Interrupts(self._still_waits, self._end_wait, self.held.readers)
        self._monitor = Monitor()
        self._reading = Lane("reader", self.device, self._monitor, self._read, self._serve, self._end)
        self._releasing = Lane("release", self.device, self._monitor, self._next_held, self._serve_released, self._end)
        self._lanes = (self._reading, self._releasing)
        self._drained = threading.Condition()
        self._draining = 0
        objects = Objects(self.nodes, self.handles, self._has_locked_pages)
        self._answers = answers = Answers(self.nodes, self.handles, objects)
        entries = Entries(self.nodes, self.handles, objects, NestedMounts(own_device), self._may_vouch)
        self._handlers: Dict[int, Tuple[_Handler, _Manner]] = {}
        self._unlisted: Tuple[_Handler, _Manner] = (self._unknown, _BY_CALLER)
        self._handle(_BY_CALLER, {
            Opcode.LOOKUP: entries.lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.STATX: self._statx,
            Opcode.SETATTR: answers.setattr,
            Opcode.OPEN: answers.open,
            Opcode.OPENDIR: answers.opendir,
            Opcode.READLINK: answers.readlink,
            Opcode.SYMLINK: entries.symlink,
            Opcode.MKNOD: entries.mknod,
            Opcode.MKDIR: entries.mkdir,
            Opcode.LINK: entries.link,
            Opcode.CREATE: entries.create,
            Opcode.TMPFILE: entries.tmpfile,
            Opcode.UNLINK: entries.unlink,
            Opcode.RMDIR: entries.rmdir,
            Opcode.RENAME: entries.rename,
            Opcode.RENAME2: entries.rename2,
            Opcode.STATFS: answers.statfs,
            Opcode.SETXATTR: answers.setxattr,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._getxattr,
            Opcode.REMOVEXATTR: answers.removexattr,
            Opcode.ACCESS: self._access,
        })  # fmt: skip
        self._handle(_BY_HANDLE, {
            Opcode.READ: answers.read,
            Opcode.WRITE: answers.write,
            Opcode.FLUSH: answers.flush,
            Opcode.FSYNC: answers.fsync,
            Opcode.FSYNCDIR: answers.fsync,
            Opcode.READDIR: answers.readdir,
            Opcode.FALLOCATE: answers.fallocate,
            Opcode.LSEEK: answers.lseek,
            Opcode.COPY_FILE_RANGE: answers.copy_file_range,
            Opcode.COPY_FILE_RANGE_64: answers.copy_file_range,
            Opcode.IOCTL: answers.ioctl,
        })  # fmt: skip
        self._handle(_AT_ONCE, {
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.INTERRUPT: self._interrupt,
            Opcode.INIT: self._init,
            Opcode.RELEASE: answers.release,
            Opcode.RELEASEDIR: answers.release,
            Opcode.DESTROY: lambda worker, request: request.answer(),
            Opcode.NOTIFY_REPLY: lambda worker, request: None,
            # The kernel does without them from then on, also where it could not wait.
            Opcode.POLL: self._unknown,
            Opcode.BMAP: self._unknown,
        })  # fmt: skip

    def _handle(self, manner: _Manner, handlers: Dict[int, _Handler]) -> None:
        # As plain ints: with members of an enum, each would be compared.
        self._handlers.update((int(opcode), (handler, manner)) for opcode, handler in handlers.items())

    # --- life

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin to serve. ``on_end`` is called, in any thread, when the mount is gone."""
        self._on_end = on_end
        self._monitor.start()
        self._interrupts.start()
        self._releasing.start()
        self._reading.start()

    def wait_ready(self, timeout: float) -> bool:
        """Wait until INIT is answered; False if that does not happen within ``timeout`` seconds, or never will."""
        return self.ready.wait(timeout) and not self._ended.is_set()

    def has_ended(self) -> bool:
        return self._ended.is_set()

    def quit(self) -> None:
        """Answer with EIO what is held, and what would be from now on. Threads may go on serving the rest."""
        self.held.end()

    def _end(self) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self.ready.set()  # whoever waits for it need not wait longer
        self.held.end()
        self._interrupts.end()
        self._reading.end()
        self._releasing.end()
        self._monitor.end()
        self._on_end()

    # --- sources

    def _read(self, worker: Worker) -> Optional[Request]:
        request = worker.read_request
        while True:
            try:
                length = self._requests.readinto(worker.buffer)
            except OSError as error:
                if error.errno == errno.ENOENT:  # the request was ended before it was read
                    continue
                # EPERM: the device of no mount; the start fails of that.
                if error.errno not in (errno.ENODEV, errno.ECONNABORTED, errno.EPERM):
                    _log.error("cannot read requests: %s", error)
                self._end()
                return None
            request.parse(length)
            return request

    def _next_held(self, worker: Worker) -> Optional[Request]:
        return self.held.next()

    # --- serving

    def _serve(self, worker: Worker, request: Request) -> None:
        state = worker.state = self.state
        while state is not self.state:  # a change began in between, and has not seen us
            state = worker.state = self.state
        request.state = state
        handler, manner = self._handlers.get(request.opcode, self._unlisted)
        try:
            if manner is _AT_ONCE:
                handler(worker, request)
            elif state.serves_all or self._is_let_through(worker, request, state):
                if manner is _BY_CALLER:
                    worker.act_for(request)
                handler(worker, request)
        except OSError as error:
            request.fail(error.errno or errno.EIO)
        except Exception:
            _log.exception("cannot serve %s", opcode_name(request.opcode))
            request.fail(errno.EIO)
        finally:
            worker.state = None
            if self._draining:
                with self._drained:
                    self._drained.notify_all()

    def _is_let_through(self, worker: Worker, request: Request, state: State) -> bool:
        """Whether the request is to be served now; else it has been held or failed."""
        worker.identity.assume(ROOT)  # with hidepid, others see nothing of the caller
        treatment = state.treat(request, self.paths_of)
        action = treatment.action
        if action is Action.SERVE:
            if treatment.rule is not None and state.aside is not None:
                request.state = state.aside
                self.nodes.tell(request.node)
            return True
        if action is Action.FAIL:
            assert treatment.rule is not None
            request.fail(treatment.rule.errno)
        else:
            kept = request if request.wait is not None else request.copy()
            if kept.credentials is None and self._handlers.get(kept.opcode, self._unlisted)[1] is _BY_CALLER:
                # Now, not when thousands are let go at once: it takes a look into /proc.
                kept.credentials = worker.identity.of(kept.uid, kept.gid, kept.tid)
            self.held.add(kept, state, treatment)
            if request.opcode == Opcode.READ:
                self._interrupts.look_after_reads()
        return False

    def _may_vouch(self, request: Request) -> bool:
        """Not under a state that has been left, while the request hung in the real file system."""
        state = self.state
        return state.vouches and request.state is state

    def remains(self, node: int) -> Optional[Orphan]:
        """The object of a node without a name (None if it has one): an fd, the caller's, and its generation."""
        if self.nodes.path(node) is not None:
            return None
        kept = self.nodes.remains(node)
        if kept is None:
            opened = self.handles.pin(node)  # one that never had a name (O_TMPFILE)
            kept = Orphan(*opened) if opened is not None else None
        return kept

    def paths_of(self, request: Request) -> List[bytes]:
        """The paths that a request is on: of its node, or of the name or the two names that it carries."""
        offset = protocol.NAME_OFFSETS.get(request.opcode)
        if offset is None or request.opcode == Opcode.REMOVEXATTR:  # whose name is no file's
            paths = [self.nodes.path(request.node)]
        else:
            name = request.name(offset)
            paths = [self.nodes.child_path(request.node, name)]
            if request.opcode in (Opcode.RENAME, Opcode.RENAME2):
                (new_parent,) = protocol.RENAME_IN.unpack_from(request.buffer, BODY)
                paths.append(self.nodes.child_path(new_parent, request.name(offset + len(name) + 1)))
        return [path for path in paths if path is not None]

    def _serve_released(self, worker: Worker, request: Request) -> None:
        self._serve(worker, request)
        self.held.served(request)

    def _unknown(self, worker: Worker, request: Request) -> None:
        request.fail(errno.ENOSYS)

    def _getattr(self, worker: Worker, request: Request) -> None:
        if request.node == ROOT_NODE and request.state is not None and request.state.backing is None:
            self.device.send(protocol.attr_reply(request.unique, ROOT_NODE, self._root_status))
            return
        status = self._answers.getattr(worker, request)
        if request.node == ROOT_NODE:
            self._root_status = status

    def _statx(self, worker: Worker, request: Request) -> None:
        if request.node == ROOT_NODE and request.state is not None and request.state.backing is None:
            request.answer(protocol.statx_out(ROOT_NODE, protocol.basic_statx(self._root_status)))
            return
        self._answers.statx(worker, request)

    def _access(self, worker: Worker, request: Request) -> None:
        if request.state is not None and request.state.backing is None:
            (mask,) = protocol.U32.unpack_from(request.buffer, BODY)
            syscalls.faccessat2(self.staging.fd, b"", mask, syscalls.AT_EMPTY_PATH)
            request.answer()
            return
        self._answers.access(worker, request)

    def _getxattr(self, worker: Worker, request: Request) -> None:
        listing = request.opcode == Opcode.LISTXATTR
        if request.state is None or request.state.backing is not None:
            (self._answers.listxattr if listing else self._answers.getxattr)(worker, request)
        elif listing:
            (size, _) = protocol.GETXATTR_IN.unpack_from(request.buffer, BODY)
            request.answer(b"" if size else protocol.GETXATTR_OUT.pack(0, 0))
        else:
            request.fail(errno.ENODATA)

    def _init(self, worker: Worker, request: Request) -> None:
        """libfuse's answer, with what it does not know of."""
        reply = self._libfuse.process(bytes(request.buffer[: request.length]))
        request.answer(self._init_out(request, reply[protocol.OUT_HEADER.size :]))
        self.ready.set()

    @staticmethod
    def _init_out(request: Request, answer: bytes) -> bytes:
        major, minor, readahead, offered = (
            int.from_bytes(request.buffer[BODY + i : BODY + i + 4], "little") for i in (0, 4, 8, 12)
        )
        if major != 7:
            return answer
        flags = int.from_bytes(answer[12:16], "little")
        flags = (flags | _ADDED_FLAGS) & ~_REMOVED_FLAGS & offered
        return protocol.INIT_OUT.pack(
            7, min(minor, _MINOR_VERSION), readahead, flags, _MAX_BACKGROUND, _MAX_BACKGROUND,
            protocol.MAX_WRITE, 1, protocol.MAX_PAGES, 0, 0,
        )  # fmt: skip

    # --- what has no answer

    def _forget(self, worker: Worker, request: Request) -> None:
        (count,) = protocol.U64.unpack_from(request.buffer, BODY)
        self.nodes.forget(request.node, count)

    def _batch_forget(self, worker: Worker, request: Request) -> None:
        (count,) = protocol.U32.unpack_from(request.buffer, BODY)
        for i in range(count):
            self.nodes.forget(*protocol.FORGET_ONE.unpack_from(request.buffer, BODY + 8 + i * protocol.FORGET_ONE.size))

    def _interrupt(self, worker: Worker, request: Request) -> None:
        (unique,) = protocol.U64.unpack_from(request.buffer, BODY)
        tid = self._caller(unique)
        if tid is not None:
            worker.identity.assume(ROOT)  # with hidepid, others see nothing of a process
            self._interrupts.interrupt(unique, tid)

    def _workers(self) -> List[Worker]:
        return self._reading.workers + self._releasing.workers

    def _caller(self, unique: int) -> Optional[int]:
        """The thread id of who waits for a request, held or being served; None if it has been answered."""
        tid = self.held.caller(unique)
        if tid is None:
            for worker in self._workers():
                request = worker.request
                # Not by its state, which it sets later: another thread reads requests as soon as it is busy.
                if worker.busy and request.unique == unique and request.opcode != Opcode.INTERRUPT:
                    return request.tid
            tid = self.held.caller(unique)  # it may have been held meanwhile
        return tid

    def _still_waits(self, unique: int) -> bool:
        return self._caller(unique) is not None

    def _end_wait(self, unique: int) -> None:
        # One that is being served, and hangs in the real file system, is answered too: its own answer is then
        # refused by the kernel, as for any request that was ended.
        if self.held.take(unique) is not None or self._caller(unique) is not None:
            self.device.reply(unique, errno.EINTR)

    # --- for the mode switch

    def drain(self, state: State, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        with self._drained:
            self._draining += 1
            try:
                while any(worker.state not in (None, state) for worker in self._workers()):
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        return False
                    self._drained.wait(remaining)
                return True
            finally:
                self._draining -= 1

    def drop_caches(self, state: State) -> None:
        def serve(request: Request) -> None:
            """Answer a held READ or WRITE under the state that is being left; in a thread of its own."""
            worker = Worker(self.device)
            worker.request = request
            request.state = state
            try:
                self._handlers[request.opcode][0](worker, request)
            except OSError as error:
                request.fail(error.errno or errno.EIO)

        nodes = self.nodes.cached()
        if self.state.backing is not None:
            for node in self.nodes.vouched(time.monotonic() - _CALLERS_DELAY):
                self.device.invalidate_attributes(node)
        else:
            # Nobody was given attributes to believe in. But to drop pages is to forget them, too.
            for node in nodes:
                self.nodes.tell(node)
        if nodes and caches.drop(self.device, self.held, nodes, serve):
            self.nodes.dropped(nodes)

    def refresh_attributes(self) -> None:
        """Those that somebody has asked for, whose answer the kernel would dismiss."""
        if self._own_device is None:
            return
        waiting: Dict[int, List[int]] = {}
        for request, age in self.held.snapshot():
            node = self.nodes.get(request.node) if request.opcode == Opcode.GETATTR and request.tid else None
            # It has been asked for some time before it was read.
            if node is not None and time.monotonic() - age < node.told + _READ_LATE:
                waiting.setdefault(node.number, []).append(request.tid)
        if waiting:
            try:
                refresh(self._own_device, waiting)
            except OSError as error:
                _log.warning("cannot ask for the sizes of files that are waited for: %s", error)

    def _has_locked_pages(self, node: int) -> bool:
        if len(self.held) and self.held.data_ranges(node):
            return True
        for lane in self._lanes:
            for worker in lane.stuck():
                if worker.request.opcode == Opcode.READ and worker.request.node == node:
                    return True
        return False

    def end_orphaned_reads(self) -> None:
        """Answer the held READs that nobody waits for any more."""
        self._interrupts.look_at_readers()

    # --- for people

    def held_requests(self) -> List[Tuple[Request, float, Optional[bytes], Optional[bytes]]]:
        """(request, seconds it waits, path of its node, name it carries), the oldest first."""
        return [(request, age, *self.place_of(request)) for request, age in self.held.snapshot()]

    def place_of(self, request: Request) -> Tuple[Optional[bytes], Optional[bytes]]:
        """The path of a request's node (None: it has none any more), and the name it carries, if it does."""
        offset = protocol.NAME_OFFSETS.get(request.opcode)
        name = request.name(offset) if offset is not None else None
        return self.nodes.path(request.node), name
