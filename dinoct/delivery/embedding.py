"""Features of CT slices, from settings to a table: one row per slice, no path and no name in it.

A source goes through dinoct's own prepare, so that all of its checks hold, and what it refuses is told.
"""

import csv
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinoct.config import EmbedConfig
from dinoct.console import console, progress
from dinoct.data.dataset import read_slice, start_worker
from dinoct.data.index import SliceIndex
from dinoct.data.options import NoSplit, PrepareError
from dinoct.data.pipeline import PrepareOptions, Progress, prepare_dataset
from dinoct.data.sources import require
from dinoct.data.store import SliceStore
from dinoct.delivery.encoder import Encoder, load_encoder
from dinoct.delivery.feature_table import FeatureTable, check_output, write_features
from dinoct.errors import ConfigError
from dinoct.hardware import Hardware, resolve, settle

LINE_EVERY_S = 10.0
Tell = Callable[[str, int, int], None]  # stage, done, total


def embed_slices(cfg: EmbedConfig) -> Path:
    """Encode every slice of `cfg.source`, or of the prepared set at `cfg.data.root`, and write the table `cfg.out`.

    Raises:
        ConfigError, CheckpointError, PrepareError: naming the key to change.
    """
    out = check_output(cfg.out, overwrite=cfg.overwrite)
    sources = find_sources(cfg)
    hardware = resolve(cfg.hardware)
    encoder = load_encoder(cfg.checkpoint)
    settle(hardware)
    started = time.monotonic()
    with ended_by_signals(), prepared(cfg, sources) as root, display() as tell:
        index, store = SliceIndex.load(root / "_index" / "index.csv"), SliceStore(root / "store")
        cls = extract(encoder, index, store, hardware=hardware, tell=tell)
        refused = refused_files(root)
    facts = asdict(encoder.card) | {
        "encoder_file": Path(cfg.checkpoint).name,
        "index_hash": index.content_hash(),
        "precision": "bfloat16 autocast" if hardware.amp else "float32",
        "files_without_slice": dict(refused),
    }
    write_features(FeatureTable.of(index, cls, facts), out)
    series, seconds = len(np.unique(index.series)), time.monotonic() - started
    console.print(f"{len(index)} slices of {series} series in {seconds:.1f} s, {cls.shape[1]} features each")
    console.print(str(out), markup=False)
    return out


def find_sources(cfg: EmbedConfig) -> list[Path]:
    """The folders to read; none where `data.root` is prepared already.

    Raises:
        ConfigError: for a source that is not there (its path may hold a name, so its number is told), for neither a
            source nor a data root, and for a source that would be mixed into a prepared set.
    """
    root = Path(cfg.data.root) if cfg.data.root else None
    if cfg.source is None:
        if root is None:
            raise ConfigError("source=... is needed, a folder of DICOM; or data.root=..., a prepared set")
        if not index_of(root).is_file():
            raise ConfigError(f"data.root: there is no index at {index_of(root)}; give source=... too, to prepare it")
        return []
    if root is not None and index_of(root).is_file():
        raise ConfigError(
            f"data.root={root} holds a prepared set: leave out source to embed it, add to it with dinoct-prepare, or "
            "take another data.root"
        )
    sources = [Path(str(item)) for item in (cfg.source if isinstance(cfg.source, list) else [cfg.source])]
    require(sources)
    return sources


def index_of(root: Path) -> Path:
    return root / "_index" / "index.csv"


@contextmanager
def prepared(cfg: EmbedConfig, sources: list[Path]) -> Iterator[Path]:
    """The root of a prepared set; a temporary one is removed at the end, with the salt and the map to names in it."""
    if not sources:
        yield Path(cfg.data.root)
    elif cfg.data.root:
        prepare(cfg, sources, Path(cfg.data.root))
        yield Path(cfg.data.root)
    else:
        with tempfile.TemporaryDirectory(prefix="dinoct-embed-") as folder:  # only its owner can look into it
            root = Path(folder).resolve()
            try:
                prepare(cfg, sources, root)
            except PrepareError as error:  # the folder was not typed, and the list of rejects goes with it
                text = str(error).replace(f"all are in {root}/_index/rejects.csv", "data.root=NEW keeps a list of them")
                text = text.replace("on the disk of data.root", "on the disk of TMPDIR, or give data.root=NEW")
                raise PrepareError(text) from error
            yield root


def prepare(cfg: EmbedConfig, sources: list[Path], root: Path) -> None:
    """Read the sources into `root` and say which files gave no slice, and why."""
    workers = cfg.prepare.workers if cfg.prepare.workers is not None else os.cpu_count() or 1
    options = PrepareOptions(
        workers=workers,
        max_reject_fraction=cfg.prepare.max_reject_fraction,
        file_timeout_s=cfg.prepare.file_timeout_s,
    )
    with display() as tell:

        def say(p: Progress) -> None:
            tell(p.stage, p.done, p.total)

        with suppress(NoSplit):  # of one patient, which nobody needs here
            prepare_dataset(sources, root, options, progress=say)
    refused = refused_files(root)
    console.print(f"files that gave no slice: {refused.total()}")
    for reason, count in refused.most_common():
        console.print(f"  {count:6d}  {reason}", markup=False)


def refused_files(root: Path) -> Counter[str]:
    """How many files of a prepared set gave no slice, by reason. A reason never quotes a file."""
    try:
        with open(root / "_index" / "rejects.csv", newline="", encoding="utf-8") as file:
            return Counter(row["reason"] for row in csv.DictReader(file))
    except FileNotFoundError:  # a set that was handed on without it
        return Counter()


@dataclass
class SliceBatches(Dataset):
    """Item j is the HU ``[B, N, N]`` int16 of the j-th batch of rows; a batch is of one series, so of one size."""

    index: SliceIndex
    store: SliceStore
    batches: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, j: int) -> Tensor:
        return torch.from_numpy(np.stack([read_slice(self.index, self.store, int(i)) for i in self.batches[j]]))


def batches_of(index: SliceIndex, size: int) -> list[np.ndarray]:
    """Rows of the index in batches of at most `size`, none of which crosses from one series to another."""
    starts = np.flatnonzero(np.diff(index.series, prepend=-1))
    runs = np.split(np.arange(len(index)), starts[1:])
    return [run[i : i + size] for run in runs for i in range(0, len(run), size)]


@torch.inference_mode()
def extract(encoder: Encoder, index: SliceIndex, store: SliceStore, *, hardware: Hardware, tell: Tell) -> np.ndarray:
    """Class tokens ``[n, D]`` float32 of all slices, in the order of the index."""
    encoder = encoder.to(hardware.device)
    data = SliceBatches(index, store, batches_of(index, hardware.batch_size))
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=hardware.num_workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    cls = np.empty((len(index), encoder.dim), dtype=np.float32)
    for rows, hu in zip(data.batches, loader, strict=True):
        with hardware.autocast():
            cls[rows] = encoder.encode(hu[:, None]).cls.float().cpu().numpy()
        tell("slices", int(rows[-1]) + 1, len(index))
    return cls


@contextmanager
def display() -> Iterator[Tell]:
    """A bar per stage on a terminal, a line every 10 s elsewhere."""
    last = time.monotonic()
    with progress("") as bar:
        tasks: dict[str, int] = {}

        def tell(stage: str, done: int, total: int) -> None:
            nonlocal last
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)
            if bar.disable and time.monotonic() - last >= LINE_EVERY_S:
                last = time.monotonic()
                console.print(f"{stage}: {done} of {total}")

        yield tell


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception does, so that a temporary folder goes with it."""

    owner = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != owner:  # a worker that was forked with this handler: it must clear nothing away
            os._exit(128 + number)
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
