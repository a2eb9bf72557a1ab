"""Names of files that survive a power cut, on file systems that know hard links and on those that do not."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinoct.checksum import file_crc32
from dinoct.errors import CheckpointError


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
    temporary = second.with_name(f".{second.name}.tmp-{os.getpid()}")
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
