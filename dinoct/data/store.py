"""The slice store: one Blosc2 array of int16 HU per series, `FOLDER/SERIES.b2nd`, shape [slices, rows, cols].

A slice is a chunk and blocks are 128 x 512 pixels, so that a random slice costs one chunk and a crop only the blocks it
touches. zstd level 1 behind SHUFFLE was the smallest of the codecs that read in about a millisecond. Blosc2 does not
notice a flipped bit: `verify` compares a slice with the CRC-32 that the index holds.
"""

import errno
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read by the C library: without it four threads start at each write into a file, for the file's table of offsets.
os.environ["BLOSC_NTHREADS"] = "1"

import blosc2
import numpy as np
from isal import isal_zlib  # the CRC-32 of zlib by the processor's carry-less products, ten times as fast

from dinoct.durable import on_its_way
from dinoct.errors import DinoctError

# A process forked after Blosc2 has started its threads hangs in its first read. One thread per process is no loss: the
# loader and the reader have processes of their own.
blosc2.set_nthreads(1)

STORE_FORMAT = "b2nd-zstd1-shuffle-1"  # part of what decides whether a series must be written again
BLOCK = (128, 512)
COMPRESSION = {
    "codec": blosc2.Codec.ZSTD,
    "clevel": 1,
    "filters": [blosc2.Filter.SHUFFLE],
    "splitmode": blosc2.SplitMode.NEVER_SPLIT,
    "nthreads": 1,
}
_MAX_HANDLES = 1024  # a handle is a small header in memory; Blosc2 opens the file anew at each read
_ROOM_BYTES = 2**16  # for the table of offsets, beside a slice
MASKS = "_masks"  # folder beside the store, with a file of masks per series where there are some
NEXT = ".next"  # a series that takes the place of an older one as soon as an index is written that fits it
_SERIES = re.compile(r"[0-9A-Za-z_-]{1,64}")


def checksum(pixels: np.ndarray) -> str:
    """Return the CRC-32 of the little-endian int16 bytes of `pixels` [rows, cols] as 8 hex digits."""
    return f"{isal_zlib.crc32(np.ascontiguousarray(pixels, dtype='<i2')):08x}"


def series_path(folder: Path, series: str) -> Path:
    """Return the file of a series. Raises DinoctError for a name that could leave the folder."""
    if not _SERIES.fullmatch(series):
        raise DinoctError(f"{series!r} is not the name of a series in a store")
    return Path(folder) / f"{series}.b2nd"


class SeriesWriter:
    """Write one series to a temporary file, slice by slice; `commit` makes it visible in one step.

    Not committed means not there: `abort` (or a kill) leaves at most a temporary file that the next run sweeps away.
    Where the store has the series already, the new one waits beside it for `put_in_place`: an index names the old one.
    """

    def __init__(self, folder: Path, series: str, *, slices: int, rows: int, cols: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = series_path(folder, series)
        self._temporary = on_its_way(self.path)
        self._shape = (rows, cols)
        self._count = 0
        self._room = rows * cols * 2 + _ROOM_BYTES
        blocks = (1, min(BLOCK[0], rows), min(BLOCK[1], cols))
        with self._disk_errors():
            self._array = blosc2.empty(
                (slices, rows, cols),
                dtype=np.dtype("<i2"),
                chunks=(1, rows, cols),
                blocks=blocks,
                cparams=COMPRESSION,
                dparams={"nthreads": 1},
                urlpath=str(self._temporary),
                contiguous=True,
                mode="w",
            )
        # Where whole blocks tile the slice, a chunk is the slice in C order: no copy, a quarter faster.
        self._tiles = rows % blocks[1] == 0 and cols == blocks[2]

    def append(self, pixels: np.ndarray) -> None:
        """Write the next slice: int16 [rows, cols]."""
        if pixels.shape != self._shape or pixels.dtype != np.int16:
            raise ValueError(f"expected int16 {self._shape}, got {pixels.dtype} {pixels.shape}")
        with self._disk_errors():
            if self._tiles:
                self._array.schunk.update_data(self._count, np.ascontiguousarray(pixels), copy=False)
            else:
                self._array[self._count] = pixels
        self._count += 1

    def commit(self) -> int:
        """Put the series in its place, shortened to the slices that were appended; return its size in bytes."""
        if self._count < self._array.shape[0]:
            with self._disk_errors():
                self._array.resize((self._count, *self._shape))
        del self._array
        sync(self._temporary)
        size = self._temporary.stat().st_size
        os.replace(self._temporary, self.path.with_suffix(NEXT) if self.path.exists() else self.path)
        return size

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Blosc2 raises RuntimeError for a failed write and keeps the system's reason to itself: look for it."""
        try:
            yield
        except RuntimeError as error:
            disk = os.statvfs(self._temporary.parent)
            code = errno.ENOSPC if disk.f_bavail * disk.f_frsize < self._room else errno.EIO
            raise OSError(code, os.strerror(code)) from error

    def abort(self) -> None:
        self._temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def series_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each series, as it will be when all is in its place."""
    places = [*Path(folder).glob("*.b2nd"), *Path(folder).glob(f"*{NEXT}")]
    return {path.stem: path.stat().st_size for path in places}


def has_next(folder: Path) -> bool:
    return any(Path(folder).glob(f"*{NEXT}"))


def put_in_place(folder: Path, keep: set[str]) -> None:
    """Let the newer ones of the series `keep` take their places, and remove those of others."""
    for path in list(Path(folder).glob(f"*{NEXT}")):
        if path.stem in keep:
            os.replace(path, series_path(folder, path.stem))
        else:
            path.unlink()
    sync(folder)


def remove_series_except(folder: Path, keep: set[str], suffix: str = ".b2nd") -> None:
    """Remove the files of series that are not in `keep`."""
    for path in Path(folder).glob(f"*{suffix}"):
        if path.stem not in keep:
            path.unlink(missing_ok=True)


class SliceStore:
    """Read slices of a store.

    Handles open at first use and are kept, per process; instances can be pickled and forked.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._handles: OrderedDict[str, blosc2.NDArray] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["folder"])

    def read(self, series: str, row: int, window: tuple[slice, slice] | None = None) -> np.ndarray:
        """Return a slice, or the part of it in `window` (rows, cols), as int16 HU [rows, cols].

        Raises DinoctError for a series that is missing or damaged and IndexError for a row that it does not have.
        """
        array = self._open(series)
        if not 0 <= row < array.shape[0]:
            raise IndexError(f"series {series} has {array.shape[0]} slices, no row {row}")
        try:
            pixels = array[int(row)] if window is None else array[(int(row), *window)]
        except Exception as error:
            self._handles.pop(series, None)  # a file that was replaced is no longer the one that the handle knows
            raise DinoctError(
                f"series {series} of the store is damaged at row {row}, or was written again while it was read"
            ) from error
        return pixels

    def slices(self, series: str) -> int:
        """Return the number of slices of a series."""
        return int(self._open(series).shape[0])

    def verify(self, series: str, row: int, checksum_hex: str) -> bool:
        """Say whether the stored pixels still have the checksum of the index (a damaged file counts as no)."""
        try:
            return checksum(self.read(series, row)) == checksum_hex
        except (DinoctError, IndexError):
            return False

    def _open(self, series: str) -> blosc2.NDArray:
        if self._pid != os.getpid():  # forked: start afresh
            self._handles.clear()
            self._pid = os.getpid()
        path = series_path(self.folder, series)
        if not path.is_file():
            self._handles.pop(series, None)  # it would give the slices of a patient who was withdrawn
            raise DinoctError(f"series {series} is not in the store at {self.folder}: run dinoct-prepare again")
        if series in self._handles:
            self._handles.move_to_end(series)
            return self._handles[series]
        with open(path, "rb") as probe:  # too many open files, or a failing disk, is not a damaged series
            probe.read(1)
        try:
            array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
            valid = array.ndim == 3 and array.dtype == np.int16
        except Exception as error:  # Blosc2 raises RuntimeError, ValueError and others for the same damage
            raise DinoctError(f"series {series} of the store is damaged: remove it and run dinoct-prepare") from error
        if not valid:
            raise DinoctError(f"series {series} of the store is not a stack of int16 slices")
        self._handles[series] = array
        if len(self._handles) > _MAX_HANDLES:
            self._handles.popitem(last=False)
        return array
