"""Files that are whole under their names after a kill and a power cut, with hard links and without."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dinoct.checksum import file_crc32
from dinoct.errors import CheckpointError

TEMPORARY = ".tmp"  # files on their way to a name are called .NAME.*.tmp


def on_its_way(path: Path) -> Path:
    """A name beside `path` that nobody else takes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write the new version of a file, which takes the old one's place at the end of the block.

    Whoever opens `path` has the old version or the whole new one, after a power cut too; an error leaves the old one
    and nothing beside it. Raises OSError if the disk refuses.
    """
    temporary = on_its_way(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_text(path: Path) -> Iterator[TextIO]:
    """`replacing`, opened to write UTF-8; lines end as they are written."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        yield file


def sweep(folder: Path, names: str = "*") -> None:
    """Remove what killed processes, of earlier versions too, left on its way; nobody may be writing such names."""
    for path in folder.glob(f".{names}{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing for folders
            raise
    finally:
        os.close(handle)


def link(path: Path, second: Path) -> None:
    """Give a file a second name that outlives the first, in place of what has that name.

    A hard link, or a copy where the file system has none.

    Raises:
        CheckpointError: if the disk refuses; what had the name has it still.
    """
    with linking(path, second):
        pass


@contextmanager
def linking(path: Path, second: Path) -> Iterator[None]:
    """`link`, made ready before the block, which may take away what has the name, and put in place behind it."""
    temporary = on_its_way(second)
    try:
        try:
            os.link(path.resolve(), temporary)
        except OSError:  # each file system says it in its own way
            _copy(path, temporary)
        yield
        os.replace(temporary, second)
        sync_folder(second.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {second}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy(path: Path, target: Path) -> None:
    with open(path, "rb") as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 24)
        copy.flush()
        os.fsync(copy.fileno())
    if file_crc32(target) != file_crc32(path):
        raise OSError(errno.EIO, "what was written reads back otherwise")
