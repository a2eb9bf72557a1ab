"""The index in its two forms: index.csv, which is the data, and index.npy, its mapped copy. Both read the same."""

import os
import pickle
import random

import numpy as np
import pytest

from dinoct.data.columns import columns_path
from dinoct.data.index import COLUMNS, SliceIndex, write_csv

ROWS = 2000


@pytest.fixture
def index_csv(tmp_path):
    path = tmp_path / "index.csv"
    write_csv(path, list(COLUMNS), [row(i) for i in range(ROWS)])
    return path


def row(i: int, kernel: str = "B30f") -> tuple:
    key = f"{i // 50:016x}"
    thickness = "nan" if i % 7 == 0 else 2.5
    cells = (512, 512, 0.7031 + i % 50 / 1e4, 0.71, thickness, "SIEMENS Ä", kernel, i % 2, 0.37, -712.35)
    return (f"{i:016x}", key, f"{i // 100:016x}", i % 50, -300 + 2.5 * (i % 50), *cells, f"{i * 7919:08x}")


def assert_same(a: SliceIndex, b: SliceIndex) -> None:
    assert len(a) == len(b)
    for name in COLUMNS:
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)
    for name in ("series", "patient", "manufacturer", "kernel"):
        assert getattr(a, f"{name}_names") == getattr(b, f"{name}_names")
    assert a.content_hash() == b.content_hash()


def test_the_mapped_copy_reads_as_the_csv(index_csv):
    slow = SliceIndex.load(index_csv)
    slow.save_columns(index_csv)
    fast = SliceIndex.load(index_csv)
    assert isinstance(fast.z_mm, np.memmap)
    assert not isinstance(slow.z_mm, np.memmap)
    assert_same(slow, fast)
    mask = np.arange(ROWS) % 3 == 0
    for chosen in (mask, np.flatnonzero(mask)[::-1], np.array([], dtype=int)):
        assert_same(slow.select(chosen), fast.select(chosen))
    part, places = fast.select(mask).select(np.array([5, 1])), np.flatnonzero(mask)[[5, 1]]
    assert [part.at("row", i) for i in range(2)] == slow.row[places].tolist()
    assert [part.series_name(i) for i in range(2)] == [slow.series_name(i) for i in places]


def test_another_process_maps_it_again_and_is_sent_next_to_nothing(index_csv):
    SliceIndex.load(index_csv).save_columns(index_csv)
    part = SliceIndex.load(index_csv).select(np.arange(0, ROWS, 2))
    part.content_hash()  # makes columns, which are not sent either
    sent = pickle.dumps(part)
    assert len(sent) < 8 * ROWS
    assert_same(pickle.loads(sent), part)


def test_a_copy_of_another_csv_is_not_taken(index_csv):
    SliceIndex.load(index_csv).save_columns(index_csv)
    times = os.stat(index_csv)
    write_csv(index_csv, list(COLUMNS), [row(i, "B70f") for i in range(ROWS)])  # as long as before
    os.utime(index_csv, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert SliceIndex.load(index_csv).kernel_names == ("B70f",)


def test_a_damaged_copy_is_not_taken(index_csv):
    whole = SliceIndex.load(index_csv)
    whole.save_columns(index_csv)
    path = columns_path(index_csv)
    good = path.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        assert_same(SliceIndex.load(index_csv), whole)
    for length in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert_same(SliceIndex.load(index_csv), whole)
