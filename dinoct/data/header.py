"""DICOM header -> the few facts that a slice needs, checked for meaning and not only for syntax.

Only the tags of `tags.TAGS` are looked at; everything else in a header (names, dates, institutions, private groups) is
skipped while reading. Broken files mostly read without an exception, so each value is parsed strictly and tested for
range. No reason that this module gives quotes a value from the file: reasons go into public tables.
"""

import math
import re
from functools import lru_cache
from typing import NamedTuple

from pydicom.dataset import Dataset
from pydicom.valuerep import AMBIGUOUS_VR, STANDARD_VR

from dinoct.data.tags import FRAME_MACROS, PHASE_TAGS, TAGS

# PS3.3 C.11.1.1.2: defined terms that are not Hounsfield units.
_NOT_HU = {"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}
_VRS = STANDARD_VR | AMBIGUOUS_VR | {None}  # None: implicit
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MIN_SIDE, MAX_SIDE = 32, 4096
MAX_FRAMES = 10_000
SLOPE_RANGE = (0.01, 64.0)
MAX_INTERCEPT = 65_536.0
SPACING_RANGE = (0.01, 20.0)
MAX_THICKNESS = 100.0
AXIAL_TILT_DEG = 31.0  # gantries tilt by up to 30 degrees; what leans further is a reformat


class Refused(Exception):
    """This file gives no slice; the text is the reason, fit for a public table."""


class SliceHeader(NamedTuple):
    """What is known of one slice before its pixels are read. Lengths in mm, `offset` and `length` in bytes."""

    patient: str
    study: str
    series: str
    sop: str
    frame: int
    frames: int
    transfer_syntax: str
    offset: int  # of the pixel data's value in the file; -1 inside a deflated stream
    length: int  # of that value; -1 where encapsulated
    rows: int
    cols: int
    bits_stored: int
    signed: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None  # inclusive range of stored values that mean "no pixel here"
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    spacing: tuple[float, ...]  # between rows, between columns
    thickness: float  # NaN where not given
    gantry_tilt: float  # degrees as the scanner wrote it, NaN where not given
    manufacturer: str
    kernel: str
    lossy: bool
    phase: tuple[str, ...]  # the values of PHASE_TAGS


def raw(ds: Dataset, name: str) -> bytes:
    """Return the undecoded value of a tag, b"" where it is missing or empty."""
    element = ds.get_item(TAGS[name])
    if element is None or element.value is None:
        return b""
    if element.VR not in _VRS:
        raise Refused(f"{name} is damaged: its value representation is none of DICOM's")
    value = element.value
    if not isinstance(value, bytes):
        raise Refused(f"{name} has an unexpected form")
    return value


def text(ds: Dataset, name: str) -> str:
    value = raw(ds, name).strip(b" \0")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def numbers(ds: Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers of a DS or IS tag, None where it is empty; a NaN or a decimal comma is refused."""
    value = raw(ds, name).strip(b" \0")
    if not value:
        return None
    parts = [part.strip(b" \0") for part in value.split(b"\\")]
    if len(parts) != count:
        raise Refused(f"{name} does not have {count} value(s)")
    if not all(_NUMBER.fullmatch(part) for part in parts):
        raise Refused(f"{name} is not a number")
    result = tuple(float(part) for part in parts)
    if not all(map(math.isfinite, result)):
        raise Refused(f"{name} is not finite")
    return result


def required(ds: Dataset, name: str, count: int) -> tuple[float, ...]:
    result = numbers(ds, name, count)
    if result is None:
        raise Refused(f"no {name}")
    return result


def optional(ds: Dataset, name: str) -> float:
    result = numbers(ds, name, 1)
    return math.nan if result is None else result[0]


def uint16(ds: Dataset, name: str, default: int | None = None) -> int:
    value = raw(ds, name)
    if not value and default is not None:
        return default
    element = ds.get_item(TAGS[name]) if value else None
    if element is None:
        raise Refused(f"no {name}")
    if len(value) != 2 or element.VR not in (None, "US", "SS", "UN"):
        raise Refused(f"{name} is not one 16-bit number")
    return int.from_bytes(value, "little" if element.is_little_endian else "big")


def sequence_item(ds: Dataset, name: str) -> Dataset | None:
    """Return the first item of a sequence, None where there is none."""
    if TAGS[name] not in ds:
        return None
    items = ds[TAGS[name]].value
    return items[0] if items else None


def check_image(ds: Dataset) -> None:
    """Refuse what is not a grey-scale CT image of patient anatomy with its HU."""
    if text(ds, "Modality") != "CT":
        raise Refused("Modality is not CT")
    if text(ds, "BurnedInAnnotation").upper() == "YES":
        raise Refused("burned-in annotation")
    check_image_type(text(ds, "ImageType"))
    if uint16(ds, "SamplesPerPixel") != 1:
        raise Refused("colour image")
    if text(ds, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise Refused("PhotometricInterpretation is not MONOCHROME1 or MONOCHROME2")
    rows, cols = uint16(ds, "Rows"), uint16(ds, "Columns")
    if not (MIN_SIDE <= rows <= MAX_SIDE and MIN_SIDE <= cols <= MAX_SIDE):
        raise Refused(f"Rows or Columns outside {MIN_SIDE}..{MAX_SIDE}")
    # PS3.3 C.8.2.1: 16 bits allocated, 12 to 16 stored, the high bit one less.
    if uint16(ds, "BitsAllocated") != 16 or not 12 <= uint16(ds, "BitsStored") <= 16:
        raise Refused("not 12 to 16 bits in 16")
    if uint16(ds, "HighBit", uint16(ds, "BitsStored") - 1) != uint16(ds, "BitsStored") - 1:
        raise Refused("HighBit does not fit BitsStored")
    if uint16(ds, "PixelRepresentation") > 1:
        raise Refused("PixelRepresentation is not 0 or 1")


def check_image_type(image_type: str) -> None:
    values = {value.strip().upper() for value in image_type.split("\\")}
    if any("LOCALIZER" in value for value in values):
        raise Refused("localizer")
    if values & {"SCREEN SAVE", "SCREENSAVE", "DOSE_INFO"}:
        raise Refused("screen save or dose report")


def number_of_frames(ds: Dataset) -> int:
    count = numbers(ds, "NumberOfFrames", 1)
    frames = 1 if count is None else count[0]
    if frames != int(frames) or not 1 <= frames <= MAX_FRAMES:
        raise Refused(f"NumberOfFrames outside 1..{MAX_FRAMES}")
    return int(frames)


def padding_range(ds: Dataset, signed: bool) -> tuple[int, int] | None:
    """Return the inclusive range of stored padding values.

    The bits are read by PixelRepresentation whatever VR they were written with: LIDC has 63536 as US beside signed
    pixels, which is -2000 (PS3.3 C.7.5.1.1.2).
    """
    if not raw(ds, "PixelPaddingValue"):
        return None
    value = uint16(ds, "PixelPaddingValue")
    limit = uint16(ds, "PixelPaddingRangeLimit", value)
    if signed:
        value, limit = (v - 65_536 if v >= 32_768 else v for v in (value, limit))
    return min(value, limit), max(value, limit)


@lru_cache(maxsize=1024)  # a series has one orientation
def slice_normal(orientation: tuple[float, ...]) -> tuple[float, float, float]:
    """Return the unit normal of ImageOrientationPatient, turned so that it points to the head (z >= 0)."""
    (a, b, c), (d, e, f) = orientation[:3], orientation[3:]
    normal = b * f - c * e, c * d - a * f, a * e - b * d
    length = math.copysign(math.hypot(*normal), normal[2])
    return normal[0] / length, normal[1] / length, normal[2] / length


def check_orientation(orientation: tuple[float, ...]) -> None:
    """Refuse an ImageOrientationPatient that is no plane (PS3.3 C.7.6.2.1.1)."""
    row, column = orientation[:3], orientation[3:]
    cosine = sum(x * y for x, y in zip(row, column, strict=True))
    if max(abs(math.hypot(*row) - 1), abs(math.hypot(*column) - 1), abs(cosine)) > 0.01:
        raise Refused("ImageOrientationPatient is not two unit vectors at right angles")


def check_axial(orientation: tuple[float, ...]) -> None:
    """Refuse a plane whose normal leans away from the long axis by more than a gantry can."""
    normal = [abs(x) for x in slice_normal(orientation)]
    if normal[2] < math.cos(math.radians(AXIAL_TILT_DEG)):
        plane = {0: "sagittal", 1: "coronal", 2: "oblique"}[normal.index(max(normal))]
        raise Refused(f"not axial: {plane}")


def rescale(ds: Dataset) -> tuple[float, float]:
    slope, intercept = numbers(ds, "RescaleSlope", 1), numbers(ds, "RescaleIntercept", 1)
    if slope is None or intercept is None:
        raise Refused("no RescaleSlope or RescaleIntercept: HU unknown")
    if not SLOPE_RANGE[0] <= slope[0] <= SLOPE_RANGE[1] or abs(intercept[0]) > MAX_INTERCEPT:
        raise Refused("RescaleSlope or RescaleIntercept out of range")
    if text(ds, "RescaleType").upper() in _NOT_HU:
        raise Refused("RescaleType is not HU")
    return slope[0], intercept[0]


def frame_fields(ds: Dataset) -> dict[str, object]:
    """Return the geometry, rescale and phase of one frame; `ds` is a single-frame image or a flattened frame."""
    orientation = required(ds, "ImageOrientationPatient", 6)
    check_orientation(orientation)
    spacing = required(ds, "PixelSpacing", 2)
    if not all(SPACING_RANGE[0] <= s <= SPACING_RANGE[1] for s in spacing):
        raise Refused("PixelSpacing out of range")
    position = required(ds, "ImagePositionPatient", 3)
    if max(map(abs, position)) > 1e5:
        raise Refused("ImagePositionPatient out of range")
    thickness = optional(ds, "SliceThickness")
    if not (math.isnan(thickness) or 0 <= thickness <= MAX_THICKNESS):
        raise Refused("SliceThickness out of range")
    slope, intercept = rescale(ds)
    return {
        "orientation": orientation,
        "position": position,
        "spacing": spacing,
        "thickness": thickness,
        "slope": slope,
        "intercept": intercept,
        "kernel": text(ds, "ConvolutionKernel").replace("\\", "/"),
        "phase": tuple(text(ds, name) for name in PHASE_TAGS),
    }


def flattened_frames(ds: Dataset, frames: int) -> list[Dataset]:
    """Turn the functional groups of a multi-frame CT into one flat dataset per frame (per-frame over shared)."""
    tag = TAGS["PerFrameFunctionalGroupsSequence"]
    per_frame = ds[tag].value if tag in ds else []
    if len(per_frame) != frames:
        raise Refused("the per-frame functional groups do not fit NumberOfFrames")
    shared = sequence_item(ds, "SharedFunctionalGroupsSequence")
    result = []
    for group in per_frame:
        flat = Dataset()
        for source in (shared, group):
            for macro in FRAME_MACROS if source is not None else ():
                item = sequence_item(source, macro)
                if item is not None:
                    flat.update({tag: item.get_item(tag) for tag in TAGS.values() if tag in item})
        check_image_type(text(flat, "FrameType"))
        result.append(flat)
    return result
