"""Which files there are: what a walk found beside what the catalog knows.

Nothing is forgotten because it could not be looked at: below a folder that cannot be entered all stays as it is, and a
source without a single file, that had some, is more often a disk that is not mounted than one that somebody emptied.
"""

import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from dinoct.data.catalog import Catalog
from dinoct.data.options import PrepareError
from dinoct.data.series import SliceRef
from dinoct.data.volumes import is_volume
from dinoct.data.walk import Found


def require(folders: Sequence[Path]) -> None:
    """Raise PrepareError for a source that is not there or cannot be looked at. Its path may hold a name: a number."""
    for number, folder in enumerate(folders, 1):
        name = f"source: number {number} of {len(folders)}"
        try:
            os.stat(folder)
        except (FileNotFoundError, NotADirectoryError):
            raise PrepareError(f"{name} does not exist") from None
        except OSError as error:
            raise PrepareError(f"{name} cannot be looked at: {error.strerror}") from None


def register(
    db: sqlite3.Connection, files: Iterable[tuple[str, Found]], tops: Sequence[bytes], *, forget_missing: bool = False
) -> int:
    """Take note of (file_id, file); forget files of the sources `tops` that are there no more. Returns how many.

    A file whose size or time changed is as good as new. Files of other sources stay, since sources add up over runs;
    with `forget_missing` those that do not exist go too, and a source may be empty. Raises PrepareError for a source
    that had files and has none; then nothing has changed.
    """
    tops = [top.rstrip(b"/") for top in tops]
    with db:
        db.execute("UPDATE files SET seen = 0")
        unreachable, alive = set(), set()
        for file_id, file in files:
            alive |= above(file.path, file.place, tops)
            if file.trouble:
                unreachable |= {file.path, file.place}
            _note(db, file_id, file)
        gone: list[str] = []
        vanished = 0
        query = "SELECT file_id, path, place, size, member FROM files WHERE NOT seen"
        for file_id, path, place, size, member in db.execute(query):
            if above(path, place, unreachable):
                continue
            named = above(path, place, tops)
            if named - alive and size >= 0 and not forget_missing:
                raise _empty_source(db, tops, min(named - alive))
            if named or (forget_missing and is_gone(json.loads(member)[0] if member else path)):
                gone.append(file_id)
                vanished += size >= 0  # below 0 it stands for a place that could not be entered
        forget(db, gone)
        _retry_transient(db)
    return vanished


def forget_moved(catalog: Catalog, groups: Iterable[str]) -> int:
    """Forget files that do not exist any more and whose slices other files of the same group hold. Returns how many.

    A folder that was moved, or mounted elsewhere, brings every slice once more, and what was refused in it too. Without
    another file in its place a file is kept, since its disk may not be mounted.
    """
    db = catalog.db
    gone = _moved_volumes(db)
    for group in groups:
        unseen = "SELECT 1 FROM frames JOIN files USING (file_id) WHERE grp = ? AND NOT seen LIMIT 1"
        if not db.execute(unseen, (group,)).fetchone():
            continue
        refs, found = catalog.group(group)
        away = {key: is_gone(file.member.archive if file.member else file.path) for key, file in found.items()}
        here = {_slice(ref) for ref in refs if not away[ref.file_id]}
        lost = {ref.file_id for ref in refs if away[ref.file_id] and _slice(ref) not in here}
        gone.update(key for key in found if away[key] and key not in lost)
    if gone:
        refused = db.execute("SELECT file_id, path FROM files WHERE NOT seen AND kind IS NOT NULL AND member IS NULL")
        gone.update(file_id for file_id, path in refused if is_gone(path))
    with db:
        forget(db, gone)
    return len(gone)


def _moved_volumes(db: sqlite3.Connection) -> set[str]:
    """Volumes name their series after their path: moved ones are known by name, size and time."""
    query = "SELECT file_id, path, size, mtime_ns, member FROM files WHERE NOT seen AND kind IS NULL"
    gone = {
        file_id: (os.path.basename(path), size, time)
        for file_id, path, size, time, member in db.execute(query)
        if is_volume(path) and is_gone(json.loads(member)[0] if member else path)
    }
    if not gone:
        return set()
    seen = db.execute("SELECT path, size, mtime_ns FROM files WHERE seen")
    here = {(os.path.basename(path), size, time) for path, size, time in seen if is_volume(path)}
    return {file_id for file_id, known in gone.items() if known in here}


def _slice(ref: SliceRef) -> tuple:
    return ref.header.sop, ref.header.frame, ref.header.position


def above(path: bytes, place: bytes | None, tops: Collection[bytes]) -> set[bytes]:
    """Return those of `tops` that are the file, or a folder or archive above it, by its path or by the link to it."""
    found = set()
    for name in {path, place or path}:
        end = len(name) + 1
        while end > 0:
            if name[:end] in tops:
                found.add(name[:end])
            end = name.rfind(b"/", 0, end)
        if b"" in tops:  # the source is /
            found.add(b"")
    return found


def is_gone(place: bytes | str) -> bool:
    """Say whether a real path is known not to exist any more, or leads elsewhere since there is a link in it."""
    try:
        os.stat(place)
        return os.path.realpath(place) != place
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # nobody knows
        return False


def missing(db: sqlite3.Connection) -> int:
    """Count the files of sources that were not named whose folder (or archive) is not there."""
    count, folder, gone = 0, b"", False
    for path, member in db.execute("SELECT path, member FROM files WHERE NOT seen AND size >= 0 ORDER BY path"):
        place = os.fsencode(json.loads(member)[0]) if member else os.path.dirname(path)
        if place != folder:
            folder, gone = place, is_gone(place)
        count += gone
    return count


def forget(db: sqlite3.Connection, file_ids: Iterable[str]) -> None:
    for file_id in file_ids:
        for table in ("files", "frames"):  # drops and slices go with their group, which no longer fits its fingerprint
            db.execute(f"DELETE FROM {table} WHERE file_id = ?", (file_id,))


def _note(db: sqlite3.Connection, file_id: str, file: Found) -> None:
    known = db.execute("SELECT size, mtime_ns FROM files WHERE file_id = ?", (file_id,)).fetchone()
    place = file.place if file.place != file.path else None
    if known == (file.size, file.mtime_ns) and not file.trouble:
        db.execute("UPDATE files SET seen = 1, place = ? WHERE file_id = ?", (place, file_id))
        return
    forget(db, [file_id])
    member = json.dumps(file.member) if file.member else None
    refused = (1, "refused", file.trouble, 1) if file.trouble else (0, None, None, 0)
    db.execute(
        "INSERT INTO files (file_id, path, size, mtime_ns, seen, member, place, scanned, kind, reason, is_ct) "
        "VALUES (?, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?)",
        (file_id, file.path, file.size, file.mtime_ns, member, place, *refused),
    )


def _empty_source(db: sqlite3.Connection, tops: Sequence[bytes], top: bytes) -> PrepareError:
    had = sum(bool(above(*row, [top])) for row in db.execute("SELECT path, place FROM files WHERE size >= 0"))
    return PrepareError(
        f"source: number {tops.index(top) + 1} of {len(tops)} had {had} files before and has none now: is its disk "
        "mounted? Nothing was forgotten. If they were deleted, prepare.forget_missing=true forgets all that is gone"
    )


def _retry_transient(db: sqlite3.Connection) -> None:
    """Have files tried again that may not be to blame; of a source that is away, nothing is begun anew."""
    seen = "SELECT file_id FROM files WHERE seen"
    db.execute(f"DELETE FROM groups WHERE grp IN (SELECT grp FROM drops WHERE transient AND file_id IN ({seen}))")
    db.execute("UPDATE files SET scanned = 0, kind = NULL, reason = NULL, transient = 0 WHERE transient AND seen")
