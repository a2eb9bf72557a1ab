"""The slice store: what is written is read, in part and in whole, and damage shows."""

import multiprocessing
import os
import pickle
import subprocess
import sys

import blosc2
import numpy as np
import pytest

from dinoct.data.store import SeriesWriter, SliceStore, checksum, remove_series_except
from dinoct.durable import sweep
from dinoct.errors import DinoctError


def stack(shape, slices=4):
    rng = np.random.default_rng(0)
    return rng.integers(-1024, 3072, (slices, *shape)).astype(np.int16)


def write(folder, name, pixels, announced=None):
    writer = SeriesWriter(folder, name, slices=announced or len(pixels), rows=pixels.shape[1], cols=pixels.shape[2])
    for one in pixels:
        writer.append(one)
    writer.commit()


@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (100, 70), (600, 640)])
def test_slices_and_windows_come_back_as_written(tmp_path, shape):
    pixels = stack(shape)
    write(tmp_path, "a", pixels)
    store = SliceStore(tmp_path)
    assert store.slices("a") == 4
    for row in (3, 0, 2):
        np.testing.assert_array_equal(store.read("a", row), pixels[row])
        window = (slice(7, 51), slice(13, 60))
        part = store.read("a", row, window)
        np.testing.assert_array_equal(part, pixels[row][window])
        assert part.dtype == np.int16


def test_layout_is_one_slice_per_chunk_in_blocks_of_128_by_512(tmp_path):
    write(tmp_path, "a", stack((512, 512)))
    array = blosc2.open(str(tmp_path / "a.b2nd"), mode="r")
    assert array.chunks == (1, 512, 512)
    assert array.blocks == (1, 128, 512)
    assert array.dtype == np.int16


def test_a_series_with_fewer_slices_than_announced_is_shortened(tmp_path):
    pixels = stack((64, 64))
    write(tmp_path, "a", pixels, announced=7)
    store = SliceStore(tmp_path)
    assert store.slices("a") == 4
    np.testing.assert_array_equal(store.read("a", 3), pixels[3])
    for row in (4, -1):
        with pytest.raises(IndexError):
            store.read("a", row)


def test_nothing_is_visible_before_commit_and_nothing_stays_after_abort(tmp_path):
    writer = SeriesWriter(tmp_path, "a", slices=2, rows=64, cols=64)
    writer.append(stack((64, 64))[0])
    assert not (tmp_path / "a.b2nd").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_what_a_killed_run_left_and_series_no_longer_wanted(tmp_path):
    writer = SeriesWriter(tmp_path, "killed", slices=2, rows=64, cols=64)
    writer.append(stack((64, 64))[0])
    for name in ("a", "b"):
        write(tmp_path, name, stack((64, 64)))
    sweep(tmp_path)
    remove_series_except(tmp_path, {"a"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.b2nd"]


FAILED_WRITE = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from dinoct.data.store import SeriesWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = SeriesWriter(Path(sys.argv[1]), "a", slices=4, rows=512, cols=512)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))  # a write that fails for real, without filling a disk
try:
    writer.append(np.random.default_rng(0).integers(-1000, 1000, (512, 512)).astype(np.int16))
except OSError as error:
    print(error.strerror)
"""


def test_a_write_that_fails_is_an_error_of_the_disk(tmp_path):
    result = subprocess.run([sys.executable, "-c", FAILED_WRITE, tmp_path], capture_output=True, text=True, check=True)
    assert result.stdout == "Input/output error\n"


def test_a_full_disk_is_named_as_such(tmp_path, monkeypatch):
    class Full:
        @property
        def schunk(self):
            raise RuntimeError("Could not update")

    writer = SeriesWriter(tmp_path, "a", slices=2, rows=128, cols=512)
    writer._array = Full()
    full = os.statvfs_result((4096, 4096, 1000, 0, 16, 0, 0, 0, 0, 255))
    monkeypatch.setattr("dinoct.data.store.os.statvfs", lambda _: full)
    with pytest.raises(OSError, match="No space left on device"):
        writer.append(stack((128, 512))[0])


def test_a_flipped_bit_is_noticed_by_the_checksum(tmp_path):
    pixels = stack((64, 64))
    write(tmp_path, "a", pixels)
    sums = [checksum(one) for one in pixels]
    assert all(SliceStore(tmp_path).verify("a", row, sums[row]) for row in range(4))
    data = bytearray((tmp_path / "a.b2nd").read_bytes())
    data[len(data) // 2] ^= 0x10
    (tmp_path / "a.b2nd").write_bytes(data)
    assert not all(SliceStore(tmp_path).verify("a", row, sums[row]) for row in range(4))


def test_damage_and_absence_are_one_line_errors(tmp_path):
    write(tmp_path, "a", stack((64, 64)))
    data = (tmp_path / "a.b2nd").read_bytes()
    (tmp_path / "a.b2nd").write_bytes(data[: len(data) // 2])
    for name in ("a", "absent", "../a", "/etc/passwd"):
        with pytest.raises(DinoctError) as caught:
            SliceStore(tmp_path).read(name, 0)
        assert "\n" not in str(caught.value)


def _read_in_child(store, pixels, queue):
    queue.put(bool((store.read("a", 1) == pixels[1]).all()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_used_in_the_parent_works_in_loader_processes(tmp_path, method):
    pixels = stack((512, 512))
    write(tmp_path, "a", pixels)
    store = SliceStore(tmp_path)
    store.read("a", 0)  # a fork after Blosc2 has started threads would hang here
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, pixels, queue), daemon=True)
    child.start()
    assert queue.get(timeout=30)
    child.join(10)


def test_pickling_a_store_carries_no_open_handles(tmp_path):
    pixels = stack((64, 64))
    write(tmp_path, "a", pixels)
    store = SliceStore(tmp_path)
    store.read("a", 0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read("a", 2), pixels[2])
