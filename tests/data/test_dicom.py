"""One file -> HU or a reason: every rule of reading, each with the file that a careless reader gets wrong."""

import numpy as np
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from synthetic_dicom import body, dataset, enhanced, save, write_slice

from dinoct.data.dicom import PIXEL_HEAD, START_BYTES, Rejected, read_headers, read_hu
from dinoct.data.header import Refused
from dinoct.data.pixels import finish_hu, read_stored, to_hu


def stored_hu(path, frame=0):
    """What prepare stores: HU with padding and clipping."""
    header = read_headers(str(path))[frame]
    with open(path, "rb") as handle:
        stored = read_stored(handle, header)
    return finish_hu(to_hu(stored, header.slope, header.intercept), stored, header.padding)


def reason(path):
    """The reason why a file gives no slice, from its header or from its pixels."""
    headers = read_headers(str(path))
    if isinstance(headers, Rejected):
        return headers.reason
    with pytest.raises(Refused) as caught:
        stored_hu(path)
    return str(caught.value)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_hu_of_signed_and_unsigned_pixels(tmp_path, signed, syntax):
    hu = body()
    path = save(dataset(hu, signed=signed), tmp_path / "a", syntax)
    np.testing.assert_array_equal(read_hu(str(path)), hu)


@pytest.mark.parametrize("gap", [-40, -12, -6, 0, 1, 70_000])
def test_a_header_of_any_length(tmp_path, gap):
    """Around the size up to which headers are read at once, and far beyond it."""
    hu = body()
    ds = dataset(hu)
    ds.add_new(0x00091001, "OB", b"")
    short = save(ds, tmp_path / "short")
    ds.add_new(0x00091001, "OB", bytes((START_BYTES + gap - read_headers(str(short))[0].offset + PIXEL_HEAD) // 2 * 2))
    path = save(ds, tmp_path / "a")
    (header,) = read_headers(str(path))
    assert abs(header.offset - PIXEL_HEAD - START_BYTES - gap) <= 1
    np.testing.assert_array_equal(read_hu(str(path)), hu)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_hu_of_lossless_compression(tmp_path, signed, syntax):
    hu = body()
    ds = dcmread(write_slice(tmp_path / "plain", hu, signed=signed))
    ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(tmp_path / "a")
    np.testing.assert_array_equal(read_hu(str(tmp_path / "a")), hu)
    assert not read_headers(str(tmp_path / "a"))[0].lossy


def test_big_endian(tmp_path):
    hu = body()
    ds = dataset(hu, signed=True)
    ds.PixelData = hu.astype(">i2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    ds.preamble = b"\0" * 128
    dcmwrite(tmp_path / "a", ds, implicit_vr=False, little_endian=False, enforce_file_format=True)
    np.testing.assert_array_equal(read_hu(str(tmp_path / "a")), hu)


def test_lossy_is_flagged(tmp_path):
    ds = dcmread(write_slice(tmp_path / "plain"))
    ds.compress(JPEGLSNearLossless, jls_error=2, generate_instance_uid=False)
    ds.save_as(tmp_path / "near")
    assert read_headers(str(tmp_path / "near"))[0].lossy
    assert read_headers(str(write_slice(tmp_path / "tag", LossyImageCompression="01")))[0].lossy


def test_jpeg2000_is_decoded_by_the_named_plugin_whatever_is_installed(tmp_path, monkeypatch):
    ds = dcmread(write_slice(tmp_path / "plain"))
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    ds.save_as(tmp_path / "a")
    import pydicom.pixels.decoders.pillow as pillow

    monkeypatch.setattr(pillow, "_decode_frame", lambda *_: pytest.fail("decoded by Pillow"))
    np.testing.assert_array_equal(read_hu(str(tmp_path / "a")), body())


def test_twelve_bits_signed_without_sign_extension(tmp_path):
    hu = body()
    words = (hu.astype(np.int32) & 0x0FFF).astype(np.uint16)
    tags = {"BitsStored": 12, "HighBit": 11, "PixelData": words.tobytes()}
    np.testing.assert_array_equal(read_hu(str(write_slice(tmp_path / "a", hu, signed=True, **tags))), hu)


def test_values_wider_than_bits_stored_are_refused(tmp_path):
    words = (body().astype(np.int32) + 6000).astype(np.uint16)
    path = write_slice(tmp_path / "a", BitsStored=12, HighBit=11, PixelData=words.tobytes())
    assert reason(path) == "pixel values do not fit BitsStored"


@pytest.mark.parametrize(("slope", "intercept"), [("2", "-1024"), ("0.5", "-1024.5"), ("1", "-8192"), ("1", "30000")])
def test_rescale_is_applied_and_rounded(tmp_path, slope, intercept):
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    path = write_slice(tmp_path / "a", PixelData=stored.tobytes(), RescaleSlope=slope, RescaleIntercept=(-1024))
    ds = dcmread(path)
    ds.RescaleIntercept = intercept
    ds.save_as(path)
    expected = np.rint(stored.astype(np.float64) * float(slope) + float(intercept))
    np.testing.assert_array_equal(read_hu(str(path)), expected)


@pytest.mark.parametrize("stored", [[0, 65_535], [1024, 40_000]])
def test_hu_beyond_int16_does_not_wrap(stored):
    hu = to_hu(np.array([stored], dtype=np.uint16), 1.0, -1024.0)
    np.testing.assert_array_equal(hu, [[value - 1024 for value in stored]])


def test_monochrome1_does_not_invert_hu(tmp_path):
    path = write_slice(tmp_path / "a", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_hu(str(path)), body())


def test_padding_becomes_air_even_above_it_and_the_rest_is_clipped(tmp_path):
    hu = body()
    hu[0], hu[1], hu[2] = 200, -3000, 4000
    path = write_slice(tmp_path / "a", hu, signed=True, PixelPaddingValue=200)
    result = stored_hu(path)
    assert (result[0] == -1024).all()  # padding, though its value looks like bone
    assert (result[1] == -1024).all()
    assert (result[2] == 3071).all()
    np.testing.assert_array_equal(result[3:], hu[3:])
    np.testing.assert_array_equal(read_hu(str(path)), hu)


def test_padding_range_and_padding_written_as_unsigned_beside_signed_pixels(tmp_path):
    hu = body()
    hu[0], hu[1] = 500, 510
    ds = dataset(hu, signed=True)
    ds.add_new("PixelPaddingValue", "SS", 500)
    ds.add_new("PixelPaddingRangeLimit", "SS", 510)
    assert (stored_hu(save(ds, tmp_path / "range"))[:2] == -1024).all()
    ds = dataset(hu, signed=True)
    ds.add_new("PixelPaddingValue", "US", 63_536)
    assert read_headers(str(save(ds, tmp_path / "lidc")))[0].padding == (-2000, -2000)


def test_enhanced_ct_takes_rescale_and_position_of_each_frame(tmp_path):
    stored = [(body(i).astype(np.int32) + 1024).astype(np.uint16) for i in range(3)]
    frames = [
        {"stored": stored[i], "slope": slope, "intercept": intercept, "z": z}
        for i, (slope, intercept, z) in enumerate([(1, -1024, 5), (2, -2048, 0), (1, -1000, -5)])
    ]
    for name in ("enhanced", "legacy"):
        ds = enhanced(frames)
        if name == "legacy":
            ds.SOPClassUID = LegacyConvertedEnhancedCTImageStorage
        path = str(save(ds, tmp_path / name))
        assert [header.position[2] for header in read_headers(path)] == [5, 0, -5]
        assert {header.spacing for header in read_headers(path)} == {(0.8, 0.8)}
        for i, frame in enumerate(frames):
            expected = stored[i].astype(np.int32) * frame["slope"] + frame["intercept"]
            np.testing.assert_array_equal(read_hu(path, i), expected)


def test_enhanced_ct_that_is_compressed(tmp_path):
    stored = [(body(i).astype(np.int32) + 1024).astype(np.uint16) for i in range(3)]
    frames = [{"stored": s, "slope": 1, "intercept": -1024, "z": i} for i, s in enumerate(stored)]
    ds = dcmread(save(enhanced(frames), tmp_path / "plain"))
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(tmp_path / "a")
    for i in range(3):
        np.testing.assert_array_equal(read_hu(str(tmp_path / "a"), i), body(i))


def test_enhanced_ct_without_rescale_or_with_a_localizer_frame_is_refused(tmp_path):
    good = {"stored": body().astype(np.int32) + 1024, "slope": 1, "intercept": -1024, "z": 0}
    bare = {"stored": good["stored"], "z": 1}
    assert "HU unknown" in reason(save(enhanced([good, bare]), tmp_path / "a"))
    assert reason(save(enhanced([good, good | {"z": 1, "type": "LOCALIZER"}]), tmp_path / "b")) == "localizer"
    ds = enhanced([good, good | {"z": 1}])
    ds.NumberOfFrames, ds.PixelData = 3, bytes(3 * 8192)
    assert "functional groups" in reason(save(ds, tmp_path / "c"))


CORONAL, SAGITTAL = [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]
OBLIQUE = [1, 0, 0, 0, np.cos(np.radians(40)), np.sin(np.radians(40))]
REFUSALS = [
    ({"SOPClassUID": SecondaryCaptureImageStorage}, "not a CT image: Secondary Capture Image Storage"),
    ({"SOPClassUID": "1.2.3.4"}, "not a CT image: unknown class"),
    ({"SOPClassUID": None}, "not a CT image: no SOPClassUID"),
    ({"Modality": "MR"}, "Modality is not CT"),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
    ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "screen save or dose report"),
    ({"BurnedInAnnotation": "YES"}, "burned-in annotation"),
    ({"RescaleSlope": None}, "no RescaleSlope or RescaleIntercept: HU unknown"),
    ({"RescaleIntercept": None, "PixelData": bytes(8192)}, "no RescaleSlope or RescaleIntercept: HU unknown"),
    ({"RescaleSlope": 0}, "RescaleSlope or RescaleIntercept out of range"),
    ({"RescaleSlope": -1}, "RescaleSlope or RescaleIntercept out of range"),
    ({"RescaleSlope": 1e6}, "RescaleSlope or RescaleIntercept out of range"),
    ({"RescaleType": "MGML"}, "RescaleType is not HU"),
    ({"ImageOrientationPatient": CORONAL}, "not axial: coronal"),
    ({"ImageOrientationPatient": SAGITTAL}, "not axial: sagittal"),
    ({"ImageOrientationPatient": OBLIQUE}, "not axial: oblique"),
    (
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        "ImageOrientationPatient is not two unit vectors at right angles",
    ),
    (
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
        "ImageOrientationPatient is not two unit vectors at right angles",
    ),
    ({"ImageOrientationPatient": None}, "no ImageOrientationPatient"),
    ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
    ({"PixelSpacing": [0, 0.7]}, "PixelSpacing out of range"),
    ({"PixelSpacing": None}, "no PixelSpacing"),
    ({"SeriesInstanceUID": None}, "no SeriesInstanceUID"),
    ({"NumberOfFrames": 2, "PixelData": bytes(16384)}, "several frames in a single-frame class"),
    ({"NumberOfFrames": 1_000_000}, "NumberOfFrames outside 1..10000"),
    ({"Rows": 60_000}, "Rows or Columns outside 32..4096"),
    ({"Rows": 63}, "pixel data length does not fit Rows x Columns"),
    ({"Columns": 128}, "pixel data length does not fit Rows x Columns"),
    ({"PixelData": None}, "no pixel data"),
    ({"BitsAllocated": 8}, "not 12 to 16 bits in 16"),
    ({"BitsStored": 8, "HighBit": 7}, "not 12 to 16 bits in 16"),
    ({"HighBit": 11}, "HighBit does not fit BitsStored"),
    ({"SamplesPerPixel": 3}, "colour image"),
    ({"PhotometricInterpretation": "RGB"}, "PhotometricInterpretation is not MONOCHROME1 or MONOCHROME2"),
    ({"PixelData": bytes(8192)}, "constant slice"),
    ({"PixelData": np.arange(50_000, 54_096, dtype=np.uint16).tobytes()}, "values cannot be HU"),
]


@pytest.mark.parametrize(("tags", "expected"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_no_axial_ct_slice_is_refused_with_its_reason(tmp_path, tags, expected):
    assert reason(write_slice(tmp_path / "a", **tags)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"0,7\\0,7 ", "PixelSpacing is not a number"),
        (b"NaN\\0.7 ", "PixelSpacing is not a number"),
        (b"1_0\\0.7 ", "PixelSpacing is not a number"),
        (b"1e999\\1 ", "PixelSpacing is not finite"),
        (b"0.70000 ", "PixelSpacing does not have 2 value(s)"),
    ],
)
def test_numbers_that_python_or_a_spreadsheet_would_swallow(tmp_path, value, expected):
    path = write_slice(tmp_path / "a", PixelSpacing=["0.12", "0.3"])
    data = path.read_bytes()
    assert data.count(b"0.12\\0.3") == 1
    path.write_bytes(data.replace(b"0.12\\0.3", value))
    assert reason(path) == expected


def test_a_damaged_value_representation_is_refused(tmp_path):
    """The value is whole, but two bytes beside it are not: pydicom cannot read it either (found by test_fuzz.py)."""
    path = write_slice(tmp_path / "a")
    data = path.read_bytes()
    assert data.count(b"CS\x0c\x00MONOCHROME2 ") == 1
    path.write_bytes(data.replace(b"CS\x0c\x00MONOCHROME2 ", b"C\x00\x0c\x00MONOCHROME2 "))
    assert reason(path) == "PhotometricInterpretation is damaged: its value representation is none of DICOM's"


def test_gantry_tilt_is_still_axial(tmp_path):
    tilted = [1, 0, 0, 0, float(np.cos(np.radians(25))), float(-np.sin(np.radians(25)))]
    assert len(read_headers(str(write_slice(tmp_path / "a", ImageOrientationPatient=tilted)))) == 1
    assert len(read_headers(str(write_slice(tmp_path / "b", ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])))) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ("not_dicom", "empty file", False)),
        (b"notes about the scan", ("not_dicom", "not a DICOM file", False)),
        (b"<?xml version='1.0'?><LidcReadMessage/>" + bytes(200), ("not_dicom", "not a DICOM file", False)),
    ],
)
def test_what_is_no_dicom(tmp_path, content, expected):
    (tmp_path / "a.dcm").write_bytes(content)
    assert read_headers(str(tmp_path / "a.dcm")) == Rejected(*expected)


def test_pixels_cut_off_by_the_end_of_the_file(tmp_path):
    path = write_slice(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-3])
    assert reason(path) == "file is cut: pixel data shorter than it says"


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_a_cut_codestream_is_refused(tmp_path, syntax):
    ds = dcmread(write_slice(tmp_path / "plain"))
    ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[: len(data) - 1500])
    assert reason(tmp_path / "a") == "file is cut: encapsulated pixel data without its end"
    # The same cut inside a file that is whole again at its end:
    (tmp_path / "a").write_bytes(data[: len(data) - 1500] + data[-8:])
    assert reason(tmp_path / "a").startswith(("file is cut", "encapsulated pixel data is damaged"))


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_a_cut_codestream_in_a_whole_item_is_refused(tmp_path, syntax):
    ds = dcmread(write_slice(tmp_path / "plain"))
    ds.compress(syntax, generate_instance_uid=False)
    ds.PixelData = encapsulate([get_frame(ds.PixelData, 0, number_of_frames=1)[:-200]])
    ds.save_as(tmp_path / "a")
    assert reason(tmp_path / "a").startswith("pixel data cannot be decoded")


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
def test_a_codestream_of_another_shape_is_refused(tmp_path, syntax):
    ds = dcmread(write_slice(tmp_path / "plain", body(0, (64, 64))))
    ds.compress(syntax, generate_instance_uid=False)
    ds.Rows, ds.Columns = 32, 128
    ds.save_as(tmp_path / "a")
    assert reason(tmp_path / "a") == "codestream and header differ in Rows or Columns"


def test_a_reason_never_quotes_the_file(tmp_path):
    canary = "Canary^Name"
    for name in (
        "PatientName",
        "Modality",
        "RescaleType",
        "PhotometricInterpretation",
        "ImageType",
        "BurnedInAnnotation",
    ):
        headers = read_headers(str(write_slice(tmp_path / name, **{name: canary})))
        assert "Canary" not in str(headers), name
