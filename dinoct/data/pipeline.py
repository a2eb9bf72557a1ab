"""prepare: folders of DICOM -> slice store, index, table of rejects and patient-level split.

    walk -> register files -> scan headers -> group into series -> decode and write each series -> publish the tables

Only what is new since the last run is read. Headers are read once and kept in the catalog (`_private/`), series are
written slice by slice, so memory does not grow with the number of files. A run may end at any moment; the next goes on.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dinoct.data import jobs, masks, series, sources
from dinoct.data.catalog import Catalog
from dinoct.data.dicom import Rejected
from dinoct.data.files import FileRef
from dinoct.data.groups import SeriesStage
from dinoct.data.index import SliceIndex
from dinoct.data.options import NoSplit, PrepareError, PrepareOptions, PrepareReport, Progress
from dinoct.data.privacy import Hasher, load_or_create_salt, locked, private_folder
from dinoct.data.publish import Tables, decide_split, explain, publish, publish_split, shrink_split
from dinoct.data.store import MASKS, has_next, put_in_place, remove_series_except, series_sizes, sync
from dinoct.data.walk import Found, find_files
from dinoct.data.workers import InProcess, Lost, Task, WorkerPool
from dinoct.durable import sweep
from dinoct.errors import DinoctError

__all__ = ["PrepareError", "PrepareOptions", "PrepareReport", "Progress", "explain", "prepare_dataset"]

SCAN_BATCH = 128
_OWN_FOLDERS = ("_index", MASKS, "_private", "_splits", "store")


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
    slices_new: int = 0
    files_vanished: int = 0
    series_before: set[str] = field(default_factory=set)

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
    folders: Sequence[Path],
    root: Path,
    options: PrepareOptions,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Read every file under `folders` into the data set at `root`; return what was done.

    Sources add up: a later run with another folder extends the data set, and files that vanished from a folder named
    again leave it. Raises PrepareError: a source that is missing, or had files and has none, no slice, too many refused
    CT files (rejects.csv is written, the index is not), names that are not there, a full disk; and NoSplit where there
    is one patient (the index is written).
    """
    root = Path(root).resolve()
    sources.require(folders)
    try:
        with _opened(root, options, progress or (lambda _: None)) as run:
            _register(run, [Path(folder).resolve() for folder in folders])
            _scan(run)
            _decode(run)
            return _report(run)
    except PrepareError:
        raise
    except DinoctError as error:
        raise PrepareError(str(error)) from error
    except (OSError, sqlite3.Error) as error:
        said = str(error) if isinstance(error, sqlite3.Error) else error.strerror  # SQLite's words quote no path
        reason = said or type(error).__name__
        raise PrepareError(f"cannot write to {root}: {reason}") from error


@contextmanager
def _opened(root: Path, options: PrepareOptions, progress: Callable[[Progress], None]) -> Iterator[_Run]:
    """Lock the root, start the workers, and end all of it whatever happens."""
    private, store = private_folder(root), root / "store"
    with locked(root):
        store.mkdir(exist_ok=True)
        for name in _OWN_FOLDERS:
            sweep(root / name)
        hasher, catalog = Hasher(load_or_create_salt(root)), Catalog(private / "catalog.sqlite")
        limits = {"timeout_s": options.file_timeout_s, "memory_mb": options.memory_mb}
        pool = WorkerPool(options.workers, **limits) if options.workers else InProcess()
        try:
            yield _Run(root, options, hasher, catalog, pool, progress)
        finally:
            pool.close()
            catalog.close()
            sweep(store)


def _register(run: _Run, folders: list[Path]) -> None:
    skip = frozenset(os.fsencode(run.root / name) for name in _OWN_FOLDERS)
    found = ((_file_id(run.hasher, file), file) for file in find_files(folders, skip))
    tops = [os.fsencode(folder) for folder in folders]
    run.series_before = run.catalog.series_names()
    run.files_vanished = sources.register(run.catalog.db, found, tops, forget_missing=run.options.forget_missing)
    if not run.catalog.one("SELECT 1 FROM files LIMIT 1"):
        raise PrepareError(f"there is no file in the source{_what_stays(run)}")


def _file_id(hasher: Hasher, file: Found) -> str:
    """A place that could not be looked at has a key of its own: what was known of it stays."""
    return hasher.key("unreachable" if file.trouble else "file", os.fsdecode(file.path))


def _what_stays(run: _Run) -> str:
    count = len(list((run.root / "store").glob("*.b2nd")))
    return f"; {count} series of earlier runs are still in {run.root}: remove it if they are to go" if count else ""


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


def _decode(run: _Run) -> None:
    """Write the series that are new or changed."""
    store = run.root / "store"
    run.catalog.drop_vanished_groups()
    run.catalog.require(series_sizes(store))
    options = run.options
    wanted = f"{options.hu_min} {options.hu_max}"
    stale = run.catalog.stale_groups(wanted)
    if moved := sources.forget_moved(run.catalog, [key for key, _, _ in stale]):
        run.files_vanished += moved
        run.catalog.drop_vanished_groups()
        stale = run.catalog.stale_groups(wanted)
    run.begin("decode", sum(count for _, _, count in stale))
    stage = SeriesStage(run.catalog, run.hasher, store, (options.hu_min, options.hu_max), run.pool.again)
    for outcome in run.pool.run(stage.tasks(stale), run.step):
        stage.take(outcome)
        run.slices_new, run.bytes_out = stage.slices_new, stage.bytes_out
        run.tell()
    sync(store)  # before an index names what is in it


def _put_in_place(run: _Run, tables: Tables) -> SliceIndex:
    """Write the index and have the store hold what it names; until here the last ones were not touched."""
    store = run.root / "store"
    if has_next(store):  # for a moment: no index is better than one that names other slices
        tables.index_csv.unlink(missing_ok=True)
        put_in_place(store, run.catalog.series_names())
    index = tables.write_index()
    remove_series_except(store, set(index.series_names))
    remove_series_except(run.root / MASKS, set(index.series_names), ".npz")
    masks.forget(run.root / MASKS, index)
    return index


def _report(run: _Run) -> PrepareReport:
    """Publish the tables, then judge them."""
    options, catalog = run.options, run.catalog
    tables = publish(run.root, catalog)
    fraction = tables.refused_ct / max(1, tables.refused_ct + tables.slices)
    summary = "".join(f"\n{n:8d}  {reason}" for reason, n in sorted(tables.rejected.items(), key=lambda item: -item[1]))
    if not tables.slices:
        raise PrepareError(f"none of the {tables.files_seen} files gave a CT slice{_what_stays(run)}:{summary}")
    if fraction > options.max_reject_fraction:
        raise PrepareError(
            f"{tables.refused_ct} CT files were refused for {tables.slices} slices: {fraction:.0%} is more than "
            f"prepare.max_reject_fraction={options.max_reject_fraction:g}; all are in {tables.rejects_csv}:{summary}"
        )
    of_series = [patient for _, patient, _ in catalog.series_rows()]
    patients, nameless = sorted(set(of_series)), of_series.count(run.hasher.patient(""))
    split = decide_split(run.root, patients, run.hasher, options) if len(patients) > 1 else None
    index = _put_in_place(run, tables)
    if split is None:
        shrink_split(run.root, index, options)
        without = f"{nameless} series have no PatientID and count as one: write that tag first"
        raise NoSplit(f"a split needs two patients; {without if nameless else 'add data of another patient'}")
    return PrepareReport(
        files_seen=tables.files_seen,
        files_with_slices=tables.files_with_slices,
        slices_written=len(index),
        slices_new=run.slices_new,
        rejected=dict(tables.rejected),
        refused_ct_fraction=fraction,
        index_csv=tables.index_csv,
        split_manifest=publish_split(run.root, index, split, options),
        patients_train=len(split.train),
        patients_held_out=len(split.val),
        index_hash=index.content_hash(),
        seconds=time.monotonic() - run.started,
        bytes_in=run.bytes_in,
        bytes_out=run.bytes_out,
        files_vanished=run.files_vanished,
        files_missing=sources.missing(catalog.db),
        series_left=len(run.series_before - catalog.series_names()),
        named_kept=len(split.val) if split.named and options.val_patients is None else 0,
        series_nameless=nameless,
    )
