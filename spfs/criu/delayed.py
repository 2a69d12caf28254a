"""A mount that is delayed at a restore: what it is, where the processes see it, and what it must hold for CRIU.

Text (``--delayed``) and JSON in, named tuples out; no I/O. JSON is how it is written beside the images. Named tuples,
because a restore waits for this module: dataclasses take an interpreter longer to import than all that is here.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, TypeVar

from spfs.errors import SpfsError, UsageError

HOST, CONTAINER = "host", "container"
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Place(NamedTuple):
    """Where the file system is mounted, as the processes see it, and which directory of it is to be seen there.

    ``external``: what CRIU calls the mount (``--external mnt[…]:external``); "" in CRIU's own mount namespace.
    """

    mountpoint: str
    subdirectory: str = ""
    external: str = ""


class PlannedFile(NamedTuple):
    """A file that must be there for CRIU.

    ``path``: from the file system's root; ``mode`` as st_mode; ``size``: bytes of a regular file; ``target``: of a
    symbolic link; ``device``: of a device, as st_rdev; ``owner``: uid and gid, if they are known: in a user
    namespace CRIU gets to files of its own ids only; ``uses``: what for. ``original``: the name that was removed
    while the file was open, of one that CRIU gave a name at the dump (a link remap).
    """

    path: str
    mode: int
    size: Optional[int] = None
    target: Optional[str] = None
    uses: Tuple[str, ...] = ()
    original: Optional[str] = None
    device: Optional[int] = None
    owner: Optional[Tuple[int, int]] = None


class DelayedMount(NamedTuple):
    """``type``, ``source``, ``flags`` and ``options`` as for mount(2).

    ``root``: which directory of the file system that was mounted at the dump is the root of what ``source`` names.
    ``network``: in whose network namespace it is mounted, HOST or CONTAINER (the first process's); None: HOST.
    ``host``: where it is mounted for CRIU, if the processes have a mount namespace of their own and somebody else than
    we tells CRIU that place. ``files`` None: not known yet, the images must be read.
    """

    key: str
    type: str
    source: str
    flags: int = 0
    options: str = ""
    root: str = "/"
    places: Tuple[Place, ...] = ()
    host: Optional[str] = None
    files: Optional[Tuple[PlannedFile, ...]] = None
    network: Optional[str] = None

    @property
    def namespaced(self) -> bool:
        """Do the processes see it in a mount namespace of their own?"""
        return any(place.external for place in self.places)

    def to_json(self) -> Dict[str, Any]:
        files = None if self.files is None else [file._asdict() for file in self.files]
        return {**self._asdict(), "places": [place._asdict() for place in self.places], "files": files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DelayedMount":
        """UsageError for what is not of this form."""
        try:
            values = dict(data)
            files = values.pop("files", None)
            mount = cls(
                places=tuple(_checked(Place(**dict(place))) for place in values.pop("places", ())),
                files=None if files is None else tuple(_file(dict(file)) for file in files),
                **values,
            )
            _checked(mount)
        except (TypeError, ValueError, KeyError) as error:
            raise UsageError(f"cannot read the description of a delayed mount: {error}") from error
        _check_key(mount.key)
        if mount.network is not None:
            _check_network(mount.network)
        return mount


_KINDS = {"flags": int, "mode": int, "size": int, "device": int}  # all others are strings
_LISTS = ("places", "files", "uses", "owner")
_Tuple = TypeVar("_Tuple", Place, PlannedFile, DelayedMount)


def _checked(values: _Tuple) -> _Tuple:
    """TypeError for a value that is of another type than it must be."""
    for name, value in zip(values._fields, values):
        kind = _KINDS.get(name, str)
        if value is not None and name not in _LISTS and type(value) is not kind:
            raise TypeError(f"{name}: {value!r} is no {'number' if kind is int else 'string'}")
    return values


def _file(data: Mapping[str, Any]) -> PlannedFile:
    uid_gid = data.get("owner")
    owner = None if uid_gid is None else (int(uid_gid[0]), int(uid_gid[1]))
    return _checked(PlannedFile(**{**data, "uses": tuple(data.get("uses", ())), "owner": owner}))


class Wish(NamedTuple):
    """What a ``--delayed`` says; None: not said."""

    key: str
    mountpoint: Optional[str] = None
    type: Optional[str] = None
    source: Optional[str] = None
    flags: Optional[int] = None
    options: Optional[str] = None
    host: Optional[str] = None
    network: Optional[str] = None

    @classmethod
    def parse(cls, text: str) -> "Wish":
        """``KEY[=MOUNTPOINT][,type=…][,source=…][,flags=…][,host=…][,network=…][,options=…]``.

        All after options= is options.
        """
        head, separator, options = text.partition(",options=")
        first, *items = head.split(",")
        key, _, mountpoint = first.partition("=")
        _check_key(key)
        values: Dict[str, Any] = {}
        for item in items:
            name, equals, value = item.partition("=")
            if name not in ("type", "source", "flags", "host", "network") or not equals or not value or name in values:
                raise UsageError(
                    f"cannot understand --delayed {text}: {item!r}",
                    "KEY=MOUNTPOINT,type=…,source=…,flags=…,host=…,network=…,options=…, each once, options last",
                )
            values[name] = value
        if "flags" in values:
            try:
                values["flags"] = int(values["flags"])
            except ValueError as error:
                raise UsageError(f"cannot understand --delayed {text}: flags: not a number") from error
        if separator:
            values["options"] = options
        if "network" in values:
            _check_network(values["network"])
        for path in (mountpoint, values.get("host")):
            if path and not path.startswith("/"):
                raise UsageError(f"cannot understand --delayed {text}: {path} is no absolute path")
        return cls(key, os.path.normpath(mountpoint) if mountpoint else None, **values)

    def onto(self, mount: DelayedMount) -> DelayedMount:
        """``mount`` with what is wished in place of what it says."""
        changed = {
            name: value
            for name in ("type", "source", "flags", "options", "host", "network")
            for value in [getattr(self, name)]
            if value is not None
        }
        if self.mountpoint and self.mountpoint not in [place.mountpoint for place in mount.places]:
            seen = ", ".join(place.mountpoint for place in mount.places)
            raise UsageError(
                f"cannot delay {self.key} at {self.mountpoint}: at the dump it was at {seen}",
                "the processes have that path in their memory; give the same one, or none",
            )
        return mount._replace(**changed)

    def alone(self) -> DelayedMount:
        """For images beside which nothing is written."""
        if self.mountpoint is None or self.type is None or self.source is None:
            raise UsageError(
                f"cannot delay {self.key}: its mountpoint, type or source is not known",
                f"nothing is written beside these images; give --delayed {self.key}=MOUNTPOINT,type=…,source=…",
            )
        return DelayedMount(
            self.key,
            self.type,
            self.source,
            self.flags or 0,
            self.options or "",
            places=(Place(self.mountpoint),),
            host=self.host,
            network=self.network,
        )


def _check_network(network: str) -> None:
    if network not in (HOST, CONTAINER):
        raise UsageError(f"cannot mount in network {network!r}", f"network is {HOST} or {CONTAINER}")


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise UsageError(
            f"cannot use {key!r} as the key of a delayed mount", "1 to 64 of the characters A-Z a-z 0-9 _ . -"
        )


def unlike(mounts: List[DelayedMount]) -> List[DelayedMount]:
    """The mounts as they are; SpfsError if two have one key."""
    keys = [mount.key for mount in mounts]
    for key in keys:
        if keys.count(key) > 1:
            raise SpfsError(
                f"cannot delay two mounts with the key {key}", "give each a key of its own", errno.EINVAL
            )
    return mounts
