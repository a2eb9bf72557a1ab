"""The pixels of one slice: decode, rescale to HU, map padding to air, clip."""

import struct
import warnings
from typing import BinaryIO

import numpy as np
from openjpeg import get_parameters
from pydicom import dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dinoct.data.header import Refused, SliceHeader

HU_MIN, HU_MAX = -1024, 3071
_BELOW_AIR = HU_MIN - 100  # scanners write -2000 to -3024 outside their circle, declared as padding or not
# One decoder per syntax: which one pydicom would pick depends on what else is installed (Pillow takes JPEG 2000).
PLUGINS = {
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000: "pylibjpeg",
    JPEG2000Lossless: "pylibjpeg",
    HTJ2K: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg",
    RLELossless: "pydicom",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGBaseline8Bit: "gdcm",
    JPEGExtended12Bit: "gdcm",
}
_FRAME_HEADERS = (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2", b"\xff\xc3", b"\xff\xf7")  # SOF0 to SOF3, SOF55


def read_stored(handle: BinaryIO, header: SliceHeader) -> np.ndarray:
    """Decode the stored values of one slice: int16 or uint16 [rows, cols]. Raises Refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = _decode(handle, header)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # decoders raise RuntimeError, ValueError, struct.error and others
        raise Refused(f"pixel data cannot be decoded ({type(error).__name__})") from None
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.shape != (header.rows, header.cols) or pixels.dtype not in (np.int16, np.uint16):
        raise Refused("decoded pixels do not fit Rows, Columns and bits")
    return pixels


def _decode(handle: BinaryIO, header: SliceHeader) -> np.ndarray:
    syntax = UID(header.transfer_syntax)
    if not syntax.is_encapsulated:
        return _native(handle, header, ">u2" if syntax == ExplicitVRBigEndian else "<u2")
    plugin = PLUGINS[syntax]
    _check_codestream(handle, header, plugin)
    handle.seek(header.offset)
    pixels, _ = get_decoder(syntax).as_array(
        handle,
        index=header.frame,
        raw=True,
        decoding_plugin=plugin,
        rows=header.rows,
        columns=header.cols,
        samples_per_pixel=1,
        photometric_interpretation="MONOCHROME2",
        bits_allocated=16,
        bits_stored=header.bits_stored,
        pixel_representation=int(header.signed),
        number_of_frames=header.frames,
        pixel_keyword="PixelData",
    )
    return pixels


def _native(handle: BinaryIO, header: SliceHeader, dtype: str) -> np.ndarray:
    """Read a frame that is not compressed: 16-bit words, of which the lower `bits_stored` bits hold the value."""
    size = header.rows * header.cols * 2
    if header.offset < 0:
        handle.seek(0)
        data = dcmread(handle).PixelData[header.frame * size : (header.frame + 1) * size]
    else:
        handle.seek(header.offset + header.frame * size)
        data = handle.read(size)
    if len(data) != size:
        raise Refused("pixel data is cut")
    words = np.frombuffer(data, dtype).astype(np.uint16, copy=False).reshape(header.rows, header.cols)
    _check_bits(words, header)
    if not header.signed:
        return words
    unused = 16 - header.bits_stored
    # the shift back extends the sign
    return (words << unused).view(np.int16) >> unused if unused else words.view(np.int16)


def _check_codestream(handle: BinaryIO, header: SliceHeader, plugin: str) -> None:
    """Refuse a codestream of another shape: with as many pixels it would decode to a scrambled slice."""
    if plugin == "pydicom":  # run-length coding has no shape of its own
        return
    handle.seek(header.offset)
    stream = get_frame(handle, header.frame, number_of_frames=header.frames)
    if plugin == "pylibjpeg":
        found = get_parameters(stream)
        shape = found["rows"], found["columns"]
    else:
        shape = _jpeg_shape(stream)
    if shape != (header.rows, header.cols):
        raise Refused("codestream and header differ in Rows or Columns")


def _jpeg_shape(stream: bytes) -> tuple[int, int]:
    """Return (rows, columns) of a JPEG or JPEG-LS frame header: marker, length, precision, rows, columns.

    ISO/IEC 10918-1 B.2.2 and 14495-1 C.2.2.
    """
    place = 2
    while stream[place : place + 2] not in _FRAME_HEADERS:
        if stream[place] != 0xFF:
            raise Refused("codestream without a frame header")
        place += 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
    return struct.unpack(">2H", stream[place + 5 : place + 9])


def _check_bits(words: np.ndarray, header: SliceHeader) -> None:
    """Refuse values wider than BitsStored: cutting them to size would give wrong HU without a sign of it."""
    if header.bits_stored == 16 or words.max() < 1 << header.bits_stored:
        return
    unused = words >> (header.bits_stored - 1)  # with the sign bit: all clear or all set where the sign was extended
    signs = (0, 1, (1 << (17 - header.bits_stored)) - 1)
    if not header.signed or not np.isin(unused, signs).all():
        raise Refused("pixel values do not fit BitsStored")


def hu_ends(stored: np.ndarray, slope: float, intercept: float) -> tuple[int, int]:
    """Return the smallest and the largest HU of a slice, from its stored values: the rescale keeps their order."""
    low, high = (round(int(end) * slope + intercept) for end in (stored.min(), stored.max()))
    return low, high


def to_hu(stored: np.ndarray, slope: float, intercept: float, ends: tuple[int, int] | None = None) -> np.ndarray:
    """Return HU = stored x slope + intercept (PS3.3 C.11.1), rounded: int16 where it fits, else int32 [rows, cols].

    `ends` are `hu_ends` of the same values, where they are known already. MONOCHROME1 turns the display around and not
    the values, so it plays no part here.
    """
    low, high = ends or hu_ends(stored, slope, intercept)
    fits = low >= -32_768 and high <= 32_767
    if slope == 1 and intercept == int(intercept):
        if fits:  # wraps around inside the sum and back again: right modulo 2^16, and the result is known to fit
            return np.add(stored.view(np.int16), np.int16(((int(intercept) + 32_768) & 0xFFFF) - 32_768))
        return stored.astype(np.int32) + int(intercept)
    return np.rint(stored * slope + intercept).astype(np.int16 if fits else np.int32)


def finish_hu(
    hu: np.ndarray,
    stored: np.ndarray,
    padding: tuple[int, int] | None,
    *,
    hu_min: int = HU_MIN,
    hu_max: int = HU_MAX,
    ends: tuple[int, int] | None = None,
) -> np.ndarray:
    """Map padding to air (`hu_min`), clip to [hu_min, hu_max]: int16 [rows, cols]. Refuses a slice without an image.

    Padding is an inclusive range of stored values; `ends` are the smallest and the largest of `hu`, where known. No CT
    image: a constant one, or values that cannot be HU (more than half of them above bone, or hardly any between air and
    bone). What is in range already comes back as it is, not copied.
    """
    low, high = ends or (int(hu.min()), int(hu.max()))
    if low == high:
        raise Refused("constant slice")
    if high > HU_MAX or low < _BELOW_AIR:
        above, below = np.count_nonzero(hu > HU_MAX), np.count_nonzero(hu < _BELOW_AIR)
        if above > hu.size / 2 or hu.size - above - below < hu.size / 100:
            raise Refused("values cannot be HU")
    inside = hu_min <= low and high <= hu_max and hu.dtype == np.int16
    result = hu if inside else np.clip(hu, hu_min, hu_max).astype(np.int16, copy=False)
    if padding is not None:
        padded = (stored >= padding[0]) & (stored <= padding[1])
        if padded.any():
            result = np.where(padded, np.int16(hu_min), result)
    if result is not hu and result.min() == result.max():
        raise Refused("constant slice")
    return result
