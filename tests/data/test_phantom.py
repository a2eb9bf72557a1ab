"""The invented CT set is reproducible, valid DICOM and looks like a chest to a program."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_rescale
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless

from dinoct.data.phantom import PhantomSpec, phantom_volume, write_phantom

SPEC = PhantomSpec(patients=4, slices=3, size=64, seed=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("phantom")
    return folder, write_phantom(folder, SPEC)


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return phantom_volume(0, PhantomSpec(slices=40, size=96))[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def series_of(paths: list[Path]) -> dict[Path, list[pydicom.Dataset]]:
    """Datasets by folder, each from feet to head."""
    found: dict[Path, list[pydicom.Dataset]] = {}
    for path in paths:
        found.setdefault(path.parent, []).append(pydicom.dcmread(path))
    return {folder: sorted(all_, key=lambda ds: ds.ImagePositionPatient[2]) for folder, all_ in found.items()}


def test_same_spec_gives_same_bytes_and_another_seed_does_not(written, tmp_path):
    write_phantom(tmp_path / "again", SPEC)
    write_phantom(tmp_path / "other", PhantomSpec(patients=1, slices=1, size=64, seed=4))
    assert contents(tmp_path / "again") == contents(written[0])
    assert not set(contents(tmp_path / "other").values()) & set(contents(written[0]).values())


def test_larger_set_contains_the_smaller_one(written, tmp_path):
    write_phantom(tmp_path, PhantomSpec(patients=2, slices=3, size=64, seed=3))
    assert contents(tmp_path).items() < contents(written[0]).items()


def test_returned_paths_are_the_files_and_progress_counts_them(tmp_path):
    calls: list[int] = []
    paths = write_phantom(tmp_path, PhantomSpec(patients=1, slices=2, size=32), progress=calls.append)
    assert calls == [1, 2, 3, 4]
    assert sorted(paths) == sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert {len(p.relative_to(tmp_path).parts) for p in paths} == {4}


@pytest.mark.parametrize("patient", range(SPEC.patients))
def test_files_hold_the_volume(written, patient):
    mine = [p for p in written[1] if f"PHANTOM-{patient:03d}" in p.parts]
    for number, datasets in enumerate(series_of(mine).values()):
        expected, info = phantom_volume(patient, SPEC, series=datasets[0].SeriesNumber - 1)
        assert number < 2
        for k, ds in enumerate(datasets):
            hu = apply_rescale(ds.pixel_array, ds)
            np.testing.assert_array_equal(np.clip(hu, -1024, 3071), expected[k])
            np.testing.assert_allclose(ds.ImagePositionPatient, info["positions"][k])
            assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == CTImageStorage
            assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
            assert ds.ImageType == ["ORIGINAL", "PRIMARY", "AXIAL"]
            assert (ds.ConvolutionKernel, ds.Manufacturer) == (info["kernel"], info["vendor"])
            assert "PHANTOM" in ds.PatientID
            if "PixelPaddingValue" in ds:
                assert ds.pixel_array[0, 0] == ds.PixelPaddingValue < -1024
                assert ds.pixel_array[32, 32] != ds.PixelPaddingValue


def test_set_covers_what_readers_stumble_over(written):
    datasets = [ds for all_ in series_of(written[1]).values() for ds in all_]
    assert {ds.file_meta.TransferSyntaxUID for ds in datasets} == {ExplicitVRLittleEndian, RLELossless}
    assert {(ds.PixelRepresentation, int(ds.RescaleIntercept)) for ds in datasets} == {(0, -1024), (1, -1024), (1, 0)}
    assert {ds.BitsStored for ds in datasets} == {12, 16}
    assert any("PixelPaddingValue" in ds for ds in datasets)
    assert {path.suffix for path in written[1]} == {"", ".dcm"}
    assert len({ds.SOPInstanceUID for ds in datasets}) == len(datasets)


def test_instance_numbers_do_not_always_follow_z(tmp_path):
    all_ = series_of(write_phantom(tmp_path, PhantomSpec(patients=2, slices=12, size=16))).values()
    ordered = [np.all(np.diff([ds.InstanceNumber for ds in datasets]) == 1) for datasets in all_]
    assert any(ordered)
    assert not all(ordered)
    for datasets in all_:
        assert sorted(ds.InstanceNumber for ds in datasets) == list(range(1, 13))


def test_second_series_is_another_kernel_of_the_same_study(written):
    first, second = (all_[0] for folder, all_ in series_of(written[1]).items() if "PHANTOM-000" in folder.parts)
    assert first.PatientID == second.PatientID
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert first.ConvolutionKernel != second.ConvolutionKernel
    assert correlation(first.pixel_array, second.pixel_array) > 0.9
    studies = {ds[0].PatientID: ds[0].StudyInstanceUID for ds in series_of(written[1]).values()}
    assert len(set(studies.values())) == len(studies) == SPEC.patients


def test_sharp_kernel_is_noisier():
    spec = PhantomSpec(slices=1, size=128)
    grain = {}
    for series in (0, 1):
        volume, info = phantom_volume(0, spec, series=series)
        grain[info["sharp"]] = np.abs(np.diff(volume[0].astype(float))).mean()
    assert grain[True] > 1.5 * grain[False]


@pytest.mark.parametrize("patient", range(4))
def test_hounsfield_units_are_those_of_a_chest(patient):
    volume, _ = phantom_volume(patient, PhantomSpec(slices=8, size=96))
    inner = volume[3:6, 24:72, 12:84]
    assert volume.dtype == np.int16
    assert 0.2 < ((inner > -950) & (inner < -650)).mean() < 0.75  # lung
    assert 0.1 < ((inner > -150) & (inner < 150)).mean() < 0.7  # soft tissue
    assert (volume > 250).mean() > 0.004  # bone
    assert np.median(volume[:, :6, :6]) < -950  # air in a corner
    assert np.median(volume[0, 30:66, 30:66]) > 0  # abdomen


def test_neighbouring_slices_are_alike_and_distant_ones_are_not(volume):
    near = [correlation(volume[k], volume[k + 1]) for k in range(5, 34)]
    far = [correlation(volume[k], volume[k + 12]) for k in range(5, 27)]
    assert min(near) > 0.9
    assert max(far) < min(near)


def test_the_cut_does_not_depend_on_the_number_of_slices():
    one, three = (phantom_volume(1, PhantomSpec(slices=n, size=96))[0] for n in (1, 3))
    assert correlation(one[0], three[1]) > 0.98
    assert correlation(one[0], three[0]) < 0.9


def test_patients_differ():
    middle = [phantom_volume(patient, PhantomSpec(slices=1, size=96))[0][0] for patient in range(4)]
    assert max(correlation(a, b) for i, a in enumerate(middle) for b in middle[:i]) < 0.95
    assert len({phantom_volume(p, SPEC)[1]["pixel_spacing"] for p in range(4)}) == 4


def test_nodules_are_where_the_record_says():
    spec = PhantomSpec(slices=64, size=96)
    volume, info = phantom_volume(4, spec)
    first, pixel = info["positions"][0], info["pixel_spacing"][0]
    x, y, z, radius, hu = max(info["nodules"].tolist(), key=lambda nodule: nodule[3])
    k = np.abs(info["positions"][:, 2] - z).argmin()
    row, col = round((y - first[1]) / pixel), round((x - first[0]) / pixel)
    assert radius > 2
    assert abs(np.median(volume[k, row - 1 : row + 2, col - 1 : col + 2]) - hu) < 250


@pytest.mark.parametrize("wrong", [{"patients": 0}, {"slices": 0}, {"size": 8}, {"seed": -1}, {"two_series_every": -1}])
def test_impossible_spec_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        PhantomSpec(**wrong)


@pytest.mark.parametrize(("patient", "series"), [(-1, 0), (0, 2), (0, -1)])
def test_impossible_series_is_refused(patient, series):
    with pytest.raises(ValueError, match="expected"):
        phantom_volume(patient, SPEC, series=series)
