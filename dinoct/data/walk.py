"""Find the files of a source, those inside archives too."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dinoct.data import archive, volumes
from dinoct.data.archive import BadArchive, Member


class Found(NamedTuple):
    """A file. The path is the real one, with the name behind it for a member of an archive; `place` is the way to it,
    which differs where there is a link.

    Size and time say whether it is still the file that it was; a member has its archive's time. `trouble` says why a
    place could not be entered or looked at: what lies there, or below, is not known to be gone.
    """

    path: bytes
    size: int
    mtime_ns: int
    member: Member | None = None
    trouble: str = ""
    place: bytes = b""


_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a link that leads nowhere, or a file just removed


def find_files(folders: Iterable[Path], skip: frozenset[bytes] = frozenset()) -> Iterator[Found]:
    """Yield all regular files and the members of archives, following links, each folder and file once.

    `skip` are folders to leave out. Paths are bytes: a file name need not be valid in any encoding.
    """
    seen: set[tuple[int, int]] = set()
    stack = [os.fsencode(folder) for folder in reversed(list(folders))]
    while stack:
        path = stack.pop()
        trouble = "file or folder cannot be looked at"
        try:
            state = os.stat(path)
            if stat.S_ISDIR(state.st_mode):
                if (state.st_dev, state.st_ino) not in seen and path not in skip:
                    seen.add((state.st_dev, state.st_ino))
                    trouble = "folder cannot be entered"
                    stack.extend(os.path.join(path, name) for name in sorted(os.listdir(path), reverse=True))
            elif stat.S_ISREG(state.st_mode):  # pipes, sockets and devices are no files to read
                real = os.path.realpath(path)
                for file in _contents(real, state):
                    yield file._replace(place=path + file.path[len(real) :])
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                yield _unreachable(path, trouble, error)


def _unreachable(path: bytes, trouble: str, error: OSError) -> Found:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__  # the error's own text quotes the path
    return Found(os.path.realpath(path), -1, 0, trouble=f"{trouble} ({reason})", place=path)


def _contents(path: bytes, state: os.stat_result) -> Iterator[Found]:
    """Yield the file, or its members; an archive that cannot be listed (to its end) stands for what it hides."""
    if not archive.is_archive(path):
        yield Found(path, *volumes.state(path, state))
        return
    try:
        for name, member in archive.list_members(path):
            yield Found(path + b"/" + name, member.size, state.st_mtime_ns, member)
    except BadArchive as error:
        if isinstance(error.__cause__, OSError):  # the machine's fault: its members are not known to be gone
            yield _unreachable(path, "archive cannot be read", error.__cause__)
            return
        yield Found(path, state.st_size, state.st_mtime_ns)
