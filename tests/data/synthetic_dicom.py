"""Small DICOM files for tests, written with pydicom, and jobs that misbehave in a worker."""

import os
import time
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from dinoct.data import jobs
from dinoct.data.files import FileRef

AXIAL = [1, 0, 0, 0, 1, 0]
STUDY, SERIES = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=["series"])


def body(seed: int = 0, shape: tuple[int, int] = (64, 64)) -> np.ndarray:
    """HU of a disc of tissue in air, with noise: int16 [rows, cols]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    disc = (y - shape[0] / 2) ** 2 + (x - shape[1] / 2) ** 2 < (min(shape) / 3) ** 2
    return (np.where(disc, 40, -1000) + rng.integers(-20, 20, shape)).astype(np.int16)


def dataset(hu: np.ndarray | None = None, *, z: float = 0.0, signed: bool = False, **tags: object) -> Dataset:
    """A CT slice whose HU are `hu`; `tags` override or (None) remove elements."""
    hu = body() if hu is None else hu
    intercept = tags.get("RescaleIntercept", 0 if signed else -1024)
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = generate_uid()
    ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "P1", STUDY, SERIES
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Rows, ds.Columns = hu.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, int(signed)
    ds.RescaleSlope, ds.RescaleIntercept = 1, intercept
    ds.ImageOrientationPatient, ds.ImagePositionPatient = AXIAL, [0, 0, z]
    ds.PixelSpacing, ds.SliceThickness = [0.7, 0.7], 2.5
    ds.Manufacturer, ds.ConvolutionKernel = "MAKER", "B30f"
    if intercept is not None:
        stored = hu.astype(np.int32) - int(intercept)
        ds.PixelData = stored.astype(np.int16 if signed else np.uint16).tobytes()
    for name, value in tags.items():
        if value is None:
            if name in ds:
                delattr(ds, name)
        else:
            setattr(ds, name, value)
    return ds


def save(ds: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, ds.get("SOPClassUID", CTImageStorage)
    meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", generate_uid())
    FileDataset(str(path), ds, preamble=b"\0" * 128, file_meta=meta).save_as(path, enforce_file_format=False)
    return path


def write_slice(path: Path, hu: np.ndarray | None = None, **options: object) -> Path:
    return save(dataset(hu, **options), path)


def write_series(
    folder: Path, slices: int, *, patient: str = "P1", series: str = "", seed: int = 0, **tags: object
) -> None:
    """A stack of slices 2.5 mm apart, in files numbered from the head down."""
    uid = generate_uid(entropy_srcs=[patient, series])
    for i in range(slices):
        hu = body(seed + i)
        options = {"PatientID": patient, "SeriesInstanceUID": uid, "StudyInstanceUID": uid} | tags
        sop = generate_uid(entropy_srcs=[patient, series, str(i)])
        write_slice(folder / f"{i:04d}", hu, z=-2.5 * i, SOPInstanceUID=sop, **options)


def enhanced(frames: list[dict], shape: tuple[int, int] = (64, 64)) -> Dataset:
    """A multi-frame CT: each frame has stored (uint16 array), slope, intercept, z and optionally temporal, type."""
    ds = dataset(body(0, shape), NumberOfFrames=len(frames), SOPClassUID=EnhancedCTImageStorage)
    for name in ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(ds, name)
    ds.PixelData = b"".join(frame["stored"].astype(np.uint16).tobytes() for frame in frames)
    shared = Dataset()
    shared.PlaneOrientationSequence = Sequence([item(ImageOrientationPatient=AXIAL)])
    shared.PixelMeasuresSequence = Sequence([item(PixelSpacing=[0.8, 0.8], SliceThickness=1.0)])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for frame in frames:
        group = Dataset()
        group.PlanePositionSequence = Sequence([item(ImagePositionPatient=[0, 0, frame["z"]])])
        if "slope" in frame:
            values = item(RescaleSlope=frame["slope"], RescaleIntercept=frame["intercept"], RescaleType="HU")
            group.PixelValueTransformationSequence = Sequence([values])
        if "temporal" in frame:
            group.FrameContentSequence = Sequence([item(TemporalPositionIndex=frame["temporal"])])
        kind = ["ORIGINAL", "PRIMARY", frame.get("type", "VOLUME"), "NONE"]
        group.CTImageFrameTypeSequence = Sequence([item(FrameType=kind)])
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return ds


def item(**tags: object) -> Dataset:
    ds = Dataset()
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def misbehave(path: str) -> None:
    """Do what the file's name says."""
    name = Path(path).name
    if "hang" in name:
        time.sleep(600)
    if "crash" in name:
        os.abort()
    if "killed" in name:
        os.kill(os.getpid(), 9)
    if "greedy" in name:
        bytearray(2**30)


def scan_misbehaving(files: list[FileRef], step: jobs.StepHook) -> list:
    def hook(i: int) -> None:
        step(i)
        if i >= 0:
            misbehave(files[i].path)

    return jobs.scan_files(files, hook)


def write_misbehaving(job: jobs.SeriesJob, step: jobs.StepHook) -> jobs.SeriesResult:
    def hook(i: int) -> None:
        step(i)
        if i >= 0:
            misbehave(job.sources[i].path)

    return jobs.write_series(job, hook)


def write_to_a_full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")
