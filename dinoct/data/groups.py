"""From the slices of a group to series in the store: the tasks it takes, and what their outcomes mean."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dinoct.data import jobs
from dinoct.data.catalog import Catalog, Drop, SeriesRecord
from dinoct.data.files import Source
from dinoct.data.jobs import Failure, SeriesResult, SliceStats
from dinoct.data.privacy import Hasher, csv_cell
from dinoct.data.series import SliceRef, clusters, geometry, resolve, series_name, sort_slices
from dinoct.data.workers import Finished, Lost, Task


@dataclass
class _Group:
    """A group on its way: `open` counts the series that are being written."""

    key: str
    fingerprint: str
    refs: list[SliceRef]
    sources: dict[str, Source]
    drops: list[Drop] = field(default_factory=list)
    records: list[SeriesRecord] = field(default_factory=list)
    open: int = 0

    def payload(self, refs: list[SliceRef]) -> list[Source]:
        return [self.sources[ref.file_id]._replace(header=ref.header) for ref in refs]

    def drop(self, ref: SliceRef, kind: str, reason: str, *, transient: bool = False) -> None:
        self.drops.append(Drop(ref.file_id, ref.frame, kind, reason, transient))

    def fail(self, ref: SliceRef, failure: Failure) -> None:
        self.drop(ref, "refused", failure.reason, transient=failure.retry)


@dataclass
class _Part:
    """What a task is about: slices of a group, and (to write) the label that tells its series from the others."""

    group: _Group
    refs: list[SliceRef]
    label: str | None = None  # None: to be hashed and not to be written


class SeriesStage:
    """Turns groups into tasks and finished tasks into records of the catalog, group by group."""

    def __init__(
        self,
        catalog: Catalog,
        hasher: Hasher,
        store: Path,
        hu_range: tuple[int, int],
        again: Callable[[Task], None],
    ):
        self._catalog, self._hasher, self._store, self._hu_range = catalog, hasher, store, hu_range
        self._again = again
        self.slices_new = 0
        self.bytes_out = 0

    def tasks(self, stale: Iterable[tuple[str, str, int]]) -> Iterator[Task]:
        """Yield the first task of each (group, fingerprint, slices)."""
        for key, fingerprint, _ in stale:
            group = _Group(key, fingerprint, *self._catalog.group(key))
            shared = [ref for cluster in clusters(sort_slices(group.refs)) for ref in cluster]
            if shared:  # the pixels decide: a duplicate or two series in one
                yield self._hash(group, shared)
            else:
                group.open = 1
                yield self._write(group, sort_slices(group.refs), "")

    def take(self, outcome: Finished | Lost) -> None:
        """Act on what became of a task."""
        part: _Part = outcome.task.tag
        if isinstance(outcome, Lost):
            self._lose(part, outcome)
        elif part.label is None:
            self._resolve(part, outcome.result)
        else:
            self._record(part, outcome.result)
        if part.group.open == 0:
            group = part.group
            self._catalog.finish_group(group.key, group.fingerprint, group.records, group.drops)

    def _hash(self, group: _Group, refs: list[SliceRef]) -> Task:
        group.open = 1
        return Task(jobs.hash_slices, self._job("", group, refs), _Part(group, refs))

    def _write(self, group: _Group, refs: list[SliceRef], label: str) -> Task:
        name = series_name(group.key, label, self._hasher)
        return Task(jobs.write_series, self._job(name, group, refs), _Part(group, refs, label))

    def _job(self, name: str, group: _Group, refs: list[SliceRef]) -> jobs.SeriesJob:
        return jobs.SeriesJob(str(self._store), name, group.payload(refs), *self._hu_range)

    def _lose(self, part: _Part, outcome: Lost) -> None:
        """Leave out the slice that ended the worker and do the rest again."""
        group, lost = part.group, part.refs[outcome.step]
        group.drop(lost, "refused", outcome.reason, transient=True)
        rest = [ref for ref in part.refs if ref is not lost]
        group.refs = [ref for ref in group.refs if ref is not lost]
        if part.label is None:
            self._again(self._hash(group, rest))
        elif rest:
            self._again(self._write(group, rest, part.label))
        else:
            group.open -= 1

    def _resolve(self, part: _Part, hashes: list[str | Failure]) -> None:
        group, digests = part.group, {}
        for ref, outcome in zip(part.refs, hashes, strict=True):
            if isinstance(outcome, Failure):
                group.fail(ref, outcome)
            else:
                digests[ref.file_id, ref.frame] = outcome
        bad = {(drop.file_id, drop.frame) for drop in group.drops}
        resolved = resolve([ref for ref in group.refs if (ref.file_id, ref.frame) not in bad], digests)
        for ref in resolved.duplicates:
            group.drop(ref, "duplicate", "same position and pixels as another file of the series")
        for ref in resolved.refused:
            group.drop(ref, "refused", resolved.reason)
        group.open = len(resolved.series)
        for label, refs in resolved.series:
            self._again(self._write(group, refs, label))

    def _record(self, part: _Part, result: SeriesResult) -> None:
        group = part.group
        group.open -= 1
        kept = []
        for ref, outcome in zip(part.refs, result.slices, strict=True):
            if isinstance(outcome, SliceStats):
                kept.append((ref, outcome))
            else:
                group.fail(ref, outcome)
        if not kept:
            return
        name = series_name(group.key, part.label, self._hasher)
        self.slices_new += len(kept)
        self.bytes_out += result.bytes_out
        refs = [ref for ref, _ in kept]
        group.records.append(
            SeriesRecord(
                name,
                refs[0].header.patient,
                result.bytes_out,
                series_info(refs, [stats for _, stats in kept], part.label, len(part.refs) - len(kept), self._hu_range),
                [(self._slice_id(name, ref), ref.file_id, ref.frame, index_cells(ref, stats)) for ref, stats in kept],
            )
        )

    def _slice_id(self, name: str, ref: SliceRef) -> str:
        place = ",".join(f"{x:.3f}" for x in ref.header.position)
        return self._hasher.key("slice", name, ref.header.sop, str(ref.frame), place)


def index_cells(ref: SliceRef, stats: SliceStats) -> list[object]:
    """Return the cells of an index row from `z_mm` on."""
    header = ref.header
    return [
        header.position[2],
        header.rows,
        header.cols,
        *header.spacing,
        header.thickness,
        csv_cell(header.manufacturer),
        csv_cell(header.kernel),
        int(header.lossy),
        round(stats.body_fraction, 4),
        round(stats.hu_mean, 2),
        stats.checksum,
    ]


def series_info(
    refs: list[SliceRef], stats: list[SliceStats], label: str, dropped: int, hu_range: tuple[int, int]
) -> dict[str, object]:
    """Return a row of series.csv: geometry, what was dropped, and the HU range before and after clipping."""
    header, shape = refs[0].header, geometry(refs)
    return {
        "slices": len(refs),
        "rows": header.rows,
        "cols": header.cols,
        "spacing_row_mm": header.spacing[0],
        "spacing_col_mm": header.spacing[1],
        "thickness_mm": header.thickness,
        "step_mm": round(shape.step_mm, 4),
        "max_step_mm": round(shape.max_step_mm, 4),
        "gaps": shape.gaps,
        "missing_slices": shape.missing,
        "tilt_deg": round(shape.tilt_deg, 2),
        "gantry_tilt_tag_deg": header.gantry_tilt,
        "slices_failed": dropped,
        "told_apart_by": csv_cell(label.split("=")[0]),
        "hu_min_before_clip": min(entry.raw_min for entry in stats),
        "hu_max_before_clip": max(entry.raw_max for entry in stats),
        "clip_min": hu_range[0],
        "clip_max": hu_range[1],
        "lossy": int(any(ref.header.lossy for ref in refs)),
        "manufacturer": csv_cell(header.manufacturer),
        "kernel": csv_cell(header.kernel),
    }
