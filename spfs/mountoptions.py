"""Option strings and flags of mount(2) and mount(8), taken apart for fsconfig(2), mount(2) and mount helpers.

Text in, values out: no I/O here. Mount helpers' words about a failure are turned into errno here, too.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Dict, List, NamedTuple, Optional, Tuple

from spfs.errors import SpfsError
from spfs.linux.mountapi import MS, MountAttr

_MAGIC, _MAGIC_MASK = 0xC0ED0000, 0xFFFF0000  # MS_MGC_VAL: old callers set it, mount(2) strips it
_OPERATIONS = MS.REMOUNT | MS.MOVE | MS.UNBINDABLE | MS.PRIVATE | MS.SLAVE | MS.SHARED

_PER_MOUNT: Dict[MS, MountAttr] = {
    MS.RDONLY: MountAttr.RDONLY,
    MS.NOSUID: MountAttr.NOSUID,
    MS.NODEV: MountAttr.NODEV,
    MS.NOEXEC: MountAttr.NOEXEC,
    MS.NODIRATIME: MountAttr.NODIRATIME,
    MS.NOSYMFOLLOW: MountAttr.NOSYMFOLLOW,
}
# Of the super block, not of the mount: known to fsconfig(2) as flags (fs/fs_context.c).
_SUPER: Dict[MS, str] = {
    MS.RDONLY: "ro",
    MS.SYNCHRONOUS: "sync",
    MS.DIRSYNC: "dirsync",
    MS.MANDLOCK: "mand",
    MS.LAZYTIME: "lazytime",
}
# mount(8)'s words for flags: (set, cleared). ro, rw, sync … are not among them, the kernel takes those in options.
_WORDS: Dict[str, Tuple[MS, MS]] = {
    "nosuid": (MS.NOSUID, MS(0)),
    "suid": (MS(0), MS.NOSUID),
    "nodev": (MS.NODEV, MS(0)),
    "dev": (MS(0), MS.NODEV),
    "noexec": (MS.NOEXEC, MS(0)),
    "exec": (MS(0), MS.NOEXEC),
    "noatime": (MS.NOATIME, MS.RELATIME | MS.STRICTATIME),
    "atime": (MS(0), MS.NOATIME),
    "relatime": (MS.RELATIME, MS.NOATIME | MS.STRICTATIME),
    "norelatime": (MS(0), MS.RELATIME),
    "strictatime": (MS.STRICTATIME, MS.NOATIME | MS.RELATIME),
    "nodiratime": (MS.NODIRATIME, MS(0)),
    "diratime": (MS(0), MS.NODIRATIME),
    "nosymfollow": (MS.NOSYMFOLLOW, MS(0)),
    "symfollow": (MS(0), MS.NOSYMFOLLOW),
    "defaults": (MS(0), MS(0)),
    "bind": (MS.BIND, MS(0)),
    "rbind": (MS.BIND | MS.REC, MS(0)),
}
# Words for mount(8) and fstab alone, which no kernel file system knows.
_FSTAB = frozenset(["_netdev", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group"])
_FLAG_WORDS: Dict[MS, str] = {
    **_SUPER,
    MS.NOSUID: "nosuid",
    MS.NODEV: "nodev",
    MS.NOEXEC: "noexec",
    MS.NOATIME: "noatime",
    MS.NODIRATIME: "nodiratime",
    MS.NOSYMFOLLOW: "nosymfollow",
    MS.STRICTATIME: "strictatime",
}

Parameter = Tuple[str, Optional[str]]  # key and value; None: a flag


class MountOptions(NamedTuple):
    """``flags`` as for mount(2), with mount(8)'s words of the option string already in them; ``words`` the rest."""

    flags: MS
    words: Tuple[str, ...]

    @classmethod
    def parse(cls, flags: int, options: str) -> "MountOptions":
        """SpfsError EINVAL for flags that do not make a new mount (MS_REMOUNT, MS_MOVE, propagation …)."""
        if flags & _MAGIC_MASK == _MAGIC:
            flags &= ~_MAGIC_MASK
        refused = flags & _OPERATIONS
        if refused:
            names = ", ".join(f"MS_{flag.name}" for flag in MS if flag & refused)
            raise SpfsError(
                f"cannot mount with flags {flags}: {names}: these change a mount instead of making one",
                "give only flags of a new mount, such as 1 (MS_RDONLY) or 1024 (MS_NOATIME)",
                errno.EINVAL,
            )
        parsed, words = MS(flags), []
        for word in split(options):
            if word in _WORDS:
                add, remove = _WORDS[word]
                parsed = (parsed & ~remove) | add
            elif word not in _FSTAB and not word.startswith(("x-", "X-", "comment=")):
                words.append(word)
        return cls(parsed, tuple(words))._checked()

    def _checked(self) -> "MountOptions":
        if not self.bind:
            if self.flags & MS.REC:
                raise SpfsError("cannot mount with flag MS_REC: it is for bind mounts", "add the option bind")
            return self
        others = [word for word in self.words if word not in ("ro", "rw")]
        if others:
            raise SpfsError(
                f"cannot make a bind mount with option {others[0]}: a bind mount has only the flags of a mount",
                "ro, nosuid, nodev, noexec, noatime … are possible",
            )
        # For a file system of its own they are parameters; here "ro" can only be the mount's flag.
        readonly = "ro" in self.words[-1:] or (self.flags & MS.RDONLY and "rw" not in self.words[-1:])
        return MountOptions(self.flags | MS.RDONLY if readonly else self.flags & ~MS.RDONLY, ())

    @property
    def bind(self) -> bool:
        """Is the source a directory that exists, and no file system of its own to be mounted?"""
        return bool(self.flags & MS.BIND)

    @property
    def data(self) -> str:
        """The data of mount(2)."""
        return ",".join(self.words)

    @property
    def helper_options(self) -> str:
        """What follows -o for a mount helper: the flags as words, then the rest."""
        flags = [word for flag, word in _FLAG_WORDS.items() if self.flags & flag]
        return ",".join([*flags, *self.words])

    @property
    def attributes(self) -> MountAttr:
        """The per-mount part of the flags, for fsmount(2) and mount_setattr(2)."""
        attributes = MountAttr(0)
        for flag, attribute in _PER_MOUNT.items():
            if self.flags & flag:
                attributes |= attribute
        # relatime is the default and has no bit; mount(2) lets strictatime win over noatime.
        if self.flags & MS.STRICTATIME:
            attributes |= MountAttr.STRICTATIME
        elif self.flags & MS.NOATIME:
            attributes |= MountAttr.NOATIME
        return attributes

    def parameters(self) -> List[Parameter]:
        """What fsconfig(2) is to be given: flags of the super block first, so that an option can overrule them."""
        found: List[Parameter] = [(word, None) for flag, word in _SUPER.items() if self.flags & flag]
        for word in self.words:
            key, equals, value = word.partition("=")
            found.append((key, _unquoted(value) if equals else None))
        return found

    def has(self, *keys: str) -> bool:
        return any(word.partition("=")[0] in keys for word in self.words)


def split(options: str) -> List[str]:
    """The words of an option string; a comma does not separate between double quotes or after a backslash.

    Quotes and backslashes stay, as mount(8) leaves them: the file system unescapes. SpfsError EINVAL for an open quote.
    """
    words, word, quoted, escaped = [], "", False, False
    for character in options:
        if character == "," and not quoted and not escaped:
            words.append(word)
            word = ""
        else:
            word += character
            if character == '"' and not escaped:
                quoted = not quoted
        escaped = character == "\\" and not escaped
    if quoted:
        raise SpfsError(
            f"cannot read mount options: {options}: a double quote is not closed",
            "quote the whole value",
            errno.EINVAL,
        )
    words.append(word)
    return [word for word in words if word]


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value


# What mount.nfs, mount.cifs, sshfs and others print; the rest is found by strerror's own texts.
_TEXTS: Tuple[Tuple[str, int], ...] = (
    (r"unknown filesystem type|not supported by kernel|not configured in (the )?kernel", errno.ENODEV),
    (r"requested NFS version or transport protocol is not supported", errno.EPROTONOSUPPORT),
    (r"temporary failure in name resolution|failed to resolve server", errno.EAGAIN),
    (r"service not known|could not resolve", errno.EAGAIN),
    (r"connection refused|connection reset|connection closed", errno.ECONNREFUSED),
    (r"timed out|timeout", errno.ETIMEDOUT),
    (r"no route to host|host is down", errno.EHOSTUNREACH),
    # A server answers so as long as it has not exported yet what it will.
    (r"access denied by server", errno.EPERM),
    (r"bad option|unknown option|incorrect mount option|invalid option|unrecognized", errno.EINVAL),
)


def helper_errno(status: int, text: str) -> int:
    """The errno that fits best what a mount helper printed, and its exit status (mount(8), EXIT STATUS)."""
    if status in (126, 127):  # what mount.fuse's shell says of a program that it cannot start
        return errno.ENODEV
    for pattern, number in _TEXTS:
        if re.search(pattern, text, re.IGNORECASE):
            return number
    lowered = text.lower()
    known = [number for number in errno.errorcode if os.strerror(number).lower() in lowered]
    if known:
        # The longest: some texts are part of others ("Invalid argument", "Address family not supported …").
        return max(known, key=lambda number: len(os.strerror(number)))
    # 1: wrong usage or permissions; trying again does not help. Others, 32 above all, may be for want of a network.
    return errno.EINVAL if status == 1 else errno.EIO
