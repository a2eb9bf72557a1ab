"""Slices -> series: group, sort along the normal, drop duplicates, tell apart what shares a name. Pure functions.

A series is (patient, study, series UID, shape, orientation), never a folder: files that share a series UID across
patients are not one series, and a reformat filed under the same UID has another shape or orientation.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dinoct.data.header import SliceHeader, slice_normal
from dinoct.data.privacy import Hasher
from dinoct.data.tags import PHASE_TAGS

SAME_PLACE_MM = 0.01  # headers round positions to about a micrometre, and no scanner steps by less than a tenth of a mm
TWO_SERIES = "two series in one: same position, other pixels, and no tag tells them apart"
SAME_PLACE = "same position as another file of the series, other pixels, and no tag tells them apart"
FEW = 0.1  # of the positions: below this share of conflicts a series is one with some bad slices, and not two


class SliceRef(NamedTuple):
    """One slice (a frame of a file) on its way into a series. Patient and UIDs in its header are hashes."""

    file_id: str
    frame: int
    header: SliceHeader


class Geometry(NamedTuple):
    """How the slices of a series lie. `gaps` counts steps above 1.5 x the median, `missing` the slices lost in them."""

    step_mm: float  # median distance along the normal, NaN for one slice
    max_step_mm: float
    gaps: int
    missing: int
    tilt_deg: float  # angle between the slice normal and the patient's long axis


class Resolved(NamedTuple):
    """What became of a group: series as (label, slices in order), duplicates, and slices refused, with the reason."""

    series: list[tuple[str, list[SliceRef]]]
    duplicates: list[SliceRef]
    refused: list[SliceRef]
    reason: str = ""


def hashed(header: SliceHeader, hasher: Hasher) -> SliceHeader:
    """Return the header with patient and UIDs replaced by keyed hashes."""
    return header._replace(
        patient=hasher.patient(header.patient),
        study=hasher.key("study", header.study),
        series=hasher.key("series-uid", header.series),
        sop=hasher.key("sop", header.sop),
    )


def group_key(header: SliceHeader, hasher: Hasher) -> str:
    """Return the key of the series that a (hashed) header belongs to."""
    plane = ",".join(f"{round(x, 2) + 0.0:.2f}" for x in header.orientation)  # + 0.0 makes -0.0 and 0.0 one
    return hasher.key("series", header.patient, header.study, header.series, f"{header.rows}x{header.cols}", plane)


def position_mm(header: SliceHeader) -> float:
    """Return the place of the slice along its normal (towards the head), in mm."""
    return sum(x * y for x, y in zip(slice_normal(header.orientation), header.position, strict=True))


def sort_slices(slices: Sequence[SliceRef]) -> list[SliceRef]:
    """Sort feet to head by position on the slice normal; neither z nor InstanceNumber is reliable. Ties are stable."""
    return sorted(slices, key=lambda ref: (position_mm(ref.header), ref.header.sop, ref.file_id, ref.frame))


def clusters(ordered: Sequence[SliceRef]) -> list[list[SliceRef]]:
    """Return the sets of two or more sorted slices that share a position, each with the one before it.

    With the first of the set it would not do: without that one (it may not decode) others would share a position.
    """
    result: list[list[SliceRef]] = []
    last = -math.inf
    for ref in ordered:
        place = position_mm(ref.header)
        if place - last < SAME_PLACE_MM:
            result[-1].append(ref)
        else:
            result.append([ref])
        last = place
    return [cluster for cluster in result if len(cluster) > 1]


def resolve(slices: Sequence[SliceRef], digests: Mapping[tuple[str, int], str]) -> Resolved:
    """Make series of a group in which no two slices share a position.

    `digests` maps (file_id, frame) of every slice that shares a position to a hash of its HU. Same position and same
    pixels: the first stays. Same position and other pixels: the first tag of PHASE_TAGS whose values leave no shared
    position splits the group. Without one the slices in conflict are refused where they are at less than `FEW` of the
    positions; else the whole group is, since any choice would mix two series.
    """
    ordered = sort_slices(slices)
    duplicates = _duplicates(ordered, digests)
    dropped = {(ref.file_id, ref.frame) for ref in duplicates}
    unique = [ref for ref in ordered if (ref.file_id, ref.frame) not in dropped]
    conflicts = clusters(unique)
    if not conflicts:
        return Resolved([("", unique)] if unique else [], duplicates, [])
    for i, name in enumerate(PHASE_TAGS):
        parts: dict[str, list[SliceRef]] = {}
        for ref in unique:
            parts.setdefault(ref.header.phase[i], []).append(ref)
        if len(parts) > 1 and "" not in parts and not any(clusters(part) for part in parts.values()):
            return Resolved([(f"{name}={value}", parts[value]) for value in sorted(parts)], duplicates, [])
    refused = [ref for cluster in conflicts for ref in cluster]
    if len(conflicts) < FEW * (len(unique) - len(refused) + len(conflicts)):
        bad = {(ref.file_id, ref.frame) for ref in refused}
        rest = [ref for ref in unique if (ref.file_id, ref.frame) not in bad]
        return Resolved([("", rest)], duplicates, refused, SAME_PLACE)
    return Resolved([], duplicates, unique, TWO_SERIES)


def _duplicates(ordered: Sequence[SliceRef], digests: Mapping[tuple[str, int], str]) -> list[SliceRef]:
    result = []
    for cluster in clusters(ordered):
        seen: set[str] = set()
        for ref in cluster:
            digest = digests[ref.file_id, ref.frame]
            if digest in seen:
                result.append(ref)
            seen.add(digest)
    return result


def series_name(group: str, label: str, hasher: Hasher) -> str:
    """Return the name of a series in the store: the group's key, or a key of its own for a part of a split group."""
    return group if not label else hasher.key("series-part", group, label)


def geometry(ordered: Sequence[SliceRef]) -> Geometry:
    """Measure the steps between sorted slices and the tilt of the gantry."""
    normal = slice_normal(ordered[0].header.orientation)
    tilt = math.degrees(math.acos(min(1.0, normal[2])))
    steps = np.diff([position_mm(ref.header) for ref in ordered])
    if len(steps) == 0:
        return Geometry(math.nan, math.nan, 0, 0, tilt)
    step = statistics.median(steps.tolist())  # numpy's own imports its masked arrays first
    wide = steps[steps > 1.5 * step]
    return Geometry(step, float(steps.max()), len(wide), int(sum(round(w / step) - 1 for w in wide)), tilt)
