"""Invented chest CT as real DICOM series: deterministic, different for every patient, no download needed.

`phantom_volume` gives one series as an array, `write_phantom` writes a set. Nothing in it stems from a person.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from dinoct.data.phantom_body import Plane, grow_patient, plane_at, step
from dinoct.data.phantom_slice import cut

HU_MIN, HU_MAX = -1024, 3071


@dataclass(frozen=True)
class PhantomSpec:
    """How much to generate: `slices` per series, `size` = rows = columns in pixels.

    Patients 0, n, 2n... have a second series with the other kernel, where n = `two_series_every` (0: none has).
    Raises ValueError for counts that make no set.
    """

    patients: int = 12
    slices: int = 24
    size: int = 256
    two_series_every: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.patients, self.slices) < 1 or self.size < 16 or min(self.two_series_every, self.seed) < 0:
            raise ValueError(f"patients, slices >= 1, size >= 16, two_series_every, seed >= 0 expected, got {self}")


class _Vendor(NamedTuple):
    name: str
    kernels: tuple[str, str]  # soft, sharp
    signed: bool
    intercept: int
    padding: int | None = None  # stored value outside a circular field of view


_DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
_VENDORS = (
    _Vendor("SIEMENS", ("B31f", "B70f"), signed=False, intercept=-1024),
    _Vendor("GE MEDICAL SYSTEMS", ("STANDARD", "LUNG"), signed=True, intercept=-1024, padding=-2000),
    _Vendor("Philips", ("B", "L"), signed=False, intercept=-1024),
    _Vendor("TOSHIBA", ("FC08", "FC52"), signed=True, intercept=0),
)


def phantom_volume(patient: int, spec: PhantomSpec, *, series: int = 0) -> tuple[np.ndarray, dict]:
    """One series of one patient, as the files of `write_phantom` hold it.

    Returns int16 HU [slices, size, size] from feet to head, clipped to [HU_MIN, HU_MAX] (padding reads HU_MIN), and a
    dict: patient_id, sex, age, vendor, kernel, sharp, kvp, contrast, pixel_spacing, slice_thickness (mm), positions
    ([slices, 3]: x, y, z in mm of the first pixel's centre), nodules ([N, 5]: x, y, z, radius in mm, HU), signed,
    intercept, padding (stored value or None). It depends on `slices`, `size` and `seed` of the spec, not on
    `patients`, so any patient >= 0 will do. Raises ValueError for a negative patient or a series that is not 0 or 1.
    """
    if patient < 0 or series not in (0, 1):
        raise ValueError(f"patient >= 0 and series 0 or 1 expected, got {patient} and {series}")
    body = grow_patient(spec.seed, patient)
    info = _acquisition(body, patient, spec, series)
    volume = np.empty((spec.slices, spec.size, spec.size), np.int16)
    for k in range(spec.slices):
        plane = plane_at(body, (k + 0.5) * body.length / spec.slices, spec.size, info["slice_thickness"])
        rng = np.random.default_rng((spec.seed, patient, series, k, 7))
        volume[k] = np.clip(np.round(_scan(plane, cut(plane), info["sharp"], rng)), HU_MIN, HU_MAX)
    if info["padding"] is not None:
        volume[:, _outside(spec.size)] = HU_MIN
    return volume, info


def _acquisition(body: SimpleNamespace, patient: int, spec: PhantomSpec, series: int) -> dict:
    rng = np.random.default_rng((spec.seed, patient, 5))
    # Any four patients in a row meet every vendor once, so that even a small set is mixed.
    vendor = _VENDORS[np.random.default_rng((spec.seed, patient // 4, 6)).permutation(4)[patient % 4]]
    sharp = bool(rng.random() < 0.5) ^ bool(series)
    pixel = round(body.fov / spec.size, 6)
    first = np.array(body.centre) - pixel * (spec.size - 1) / 2
    bottom = float(rng.integers(-1400, -200))  # where the scanner's z axis happens to start
    heights = bottom + (np.arange(spec.slices) + 0.5) * body.length / spec.slices
    return {
        "patient_id": f"PHANTOM-{patient:03d}",
        "sex": "F" if body.female else "M",
        "age": int(rng.integers(25, 88)),
        "vendor": vendor.name,
        "kernel": vendor.kernels[sharp],
        "sharp": sharp,
        "kvp": int(rng.choice([100, 120, 120, 140])),
        "contrast": body.contrast > 0,
        "pixel_spacing": (pixel, pixel),
        "slice_thickness": float(rng.choice([1.0, 1.25, 2.0, 3.0, 5.0])),
        "positions": np.round([(*first, z) for z in heights], 3),
        "nodules": body.nodules + np.array([0, 0, bottom, 0, 0]),
        "signed": vendor.signed,
        "intercept": vendor.intercept,
        "padding": vendor.padding,
    }


def _outside(size: int) -> np.ndarray:
    """Pixels [size, size] outside the circle that fits the image."""
    axis = np.arange(size) - (size - 1) / 2
    return np.hypot(axis, axis[:, None]) > size / 2


def _scan(plane: Plane, image: np.ndarray, sharp: bool, rng: np.random.Generator) -> np.ndarray:
    """What a scanner makes of an ideal slice: a soft kernel blurs, a sharp one enhances edges and lets noise pass."""

    def noise() -> np.ndarray:
        return rng.standard_normal(image.shape, np.float32)

    blurred = cv2.GaussianBlur(image, (0, 0), 1.0 / plane.pixel)
    grain = noise()
    smooth = cv2.GaussianBlur(grain, (0, 0), 0.7 if sharp else 1.0)
    grain = grain - 0.7 * smooth if sharp else smooth
    shoulders = step(0.8, 1.0, plane.t)  # so wide that too little light gets through along x: streaks
    streaks = cv2.GaussianBlur(noise(), (0, 0), 12, sigmaY=0.6)
    grain = grain / grain.std() + 0.8 * shoulders * streaks / streaks.std()
    depth = cv2.blur(np.clip(image / 1000 + 1, 0, 1), (len(image) // 6 + 1, len(image) // 6 + 1))
    level = (42 if sharp else 14) * (2.5 / plane.thickness) ** 0.5 * (0.35 + 0.9 * depth) * (1 + 0.6 * shoulders)
    return (image + 0.7 * (image - blurred) if sharp else blurred) + level * grain


def write_phantom(
    folder: Path, spec: PhantomSpec = PhantomSpec(), *, progress: Callable[[int], None] | None = None
) -> list[Path]:
    """Writes the set below `folder` as patient/study/series/file and returns the paths (per series: feet to head).

    The files are uncompressed or RLE lossless (every third patient). The same spec gives the same bytes, and a set with
    more patients contains a smaller one. File names and, for every other patient, instance numbers say nothing about
    the order along z. `progress` is called after each file with the number written. Existing files are overwritten;
    OSError where a file cannot be written.
    """
    paths: list[Path] = []
    for patient in range(spec.patients):
        twice = spec.two_series_every > 0 and patient % spec.two_series_every == 0
        for series in range(1 + twice):
            volume, info = phantom_volume(patient, spec, series=series)
            where = (spec.seed, spec.slices, spec.size, patient)
            home = Path(folder) / info["patient_id"] / _token(*where) / _token(*where, series)
            home.mkdir(parents=True, exist_ok=True)
            numbers = np.arange(1, spec.slices + 1)
            if patient % 2:
                numbers = np.random.default_rng((spec.seed, patient, series, 8)).permutation(numbers)
            for k, hu in enumerate(volume):
                ds = _dataset(info, where, series, k, int(numbers[k]))
                _fill(ds, hu, info, compress=patient % 3 == 1)
                paths.append(home / (_token(*where, series, k) + ("" if patient % 3 == 2 else ".dcm")))
                ds.save_as(paths[-1], enforce_file_format=True)
                if progress is not None:
                    progress(len(paths))
    return paths


def _token(*parts: int) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12].upper()


def _uid(kind: str, *parts: int) -> str:
    return generate_uid(entropy_srcs=["dinoct phantom", kind, repr(parts)])


def _dataset(info: dict, where: tuple[int, ...], series: int, k: int, number: int) -> Dataset:
    """Header of slice k; everything that a writer would fill in from clock or version is fixed."""
    ds, day = Dataset(), "20000101"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = _uid("instance", *where, series, k)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = _uid("implementation")
    ds.file_meta.ImplementationVersionName = "DINOCT_PHANTOM"
    spoken = "".join(_DIGITS[int(digit)] for digit in str(where[-1]))
    for keyword, value in {
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "StudyDate": day, "SeriesDate": day, "ContentDate": day, "StudyTime": "120000", "ContentTime": "120000",
        "AccessionNumber": "", "Modality": "CT", "Manufacturer": info["vendor"], "ReferringPhysicianName": "",
        "StudyDescription": "Phantom chest", "SeriesDescription": f"Phantom chest {info['kernel']}",
        "ManufacturerModelName": "dinoct phantom", "PatientName": f"Phantom^{spoken}",
        "PatientID": info["patient_id"], "PatientBirthDate": "", "PatientSex": info["sex"],
        "PatientAge": f"{info['age']:03d}Y", "BodyPartExamined": "CHEST", "PatientPosition": "HFS",
        "SliceThickness": info["slice_thickness"], "KVP": info["kvp"], "ConvolutionKernel": info["kernel"],
        "StudyInstanceUID": _uid("study", *where), "SeriesInstanceUID": _uid("series", *where, series),
        "FrameOfReferenceUID": _uid("frame", *where), "PositionReferenceIndicator": "", "StudyID": "1",
        "SeriesNumber": series + 1, "AcquisitionNumber": 1, "InstanceNumber": number,
        "ImagePositionPatient": info["positions"][k].tolist(), "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": list(info["pixel_spacing"]), "RescaleIntercept": info["intercept"], "RescaleSlope": 1,
        "RescaleType": "HU", "WindowCenter": -550, "WindowWidth": 1500,
    }.items():  # fmt: skip
        setattr(ds, keyword, value)
    if info["contrast"]:
        ds.ContrastBolusAgent = "PHANTOM"
    return ds


def _fill(ds: Dataset, hu: np.ndarray, info: dict, *, compress: bool) -> None:
    """Puts HU [size, size] into the dataset as the vendor of `info` stores it."""
    stored = (hu.astype(np.int32) - info["intercept"]).astype(np.int16 if info["signed"] else np.uint16)
    if info["padding"] is not None:
        stored[_outside(len(hu))] = info["padding"]
        ds.PixelPaddingValue = info["padding"]
    ds.set_pixel_data(stored, "MONOCHROME2", 16 if info["signed"] else 12, generate_instance_uid=False)
    if compress:
        ds.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
