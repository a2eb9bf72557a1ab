"""What ``dinoct-prepare`` does with its settings: check, run with progress, say what came out."""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dinoct.config import DataConfig, PhantomConfig, PrepareConfig
from dinoct.console import console, progress
from dinoct.data.labels import write_lidc_labels
from dinoct.data.masks import write_masks
from dinoct.data.pipeline import PrepareOptions, PrepareReport, Progress, explain, prepare_dataset
from dinoct.data.privacy import private_folder, write_salt
from dinoct.data.sources import require
from dinoct.data.splits import default_split, few_held_out
from dinoct.errors import ConfigError


def prepare_command(cfg: PrepareConfig, *, arguments: Sequence[str]) -> None:
    """Prepare `cfg.source`, or explain a file id, or take over labels or masks.

    Raises:
        ConfigError, PrepareError: naming the key to change.
    """
    if cfg.data.root is None:
        raise ConfigError("data.root is needed: the folder to write")
    root = Path(cfg.data.root)
    if cfg.explain:
        for key, value in explain(root, cfg.explain).items():
            console.print(f"{key}: {value}", markup=False)
        return
    if cfg.labels:
        path, counts = write_lidc_labels(Path(cfg.labels), root)
        console.print(f"{', '.join(f'{n} {label}' for label, n in counts.items())}: {path}", markup=False)
        return
    if cfg.masks:
        folder, known, strange = write_masks(Path(cfg.masks), root)
        also = f", {strange} of slices that are not in the data set" if strange else ""
        console.print(f"masks of {known} slices{also}: {folder}", markup=False)
        return
    sources = _sources(cfg, root)
    _note_command(root, arguments)
    workers = cfg.prepare.workers if cfg.prepare.workers is not None else os.cpu_count() or 1
    options = PrepareOptions(
        workers=workers,
        max_reject_fraction=cfg.prepare.max_reject_fraction,
        file_timeout_s=cfg.prepare.file_timeout_s,
        forget_missing=cfg.prepare.forget_missing,
        split_seed=cfg.data.split_seed,
        val_fraction=cfg.split.val_fraction,
        val_patients=None if cfg.split.val_patients is None else tuple(cfg.split.val_patients),
    )
    console.print(
        f"prepare: {workers} decoding processes ({'auto: cores' if cfg.prepare.workers is None else 'prepare.workers'})"
    )
    with _display() as tell:
        report = prepare_dataset(sources, root, options, progress=tell)
    _print_report(report)


def _sources(cfg: PrepareConfig, root: Path) -> list[Path]:
    if cfg.source is None:
        raise ConfigError("source is needed: a folder, a zip or a tar of CT, a list of these, or source=phantom")
    if cfg.source == "phantom":
        return [_write_phantom(cfg.phantom, root, seed=cfg.seed)]
    sources = [Path(str(item)) for item in (cfg.source if isinstance(cfg.source, list) else [cfg.source])]
    require(sources)
    return sources


def _write_phantom(cfg: PhantomConfig, root: Path, *, seed: int) -> Path:
    """Invented patients need no secret: a salt that follows from the seed makes the whole data set repeatable."""
    from dinoct.data.phantom import PhantomSpec, write_phantom

    if not (private_folder(root) / "salt").exists():
        write_salt(root, hashlib.sha256(f"dinoct phantom {seed}".encode()).digest())
    folder = root / "dicom"
    spec = PhantomSpec(patients=cfg.patients, slices=cfg.slices, size=cfg.size, seed=seed)
    console.print(f"phantom: {cfg.patients} invented patients into {folder}", markup=False)
    with progress("files") as bar:
        task = bar.add_task("phantom", total=None)
        write_phantom(folder, spec, progress=lambda done: bar.update(task, completed=done))
    return folder


def _note_command(root: Path, arguments: Sequence[str]) -> None:
    """Keep the command as typed where paths may stand: in `_private`."""
    line = {"at": time.strftime("%Y-%m-%dT%H:%M:%S"), "command": shlex.join(["dinoct-prepare", *arguments])}
    path = private_folder(root) / "commands.jsonl"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def _display() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line every 10 s elsewhere."""
    last = time.monotonic()
    with progress("") as bar:
        tasks: dict[str, int] = {}
        began: dict[str, float] = {}

        def tell(p: Progress) -> None:
            nonlocal last
            if p.stage not in tasks:
                tasks[p.stage] = bar.add_task(p.stage, total=p.total)
                began[p.stage] = p.seconds
            rate = p.done / max(p.seconds - began[p.stage], 1e-9)
            flow = f"{rate:.0f}/s, {p.bytes_in / 1e6:,.0f} MB in, {p.bytes_out / 1e6:,.0f} MB out"
            bar.update(tasks[p.stage], completed=p.done, total=p.total, description=f"{p.stage} ({flow})")
            if bar.disable and time.monotonic() - last >= 10:
                last = time.monotonic()
                left = (p.total - p.done) / rate if rate else 0
                console.print(f"{p.stage}: {p.done} of {p.total}, {flow}, {left:.0f} s left")

        yield tell


def _print_report(report: PrepareReport) -> None:
    if report.files_vanished or report.series_left:
        console.print(f"{report.files_vanished} files vanished; {report.series_left} series left the data set")
    if report.files_missing:
        console.print(
            f"{report.files_missing} files of sources that were not named are not there (moved, deleted, or a disk "
            "that is not mounted): they stay in the data set; prepare.forget_missing=true forgets them"
        )
    if report.series_nameless:
        console.print(f"WARNING: {report.series_nameless} series have no PatientID: they count as one patient")
    rate = report.slices_new / max(report.seconds, 1e-9)
    console.print(
        f"{report.files_seen} files: {report.files_with_slices} gave slices, {sum(report.rejected.values())} did not; "
        f"{report.slices_written} slices in the index, {report.slices_new} of them new"
    )
    for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        console.print(f"  {count:6d}  {reason}", markup=False)
    console.print(
        f"{report.seconds:.1f} s, {rate:.0f} slices/s, {report.bytes_in / 1e6:,.0f} MB in, "
        f"{report.bytes_out / 1e6:,.0f} MB out"
    )
    console.print(f"index {report.index_csv}", markup=False)
    console.print(f"split {report.split_manifest}", markup=False)
    taken = default_split(report.split_manifest.parent, DataConfig().split_seed)
    if taken != report.split_manifest:
        said = f"dinoct-train takes {taken.name} unless it is told data.split_manifest={report.split_manifest}"
        console.print(f"  WARNING: {said}", markup=False)
    console.print(f"  {report.patients_train} patients to train on, {report.patients_held_out} held out", markup=False)
    if few := few_held_out(report.patients_held_out):
        console.print(f"  WARNING: {few}")
    if report.named_kept:
        console.print(
            f"  held out by name in an earlier run, and kept: {report.named_kept}; split.val_patients=[] ends that",
            markup=False,
        )
