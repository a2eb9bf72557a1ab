"""The reader against real CT, and against every file that pydicom ships."""

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom.data
import pytest

from dinoct.data.dicom import Rejected, read_headers, read_hu
from dinoct.data.index import SliceIndex
from dinoct.data.pipeline import PrepareOptions, explain, prepare_dataset
from dinoct.data.splits import SplitManifest
from dinoct.data.store import SliceStore


@pytest.fixture(scope="module")
def prepared(real_ct, tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    return root, prepare_dataset([real_ct], root, PrepareOptions(2))


def truth(real_ct):
    with open(real_ct / "truth.csv", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.real_ct
def test_hu_before_clipping_and_padding_equal_the_truth_in_every_slice(real_ct):
    rows = truth(real_ct)
    assert len(rows) == 1043
    for row in rows:
        pixels = read_hu(str(real_ct / row["file"])).astype("<i2")
        assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == row["hu_int16_sha256_16"], row["file"]


@pytest.mark.real_ct
def test_hu_of_odd_files_equal_their_arrays(real_ct):
    expected = json.loads((real_ct / "odd" / "expected.json").read_text())
    known = {name: entry["truth_hu"] for name, entry in expected.items() if "truth_hu" in entry}
    slices = {n: t for n, t in known.items() if not isinstance(read_headers(str(real_ct / "odd" / n)), Rejected)}
    assert set(known) - set(slices) == {"derived/localizer_flag.dcm"}
    for name, array in slices.items():
        np.testing.assert_array_equal(read_hu(str(real_ct / "odd" / name)), np.load(real_ct / "odd" / array))


@pytest.mark.real_ct
def test_every_file_is_accounted_for_with_its_reason(real_ct, prepared):
    root, report = prepared
    files = sum(path.is_file() for path in real_ct.rglob("*"))
    with open(root / "_index" / "rejects.csv", newline="") as handle:
        rows = {explain(root, row["file_id"])["path"]: row for row in csv.DictReader(handle)}
    assert report.files_seen == files == report.files_with_slices + len(rows)
    reasons = {str(Path(path).relative_to(real_ct.resolve())): row["reason"] for path, row in rows.items()}
    assert reasons["reformats/A002304_coronal_19001231-076.dcm"] == "not axial: coronal"
    assert reasons["reformats/A002304_sagittal_19001231-080.dcm"] == "not axial: sagittal"
    assert reasons["odd/real/MR_small.dcm"] == "not a CT image: MR Image Storage"
    assert reasons["odd/real/MR_truncated.dcm"] == "not a CT image: MR Image Storage"
    assert reasons["odd/real/rtdose.dcm"] == "not a CT image: RT Dose Storage"
    assert reasons["odd/real/DICOMDIR"] == "DICOMDIR"
    assert reasons["odd/real/no_meta.dcm"] == reasons["odd/derived/notes.dcm"] == "not a DICOM file"
    assert reasons["odd/derived/empty.dcm"] == "empty file"
    assert reasons["odd/derived/localizer_flag.dcm"] == "localizer"
    assert reasons["odd/derived/no_rescale.dcm"] == "no RescaleSlope or RescaleIntercept: HU unknown"
    assert reasons["odd/derived/truncated_pixeldata.dcm"] == "pixel data length does not fit Rows x Columns"
    assert reasons["odd/derived/cut_file.dcm"] == "file is cut: pixel data shorter than it says"
    assert Counter(row["kind"] for row in rows.values())["duplicate"] == 3  # one slice in four encodings


@pytest.mark.real_ct
def test_stored_slices_are_the_truth_clipped_and_padding_is_air(real_ct, prepared):
    root, report = prepared
    index, store = SliceIndex.load(report.index_csv), SliceStore(root / "store")
    assert len(index) == report.slices_written == 1045  # 1,041 axial slices of the truth, 4 odd ones
    for i in range(0, len(index), 7):
        source = explain(root, str(index.slice_id[i]))
        pixels = store.read(index.series_name(i), index.row[i])
        np.testing.assert_array_equal(pixels, np.clip(read_hu(source["path"]), -1024, 3071))
        assert store.verify(index.series_name(i), index.row[i], index.checksum[i])
    for code in range(len(index.series_names)):
        one = index.select(index.series == code)
        assert (np.diff(one.z_mm) > 0).all()


@pytest.mark.real_ct
def test_odd_files_that_share_series_uids_with_other_patients_merge_with_nothing(real_ct, prepared):
    _, report = prepared
    index = SliceIndex.load(report.index_csv)
    counts = sorted(Counter(index.series.tolist()).values(), reverse=True)
    assert counts == [158, 154, 148, 143, 140, 136, 117, 30, 4, 2, *[1] * 13]
    assert len(index.patient_names) == 14 + 3  # the derived files with slices, CT_small and the chest of four encodings


@pytest.mark.real_ct
def test_real_patients_with_two_series_stand_on_one_side(prepared):
    _, report = prepared
    index = SliceIndex.load(report.index_csv)
    train, val = SplitManifest.load(report.split_manifest).masks(index)
    series = {p: len(np.unique(index.series[index.patient == p])) for p in np.unique(index.patient)}
    assert sum(count == 2 for count in series.values()) == 6
    assert not set(index.patient[train]) & set(index.patient[val])
    assert train.sum() + val.sum() == 1045


def test_every_file_that_pydicom_ships_is_a_slice_or_a_row(tmp_path):
    folder = Path(pydicom.data.__file__).parent
    report = prepare_dataset([folder], tmp_path / "root", PrepareOptions(2, max_reject_fraction=1.0))
    with open(tmp_path / "root" / "_index" / "rejects.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert (
        report.files_seen == sum(path.is_file() for path in folder.rglob("*")) == report.files_with_slices + len(rows)
    )
    assert report.files_with_slices >= 2
