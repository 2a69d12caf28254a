"""CRIU's command line, and CRIU itself: its own options are passed on as they are, ours are added."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from typing import List, Mapping, Optional, Sequence

import spfs
from spfs.criu.delayed import DelayedMount
from spfs.criu.manager import STATE
from spfs.criu.restoration import TOKEN_VARIABLE
from spfs.errors import MissingFeatureError, SpfsError, UsageError, reason


class CriuFailed(SpfsError):
    """CRIU has ended with another status than 0; it has said why itself."""


def find(name: Optional[str] = None) -> str:
    """The path of CRIU; MissingFeatureError if there is none."""
    path = shutil.which(name or "criu", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise MissingFeatureError(
            f"cannot find {name or 'criu'}", "install it (apt-get install criu), or name it: --criu PATH", errno.ENOENT
        )
    return path


def value(arguments: Sequence[str], short: str, long: str) -> Optional[str]:
    """Of an option of CRIU's, the last one given: -D DIR, -DDIR, --images-dir DIR or --images-dir=DIR."""
    found = None
    for number, word in enumerate(arguments):
        if word == "--":
            break
        if word in (short, long):
            if number + 1 >= len(arguments):
                raise UsageError(f"cannot understand the command line: {word} needs a value", "see criu --help")
            found = arguments[number + 1]
        elif word.startswith(long + "="):
            found = word[len(long) + 1 :]
        elif word.startswith(short) and not word.startswith("--") and len(word) > len(short):
            found = word[len(short) :]
    return found


def given(arguments: Sequence[str], *options: str) -> bool:
    """Is one of these there? Short ones may be written together with others: -ds."""
    for word in arguments:
        for option in options:
            if word == option or option.startswith("--") and word.startswith(option + "="):
                return True
            together = len(option) == 2 and word.startswith("-") and word[1:].isalpha() and not word.startswith("--")
            if together and option[1] in word[1:]:
                return True
    return False


def dump_options(mounts: Sequence[DelayedMount], arguments: Sequence[str]) -> List[str]:
    """What is to be added for a dump."""
    added = ["--link-remap"] * (not given(arguments, "--link-remap"))
    added += ["--file-locks"] * (not given(arguments, "--file-locks", "-l"))
    for mount in mounts:
        for place in mount.places:
            if place.external:
                added += ["--external", f"mnt[{place.mountpoint}]:{place.external}"]
    return added


def restore_options(mounts: Sequence[DelayedMount], arguments: Sequence[str], script: str) -> List[str]:
    """What is to be added for a restore; namespaced ones are at ``host``."""
    added = ["--action-script", script]
    added += ["--file-locks"] * (not given(arguments, "--file-locks", "-l"))
    # By default CRIU compares build ids, and warns of each program that has none: those of files of zeros.
    added += ["--file-validation", "filesize"] * (not given(arguments, "--file-validation"))
    for mount in mounts:
        for place in mount.places:
            if place.external and mount.host is not None:
                path = os.path.join(mount.host, place.subdirectory).rstrip("/")
                added += ["--external", f"mnt[{place.external}]:{path}"]
    return added


def start(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """With our standard streams; not our child's children: what it restores is its own."""
    try:
        return subprocess.Popen([program, *arguments], env={**os.environ, **environment})
    except OSError as error:
        raise SpfsError(
            f"cannot start {program}: {reason(error)}", "is that CRIU's program?", error.errno or errno.EIO
        ) from error


def check(what: str, status: int, images: str, reasons: Sequence[str] = ()) -> None:
    """CriuFailed for a ``status`` other than 0. ``reasons``: what failed in our own scripts, if anything did."""
    if status:
        why = f"criu ended with status {status}"
        text = f"cannot {what}: {reasons[0]}; {why}" if reasons else f"cannot {what}: {why}"
        error = CriuFailed(text, f"see its log, in {images} or where -o says", errno.EIO)
        error.exit_code = status if 0 < status < 126 else 1
        raise error


_SCRIPT = """\
#!/bin/sh
# CRIU's action script for delayed mounts, made by spfs-criu of @TOP@.
case "$CRTOOLS_SCRIPT_ACTION" in
pre-restore | post-dump) ;;
post-restore | pre-resume | post-resume)
    # The guard of this restore does it; without one an interpreter must be started.
    read -r stat </proc/$PPID/stat
    case "$stat" in
    *"(criu)"*)
        set -- ${stat##*) }
        state=@STATE@/${@TOKEN@:-$PPID.${20}}
        [ -d "$state" ] || exit 0
        if read -r guard 2>/dev/null <"$state/pid" && [ -d "/proc/$guard" ]; then
            exec 4<"$state/answer"
            echo "$CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID" >"$state/guard"
            if read -r status message <&4; then
                [ -z "$message" ] || echo "$message" >&2
                exit "$status"
            fi
        fi ;;
    esac ;;
*) exit 0 ;;
esac
exec @PYTHON@ -I -S -c @CODE@
"""


def action_script() -> str:
    """A shell script for CRIU: of the many stages it starts an interpreter only for those where nobody else can do the
    work, and without what an interpreter does at its start for programs that use packages."""
    top = os.path.dirname(os.path.dirname(os.path.abspath(spfs.__file__)))
    code = f"import sys; sys.path.insert(0, {top!r}); from spfs.cli.criu import action; action()"
    values = {"TOP": top, "STATE": STATE, "TOKEN": TOKEN_VARIABLE, "PYTHON": sys.executable, "CODE": code}
    text = _SCRIPT
    for name, value in values.items():
        text = text.replace(f"@{name}@", _quoted(value) if name in ("PYTHON", "CODE") else value)
    return text


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
