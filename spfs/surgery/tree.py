"""The resolver for an old mount whose tree can simply be walked, unlike that of a file system that holds requests."""

from __future__ import annotations

import os
from typing import Dict, Iterable, List, Optional, Set


class TreeResolver:
    """Finds inode numbers by walking the tree beneath ``root`` (a descriptor of the file system's root directory,
    which stays the caller's). A number that is not found has no name any more. OSError as scandir(3)."""

    def __init__(self, root: int) -> None:
        self._root = root

    def paths(self, nodes: Iterable[int]) -> Dict[int, Optional[str]]:
        wanted: Set[int] = set(nodes)
        found: Dict[int, Optional[str]] = dict.fromkeys(wanted)
        top = os.fstat(self._root)
        if top.st_ino in wanted:
            found[top.st_ino] = ""
            wanted.discard(top.st_ino)
        todo: List[str] = [""]
        while todo and wanted:
            directory = todo.pop()
            fd = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root)
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        status = entry.stat(follow_symlinks=False)
                        if status.st_dev != top.st_dev:
                            continue  # another file system, mounted here
                        path = f"{directory}/{entry.name}" if directory else entry.name
                        if status.st_ino in wanted:
                            wanted.discard(status.st_ino)
                            found[status.st_ino] = path
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(path)
            finally:
                os.close(fd)
        return found
