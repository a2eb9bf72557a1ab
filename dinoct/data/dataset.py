"""Index rows to batches of views. Order and augmentation are pure functions of (seed, position)."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dinoct.config import DataConfig
from dinoct.data.batch import collate
from dinoct.data.index import SliceIndex
from dinoct.data.splits import SplitManifest, default_split
from dinoct.data.store import SliceStore, checksum
from dinoct.data.views import ViewMaker, letterbox
from dinoct.errors import ConfigError, DinoctError

WORKER_GRACE_S = 60  # a loader worker lives on behind a SIGTERM, so that the parent can finish its step

# A preset names workers for its own machine; what was chosen is printed, and torch need not say it again.
warnings.filterwarnings("ignore", message="This DataLoader will create")


def data_paths(data: DataConfig) -> tuple[Path, Path, Path]:
    """Index, split manifest and store of a data config.

    Without a root the store is found relative to the index.

    Raises:
        ConfigError: naming the key, where nothing is given or a file is not there.
    """
    if data.root is None and data.index_csv is None:
        raise ConfigError("data.root is needed: the folder that dinoct-prepare wrote")
    root = Path(data.root) if data.root else Path(data.index_csv).absolute().parent.parent
    index = Path(data.index_csv) if data.index_csv else root / "_index" / "index.csv"
    split = Path(data.split_manifest) if data.split_manifest else default_split(root / "_splits", data.split_seed)
    if not index.is_file():
        key = "data.index_csv" if data.index_csv else "data.root"
        above = [place for place in root.absolute().parents if (place / "_index" / "index.csv").is_file()]
        cure = f"run dinoct-prepare source=... data.root={root}, or give the {key}=... that has one"
        cure = f"data.root={above[0]} has one" if above else cure
        raise ConfigError(f"{key}: there is no index at {index.absolute()}; {cure}")
    if not split.is_file():
        have = ", ".join(sorted(path.name for path in split.parent.glob("*.json"))) or "none"
        raise ConfigError(f"data.split_manifest: there is no split manifest at {split} (there: {have})")
    return index, split, index.absolute().parent.parent / "store"


def open_split(data: DataConfig) -> tuple[SliceIndex, SliceIndex, SliceStore, SplitManifest]:
    """Training rows, validation rows, store and manifest; patients of the two sides are disjoint.

    Raises:
        ConfigError: where a file is missing or a side is empty.
    """
    index_csv, split_json, store = data_paths(data)
    index, manifest = SliceIndex.load(index_csv), SplitManifest.load(split_json)
    train, val = manifest.masks(index)
    for side, mask in (("training", train), ("validation", val)):
        if not mask.any():
            raise ConfigError(f"data.split_manifest: {split_json} leaves no slice for {side}")
    return index.select(train), index.select(val), SliceStore(store), manifest


def read_slice(index: SliceIndex, store: SliceStore, i: int) -> np.ndarray:
    """Slice i as square ``[N, N]`` int16 HU.

    Raises:
        DinoctError: where the store holds something else in its place. `dinoct-prepare` may have changed the series
            since the index was loaded, and Blosc2 notices no flipped bit; the checksum costs a hundredth of the read.
    """
    series, row = index.series_name(i), index.at("row", i)
    try:
        hu = store.read(series, row)
        fits = checksum(hu) == index.at("checksum", i)
    except IndexError:
        fits = False
    if not fits:
        raise DinoctError(
            f"row {row} of series {series} in the store is not the slice that the index had: dinoct-prepare changed it "
            "since (go on with resume=auto, or start again), or it is damaged (dinoct-doctor verify=true)"
        )
    return letterbox(hu, (index.at("spacing_row_mm", i), index.at("spacing_col_mm", i)))


def middle_slice(index: SliceIndex) -> int:
    """Row of the middle slice of the first series: the one that is drawn where none is named."""
    rows = np.flatnonzero(index.series == index.series[0])
    return int(rows[len(rows) // 2])


def sample_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order of the n slices in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class SliceViews(Dataset):
    """Item p is the p-th sample of the endless stream of epochs."""

    def __init__(self, index: SliceIndex, store: SliceStore, views: ViewMaker, *, seed: int):
        self.index, self.store, self.views, self.seed = index, store, views, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def slice_at(self, position: int) -> tuple[int, int]:
        """(epoch, row of the index) at a position of the stream."""
        epoch, offset = divmod(position, len(self.index))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, sample_order(self.seed, epoch, len(self.index)))
        return epoch, int(self._order[1][offset])

    def __getitem__(self, position: int) -> dict:
        epoch, i = self.slice_at(position)
        rng = np.random.default_rng([self.seed, epoch, i, 1])  # the 1 keeps it apart from the order's generator
        spacing = min(self.index.at("spacing_row_mm", i), self.index.at("spacing_col_mm", i))  # after the letterbox
        item = self.views(read_slice(self.index, self.store, i), rng, spacing)
        return item | {"group": self.index.at("series", i), "position": position}


class StreamSampler(Sampler[list[int]]):
    """Consecutive positions in micro-batches, endlessly, from any position on.

    Of several ranks each takes its share of every micro-batch: N ranks with B slices read what one reads with N x B.
    """

    def __init__(self, *, start: int, batch_size: int, rank: int = 0, world: int = 1):
        self.start, self.batch_size, self.rank, self.world = start, batch_size, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start + self.rank * self.batch_size
        while True:
            yield list(range(position, position + self.batch_size))
            position += self.world * self.batch_size


def train_loader(
    dataset: SliceViews,
    *,
    start: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Micro-batches from position `start` on; of several ranks, this rank's share.

    The loader has a random generator of its own: creating its iterator draws from the global one otherwise, and a
    resumed run would differ from an uninterrupted one.
    """
    return DataLoader(
        dataset,
        batch_sampler=StreamSampler(start=start, batch_size=batch_size, rank=rank, world=world),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),
        persistent_workers=False,
        prefetch_factor=4 if num_workers else None,
    )


def start_worker(_: int) -> None:
    """Settle a loader worker: signals are the parent's business, one thread is enough, and none outlives the run."""
    import signal
    from multiprocessing import parent_process
    from threading import Thread

    import cv2

    # torch looks whether the process above has changed, which is a fork server's where workers come from one (the
    # default from Python 3.14 on): of a run that is killed all would stay.
    Thread(target=_end_with, args=(parent_process().sentinel,), daemon=True).start()
    # Ctrl+C, a hang-up and Slurm's SIGTERM reach every process of a group; the parent alone decides when to stop, and a
    # worker that died first would end its step. torch ends stragglers by SIGTERM, so it does end a worker, later.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a launcher's handler is inherited: requeueing is not a worker's
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _end_with(run: int) -> None:
    from multiprocessing.connection import wait

    wait([run])
    os._exit(1)
