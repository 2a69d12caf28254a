"""Rules: which requests are served, held, failed or delayed, whatever the mode would do with them.

Rules are looked at in their order, and the first that matches a request decides; one that delays lets the request go
on to the rules behind it when its time is over. What no rule decides is treated as the mode says: stub mode holds it,
the others serve it. The options of stub mode (``timeout``, ``errno``, ``exempt``) are rules, too: see ``modes``.
"""

from __future__ import annotations

import enum
import errno as errno_module
import fnmatch
import os
import re
import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from stubfs.callers import ThreadGroup
from stubfs.errors import StubfsError, UsageError
from stubfs.protocol import BODY, ROOT_NODE, WRITE_CACHE, WRITE_IN, Opcode
from stubfs.request import Request

MAX_ERRNO = 511  # the kernel refuses replies with larger ones, which it keeps for itself (fuse_dev_do_write())
MAX_SECONDS = 1e9

# Not for rules: what nobody waits for, and what must go through for the file system to work at all.
OPERATIONS: Dict[str, FrozenSet[int]] = {
    opcode.name.lower(): frozenset((opcode,))
    for opcode in (
        Opcode.LOOKUP, Opcode.GETATTR, Opcode.SETATTR, Opcode.READLINK, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR,
        Opcode.UNLINK, Opcode.RMDIR, Opcode.LINK, Opcode.OPEN, Opcode.READ, Opcode.WRITE, Opcode.STATFS, Opcode.FSYNC,
        Opcode.SETXATTR, Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.REMOVEXATTR, Opcode.FLUSH, Opcode.OPENDIR,
        Opcode.READDIR, Opcode.FSYNCDIR, Opcode.ACCESS, Opcode.CREATE, Opcode.FALLOCATE, Opcode.LSEEK, Opcode.IOCTL,
        Opcode.TMPFILE,
    )
}  # fmt: skip
OPERATIONS["getattr"] = frozenset((Opcode.GETATTR, Opcode.STATX))
OPERATIONS["copy_file_range"] = frozenset((Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64))
OPERATIONS["rename"] = frozenset((Opcode.RENAME, Opcode.RENAME2))
_SUBJECT = frozenset().union(*OPERATIONS.values())
_ROOT_ANSWERS = frozenset((Opcode.GETATTR, Opcode.STATX, Opcode.ACCESS, Opcode.GETXATTR, Opcode.LISTXATTR))
_SPARED = frozenset((Opcode.READ, Opcode.WRITE, Opcode.GETATTR))  # by what the kernel has cached


class Action(enum.Enum):
    SERVE = "serve"
    HOLD = "hold"
    FAIL = "fail"
    DELAY = "delay"


def errno_number(value: object) -> int:
    """The number of an errno given as such or by its name. ValueError if the kernel would not take it."""
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() else getattr(errno_module, value, None)
    if type(value) is not int or not 0 < value <= MAX_ERRNO:
        raise ValueError(f"give a name like EIO, or a number from 1 to {MAX_ERRNO}")
    return value


def seconds_number(value: object) -> float:
    """ValueError if ``value`` is no number of seconds that can be waited for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_SECONDS:
        raise ValueError("give a number of seconds that is not negative")
    return float(value)


def pids_tuple(value: object) -> Tuple[int, ...]:
    """ValueError if ``value`` is no sequence of process ids."""
    if not isinstance(value, (list, tuple)) or not all(type(pid) is int and 0 < pid < 1 << 31 for pid in value):
        raise ValueError("give a list of process ids")
    return tuple(value)


def _operations(value: object) -> Tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError("give a list of operations")
    for name in value:
        if name not in OPERATIONS:
            raise ValueError(f"{name[:50]}: no such operation; one of: {', '.join(sorted(OPERATIONS))}")
    return tuple(value)


def _pattern(value: object) -> str:
    if not isinstance(value, str) or value.startswith("/"):
        raise ValueError("give a pattern for paths relative to the root of the mount, without a slash in front")
    return value


def _times(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("give a number of requests")
    return value


_CHECKS: Mapping[str, Callable[[object], object]] = {
    "operations": _operations, "path": _pattern, "pids": pids_tuple, "errno": errno_number,
    "seconds": seconds_number, "times": _times,
}  # fmt: skip


def _settle(instance: Any, what: str) -> None:
    """Check the fields of a frozen dataclass and bring them into their form. UsageError names the wrong one."""
    for field in fields(instance):
        value = getattr(instance, field.name)
        if value is None or field.name not in _CHECKS:
            continue
        try:
            object.__setattr__(instance, field.name, _CHECKS[field.name](value))
        except ValueError as error:
            raise UsageError(f"cannot use {what}: {field.name} {value!r:.60}: {error}") from error


def _from_json(kind: Any, item: object, what: str) -> Any:
    if not isinstance(item, dict):
        raise UsageError(f"cannot use {what}: {item!r:.60}: not an object")
    known = [field.name for field in fields(kind)]
    for name in item:
        if name not in known:
            raise UsageError(f"cannot use {what}: {name[:50]}: no such key", f"known: {', '.join(known)}")
    try:
        return kind(**item)
    except TypeError as error:
        raise UsageError(f"cannot use {what}: {error}", f"known: {', '.join(known)}") from error


@dataclass(frozen=True)
class RequestFilter:
    """Which requests are meant; what is not given means any.

    ``operations``: names as ``held`` lists them. ``path``: as fnmatch(3) without flags, of the path relative to the
    root, which is ""; "*" matches slashes as well. An operation on a name is on the path of that name, a rename on
    both of its names; what has lost its name has no path. ``pids``: processes, with all of their threads.
    """

    operations: Sequence[str] = ()
    path: Optional[str] = None
    pids: Sequence[int] = ()

    def __post_init__(self) -> None:
        _settle(self, "the filter")

    @classmethod
    def from_json(cls, item: object) -> "RequestFilter":
        filter: RequestFilter = _from_json(cls, item, "the filter")
        return filter


@dataclass(frozen=True)
class Rule:
    """``action``: serve, hold, fail or delay. UsageError for what makes no sense.

    ``errno`` is what fail answers with (EIO if not given), by number or name. ``seconds``: how long delay waits; for
    hold, after how long it is answered with ``errno`` (if not given: never). ``times``: only the first so many
    requests that match. The rest as in RequestFilter.

    Without ``operations`` hold does not mean what stub mode answers, either: the root's attributes, and the flush of a
    close. Pages of mappings that are written back can fail, but are neither held nor delayed.
    """

    action: str
    operations: Sequence[str] = ()
    path: Optional[str] = None
    pids: Sequence[int] = ()
    errno: Optional[Union[int, str]] = None
    seconds: Optional[float] = None
    times: Optional[int] = None

    def __post_init__(self) -> None:
        try:
            action = Action(self.action)
        except ValueError:
            known = ", ".join(action.value for action in Action)
            raise UsageError(f"cannot use a rule: {str(self.action)[:60]}: no such action", f"one of {known}") from None
        _settle(self, f"the rule {self.action}")
        if self.seconds is None and action is Action.DELAY:
            raise UsageError("cannot use the rule delay: seconds: missing", "say how long")
        if self.seconds is not None and action not in (Action.DELAY, Action.HOLD):
            raise UsageError(f"cannot use the rule {self.action}: seconds: only with delay and hold")
        if self.errno is not None and action is not Action.FAIL and (action is not Action.HOLD or self.seconds is None):
            raise UsageError(
                f"cannot use the rule {self.action}: errno: only with fail, and with hold and seconds"
            )

    @property
    def filter(self) -> RequestFilter:
        return RequestFilter(self.operations, self.path, self.pids)

    @classmethod
    def from_json(cls, item: object) -> "Rule":
        rule: Rule = _from_json(cls, item, "a rule")
        return rule

    def as_json(self) -> Dict[str, Any]:
        """Only what is given."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}

    def __str__(self) -> str:
        """What parse() takes."""
        values = self.as_json()
        words = [values.pop("action")]
        if "errno" in values:
            values["errno"] = errno_module.errorcode.get(values["errno"], values["errno"])
        for name, value in values.items():
            listed = isinstance(value, (list, tuple))
            words.append(shlex.quote(f"{name}={','.join(map(str, value)) if listed else value}"))
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """The form of the command line: ``ACTION key=value ...``, lists with commas, quotes as in a shell."""
        try:
            action, *words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"cannot use the rule {text!r:.60}: {error}", "ACTION key=value ...") from error
        values: Dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or key in values:
                why = "given twice" if equals else "not key=value"
                raise UsageError(f"cannot use the rule {text!r:.60}: {word[:60]}: {why}")
            try:
                values[key] = _READERS.get(key, str)(value)
            except ValueError as error:
                raise UsageError(f"cannot use the rule {text!r:.60}: {key}: not a number") from error
        return cls.from_json({"action": action, **values})


def _words(text: str) -> List[str]:
    return [word for word in text.split(",") if word]


_READERS: Mapping[str, Callable[[str], Any]] = {
    "operations": _words, "pids": lambda text: [int(word) for word in _words(text)], "seconds": float, "times": int,
}  # fmt: skip

PathsOf = Callable[[Request], Iterable[bytes]]
"""The paths that a request is on; none for what has no name."""


class Matcher:
    """A filter made ready: names looked up, the pattern compiled, the processes pinned. StubfsError ESRCH for one that
    is not there."""

    def __init__(self, filter: RequestFilter) -> None:
        named = frozenset().union(*(OPERATIONS[name] for name in filter.operations))
        self.names_operations = bool(named)
        self.matches_all = filter == RequestFilter()
        self._opcodes = named or _SUBJECT
        self._pattern = re.compile(fnmatch.translate(filter.path)) if filter.path is not None else None
        self._processes: List[ThreadGroup] = []
        for pid in filter.pids:
            try:
                self._processes.append(ThreadGroup(pid))
            except OSError as error:
                raise StubfsError(
                    f"cannot tell the requests of process {pid}: {error.strerror}", "", error.errno or errno_module.EIO
                ) from error

    def touches(self, opcodes: FrozenSet[int]) -> bool:
        return bool(self._opcodes & opcodes)

    def matches(self, request: Request, paths_of: PathsOf) -> bool:
        """Looks into /proc, as root, if the filter has pids."""
        if request.opcode not in self._opcodes:
            return False
        if self._pattern is not None and not any(
            self._pattern.match(os.fsdecode(path)) for path in paths_of(request)
        ):
            return False
        return not self._processes or any(request.tid in process for process in self._processes)


class Treatment(NamedTuple):
    """What becomes of a request. ``rule`` None: as the mode says."""

    action: Action
    rule: Optional["ActiveRule"] = None


SERVE, HOLD = Treatment(Action.SERVE), Treatment(Action.HOLD)


class ActiveRule:
    """A rule in force. StubfsError ESRCH for a process that is not there."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.action = Action(rule.action)
        self.seconds = rule.seconds
        self.errno = errno_number(rule.errno) if rule.errno is not None else errno_module.EIO
        self._matcher = Matcher(rule.filter)
        # next() of an iterator is one step of the interpreter: no two threads get the same turn.
        self._turns = iter(range(rule.times)) if rule.times is not None else None
        self.treatment = Treatment(self.action, self)

    def may_concern_caches(self) -> bool:
        """Whether pages or attributes that the kernel has cached could keep requests away from the rule."""
        return self.action is not Action.SERVE and self._matcher.touches(_SPARED)

    def decides(self, request: Request, paths_of: PathsOf) -> bool:
        if not self._matcher.matches(request, paths_of) or not self._can(request):
            return False
        # One that it has decided on before, and that is looked at again after a change, has had its turn.
        wait = request.wait
        return self._turns is None or (wait is not None and wait.rule is self) or next(self._turns, None) is not None

    def _can(self, request: Request) -> bool:
        if self.action is Action.HOLD:
            return not (is_written_back(request) or not self._matcher.names_operations and never_waits(request))
        return not (self.action is Action.DELAY and is_written_back(request))


def is_written_back(request: Request) -> bool:
    """Whether it writes pages of the page cache: munmap, exit and kill -9 would hang behind it."""
    return request.opcode == Opcode.WRITE and bool(WRITE_IN.unpack_from(request.buffer, BODY)[3] & WRITE_CACHE)


def never_waits(request: Request) -> bool:
    """What is answered in stub mode, too: ``ls -l`` of the parent directory must not hang, and a killed process must
    be able to close its files."""
    return request.opcode == Opcode.FLUSH or request.node == ROOT_NODE and request.opcode in _ROOT_ANSWERS


def decide(rules: Sequence[ActiveRule], request: Request, paths_of: PathsOf) -> Optional[Treatment]:
    """What the first rule that matches does with the request; None: nothing, the mode decides."""
    passed = request.wait.passed if request.wait is not None else ()
    for rule in rules:
        if rule not in passed and rule.decides(request, paths_of):
            return rule.treatment
    return None


def activate(rules: Iterable[Rule]) -> Tuple[ActiveRule, ...]:
    return tuple(ActiveRule(rule) for rule in rules)
