"""`index.csv`: one row per slice, and its columnar form in memory.

Strings that repeat (series, patient, manufacturer, kernel) are integer codes into a tuple of names, so that the index
of 244,000 slices costs about 60 MB in a loader process and not hundreds of megabytes of Python strings.
"""

import csv
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np

from dinoct.errors import DinoctError

COLUMNS: dict[str, str] = {
    "slice_id": "U16",
    "series": "code",
    "patient": "code",
    "row": "int32",
    "z_mm": "float64",
    "rows": "int32",
    "cols": "int32",
    "spacing_row_mm": "float64",
    "spacing_col_mm": "float64",
    "thickness_mm": "float64",
    "manufacturer": "code",
    "kernel": "code",
    "lossy": "int8",
    "body_fraction": "float32",
    "hu_mean": "float32",
    "checksum": "U8",
}
_ROWS_AT_ONCE = 4096
TEMPORARY = ".tmp"  # files on their way are called .NAME.*.tmp


@dataclass(frozen=True)
class SliceIndex:
    """Columns of equal length n; `series`, `patient`, `manufacturer` and `kernel` hold codes into their `*_names`.

    `row` is the place of the slice in its series array; spacings, thickness and `z_mm` are in mm (thickness NaN where
    the header had none); `lossy` is 1 where the pixels went through a lossy codec; `body_fraction` is the share of
    pixels above -500 HU; `checksum` is the CRC-32 (8 hex digits) of the stored little-endian int16 pixels.
    """

    slice_id: np.ndarray
    series: np.ndarray
    patient: np.ndarray
    row: np.ndarray
    z_mm: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    spacing_row_mm: np.ndarray
    spacing_col_mm: np.ndarray
    thickness_mm: np.ndarray
    manufacturer: np.ndarray
    kernel: np.ndarray
    lossy: np.ndarray
    body_fraction: np.ndarray
    hu_mean: np.ndarray
    checksum: np.ndarray
    series_names: tuple[str, ...]
    patient_names: tuple[str, ...]
    manufacturer_names: tuple[str, ...]
    kernel_names: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> "SliceIndex":
        """Read an `index.csv`. Raises DinoctError (missing file, columns or unreadable values) with one line."""
        path = Path(path)
        try:
            with path.open(newline="", encoding="utf-8") as handle:
                return cls._from_reader(csv.reader(handle), path)
        except FileNotFoundError:
            raise DinoctError(f"no index at {path}: run dinoct-prepare first, or set data.index_csv") from None
        except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
            raise DinoctError(f"{path} cannot be read as an index: {str(error).splitlines()[0]}") from error

    @classmethod
    def _from_reader(cls, reader: Iterator[list[str]], path: Path) -> "SliceIndex":
        header = next(reader, [])
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise DinoctError(f"{path} is not an index: column(s) {', '.join(missing)} missing")
        parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        codes: dict[str, dict[str, int]] = {name: {} for name, kind in COLUMNS.items() if kind == "code"}
        while batch := list(islice(reader, _ROWS_AT_ONCE)):
            table = dict(zip(header, zip(*batch, strict=True), strict=True))
            for name, kind in COLUMNS.items():
                if kind == "code":
                    known = codes[name]
                    column = np.array([known.setdefault(text, len(known)) for text in table[name]], dtype=np.int32)
                elif kind.startswith("U"):
                    column = np.array(table[name], dtype=kind)
                else:  # float() and int() per cell are twice as fast as NumPy's conversion of strings
                    parse = float if kind.startswith("float") else int
                    column = np.fromiter(map(parse, table[name]), dtype=kind, count=len(batch))
                parts[name].append(column)
        columns = {name: _joined(parts[name], kind) for name, kind in COLUMNS.items()}
        return cls(**columns, **{f"{name}_names": tuple(known) for name, known in codes.items()})

    def __len__(self) -> int:
        return len(self.row)

    def series_name(self, i: int) -> str:
        return self.series_names[self.series[i]]

    def patient_name(self, i: int) -> str:
        return self.patient_names[self.patient[i]]

    def select(self, which: np.ndarray) -> "SliceIndex":
        """Return the rows of a boolean mask [n] or of an array of indices, in that order. Names keep their codes."""
        which = np.asarray(which)
        return replace(self, **{name: getattr(self, name)[which] for name in COLUMNS})

    def content_hash(self) -> str:
        """Return 16 hex digits that change when any slice, its order, its pixels, its series or its patient changes."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(len(self).to_bytes(8, "little"))
        for name in ("slice_id", "row", "checksum"):
            digest.update(np.ascontiguousarray(getattr(self, name)))
        for name in ("series", "patient"):
            used, places = np.unique(getattr(self, name), return_inverse=True)
            texts = [getattr(self, f"{name}_names")[code] for code in used]
            order = np.argsort(texts)  # codes depend on what else was in the file; the sorted names do not
            rank = np.empty(len(texts), dtype=np.int32)
            rank[order] = np.arange(len(texts), dtype=np.int32)
            digest.update("\n".join(sorted(texts)).encode())
            digest.update(rank[places])
        return digest.hexdigest()


def _joined(parts: Sequence[np.ndarray], kind: str) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype="int32" if kind == "code" else kind)


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """Open a temporary file beside `path` for writing; fsync and rename it at the end, or remove it on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as handle:
            os.fchmod(handle.fileno(), 0o644)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sweep_temporary(folder: Path) -> None:
    """Remove what killed runs left on its way into `folder`."""
    for path in Path(folder).glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Write a CSV atomically and return the number of rows."""
    count = 0
    with atomic_text(path) as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(row)
            count += 1
    return count
