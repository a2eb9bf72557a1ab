"""What reading costs: a slice, a crop, the index of a data set as large as LIDC-IDRI, a loader worker.

    python scripts/bench/store.py [--source FOLDER] [--slices 400] [--reads 2000] [--rows 244000] [--index-only]

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

from dinoct.data.columns import columns_path
from dinoct.data.dataset import sample_order
from dinoct.data.index import COLUMNS, SliceIndex, write_csv
from dinoct.data.pipeline import PrepareOptions, prepare_dataset
from dinoct.data.store import SliceStore

CROP = 224
# What a loader worker holds of its own (what is mapped is shared by all). Started afresh, as if nothing were inherited;
# most of the imports is torch's libraries. A training set of nine tenths, the order of an epoch, and 1,000 samples.
WORKER = """
import sys
from pathlib import Path
import numpy as np
import torch.utils.data
from dinoct.data.dataset import SliceViews, sample_order
from dinoct.data.index import SliceIndex

def own():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = own()
index = SliceIndex.load(Path(sys.argv[1]))
index = index.select(np.arange(len(index)) % 10 > 0)
loaded = own()
order = sample_order(0, 0, len(index))
for i in order[:1000].tolist():
    index.series_name(i), index.at("row", i), index.at("spacing_row_mm", i)
print(before, loaded, own())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--reads", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=244_000, help="of the invented index; the default is LIDC-IDRI's")
    parser.add_argument("--index-only", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, source_folder(args.source) as source:
        rows = []
        if not args.index_only:
            files = slice_files(source)
            rows = reads(files[:: max(1, len(files) // args.slices)][: args.slices], Path(scratch), args.reads)
        rows += index_rows(Path(scratch), args.rows)
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


def index_rows(scratch: Path, count: int) -> list[list[str]]:
    """An invented index: patients of about 242 slices, as in LIDC-IDRI."""
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
            f"{i * 7919 % 2**32:08x}",
        )
        for i in range(count)
    )
    write_csv(path, list(COLUMNS), rows)
    read, index = seconds(lambda: SliceIndex.load(path))
    saved, _ = seconds(lambda: index.save_columns(path))
    del index
    mapped, index = seconds(lambda: SliceIndex.load(path))
    hashed, _ = seconds(index.content_hash)
    ordered, _ = seconds(lambda: sample_order(0, 0, count))
    result = subprocess.run([sys.executable, "-c", WORKER, path], capture_output=True, text=True, check=True)
    before, loaded, after = map(float, result.stdout.split())
    what = f"index of {count:,} rows"
    sizes = [found.stat().st_size / 1e6 for found in (path, columns_path(path))]
    return [
        [f"{what}: index.csv, {sizes[0]:.0f} MB, read", f"{read:.2f} s"],
        ["its columns written as index.npy", f"{saved:.2f} s, {sizes[1]:.0f} MB"],
        ["index.npy checked and mapped", f"{mapped:.2f} s"],
        ["its content hash, once per run", f"{hashed:.2f} s"],
        ["the order of an epoch, once per worker and epoch", f"{ordered:.2f} s"],
        ["a loader worker's own memory: imports", f"{before:.0f} MiB"],
        ["... and the index, with the rows of a split", f"{loaded - before:+.0f} MiB"],
        ["... and an epoch's order and 1,000 samples", f"{after - before:+.0f} MiB"],
    ]


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
