"""What runs in a worker: look at files, hash slices, write a series. Few imports: a worker starts in a second."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinoct.data.dicom import Rejected
from dinoct.data.files import FileRef, OpenFiles, Source, read_headers
from dinoct.data.header import Refused, SliceHeader
from dinoct.data.pixels import finish_hu, hu_ends, to_hu
from dinoct.data.store import SeriesWriter, checksum
from dinoct.data.workers import StepHook

OUT_OF_MEMORY = "out of memory"
BODY_HU = -500


class SeriesJob(NamedTuple):
    folder: str
    name: str
    sources: list[Source]
    hu_min: int
    hu_max: int


class SliceStats(NamedTuple):
    checksum: str
    body_fraction: float
    hu_mean: float
    raw_min: int  # HU before clipping
    raw_max: int


class Failure(NamedTuple):
    """Why a slice cannot be had. `retry`: the machine may be to blame, so the next run tries again."""

    reason: str
    retry: bool


class SeriesResult(NamedTuple):
    """`slices[i]` belongs to source i: its statistics, or why it is not in the store."""

    slices: list[SliceStats | Failure]
    bytes_out: int


def scan_files(files: list[FileRef], step: StepHook) -> list[list[SliceHeader] | Rejected]:
    """Read the headers of files."""
    result = []
    for i, ref in enumerate(files):
        step(i)
        result.append(read_headers(ref))
    return result


def hash_slices(job: SeriesJob, step: StepHook) -> list[str | Failure]:
    """Return the SHA-256 of the HU before clipping, or a Failure, for each slice; one without an image fails here.

    A blank slice at the position of a good one is no other series.
    """
    result: list[str | Failure] = []
    with OpenFiles() as files:
        for i, source in enumerate(job.sources):
            step(i)
            try:
                hu, _, _ = _pixels(files.stored(source), source.header, job)
                result.append(hashlib.sha256(hu.astype("<i4")).hexdigest())
            except (Refused, MemoryError, OSError) as error:
                result.append(_failure(error))
    return result


def write_series(job: SeriesJob, step: StepHook) -> SeriesResult:
    """Decode the slices of a series in order and write those that are good; no file is left where none is."""
    header = job.sources[0].header
    slices: list[SliceStats | Failure] = []
    writer = SeriesWriter(Path(job.folder), job.name, slices=len(job.sources), rows=header.rows, cols=header.cols)
    try:
        with OpenFiles() as files:
            for i, source in enumerate(job.sources):
                step(i)
                try:
                    pixels, stats = _slice(files.stored(source), source.header, job)
                except (Refused, MemoryError, OSError) as error:
                    slices.append(_failure(error))
                    continue
                writer.append(pixels)
                slices.append(stats)
        step(-1)
        if all(isinstance(entry, Failure) for entry in slices):
            writer.abort()
            return SeriesResult(slices, 0)
        return SeriesResult(slices, writer.commit())
    except BaseException:
        writer.abort()
        raise


def _pixels(stored: np.ndarray, header: SliceHeader, job: SeriesJob) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Return the HU before clipping, what the store gets, and the smallest and the largest of the former."""
    ends = hu_ends(stored, header.slope, header.intercept)
    hu = to_hu(stored, header.slope, header.intercept, ends)
    return hu, finish_hu(hu, stored, header.padding, hu_min=job.hu_min, hu_max=job.hu_max, ends=ends), ends


def _slice(stored: np.ndarray, header: SliceHeader, job: SeriesJob) -> tuple[np.ndarray, SliceStats]:
    _, pixels, ends = _pixels(stored, header, job)
    body = np.count_nonzero(pixels > BODY_HU) / pixels.size
    mean = int(pixels.sum(axis=0, dtype=np.int32).sum(dtype=np.int64)) / pixels.size
    return pixels, SliceStats(checksum(pixels), body, mean, *ends)


def _failure(error: Exception) -> Failure:
    if isinstance(error, Refused):
        return Failure(str(error), retry=False)
    known = isinstance(error, MemoryError)
    return Failure(OUT_OF_MEMORY if known else f"cannot be read ({type(error).__name__})", retry=True)
