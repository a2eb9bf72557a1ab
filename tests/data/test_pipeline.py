"""Whole runs of prepare on synthetic files: nothing lost, resumable, isolated, the same whatever interrupts it."""

import csv
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import synthetic_dicom
from commands import run
from synthetic_dicom import body, enhanced, save, write_misbehaving, write_series, write_slice

from dinoct.data import dicom, files, jobs
from dinoct.data.dataset import read_slice
from dinoct.data.index import SliceIndex
from dinoct.data.masks import MaskStore, write_masks
from dinoct.data.pipeline import PrepareError, PrepareOptions, Progress, prepare_dataset
from dinoct.data.privacy import write_salt
from dinoct.data.splits import SplitManifest
from dinoct.data.store import SliceStore
from dinoct.data.walk import find_files
from dinoct.errors import DinoctError

SALT = bytes(range(32))


def rejects(root):
    with open(root / "_index" / "rejects.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def series_table(root):
    with open(root / "_index" / "series.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def prepare(source, root, workers=0, progress=None, **options):
    sources = source if isinstance(source, list) else [source]
    return prepare_dataset(sources, root, PrepareOptions(workers, **options), progress=progress)


def fingerprint(root):
    """Hash every public byte of a data set, so that two roots can be compared."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and "_private" not in path.parts)
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def source(tmp_path):
    """Three patients, one of them with two series; files without extension; a note and a localizer."""
    folder = tmp_path / "in"
    write_series(folder / "a", 5, patient="P1")
    write_series(folder / "b", 4, patient="P2", seed=10)
    write_series(folder / "b2", 3, patient="P2", series="second", seed=20)
    write_series(folder / "c", 2, patient="P3", seed=30)
    write_slice(folder / "c" / "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (folder / "LICENSE").write_text("CC BY")
    return folder


@pytest.fixture
def root(tmp_path):
    write_salt(tmp_path / "root", SALT)
    return tmp_path / "root"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_file_is_a_slice_or_a_row_of_rejects(source, root, workers):
    report = prepare(source, root, workers)
    assert report.files_seen == report.files_with_slices + len(rejects(root)) == 16
    assert report.slices_written == report.slices_new == 14
    assert {(row["kind"], row["reason"]) for row in rejects(root)} == {
        ("not_dicom", "not a DICOM file"),
        ("refused", "localizer"),
    }
    assert report.refused_ct_fraction == pytest.approx(1 / 15)
    index = SliceIndex.load(report.index_csv)
    assert index.content_hash() == report.index_hash
    store = SliceStore(root / "store")
    assert all(store.verify(index.series_name(i), index.row[i], index.checksum[i]) for i in range(len(index)))


def test_the_store_holds_the_pixels_in_order_of_position(source, root):
    report = prepare(source, root)
    index, store = SliceIndex.load(report.index_csv), SliceStore(root / "store")
    name = max(index.series_names, key=store.slices)
    longest = index.select(np.array([index.series_name(i) == name for i in range(len(index))]))
    assert longest.z_mm.tolist() == [-10, -7.5, -5, -2.5, 0]
    for i in range(5):  # files were numbered from the head down
        expected = np.clip(body(4 - i), -1024, 3071)
        np.testing.assert_array_equal(store.read(longest.series_name(i), longest.row[i]), expected)
    pixels = store.read(longest.series_name(0), 0)
    assert longest.hu_mean[0] == pytest.approx(pixels.mean(), abs=0.01)
    assert longest.body_fraction[0] == pytest.approx((pixels > -500).mean(), abs=1e-4)


def test_patients_with_two_series_stand_on_one_side(source, root):
    report = prepare(source, root, val_fraction=0.5)
    index = SliceIndex.load(report.index_csv)
    train, val = SplitManifest.load(report.split_manifest).masks(index)
    assert report.split_manifest.name == "val50_seed0.json"
    assert train.any()
    assert val.any()
    assert set(index.series[train]).isdisjoint(index.series[val])
    assert set(index.patient[train]).isdisjoint(index.patient[val])


def test_the_worker_count_changes_nothing(source, root, tmp_path):
    prepare(source, root, 0)
    write_salt(tmp_path / "other", SALT)
    prepare(source, tmp_path / "other", 2)
    assert fingerprint(root) == fingerprint(tmp_path / "other")


def test_a_second_run_reads_only_what_is_new(source, root):
    first = prepare(source, root)
    before = {path: path.stat().st_mtime_ns for path in (root / "store").iterdir()}
    again = prepare(source, root)
    assert (again.slices_new, again.bytes_in, again.slices_written) == (0, 0, 14)
    assert again.index_hash == first.index_hash
    write_series(source / "d", 2, patient="P4", seed=40)
    third = prepare(source, root)
    assert (third.slices_new, third.slices_written) == (2, 16)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    write_slice(source / "a" / "late", body(99), z=-1.25, PatientID="P1", **same_series(source / "a" / "0000"))
    fourth = prepare(source, root)  # a series that grew is written again, the others are not
    assert (fourth.slices_new, fourth.slices_written) == (6, 17)
    assert sum(path.stat().st_mtime_ns != stamp for path, stamp in before.items()) == 1


def same_series(path):
    from pydicom import dcmread

    ds = dcmread(path, stop_before_pixels=True)
    return {"SeriesInstanceUID": ds.SeriesInstanceUID, "StudyInstanceUID": ds.StudyInstanceUID}


def test_changed_and_vanished_files_are_followed_and_other_sources_stay(source, root, tmp_path):
    prepare(source, root)
    write_series(tmp_path / "in2", 3, patient="P9", seed=50)
    assert prepare(tmp_path / "in2", root).slices_written == 17
    for path in (source / "c").iterdir():
        path.unlink()
    for path in (source / "a").iterdir():
        if path.name > "0002":
            path.unlink()
    report = prepare(source, root)
    assert report.slices_written == 3 + 7 + 3
    assert report.files_seen == 3 + 7 + 3 + 1
    assert len(list((root / "store").iterdir())) == 4  # the series of P3 went
    fresh = tmp_path / "fresh"
    write_salt(fresh, SALT)
    prepare([source, tmp_path / "in2"], fresh)
    assert fingerprint(fresh) == fingerprint(root)


def unreachable(patch, place, code):
    """From here on `place` cannot be listed: as root, permissions would not keep the test out."""
    listdir = os.listdir

    def refuse(path):
        if Path(os.fsdecode(path)) == place:
            raise OSError(code, os.strerror(code), path)
        return listdir(path)

    patch.setattr("dinoct.data.walk.os.listdir", refuse)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_below_a_folder_that_cannot_be_entered_nothing_is_forgotten(source, root, monkeypatch, code):
    before = prepare(source, root)
    with monkeypatch.context() as patch:
        unreachable(patch, source / "b", code)
        (source / "a" / "0000").unlink()
        for _ in range(2):
            report = prepare(source, root)
            assert (report.slices_written, report.files_seen) == (13, 16)
            assert report.rejected[f"folder cannot be entered ({os.strerror(code)})"] == 1
    report = prepare(source, root)
    assert (report.slices_written, report.files_vanished) == (13, 0)
    assert len(rejects(root)) == sum(report.rejected.values()) == 2
    assert before.slices_written == 14


def test_an_archive_that_cannot_be_read_keeps_its_members(source, root, monkeypatch):
    shutil.make_archive(str(source / "packed"), "zip", source / "a")
    shutil.rmtree(source / "a")
    prepare(source, root)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr("dinoct.data.archive.zipfile.ZipFile", refuse)
        report = prepare(source, root)
        assert report.slices_written == 14
        assert report.rejected["archive cannot be read (Input/output error)"] == 1
    assert prepare(source, root).slices_written == 14


def test_a_source_that_is_not_mounted_is_an_error_and_forgets_nothing(source, root, tmp_path):
    write_series(tmp_path / "in2", 3, patient="P9", seed=50)
    both = [tmp_path / "in2", source]
    good = prepare(both, root).index_hash
    source.rename(tmp_path / "away")
    source.mkdir()  # the empty folder that a disk was mounted on
    with pytest.raises(PrepareError, match=r"number 2 of 2 had 16 files .* prepare.forget_missing=true"):
        prepare(both, root)
    report = prepare(tmp_path / "in2", root)
    assert (report.index_hash, report.files_missing, report.files_vanished) == (good, 15, 0)  # in/ itself is there
    source.rmdir()
    (tmp_path / "away").rename(source)
    assert prepare(both, root).slices_new == 0


def test_what_was_deleted_with_its_whole_source_can_be_forgotten(source, root, tmp_path):
    write_series(tmp_path / "in2", 3, patient="P9", seed=50)
    prepare([source, tmp_path / "in2"], root)
    shutil.rmtree(tmp_path / "in2")
    report = prepare(source, root, forget_missing=True)
    assert (report.slices_written, report.files_vanished, report.series_left) == (14, 3, 1)
    (source / "c" / "0000").unlink()
    (source / "c" / "0001").unlink()
    report = prepare(source, root)
    assert (report.files_vanished, report.series_left) == (2, 1)
    shutil.rmtree(source)
    source.mkdir()
    with pytest.raises(PrepareError, match="3 series of earlier runs are still in"):
        prepare(source, root, forget_missing=True)


def test_a_damaged_or_missing_series_of_the_store_is_written_again(source, root):
    prepare(source, root)
    good = fingerprint(root)
    one, two, *_ = sorted((root / "store").iterdir())
    one.unlink()
    two.write_bytes(two.read_bytes()[:-100])
    assert prepare(source, root).slices_new > 0
    assert fingerprint(root) == good


def assert_index_fits_store(root):
    index, store = SliceIndex.load(root / "_index" / "index.csv"), SliceStore(root / "store")
    assert all(store.verify(index.series_name(i), index.row[i], index.checksum[i]) for i in range(len(index)))
    return index


def test_index_and_store_stay_as_they_were_where_a_run_fails(source, root):
    before = prepare(source, root).index_hash
    write_series(source / "d", 2, patient="P4", seed=40)
    (source / "a" / "0002").unlink()
    for _ in range(2):
        with pytest.raises(PrepareError):
            prepare(source, root, max_reject_fraction=0.0)
        assert assert_index_fits_store(root).content_hash() == before
    assert prepare(source, root).slices_new == 0  # what the failed run wrote takes its place
    assert len(assert_index_fits_store(root)) == 15
    assert all(path.suffix == ".b2nd" for path in (root / "store").iterdir())


@pytest.mark.parametrize("opened", [True, False])
def test_a_series_that_changes_under_a_run_is_an_error_and_no_other_slice(source, root, opened):
    index, store = SliceIndex.load(prepare(source, root).index_csv), SliceStore(root / "store")
    grown = max(index.series_names, key=SliceStore(root / "store").slices)
    for i in range(len(index) if opened else 0):
        read_slice(index, store, i)
    write_slice(source / "a" / "late", body(99), z=-3.75, PatientID="P1", **same_series(source / "a" / "0000"))
    prepare(source, root)
    changed = [i for i in range(len(index)) if index.z_mm[i] > -3.75 and index.series_name(i) == grown]
    assert len(changed) == 2  # the slices below the late one are what they were, and so are other series
    for i in range(len(index)):
        with pytest.raises(DinoctError, match="dinoct-prepare changed it") if i in changed else nullcontext():
            read_slice(index, store, i)


def test_slices_of_a_patient_who_is_withdrawn_are_not_read_from_an_open_file(source, root):
    """A run that goes on must not learn from them; it ends as where the disk vanishes."""
    index, store = SliceIndex.load(prepare(source, root).index_csv), SliceStore(root / "store")
    read_slice(index, store, 0)
    (root / "store" / f"{index.series_name(0)}.b2nd").unlink()
    with pytest.raises(DinoctError, match="is not in the store"):
        read_slice(index, store, 1 if index.series_name(1) == index.series_name(0) else 0)


def test_a_split_that_training_does_not_take_says_how_it_is_taken(source, root, capsys):
    typed = [f"source={source}", f"data.root={root}", "prepare.workers=0"]
    assert run("prepare", *typed) == 0
    assert "unless it is told" not in capsys.readouterr().out
    assert run("prepare", *typed, "split.val_fraction=0.5") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "dinoct-train takes val10_seed0.json unless it is told data.split_manifest=" in said


def test_masks_of_slices_that_were_withdrawn_go_with_them(root, tmp_path):
    source = tmp_path / "in"
    for patient in "AB":
        write_series(source / patient, 6, patient=patient, seed=ord(patient))
    prepare(source, root)
    files = sorted(path.name for path in (source / "A").iterdir())
    np.savez(source / "A" / "m.npz", mask=np.ones((6, 64, 64), np.uint8), files=files)
    write_masks(source, root)
    (path,) = (root / "_masks").iterdir()
    for name in files[4:]:
        (source / "A" / name).unlink()
    index = SliceIndex.load(prepare(source, root).index_csv)
    with np.load(path) as masks:
        assert len(masks["slice_id"]) == 4
        assert set(masks["slice_id"]) <= set(index.slice_id)


def test_masks_stay_with_their_slices_when_a_series_grows_and_go_with_it(root, tmp_path):
    source = tmp_path / "in"
    for patient in "AB":
        write_series(source / patient, 6, patient=patient, seed=ord(patient))
    late = source / "A" / "0004"  # a slice in the middle, numbered from the head down
    late.rename(tmp_path / "late")
    prepare(source, root)
    for patient in "AB":
        files = sorted(path.name for path in (source / patient).iterdir())
        mask = np.zeros((len(files), 64, 64), np.uint8)
        for k, name in enumerate(files):
            mask[k, : 10 * (int(name) + 1)] = 1  # a mask knows its file by the rows that it covers
        np.savez(source / patient / "m.npz", mask=mask, files=files)
    (tmp_path / "link").symlink_to(source)
    write_masks(tmp_path / "link", root)  # by whatever way the folder is named
    (tmp_path / "late").rename(late)
    prepare(source, root)
    index, masks = SliceIndex.load(root / "_index" / "index.csv"), MaskStore(root / "_masks")
    covered = {i: int(masks.read(index, i)[:, 0].sum()) // 10 - 1 for i in masks.rows_with_mask(index).tolist()}
    assert len(covered) == 11
    assert all(index.z_mm[i] == -2.5 * number for i, number in covered.items())
    for path in (source / "B").iterdir():
        path.unlink()
    write_series(source / "C", 2, patient="C", seed=99)
    prepare(source, root)
    assert len(list((root / "_masks").iterdir())) == 1


def test_a_moved_source_gives_the_same_data_set(source, root, tmp_path):
    shutil.copytree(source / "a", source / "copies")
    shutil.make_archive(str(source / "packed"), "zip", source / "b")
    shutil.rmtree(source / "b")
    before = prepare(source, root)
    good = fingerprint(root)
    source.rename(tmp_path / "renamed")
    report = prepare(tmp_path / "renamed", root)
    assert (report.files_seen, report.files_vanished, report.series_left) == (21, 21, 0)
    assert (report.index_hash, report.refused_ct_fraction) == (before.index_hash, before.refused_ct_fraction)
    (root / "_index" / "rejects.csv").unlink()  # the keys of files follow from their paths
    good.pop("_index/rejects.csv")
    assert fingerprint(root) == good


def test_a_series_is_not_shortened_because_the_disk_of_its_other_half_is_away(source, root, tmp_path):
    prepare(source, root)
    source.rename(tmp_path / "away")
    write_slice(tmp_path / "late" / "x", body(99), z=9.0, PatientID="P1", **same_series(tmp_path / "away/a/0000"))
    with pytest.raises(PrepareError, match="6 CT files were refused"):
        prepare(tmp_path / "late", root, max_reject_fraction=0.1)
    assert len(assert_index_fits_store(root)) == 14
    (tmp_path / "away").rename(source)
    assert prepare([source, tmp_path / "late"], root).slices_written == 15


def test_files_that_share_a_series_uid_across_patients_are_not_merged(tmp_path, root):
    for i, patient in enumerate("AB"):
        for z in range(2):
            write_slice(tmp_path / "in" / f"{patient}{z}", body(i * 2 + z), z=z, PatientID=patient)
    report = prepare(tmp_path / "in", root)
    index = SliceIndex.load(report.index_csv)
    assert len(index.series_names) == len(index.patient_names) == 2
    assert rejects(root) == []


def test_duplicates_are_dropped_and_named(source, root):
    copy = source / "copies" / "0001"
    copy.parent.mkdir()
    copy.write_bytes((source / "a" / "0001").read_bytes())
    (source / "link").symlink_to(source / "a")  # the same files by another way are no files of their own
    report = prepare([source, source / "a"], root)
    assert report.files_seen == 17
    assert report.slices_written == 14
    assert [row["reason"] for row in rejects(root) if row["kind"] == "duplicate"] == [
        "same position and pixels as another file of the series"
    ]
    assert report.refused_ct_fraction == pytest.approx(1 / 15)


def test_two_phases_become_two_series_and_indistinct_ones_are_refused(tmp_path, root):
    for phase in (1, 2):
        for z in range(3):
            options = {"z": z, "AcquisitionNumber": phase, "PatientID": "split"}
            write_slice(tmp_path / "in" / f"a{phase}{z}", body(phase * 10 + z), **options)
            write_slice(tmp_path / "in" / f"b{phase}{z}", body(phase * 10 + z), z=z, PatientID="mixed")
    write_slice(tmp_path / "in" / "c", PatientID="other")
    report = prepare(tmp_path / "in", root, max_reject_fraction=0.5)
    assert report.rejected == {"two series in one: same position, other pixels, and no tag tells them apart": 6}
    table = series_table(root)
    assert sorted(row["told_apart_by"] for row in table) == ["", "AcquisitionNumber", "AcquisitionNumber"]
    index, store = SliceIndex.load(report.index_csv), SliceStore(root / "store")
    names = [row["series"] for row in table if row["told_apart_by"]]
    assert len({index.patient_name(i) for i in range(len(index)) if index.series_name(i) in names}) == 1
    found = sorted(int(store.read(name, 0)[32, 32]) for name in names)
    assert found == sorted(int(body(phase * 10)[32, 32]) for phase in (1, 2))


def test_blank_slices_at_the_positions_of_good_ones_cost_nothing_but_themselves(source, root):
    for i in range(3):
        blank = np.full((64, 64), -1000, np.int16) + (body(i) + 20_000 if i == 1 else np.int16(0))
        place = {"z": -2.5 * i, "PatientID": "P2", **same_series(source / "b" / "0000")}
        write_slice(source / f"x{i}", blank, **place)
    report = prepare(source, root)
    assert report.slices_written == 14
    assert (report.rejected["constant slice"], report.rejected["values cannot be HU"]) == (2, 1)


def test_a_slice_that_does_not_decode_beside_others_at_its_position_is_refused_alone(source, root):
    for i, z in enumerate((0.0, 0.008, 0.014)):
        hu = body(i)
        hu[0, 0] = 4000 if i == 0 else 0  # more than 12 bits hold
        write_slice(source / f"x{i}", hu, z=z, PatientID="X", BitsStored=12, HighBit=11)
    write_slice(source / "x3", body(9), z=2.5, PatientID="X")
    report = prepare(source, root, max_reject_fraction=0.5)
    assert report.rejected["pixel values do not fit BitsStored"] == 1
    assert report.files_seen == report.files_with_slices + len(rejects(root))


def test_an_enhanced_file_with_two_time_points_is_one_file_and_two_series(tmp_path, root):
    frames = [
        {"stored": body(10 * t + z).astype(np.int32) + 1024, "slope": 1, "intercept": -1024, "z": z, "temporal": t}
        for t in (1, 2)
        for z in (1, 0)
    ]
    save(enhanced(frames), tmp_path / "in" / "multi")
    write_slice(tmp_path / "in" / "single", PatientID="P2")
    report = prepare(tmp_path / "in", root)
    assert (report.files_seen, report.files_with_slices, report.slices_written) == (2, 2, 5)
    assert {row["told_apart_by"] for row in series_table(root)} == {"", "TemporalPositionIndex"}


def test_gaps_and_tilt_and_clipping_are_recorded(tmp_path, root):
    tilted = [1, 0, 0, 0, float(np.cos(np.radians(15))), float(np.sin(np.radians(15)))]
    normal = np.cross(tilted[:3], tilted[3:])
    for i in (0, 1, 2, 5):
        hu = body(i)
        hu[0, :] = 5000
        options = {"ImageOrientationPatient": tilted, "ImagePositionPatient": [round(x, 6) for x in normal * 3.0 * i]}
        write_slice(tmp_path / "in" / str(i), hu, GantryDetectorTilt=15, **options)
    write_slice(tmp_path / "in" / "other", PatientID="P2")
    prepare(tmp_path / "in", root)
    row = next(row for row in series_table(root) if row["slices"] == "4")
    assert (float(row["step_mm"]), float(row["max_step_mm"]), row["gaps"], row["missing_slices"]) == (3, 9, "1", "2")
    assert (float(row["tilt_deg"]), float(row["gantry_tilt_tag_deg"])) == (15, 15)
    assert (row["hu_max_before_clip"], row["clip_min"], row["clip_max"]) == ("5000", "-1024", "3071")


def test_too_many_refusals_fail_with_a_summary_and_no_index(source, root):
    for i in range(8):
        write_slice(source / f"bad{i}", RescaleSlope=None)
    with pytest.raises(PrepareError) as caught:
        prepare(source, root)
    lines = str(caught.value).splitlines()
    assert "prepare.max_reject_fraction=0.25" in lines[0]
    assert "rejects.csv" in lines[0]
    assert lines[1].split(maxsplit=1) == ["8", "no RescaleSlope or RescaleIntercept: HU unknown"]
    assert len(rejects(root)) == 10
    assert not (root / "_index" / "index.csv").exists()
    assert prepare(source, root, max_reject_fraction=0.6).slices_new == 0  # nothing is decoded twice


def test_notes_and_other_modalities_do_not_count_as_refused_ct(source, root):
    for i in range(50):
        (source / f"note{i}.xml").write_text("<xml/>")
        write_slice(source / f"mr{i}", SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="MR")
    assert prepare(source, root).refused_ct_fraction == pytest.approx(1 / 15)


def test_one_patient_is_an_error_that_leaves_the_index(tmp_path, root):
    write_series(tmp_path / "in", 3)
    with pytest.raises(PrepareError, match="needs two patients"):
        prepare(tmp_path / "in", root)
    assert len(SliceIndex.load(root / "_index" / "index.csv")) == 3


@pytest.mark.parametrize("named", [None, ("P2",)])
def test_a_patient_who_is_withdrawn_before_the_last_one_leaves_the_split(tmp_path, root, named):
    for name in ("P1", "P2"):
        write_series(tmp_path / "in" / name, 3, patient=name, seed=ord(name[1]))
    path = prepare(tmp_path / "in", root, val_patients=named).split_manifest
    before = SplitManifest.load(path)
    shutil.rmtree(tmp_path / "in" / "P2")
    with pytest.raises(PrepareError, match="needs two patients"):
        prepare(tmp_path / "in", root)
    (left,) = SliceIndex.load(root / "_index" / "index.csv").patient_names
    after = SplitManifest.load(path)
    assert after.train | after.val == {left}
    assert (left in after.val) == (left in before.val)

    shutil.rmtree(tmp_path / "in" / "P1")
    write_series(tmp_path / "in" / "P3", 3, patient="P3")
    with pytest.raises(PrepareError, match="needs two patients"):
        prepare(tmp_path / "in", root)
    assert not path.exists()
    write_series(tmp_path / "in" / "P4", 3, patient="P4", seed=4)
    assert prepare(tmp_path / "in", root).patients_held_out == 1


def test_a_lost_salt_is_not_replaced(source, root):
    """With another one each patient has another key, and who was trained on cannot be told any more."""
    prepare(source, root)
    kept = (root / "_private" / "salt").read_bytes()
    shutil.rmtree(root / "_private")
    before = fingerprint(root)
    with pytest.raises(PrepareError, match=r"_private/salt is gone.*put the copy of the salt there"):
        prepare(source, root)
    assert fingerprint(root) == before
    write_salt(root, kept)
    prepare(source, root)
    assert fingerprint(root) == before


def test_scans_without_a_patient_are_counted(tmp_path, root):
    for name in "ab":
        write_series(tmp_path / "in" / name, 2, patient="", series=name, seed=ord(name), PatientID=None)
    with pytest.raises(PrepareError, match="two patients; 2 series have no PatientID and count as one"):
        prepare(tmp_path / "in", root)
    write_series(tmp_path / "in" / "c", 2, patient="P1")
    assert prepare(tmp_path / "in", root).series_nameless == 2


def test_a_file_system_without_locks_is_prepared_on(source, root, monkeypatch, capfd, tmp_path):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    with_locks = tmp_path / "with_locks"
    write_salt(with_locks, SALT)
    prepare(source, with_locks)
    for name in ("flock", "lockf"):
        monkeypatch.setattr(f"fcntl.{name}", no_locks)
    prepare(source, root)
    assert "WARNING: the file system of" in " ".join(capfd.readouterr().out.split())
    assert fingerprint(root) == fingerprint(with_locks)


def test_validation_patients_by_raw_id_or_by_key(source, root):
    report = prepare(source, root, val_patients=("P2",))
    (key,) = SplitManifest.load(report.split_manifest).val
    index = SliceIndex.load(report.index_csv)
    assert sum(index.patient_name(i) == key for i in range(len(index))) == 7
    assert SplitManifest.load(prepare(source, root, val_patients=(key,)).split_manifest).val == {key}
    again = prepare(source, root)
    assert (again.named_kept, SplitManifest.load(again.split_manifest).val) == (1, {key})
    assert prepare(source, root, val_patients=()).named_kept == 0
    write_series(source / "C", 2, patient="C", seed=99)
    before = fingerprint(root)
    with pytest.raises(DinoctError, match="1 of the names are not among the 4 patients"):
        prepare(source, root, val_patients=("P2", "Nobody"))
    index, store = "_index/index.csv", {name for name in before if name.startswith("store/")}
    after = fingerprint(root)
    assert {name: after[name] for name in (index, *store)} == {name: before[name] for name in (index, *store)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": -1}, "workers"),
        ({"workers": 0, "max_reject_fraction": 2}, "max_reject_fraction"),
        ({"workers": 0, "hu_min": 100, "hu_max": 0}, "clipped"),
        ({"workers": 0, "file_timeout_s": 0}, "prepare.file_timeout_s"),
        ({"workers": 0, "file_timeout_s": float("nan")}, "prepare.file_timeout_s"),
        ({"workers": 0, "file_timeout_s": float("inf")}, "prepare.file_timeout_s"),
        ({"workers": 0, "val_fraction": 0}, "split.val_fraction"),
    ],
)
def test_impossible_options_name_themselves(options, words):
    with pytest.raises(PrepareError, match=words):
        PrepareOptions(**options)


def test_missing_and_empty_sources_and_a_second_prepare_at_once(tmp_path, root, source):
    with pytest.raises(PrepareError, match="does not exist"):
        prepare(tmp_path / "nowhere", root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrepareError, match="no file"):
        prepare(tmp_path / "empty", root)
    (tmp_path / "empty" / "note").write_text("x")
    with pytest.raises(PrepareError, match="none of the 1 files"):
        prepare(tmp_path / "empty", root)

    def second(_: Progress) -> None:
        with pytest.raises(PrepareError, match="another prepare"):
            prepare(source, root)

    prepare(source, root, progress=second)


def test_the_walk_skips_pipes_loops_and_the_data_set_itself(tmp_path, source):
    os.mkfifo(source / "pipe")
    (source / "loop").symlink_to(source)
    (source / "dangling").symlink_to(tmp_path / "nowhere")
    odd = os.fsencode(source) + b"/caf\xe9"
    Path(os.fsdecode(odd)).write_text("not UTF-8")
    found = [file.path for file in find_files([source])]
    assert len(found) == len(set(found)) == 17
    assert odd in found
    root = source / "root"
    assert prepare(source, root).files_seen == 17
    assert prepare(source, root).files_seen == 17  # the store inside the source is no source


def test_progress_reaches_its_total_in_both_stages(source, root):
    seen: list[Progress] = []
    prepare(source, root, progress=seen.append)
    last = {progress.stage: progress for progress in seen}
    assert (last["scan"].done, last["scan"].total) == (16, 16)
    assert (last["decode"].done, last["decode"].total) == (14, 14)
    assert last["decode"].bytes_out > 0
    assert last["scan"].bytes_in > 14 * 8192


def test_importing_prepare_imports_no_torch():
    code = "import sys, dinoct.data.pipeline, dinoct.data.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- isolation


@pytest.mark.parametrize("job", ["scan_files", "write_series"])
def test_files_that_hang_crash_or_eat_memory_are_rows_and_the_run_goes_on(source, root, monkeypatch, job):
    for name in ("hang", "crash", "killed", "greedy"):
        (source / "a" / f"{name}").write_bytes((source / "a" / "0000").read_bytes())
    place = 100.0
    for path in (source / "a").iterdir():  # positions of their own, or they were duplicates
        if path.name.isalpha():
            place += 2.5
            write_slice(path, body(3), z=place, PatientID="P1", **same_series(source / "a" / "0000"))
    stand_in = {"scan_files": synthetic_dicom.scan_misbehaving, "write_series": write_misbehaving}[job]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, job, stand_in)
        report = prepare(source, root, 2, file_timeout_s=1.0, memory_mb=512, max_reject_fraction=0.5)
    reasons = {row["reason"] for row in rejects(root)} - {"localizer", "not a DICOM file"}
    assert {
        "took longer than 1 s",
        "crashed its decoder (SIGABRT)",
        "killed while it was read (out of memory?)",
    } < reasons
    assert len(reasons) == 4
    assert (report.files_seen, report.slices_written) == (20, 14)
    # What the machine may be to blame for is tried again.
    assert prepare(source, root, 2).slices_written == 18


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), OSError(5, "EIO"), MemoryError()])
@pytest.mark.parametrize("stage", ["dicom.opened", "files.OpenFiles._open"])
def test_what_could_not_be_read_is_read_by_the_next_run(source, root, monkeypatch, stage, fault):
    """A permission that is given, or a disk that answers again, changes neither the time nor the size of a file."""
    module, name = stage.split(".", 1)
    where = {"dicom": dicom, "files": files.OpenFiles}[module]
    real = getattr(where, name.rsplit(".", 1)[-1])

    def failing(*args):
        if "/b2/" in str(args):
            raise fault
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, name.rsplit(".", 1)[-1], failing)
        report = prepare(source, root, max_reject_fraction=0.5)
        assert (report.slices_written, sum(report.rejected.values())) == (11, 5)
    report = prepare(source, root)
    assert (report.slices_written, len(rejects(root))) == (14, 2)


def test_a_slice_to_be_tried_again_costs_its_series_nothing_while_the_disk_is_away(source, root, tmp_path, monkeypatch):
    write_series(tmp_path / "in2", 2, patient="P9", seed=50)
    real = files.OpenFiles._open

    def failing(self, found):
        if found.path.endswith("/a/0003"):
            raise OSError(5, "Input/output error")
        return real(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(files.OpenFiles, "_open", failing)
        assert prepare([source, tmp_path / "in2"], root).slices_written == 15
    source.rename(tmp_path / "away")
    assert prepare(tmp_path / "in2", root).slices_written == 15
    (tmp_path / "away").rename(source)
    assert prepare([source, tmp_path / "in2"], root).slices_written == 16


KILLED = """
import sys
from pathlib import Path
from dinoct.data.pipeline import PrepareOptions, prepare_dataset
if __name__ == "__main__":
    print("started", flush=True)
    prepare_dataset([Path(sys.argv[1])], Path(sys.argv[2]), PrepareOptions(2))
    print("finished", flush=True)
"""


@pytest.fixture
def bigger(tmp_path):
    folder = tmp_path / "bigger"
    for p in range(6):
        write_series(folder / str(p), 30, patient=f"P{p}", seed=100 * p)
    return folder


def start(tmp_path, source, root):
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, script, source, root],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout.readline() == "started\n"
    return process


def leftovers(session):
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def wait_for_no(session, seconds=10.0):
    end = time.monotonic() + seconds
    while leftovers(session) and time.monotonic() < end:
        time.sleep(0.05)
    return leftovers(session)


def kill_at_random(tmp_path, source, times, seed):
    reference, root = tmp_path / "undisturbed", tmp_path / "root"
    for folder in (reference, root):
        write_salt(folder, SALT)
    begin = time.monotonic()
    process = start(tmp_path, source, reference)
    assert process.stdout.readline() == "finished\n"
    span = time.monotonic() - begin
    process.wait(10)
    rng = random.Random(seed)
    for _ in range(times):
        process = start(tmp_path, source, root)
        time.sleep(rng.uniform(0, span))
        process.kill()
        process.wait(10)
        assert wait_for_no(process.pid) == []  # orphans end by themselves
        if rng.random() < 0.3:  # begin anew now and then, or late kills would find the work done
            for path in root.rglob("*"):
                if path.is_file() and path.name != "salt":
                    path.unlink()
    prepare(source, root, 2)
    assert fingerprint(root) == fingerprint(reference)


def test_kill_9_at_random_moments_leaves_the_same_store(tmp_path, bigger):
    kill_at_random(tmp_path, bigger, times=4, seed=1)


@pytest.mark.long
def test_kill_9_at_twenty_random_moments(tmp_path, bigger):
    kill_at_random(tmp_path, bigger, times=20, seed=2)


def test_ctrl_c_ends_the_workers_and_the_next_run_goes_on(tmp_path, bigger, root):
    for _ in range(20):  # on a quick machine the run may be over before the signal comes
        process = start(tmp_path, bigger, root)
        deadline = time.monotonic() + 20
        while len(list((root / "store").glob("*.b2nd"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        process.wait(10)
        if process.returncode != 0:
            break
        shutil.rmtree(root)
    assert process.returncode != 0
    assert wait_for_no(process.pid) == []
    assert not list((root / "store").glob(".*"))
    report = prepare(bigger, root, 2)
    assert report.slices_written == 180
    assert report.slices_new < 180


def test_a_disk_that_fills_under_the_workers_names_its_key(source, root, monkeypatch):
    monkeypatch.setattr(jobs, "write_series", synthetic_dicom.write_to_a_full_disk)
    with pytest.raises(PrepareError, match=r"No space left on device \(free some on the disk of data.root\)"):
        prepare(source, root, 1)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(source, root, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dinoct.data.store.sync", full)
        with pytest.raises(PrepareError, match="No space left on device") as caught:
            prepare(source, root)
        assert "\n" not in str(caught.value)
    assert not list((root / "store").iterdir())
    assert prepare(source, root).slices_written == 14
