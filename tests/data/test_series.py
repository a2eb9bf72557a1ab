"""Slices -> series: grouping, order, duplicates, two series in one, gaps and tilt."""

import math
import random

import numpy as np
import pytest
from synthetic_dicom import write_slice

from dinoct.data.dicom import read_headers
from dinoct.data.privacy import Hasher
from dinoct.data.series import SliceRef, clusters, geometry, group_key, hashed, resolve, sort_slices
from dinoct.data.tags import PHASE_TAGS

HASHER = Hasher(b"s" * 32)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    return read_headers(str(write_slice(tmp_path_factory.mktemp("slice") / "a")))[0]


def refs(header, places, **phases):
    """Slices at z = places; phases: values per slice of one of PHASE_TAGS."""
    result = []
    for i, z in enumerate(places):
        values = tuple(phases[name][i] if name in phases else "" for name in PHASE_TAGS)
        result.append(SliceRef(f"file{i}", 0, header._replace(position=(0.0, 0.0, z), sop=f"sop{i}", phase=values)))
    return result


def digests(slices, names):
    return {(ref.file_id, ref.frame): name for ref, name in zip(slices, names, strict=True)}


def test_a_series_is_patient_study_series_shape_and_plane(header):
    key = group_key(hashed(header, HASHER), HASHER)
    changes = [
        {"patient": "P2"},
        {"study": "1.2.3"},
        {"series": "1.2.3"},
        {"rows": 128},
        {"cols": 128},
        {"orientation": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)},
    ]
    others = {group_key(hashed(header._replace(**change), HASHER), HASHER) for change in changes}
    assert len(others) == len(changes)
    assert key not in others
    same = [{"position": (0.0, 0.0, 9.0)}, {"orientation": (1.0, -0.0, 0.0, 0.0, 1.0, 0.0004)}, {"sop": "1.2.3"}]
    assert {group_key(hashed(header._replace(**change), HASHER), HASHER) for change in same} == {key}


def test_hashed_headers_hold_no_identity(header):
    named = header._replace(patient="Canary", study="1.9.1", series="1.9.2", sop="1.9.3")
    assert not any(text in str(hashed(named, HASHER)) for text in ("Canary", "1.9."))


def test_order_is_by_position_on_the_normal_towards_the_head(header):
    places = [float(z) for z in range(-30, 30, 3)]
    shuffled = refs(header, random.Random(0).sample(places, len(places)))
    assert [ref.header.position[2] for ref in sort_slices(shuffled)] == places


def test_order_on_a_tilted_gantry_follows_the_normal_and_not_z(header):
    # The couch moves along z while each origin is shifted in y, as a vendor does it that keeps the isocentre in view.
    tilt = math.radians(20)
    plane = (1.0, 0.0, 0.0, 0.0, math.cos(tilt), math.sin(tilt))
    normal = np.array([0.0, -math.sin(tilt), math.cos(tilt)])
    slices = []
    for i, shift in enumerate([0.0, 40.0, 80.0, 120.0]):
        position = normal * (3.0 * i) - np.array([0.0, math.cos(tilt), math.sin(tilt)]) * shift
        slices.append(SliceRef(f"f{i}", 0, header._replace(orientation=plane, position=tuple(position))))
    z = [ref.header.position[2] for ref in slices]
    assert z == sorted(z, reverse=True)  # z alone would turn the series upside down
    ordered = sort_slices(slices[::-1])
    assert [ref.file_id for ref in ordered] == ["f0", "f1", "f2", "f3"]
    shape = geometry(ordered)
    assert shape.tilt_deg == pytest.approx(20)
    assert shape.step_mm == pytest.approx(3)


def test_gaps_are_counted_with_the_slices_lost_in_them(header):
    shape = geometry(sort_slices(refs(header, [0, 2, 4, 10, 12, 16, 18])))
    assert (shape.step_mm, shape.max_step_mm, shape.gaps, shape.missing) == (2, 6, 2, 3)
    single = geometry(refs(header, [5]))
    assert math.isnan(single.step_mm)
    assert single.gaps == 0


def test_a_clean_series_stays_one(header):
    slices = refs(header, [4, 2, 0], AcquisitionNumber=["1", "2", "3"])
    resolved = resolve(slices, {})
    assert [(label, len(part)) for label, part in resolved.series] == [("", 3)]


def test_exact_duplicates_go_and_the_first_stays(header):
    slices = refs(header, [0, 2, 2.001, 4])
    resolved = resolve(slices, digests(slices[1:3], ["x", "x"]))
    assert [ref.file_id for ref in resolved.duplicates] == ["file2"]
    assert [ref.file_id for ref in resolved.series[0][1]] == ["file0", "file1", "file3"]
    assert resolve(slices[::-1], digests(slices[1:3], ["x", "x"])) == resolved  # whatever the order of files


def test_slices_a_tenth_of_a_millimetre_apart_are_no_duplicates(header):
    assert clusters(sort_slices(refs(header, [0, 0.1, 0.2]))) == []


def test_what_shares_a_position_does_so_whichever_slice_is_missing(header):
    slices = refs(header, [0, 0.008, 0.014, 5])
    (shared,) = clusters(sort_slices(slices))
    assert [ref.file_id for ref in shared] == ["file0", "file1", "file2"]
    for missing in range(3):
        rest = [ref for i, ref in enumerate(slices) if i != missing]
        assert all(set(cluster) <= set(shared) for cluster in clusters(rest))  # so their pixels are known


def test_two_phases_are_split_by_the_tag_that_tells_them_apart(header):
    slices = refs(
        header, [0, 2, 0, 2], AcquisitionNumber=["3", "3", "3", "3"], TemporalPositionIdentifier=["2", "2", "1", "1"]
    )
    resolved = resolve(slices, digests(slices, "abcd"))
    assert [label for label, _ in resolved.series] == ["TemporalPositionIdentifier=1", "TemporalPositionIdentifier=2"]
    assert [[ref.file_id for ref in part] for _, part in resolved.series] == [["file2", "file3"], ["file0", "file1"]]


@pytest.mark.parametrize("values", [["1", "1", "1", "1"], ["1", "", "2", "2"], ["1", "2", "1", "2"]])
def test_two_series_that_nothing_tells_apart_are_refused_whole(header, values):
    slices = refs(header, [0, 2, 0, 2], AcquisitionNumber=values)
    resolved = resolve(slices, digests(slices, "abcd"))
    assert resolved.series == []
    assert len(resolved.refused) == 4


@pytest.mark.parametrize(("positions", "kept"), [(11, 10), (10, 0)])
def test_a_position_that_is_taken_twice_costs_its_slices_and_not_the_series(header, positions, kept):
    slices = refs(header, [*range(0, 2 * positions, 2), 4])
    resolved = resolve(slices, digests([slices[2], slices[-1]], "ab"))
    assert sum(len(part) for _, part in resolved.series) == kept
    assert len(resolved.refused) == positions + 1 - kept
    assert resolved.reason.startswith("same position as" if kept else "two series in one")
