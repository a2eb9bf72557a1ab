"""The public tables of a data set, out of the catalog: index.csv, series.csv, rejects.csv, the split; and `explain`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from dinoct.data.catalog import Catalog
from dinoct.data.index import COLUMNS, SliceIndex, write_csv
from dinoct.data.options import PrepareOptions
from dinoct.data.privacy import Hasher
from dinoct.data.splits import SplitManifest, split_file_name
from dinoct.errors import DinoctError


@dataclass
class Tables:
    """Counts over everything that the root holds, and the way to write its index."""

    root: Path
    catalog: Catalog
    files_seen: int = 0
    files_with_slices: int = 0
    slices: int = 0
    refused_ct: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def index_csv(self) -> Path:
        return self.root / "_index" / "index.csv"

    @property
    def rejects_csv(self) -> Path:
        return self.root / "_index" / "rejects.csv"

    def write_index(self) -> SliceIndex:
        """Write series.csv and index.csv and read the index back."""
        rows = ((name, patient, *info.values()) for name, patient, info in self.catalog.series_rows())
        _, _, first = next(self.catalog.series_rows())
        write_csv(self.root / "_index" / "series.csv", ["series", "patient", *first], rows)
        write_csv(self.index_csv, list(COLUMNS), self.catalog.index_rows())
        index = SliceIndex.load(self.index_csv)
        index.save_columns(self.index_csv)
        return index

    def count_rejects(self) -> Iterator[tuple[str, str, str]]:
        for file_id, kind, reason, is_ct in self.catalog.rejects():
            self.rejected[reason] += 1
            self.refused_ct += bool(is_ct and kind == "refused")
            yield file_id, kind, reason


def publish(root: Path, catalog: Catalog) -> Tables:
    """Write rejects.csv (one row per file that gave no slice) and count; the index is written by `write_index`."""
    tables = Tables(root, catalog)
    (tables.files_seen,) = catalog.one("SELECT COUNT(*) FROM files")
    tables.files_with_slices, tables.slices = catalog.one("SELECT COUNT(DISTINCT file_id), COUNT(*) FROM slices")
    write_csv(tables.rejects_csv, ["file_id", "kind", "reason"], tables.count_rejects())
    return tables


def decide_split(root: Path, patients: Sequence[str], hasher: Hasher, options: PrepareOptions) -> SplitManifest:
    """The sides of the patients, before an index is written. Raises DinoctError where they cannot be split so."""
    try:
        previous = SplitManifest.load(_manifest_path(root, options))
    except DinoctError:  # none yet, or not readable: a fresh one takes its place
        previous = None
    named = options.val_patients
    return SplitManifest.decide(
        patients,
        dataset_id=hasher.key("dataset"),
        seed=options.split_seed,
        fraction=options.val_fraction,
        val_patients=named and [name if name in patients else hasher.patient(name) for name in named],
        previous=previous,
    )


def publish_split(root: Path, index: SliceIndex, split: SplitManifest, options: PrepareOptions) -> Path:
    """Write the manifest of a split for the index; return its path."""
    path = _manifest_path(root, options)
    split.of_index(index).save(path)
    return path


def shrink_split(root: Path, index: SliceIndex, options: PrepareOptions) -> None:
    """Take the patients who are gone out of the manifest, where those who are left cannot be split anew."""
    path, left = _manifest_path(root, options), index.patients
    try:
        split = SplitManifest.load(path)
    except DinoctError:
        return
    if left <= split.train | split.val:
        val = split.val & left
        replace(split, train=split.train & left, val=val, named=split.named and bool(val)).of_index(index).save(path)
    else:
        path.unlink()


def _manifest_path(root: Path, options: PrepareOptions) -> Path:
    return root / "_splits" / split_file_name(options.val_fraction, options.split_seed)


def explain(root: Path, key: str) -> dict[str, object]:
    """Say what a key of the public tables stands for: a file, slice, series or patient, with the paths behind it.

    The answer holds paths, which may hold names: print it, and write it nowhere. Raises DinoctError for an unknown key.
    """
    path = Path(root) / "_private" / "catalog.sqlite"
    if not path.is_file():
        raise DinoctError(f"{root} has no _private/catalog.sqlite: it was not prepared here, or its map was removed")
    catalog = Catalog(path)
    try:
        for look in (_explain_file, _explain_slice, _explain_series):
            answer = look(catalog, key)
            if answer is not None:
                return answer
    finally:
        catalog.close()
    raise DinoctError(f"{key} is not the key of a file, slice, series or patient of {root}")


def _text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def _explain_file(catalog: Catalog, key: str) -> dict[str, object] | None:
    found = catalog.one("SELECT path, size FROM files WHERE file_id = ?", key)
    if found is None:
        return None
    slices = catalog.db.execute("SELECT series, row, slice_id FROM slices WHERE file_id = ? ORDER BY frame", (key,))
    rejects = [(kind, reason) for file_id, kind, reason, _ in catalog.rejects() if file_id == key]
    kind, reason = rejects[0] if rejects else (None, None)
    return {
        "what": "file",
        "path": _text(found[0]),
        "bytes": found[1],
        "kind": kind,
        "reason": reason,
        "slices": [{"series": series, "row": row, "slice_id": slice_id} for series, row, slice_id in slices],
    }


def _explain_slice(catalog: Catalog, key: str) -> dict[str, object] | None:
    query = "SELECT series, row, frame, path FROM slices JOIN files USING (file_id) WHERE slice_id = ?"
    found = catalog.one(query, key)
    if found is None:
        return None
    series, row, frame, path = found
    return {"what": "slice", "series": series, "row": row, "frame": frame, "path": _text(path)}


def _explain_series(catalog: Catalog, key: str) -> dict[str, object] | None:
    query = "SELECT name, patient FROM series WHERE name = ? OR patient = ? ORDER BY name"
    found = catalog.db.execute(query, (key, key)).fetchall()
    if not found:
        return None
    names = [name for name, _ in found]
    paths = "SELECT DISTINCT path FROM slices JOIN files USING (file_id) WHERE series = ? ORDER BY path"
    rows = chain.from_iterable(catalog.db.execute(paths, (name,)) for name in names)
    return {
        "what": "patient" if key == found[0][1] else "series",
        "patient": found[0][1],
        "series": names,
        "paths": [_text(path) for (path,) in rows],
    }
