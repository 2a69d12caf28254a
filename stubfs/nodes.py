"""What the kernel's node numbers stand for: a mirror of libfuse's tree, kept from the replies that go by.

libfuse allots the numbers and tells nobody their names; who asks what an inode number in /proc means needs both.
Pure bookkeeping, guarded by one lock. A node owns the O_PATH fd it keeps of an object whose name was removed.
"""

from __future__ import annotations

import os
import stat
import threading
from typing import Dict, List, NamedTuple, Optional, Tuple

from stubfs.protocol import ROOT_NODE


class Orphan(NamedTuple):
    """What is left of a removed name: an O_PATH fd and the number of the generation it belongs to."""

    fd: int
    generation: int


class Node:
    __slots__ = (
        "number", "generation", "parent", "name", "kind", "lookups", "library_lookups", "children", "has_pages",
        "orphan",
    )  # fmt: skip

    def __init__(self, number: int, generation: int, parent: Optional["Node"], name: Optional[bytes]) -> None:
        self.number = number
        self.generation = generation  # of the node number, as libfuse counts them; not one of ours
        self.parent = parent
        self.name = name  # None: it has no name any more
        self.kind = 0  # S_IFMT bits
        self.lookups = 0  # references that the kernel has
        self.library_lookups = 0  # references that libfuse believes the kernel has
        self.children = 0
        self.has_pages = False  # the kernel may have cached contents of it
        self.orphan: Optional[Orphan] = None


class NodeTable:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        root = Node(ROOT_NODE, 0, None, b"")
        root.kind = stat.S_IFDIR
        root.lookups = root.library_lookups = 1
        self._nodes: Dict[int, Node] = {ROOT_NODE: root}
        self._names: Dict[Tuple[int, bytes], Node] = {}
        # Counts renames begun and ended: a path that was put together in between may be of no use.
        self.renames = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, number: int) -> Optional[Node]:
        return self._nodes.get(number)

    def child(self, parent: int, name: bytes) -> Optional[Node]:
        return self._names.get((parent, name))

    def path(self, number: int) -> Optional[bytes]:
        """Relative to the root, which is b""; None if the node is unknown or it or a parent has no name any more."""
        node = self._nodes.get(number)
        if node is None:
            return None
        parts: List[bytes] = []
        while node.number != ROOT_NODE:
            parent, name = node.parent, node.name
            if parent is None or name is None:
                return None
            parts.append(name)
            node = parent
        parts.reverse()
        return b"/".join(parts)

    def child_path(self, parent: int, name: bytes) -> Optional[bytes]:
        above = self.path(parent)
        if not above:
            return above if above is None else name
        return above + b"/" + name

    def add(self, parent: int, name: bytes, number: int, generation: int, mode: int) -> None:
        """libfuse has told the kernel that ``name`` in ``parent`` is ``number``: one reference more on both sides."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None:
                above = self._nodes.get(parent)
                node = Node(number, generation, above, name)
                self._nodes[number] = node
                self._names[parent, name] = node
                if above is not None:
                    above.children += 1
            node.generation = generation
            node.kind = stat.S_IFMT(mode)
            node.lookups += 1
            node.library_lookups += 1

    def look_up(self, parent: int, name: bytes, mode: int) -> Optional[Node]:
        """The known node of this name, with one kernel reference more; None if only libfuse can tell its number."""
        with self._lock:
            node = self._names.get((parent, name))
            if node is None or not node.library_lookups:
                return None
            node.kind = stat.S_IFMT(mode)
            node.lookups += 1
            return node

    def forget(self, number: int, count: int) -> int:
        """The kernel drops ``count`` references. Returns how many libfuse is to be told of: none before the last."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or number == ROOT_NODE:
                return 0
            node.lookups = max(0, node.lookups - count)
            if node.lookups:
                return 0
            told, node.library_lookups = node.library_lookups, 0
            self._drop(node)
            return told

    def take_back(self, number: int, from_library: bool) -> None:
        """A reply that gave a reference did not reach the kernel; libfuse forgets its own by itself."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None:
                return
            node.lookups -= 1
            if from_library:
                node.library_lookups -= 1
            if not node.lookups and not node.library_lookups:
                self._drop(node)

    def _drop(self, node: Optional[Node]) -> None:
        # As libfuse: a directory stays, without references, as long as one of its children is known.
        while node is not None and not node.lookups and not node.children and node.number != ROOT_NODE:
            self._nodes.pop(node.number, None)
            above = self._unname(node)
            if node.orphan is not None:
                os.close(node.orphan.fd)
                node.orphan = None
            node = above

    def _unname(self, node: Node) -> Optional[Node]:
        above, name = node.parent, node.name
        node.parent = node.name = None
        if above is not None and name is not None:
            if self._names.get((above.number, name)) is node:
                del self._names[above.number, name]
            above.children -= 1
        return above

    def remove(self, parent: int, name: bytes, orphan: Optional[Orphan]) -> bool:
        """The name is gone. Takes over ``orphan``'s fd if there is a node to keep it; False: the caller closes it."""
        with self._lock:
            node = self._names.get((parent, name))
            if node is None:
                return False
            return self._remove(node, orphan)

    def _remove(self, node: Node, orphan: Optional[Orphan]) -> bool:
        above = self._unname(node)
        kept = orphan is not None and bool(node.lookups) and node.orphan is None
        if kept:
            node.orphan = orphan
        self._drop(node)
        self._drop(above)
        return kept

    def rename(self, old_parent: int, old: bytes, parent: int, name: bytes, orphan: Optional[Orphan]) -> bool:
        """As remove() for what had the new name before."""
        with self._lock:
            kept = False
            node = self._names.get((old_parent, old))
            replaced = self._names.get((parent, name))
            if replaced is not None and replaced is not node:
                kept = self._remove(replaced, orphan)
            above = self._nodes.get(parent)
            if node is not None and above is not None:
                former = self._unname(node)
                node.parent, node.name = above, name
                above.children += 1
                self._names[parent, name] = node
                self._drop(former)
            return kept

    def cached(self) -> List[int]:
        """The nodes whose contents the kernel may have in its page cache."""
        with self._lock:
            return [node.number for node in self._nodes.values() if node.has_pages]
