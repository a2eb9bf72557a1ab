"""A table of features as a file: Parquet, or NumPy's .npz."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dinoct.data.index import SliceIndex
from dinoct.delivery.card import METADATA_KEY
from dinoct.durable import replacing
from dinoct.errors import ConfigError, DinoctError


@dataclass(frozen=True)
class FeatureTable:
    """One row per slice.

    `columns` are ``slice_id``, ``series``, ``patient`` (hashed keys), ``row`` (place of the slice in its series) and
    ``z_mm``; `cls` is ``[n, D]`` float32; `facts` say what encoder of what data made it.
    """

    columns: dict[str, np.ndarray]
    cls: np.ndarray
    facts: dict[str, Any]

    @classmethod
    def of(cls, index: SliceIndex, features: np.ndarray, facts: dict[str, Any]) -> "FeatureTable":
        columns = {
            "slice_id": index.slice_id,
            "series": np.array(index.series_names)[index.series],
            "patient": np.array(index.patient_names)[index.patient],
            "row": index.row,
            "z_mm": index.z_mm,
        }
        return cls(columns, features, facts)


def check_output(name: str, *, overwrite: bool) -> Path:
    """The file to write.

    Raises:
        ConfigError: for an ending that is not known, a package that is missing, and a file that may not be replaced.
    """
    out = Path(name)
    if out.suffix not in WRITERS:
        raise ConfigError(f"out={out} must end in {' or '.join(WRITERS)}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError("out: .parquet needs pyarrow: pip install 'dinoct[embed]', or take an out that ends in .npz")
    if out.is_dir() or (out.exists() and not overwrite):
        raise ConfigError(f"out={out} exists: overwrite=true replaces it, or take another out")
    return out


def write_features(table: FeatureTable, out: Path) -> None:
    """Write the whole table, or leave what was there.

    Raises:
        DinoctError: if the disk refuses.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary, open(temporary, "wb") as file:
            WRITERS[out.suffix](table, file)
    except OSError as error:
        raise DinoctError(f"out: cannot write {out}: {error.strerror or error}") from error


def _write_parquet(table: FeatureTable, file: BinaryIO) -> None:
    """`cls` is a fixed-size list of float32; the facts are JSON under `METADATA_KEY` in the schema's metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: pa.array(values) for name, values in table.columns.items()}
    columns["cls"] = pa.FixedSizeListArray.from_arrays(pa.array(table.cls.ravel()), table.cls.shape[1])
    content = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(table.facts)})
    parquet.write_table(content, file, compression="zstd", use_dictionary=["series", "patient"])


def _write_npz(table: FeatureTable, file: BinaryIO) -> None:
    """One array per column, and the facts as JSON in ``metadata``."""
    np.savez(file, **table.columns, cls=table.cls, metadata=np.array(json.dumps(table.facts)))


WRITERS: dict[str, Callable[[FeatureTable, BinaryIO], None]] = {".parquet": _write_parquet, ".npz": _write_npz}
