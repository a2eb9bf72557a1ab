"""CT volumes in one file, MetaImage (.mhd with .raw or .zraw, .mha) and NIfTI (.nii, .nii.gz): one file, one series.

SimpleITK (`pip install 'dinoct[volumes]'`) reads them; the slices come out axial, in the order of DICOM (rows to the
back, columns to the left of the patient, slices to the head), whatever order the file has. Such a file says nothing of
its modality or its patient: that its values are HU is concluded from air and tissue being where HU have them, and its
patient is its name, unless a `patients.csv` beside it (columns file, patient) says which files are of one patient.
"""

import csv
import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from dinoct.data import header as h
from dinoct.data.dicom import MAX_PIXEL_BYTES
from dinoct.data.header import Refused, SliceHeader
from dinoct.data.tags import PHASE_TAGS

VOLUME = "volume"  # stands where a DICOM slice has its transfer syntax
NO_SIMPLEITK = "a volume needs SimpleITK: pip install 'dinoct[volumes]'"
NOT_HU = "values are not Hounsfield units: no air or no tissue in the volume (a mask, or a picture's grey values)"
PATIENTS_CSV = "patients.csv"
_SUFFIXES = (".mhd", ".mha", ".nii", ".nii.gz")
_AIR_HU, _TISSUE_HU = -500, 0  # a chest has both
_DATA_FILE = re.compile(rb"^ElementDataFile[ \t]*=[ \t]*([^\r\n]*)", re.MULTILINE)
_HEADER_BYTES = 2**16
_NIFTI_REAL = (16, 64)  # data types float32 and float64


class NoSimpleItk(Refused):
    """SimpleITK is not installed: the same file is read once it is."""


def is_volume(path: str | bytes) -> bool:
    return os.fsdecode(path).lower().endswith(_SUFFIXES)


def state(path: str | bytes, own: os.stat_result) -> tuple[int, int]:
    """Return (size, mtime_ns) of a file, with those of the files that a volume is read with."""
    size, mtime_ns = own.st_size, own.st_mtime_ns
    for companion in _companions(os.fsdecode(path)) if is_volume(path) else ():
        with suppress(OSError, ValueError):  # reading the volume will say what is wrong with it
            other = os.stat(companion)
            size, mtime_ns = size + other.st_size, max(mtime_ns, other.st_mtime_ns)
    return size, mtime_ns


def _companions(path: str) -> Iterator[str]:
    folder = os.path.dirname(path)
    yield os.path.join(folder, PATIENTS_CSV)
    with suppress(OSError):
        if data := _data_file(path):
            yield os.path.join(folder, os.fsdecode(data))


def _data_file(path: str) -> bytes:
    """Return the name of the file with the pixels of a MetaImage, b"" where they are in the file itself."""
    if not path.lower().endswith((".mhd", ".mha")):
        return b""
    with open(path, "rb") as handle:
        found = _DATA_FILE.search(handle.read(_HEADER_BYTES))
    name = found[1].strip() if found else b""
    return b"" if name.upper() == b"LOCAL" else name


def read_headers(path: str) -> list[SliceHeader]:
    """Read the header of a volume: one SliceHeader per axial slice, feet to head. Raises Refused."""
    reader = _reader(path)
    size, spacing, origin = (np.array(get()) for get in (reader.GetSize, reader.GetSpacing, reader.GetOrigin))
    direction = np.reshape(reader.GetDirection(), (3, 3))
    axes, flips = axial_order(direction)
    for axis, flip in zip(axes, flips, strict=True):  # the first voxel of a flipped axis is the last of the file
        if flip:
            origin = origin + direction[:, axis] * spacing[axis] * (size[axis] - 1)
    direction = direction[:, axes] * np.where(flips, -1, 1)
    cols, rows, slices = (int(size[axis]) for axis in axes)
    step = direction[:, 2] * spacing[axes[2]]
    common = {
        "patient": _patient(Path(path)),
        "series": path,
        "orientation": tuple(map(float, direction[:, :2].T.ravel())),
        "spacing": (float(spacing[axes[1]]), float(spacing[axes[0]])),
        "rows": rows,
        "cols": cols,
        "frames": slices,
    }
    _check(common, origin, step)
    places = (tuple(map(float, origin + k * step)) for k in range(slices))
    return [SliceHeader(**_CONSTANT, **common, frame=k, position=place) for k, place in enumerate(places)]


_CONSTANT = {
    "study": "",
    "sop": "",
    "transfer_syntax": VOLUME,
    "offset": 0,
    "length": -1,
    "bits_stored": 16,
    "signed": True,
    "slope": 1.0,
    "intercept": 0.0,
    "padding": None,
    "thickness": math.nan,
    "gantry_tilt": math.nan,
    "manufacturer": "",
    "kernel": "",
    "lossy": False,
    "phase": ("",) * len(PHASE_TAGS),
}


def axial_order(direction: np.ndarray) -> tuple[list[int], list[bool]]:
    """Return which axis of the file runs most along each axis of the patient (left, back, head), and which run against.

    `direction` [3, 3] has the unit vector of file axis i, in DICOM's patient coordinates, in column i.
    """
    axes = max(permutations(range(3)), key=lambda axes: sum(abs(direction[place, axes[place]]) for place in range(3)))
    return list(axes), [bool(direction[place, axis] < 0) for place, axis in enumerate(axes)]


def _check(common: dict[str, Any], origin: np.ndarray, step: np.ndarray) -> None:
    rows, cols, slices = common["rows"], common["cols"], common["frames"]
    if not (h.MIN_SIDE <= rows <= h.MAX_SIDE and h.MIN_SIDE <= cols <= h.MAX_SIDE):
        raise Refused(f"axial slices with rows or columns outside {h.MIN_SIDE}..{h.MAX_SIDE}")
    if not 1 <= slices <= h.MAX_FRAMES or rows * cols * slices * 2 > MAX_PIXEL_BYTES:
        raise Refused("absurd size: too many slices, or more than 2 GiB of pixels")
    numbers = [*common["orientation"], *common["spacing"], *origin, *step]
    if not np.isfinite(numbers).all() or max(map(abs, origin)) > 1e5:
        raise Refused("geometry of the volume is not finite")
    low, high = h.SPACING_RANGE
    if not all(low <= x <= high for x in (*common["spacing"], float(np.linalg.norm(step)))):
        raise Refused("voxel spacing out of range")
    h.check_orientation(common["orientation"])


def read_volume(path: str) -> np.ndarray:
    """Return the HU of a volume, axial and feet to head: int16 [slices, rows, cols]. Raises Refused."""
    import SimpleITK as sitk

    reader = _reader(path)
    if path.lower().endswith((".nii", ".nii.gz")):
        _check_nifti(path, reader)
    image = _guarded(reader.Execute, path)
    voxels = sitk.GetArrayViewFromImage(image)
    low, high = float(voxels.min()), float(voxels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Refused("voxels that are not finite")
    if low > _AIR_HU or high < _TISSUE_HU:
        raise Refused(NOT_HU)
    if voxels.dtype != np.int16:
        voxels = _int16(voxels)
    axes, flips = axial_order(np.reshape(image.GetDirection(), (3, 3)))
    voxels = voxels.transpose([2 - axis for axis in reversed(axes)])  # NumPy counts the axes from the other end
    flipped = voxels[tuple(slice(None, None, -1 if flip else 1) for flip in reversed(flips))]
    return np.array(flipped, order="C")  # a copy: the library's memory goes with its image


def _int16(voxels: np.ndarray) -> np.ndarray:
    result = np.empty(voxels.shape, np.int16)
    for i, part in enumerate(voxels):  # piece by piece: a volume of doubles is large enough once
        result[i] = np.clip(np.rint(part), -32_768, 32_767)
    return result


def _reader(path: str) -> Any:
    """Open a volume and check what can be checked before its voxels are read."""
    try:
        import SimpleITK as sitk
    except ImportError:
        raise NoSimpleItk(NO_SIMPLEITK) from None
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # its warnings name the file
    if set(_data_file(path)) & set(b'/\\%:"') or _data_file(path).upper().startswith(b"LIST"):
        raise Refused("the pixel data of the volume is not one file beside it")
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    _guarded(reader.ReadImageInformation, path)
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise Refused("not a volume of three dimensions with one value per voxel")
    if reader.GetPixelID() not in (sitk.sitkInt16, sitk.sitkInt32, sitk.sitkInt64, sitk.sitkFloat32, sitk.sitkFloat64):
        raise Refused("unsigned or 8-bit voxels cannot be Hounsfield units")
    if reader.HasMetaDataKey("qform_code") and {_nifti(reader, "qform_code"), _nifti(reader, "sform_code")} == {0}:
        raise Refused("NIfTI header without an orientation (qform and sform are 0)")
    return reader


def _guarded(read: Callable[[], Any], path: str) -> Any:
    """Call a reader of the library. Raises Refused for a bad file, and OSError for one that may not be read."""
    try:
        return read()
    except RuntimeError as error:  # its text quotes the path
        if "memory" in str(error).lower() or "bad_alloc" in str(error):
            raise MemoryError from None
        _touch(path)
        raise Refused("the volume cannot be read: damaged, cut, or its pixel file is missing") from None


def _touch(path: str) -> None:
    for name in (path, *_companions(path)):
        with suppress(FileNotFoundError, ValueError), open(name, "rb") as handle:
            handle.read(1)


def _nifti(reader: Any, key: str) -> int:
    return int(float(reader.GetMetaData(key)))


def _check_nifti(path: str, reader: Any) -> None:
    """Refuse a NIfTI file that is cut or holds NaN: the library puts zeros in their place and says nothing."""
    bits = _nifti(reader, "bitpix")
    left = math.prod(reader.GetSize()) * bits // 8
    real = _nifti(reader, "datatype") in _NIFTI_REAL
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as handle:
            order = "<" if handle.read(4) == b"\x5c\x01\0\0" else ">"  # 348, the size of the header
            handle.seek(_nifti(reader, "vox_offset"))
            while left and (piece := handle.read(min(2**20, left))):
                left -= len(piece)
                if (
                    real
                    and len(piece) % (bits // 8) == 0
                    and not np.isfinite(np.frombuffer(piece, f"{order}f{bits // 8}")).all()
                ):
                    raise Refused("voxels that are not finite")
            handle.read(1)  # at the end of gzip the checksum is compared
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise Refused("the volume is damaged or cut (gzip)") from None
    if left:
        raise Refused("the volume is cut: fewer voxels than its header says")


def _patient(path: Path) -> str:
    """Return who the patient is: what patients.csv beside the file says, else the file's name behind its folder's."""
    try:
        with open(path.with_name(PATIENTS_CSV), newline="", encoding="utf-8-sig") as handle:
            table = csv.DictReader(handle)
            if not {"file", "patient"} <= set(table.fieldnames or ()):
                raise Refused("the patients.csv beside it has no columns file and patient")
            named = [row["patient"].strip() for row in table if row["file"] == path.name and row["patient"]]
    except FileNotFoundError:
        return f"{path.parent.name}/{path.name}"
    except (UnicodeDecodeError, csv.Error):
        raise Refused("the patients.csv beside it cannot be read") from None
    if len(set(named)) != 1 or not named[0]:
        raise Refused("the patients.csv beside it does not name one patient for it")
    return named[0]
