"""Find the files of a source."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def find_files(folders: Iterable[Path], skip: frozenset[bytes] = frozenset()) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield (real path, stat) of all regular files, following links, each folder once; `skip` are folders to leave out.

    Paths are bytes: a file name need not be valid in any encoding.
    """
    seen: set[tuple[int, int]] = set()
    stack = [os.fsencode(folder) for folder in reversed(list(folders))]
    while stack:
        path = stack.pop()
        try:
            state = os.stat(path)
            if os.path.isdir(path):
                if (state.st_dev, state.st_ino) not in seen and path not in skip:
                    seen.add((state.st_dev, state.st_ino))
                    stack.extend(os.path.join(path, name) for name in sorted(os.listdir(path), reverse=True))
            elif os.path.isfile(path):  # pipes, sockets and devices are no files to read
                yield os.path.realpath(path), state
        except OSError:  # a dangling link, or a folder that we may not enter
            continue
