"""Patient-level splits and the index they stand on."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from dinoct.data.index import COLUMNS, SliceIndex, write_csv
from dinoct.data.phantom import PhantomSpec, write_phantom
from dinoct.data.pipeline import PrepareOptions, prepare_dataset
from dinoct.data.splits import SplitManifest, make_split, split_file_name
from dinoct.errors import DinoctError


def index_rows(patients, series_each=2, slices=3):
    for p, patient in enumerate(patients):
        for s in range(series_each):
            for row in range(slices):
                number = (p * series_each + s) * slices + row
                cells = (-100.0 + 2.5 * row, 512, 512, 0.7, 0.7, 2.5, "MAKER", "B30f", 0, 0.4, -800.5, f"{number:08x}")
                yield (f"{number:016x}", f"series{p}-{s}", patient, row, *cells)


def make_index(tmp_path, patients, **options):
    path = tmp_path / "index.csv"
    write_csv(path, list(COLUMNS), index_rows(patients, **options))
    return SliceIndex.load(path)


def build(index, **options):
    return SplitManifest.decide([index.patient_name(i) for i in range(len(index))], **options).of_index(index)


PATIENTS = [f"{i:016x}" for i in range(50)]


def test_no_patient_is_on_both_sides_and_all_are_on_one(tmp_path):
    index = make_index(tmp_path, PATIENTS)
    manifest = build(index, dataset_id="d", seed=0, fraction=0.2)
    train, val = manifest.masks(index)
    assert (train ^ val).all()
    assert set(index.patient[train]).isdisjoint(index.patient[val])
    assert manifest.counts["val"] == {
        "patients": len(manifest.val),
        "series": 2 * len(manifest.val),
        "slices": val.sum(),
    }


def test_the_fraction_is_kept_on_average_and_seeds_differ():
    many = [f"p{i}" for i in range(5000)]
    sides = [make_split(many, seed=seed, fraction=0.1)[1] for seed in range(2)]
    assert all(400 < len(val) < 600 for val in sides)
    assert len(sides[0] & sides[1]) < 100


@pytest.mark.parametrize("seed", range(20))
def test_adding_patients_moves_nobody(tmp_path, seed):
    old = make_index(tmp_path, PATIENTS[:6])
    first = build(old, dataset_id="d", seed=seed, fraction=0.1)
    new = make_index(tmp_path, PATIENTS)
    second = build(new, dataset_id="d", seed=seed, fraction=0.1, previous=first)
    assert first.val <= second.val
    assert first.train <= second.train


def test_another_seed_or_data_set_ignores_the_previous_split(tmp_path):
    index = make_index(tmp_path, PATIENTS)
    named = build(index, dataset_id="d", seed=0, fraction=0.1, val_patients=PATIENTS[:3])
    assert named.val == set(PATIENTS[:3])
    fresh = build(index, dataset_id="d", seed=0, fraction=0.1)
    other = build(index, dataset_id="other", seed=0, fraction=0.5)
    for previous, seed in ((other, 0), (replace(named, dataset_id="other"), 0), (replace(named, seed=1), 0)):
        again = build(index, dataset_id="d", seed=seed, fraction=0.1, previous=previous)
        assert again.val == fresh.val


def test_patients_held_out_by_name_stay_so_until_others_are_named(tmp_path):
    few, all_ = make_index(tmp_path, PATIENTS[:8]), make_index(tmp_path, PATIENTS)
    split = partial(build, dataset_id="d", seed=0, fraction=0.5)
    named = split(few, val_patients=PATIENTS[:3])
    grown = split(all_, previous=named)
    assert (grown.val, grown.named) == (set(PATIENTS[:3]), True)
    assert grown.train == set(PATIENTS[3:])  # newcomers
    assert split(few, previous=grown).val == named.val
    assert split(all_, previous=grown, val_patients=PATIENTS[9:11]).val == set(PATIENTS[9:11])
    assert split(all_, previous=grown, val_patients=[]) == split(all_)  # the way back to the hash
    with pytest.raises(DinoctError, match=r"3 held-out patients .* split.val_patients=\[\]"):
        split(make_index(tmp_path, PATIENTS[3:]), previous=named)


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_there_is_a_patient_on_each_side(fraction):
    train, val = make_split(["a", "b", "c"], seed=0, fraction=fraction)
    assert train
    assert val


@pytest.mark.parametrize(
    ("patients", "options", "words"),
    [
        (["a"], {}, "needs two patients"),
        (["a", "b"], {"val_patients": ["c"]}, "not among the 2 patients"),
        (["a", "b"], {"val_patients": ["a", "b"]}, "none is left to train on"),
        (["a", "b"], {"fraction": 1.0}, "between 0 and 1"),
    ],
)
def test_impossible_splits_say_why(patients, options, words):
    with pytest.raises(DinoctError, match=words):
        make_split(patients, **({"seed": 0, "fraction": 0.5} | options))


def test_manifest_survives_the_disk_and_refuses_overlap_and_strangers(tmp_path):
    index = make_index(tmp_path, PATIENTS[:5])
    manifest = build(index, dataset_id="d", seed=3, fraction=0.25)
    path = tmp_path / split_file_name(0.25, 3)
    manifest.save(path)
    assert path.name == "val25_seed3.json"
    assert SplitManifest.load(path) == manifest
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"train": data["train"] + data["val"]}))
    with pytest.raises(DinoctError, match="both sides"):
        SplitManifest.load(path)
    path.write_text(json.dumps(data | {"train": data["train"][1:]}))
    with pytest.raises(DinoctError, match="1 patient"):
        SplitManifest.load(path).masks(index)
    path.write_text("{}")
    with pytest.raises(DinoctError, match="not a split manifest"):
        SplitManifest.load(path)
    with pytest.raises(DinoctError, match="no split manifest"):
        SplitManifest.load(tmp_path / "absent.json")


def test_index_columns_names_and_selection(tmp_path):
    index = make_index(tmp_path, PATIENTS[:3])
    assert len(index) == 18
    assert (index.series_name(17), index.patient_name(17)) == ("series2-1", PATIENTS[2])
    assert index.z_mm[1] == -97.5
    assert index.checksum[17] == "00000011"
    part = index.select(index.row == 1)
    assert len(part) == 6
    assert part.series_name(5) == "series2-1"
    assert index.select(np.array([5, 3])).slice_id.tolist() == [f"{5:016x}", f"{3:016x}"]


def test_content_hash_sees_every_change_and_only_changes(tmp_path):
    index = make_index(tmp_path, PATIENTS[:4])
    base = index.content_hash()
    assert len(base) == 16
    same = index.select(np.arange(len(index)))
    assert same.content_hash() == base
    assert index.select(np.arange(len(index))[::-1]).content_hash() != base
    assert index.select(np.arange(1, len(index))).content_hash() != base
    tail = make_index(tmp_path, PATIENTS[:4]).select(index.patient == 3)  # codes 3 where a file of its own has 0
    lines = (tmp_path / "index.csv").read_text().splitlines()
    (tmp_path / "tail.csv").write_text("\n".join([lines[0], *lines[19:]]) + "\n")
    assert SliceIndex.load(tmp_path / "tail.csv").content_hash() == tail.content_hash()
    for old, new in (("00000003,", "000000ff,"), (PATIENTS[1], PATIENTS[9]), (",00000002\n", ",ffffffff\n")):
        text = (tmp_path / "index.csv").read_text()
        assert old in text
        (tmp_path / "changed.csv").write_text(text.replace(old, new))
        assert SliceIndex.load(tmp_path / "changed.csv").content_hash() != base


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "missing"),
        (",".join(COLUMNS) + "\n" + ",".join(["x"] * len(COLUMNS)) + "\n", "cannot be read"),
        (",".join(COLUMNS) + "\n1,2\n", "cannot be read"),
    ],
)
def test_what_is_no_index_says_so_in_a_line(tmp_path, text, words):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(DinoctError, match=words) as caught:
        SliceIndex.load(tmp_path / "index.csv")
    assert "\n" not in str(caught.value)
    with pytest.raises(DinoctError, match="run dinoct-prepare"):
        SliceIndex.load(tmp_path / "absent.csv")


def test_an_index_the_size_of_lidc_is_small_and_quick(tmp_path):
    path = tmp_path / "index.csv"
    write_csv(path, list(COLUMNS), index_rows([f"{i:016x}" for i in range(1000)], series_each=1, slices=244))
    code = (
        "import resource, sys, time\n"
        "from pathlib import Path\n"
        "from dinoct.data.index import SliceIndex\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.process_time()\n"
        "index = SliceIndex.load(Path(sys.argv[1]))\n"
        "seconds = time.process_time() - start\n"
        "print(len(index), seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    slices, seconds, megabytes = map(float, result.stdout.split())
    assert slices == 244_000
    assert seconds < 4  # 1.4 s on an idle core
    assert megabytes < 200


def test_fifty_phantom_patients_stay_on_their_side_when_ten_join(tmp_path):
    write_phantom(tmp_path / "in", PhantomSpec(patients=60, slices=1, size=32))
    (tmp_path / "later").mkdir()
    for folder in sorted((tmp_path / "in").iterdir())[50:]:
        folder.rename(tmp_path / "later" / folder.name)
    sides, counts = [], []
    for sources in ([tmp_path / "in"], [tmp_path / "in", tmp_path / "later"]):
        report = prepare_dataset(sources, tmp_path / "root", PrepareOptions(0))
        index, manifest = SliceIndex.load(report.index_csv), SplitManifest.load(report.split_manifest)
        train, val = manifest.masks(index)
        assert set(index.patient[train]).isdisjoint(index.patient[val])
        assert train.sum() + val.sum() == len(index)
        counts.append((len(manifest.train | manifest.val), len(index.series_names)))
        sides.append(manifest)
    assert counts == [(50, 63), (60, 75)]  # every fourth has two series
    assert sides[0].train <= sides[1].train
    assert sides[0].val <= sides[1].val
    assert sides[0].val
