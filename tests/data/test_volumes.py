"""MetaImage and NIfTI volumes, and pictures, which have no HU."""

import csv
import gzip
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_dicom import body, write_series

from dinoct.data import volumes
from dinoct.data.header import Refused
from dinoct.data.index import SliceIndex
from dinoct.data.pipeline import PrepareError, PrepareOptions, explain, prepare_dataset
from dinoct.data.privacy import Hasher, load_or_create_salt
from dinoct.data.splits import SplitManifest
from dinoct.data.store import SliceStore

sitk = pytest.importorskip("SimpleITK")
SPACING, ORIGIN = (0.7, 0.8, 2.5), (-120.0, -90.0, -300.0)  # along left, back, head


def image(seed=0, shape=(6, 48, 64), dtype=np.int16):
    """An axial volume in LPS order, [slices, rows, cols], that looks different from every side."""
    hu = np.stack([body(seed + k, shape[1:]) for k in range(shape[0])]) + 3 * np.arange(shape[0])[:, None, None]
    hu[:, :5, :9] = 700
    volume = sitk.GetImageFromArray(hu.astype(dtype))
    volume.SetSpacing(SPACING)
    volume.SetOrigin(ORIGIN)
    return volume


def write(volume, path, compressed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(path), compressed)


def prepare(source, root, **options):
    return prepare_dataset([source], root, PrepareOptions(0, **options))


def reasons(root):
    with open(root / "_index" / "rejects.csv", newline="") as handle:
        return {Path(explain(root, row["file_id"])["path"]).name: row["reason"] for row in csv.DictReader(handle)}


def stacks(report, root):
    """HU [slices, rows, cols] of each series, with its part of the index."""
    index, store = SliceIndex.load(report.index_csv), SliceStore(root / "store")
    for code, name in enumerate(index.series_names):
        part = index.select(index.series == code)
        yield np.stack([store.read(name, int(row)) for row in part.row]), part


@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_volume_is_a_series_of_axial_slices_from_feet_to_head(tmp_path, name, compressed):
    for i in range(2):
        write(image(10 * i), tmp_path / "in" / f"{i}{name}", compressed)
    report = prepare(tmp_path / "in", tmp_path / "root")
    assert report.slices_written == 12
    expected = sorted(sitk.GetArrayFromImage(image(10 * i)).tobytes() for i in range(2))
    found = list(stacks(report, tmp_path / "root"))
    assert sorted(np.clip(hu, -1024, 3071).tobytes() for hu, _ in found) == expected
    for _, part in found:
        np.testing.assert_allclose(part.z_mm, ORIGIN[2] + 2.5 * np.arange(6), atol=1e-4)
        np.testing.assert_allclose(part.spacing_row_mm, 0.8, atol=1e-6)
        np.testing.assert_allclose(part.spacing_col_mm, 0.7, atol=1e-6)
    assert set(reasons(tmp_path / "root").values()) <= {"pixels of the .mhd of the same name"}
    assert report.refused_ct_fraction == 0
    assert prepare(tmp_path / "in", tmp_path / "root").slices_new == 0


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_every_order_of_the_axes_gives_the_same_slices(tmp_path, suffix):
    axial = image()
    letters = [("L", "R"), ("P", "A"), ("S", "I")]
    codes = ["".join(c) for order in itertools.permutations(letters) for c in itertools.product(*order)]
    assert len(codes) == 48
    truth = sitk.GetArrayFromImage(axial)
    for code in codes:
        path = str(tmp_path / f"{code}{suffix}")
        sitk.WriteImage(sitk.DICOMOrient(axial, code), path)
        headers = volumes.read_headers(path)
        np.testing.assert_array_equal(volumes.read_volume(path), truth, err_msg=code)
        np.testing.assert_allclose([h.position for h in headers][::5], [ORIGIN, (-120, -90, -287.5)], atol=1e-3)
        assert (headers[0].rows, headers[0].cols, headers[0].spacing) == (48, 64, pytest.approx((0.8, 0.7), abs=1e-5))
        np.testing.assert_allclose(headers[0].orientation, (1, 0, 0, 0, 1, 0), atol=1e-6)


def test_a_tilted_volume_keeps_its_tilt_and_an_oblique_one_is_refused(tmp_path):
    for name, degrees in (("a", 15), ("b", 15), ("oblique", 40)):
        tilted, angle = image(), np.radians(degrees)
        c, s = np.cos(angle), np.sin(angle)
        tilted.SetDirection((1, 0, 0, 0, c, -s, 0, s, c))
        write(tilted, tmp_path / f"{name}.mha")
    report = prepare(tmp_path, tmp_path / "root", max_reject_fraction=0.9)
    assert reasons(tmp_path / "root") == {"oblique.mha": "not axial: oblique"}
    with open(report.index_csv.with_name("series.csv"), newline="") as handle:
        assert [float(row["tilt_deg"]) for row in csv.DictReader(handle)] == [15, 15]


def test_values_that_are_no_hu_are_refused(tmp_path):
    a = sitk.GetArrayFromImage(image())
    wrong = {
        "mask.nii.gz": (a > -500).astype(np.int16),
        "bytes.mha": (a > -500).astype(np.uint8),
        "stored.nii": (a + 1024).astype(np.int16),
        "unit.nii": np.clip((a + 1000) / 1400, 0, 1).astype(np.float32),
        "nan.nii.gz": np.where(a > 600, np.nan, a).astype(np.float32),
        "four.nii": np.stack([a, a]),
    }
    for name, array in wrong.items():
        write(sitk.GetImageFromArray(array), tmp_path / name)
    for i in range(2):
        write(image(i, dtype=np.float64), tmp_path / f"good{i}.nii")
    report = prepare(tmp_path, tmp_path / "root", max_reject_fraction=0.9)
    assert report.slices_written == 12
    found = reasons(tmp_path / "root")
    assert set(found) == set(wrong)
    assert found["mask.nii.gz"] == found["stored.nii"] == found["unit.nii"] == volumes.NOT_HU
    assert found["bytes.mha"] == "unsigned or 8-bit voxels cannot be Hounsfield units"
    assert found["nan.nii.gz"] == "voxels that are not finite"
    assert found["four.nii"] == "not a volume of three dimensions with one value per voxel"
    hu, _ = next(stacks(report, tmp_path / "root"))
    assert hu.dtype == np.int16


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.mhd"])
def test_a_cut_or_damaged_volume_is_refused(tmp_path, name):
    write(image(), tmp_path / name)
    path = tmp_path / name
    data = path.with_suffix(".raw") if name == "a.mhd" else path
    whole = data.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-100]):
        data.write_bytes(part)
        with pytest.raises(Refused, match=r"cut|damaged"):
            volumes.read_volume(str(path))
    if name.endswith(".gz"):
        plain = bytearray(gzip.decompress(whole))
        data.write_bytes(gzip.compress(plain[:-100]))  # whole as gzip, cut as NIfTI
        with pytest.raises(Refused, match="cut"):
            volumes.read_volume(str(path))
        for place in range(len(whole) // 3, len(whole), len(whole) // 10):
            data.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
            with pytest.raises(Refused, match=r"damaged|cut"):
                volumes.read_volume(str(path))


def test_the_pixels_of_an_mhd_lie_beside_it_and_nowhere_else(tmp_path):
    write(image(), tmp_path / "a.mhd")
    (tmp_path / "in").mkdir()
    text = (tmp_path / "a.mhd").read_text()
    for name in ("../a.raw", str(tmp_path / "a.raw"), "LIST", "a%03d.raw 1 6 1"):
        (tmp_path / "in" / "b.mhd").write_text(text.replace("a.raw", name))
        with pytest.raises(Refused, match="not one file beside it"):
            volumes.read_headers(str(tmp_path / "in" / "b.mhd"))


def test_a_nifti_without_orientation_is_refused(tmp_path):
    write(image(), tmp_path / "a.nii")
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[252:256] = bytes(4)  # qform_code and sform_code
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(Refused, match="without an orientation"):
        volumes.read_headers(str(tmp_path / "a.nii"))


def test_a_file_is_a_patient_unless_patients_csv_says_otherwise(tmp_path):
    source, root = tmp_path / "in", tmp_path / "root"
    for i, patient in enumerate("ABC"):
        (source / patient).mkdir(parents=True)
        write(image(i), source / patient / "ct.nii.gz")
    assert len(SliceIndex.load(prepare(source, root).index_csv).patient_names) == 3
    write(image(7), source / "A" / "later.nii.gz")
    write_series(source / "dicom", 2, patient="P7")
    (source / "A" / "patients.csv").write_text("file,patient\nct.nii.gz,P7\nlater.nii.gz,P7\n")
    report = prepare(source, root, val_fraction=0.5)  # the table changed nothing in the volume, and yet it is followed
    index = SliceIndex.load(report.index_csv)
    key = Hasher(load_or_create_salt(root)).patient("P7")
    assert sum(index.patient_name(i) == key for i in range(len(index))) == 6 + 6 + 2
    assert len(index.series_names) == 5
    assert len(SplitManifest.load(report.split_manifest).masks(index)[0]) == 26
    (source / "A" / "patients.csv").write_text("file,patient\nct.nii.gz,P7\n")
    prepare(source, root)
    assert reasons(root)["later.nii.gz"] == "the patients.csv beside it does not name one patient for it"


def test_no_name_of_a_volume_leaves_the_private_folder(tmp_path, capfd):
    source, root = tmp_path / "Zq7Canary_in", tmp_path / "root"
    source.mkdir()
    for i in range(2):
        write(image(i), source / f"Zq7Canary{i}.mhd")
    write(image(3), source / "Zq7Canary_cut.mhd")
    (source / "Zq7Canary_cut.raw").write_bytes(b"x")
    (source / "Zq7Canary_bad.nii").write_bytes(b"x" * 400)
    report = prepare(source, root, max_reject_fraction=0.9)
    assert report.slices_written == 12
    files = [path for path in root.rglob("*") if path.is_file() and "_private" not in path.parts]
    haystack = b"".join(path.read_bytes() + path.name.encode() for path in files)
    assert b"Zq7Canary" not in haystack + "".join(capfd.readouterr()).encode() + json.dumps(report.rejected).encode()


def test_without_simpleitk_one_sentence_names_the_extra_and_the_next_run_tries_again(tmp_path, monkeypatch):
    for i in range(2):
        write(image(i), tmp_path / "in" / f"{i}.nii")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "SimpleITK", None)
        with pytest.raises(PrepareError, match=r"2  a volume needs SimpleITK: pip install 'dinoct\[volumes\]'"):
            prepare(tmp_path / "in", tmp_path / "root")
    assert prepare(tmp_path / "in", tmp_path / "root").slices_new == 12


def test_workers_read_volumes_too(tmp_path):
    for i in range(2):
        write(image(i), tmp_path / "in" / f"{i}.nii.gz")
    assert prepare_dataset([tmp_path / "in"], tmp_path / "root", PrepareOptions(1)).slices_written == 12


def test_a_folder_of_pictures_is_refused_with_what_is_missing(tmp_path):
    for i, suffix in enumerate(("png", "png", "jpg", "tif", "bmp")):
        write(sitk.GetImageFromArray(np.zeros((40, 40), np.uint8)), tmp_path / "in" / f"{i}.{suffix}")
    with pytest.raises(PrepareError, match="none of the 5 files gave a CT slice") as caught:
        prepare(tmp_path / "in", tmp_path / "root")
    words = r"2  a picture \(PNG\) has no Hounsfield units: give the DICOM, MHD or NIfTI it was made from"
    assert caught.match(words)
    assert sum("has no Hounsfield units" in line for line in str(caught.value).splitlines()) == 4


def test_a_volume_that_may_not_be_read_is_read_once_it_may(tmp_path, monkeypatch):
    for i in range(3):
        write(image(10 * i), tmp_path / "in" / f"{i}.nii")

    def closed(path, *args, **options):  # as root, permissions would not keep the test out
        if str(path).endswith("0.nii"):
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **options)

    def refuse(read, path, guarded=volumes._guarded):
        def broken():
            raise RuntimeError("unable to open")

        return guarded(broken if path.endswith("0.nii") else read, path)

    with monkeypatch.context() as patch:
        patch.setattr(volumes, "open", closed, raising=False)
        patch.setattr(volumes, "_guarded", refuse)
        assert prepare(tmp_path / "in", tmp_path / "root").slices_written == 12
        assert reasons(tmp_path / "root") == {"0.nii": "volume cannot be read (PermissionError)"}
    assert prepare(tmp_path / "in", tmp_path / "root").slices_written == 18


@pytest.mark.parametrize("link", [False, True])
def test_volumes_that_were_moved_are_not_there_twice(tmp_path, link):
    """Named at their new place, or at the old one, where a link was left."""
    for i in range(3):
        write(image(10 * i), tmp_path / "in" / f"{i}.nii")
    first = prepare(tmp_path / "in", tmp_path / "root")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    if link:
        (tmp_path / "in").symlink_to(tmp_path / "elsewhere")
    report = prepare(tmp_path / ("in" if link else "elsewhere"), tmp_path / "root")
    assert (report.slices_written, report.files_seen) == (18, 3)
    assert (report.files_vanished, report.files_missing) == (3, 0)
    index = SliceIndex.load(report.index_csv)
    assert len(index.patient_names) == 3  # else a patient would be on both sides of the split
    assert first.slices_written == 18
