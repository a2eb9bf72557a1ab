"""The checks of ``dinoct-doctor``: each looks at one thing and yields findings; none changes anything."""

import importlib.metadata
import importlib.util
import netrc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import numpy as np

from dinoct.checkup.findings import FAIL, OK, WARN, Finding
from dinoct.checkup.machine_lines import disks, hardware, memory, processor, torch_build
from dinoct.config import DataConfig, DoctorConfig, TrackerConfig
from dinoct.console import progress
from dinoct.data.dataset import data_paths, open_split
from dinoct.data.index import SliceIndex
from dinoct.data.splits import few_held_out
from dinoct.data.store import SliceStore, checksum
from dinoct.errors import DinoctError
from dinoct.rundir import RUNS

VERSIONS = ("dinoct", "torchvision", "timm", "hydra-core", "numpy", "opencv-python-headless", "pydicom", "blosc2")
DECODES = {  # plugin of pydicom -> transfer syntaxes, what brings it, what a lack of it is
    "pydicom": ("RLE", "pip install pydicom", FAIL),
    "pyjpegls": ("JPEG-LS", "pip install pyjpegls", FAIL),
    "pylibjpeg": ("JPEG 2000", "pip install pylibjpeg pylibjpeg-openjpeg", FAIL),
    "gdcm": ("JPEG Lossless and 12-bit JPEG", "pip install 'dinoct[gdcm]', if there are such files", WARN),
}
READ_SLICES = 64
SLOW_SLICE_MS = 20.0


def check_up(cfg: DoctorConfig, *, data_named: bool) -> Iterator[Finding]:
    """All findings, each as soon as it is known.

    Args:
        cfg: data, hardware, tracker and run folder as a run would have them.
        data_named: whether the data were named on the command line: what is not there fails then.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": versions,
        "torch": torch_build,
        "card": partial(hardware, cfg.hardware),
        "processor": partial(processor, cfg.hardware),
        "memory": memory,
        "disk": partial(disks, Path(cfg.run_dir) if cfg.run_dir else RUNS),
        "decoders": decoders,
        "volumes": volumes,
        "data": partial(data, cfg.data, named=data_named or cfg.verify, verify=cfg.verify),
        "W&B": partial(tracker, cfg.tracker),
    }
    for name, check in checks.items():
        try:
            yield from check()
        except DinoctError as error:
            yield Finding(FAIL, name, str(error))
        except Exception as error:  # a check that breaks is a finding, and the others still count
            yield Finding(FAIL, name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def versions() -> Iterator[Finding]:
    """Versions that a report of a fault should name."""
    found = ", ".join(f"{name} {_version(name)}" for name in VERSIONS)
    yield Finding(OK, "versions", f"Python {platform.python_version()}, {found}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def decoders() -> Iterator[Finding]:
    """Decoders of the compressed transfer syntaxes, as `dinoct-prepare` takes them."""
    from pydicom.pixels import get_decoder

    from dinoct.data.pixels import PLUGINS

    lacking = {plugin for syntax, plugin in PLUGINS.items() if plugin not in get_decoder(syntax).available_plugins}
    for plugin, (what, remedy, level) in DECODES.items():
        if plugin in lacking:
            yield Finding(level, "decoders", f"{what}: {plugin} is missing, such files are rejected", remedy)
    there = [what for plugin, (what, _, _) in DECODES.items() if plugin not in lacking]
    yield Finding(OK, "decoders", ", ".join(["uncompressed", *there]))


def volumes() -> Iterator[Finding]:
    """The extra that reads MHD and NIfTI."""
    if importlib.util.find_spec("SimpleITK"):
        yield Finding(OK, "volumes", f"MHD and NIfTI (SimpleITK {_version('SimpleITK')})")
    else:
        text = "MHD and NIfTI cannot be read: SimpleITK is missing"
        yield Finding(WARN, "volumes", text, "pip install 'dinoct[volumes]', if there are such files")


def data(cfg: DataConfig, *, named: bool, verify: bool = False) -> Iterator[Finding]:
    """Whether the data are prepared, what is in them, and how fast slices come from the store, or if all are whole."""
    if not named and not (Path(cfg.root or "") / "_index").is_dir():
        todo = "dinoct-prepare source=FOLDER, or name a prepared set with data.root=..."
        yield Finding(WARN, "data", f"{cfg.root} is not prepared", todo)
        return
    train, val, store, _ = open_split(cfg)
    series = len(np.unique(np.concatenate([train.series, val.series])))
    yield Finding(
        OK,
        "data",
        f"{cfg.root or cfg.index_csv}: {len(train) + len(val)} slices of {series} series, "
        f"{len(np.unique(train.patient)) + len(np.unique(val.patient))} patients",
    )
    held = len(np.unique(val.patient))
    yield Finding(
        WARN if few_held_out(held) else OK,
        "split",
        f"{data_paths(cfg)[1].name}: {len(np.unique(train.patient))} patients with {len(train)} slices to train on, "
        f"{held} with {len(val)} held out",
        few_held_out(held),
    )
    if verify:
        yield whole_store(train.join(val), store)
    else:
        yield read_speed(train, store)


def whole_store(index: SliceIndex, store: SliceStore) -> Finding:
    """Every slice against its checksum."""
    damaged, places = set(), np.lexsort((index.row, index.series)).tolist()  # as they lie on the disk
    with progress("slices") as bar:
        for i in bar.track(places, description="verify"):
            if not store.verify(index.series_name(i), index.at("row", i), str(index.checksum[i])):
                damaged.add(index.series_name(i))
    if not damaged:
        return Finding(OK, "store", f"all {len(places)} slices have the right checksum")
    names = ", ".join(sorted(damaged)[:5]) + (" ..." if len(damaged) > 5 else "")
    todo = "copy these files again, or remove them and run dinoct-prepare again; is the disk failing?"
    return Finding(FAIL, "store", f"{len(damaged)} series of the store are damaged or missing: {names}", todo)


def read_speed(index: SliceIndex, store: SliceStore) -> Finding:
    """Time and checksums of slices drawn at random."""
    chosen = np.random.default_rng(0).permutation(len(index))[:READ_SLICES]
    times, damaged = [], 0
    for i in chosen:
        start = time.perf_counter()
        pixels = store.read(index.series_name(i), int(index.row[i]))
        times.append(1e3 * (time.perf_counter() - start))
        damaged += checksum(pixels) != index.checksum[i]
    text = f"{statistics.median(times):.1f} ms per slice, {len(times)} read at random"
    if damaged:
        todo = "remove the store's damaged series and run dinoct-prepare again; is the disk failing?"
        return Finding(FAIL, "store", f"{text}, {damaged} with a wrong checksum", todo)
    if statistics.median(times) > SLOW_SLICE_MS:
        return Finding(WARN, "store", text, "put data.root on a local disk, or raise hardware.num_workers")
    return Finding(OK, "store", f"{text}, all with the right checksum")


def tracker(cfg: TrackerConfig) -> Iterator[Finding]:
    """Whether W&B can do what tracker.wandb asks for. The key is never read further than whether it is there."""
    mode = cfg.wandb
    if mode not in ("offline", "online", "disabled"):
        yield Finding(FAIL, "W&B", f"tracker.wandb={mode} is none of offline, online, disabled")
    elif mode == "disabled":
        yield Finding(OK, "W&B", "tracker.wandb=disabled")
    elif not importlib.util.find_spec("wandb"):
        yield Finding(FAIL, "W&B", f"tracker.wandb={mode}, and wandb is not installed", "tracker.wandb=disabled")
    else:
        key = has_key()
        text = f"tracker.wandb={mode}, wandb {_version('wandb')}, {'a key is set' if key else 'no key is set'}"
        if mode == "online" and not key:
            yield Finding(FAIL, "W&B", text, "wandb login, or tracker.wandb=offline")
        else:
            yield Finding(OK, "W&B", text)


def has_key() -> bool:
    """Whether W&B would find an API key: in WANDB_API_KEY, or in the netrc file that ``wandb login`` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
