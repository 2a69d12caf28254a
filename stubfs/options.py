"""What follows -o: the options of mount(8), of FUSE, and stubfs' own, for which fstab has no other place."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Callable, Dict, Optional

from stubfs.errors import UsageError
from stubfs.syscalls import MountAttr

FLAGS = {
    "ro": MountAttr.RDONLY, "nosuid": MountAttr.NOSUID, "nodev": MountAttr.NODEV, "noexec": MountAttr.NOEXEC,
}  # fmt: skip
_OPPOSITES = {"rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec"}
# Of mount(8) itself, of fstab(5), or without a meaning for a file system that keeps no times of its own.
_IGNORED = frozenset((
    "defaults", "auto", "noauto", "user", "users", "owner", "group", "nouser", "nousers", "nofail", "_netdev", "atime",
    "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime", "lazytime",
    "nolazytime", "async", "silent", "loud",
))  # fmt: skip
_IGNORED_KEYS = ("comment", "user")


@dataclass(frozen=True)
class MountOptions:
    """``attributes`` are the mount's own, ``extra`` what the kernel's FUSE takes beside them (None: a flag).

    None for allow_other: as the maker of the mount is root or not. ``settings``: stubfs' own, by their long names on
    the command line. ``uid``, ``gid``, ``umask`` are those of the top directory of restore mode; None: ours, and 022.
    """

    source: str = "stubfs"
    subtype: str = "stubfs"
    attributes: MountAttr = MountAttr.NOSUID | MountAttr.NODEV
    allow_other: Optional[bool] = None
    extra: Dict[str, Optional[str]] = field(default_factory=dict)
    settings: Dict[str, str] = field(default_factory=dict)
    uid: Optional[int] = None
    gid: Optional[int] = None
    umask: Optional[int] = None


_Setter = Callable[[MountOptions, str], MountOptions]


def _setting(name: str) -> _Setter:
    return lambda options, value: replace(options, settings={**options.settings, name: value})


_NOBODY = (1 << 32) - 1  # for chown(2): leave it as it is


def _uid(name: str) -> int:
    import pwd

    return _id(name, lambda: pwd.getpwnam(name).pw_uid, "user")


def _gid(name: str) -> int:
    import grp

    return _id(name, lambda: grp.getgrnam(name).gr_gid, "group")


def _id(name: str, look_up: Callable[[], int], kind: str) -> int:
    """ValueError if there is nobody of that name, or number."""
    if name.isdecimal():
        if int(name) >= _NOBODY:
            raise ValueError(f"the largest {kind} id is {_NOBODY - 1}")
        return int(name)
    try:
        return look_up()
    except KeyError:
        raise ValueError(f"there is no {kind} of that name") from None


def _mask(text: str) -> int:
    if not text.isdecimal() or set(text) & set("89") or int(text, 8) > 0o777:
        raise ValueError("an octal number up to 777 is needed")
    return int(text, 8)


def _size(text: str) -> str:
    if not text.isdecimal():
        raise ValueError("a number of bytes is needed")
    return text


_VALUES: Dict[str, _Setter] = {
    "fsname": lambda options, value: replace(options, source=value),
    "subtype": lambda options, value: replace(options, subtype=value),
    "max_read": lambda options, value: replace(options, extra={**options.extra, "max_read": _size(value)}),
    "uid": lambda options, value: replace(options, uid=_uid(value)),
    "gid": lambda options, value: replace(options, gid=_gid(value)),
    "umask": lambda options, value: replace(options, umask=_mask(value)),
    **{name: _setting(name) for name in ("mode", "proxy-dir", "socket-path", "log", "timeout", "errno")},
}

HELP = """\
options of -o, separated by commas:
  ro rw suid nosuid dev nodev exec noexec      as in mount(8); nosuid and nodev unless the opposite is given
  allow_other          let other users use it; the default for root. For others only if /etc/fuse.conf
                       has user_allow_other
  default_permissions  the kernel, too, checks mode bits. Without it the directory behind decides alone, as it
                       should; but nobody checks who opens fifos and devices and who connects to sockets
  uid=USER gid=GROUP umask=OCTAL               of the top directory of restore mode
  fsname=NAME subtype=NAME max_read=BYTES      as in mount.fuse(8)
  mode=MODE proxy-dir=DIR socket-path=PATH log=FILE timeout=SECONDS errno=NAME
                       as the options of the same names, for fstab. A "_" will do for a "-". With mode=proxy
                       SOURCE is the directory if none is given
  what else mount(8) and fstab(5) know, and x-... and X-...: ignored
"""


def parse_options(text: str) -> MountOptions:
    """The argument of -o, as mount(8) gives it. UsageError for what is unknown."""
    options = MountOptions()
    for word in filter(None, text.split(",")):
        key, equals, value = word.partition("=")
        key = key if key in _VALUES else key.replace("_", "-")
        if word in FLAGS:
            options = replace(options, attributes=options.attributes | FLAGS[word])
        elif word in _OPPOSITES:
            options = replace(options, attributes=options.attributes & ~FLAGS[_OPPOSITES[word]])
        elif word == "allow_other":
            options = replace(options, allow_other=True)
        elif word == "default_permissions":
            options = replace(options, extra={**options.extra, word: None})
        elif key in _VALUES and value:
            try:
                options = _VALUES[key](options, value)
            except ValueError as error:
                raise UsageError(f"cannot mount: -o {word}: {error}", "see stubfs --help") from error
        elif word not in _IGNORED and not word.startswith(("x-", "X-")) and not (equals and key in _IGNORED_KEYS):
            hint = f"known: {', '.join([*FLAGS, *_OPPOSITES, 'allow_other', 'default_permissions', *_VALUES])}"
            if word == "remount":
                hint = "the kernel needs no help with that: mount -i -o remount"
            raise UsageError(f"cannot mount: -o {word}: no such option", hint)
    return options


def own_top(options: MountOptions, fd: int) -> None:
    """Give the top directory of restore mode the owner and the mode asked for. OSError if we may not."""
    if options.umask is not None:
        os.chmod(f"/proc/self/fd/{fd}", 0o777 & ~options.umask)
    if options.uid is not None or options.gid is not None:
        os.chown(f"/proc/self/fd/{fd}", _or_keep(options.uid), _or_keep(options.gid))


def _or_keep(number: Optional[int]) -> int:
    return -1 if number is None else number
