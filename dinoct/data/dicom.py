"""One DICOM file -> the headers of its slices, or the reason why it gives none.

`read_headers` reads everything before the pixels and remembers where they lie, so that `pixels.read_stored` needs no
second look at the header: a file is parsed once, whenever its pixels are read.
"""

import io
import logging
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
from pydicom import config, dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from dinoct.data import header as h
from dinoct.data import tags
from dinoct.data.archive import Member, open_member
from dinoct.data.header import Refused, SliceHeader
from dinoct.data.pixels import PLUGINS, read_stored, to_hu

# pydicom logs and warns with values from the header, which may name a patient.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
config.settings.reading_validation_mode = config.IGNORE

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
MAX_PIXEL_BYTES = 2**31
START_BYTES = 2**17  # longer than most headers
PIXEL_HEAD = 12  # bytes of the pixel data's tag and length
_LOSSY = {JPEGLSNearLossless, JPEG2000, HTJ2K, JPEGBaseline8Bit, JPEGExtended12Bit}


class Rejected(NamedTuple):
    """Why a file gave no slice. `is_ct` says whether it counts against the limit of refused CT files.

    `retry`: the next run looks again, since what is missing is missing here and not in the file: a package, a
    permission, a disk that answers. A repair of these changes neither size nor time of the file.
    """

    kind: str  # refused | not_dicom
    reason: str
    is_ct: bool
    retry: bool = False


class NoDecoder(Refused):
    """A package that can be installed would read the file."""


NOT_DICOM = Rejected("not_dicom", "not a DICOM file", False)


@contextmanager
def opened(path: str, member: Member | None = None) -> Iterator[BinaryIO]:
    """Open a file, or a member of an archive."""
    with open(member.archive if member else path, "rb") as handle:
        yield open_member(handle, member) if member else handle


def read_headers(path: str, member: Member | None = None, *, axial_only: bool = True) -> list[SliceHeader] | Rejected:
    """Read the header of one file of any kind. Never raises for the content of a file.

    Returns one SliceHeader per frame, or a Rejected: `not_dicom` for what is no DICOM image at all, `refused` for DICOM
    that is not an axial CT image with known HU. A file whose class cannot be read counts as CT.
    With `axial_only` a reformat is refused.
    """
    storage, size = UID(""), 0
    try:
        with opened(path, member) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = _size(handle)
            ds = _parse(handle, size)
            storage = UID(h.text(ds, "SOPClassUID"))
            if ds.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
                return Rejected("not_dicom", "DICOMDIR", False)
            headers = _headers(ds, storage, handle, size)
        for header in headers if axial_only else ():
            h.check_axial(header.orientation)
        return headers
    except InvalidDicomError:
        return NOT_DICOM if size else Rejected("not_dicom", "empty file", False)
    except Refused as error:
        is_ct = storage in CT_CLASSES or not storage
        return Rejected("refused", str(error), is_ct, retry=isinstance(error, NoDecoder))
    except (OSError, MemoryError) as error:
        return Rejected("refused", f"cannot be read ({type(error).__name__})", True, retry=True)
    except Exception as error:  # pydicom raises many kinds; their texts quote the file
        return Rejected(
            "refused", f"header cannot be parsed ({type(error).__name__})", storage in CT_CLASSES or not storage
        )


def _parse(handle: BinaryIO, size: int) -> Dataset:
    """Read everything before the pixels, and leave the handle behind it.

    pydicom asks for its place before every element: in memory that is no system call, so the start of the file is read
    at once. What is not whole there (a long header, a deflated file) is read from the file itself.
    """
    options = {"stop_before_pixels": True, "specific_tags": list(tags.TAGS.values())}
    start = io.BytesIO(handle.read(START_BYTES))
    try:
        ds = dcmread(start, **options)
        if size <= START_BYTES or start.tell() + PIXEL_HEAD <= START_BYTES:
            handle.seek(start.tell())
            return ds
    except Exception:
        if size <= START_BYTES:
            raise
    handle.seek(0)
    return dcmread(handle, **options)


def _size(handle: BinaryIO) -> int:
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    return size


def _headers(ds: Dataset, storage: UID, handle: BinaryIO, size: int) -> list[SliceHeader]:
    if storage not in CT_CLASSES:
        known = storage.name if storage.is_valid and storage.name != storage else "unknown class"
        raise Refused(f"not a CT image: {known if storage else 'no SOPClassUID'}")
    h.check_image(ds)
    frames = h.number_of_frames(ds)
    if storage == CTImageStorage and frames != 1:
        raise Refused("several frames in a single-frame class")
    common = _common_fields(ds, frames)
    common["offset"], common["length"] = _locate_pixels(handle, common, size)
    if not common["series"]:
        raise Refused("no SeriesInstanceUID")
    flat = [ds] if storage == CTImageStorage else h.flattened_frames(ds, frames)
    return [SliceHeader(**common, frame=i, **h.frame_fields(frame)) for i, frame in enumerate(flat)]


def _common_fields(ds: Dataset, frames: int) -> dict:
    syntax = UID(str(ds.file_meta.get("TransferSyntaxUID", "")))
    signed = h.uint16(ds, "PixelRepresentation") == 1
    return {
        "patient": h.text(ds, "PatientID"),
        "study": h.text(ds, "StudyInstanceUID"),
        "series": h.text(ds, "SeriesInstanceUID"),
        "sop": h.text(ds, "SOPInstanceUID"),
        "frames": frames,
        "transfer_syntax": _supported(syntax),
        "rows": h.uint16(ds, "Rows"),
        "cols": h.uint16(ds, "Columns"),
        "bits_stored": h.uint16(ds, "BitsStored"),
        "signed": signed,
        "padding": h.padding_range(ds, signed),
        "gantry_tilt": h.optional(ds, "GantryDetectorTilt"),
        "manufacturer": h.text(ds, "Manufacturer"),
        "lossy": syntax in _LOSSY or h.text(ds, "LossyImageCompression") == "01",
    }


def _supported(syntax: UID) -> str:
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Refused("unknown transfer syntax") from None
    plugin = PLUGINS.get(syntax)
    if not decoder.is_native and plugin not in decoder.available_plugins:
        if plugin == "gdcm":
            raise NoDecoder(f"no decoder for {syntax.name}: pip install 'dinoct[gdcm]'")
        raise Refused(f"no decoder for {syntax.name}")
    return str(syntax)


def _locate_pixels(handle: BinaryIO, common: dict, size: int) -> tuple[int, int]:
    """Return offset and length of the pixel data's value; refuse data that the file or the header contradicts."""
    syntax = UID(common["transfer_syntax"])
    expected = common["rows"] * common["cols"] * 2 * common["frames"]
    if expected > MAX_PIXEL_BYTES:
        raise Refused("absurd size: more than 2 GiB of pixels")
    if syntax == DeflatedExplicitVRLittleEndian:
        return -1, expected
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    head = handle.read(PIXEL_HEAD)
    if len(head) < PIXEL_HEAD or struct.unpack(f"{order}2H", head[:4]) != (0x7FE0, 0x0010):
        raise Refused("no pixel data")
    explicit = head[4:6] in (b"OW", b"OB", b"UN")  # an implicit length is even, so it cannot begin with an "O" or "U"
    length = struct.unpack(f"{order}I", head[8:12] if explicit else head[4:8])[0]
    offset = handle.tell() - (0 if explicit else 4)
    if (length == 0xFFFFFFFF) != syntax.is_encapsulated:
        raise Refused("pixel data and transfer syntax contradict each other")
    if syntax.is_encapsulated:
        _check_items(handle, offset)
        return offset, -1
    if length != expected:
        raise Refused("pixel data length does not fit Rows x Columns")
    if offset + length > size:
        raise Refused("file is cut: pixel data shorter than it says")
    return offset, length


def _check_items(handle: BinaryIO, offset: int) -> None:
    """Walk the items of encapsulated pixel data to their delimiter (PS3.5 A.4).

    A fragment that runs past the end of its data would hand the decoder bytes that are no pixels, and run-length coding
    takes anything.
    """
    handle.seek(offset)
    while (head := handle.read(8)).startswith(b"\xfe\xff\x00\xe0"):
        handle.seek(int.from_bytes(head[4:], "little"), os.SEEK_CUR)
    if not head:
        raise Refused("file is cut: encapsulated pixel data without its end")
    if not head.startswith(b"\xfe\xff\xdd\xe0"):
        raise Refused("encapsulated pixel data is damaged")


def read_hu(path: str, frame: int = 0) -> np.ndarray:
    """Return the HU of one slice before clipping and padding, whatever its plane: int16 or int32 [rows, cols].

    Raises Refused (with its reason) for a file that gives no slice.
    """
    headers = read_headers(path, axial_only=False)
    if isinstance(headers, Rejected):
        raise Refused(headers.reason)
    with open(path, "rb") as handle:
        stored = read_stored(handle, headers[frame])
    return to_hu(stored, headers[frame].slope, headers[frame].intercept)
