"""Which mounts are switched, and which follow by propagation: decided from mountinfo alone."""

from __future__ import annotations

from typing import List, Optional

from spfs.instances import Instance
from spfs.linux.mountinfo import Mount
from spfs.mountswitch import _leaders, _waves


def mount(number: int, path: str, device: int = 9, shared: Optional[int] = None, master: Optional[int] = None) -> Mount:
    tags = [("shared", shared)] if shared else []
    tags += [("master", master)] if master else []
    propagation = tuple((kind, group) for kind, group in tags if group is not None)
    return Mount(number, 1, (0, device), "/", path, ("rw",), propagation, "fuse", "x", "rw")


def instance(
    number: int,
    path: str = "/p/data",
    shared: Optional[int] = None,
    master: Optional[int] = None,
    own: Optional[int] = None,
    parent_path: str = "/p",
) -> Instance:
    """A mount with id ``number``, on a parent of the given groups, itself shared in group ``own``."""
    parent = mount(1000 + number, parent_path, device=5, shared=shared, master=master)
    return Instance(mount(number, path, shared=own), number, number, parent, ())


def ids(found: List[Instance]) -> List[int]:
    return [one.mount_id for one in found]


def test_private_parents_are_each_switched() -> None:
    leaders, followers = _leaders([instance(1), instance(2)])
    assert (ids(leaders), followers) == ([1, 2], [])


def test_peers_follow_the_first() -> None:
    leaders, followers = _leaders([instance(1, shared=7), instance(2, shared=7), instance(3, shared=8)])
    assert (ids(leaders), ids(followers)) == ([1, 3], [2])


def test_slaves_follow_their_master_whatever_the_order() -> None:
    leaders, followers = _leaders([instance(1, master=7), instance(2, shared=7)])
    assert (ids(leaders), ids(followers)) == ([2], [1])


def test_a_slaves_slave_follows_too() -> None:
    leaders, followers = _leaders([instance(1, shared=7), instance(2, master=8), instance(3, shared=8, master=7)])
    assert (ids(leaders), sorted(ids(followers))) == ([1], [2, 3])


def test_peers_elsewhere_in_the_tree_do_not_follow() -> None:
    leaders, followers = _leaders([instance(1, shared=7), instance(2, "/p/other", shared=7)])
    assert (ids(leaders), followers) == ([1, 2], [])


def test_the_same_directory_seen_at_another_path_follows() -> None:
    leaders, followers = _leaders([instance(1, shared=7), instance(2, "/q/data", shared=7, parent_path="/q")])
    assert (ids(leaders), ids(followers)) == ([1], [2])


def test_peers_among_the_old_mounts_are_unmounted_one_after_the_other() -> None:
    waves = _waves([instance(1, own=3), instance(2, own=3), instance(3), instance(4, own=4)])
    assert [ids(wave) for wave in waves] == [[1, 3, 4], [2]]
