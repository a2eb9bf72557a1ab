"""What prepare costs beside a bare pydicom loop over the same files, in one run.

    python scripts/bench/prepare.py [--source FOLDER] [--slices 600] [--copies 1] [--repeats 3]

The single-frame CT of the source (default: ../shared/ct where it is, else a phantom) is written twice, as JPEG-LS and
uncompressed. The bare loop is `dcmread(file).pixel_array` and keeps nothing; prepare also parses strictly, converts to
HU, hashes, compresses and writes. Rows are medians of the repeats, which take turns so that a busy machine hits all.
"""

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import add_source, print_table, slice_files, source_folder
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless

from dinoct.data.pipeline import PrepareOptions, prepare_dataset

BARE = "bare pydicom"
WAYS = {BARE: None, "prepare, in this process": 0, "prepare, 1 worker": 1, "prepare, 2 workers": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--copies", type=int, default=1, help="the same slices under so many names: a longer run")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, source_folder(args.source) as source:
        folders = write_sets(slice_files(source)[: args.slices], Path(scratch), args.copies)
        rows = [row for name, folder in folders.items() for row in compare(name, folder, Path(scratch), args.repeats)]
    header = ["files", "way", "slices", "wall s", "CPU s", "ms/slice", "x bare (wall)", "x bare (CPU)"]
    print_table(header, rows)


def write_sets(files: list[Path], scratch: Path, copies: int) -> dict[str, Path]:
    """Write the files into two folders of the same slices."""
    folders = {"uncompressed": scratch / "plain", "JPEG-LS": scratch / "jpegls"}
    for folder in folders.values():
        folder.mkdir()
    for i, path in enumerate(files):
        ds = dcmread(path)
        if ds.file_meta.TransferSyntaxUID != ExplicitVRLittleEndian:
            ds.decompress()
        patient = ds.PatientID
        for folder in folders.values():
            if folder.name == "jpegls":
                ds.compress(JPEGLSLossless, encoding_plugin="pyjpegls", generate_instance_uid=False)
            for copy in range(copies):
                ds.PatientID = f"{copy}{patient}"
                ds.save_as(folder / f"{copy}-{i:06d}")
    os.sync()
    return folders


def compare(name: str, folder: Path, scratch: Path, repeats: int) -> list[list[object]]:
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    count = sum(1 for _ in folder.iterdir())
    for repeat in range(repeats + 1):
        for i, (way, workers) in enumerate(WAYS.items()):
            root = scratch / f"{name}-{repeat}-{i}"
            measured = measure(lambda root=root, workers=workers: run(folder, root, workers))
            shutil.rmtree(root, ignore_errors=True)
            if repeat:  # the first round fills the caches
                times[way].append(measured)
    middle = {way: tuple(map(statistics.median, zip(*found, strict=True))) for way, found in times.items()}
    bare_wall, bare_cpu = middle[BARE]
    rows = []
    for way, (wall, cpu) in middle.items():
        figures = (wall, cpu, 1000 * wall / count, wall / bare_wall, cpu / bare_cpu)
        rows.append([name, way, count, *(f"{figure:.2f}" for figure in figures)])
    return rows


def run(folder: Path, root: Path, workers: int | None) -> None:
    if workers is None:
        for path in sorted(folder.iterdir()):
            dcmread(path).pixel_array  # noqa: B018  decoding is the work
        return
    prepare_dataset([folder], root, PrepareOptions(workers, max_reject_fraction=1.0))


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Return seconds of wall time and of CPU time, workers included."""

    def cpu() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, kinds))

    before, start = cpu(), time.perf_counter()
    work()
    return time.perf_counter() - start, cpu() - before


if __name__ == "__main__":
    main()
