"""What reading costs: a slice, a crop, the index of a data set as large as LIDC-IDRI, a loader worker.

    python scripts/bench/store.py [--source FOLDER] [--slices 400] [--reads 2000]

Slices of the source (default: ../shared/ct where it is, else a phantom) are prepared and read in random order, beside
the same slices as one memory-mapped npy. Everything is in the page cache: the cost of the format, not of a disk.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import add_source, print_table, slice_files, source_folder

from dinoct.data.index import COLUMNS, SliceIndex, write_csv
from dinoct.data.pipeline import PrepareOptions, prepare_dataset
from dinoct.data.store import SliceStore

CROP = 224
ROWS = 244_000

# What a loader worker holds. Started afresh, so that nothing is shared; most of the imports is torch's libraries.
WORKER = """
import sys
from pathlib import Path
import numpy as np
import torch.utils.data
from dinoct.data.dataset import SliceViews
from dinoct.data.index import SliceIndex

def rss(field="VmRSS"):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))

before = rss()
index = SliceIndex.load(Path(sys.argv[1]))
index.content_hash()
print(before, rss(), rss("VmHWM"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--reads", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, source_folder(args.source) as source:
        files = slice_files(source)
        rows = reads(files[:: max(1, len(files) // args.slices)][: args.slices], Path(scratch), args.reads)
        rows += index_rows(Path(scratch))
    print_table(["what", "figure"], rows)


def reads(files: list[Path], scratch: Path, count: int) -> list[list[str]]:
    folder = scratch / "in"
    folder.mkdir()
    for i, path in enumerate(files):
        (folder / f"{i:06d}").symlink_to(path.resolve())
    root = scratch / "root"
    report = prepare_dataset([folder], root, PrepareOptions(0, max_reject_fraction=1.0))
    index, store = SliceIndex.load(report.index_csv), SliceStore(root / "store")
    n = len(index)
    stack = np.lib.format.open_memmap(scratch / "all.npy", mode="w+", dtype="<i2", shape=(n, 512, 512))
    for i in range(n):
        stack[i] = store.read(index.series_name(i), int(index.row[i]))
    stack.flush()
    mapped = np.load(scratch / "all.npy", mmap_mode="r")
    rng = np.random.default_rng(0)
    order = rng.integers(n, size=count).tolist()
    corners = rng.integers(512 - CROP, size=(count, 2)).tolist()
    places = [(index.series_name(i), int(index.row[i])) for i in range(n)]

    def window(k: int) -> tuple[slice, slice]:
        return slice(corners[k][0], corners[k][0] + CROP), slice(corners[k][1], corners[k][1] + CROP)

    timed = {
        "store, whole slice": lambda k: store.read(*places[order[k]]),
        f"store, {CROP} x {CROP} crop": lambda k: store.read(*places[order[k]], window(k)),
        "npy memmap, whole slice": lambda k: np.array(mapped[order[k]]),
        f"npy memmap, {CROP} x {CROP} crop": lambda k: np.array(mapped[order[k]][window(k)]),
    }
    rows = [[name, f"{milliseconds(read, count):.2f} ms"] for name, read in timed.items()]
    size = sum(path.stat().st_size for path in (root / "store").iterdir()) / n / 1024
    return [*rows, ["store, per slice of 512 x 512", f"{size:.0f} KiB"], ["npy, per slice", "512 KiB"]]


def milliseconds(read: Callable[[int], np.ndarray], count: int) -> float:
    """Return the median milliseconds of one read, after a first round that opens the handles."""
    times = np.empty(count)
    for k in (*range(count), *range(count)):
        start = time.perf_counter()
        read(k)
        times[k] = time.perf_counter() - start
    return float(np.median(times)) * 1000


def index_rows(scratch: Path) -> list[list[str]]:
    """An invented index of the size of LIDC-IDRI: 1,010 patients of about 242 slices."""
    path = scratch / "index.csv"
    cells = (512, 512, 0.703125, 0.703125, 2.5, "GE MEDICAL SYSTEMS", "STANDARD", 0, 0.3712, -712.35)
    rows = (
        (
            f"{i:016x}",
            f"{i // 242:016x}",
            f"{i // 242:016x}",
            i % 242,
            -300 + 2.5 * (i % 242),
            *cells,
            f"{i * 7919:08x}",
        )
        for i in range(ROWS)
    )
    write_csv(path, list(COLUMNS), rows)
    start = time.perf_counter()
    index = SliceIndex.load(path)
    seconds = time.perf_counter() - start
    arrays = sum(getattr(index, name).nbytes for name in COLUMNS) / 1e6
    result = subprocess.run([sys.executable, "-c", WORKER, path], capture_output=True, text=True, check=True)
    before, after, peak = map(float, result.stdout.split())
    return [
        [f"index of {ROWS:,} rows, loading", f"{seconds:.2f} s"],
        ["its columns in memory", f"{arrays:.0f} MB"],
        ["a loader worker with the imports alone", f"{before:.0f} MiB"],
        ["a loader worker with the index", f"{after:.0f} MiB (+{after - before:.0f}; peak while loading {peak:.0f})"],
    ]


if __name__ == "__main__":
    main()
