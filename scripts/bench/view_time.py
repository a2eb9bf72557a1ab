"""Milliseconds for the views of one slice: dinoct, from the store, beside lightly-train's one-channel pipeline.

    pip install lightly-train        # beside dinoct; left out where it is not there
    python scripts/bench/view_time.py [--source FOLDER] [--slices 100] [--rounds 3]

2 views of 224 px and 8 of 96 px of a 512 x 512 slice, one process, one thread, everything in the page cache. dinoct
reads the slice from the store and draws the views of aug=multicrop; what the parts cost is timed apart. lightly-train
gets the slice in memory, windowed to 8 bits already, one channel, with the DINO defaults (crop, flip, jitter, blur,
solarise) at dinoct's sizes. All take turns, slice by slice; the figures are the medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from common import add_source, print_table, slice_files, source_folder
from hydra import compose, initialize_config_module

from dinoct.config import TrainConfig, to_object
from dinoct.data.dataset import SliceViews, read_slice
from dinoct.data.index import SliceIndex
from dinoct.data.pipeline import PrepareOptions, prepare_dataset
from dinoct.data.store import SliceStore
from dinoct.data.views import ViewMaker, sample_view, window

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        settings = to_object(compose("train", overrides=["aug=multicrop", "model.img_size=224", "model.patch=16"]))
    with tempfile.TemporaryDirectory() as scratch, source_folder(args.source) as source:
        files = slice_files(source)
        data = prepared(files[:: max(1, len(files) // args.slices)][: args.slices], Path(scratch), settings)
        ways = entrants(data, settings)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds + 1):  # the first round opens handles and does not count
            for i in range(len(data)):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way(i)
                    times[name].append((time.perf_counter() - start) * 1000)
    rows = [[name, f"{statistics.median(found[len(data) :]):.2f}"] for name, found in times.items()]
    print_table(["views of one slice", "ms"], rows)


def prepared(files: list[Path], scratch: Path, settings: TrainConfig) -> SliceViews:
    """The slices in a store, as training reads them."""
    folder = scratch / "in"
    folder.mkdir()
    for i, path in enumerate(files):
        (folder / f"{i:06d}").symlink_to(path.resolve())
    report = prepare_dataset([folder], scratch / "root", PrepareOptions(0, max_reject_fraction=1.0))
    views = ViewMaker(settings.aug, settings.model, settings.loss.ibot)
    return SliceViews(SliceIndex.load(report.index_csv), SliceStore(scratch / "root" / "store"), views, seed=0)


def entrants(data: SliceViews, settings: TrainConfig) -> dict[str, Callable[[int], object]]:
    """What is timed, by name; each takes the number of a slice."""
    slices = [read_slice(data.index, data.store, i) for i in range(len(data))]
    spec, local = data.views.global_spec, data.views.local_spec

    def draw(i: int) -> None:
        rng = np.random.default_rng(i)
        for _ in range(data.views.global_crops):
            sample_view(rng, spec, slices[i])
        for _ in range(data.views.local_crops):
            sample_view(rng, local, slices[i])

    ways: dict[str, Callable[[int], object]] = {
        "dinoct, from the store": lambda i: data[i],
        "- reading the slice": lambda i: read_slice(data.index, data.store, i),
        "- drawing the boxes and windows": draw,
        "- all views, without the read": lambda i: data.views(slices[i], np.random.default_rng(i)),
    }
    if find_spec("lightly_train"):
        ways["lightly-train, one channel, without the read"] = lightly_train(slices, settings, local.size)
    else:
        print("lightly-train is not installed and is left out: pip install lightly-train")
    return ways


def lightly_train(slices: list[np.ndarray], settings: TrainConfig, local: int) -> Callable[[int], object]:
    """The transform of lightly-train's DINO for one channel, on 8-bit pictures."""
    from lightly_train._methods.dino.dino_transform import DINOTransform, DINOTransformArgs

    size = settings.model.img_size
    args = DINOTransformArgs(image_size=(size, size), num_channels=1, random_gray_scale=None)
    args.normalize.mean, args.normalize.std = (0.5,), (0.25,)
    args.local_view.num_views, args.local_view.view_size = settings.aug.local_crops, (local, local)
    transform = DINOTransform(args)
    pictures = [(255 * window(hu, -1000, 400)).astype(np.uint8)[:, :, None] for hu in slices]
    return lambda i: transform({"image": pictures[i]})


if __name__ == "__main__":
    main()
