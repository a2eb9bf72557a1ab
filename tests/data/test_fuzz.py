"""Broken files: whatever a byte or a tag turns into, the answer is a reason or the HU that pydicom reads."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.pixels import apply_rescale
from pydicom.uid import JPEGLSLossless, RLELossless
from synthetic_dicom import body, enhanced, save, write_slice

from dinoct.data.dicom import Rejected, read_headers
from dinoct.data.header import Refused
from dinoct.data.pixels import HU_MAX, HU_MIN, finish_hu, read_stored, to_hu

FIELDS = [
    "Rows", "Columns", "BitsStored", "HighBit", "BitsAllocated", "PixelRepresentation", "SamplesPerPixel",
    "RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient",
    "SliceThickness", "NumberOfFrames", "PixelPaddingValue", "Modality", "ImageType", "SOPClassUID",
    "SeriesInstanceUID", "PatientID", "PhotometricInterpretation", "RescaleType", "AcquisitionNumber",
]  # fmt: skip
TEXTS = ["", "1", "-1", "0", "1e400", "nan", "NaN", "inf", "0,5", "1\\2\\3", "\\", "\0", "999999999999", "x" * 70]


class Seeds(dict):
    """Files by name, without their bytes in every message."""

    def __repr__(self):
        return f"Seeds({sorted(self)})"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Valid files to start from: plain, signed with padding, JPEG-LS, RLE, multi-frame."""
    folder = tmp_path_factory.mktemp("seeds")
    write_slice(folder / "plain")
    write_slice(folder / "padded", signed=True, PixelPaddingValue=-2000)
    for name, syntax in (("jls", JPEGLSLossless), ("rle", RLELossless)):
        ds = dcmread(folder / "plain")
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(folder / name)
    frames = [{"stored": body(i).astype(np.int32) + 1024, "slope": 1, "intercept": -1024, "z": i} for i in range(2)]
    save(enhanced(frames), folder / "multi")
    return Seeds({path.name: path.read_bytes() for path in folder.iterdir()})


def edits(data):
    """Draw a list of byte edits: overwrite, remove or insert."""
    place = st.one_of(st.integers(0, 1500), st.integers(0, len(data) - 1))  # the header is where meaning is
    return st.lists(st.tuples(place, st.sampled_from("ord"), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4)


def apply(data, changes):
    data = bytearray(data)
    for place, kind, new in changes:
        if kind == "o":
            data[place : place + len(new)] = new
        elif kind == "d":
            del data[place : place + len(new)]
        else:
            data[place:place] = new
    return bytes(data)


def read_all(path):
    """HU of all slices of a file as prepare would store them, [] where it is refused."""
    headers = read_headers(str(path))
    if isinstance(headers, Rejected):
        assert headers.reason
        return []
    result = []
    for header in headers:
        try:
            with open(path, "rb") as handle:
                stored = read_stored(handle, header)
            hu = to_hu(stored, header.slope, header.intercept)
            final = finish_hu(hu, stored, header.padding)
        except Refused:
            continue
        assert final.dtype == np.int16
        assert final.shape == (header.rows, header.cols)
        assert final.min() >= HU_MIN
        assert final.max() <= HU_MAX
        assert all(np.isfinite([*header.position, *header.spacing, header.slope, header.intercept]))
        result.append((header, hu))
    return result


def agrees_with_pydicom(path, slices):
    """Compare single-frame results with pydicom's own reading of the same bytes."""
    for header, hu in slices:
        if header.frames == 1 and "Functional" not in str(header):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ds = dcmread(path)
                expected = np.rint(apply_rescale(ds.pixel_array, ds))
            np.testing.assert_array_equal(hu, expected)


def check_bytes(seeds, folder, data):
    name = data.draw(st.sampled_from(sorted(seeds)))
    path = folder / "mutant"
    path.write_bytes(apply(seeds[name], data.draw(edits(seeds[name]))))
    slices = read_all(path)
    if name != "multi":
        agrees_with_pydicom(path, slices)


def check_fields(seeds, folder, data):
    ds = dcmread(io.BytesIO(seeds[data.draw(st.sampled_from(["plain", "padded", "jls", "rle"]))]))
    for field in data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True)):
        if data.draw(st.booleans()) and field in ds:
            del ds[field]
        elif field in ds and ds[field].VR == "US":
            ds[field].value = data.draw(
                st.one_of(st.integers(0, 65_535), st.sampled_from([1, 8, 12, 16, 63, 64, 65, 512]))
            )
        elif field in ds and ds[field].VR != "SS":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ds._dict[ds[field].tag] = ds[field].to_json_dict and _raw(ds[field], data.draw(st.sampled_from(TEXTS)))
    path = folder / "mutant"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=False)
    agrees_with_pydicom(path, read_all(path))


def _raw(element, text):
    from pydicom.dataelem import RawDataElement

    value = text.encode() + b" " * (len(text) % 2)
    return RawDataElement(element.tag, element.VR, len(value), value, 0, False, True)


CHECKS = {"bytes": check_bytes, "fields": check_fields}
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("kind", CHECKS)
@settings(max_examples=100, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(data=st.data())
def test_no_mutation_raises_or_gives_wrong_hu(kind, seeds, tmp_path, data):
    CHECKS[kind](seeds, tmp_path, data)


@pytest.mark.long
@pytest.mark.parametrize("kind", CHECKS)
@settings(max_examples=1000, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_no_mutation_of_two_thousand_raises_or_gives_wrong_hu(kind, seeds, tmp_path, data):
    CHECKS[kind](seeds, tmp_path, data)
