"""How the requests that the manager's socket takes are read, as text and as JSON; no I/O.

Text (``COMMAND;key=value;...``) is what existing clients send and stays as it is, quirks included. JSON has the same
keys, values of any content, and more commands. Both become the dataclasses of ``spfs.requests``.
"""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, fields
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Type

from spfs.errors import UsageError
from spfs.requests import COMMANDS, Abort, Begin, Mode, Mount, Replace, Request, Rules, Switch, Unmount
from stubfs.errors import StubfsError
from stubfs.rules import Rule, errno_number, pids_tuple

MODES = ("restore", "stub", "proxy")
NAMESPACES = ("user", "net", "mnt", "pid", "uts", "ipc", "cgroup")
MAX_PID = 1 << 22  # PID_MAX_LIMIT on 64-bit kernels, proc(5)
MAX_ID = 128  # characters
NULL = "(null)"  # what printf("%s") of C clients sends for a value that they do not have


# What existing clients know; all that has come since is for JSON alone.
TEXT_COMMANDS = ("mount", "mode", "replace", "switch")
TEXT_KEYS = (
    "id", "mode", "mountpoint", "proxy_dir", "ns_pid", "ns_list", "root", "ns_mountpoint",
    "source", "type", "flags", "bindmounts", "freeze_cgroup", "target", "device",
)  # fmt: skip
ALL_FOR = (Mode, Rules, Begin, Abort, Unmount)
"""Commands that take ``all`` in place of an id; their ``id`` is then None."""


class BadRequest(UsageError):
    """A request that cannot be understood; nothing was changed."""


def parse(packet: bytes) -> Request:
    """The request in ``packet``; BadRequest names what is wrong with it."""
    return _parse_json(packet) if packet.startswith(b"{") else _parse_text(packet)


def _parse_text(packet: bytes) -> Request:
    strings = packet.split(b"\0")
    if len(strings) > 2 and any(strings[2:]):
        raise BadRequest("cannot read the request: more than two strings in one packet")
    text = os.fsdecode(strings[0])
    options = os.fsdecode(strings[1]) if len(strings) > 1 else ""
    command, *items = text.split(";")
    if command not in TEXT_COMMANDS:
        hint = f'send it as JSON: {{"command": "{command}", ...}}' if command in COMMANDS else _one_of(TEXT_COMMANDS)
        raise BadRequest(f"cannot read the request: unknown command {_shorten(command)}", hint)
    values: Dict[str, object] = {}
    for item in filter(None, items):
        key, equals, value = item.partition("=")
        if item == "all":
            key, value = "all", "all"
        elif not equals:
            raise BadRequest(f"cannot read the {command} request: {_shorten(item)} is not key=value")
        elif key not in TEXT_KEYS:
            raise BadRequest(f"cannot read the {command} request: unknown key {_shorten(key)}")
        if key in values:
            raise BadRequest(f"cannot read the {command} request: key {_shorten(key)} is given twice")
        if not value:
            raise BadRequest(f"cannot read the {command} request: key {_shorten(key)} has an empty value")
        values[key] = True if key == "all" else value
    if options:
        values["options"] = options
    return _build(command, values)


def _parse_json(packet: bytes) -> Request:
    try:
        # errors="surrogateescape": paths are bytes, and need not be UTF-8.
        text = packet.rstrip(b"\0").decode(errors="surrogateescape")
        message: Dict[str, Any] = json.loads(text, object_pairs_hook=_no_duplicates)  # it begins with a brace
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"cannot read the request: not JSON: {error}") from error
    command = message.pop("command", None)
    if not isinstance(command, str) or command not in COMMANDS:
        raise BadRequest(f"cannot read the request: unknown command {_shorten(command)}", _one_of(tuple(COMMANDS)))
    for key, value in message.items():
        if value == "":
            if key == "options":
                continue
            raise BadRequest(f"cannot read the {command} request: key {_shorten(key)} has an empty value")
        try:
            _check_strings(value)
        except ValueError as error:
            raise BadRequest(f"cannot read the {command} request: key {_shorten(key)} holds {error}") from error
    return _build(command, {key: value for key, value in message.items() if value is not None})


def _check_strings(value: object) -> None:
    """ValueError if a string in ``value`` could be neither a path nor an argument of a program."""
    left = [value]  # no recursion: it may be as deep as the parser allows
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            left += one
            left += one.values()
        elif isinstance(one, str):
            if "\0" in one:
                raise ValueError("a NUL")
            try:
                os.fsencode(one)
            except UnicodeEncodeError:
                raise ValueError(f"no character: {_shorten(one[:40])}") from None


def _no_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRequest(f"cannot read the request: key {_shorten(twice)} is given twice")
    return result


def _build(command: str, values: Dict[str, object]) -> Request:
    kind = COMMANDS[command]
    if kind is Replace and not {"source", "type", "flags"} & values.keys() and ("all" in values or "mode" in values):
        kind = Begin
    everything = values.pop("all", False)
    if everything not in (True, False):
        raise BadRequest(f"cannot read the {command} request: key all must be true or false")
    if everything and (kind not in ALL_FOR or "id" in values):
        why = "not together with an id" if kind in ALL_FOR else "this command is for one file system: give its id"
        raise BadRequest(f"cannot read the {command} request: all: {why}")
    known = {field.name: field for field in fields(kind)}
    for key in values:
        if key not in known:
            raise BadRequest(f"cannot read the {command} request: unknown key {_shorten(key)}", _one_of(tuple(known)))
    parsed = {}
    for key, value in values.items():
        if value == NULL:
            if known[key].default is MISSING or key == "id":
                raise BadRequest(f"cannot read the {command} request: key {key} has no value: {NULL}")
            continue
        try:
            parsed[key] = (_MODES[kind] if key == "mode" else _READERS[key])(value)
        except ValueError as error:
            shown = _shorten(value)
            raise BadRequest(f"cannot read the {command} request: key {key}: {shown}: {error}") from error
    needed = [key for key, field in known.items() if field.default is MISSING]
    if kind in ALL_FOR and not everything:
        needed.append("id")
    for key in needed:
        if key not in parsed:
            hint = "or all" if key == "id" and kind in ALL_FOR else ""
            raise BadRequest(f"cannot read the {command} request: key {key} is missing", hint)
    request: Request = kind(**parsed)
    _check(command, request)
    return request


def _check(command: str, request: Request) -> None:
    if isinstance(request, (Mount, Mode)):
        if request.mode == "proxy" and request.proxy_dir is None:
            raise BadRequest(
                f"cannot read the {command} request: key proxy_dir is missing",
                "mode=proxy needs the directory that requests shall go to",
            )
        if request.mode != "proxy" and request.proxy_dir is not None:
            raise BadRequest(f"cannot read the {command} request: key proxy_dir is for mode=proxy alone")
    if isinstance(request, Mode):
        for key in ("timeout", "errno", "exempt"):
            if getattr(request, key) not in (None, ()) and request.mode != "stub":
                raise BadRequest(f"cannot read the mode request: key {key} is for mode=stub alone")
        if request.missing != "leave" and request.mode != "proxy":
            raise BadRequest("cannot read the mode request: key missing is for mode=proxy alone")
        if request.errno is not None and request.timeout is None:
            raise BadRequest("cannot read the mode request: key errno is for a timeout", "give both")
    if isinstance(request, Mount) and request.ns_pid is None and request.ns_list is not None:
        raise BadRequest("cannot read the mount request: key ns_pid is missing", "ns_list names its namespaces")
    if isinstance(request, Switch) and (request.source is None) == (request.device is None):
        raise BadRequest("cannot read the switch request: exactly one of the keys source and device is needed")


def _shorten(value: object) -> str:
    # ascii: a message must be printable on any terminal, and go through JSON, whatever the bytes were.
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_of(words: Tuple[str, ...]) -> str:
    return "one of: " + ", ".join(words)


# How the value of each key is read. All raise ValueError with the reason.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def _id(value: object) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    if len(text) > MAX_ID or not text.isprintable():
        raise ValueError(f"must be at most {MAX_ID} printable characters")
    return text


def _path(value: object) -> str:
    text = _text(value)
    if not text.startswith("/"):
        raise ValueError("must be an absolute path")
    return text


def _cgroup(value: object) -> Optional[str]:
    """Clients paste a name that they may not have behind the hierarchy's directory; some add a slash."""
    path = _path(value).rstrip("/")
    return None if os.path.basename(path) == NULL else path or "/"


def _number(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError("must be a decimal number that is not negative")
    return value


def _pid(value: object) -> int:
    number = _number(value)
    if not 0 < number <= MAX_PID:
        raise ValueError("is not a process id")
    return number


def _choice(*words: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in words:
            raise ValueError("must be " + " or ".join(words))
        return _text(value)

    return read


def _list(value: object) -> Tuple[str, ...]:
    """A comma list; a trailing comma is what some clients end it with. JSON may hold an array."""
    items = value if isinstance(value, list) else _text(value).split(",")
    return tuple(_text(item) for item in items if item)


def _paths(value: object) -> Tuple[str, ...]:
    return tuple(_path(item) for item in _list(value) if item != NULL)


def _names(value: object) -> Tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of paths")
    for path in value:
        if not path or ".." in _text(path).split("/") or path.startswith("/"):
            raise ValueError(f"{_shorten(path)} is no path from the root of the file system")
    return tuple(value)


def _namespaces(value: object) -> Tuple[str, ...]:
    names = _list(value)
    for name in names:
        if name not in NAMESPACES:
            raise ValueError(f"{_shorten(name)} is no namespace; " + _one_of(NAMESPACES))
    if len(set(names)) != len(names):
        raise ValueError("a namespace is given twice")
    return names


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise ValueError("must be a number of seconds")
    return float(value)


def _rules(value: object) -> Tuple[Rule, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of objects")
    try:
        return tuple(Rule.from_json(item) for item in value)
    except StubfsError as error:
        raise ValueError(str(error)) from error


def _files(value: object) -> Tuple[Dict[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be a list of objects")
    return tuple(value)


_READERS: Mapping[str, Callable[[object], object]] = {
    "id": _id,
    "mountpoint": _path,
    "ns_mountpoint": _path,
    "root": _path,
    "proxy_dir": _path,
    "ns_pid": _pid,
    "net_pid": _pid,
    "ns_list": _namespaces,
    "options": _text,
    "source": _text,
    "type": _text,
    "flags": _number,
    "bindmounts": _paths,
    "freeze_cgroup": _cgroup,
    "strict": _flag,
    "missing": _choice("leave", "carry"),
    "timeout": _seconds,
    "since": _number,
    "target": _path,
    "device": _number,
    "force": _flag,
    "unmount": _flag,
    "remove": _names,
    "files": _files,
    "errno": errno_number,
    "exempt": pids_tuple,
    "rules": _rules,
}


_MODES: Mapping[Type[Any], Callable[[object], str]] = {
    Mount: _choice(*MODES),
    Mode: _choice(*MODES),
    Replace: _choice("hold", "release"),
    Begin: _choice("hold", "release"),
}
