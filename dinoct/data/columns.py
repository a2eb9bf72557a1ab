"""`index.npy`: the columns of index.csv in one file that is mapped into memory and not read into it.

A NumPy file with one record: each field is a whole column, beside the names that codes stand for, and the size and
CRC-32 of the index.csv that it was made from. Where it is missing, damaged, or made from another index.csv, the CSV is
read instead: the CSV is the data, this is a copy that loads quickly and that all processes of a machine share.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from isal import isal_zlib

from dinoct.checksum import file_crc32
from dinoct.durable import replacing


def columns_path(index_csv: Path) -> Path:
    return index_csv.with_suffix(".npy")


def save_columns(index_csv: Path, columns: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]]) -> None:
    """Write the file beside `index_csv`, whole or not at all."""
    path = columns_path(index_csv)
    texts = {f"{name}_names": np.array([text.encode() for text in values] or [b""]) for name, values in names.items()}
    stored = {name: column.astype("S") if column.dtype.kind == "U" else column for name, column in columns.items()}
    fields = [(name, array.dtype.newbyteorder("<"), array.shape) for name, array in (stored | texts).items()]
    head = [("csv_bytes", "<i8"), ("csv_crc32", "<u4"), ("own_crc32", "<u4")]
    with replacing(path) as temporary:
        record = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(head + fields), shape=())
        for name, array in (stored | texts).items():
            record[name] = array
        record["csv_bytes"], record["csv_crc32"] = index_csv.stat().st_size, file_crc32(index_csv)
        record["own_crc32"] = _columns_crc(record)
        record.flush()
        del record


def load_columns(index_csv: Path) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]] | None:
    """Columns, mapped, and names by column; None where there is no good file for this `index_csv`."""
    try:
        record = np.load(columns_path(index_csv), mmap_mode="r", allow_pickle=False)
        if int(record["csv_bytes"]) != index_csv.stat().st_size or int(record["csv_crc32"]) != file_crc32(index_csv):
            return None
        if int(record["own_crc32"]) != _columns_crc(record):
            return None
        names = {
            name.removesuffix("_names"): tuple(text.decode() for text in record[name].tolist())
            for name in record.dtype.names
            if name.endswith("_names")
        }
        columns = {n: record[n] for n in record.dtype.names if record[n].ndim == 1 and not n.endswith("_names")}
    except (OSError, ValueError, TypeError, IndexError, EOFError, UnicodeDecodeError, zlib.error):
        return None
    return columns, names


def _columns_crc(record: np.ndarray) -> int:
    crc = 0
    for name in record.dtype.names:
        if record[name].ndim == 1:
            crc = isal_zlib.crc32(np.ascontiguousarray(record[name]).view(np.uint8), crc)
    return crc
