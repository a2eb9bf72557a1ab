"""Masks of a structure, such as the lungs, where there are some: joined to the index for the probes.

`ROOT/_masks/SERIES.npz` holds `slice_id` U16 [m] and `mask` uint8 [m, H, W], 1 inside. Rows would not do: they change
when a series grows. Keys are hashes, so the masks name nobody.
"""

import os
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoct.data.catalog import Catalog
from dinoct.data.index import SliceIndex
from dinoct.data.privacy import locked
from dinoct.data.store import MASKS
from dinoct.data.views import letterbox
from dinoct.durable import replacing
from dinoct.errors import DinoctError

# What numpy raises for a file that is cut, damaged, or something else.
_UNREADABLE = (OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class _Place:
    """Where the mask of a slice is among the files that were found."""

    series: str
    slice_id: str
    number: int  # of the file
    position: int  # in the file


def write_masks(source: Path, root: Path) -> tuple[Path, int, int]:
    """Take over masks that lie beside the DICOM files of a data set.

    A file `*.npz` under `source` holds `mask` [n, H, W] (not 0: inside) and `files` [n]: the names of the n DICOM files
    in the same folder. It needs the map in `ROOT/_private`.

    Returns:
        The folder, the number of slices with a mask, and the number of those that are not in the data set.
    Raises:
        DinoctError: no such files, none of their slices in the data set, a mask of another shape than its slice
            (nothing is written then), or another process at work on the root.
    """
    root, source = Path(root), Path(source)
    database = root / "_private" / "catalog.sqlite"
    if not database.is_file():
        raise DinoctError(f"{root} has no _private/catalog.sqlite: it was not prepared here, or its map was removed")
    found = [path for path in sorted(source.rglob("*.npz")) if path.is_file()]
    if not found:
        raise DinoctError("masks: there is no .npz under the folder that was given")
    with locked(root):
        known, strange = _places(found, database)
        if not known:
            raise DinoctError(f"masks: none of the {strange} slices of {len(found)} files is in {root}")
        series: dict[str, list[_Place]] = defaultdict(list)
        for place in known.values():
            series[place.series].append(place)
        stacks = _Stacks(found)
        for name, places in series.items():  # once per series, however many files it has; in the files' order
            _add(root / MASKS / f"{name}.npz", stacks, places)
    return root / MASKS, len(known), strange


def _places(found: Sequence[Path], database: Path) -> tuple[dict[str, _Place], int]:
    """By slice_id, where the mask of a slice is, the last file's where several have it; and how many slices are not
    known."""
    catalog = Catalog(database)
    known: dict[str, _Place] = {}
    strange = 0
    try:
        for number, path in enumerate(found):
            with _opened(path, number) as content:
                names, shape = [str(name) for name in content["files"]], _shape(content)
                if len(shape) != 3 or shape[0] != len(names):
                    raise ValueError
            for i, name in enumerate(names):
                slices = catalog.slice_of(os.fsencode(os.path.realpath(path.parent / name)))
                strange += slices is None
                if slices is None:
                    continue
                series, slice_id, own = slices
                if own != shape[1:]:
                    sizes = f"[{shape[0]}, {shape[1]}, {shape[2]}], and a slice that it names is {own[0]} x {own[1]}"
                    raise DinoctError(f"masks: `mask` of .npz number {number + 1} is {sizes}")
                known[slice_id] = _Place(series, slice_id, number, i)
    finally:
        catalog.close()
    return known, strange


@contextmanager
def _opened(path: Path, number: int) -> Iterator[np.lib.npyio.NpzFile]:
    """A file of masks; what is wrong with it is said by its number, since its path may hold a name."""
    try:
        with np.load(path, allow_pickle=False) as content:
            yield content
    except _UNREADABLE:
        raise DinoctError(f"masks: .npz number {number + 1} has no `mask` [n, H, W] with `files` [n]") from None


def _shape(content: np.lib.npyio.NpzFile) -> tuple[int, ...]:
    """Shape of `mask`, which need not be unpacked for it."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with content.zip.open("mask.npy") as file:
        return read[np.lib.format.read_magic(file)](file)[0]


class _Stacks:
    """The masks of the files that were found; the file read last stays in memory, for it may serve many series."""

    def __init__(self, found: Sequence[Path]):
        self._found = found
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0))

    def read(self, place: _Place) -> np.ndarray:
        if self._last[0] != place.number:
            with _opened(self._found[place.number], place.number) as content:
                self._last = (place.number, content["mask"])
        return (self._last[1][place.position] != 0).astype(np.uint8)


def _add(path: Path, stacks: _Stacks, places: Sequence[_Place]) -> None:
    """Write the masks of a series, beside those that it has of other slices."""
    new = {place.slice_id: stacks.read(place) for place in sorted(places, key=lambda place: place.number)}
    masks: dict[str, np.ndarray] = {}
    with suppress(MaskError):  # of an earlier format, or damaged: these take their place
        masks = _load(path) if path.is_file() else {}
    shape = next(iter(new.values())).shape
    masks = {key: mask for key, mask in masks.items() if mask.shape == shape} | new
    keys = sorted(masks)
    _write(path, slice_id=np.array(keys), mask=np.stack([masks[key] for key in keys]))


def _write(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def forget(folder: Path, index: SliceIndex) -> None:
    """Take away the masks of slices that the index does not have any more, of a patient who was withdrawn say."""
    codes = {name: code for code, name in enumerate(index.series_names)}
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as content:
                ids = content["slice_id"]  # the masks themselves take long to read
                kept = np.isin(ids, index.slice_id[index.series == codes.get(path.stem, -1)])
                mask = None if kept.all() else content["mask"][kept]
        except _UNREADABLE:  # of an earlier format, or damaged: told where they are used
            continue
        if not kept.any():
            path.unlink()
        elif mask is not None:
            _write(path, slice_id=ids[kept], mask=mask)


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
    except _UNREADABLE as error:
        raise MaskError(f"{path} is no file of masks ({type(error).__name__})") from None
