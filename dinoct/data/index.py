"""`index.csv`: one row per slice, and its columnar form in memory.

Strings that repeat (series, patient, manufacturer, kernel) are integer codes into a tuple of names. Columns are read
from `index.npy` where that fits the CSV (see `dinoct.data.columns`): millions of rows load in seconds, and all
processes of a machine share them.
"""

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from dinoct.data.columns import load_columns, save_columns
from dinoct.durable import replacing_text
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


class SliceIndex:
    """Columns of equal length n; `series`, `patient`, `manufacturer` and `kernel` hold codes into their `*_names`.

    `row` is the place of the slice in its series array; spacings, thickness and `z_mm` are in mm (thickness NaN where
    the header had none); `lossy` is 1 where the pixels went through a lossy codec; `body_fraction` is the share of
    pixels above -500 HU; `checksum` is the CRC-32 (8 hex digits) of the stored little-endian int16 pixels.

    A column is made when it is asked for as a whole; `at` reads one value of it. With millions of rows in a file that
    is mapped, a process holds what it asked for, and the numbers of its rows.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        names: Mapping[str, tuple[str, ...]],
        rows: np.ndarray | None = None,
        source: Path | None = None,
    ):
        self._columns, self._rows, self._source = columns, rows, source
        self.series_names, self.patient_names = names["series"], names["patient"]
        self.manufacturer_names, self.kernel_names = names["manufacturer"], names["kernel"]
        self._names = names

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in COLUMNS:
            raise AttributeError(name)
        column = self._columns[name]
        if self._rows is not None:
            column = column[self._rows]
        if COLUMNS[name].startswith("U"):
            column = column.astype(COLUMNS[name])
        self.__dict__[name] = column
        return column

    def at(self, name: str, i: int) -> int | float | str:
        """Value i of a column, of numbers, codes or text, without the rest of it."""
        value = self._columns[name][i if self._rows is None else self._rows[i]].item()
        return value.decode() if isinstance(value, bytes) else value

    def __getstate__(self) -> dict:
        """What is mapped is mapped again in another process, and not sent there."""
        state = {"columns": self._columns, "names": self._names, "rows": self._rows, "source": self._source}
        return state | ({"columns": None, "names": None} if self._source else {})

    def __setstate__(self, state: dict) -> None:
        if state["source"]:
            state["columns"], state["names"] = load_columns(state["source"])
        self.__init__(**state)

    @classmethod
    def load(cls, path: Path) -> "SliceIndex":
        """Read an `index.csv`. Raises DinoctError (missing file, columns or unreadable values) with one line."""
        path = Path(path)
        mapped = load_columns(path)
        if mapped is not None and set(COLUMNS) <= set(mapped[0]):
            return cls(*mapped, source=path)
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
        return cls(columns, {name: tuple(known) for name, known in codes.items()})

    def save_columns(self, path: Path) -> None:
        """Write the columns beside the `index.csv` that they were read from (see `dinoct.data.columns`)."""
        save_columns(path, self._columns, self._names)

    def __len__(self) -> int:
        return len(self._columns["row"] if self._rows is None else self._rows)

    @property
    def patients(self) -> frozenset[str]:
        """Keys of the patients who have a slice in it."""
        return frozenset(self.patient_names[code] for code in np.unique(self.patient))

    def series_name(self, i: int) -> str:
        return self.series_names[self.at("series", i)]

    def patient_name(self, i: int) -> str:
        return self.patient_names[self.at("patient", i)]

    def select(self, which: np.ndarray) -> "SliceIndex":
        """Return the rows of a boolean mask [n] or of an array of indices, in that order. Names keep their codes."""
        which = np.asarray(which)
        rows = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        rows = rows if self._rows is None else self._rows[rows]
        return SliceIndex(self._columns, self._names, rows, self._source)

    def join(self, other: "SliceIndex") -> "SliceIndex":
        """Return the rows of this part of an index, then those of `other`, another part of the same."""
        return SliceIndex(self._columns, self._names, np.concatenate([self._places(), other._places()]), self._source)

    def _places(self) -> np.ndarray:
        return np.arange(len(self)) if self._rows is None else self._rows

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


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Write a CSV atomically and return the number of rows."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_text(path) as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(row)
            count += 1
    return count
