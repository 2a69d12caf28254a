"""Which mounts are delayed, and what each must hold: from the record, the administrator's file, options and images."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence

from spfs.criu import record
from spfs.criu.delayed import DelayedMount, Wish, unlike
from spfs.errors import SpfsError

if TYPE_CHECKING:
    from spfs.criu.observe import Observed

# Imported where they are used: a restore with a record needs no images, and is waited for.


def at_restore(
    images: str, configured: Optional[Sequence[DelayedMount]], wishes: Sequence[Wish] = ()
) -> List[DelayedMount]:
    """What the record says, overruled by the administrator's file and by ``wishes``; complete with files."""
    mounts: Dict[str, DelayedMount] = {mount.key: mount for mount in record.read(images) or ()}
    for mount in configured or ():
        known = mounts.get(mount.key)
        mounts[mount.key] = _overruled(known, mount) if known is not None else mount
    for wish in wishes:
        known = mounts.get(wish.key)
        mounts[wish.key] = wish.onto(known) if known is not None else wish.alone()
    for mount in mounts.values():
        if not mount.places:
            raise SpfsError(
                f"cannot restore delayed mount {mount.key}: nobody says where it is",
                'give its places, as "places": [{"mountpoint": …}], or --delayed KEY=MOUNTPOINT,…',
                errno.EINVAL,
            )
    return completed(images, list(mounts.values()))


def _overruled(known: DelayedMount, said: DelayedMount) -> DelayedMount:
    # Where it is and what it holds are facts of the dump.
    return known._replace(
        type=said.type,
        source=said.source,
        flags=said.flags,
        options=said.options,
        host=said.host or known.host,
        network=said.network or known.network,
    )


def completed(directory: str, mounts: List[DelayedMount]) -> List[DelayedMount]:
    """With files for those that have none yet: the images are read only then."""
    if all(mount.files is not None for mount in mounts):
        return unlike(mounts)
    from spfs.criu.images import Images
    from spfs.criu.plan import from_images, plan

    images = Images(directory)
    mounts = unlike([from_images(images, mount) for mount in mounts])
    planned = plan(images, mounts)
    return [
        mount if mount.files is not None else mount._replace(files=tuple(planned[mount.key]))
        for mount in mounts
    ]


def recorded(directory: str, observed: Observed) -> List[DelayedMount]:
    """Write the record for the images in ``directory``, of processes that had what was ``observed``.

    What they hold nothing of is left out, unless CRIU needs it to make their mount namespace again.
    """
    from spfs.criu.images import Images
    from spfs.criu.plan import plan, used_alone

    images = Images(directory)
    planned = plan(images, observed.mounts, observed.others, images.uses(), observed.looks())
    mounts = observed.mounts if observed.namespaced else used_alone(images, observed.mounts, observed.others)
    mounts = [mount._replace(files=tuple(planned[mount.key])) for mount in mounts]
    record.write(directory, mounts)
    return mounts


def at_dump(directory: str, pid: int, configured: Optional[Sequence[DelayedMount]]) -> List[DelayedMount]:
    """As ``recorded``, of the process ``pid``, whose dump has just been written; what is configured, else all network
    file systems, are delayed."""
    from spfs.criu.observe import Observed

    wishes = [_wish(mount) for mount in configured or ()]
    with Observed(pid, wishes) as observed:
        return recorded(directory, observed)


def _wish(mount: DelayedMount) -> Wish:
    if not mount.places:
        raise SpfsError(
            f"cannot delay {mount.key}: its configuration has no places",
            'give "places": [{"mountpoint": …}]',
            errno.EINVAL,
        )
    return Wish(
        mount.key,
        mount.places[0].mountpoint,
        mount.type,
        mount.source,
        mount.flags,
        mount.options,
        mount.host,
        mount.network,
    )
