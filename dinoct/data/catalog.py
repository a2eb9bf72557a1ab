"""What prepare knows, in `_private/catalog.sqlite`: files and their paths, slices found, series written.

It is the map from public keys back to files, and the journal that makes a run resumable: every change is one
transaction, so a kill at any moment loses at most the work in flight. Paths stand here and nowhere else; patients and
UIDs are hashes even here. Queries stream: memory does not grow with the number of files.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from dinoct.data.archive import Member
from dinoct.data.dicom import Rejected
from dinoct.data.files import FileRef, Source
from dinoct.data.header import SliceHeader
from dinoct.data.series import SliceRef
from dinoct.data.store import STORE_FORMAT
from dinoct.locking import has_record_locks

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (  -- kind, reason: why the file as a whole gave nothing; place: where a link showed it
    file_id TEXT PRIMARY KEY, path BLOB NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    seen INTEGER NOT NULL, scanned INTEGER NOT NULL DEFAULT 0, transient INTEGER NOT NULL DEFAULT 0,
    kind TEXT, reason TEXT, is_ct INTEGER NOT NULL DEFAULT 0, member TEXT, place BLOB)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS frames (
    file_id TEXT NOT NULL, frame INTEGER NOT NULL, grp TEXT NOT NULL, header TEXT NOT NULL,
    PRIMARY KEY (file_id, frame)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS frames_by_group ON frames (grp);
CREATE TABLE IF NOT EXISTS groups (grp TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drops (  -- slices that a finished group left out
    file_id TEXT NOT NULL, frame INTEGER NOT NULL, grp TEXT NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL,
    transient INTEGER NOT NULL, PRIMARY KEY (file_id, frame)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS drops_by_group ON drops (grp);
CREATE TABLE IF NOT EXISTS series (
    name TEXT PRIMARY KEY, grp TEXT NOT NULL, patient TEXT NOT NULL, bytes INTEGER NOT NULL, info TEXT NOT NULL)
    WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS series_by_group ON series (grp);
CREATE TABLE IF NOT EXISTS slices (
    series TEXT NOT NULL, row INTEGER NOT NULL, slice_id TEXT NOT NULL, file_id TEXT NOT NULL, frame INTEGER NOT NULL,
    cells TEXT NOT NULL, PRIMARY KEY (series, row)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS slices_by_file ON slices (file_id);
"""
# Every file that gave no slice, once: for what is wrong with the file, or for what became of its first slice.
_REJECTS = """
SELECT f.file_id, COALESCE(f.kind, d.kind), COALESCE(f.reason, d.reason),
       CASE WHEN f.kind IS NULL THEN 1 ELSE f.is_ct END
FROM files f LEFT JOIN drops d ON d.file_id = f.file_id
     AND d.frame = (SELECT MIN(frame) FROM drops WHERE file_id = f.file_id)
WHERE NOT EXISTS (SELECT 1 FROM slices s WHERE s.file_id = f.file_id)
ORDER BY f.file_id
"""


class Drop(NamedTuple):
    """A slice that is in no series. `transient`: a later run tries again (a timeout may be the machine's fault)."""

    file_id: str
    frame: int
    kind: str  # refused | duplicate
    reason: str
    transient: bool


class SeriesRecord(NamedTuple):
    name: str
    patient: str
    size: int  # bytes in the store
    info: dict[str, object]  # a row of series.csv
    slices: list[tuple[str, str, int, list[object]]]  # slice_id, file_id, frame, cells of index.csv


def _member(text: str | None) -> Member | None:
    return Member(*json.loads(text)) if text else None


class Catalog:
    def __init__(self, path: Path):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
        if has_record_locks(path.parent):
            self.db = sqlite3.connect(path)
        else:
            self.db = sqlite3.connect(f"{path.resolve().as_uri()}?vfs=unix-none", uri=True)
        self.db.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten and not only unlinked
        self.db.executescript(_SCHEMA)
        for name, kind in (("member", "TEXT"), ("place", "BLOB")):  # a catalog from before there was one
            if not self.one("SELECT 1 FROM pragma_table_info('files') WHERE name = ?", name):
                self.db.execute(f"ALTER TABLE files ADD COLUMN {name} {kind}")

    def close(self) -> None:
        self.db.close()

    # ---- files

    def unscanned(self) -> Iterator[tuple[str, FileRef, int]]:
        """Yield (file_id, file, size) of files whose header nobody has read, in order of path."""
        last = b""
        query = "SELECT file_id, path, size, member FROM files WHERE NOT scanned AND path > ? ORDER BY path LIMIT 1000"
        while rows := self.db.execute(query, (last,)).fetchall():  # pages: the table changes while we walk it
            last = rows[-1][1]
            yield from ((key, FileRef(os.fsdecode(path), _member(text)), size) for key, path, size, text in rows)

    def add_scan(
        self, file_id: str, found: list[tuple[str, SliceHeader]] | Rejected, *, transient: bool = False
    ) -> None:
        """Record what a header said: (group, header) per frame, or a reject. The caller commits."""
        kind, reason, is_ct, retry = found if isinstance(found, Rejected) else (None, None, True, False)
        self.db.execute(
            "UPDATE files SET scanned = 1, kind = ?, reason = ?, is_ct = ?, transient = ? WHERE file_id = ?",
            (kind, reason, is_ct, transient or retry, file_id),
        )
        frames = () if isinstance(found, Rejected) else enumerate(found)
        self.db.executemany(
            "INSERT OR REPLACE INTO frames VALUES (?, ?, ?, ?)",
            ((file_id, i, group, json.dumps(header)) for i, (group, header) in frames),
        )

    def commit(self) -> None:
        self.db.commit()

    # ---- groups and series

    def stale_groups(self, options: str) -> list[tuple[str, str, int]]:
        """Return (group, fingerprint, slices), largest first, of groups that are not in the store as they are now."""
        done = dict(self.db.execute("SELECT grp, fingerprint FROM groups"))
        stale, current, digest, count = [], "", hashlib.blake2b(), 0
        query = (
            "SELECT grp, file_id, frame, size, mtime_ns FROM frames JOIN files USING (file_id) "
            "ORDER BY grp, file_id, frame"
        )
        for group, *row in chain(self.db.execute(query), [(None,)]):
            if group != current:
                if current and done.get(current) != digest.hexdigest():
                    stale.append((current, digest.hexdigest(), count))
                current, count = group, 0
                digest = hashlib.blake2b(f"{STORE_FORMAT} {options}".encode(), digest_size=8)
            digest.update(repr(row).encode())
            count += 1
        return sorted(stale, key=lambda entry: (-entry[2], entry[0]))

    def group(self, group: str) -> tuple[list[SliceRef], dict[str, Source]]:
        """Return the slices of a group, and by file what reading it needs (with the header of its first frame)."""
        query = (
            "SELECT file_id, frame, header, path, size, mtime_ns, member FROM frames JOIN files USING (file_id) "
            "WHERE grp = ? ORDER BY file_id, frame"
        )
        refs, sources = [], {}
        for file_id, frame, text, path, size, mtime_ns, member in self.db.execute(query, (group,)):
            header = SliceHeader(*(tuple(x) if isinstance(x, list) else x for x in json.loads(text)))
            refs.append(SliceRef(file_id, frame, header))
            if file_id not in sources:
                sources[file_id] = Source(os.fsdecode(path), size, mtime_ns, header, _member(member))
        return refs, sources

    def finish_group(self, group: str, fingerprint: str, series: list[SeriesRecord], drops: list[Drop]) -> None:
        """Replace everything known of a group by this, in one transaction."""
        with self.db:
            self._remove_group(group)
            self.db.execute("INSERT INTO groups VALUES (?, ?)", (group, fingerprint))
            self.db.executemany(
                "INSERT OR REPLACE INTO drops VALUES (?, ?, ?, ?, ?, ?)",
                ((d.file_id, d.frame, group, d.kind, d.reason, d.transient) for d in drops),
            )
            for record in series:
                self.db.execute(
                    "INSERT INTO series VALUES (?, ?, ?, ?, ?)",
                    (record.name, group, record.patient, record.size, json.dumps(record.info)),
                )
                self.db.executemany(
                    "INSERT INTO slices VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        (record.name, row, slice_id, file_id, frame, json.dumps(cells))
                        for row, (slice_id, file_id, frame, cells) in enumerate(record.slices)
                    ),
                )

    def _remove_group(self, group: str) -> None:
        self.db.execute("DELETE FROM slices WHERE series IN (SELECT name FROM series WHERE grp = ?)", (group,))
        for table in ("series", "drops", "groups"):
            self.db.execute(f"DELETE FROM {table} WHERE grp = ?", (group,))

    def drop_vanished_groups(self) -> None:
        """Remove what is known of groups that have no files any more."""
        known = "SELECT grp FROM groups UNION SELECT grp FROM series UNION SELECT grp FROM drops"
        query = f"SELECT grp FROM ({known}) WHERE grp NOT IN (SELECT grp FROM frames)"
        with self.db:
            for (group,) in self.db.execute(query).fetchall():
                self._remove_group(group)

    def require(self, store_files: dict[str, int]) -> None:
        """Forget groups of which a series is missing in the store, or has another size there, to write them again."""
        with self.db:
            for name, group, size in self.db.execute("SELECT name, grp, bytes FROM series").fetchall():
                if store_files.get(name) != size:
                    self.db.execute("DELETE FROM groups WHERE grp = ?", (group,))

    def slice_of(self, path: bytes) -> tuple[str, str, tuple[int, int]] | None:
        """Series, slice_id and (rows, cols) of the slice in a file that holds one; the first of several."""
        query = "SELECT series, slice_id, cells FROM slices JOIN files USING (file_id) WHERE path = ? ORDER BY frame"
        found = self.one(query, path)
        return found and (found[0], found[1], tuple(json.loads(found[2])[1:3]))

    def series_names(self) -> set[str]:
        return {name for (name,) in self.db.execute("SELECT name FROM series")}

    # ---- what becomes public

    def index_rows(self) -> Iterator[list[object]]:
        query = (
            "SELECT slice_id, series, patient, row, cells FROM slices JOIN series ON name = series "
            "ORDER BY patient, series, row"
        )
        for slice_id, series, patient, row, cells in self.db.execute(query):
            yield [slice_id, series, patient, row, *json.loads(cells)]

    def series_rows(self) -> Iterator[tuple[str, str, dict[str, object]]]:
        for name, patient, info in self.db.execute("SELECT name, patient, info FROM series ORDER BY patient, name"):
            yield name, patient, json.loads(info)

    def rejects(self) -> Iterator[tuple[str, str, str, bool]]:
        """Yield (file_id, kind, reason, is_ct) of every file that gave no slice."""
        yield from self.db.execute(_REJECTS)

    def one(self, query: str, *values: object) -> tuple | None:
        return self.db.execute(query, values).fetchone()
