"""Find the files of a source, those inside archives too."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dinoct.data import archive, volumes
from dinoct.data.archive import BadArchive, Member


class Found(NamedTuple):
    """A file. The path is the real one, with the name behind it for a member of an archive.

    Size and time say whether it is still the file that it was; a member has its archive's time.
    """

    path: bytes
    size: int
    mtime_ns: int
    member: Member | None = None


def find_files(folders: Iterable[Path], skip: frozenset[bytes] = frozenset()) -> Iterator[Found]:
    """Yield all regular files and the members of archives, following links, each folder and file once.

    `skip` are folders to leave out. Paths are bytes: a file name need not be valid in any encoding.
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
                yield from _contents(os.path.realpath(path), state)
        except OSError:  # a dangling link, or a folder that we may not enter
            continue


def _contents(path: bytes, state: os.stat_result) -> Iterator[Found]:
    """Yield the file, or its members; an archive that cannot be listed (to its end) stands for what it hides."""
    if not archive.is_archive(path):
        yield Found(path, *volumes.state(path, state))
        return
    try:
        for name, member in archive.list_members(path):
            yield Found(path + b"/" + name, member.size, state.st_mtime_ns, member)
    except BadArchive:
        yield Found(path, state.st_size, state.st_mtime_ns)
