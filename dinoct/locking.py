"""One process at a time in a folder: locks that the kernel releases, even after kill -9.

Some cluster file systems are mounted without locks (Lustre without ``flock``, NFS without its lock daemon). Work goes
on there, with a warning.
"""

import errno
import fcntl
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
NO_LOCKS = "the file system of %s has no locks: see to it that no other process writes there"


def lock(handle: IO) -> bool:
    """Take the lock of a folder, one of whose files is open, until that file is closed.

    Returns:
        Whether there are locks: elsewhere nothing keeps a second process out, which the caller says (`NO_LOCKS`).
    Raises:
        BlockingIOError: if another process has it.
        OSError: if the file system fails otherwise.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def has_record_locks(folder: Path) -> bool:
    """Whether the file system of a folder has the locks that SQLite takes."""
    try:
        with TemporaryFile(dir=folder) as handle:  # closing a file that SQLite has open would end its locks
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _NO_LOCKS
    return True
