"""What the kernel's node numbers stand for: one node per file, with all its names; one per name across generations.

A node's number is the inode number of what it stands for where that is free, so that it stays the same for as long as
the file does. Pure bookkeeping, guarded by one lock. A node owns the O_PATH fd it keeps of an object whose last name
was removed.
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from stubfs.protocol import ROOT_NODE, UNKNOWN_INO

# For numbers that are taken: by what had it in a former generation, on another device beneath the backing directory.
_FIRST_ALTERNATIVE = 1 << 48


class Orphan(NamedTuple):
    """What is left of a removed name: an O_PATH fd and the number of the generation it belongs to."""

    fd: int
    generation: int


Identity = Tuple[int, int, int]
"""Which file it is: number of the generation, st_dev and st_ino beneath its backing directory."""


class Node:
    __slots__ = (
        "number", "names", "entries", "identity", "kind", "lookups", "has_pages", "vouched", "told", "orphan",
    )  # fmt: skip

    def __init__(self, number: int, kind: int) -> None:
        self.number = number
        # Parent and name of each known name, the latest first. A new tuple at each change: it is read without the lock.
        self.names: Tuple[Tuple["Node", bytes], ...] = ()
        self.entries: Dict[bytes, "Node"] = {}  # the known names in it
        self.identity: Optional[Identity] = None
        self.kind = kind  # S_IFMT bits
        self.lookups = 0  # references that the kernel has
        self.has_pages = False  # the kernel may have cached contents of it
        self.vouched = 0.0  # when the kernel was last told to believe its attributes for a moment; monotonic
        # When the kernel was last told its attributes in stub mode, or to forget them: it dismisses those that it asked
        # for before, on behalf of others who wait. Monotonic.
        self.told = 0.0
        self.orphan: Optional[Orphan] = None


class NodeTable:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        root = Node(ROOT_NODE, stat.S_IFDIR)
        root.lookups = 1
        self._nodes: Dict[int, Node] = {ROOT_NODE: root}
        self._objects: Dict[Identity, Node] = {}
        self._next = _FIRST_ALTERNATIVE
        # Other numbers whenever names begin and end to change: what was found out in between may be of no use.
        self._change = itertools.count(1)
        self.changes = 0
        self.renames = 0  # only what can change the path of what it does not name

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, number: int) -> Optional[Node]:
        return self._nodes.get(number)

    def child(self, parent: int, name: bytes) -> Optional[Node]:
        above = self._nodes.get(parent)
        return above.entries.get(name) if above is not None else None

    def path(self, number: int) -> Optional[bytes]:
        """Relative to the root, which is b""; None if the node is unknown or it or a parent has no name any more."""
        node = self._nodes.get(number)
        if node is None:
            return None
        parts: List[bytes] = []
        while node.number != ROOT_NODE:
            names = node.names
            if not names:
                return None
            node, name = names[0]
            parts.append(name)
        parts.reverse()
        return b"/".join(parts)

    def child_path(self, parent: int, name: bytes) -> Optional[bytes]:
        if parent == ROOT_NODE:
            return name
        above = self.path(parent)
        return None if above is None else above + b"/" + name

    def entry_numbers(self, parent: int, generation: int, device: int) -> Callable[[bytes, int], int]:
        """A function of name and inode number, for a directory's entries: the number that one has, or will most
        probably get when it is looked up."""
        directory = self._nodes.get(parent)
        entries = directory.entries if directory is not None else {}
        above = directory.names[0][0].number if directory is not None and directory.names else parent
        itself_and_above = {b".": parent, b"..": above}

        def number(name: bytes, inode: int) -> int:
            node = entries.get(name)
            if node is None:
                if name in itself_and_above:
                    return itself_and_above[name]
                node = self._objects.get((generation, device, inode))
                if node is None:
                    return inode if self._is_free(inode) else UNKNOWN_INO
            return node.number

        return number

    def tell(self, number: int) -> None:
        node = self._nodes.get(number)
        if node is not None:
            node.told = time.monotonic()

    # --- references of the kernel

    def enter(
        self, parent: int, name: bytes, status: os.stat_result, generation: int, seen: Optional[int] = None
    ) -> Optional[Node]:
        """The node of what ``name`` in ``parent`` is now, by ``status``, with one kernel reference more.

        None: names have changed since ``changes`` was ``seen``, so that the status may be of something else; the
        caller looks again.
        """
        identity = (generation, status.st_dev, status.st_ino)
        kind = stat.S_IFMT(status.st_mode)
        with self._lock:
            node = self.child(parent, name)
            if node is None or node.identity != identity or node.kind != kind:
                if seen is not None and seen != self.changes:
                    return None
                node = self._find(node, parent, name, identity, kind)
            node.lookups += 1
            return node

    def enter_nameless(self, status: os.stat_result, generation: int) -> Node:
        """As enter(), of a file that was opened without a name (O_TMPFILE)."""
        with self._lock:
            node = self._new((generation, status.st_dev, status.st_ino), stat.S_IFMT(status.st_mode))
            node.lookups += 1
            return node

    def _find(self, named: Optional[Node], parent: int, name: bytes, identity: Identity, kind: int) -> Node:
        if named is not None:
            former = named.identity
            if named.kind == kind and (kind == stat.S_IFDIR or former is None or former[0] != identity[0]):
                # Of another generation the name tells which file it is. Of directories always: whoever is in one asks
                # by its path, and file systems without inode numbers of their own give it new ones.
                self._identify(named, identity)
                # Its other names may be other files there. Those that are not come back when they are looked up.
                others = [(above.number, also) for above, also in named.names if (above.number, also) != (parent, name)]
                self._drop(*(self._unname(named, *other) for other in others))
                return named
            former_parent = self._unname(named, parent, name)  # somebody else has put another file in its place
            self._drop(named, former_parent)
        # Another name of a known file. A directory has one name alone, in the kernel too: where two lead to it, by a
        # bind mount, they are two nodes.
        node = None if kind == stat.S_IFDIR else self._objects.get(identity)
        if node is None or node.kind != kind:
            node = self._new(identity, kind)
        self._name(node, parent, name)
        return node

    def _new(self, identity: Identity, kind: int) -> Node:
        number = identity[2]
        while not self._is_free(number):
            number = self._next
            self._next += 1
        node = self._nodes[number] = Node(number, kind)
        self._identify(node, identity)
        return node

    def _is_free(self, number: int) -> bool:
        return number > ROOT_NODE and number != UNKNOWN_INO and number not in self._nodes

    def _identify(self, node: Node, identity: Optional[Identity]) -> None:
        if node.identity is not None and self._objects.get(node.identity) is node:
            del self._objects[node.identity]
        # Two names that were two files in a former generation may be one now: open files keep theirs apart.
        node.identity = None if identity is None or identity in self._objects else identity
        if node.identity is not None:
            self._objects[node.identity] = node

    def forget(self, number: int, count: int) -> None:
        """The kernel drops ``count`` references."""
        with self._lock:
            node = self._nodes.get(number)
            if node is not None and number != ROOT_NODE:
                node.lookups = max(0, node.lookups - count)
                self._drop(node)

    def _drop(self, *nodes: Optional[Node]) -> None:
        """Those of them that nobody needs any more. Not by recursion: a path may have 2,000 directories."""
        left = list(nodes)
        while left:
            node = left.pop()
            # A directory stays, without references, as long as one of its children is known.
            if node is None or node.lookups or node.entries or self._nodes.get(node.number) is not node:
                continue
            del self._nodes[node.number]
            left += [self._unname(node, parent.number, name) for parent, name in node.names]
            self._identify(node, None)
            if node.orphan is not None:
                os.close(node.orphan.fd)
                node.orphan = None

    # --- names

    def _name(self, node: Node, parent: int, name: bytes) -> None:
        above = self._nodes.get(parent)
        if above is not None:
            node.names = ((above, name), *node.names)
            above.entries[name] = node

    def _unname(self, node: Node, parent: int, name: bytes) -> Optional[Node]:
        """The parent, which may be dropped now."""
        for i, (above, known) in enumerate(node.names):
            if known == name and above.number == parent:
                node.names = node.names[:i] + node.names[i + 1 :]
                if above.entries.get(name) is node:
                    del above.entries[name]
                return above
        return None

    def change(self, renames: bool = False) -> None:
        """To be called before and after names are changed in the backing directory."""
        self.changes = number = next(self._change)  # without the lock: no number is given twice
        if renames:
            self.renames = number

    def link(self, number: int, parent: int, name: bytes, generation: int, status: os.stat_result) -> Optional[Node]:
        """The node, with a new name and one kernel reference more. None: it is not the file of ``status``."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or node.identity != (generation, status.st_dev, status.st_ino):
                return None
            former = self.child(parent, name)
            if former is not node:
                if former is not None:
                    self._remove(former, parent, name, None)
                self._name(node, parent, name)
            node.lookups += 1
            return node

    def remove(self, parent: int, name: bytes, orphan: Optional[Orphan]) -> bool:
        """The name is gone. Takes over ``orphan``'s fd if there is a node to keep it; False: the caller closes it."""
        with self._lock:
            node = self.child(parent, name)
            return node is not None and self._remove(node, parent, name, orphan)

    def _remove(self, node: Node, parent: int, name: bytes, orphan: Optional[Orphan]) -> bool:
        above = self._unname(node, parent, name)
        kept = orphan is not None and bool(node.lookups) and not node.names and node.orphan is None
        if kept:
            node.orphan = orphan
        elif not node.names and node.orphan is None:
            self._identify(node, None)  # its inode number may be another file's by now
        self._drop(node, above)
        return kept

    def remains(self, number: int) -> Optional[Orphan]:
        """What is left of a node without a name, with an fd of the caller's own; None if nothing was kept."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or node.orphan is None:
                return None
            return Orphan(os.dup(node.orphan.fd), node.orphan.generation)

    def lose(self, number: int) -> bool:
        """The name that path() gives was not there: somebody else has removed it. False: the node has no other."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or len(node.names) < 2:
                return False
            parent, name = node.names[0]
            self._drop(self._unname(node, parent.number, name))
            return True

    def rename(self, old_parent: int, old: bytes, parent: int, name: bytes, orphan: Optional[Orphan]) -> bool:
        """As remove() for what had the new name before."""
        with self._lock:
            kept = False
            node = self.child(old_parent, old)
            replaced = self.child(parent, name)
            if node is not None and node is replaced:
                return False  # two names of one file: rename(2) does nothing
            if replaced is not None:
                kept = self._remove(replaced, parent, name, orphan)
            if node is not None:
                former = self._unname(node, old_parent, old)
                self._name(node, parent, name)
                self._drop(former)
            return kept

    def exchange(self, old_parent: int, old: bytes, parent: int, name: bytes) -> None:
        with self._lock:
            nodes = self.child(old_parent, old), self.child(parent, name)
            places = (old_parent, old), (parent, name)
            # Nothing is dropped in between: both parents have a reference of the kernel, which names them.
            for node, place in zip(nodes, places):
                if node is not None:
                    self._unname(node, *place)
            for node, place in zip(nodes, reversed(places)):
                if node is not None:
                    self._name(node, *place)

    def cached(self) -> List[int]:
        """The nodes whose contents the kernel may have in its page cache."""
        with self._lock:
            return [node.number for node in self._nodes.values() if node.has_pages]

    def vouched(self, since: float) -> List[int]:
        """The nodes whose attributes the kernel was told to believe since then (monotonic)."""
        with self._lock:
            return [node.number for node in self._nodes.values() if node.vouched >= since]

    def dropped(self, numbers: List[int]) -> None:
        """The kernel has no pages of these any more."""
        with self._lock:
            for number in numbers:
                node = self._nodes.get(number)
                if node is not None:
                    node.has_pages = False
