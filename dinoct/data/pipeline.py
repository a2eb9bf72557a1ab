"""prepare: folders of DICOM -> slice store, index, table of rejects and patient-level split.

    walk -> register files -> scan headers -> group into series -> decode and write each series -> publish the tables

Only what is new since the last run is read. Headers are read once and kept in the catalog (`_private/`), series are
written slice by slice, so memory does not grow with the number of files. A run may end at any moment; the next goes on.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dinoct.data import jobs, series
from dinoct.data.catalog import Catalog
from dinoct.data.dicom import Rejected
from dinoct.data.files import FileRef
from dinoct.data.groups import SeriesStage
from dinoct.data.index import sweep_temporary
from dinoct.data.pixels import HU_MAX, HU_MIN
from dinoct.data.privacy import Hasher, load_or_create_salt, private_folder
from dinoct.data.publish import explain, publish, publish_split
from dinoct.data.store import remove_series_except, sync
from dinoct.data.walk import find_files
from dinoct.data.workers import InProcess, Lost, Task, WorkerPool
from dinoct.errors import DinoctError

__all__ = ["PrepareError", "PrepareOptions", "PrepareReport", "Progress", "explain", "prepare_dataset"]

SCAN_BATCH = 128
_OWN_FOLDERS = ("_index", "_private", "_splits", "store")


class PrepareError(DinoctError):
    """prepare cannot go on or should not be trusted; the first line says why, a summary by reason may follow."""


@dataclass(frozen=True)
class PrepareOptions:
    """`workers` processes decode (0: this process, without time and memory limits, for debugging).

    `max_reject_fraction` limits refused CT files / (refused CT files + slices). `file_timeout_s` and `memory_mb` hold
    per file. HU are clipped to [hu_min, hu_max]. `val_patients` are PatientIDs, or patient keys of the index.
    """

    workers: int
    max_reject_fraction: float = 0.25
    file_timeout_s: float = 60.0
    memory_mb: int = 2048
    split_seed: int = 0
    val_fraction: float = 0.1
    val_patients: tuple[str, ...] = ()
    hu_min: int = HU_MIN
    hu_max: int = HU_MAX

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise PrepareError(f"the number of workers cannot be {self.workers}")
        if not 0 <= self.max_reject_fraction <= 1:
            raise PrepareError(f"prepare.max_reject_fraction lies between 0 and 1, not {self.max_reject_fraction}")
        if self.file_timeout_s <= 0 or self.memory_mb <= 0:
            raise PrepareError("the time and memory limits of a file must be above 0")
        if not -32_768 <= self.hu_min < self.hu_max <= 32_767:
            raise PrepareError(f"HU cannot be clipped to [{self.hu_min}, {self.hu_max}]")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `done` of `total` files ("scan") or slices ("decode"), since `seconds`."""

    stage: str
    done: int
    total: int
    bytes_in: int
    bytes_out: int
    seconds: float


@dataclass(frozen=True)
class PrepareReport:
    """What a run did. Files and slices count all that the root holds, `slices_new` and the bytes only this run."""

    files_seen: int
    files_with_slices: int
    slices_written: int
    slices_new: int
    rejected: dict[str, int]
    refused_ct_fraction: float
    index_csv: Path
    split_manifest: Path
    index_hash: str
    seconds: float
    bytes_in: int
    bytes_out: int


@dataclass
class _Run:
    """What the stages share."""

    root: Path
    options: PrepareOptions
    hasher: Hasher
    catalog: Catalog
    pool: InProcess | WorkerPool
    progress: Callable[[Progress], None]
    started: float = field(default_factory=time.monotonic)
    stage: str = ""
    done: int = 0
    total: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def begin(self, stage: str, total: int) -> None:
        self.stage, self.done, self.total = stage, 0, total
        self.tell()

    def step(self, item: int) -> None:
        if item >= 0:
            self.done = min(self.done + 1, self.total)  # what a lost worker has to repeat counts once
            self.tell()

    def tell(self) -> None:
        seconds = time.monotonic() - self.started
        self.progress(Progress(self.stage, self.done, self.total, self.bytes_in, self.bytes_out, seconds))


def prepare_dataset(
    sources: Sequence[Path],
    root: Path,
    options: PrepareOptions,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Read every file under `sources` into the data set at `root`; return what was done.

    Sources add up: a later run with another folder extends the data set, and files that vanished from a folder named
    again leave it. Raises PrepareError: a source that is missing, no slice, too many refused CT files (rejects.csv is
    written, the index is not), fewer than two patients (the index is written), a full disk.
    """
    root = Path(root).resolve()
    folders = [Path(source).resolve() for source in sources]
    for given, folder in zip(sources, folders, strict=True):
        if not folder.exists():
            raise PrepareError(f"source {given} does not exist")
    try:
        with _opened(root, options, progress or (lambda _: None)) as run:
            _register(run, folders)
            _scan(run)
            new = _decode(run)
            return _report(run, new)
    except PrepareError:
        raise
    except DinoctError as error:
        raise PrepareError(str(error)) from error
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise PrepareError(f"cannot write to {root}: {reason}") from error


@contextmanager
def _opened(root: Path, options: PrepareOptions, progress: Callable[[Progress], None]) -> Iterator[_Run]:
    """Lock the root, start the workers, and end all of it whatever happens."""
    private = private_folder(root)
    store = root / "store"
    with open(private / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it, even after kill -9
        except BlockingIOError:
            raise PrepareError(f"another prepare is at work on {root}") from None
        store.mkdir(exist_ok=True)
        for name in _OWN_FOLDERS:
            sweep_temporary(root / name)
        hasher, catalog = Hasher(load_or_create_salt(root)), Catalog(private / "catalog.sqlite")
        limits = {"timeout_s": options.file_timeout_s, "memory_mb": options.memory_mb}
        pool = WorkerPool(options.workers, **limits) if options.workers else InProcess()
        try:
            yield _Run(root, options, hasher, catalog, pool, progress)
        finally:
            pool.close()
            catalog.close()
            sweep_temporary(store)


def _register(run: _Run, folders: list[Path]) -> None:
    skip = frozenset(os.fsencode(run.root / name) for name in _OWN_FOLDERS)
    found = ((run.hasher.key("file", os.fsdecode(file.path)), file) for file in find_files(folders, skip))
    run.catalog.register(found, [os.fsencode(folder) for folder in folders])
    if not run.catalog.one("SELECT 1 FROM files LIMIT 1"):
        raise PrepareError("there is no file in the source")


def _scan(run: _Run) -> None:
    """Read the headers of new files."""
    run.begin("scan", run.catalog.one("SELECT COUNT(*) FROM files WHERE NOT scanned")[0])
    for outcome in run.pool.run(_scan_tasks(run.catalog), run.step):
        files = outcome.task.tag
        if isinstance(outcome, Lost):
            file_id, _, size = files[outcome.step]
            run.bytes_in += size
            run.catalog.add_scan(file_id, Rejected("refused", outcome.reason, True), transient=True)
            for rest in (files[: outcome.step], files[outcome.step + 1 :]):
                if rest:
                    run.pool.again(_scan_task(rest))
        else:
            for (file_id, _, size), found in zip(files, outcome.result, strict=True):
                run.bytes_in += size
                if not isinstance(found, Rejected):
                    headers = [series.hashed(header, run.hasher) for header in found]
                    found = [(series.group_key(header, run.hasher), header) for header in headers]
                run.catalog.add_scan(file_id, found)
        run.catalog.commit()
        run.tell()


def _scan_task(files: list[tuple[str, FileRef, int]]) -> Task:
    return Task(jobs.scan_files, [ref for _, ref, _ in files], files)


def _scan_tasks(catalog: Catalog) -> Iterator[Task]:
    batch: list[tuple[str, FileRef, int]] = []
    for entry in catalog.unscanned():
        batch.append(entry)
        if len(batch) == SCAN_BATCH:
            yield _scan_task(batch)
            batch = []
    if batch:
        yield _scan_task(batch)


def _decode(run: _Run) -> int:
    """Write the series that are new or changed; return their number of slices."""
    store = run.root / "store"
    run.catalog.drop_vanished_groups()
    run.catalog.require({path.stem: path.stat().st_size for path in store.glob("*.b2nd")})
    options = run.options
    stale = run.catalog.stale_groups(f"{options.hu_min} {options.hu_max}")
    if run.catalog.holds_series_of(key for key, _, _ in stale):
        # A series of the index is about to change: no index is better than one that names other slices.
        (run.root / "_index" / "index.csv").unlink(missing_ok=True)
    run.begin("decode", sum(count for _, _, count in stale))
    stage = SeriesStage(run.catalog, run.hasher, store, (options.hu_min, options.hu_max), run.pool.again)
    for outcome in run.pool.run(stage.tasks(stale), run.step):
        stage.take(outcome)
        run.bytes_out = stage.bytes_out
        run.tell()
    sync(store)  # before an index names what is in it
    return stage.slices_new


def _report(run: _Run, new: int) -> PrepareReport:
    """Publish the tables, then judge them."""
    options, catalog = run.options, run.catalog
    tables = publish(run.root, catalog)
    fraction = tables.refused_ct / max(1, tables.refused_ct + tables.slices)
    summary = "".join(f"\n{n:8d}  {reason}" for reason, n in sorted(tables.rejected.items(), key=lambda item: -item[1]))
    if not tables.slices:
        raise PrepareError(f"none of the {tables.files_seen} files gave a CT slice:{summary}")
    if fraction > options.max_reject_fraction:
        raise PrepareError(
            f"{tables.refused_ct} CT files were refused for {tables.slices} slices: {fraction:.0%} is more than "
            f"prepare.max_reject_fraction={options.max_reject_fraction:g}; all are in {tables.rejects_csv}:{summary}"
        )
    index = tables.write_index()
    remove_series_except(run.root / "store", set(index.series_names))
    manifest = publish_split(
        run.root,
        index,
        run.hasher,
        seed=options.split_seed,
        fraction=options.val_fraction,
        val_patients=options.val_patients,
    )
    return PrepareReport(
        files_seen=tables.files_seen,
        files_with_slices=tables.files_with_slices,
        slices_written=len(index),
        slices_new=new,
        rejected=dict(tables.rejected),
        refused_ct_fraction=fraction,
        index_csv=tables.index_csv,
        split_manifest=manifest,
        index_hash=index.content_hash(),
        seconds=time.monotonic() - run.started,
        bytes_in=run.bytes_in,
        bytes_out=run.bytes_out,
    )
