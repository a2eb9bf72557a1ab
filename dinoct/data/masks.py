"""Masks of a structure, such as the lungs, where there are some: joined to the index for the probes.

`ROOT/_masks/SERIES.npz` holds `slice_id` U16 [m] and `mask` uint8 [m, H, W], 1 inside. Rows would not do: they change
when a series grows. Keys are hashes, so the masks name nobody.
"""

import os
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from dinoct.data.catalog import Catalog
from dinoct.data.index import TEMPORARY, SliceIndex
from dinoct.data.store import MASKS
from dinoct.data.views import letterbox
from dinoct.errors import DinoctError


def write_masks(source: Path, root: Path) -> tuple[Path, int, int]:
    """Take over masks that lie beside the DICOM files of a data set.

    A file `*.npz` under `source` holds `mask` [n, H, W] (not 0: inside) and `files` [n]: the names of the n DICOM files
    in the same folder. It needs the map in `ROOT/_private`.

    Returns:
        The folder, the number of slices with a mask, and the number of those that are not in the data set.
    Raises:
        DinoctError: no such files, or none of their slices in the data set.
    """
    root, source = Path(root), Path(source)
    database = root / "_private" / "catalog.sqlite"
    if not database.is_file():
        raise DinoctError(f"{root} has no _private/catalog.sqlite: it was not prepared here, or its map was removed")
    found = [path for path in sorted(source.rglob("*.npz")) if path.is_file()]
    if not found:
        raise DinoctError("masks: there is no .npz under the folder that was given")
    catalog = Catalog(database)
    try:
        known, strange = _places(found, catalog)
    finally:
        catalog.close()
    if not known:
        raise DinoctError(f"masks: none of the {strange} slices of {len(found)} files is in {root}")
    for series, places in known.items():  # once per series, however many files it has
        _add(root / MASKS / f"{series}.npz", found, places)
    return root / MASKS, sum(map(len, known.values())), strange


def _places(found: Sequence[Path], catalog: Catalog) -> tuple[dict[str, dict[str, tuple[int, int]]], int]:
    """By series and slice_id: which of the files `found` has the mask, and where; and how many slices are not known."""
    query = "SELECT s.series, s.slice_id FROM slices s JOIN files f USING (file_id) WHERE f.path = ?"
    known: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    strange = 0
    for number, path in enumerate(found):
        with _opened(path, number) as content:
            names, shape = [str(name) for name in content["files"]], content["mask"].shape
            if len(shape) != 3 or shape[0] != len(names):
                raise ValueError
        for i, name in enumerate(names):
            place = os.fsencode(os.path.realpath(path.parent / name))
            slices = catalog.db.execute(query, (place,)).fetchone()
            if slices:
                known[slices[0]][slices[1]] = (number, i)
            strange += slices is None
    return known, strange


@contextmanager
def _opened(path: Path, number: int) -> Iterator[np.lib.npyio.NpzFile]:
    """A file of masks; what is wrong with it is said by its number, since its path may hold a name."""
    try:
        with np.load(path, allow_pickle=False) as content:
            yield content
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise DinoctError(f"masks: .npz number {number + 1} has no `mask` [n, H, W] with `files` [n]") from None


def _add(path: Path, found: Sequence[Path], places: dict[str, tuple[int, int]]) -> None:
    """Write the masks of a series, beside those that it has of other slices."""
    masks: dict[str, np.ndarray] = {}
    with suppress(MaskError):  # of an earlier format, or damaged: these take their place
        masks = _load(path) if path.is_file() else {}
    for number in sorted({number for number, _ in places.values()}):
        with _opened(found[number], number) as content:
            stack = content["mask"]
            masks |= {key: (stack[i] != 0).astype(np.uint8) for key, (n, i) in places.items() if n == number}
    shape = masks[next(iter(places))].shape
    keys = sorted(key for key, mask in masks.items() if mask.shape == shape)
    _write(path, slice_id=np.array(keys), mask=np.stack([masks[key] for key in keys]))


def _write(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(name, path)


class MaskError(DinoctError):
    """Masks that are there and cannot be used."""


class MaskStore:
    """Reads masks; the series read last stays in memory."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._last: tuple[str, dict[str, np.ndarray]] = ("", {})

    def rows_with_mask(self, index: SliceIndex) -> np.ndarray:
        """Rows of an index whose slices have a mask."""
        have = {path.stem for path in self.folder.glob("*.npz")}
        covered = np.flatnonzero(np.array([name in have for name in index.series_names], dtype=bool)[index.series])
        return np.array([i for i in covered if index.at("slice_id", i) in self._of(index, i)], dtype=int)

    def read(self, index: SliceIndex, i: int) -> np.ndarray:
        """Mask of slice i, ``[N, N]`` uint8, letterboxed as `read_slice` does with the slice.

        Raises:
            MaskError: where its shape is not the slice's, or the masks are none of this format.
        """
        mask = self._of(index, i)[index.at("slice_id", i)]
        if mask.shape != (index.rows[i], index.cols[i]):
            raise MaskError(f"the mask of slice {index.slice_id[i]} is {mask.shape}, not the slice's shape")
        # Air is what a slice is padded with; a mask is padded with 0.
        spacing = (float(index.spacing_row_mm[i]), float(index.spacing_col_mm[i]))
        return np.maximum(letterbox(mask.astype(np.int16), spacing), 0).astype(np.uint8)

    def _of(self, index: SliceIndex, i: int) -> dict[str, np.ndarray]:
        series = index.series_name(int(i))
        if self._last[0] != series:
            self._last = (series, _load(self.folder / f"{series}.npz"))
        return self._last[1]


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as content:
            if "slice_id" not in content:
                raise MaskError(f"the masks in {path.parent} are of an earlier format: run dinoct-prepare masks= again")
            return dict(zip(content["slice_id"].tolist(), content["mask"], strict=True))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise MaskError(f"{path} is no file of masks ({type(error).__name__})") from None
