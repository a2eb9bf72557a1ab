"""The probes: known geometry, features with a known answer, and the whole of them on a phantom."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, run

from dinoct import checkpoint as checkpoints
from dinoct.config import ProbeConfig
from dinoct.data.dataset import read_slice
from dinoct.data.index import SliceIndex
from dinoct.data.masks import MaskError, MaskStore, write_masks
from dinoct.data.privacy import locked
from dinoct.data.store import SliceStore
from dinoct.data.views import ViewSpec, sample_view
from dinoct.errors import ConfigError, DinoctError
from dinoct.evals.correspondence import compare, matching_patches
from dinoct.evals.features import choose_slices, neighbours, patch_hu
from dinoct.evals.linear import label_probes, position_probe, relative_position, series_purity, shortcut_probe
from dinoct.evals.retrieval import one_per_series, score_hard
from dinoct.evals.structure import dice
from dinoct.evals.verdict import figure
from dinoct.validate import validate_rules


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- patch correspondence -----------------------------------------------------------------------------------------


def test_patches_match_where_the_pixels_do():
    """A slice whose pixels hold their own place: what a patch shows says where it lies, whatever crop and flip."""
    size, grid = 256, 8
    rows, cols = np.mgrid[0:size, 0:size]
    spec = ViewSpec(size=64, scale=(0.4, 1.0), ratio=(0.75, 1.33), flip=0.5, window=ProbeConfig().window)
    for seed in range(20):
        draw = rng(seed)
        views = [sample_view(draw, spec, rows) for _ in range(2)]
        boxes = torch.tensor([[[v.top, v.left, v.height, v.width, v.flip] for v in views]], dtype=torch.float32)
        match, inside = matching_patches(boxes, grid)
        y, x = (
            [patch_hu(plane.astype(np.float32), view, grid).ravel() for view in views] for plane in (rows, cols)
        )  # the place that each patch shows
        assert inside.any()
        far = np.hypot(y[0] - y[1][match[0]], x[0] - x[1][match[0]])[inside[0].numpy()]
        reach = np.hypot(views[1].height, views[1].width) / grid / 2  # half a patch's diagonal
        assert far.max() <= reach + 1.0


def test_a_perfect_encoder_finds_its_patches_and_a_blind_one_does_not():
    place = torch.eye(16).expand(2, 16, 16)
    match = torch.stack([torch.arange(16), torch.arange(16).flip(0)])
    second = torch.stack([place[0], place[1][match[1]]])
    valid = torch.ones(2, 16, dtype=torch.bool)
    perfect = compare(place, second, match, valid)
    assert perfect[:, 0].tolist() == [1, 1]
    assert perfect[:, 1:].abs().max() == 0
    constant = compare(torch.ones(2, 16, 4), torch.ones(2, 16, 4), match, valid)
    assert constant[:, 2].tolist() == [0.5, 0.5]
    nowhere = compare(place, second, match, torch.zeros(2, 16, dtype=torch.bool))
    assert nowhere.isnan().all()


# --- probes on features --------------------------------------------------------------------------------------------


def test_hard_negatives_are_the_slices_beside(phantom_root):
    index = SliceIndex.load(phantom_root / "_index" / "index.csv")
    places, beside = neighbours(index, np.arange(len(index)), [-1, 2])
    assert len(places) == len(np.unique(index.series)) * (8 - 3)  # the first and the last two have not all
    for place, (before, behind) in zip(places, beside, strict=True):
        assert index.series[before] == index.series[place] == index.series[behind]
        assert (index.row[before], index.row[behind]) == (index.row[place] - 1, index.row[place] + 2)
    x = torch.from_numpy(rng().normal(size=(50, 8)))
    other = torch.from_numpy(rng(1).normal(size=(50, 4, 8)))
    assert score_hard(x, 3 * x, other)["top1"] == 1
    assert score_hard(x, x, x.unsqueeze(1).expand(-1, 4, -1))["top1"] == 0  # ties are lost
    assert one_per_series(np.array([3, 3, 1, 3, 1, 2])).tolist() == [0, 2, 5]


def test_the_place_in_the_body_is_read_on_other_patients():
    fit_target, target = rng(0).random(200), rng(1).random(100)
    fit_target[:5] = np.nan
    knows = {"fit": rng(2).normal(size=(200, 6)), "judged": rng(3).normal(size=(100, 6))}
    knows["fit"][:, 2], knows["judged"][:, 2] = np.nan_to_num(fit_target) * 9, target * 9
    got = position_probe({"a": knows["fit"]}, fit_target, {"a": knows["judged"]}, target)["a"]
    assert got["r2"] > 0.95
    assert got["spearman"] > 0.95
    assert got["mean_absolute_error"] < 0.05
    blind = position_probe({"a": rng(4).normal(size=(200, 6))}, fit_target, {"a": knows["judged"][:, :6] * 0}, target)
    assert blind["a"]["r2"] < 0.1
    assert "not_measured" in position_probe({}, fit_target * np.nan, {}, target)


def test_relative_position_goes_by_z_within_a_series():
    class Index:  # the columns it looks at
        series = np.repeat([1, 0], [12, 9])
        z_mm = np.concatenate([np.arange(12) * -2.5, np.arange(9.0)])

        def __len__(self):
            return 21

    got = relative_position(Index())
    assert got[:12].tolist() == pytest.approx(np.linspace(1, 0, 12).tolist())
    assert np.isnan(got[12:]).all()  # too short for a place to mean something


def test_a_scanner_that_shows_in_the_features_is_found_and_a_patients_own_mark_is_not_mistaken_for_it():
    patients = np.repeat(np.arange(12), 20)
    vendor = np.where(patients % 2, "A", "B")
    marked = rng(0).normal(size=(240, 8))
    marked[:, 0] += 4 * (patients % 2)
    clean = rng(1).normal(size=(240, 8)) + rng(2).normal(size=(12, 8))[patients]  # each patient his own place
    got = shortcut_probe({"marked": marked, "clean": clean}, vendor, patients)
    assert got["marked"]["balanced_accuracy"] > 0.9
    assert got["clean"]["balanced_accuracy"] < 0.75
    assert got["marked"]["chance"] == 0.5
    lone = np.where(patients == 3, "C", "A")
    assert "not_measured" in shortcut_probe({"marked": marked}, lone, patients)


def test_labels_are_read_by_neighbours_and_by_a_linear_layer():
    codes, fit_codes = rng(0).integers(0, 2, 60), rng(1).integers(0, 2, 90)
    fit_codes[:10] = -1
    fit, judged = rng(2).normal(size=(90, 5)) / 5, rng(3).normal(size=(60, 5)) / 5
    fit[:, 1] += 8 * (2 * fit_codes - 1)
    judged[:, 1] += 8 * (2 * codes - 1)
    got = label_probes({"a": fit}, fit_codes, {"a": judged}, codes)["a"]
    assert min(got.values()) > 0.95
    assert set(got) == {"knn_balanced_accuracy", "linear_balanced_accuracy", "linear_auroc"}
    assert "not_measured" in label_probes({"a": fit}, fit_codes, {"a": judged}, np.zeros(60, int))


def test_purity_counts_neighbours_of_the_same_series():
    series = np.repeat(np.arange(4), 25)
    apart = np.eye(4)[series] + rng().normal(0, 0.01, (100, 4))
    got = series_purity({"apart": apart, "mixed": rng(1).normal(size=(100, 4))}, series)
    assert got["apart"]["purity"] == 1
    assert got["mixed"]["purity"] == pytest.approx(got["mixed"]["chance"], abs=0.06)


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked_root(tmp_path_factory):
    """A prepared phantom with a mask of its dark parts inside the body beside each series' files, and labels."""
    from dinoct.data.labels import load_labels
    from dinoct.data.phantom import PhantomSpec, write_phantom
    from dinoct.data.pipeline import PrepareOptions, prepare_dataset
    from dinoct.data.privacy import write_salt

    root = tmp_path_factory.mktemp("masked")
    write_salt(root, b"phantom " * 4)
    write_phantom(root / "dicom", PhantomSpec(patients=5, slices=12, size=96))
    prepare_dataset([root / "dicom"], root, PrepareOptions(workers=0, val_fraction=0.3))
    import pydicom

    for folder in {path.parent for path in (root / "dicom").rglob("*") if path.is_file()}:
        files = sorted(path.name for path in folder.iterdir())[::-1]  # another order than the store's
        pixels = [pydicom.dcmread(folder / name) for name in files]
        hu = np.stack([p.pixel_array * float(p.RescaleSlope) + float(p.RescaleIntercept) for p in pixels])
        np.savez(folder / "lung_mask.npz", mask=((hu > -960) & (hu < -600)).astype(np.uint8) * 3, files=files)
    index = SliceIndex.load(root / "_index" / "index.csv")
    high = index.z_mm > np.median(index.z_mm)
    lines = [f"{key},{'high' if up else 'low'}" for key, up in zip(index.slice_id, high, strict=True)]
    (root / "_index" / "labels.csv").write_text("\n".join(["key,label", *lines]) + "\n")
    assert len(load_labels(root / "_index" / "labels.csv", index).names) == 2
    return root


def test_masks_find_their_slices_by_the_name_of_the_file(masked_root):
    folder, known, strange = write_masks(masked_root / "dicom", masked_root)
    index = SliceIndex.load(masked_root / "_index" / "index.csv")
    store, masks = SliceStore(masked_root / "store"), MaskStore(folder)
    assert (known, strange) == (len(index), 0)
    rows = masks.rows_with_mask(index)
    assert rows.tolist() == list(range(len(index)))
    for i in rows[::7]:
        hu, mask = read_slice(index, store, int(i)), masks.read(index, int(i))
        assert set(np.unique(mask)) <= {0, 1}
        assert np.array_equal(mask > 0, (hu > -960) & (hu < -600))


def test_a_series_may_have_a_file_of_masks_per_slice(masked_root, tmp_path):
    (source,) = list((masked_root / "dicom").rglob("*.npz"))[:1]
    files, masks = (np.load(source)[name] for name in ("files", "mask"))
    copy = tmp_path / "root"
    shutil.copytree(masked_root, copy)
    shutil.rmtree(copy / "_masks", ignore_errors=True)
    pieces = []
    for i, name in enumerate(files):
        pieces.append(source.with_name(f"piece_{i}.npz"))
        np.savez(pieces[-1], files=[name], mask=masks[i : i + 1])
    hidden = source.rename(source.with_suffix(".away"))
    try:
        folder, known, _ = write_masks(source.parent, copy)
    finally:
        hidden.rename(source)
        for piece in pieces:
            piece.unlink()
    index = SliceIndex.load(copy / "_index" / "index.csv")
    assert known == len(files) == len(MaskStore(folder).rows_with_mask(index))


def test_a_mask_of_another_shape_is_refused_and_nothing_is_written(masked_root, tmp_path):
    (source,) = list((masked_root / "dicom").rglob("*.npz"))[:1]
    copy = tmp_path / "root"
    shutil.copytree(masked_root, copy)
    before = {path.name: path.read_bytes() for path in write_masks(source.parent, copy)[0].glob("*")}
    odd = source.with_name("0.npz")
    np.savez(odd, files=np.load(source)["files"][:1], mask=np.ones((1, 4, 5)))
    try:
        with pytest.raises(DinoctError, match=r"number 1 is \[1, 4, 5\], and a slice that it names is \d+ x \d+"):
            write_masks(source.parent, copy)
    finally:
        odd.unlink()
    assert {path.name: path.read_bytes() for path in (copy / "_masks").glob("*")} == before


def damage(path: Path) -> None:
    """Other bytes in the compressed masks, so that they cannot be unpacked."""
    with zipfile.ZipFile(path) as container:
        start = container.getinfo("mask.npy").header_offset + 70
    content = bytearray(path.read_bytes())
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)


def test_damaged_masks_are_replaced_or_named(masked_root, tmp_path):
    copy = tmp_path / "root"
    shutil.copytree(masked_root, copy)
    folder, known, _ = write_masks(masked_root / "dicom", copy)
    index = SliceIndex.load(copy / "_index" / "index.csv")
    for path in folder.glob("*"):
        damage(path)
    with pytest.raises(MaskError, match="is no file of masks"):
        MaskStore(folder).rows_with_mask(index)
    write_masks(masked_root / "dicom", copy)
    assert len(MaskStore(folder).rows_with_mask(index)) == known

    source = tmp_path / "in" / "x.npz"
    source.parent.mkdir()
    files = ["a", "b"]
    for write in (
        lambda: source.write_bytes(b""),
        lambda: np.savez(source, files="a", mask=np.ones((1, 4, 4))),
        lambda: source.write_bytes(source.with_suffix(".npy").read_bytes()),
        lambda: (np.savez_compressed(source, files=files, mask=np.ones((2, 64, 64))), damage(source)),
    ):
        np.save(source.with_suffix(".npy"), np.ones(3))
        write()
        with pytest.raises(DinoctError, match="number 1 has no `mask`"):
            write_masks(source.parent, copy)


def test_masks_wait_for_no_other_prepare(masked_root):
    with locked(masked_root), pytest.raises(DinoctError, match="another prepare is at work"):
        write_masks(masked_root / "dicom", masked_root)


def test_masks_of_an_earlier_format_say_what_to_do(masked_root, tmp_path):
    index = SliceIndex.load(masked_root / "_index" / "index.csv")
    mask = np.ones((1, index.rows[0], index.cols[0]), np.uint8)
    np.savez(tmp_path / f"{index.series_name(0)}.npz", rows=np.zeros(1, np.int32), mask=mask)
    with pytest.raises(DinoctError, match="run dinoct-prepare masks= again"):
        MaskStore(tmp_path).rows_with_mask(index)


def test_masks_that_are_none_say_so(masked_root, tmp_path):
    with pytest.raises(DinoctError, match=r"no \.npz"):
        write_masks(tmp_path, masked_root)
    np.savez(tmp_path / "name_of_a_patient.npz", mask=np.zeros((2, 4, 4)), files=["a"])
    with pytest.raises(DinoctError, match="number 1 has no") as error:
        write_masks(tmp_path, masked_root)
    assert "patient" not in str(error.value)
    np.savez(tmp_path / "name_of_a_patient.npz", mask=np.zeros((1, 4, 4)), files=["a"])
    with pytest.raises(DinoctError, match="none of the 1 slices"):
        write_masks(tmp_path, masked_root)


def test_dice():
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert dice(a, b) == 0.5
    assert dice(a, a) == dice(a & False, a & False) == 1
    assert dice(a, ~a) == 0


# --- the whole ------------------------------------------------------------------------------------------------------


def test_eval_measures_what_the_data_supports_and_says_why_not_the_rest(masked_root, workplace, capfd):
    write_masks(masked_root / "dicom", masked_root)
    assert run("train", *TINY, f"data.root={masked_root}", "train.max_steps=4", "ckpt.every=2", "run_dir=r") == 0
    status = run("eval", "checkpoint=r", "n=24", "hardware=cpu", "hardware.num_workers=0")
    assert status in (0, 2)
    text = capfd.readouterr().out
    assert "curve over 2 checkpoints" in text
    report = json.loads((workplace / "r" / "view_retrieval_step00000004_N24.json").read_text())
    probes = report["probes"]
    for name in ("correspondence", "hard_negatives", "position", "labels", "masks", "purity", "one_per_series"):
        assert "trained" in probes[name], name
        assert "random_init" in probes[name], name
    assert 0 <= probes["masks"]["pixels"]["dice"] <= 1
    assert 0 <= probes["correspondence"]["trained"]["mean_percentile_rank"] <= 1
    curve = json.loads((workplace / "r" / "view_retrieval_curve_N24.json").read_text())["points"]
    assert [point["step"] for point in curve] == [2, 4]
    for picture in ("view_retrieval_step00000002_N24.png", "view_retrieval_curve_N24.png"):
        assert (workplace / "r" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_curve_is_of_one_run_and_counts_a_file_once(masked_root, workplace, capfd):
    for name in "ab":
        typed = ["train.max_steps=2", "ckpt.every=1", f"run_dir={name}"]
        assert run("train", *TINY, f"data.root={masked_root}", *typed) == 0
    files = [f"{name}/checkpoint_{step}.pth" for name in "ab" for step in ("00000001", "00000002", "final_00000002")]
    quick = ["n=8", "hardware=cpu", "hardware.num_workers=0", "probe=view_retrieval", "out=o"]
    assert run("eval", f"checkpoint=[{','.join(files)}]", *quick) in (0, 2)
    assert capfd.readouterr().out.count("curve over 2 checkpoints") == 2
    for name in "ab":
        points = json.loads((workplace / "o" / name / "view_retrieval_curve_N8.json").read_text())["points"]
        assert [point["step"] for point in points] == [1, 2]
    assert run("eval", "checkpoint=[]", *quick) == 1
    assert "checkpoint: name at least one" in capfd.readouterr().err


def test_an_encoder_that_gives_no_numbers_is_called_broken(masked_root, workplace, capfd):
    assert run("train", *TINY, f"data.root={masked_root}", "train.max_steps=1", "run_dir=r") == 0
    found = checkpoints.load(workplace / "r" / "checkpoint_00000001.pth")
    found.state["model"]["teacher.backbone.vit.norm.bias"][0] = float("nan")
    checkpoints.save(workplace / "r" / "checkpoint_00000001.pth", found.state, found.meta)
    assert run("eval", "checkpoint=r", "n=8", "hardware=cpu", "hardware.num_workers=0") == 1
    assert "the encoder gives NaN or infinity for 8 of 8 slices" in capfd.readouterr().err


def test_keys_of_labels_that_are_not_in_the_data_are_counted(masked_root, workplace, capfd):
    """Of patients who were withdrawn, or of another data set: the figure would stand on fewer slices without a word."""
    index = SliceIndex.load(masked_root / "_index" / "index.csv")
    rows = [f"{key};{i % 2}" for i, key in enumerate(index.slice_id[:50])]
    (workplace / "mine.csv").write_text("\n".join(["key;label", *rows, "stranger;1", "another;0"]) + "\n")
    assert run("train", *TINY, f"data.root={masked_root}", "train.max_steps=1", "run_dir=r") == 0
    quick = ["checkpoint=r", "n=24", "hardware=cpu", "hardware.num_workers=0"]
    capfd.readouterr()
    assert run("eval", *quick, "probe.probes=[labels]", "probe.labels=mine.csv") in (0, 2)
    said = " ".join(capfd.readouterr().out.split())
    joined = json.loads((workplace / "r" / "view_retrieval_step00000001_N24.json").read_text())["labels_joined"]
    assert (joined["keys"], joined["keys_unknown"], joined["train_slices"] + joined["val_slices"]) == (52, 2, 50)
    assert "labels: 2 of 52 keys are no slice_id or series of the data" in said
    assert f"labels: {joined['train_slices']} of " in said
    (workplace / "mine.csv").write_text("\n".join(["key;label", *rows[1:]]) + "\n")
    assert run("eval", *quick, "probe.probes=[labels]", "probe.labels=mine.csv") in (0, 2)
    assert (workplace / "r" / "view_retrieval_step00000001_N24_earlier.json").is_file()  # of other labels


def test_probes_are_chosen_by_group_and_by_key(masked_root, workplace, capfd):
    assert run("train", *TINY, f"data.root={masked_root}", "train.max_steps=1", "run_dir=r") == 0
    quick = ["checkpoint=r", "n=24", "hardware=cpu", "hardware.num_workers=0"]
    assert run("eval", *quick, "probe=view_retrieval") in (0, 2)
    path = workplace / "r" / "view_retrieval_step00000001_N24.json"
    assert set(json.loads(path.read_text())["probes"]) == {"one_per_series"}
    rule = 'probe.rules=["probes/purity/trained/purity >= 2.0"]'
    assert run("eval", *quick, "probe.probes=[purity]", rule) == 2
    assert "FAIL  probes/purity/trained/purity" in capfd.readouterr().out
    assert run("eval", *quick, "probe.rules=[dice]") == 1
    assert '"dice" is not FIGURE >= NUMBER' in capfd.readouterr().err
    assert run("eval", *quick, "probe.probes=[beauty]") == 1
    assert "probe.probes must be one of" in capfd.readouterr().err
    assert run("eval", *quick, "probe.masks=nowhere") == 1
    assert "probe.masks: there is no folder" in capfd.readouterr().err
    assert run("eval", "checkpoint=.", "n=24") == 1
    assert "there is no checkpoint_STEP.pth" in capfd.readouterr().err


def test_one_held_out_patient_is_no_proof_and_the_report_says_so(masked_root, workplace, capfd):
    """Of three held-out patients, slices of one are drawn: they are what the report counts."""
    assert run("train", *TINY, f"data.root={masked_root}", "train.max_steps=2", "ckpt.every=1", "run_dir=r") == 0
    index, split = SliceIndex.load(masked_root / "_index" / "index.csv"), masked_root / "_splits"
    manifest = json.loads(next(split.glob("*.json")).read_text())
    assert len(manifest["val"]) > 1
    val = index.select(np.isin(np.array(index.patient_names)[index.patient], manifest["val"]))
    seed = next(s for s in range(999) if len(np.unique(val.patient[choose_slices(val, 3, s)])) == 1)
    quick = ["hardware=cpu", "hardware.num_workers=0", "probe=view_retrieval", f"probe.seed={seed}"]
    assert run("eval", "checkpoint=r", "n=3", *quick, "probe.min_ratio=0") == 2
    says = "one patient: no interval over patients"
    out = " ".join(capfd.readouterr().out.split())
    assert "n=3 slices of 1 patient" in out
    assert f"95 %: {says}" in out
    assert "hold out more" in out
    report = json.loads((workplace / "r" / "view_retrieval_step00000002_N3.json").read_text())
    assert (report["patients"], report["intervals"], report["mean_percentile_rank_95"]) == (1, says, None)
    assert not report["checks"]["rank"]["passed"]
    for picture in ("view_retrieval_step00000002_N3.png", "view_retrieval_curve_N3.png"):
        assert (workplace / "r" / picture).is_file()


def test_a_rule_about_a_figure_that_was_not_measured_is_a_failed_check_of_a_report(masked_root, workplace, capfd):
    assert run("train", *TINY, f"data.root={masked_root}", "train.max_steps=1", "run_dir=r") == 0
    quick = ["checkpoint=r", "n=24", "hardware=cpu", "hardware.num_workers=0", "probe.probes=[masks]"]
    rules = ["probes/masks/trained/dice >= 0", "probes/masks/trained/beauty >= 0", "ratio >= 0", "ratio <= 999"]
    (workplace / "empty").mkdir()
    assert run("eval", *quick, "probe.masks=empty", f"probe.rules={json.dumps(rules)}", "probe.min_ratio=998") == 2
    out = " ".join(capfd.readouterr().out.split())
    assert f"FAIL {rules[0]}: not measured, masks on one side of the split alone; needs >= 0 (probe.rules)" in out
    found = json.loads((workplace / "r" / "view_retrieval_step00000001_N24.json").read_text())["checks"]
    assert [found[name]["passed"] for name in ("ratio", *rules)] == [False, False, False, True, True]
    index = SliceIndex.load(masked_root / "_index" / "index.csv")
    (workplace / "old").mkdir()
    for name in index.series_names:  # of an earlier format: the other figures are written all the same
        np.savez(workplace / "old" / f"{name}.npz", rows=np.zeros(1, np.int32), mask=np.ones((1, 4, 4), np.uint8))
    assert run("eval", *quick, "probe.masks=old", "out=again") in (0, 2)
    found = json.loads((workplace / "again" / "view_retrieval_step00000001_N24.json").read_text())["probes"]["masks"]
    assert "run dinoct-prepare masks= again" in found["not_measured"]
    report = {"probes": {"masks": {"trained": {"dice": 0.5}}}}
    assert figure(report, "probes/masks/trained/dice") == 0.5
    assert figure(report, "probes/masks/random/dice") == "there is no random among: trained"


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("probes/mask/trained/dice >= 0.8", "probe.rules: probes must be one of one_per_series, scanner_manufacturer"),
        ("probes/labels/trained/knn >= 0.8", "needs labels in probe.probes"),
        ("probes/scanner_kernel/trained/balanced_accuracy <= 1", "needs scanner in probe.probes"),
        ("rank <= 0.2", "probe.rules must be one of n, patients"),
    ],
)
def test_a_rule_that_no_report_can_answer_is_refused_at_once(rule, says):
    with pytest.raises(ConfigError, match=says):
        validate_rules(ProbeConfig(probes=["masks"], rules=[rule]))


def test_reports_of_two_runs_do_not_overwrite_each_other(masked_root, workplace, capfd):
    for name in ("a", "x/a", "b"):
        seed = f"seed={len(name)}"
        assert run("train", *TINY, f"data.root={masked_root}", "train.max_steps=1", f"run_dir={name}", seed) == 0
    quick = ["out=out", "n=24", "hardware=cpu", "hardware.num_workers=0", "probe=view_retrieval"]
    assert run("eval", "checkpoint=[a,b/checkpoint_00000001.pth]", *quick) in (0, 2)
    reports = [workplace / "out" / name / "view_retrieval_step00000001_N24.json" for name in "ab"]
    assert all(path.with_suffix(".png").is_file() for path in reports)
    capfd.readouterr()
    assert run("eval", "checkpoint=[a,x/a]", *quick) == 1
    assert "out: two of the runs have folders of the same name" in capfd.readouterr().err


def test_an_evaluation_is_a_wandb_run_of_its_own_in_the_runs_group(masked_root, workplace):
    assert run("train", *TINY, f"data.root={masked_root}", "train.max_steps=1", "run_dir=r") == 0
    arguments = ["checkpoint=r", "n=24", "hardware=cpu", "hardware.num_workers=0", "probe=view_retrieval"]
    assert run("eval", *arguments, "tracker=default") in (0, 2)
    file = next((workplace / "r" / "wandb").glob("offline-run-*/run-*.wandb"))
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", file]  # the official reader
    told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert re.search(r'"job_?[tT]ype": *"eval"', told)
    assert re.search(r'"(run_?)?[gG]roup": *"r"', told)
    assert "Eval/mean_percentile_rank" in told
