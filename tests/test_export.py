"""The encoder in other hands: one file is enough, its features are the checkpoint's, and no name goes along."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from commands import REPOSITORY, TINY, run
from safetensors import safe_open

import dinoct
from dinoct import checkpoint as checkpoints
from dinoct.data.dataset import read_slice
from dinoct.data.dicom import read_hu
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore
from dinoct.data.views import View, letterbox, render_view
from dinoct.delivery import onnx_graph
from dinoct.delivery.encoder import HounsfieldError
from dinoct.delivery.formats import published
from dinoct.errors import CheckpointError
from dinoct.models.backbone import Backbone
from dinoct.models.load import initial_weights, load_backbone, model_config

MODEL = ["model.registers=2", "model.layer_scale=0.1", "model.patch=8"]
WINDOW = ["aug.window.center=[-700,-500]", "aug.window.width=[1400,1600]"]  # middle: -1350 to 150 HU
ENDINGS = {"safetensors": ".safetensors", "timm": "_timm.safetensors", "onnx": ".onnx"}


@pytest.fixture(scope="module")
def trained(phantom_root, tmp_path_factory):
    """A checkpoint of two steps, judged."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert (
        run("train", *TINY, *MODEL, *WINDOW, f"data.root={phantom_root}", f"run_dir={folder}", "train.max_steps=2") == 0
    )
    path = folder / "checkpoint_00000002.pth"
    assert run("eval", f"checkpoint={path}", "n=6", "hardware=cpu", "hardware.num_workers=0") in (0, 2)
    return path


@pytest.fixture(scope="module")
def exported(trained):
    """Where each format lies: beside the checkpoint."""
    for name in ENDINGS:
        assert run("export", f"checkpoint={trained}", f"format={name}") == 0
    return {name: trained.parent / f"encoder_00000002{ending}" for name, ending in ENDINGS.items()}


@pytest.fixture(scope="module")
def slices(phantom_root):
    """All slices of the set in HU, ``[n, 96, 96]``, in the order of the index."""
    index, store = SliceIndex.load(phantom_root / "_index" / "index.csv"), SliceStore(phantom_root / "store")
    return np.stack([read_slice(index, store, i) for i in range(len(index))])


def whole(hu: np.ndarray, size: int) -> np.ndarray:
    """A slice as evaluation shows it to the backbone."""
    hu = letterbox(hu)
    return render_view(hu, View(0, 0, *hu.shape, False, -1350, 150), size)


def test_features_are_those_of_the_checkpoint_on_the_windowed_slice(trained, exported, slices):
    backbone = load_backbone(checkpoints.load(trained))
    images = np.stack([whole(hu, 32) for hu in slices[:4]])[:, None]
    cls, patches = backbone(torch.from_numpy(images))
    ours, own_checkpoint = (dinoct.load_encoder(path)(slices[:4]) for path in (exported["safetensors"], trained))
    assert ours.cls.shape == (4, 32)
    assert ours.patches.shape == (4, 16, 32)
    torch.testing.assert_close(ours.cls, cls, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.patches, patches, atol=1e-5, rtol=0)
    assert torch.equal(ours.cls, own_checkpoint.cls)


@pytest.mark.parametrize("shape", [(96, 96), (32, 32), (20, 20), (100, 60), (61, 100), (80, 80), (81, 81), (512, 400)])
def test_any_size_is_seen_as_in_evaluation(exported, shape):
    """Smaller, larger, on both sides of the step from bilinear to area, and not square."""
    hu = np.random.default_rng(0).uniform(-1024, 3071, shape).astype(np.float32)
    image = dinoct.load_encoder(exported["safetensors"]).image(torch.from_numpy(hu)[None, None])
    np.testing.assert_allclose(image[0, 0].numpy(), whole(hu, 32), atol=1e-5)


@pytest.mark.parametrize("name", ENDINGS)
def test_the_code_of_the_card_gives_the_checkpoints_features(trained, exported, slices, monkeypatch, name):
    path = exported[name]
    (code,) = re.findall(r"```python\n(.*?)```", Path(f"{path}.md").read_text(), re.DOTALL)
    hu = torch.from_numpy(slices[:3, None, :32, :32].astype(np.float32))
    code, replaced = re.subn(r"^hu = .*$", "hu = HU", code, flags=re.MULTILINE)
    assert replaced == 1
    monkeypatch.chdir(path.parent)
    names = {"HU": hu.numpy() if name == "onnx" else hu}
    exec(code, names)
    expected = dinoct.load_encoder(trained)(hu)
    for key, value in expected._asdict().items():
        np.testing.assert_allclose(np.asarray(names[key]), value, atol=1e-4 if name == "onnx" else 1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 96, 70), (5, 1, 512, 512)])
def test_the_graph_takes_any_batch_and_size(trained, exported, shape):
    hu = np.random.default_rng(1).uniform(-1024, 2000, shape).astype(np.float32)
    session = onnxruntime.InferenceSession(exported["onnx"])
    for got, want in zip(session.run(["cls", "patches"], {"hu": hu}), dinoct.load_encoder(trained)(hu), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_graph_too_large_for_one_file_has_a_second_one(exported, workplace, monkeypatch):
    monkeypatch.setattr(onnx_graph, "ONE_FILE", 1000)
    onnx_graph.save_graph(onnx_ir.load(exported["onnx"]), workplace / "big.onnx")
    assert {path.name for path in workplace.iterdir()} == {"big.onnx", "big.onnx.data"}
    assert Path("big.onnx").stat().st_size < Path("big.onnx.data").stat().st_size
    hu = np.full((1, 1, 64, 64), -700, np.float32)
    outputs = [onnxruntime.InferenceSession(path).run(None, {"hu": hu}) for path in ("big.onnx", exported["onnx"])]
    for got, want in zip(*outputs, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("name", ENDINGS)
def test_the_card_says_where_it_comes_from_and_names_no_path(trained, exported, phantom_root, name):
    meta, path = checkpoints.load(trained).meta, exported[name]
    if name == "onnx":
        facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}["dinoct"]
    else:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()["dinoct"]
    facts, words = json.loads(facts), Path(f"{path}.md").read_text()
    (report,) = (json.loads(p.read_text()) for p in trained.parent.glob("view_retrieval_*.json"))
    assert (facts["step"], facts["samples_seen"]) == (2, 16)
    assert facts["window_hu"] == [-1350, 150]
    assert facts["evaluation"]["encoder"]["mean_percentile_rank"] == report["mean_percentile_rank"]
    for fact in (meta["git_commit"], meta["data_manifest_hash"]):
        assert fact in facts.values()
        assert fact in words
    assert report["window"] == facts["evaluation"]["window"] == {"center": [-450, -150], "width": [1000, 1800]}
    for text in ("windows of 1000 to 1800 HU around -450 to -150 HU", "-1000 to 400 HU, which is not the window"):
        assert text in words
    assert f"| mean_percentile_rank | {report['mean_percentile_rank']:.4g} |" in words
    for text in ("-1350 to 150 HU", "32 x 32 pixels", "patch 8", "Not a medical device", "licence"):
        assert text in words
    content = path.read_bytes() + words.encode()
    for folder in (phantom_root, trained.parent, REPOSITORY, Path(sys.prefix)):
        assert str(folder).encode() not in content


def test_a_card_claims_unseen_patients_only_where_that_was_checked(trained, exported, workplace):
    (path,) = trained.parent.glob("view_retrieval_*.json")
    report = json.loads(path.read_text())
    assert report["patients_unseen"] is True
    assert "patients that training did not see." in Path(f"{exported['safetensors']}.md").read_text()
    shutil.copy(trained, workplace)
    (workplace / path.name).write_text(json.dumps(report))
    elsewhere = workplace / path.name.replace("_N6", "_N600")  # more slices, of another root
    elsewhere.write_text(json.dumps(report | {"n": 600, "patients_unseen": False}))
    earlier = workplace / f"{path.stem}_earlier.json"  # of other settings
    earlier.write_text(json.dumps(report | {"passed": True}))
    assert dinoct.load_encoder(workplace / trained.name).card.evaluation["file"] == path.name
    (workplace / path.name).unlink()
    assert run("export", f"checkpoint={trained.name}", "out=e.safetensors") == 0
    assert "it is not known that training did not see them" in (workplace / "e.safetensors.md").read_text()


def test_figures_of_other_weights_of_the_same_step_are_not_on_the_card(trained, exported, workplace):
    """A run that was turned back comes by the step again: the file of before has its name, and not its weights."""
    (path,) = trained.parent.glob("view_retrieval_*.json")
    report = json.loads(path.read_text())
    assert report["weights_sha256"] == dinoct.load_encoder(trained).card.weights_sha256
    shutil.copy(trained, workplace)
    for judged in (report | {"weights_sha256": "0" * 64}, {k: v for k, v in report.items() if k != "weights_sha256"}):
        (workplace / path.name).write_text(json.dumps(judged))
        card = dinoct.load_encoder(workplace / trained.name).card
        assert card.evaluation is None
        assert run("export", f"checkpoint={trained.name}", "out=e.safetensors", "overwrite=true") == 0
        assert f"Not judged: `{path.name}` is of other weights" in (workplace / "e.safetensors.md").read_text()
    (workplace / path.name.replace("_N6", "_N5")).write_text(json.dumps(report | {"n": 5}))
    assert dinoct.load_encoder(workplace / trained.name).card.evaluation["file"].endswith("_N5.json")


def test_an_exported_encoder_starts_a_training_and_exports_on(trained, exported, workplace):
    checkpoint = checkpoints.load(trained)
    backbone = Backbone(model_config(checkpoint))
    initial_weights(backbone, exported["safetensors"])
    for name, value in load_backbone(checkpoint).vit.state_dict().items():
        assert torch.equal(backbone.vit.state_dict()[name], value), name
    assert run("export", f"checkpoint={exported['safetensors']}", "format=timm", "out=again.safetensors") == 0
    assert (workplace / "again.safetensors").read_bytes() == exported["timm"].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["format=tims"], ["format must be one of safetensors, timm, onnx, not tims"]),
        ([], ["encoder_00000002.safetensors", "overwrite=true"]),
        (["format=onnx", "out=x.safetensors"], ["must end in .onnx"]),
        (["checkpoint=/nowhere.pth"], ["there is no checkpoint at /nowhere.pth"]),
        (["checkpoint={run}"], ["is a run folder: name one of its checkpoints, such as", "checkpoint_00000002.pth"]),
        (["checkpoint=."], ["is a folder without checkpoints: name a checkpoint's file"]),
        (["checkpoint={timm}"], ["weights for timm", "format=safetensors"]),
        (["checkpoint={onnx}"], ["ONNX graph"]),
        (["fromat=onnx"], ["did you mean format"]),
    ],
    ids=str,
)
def test_wrong_input_to_export(trained, exported, workplace, capfd, arguments, says):
    before = {path: path.read_bytes() for path in exported.values()}
    typed = [argument.format(run=trained.parent, **exported) for argument in arguments]
    if not any(argument.startswith("checkpoint=") for argument in typed):
        typed.append(f"checkpoint={trained}")
    assert run("export", *typed) == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1, err
    for words in says:
        assert words in err
    assert before == {path: path.read_bytes() for path in exported.values()}
    assert list(workplace.iterdir()) == []


def test_a_sharded_checkpoint_says_how_to_make_one_file_of_it(trained, workplace, capfd):
    (workplace / "sharded_00000002").mkdir()
    meta = checkpoints.load(trained).meta | {"format": checkpoints.FORMAT, "files": {}}
    (workplace / "sharded_00000002" / "meta.json").write_text(json.dumps(meta))
    assert run("export", "checkpoint=sharded_00000002") == 1
    assert "is sharded: resume it with parallel=none" in capfd.readouterr().err


def test_a_missing_extra_is_named(trained, workplace, capfd, monkeypatch):
    monkeypatch.setattr(onnx_graph, "PACKAGES", ("onnx_of_another_world",))
    assert run("export", f"checkpoint={trained}", "format=onnx", "out=x.onnx") == 1
    assert "pip install 'dinoct[onnx]'" in capfd.readouterr().err


def test_who_hides_files_has_exported_weights_hidden(workplace):
    before = os.umask(0o027)
    try:
        with published(workplace / "e.safetensors") as path:
            path.touch(mode=0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert stat.S_IMODE((workplace / "e.safetensors").stat().st_mode) == 0o640


def test_overwriting_is_all_or_nothing(workplace):
    out = workplace / "e.onnx"
    out.write_text("old")

    def fail_halfway() -> None:
        with published(out) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert [path.name for path in workplace.iterdir()] == ["e.onnx"]
    assert out.read_text() == "old"


def test_a_flipped_bit_is_noticed(exported, workplace):
    content = bytearray(exported["safetensors"].read_bytes())
    content[-100] ^= 1
    Path("e.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        dinoct.load_encoder("e.safetensors")
    Path("e.safetensors").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="cut or damaged"):
        dinoct.load_encoder("e.safetensors")


@pytest.mark.parametrize(
    ("hu", "says"),
    [
        (np.random.default_rng(0).uniform(0, 1, (64, 64)), "Hounsfield units are expected"),
        (np.random.default_rng(0).normal(0, 1, (64, 64)), "Hounsfield units are expected"),
        (np.full((2, 3, 64, 64), -1000.0), "got the shape"),
        (np.full((64, 64, 1), -1000.0), "got the shape"),
        (np.full((64, 64), np.nan), "not finite"),
    ],
    ids=["windowed", "normalised", "rgb", "last axis", "nan"],
)
def test_what_is_not_hu_is_refused(exported, hu, says):
    with pytest.raises(HounsfieldError, match=says):
        dinoct.load_encoder(exported["safetensors"])(hu)


@pytest.mark.parametrize("kind", ["<i2", ">i2", ">f4", "f8", "f2", "g", "u2", ">u4", "u8"])
def test_any_number_type_and_layout_gives_the_same_features(exported, kind):
    """As pydicom, nibabel and a flipped stack give them."""
    encoder, stored = dinoct.load_encoder(exported["safetensors"]), np.random.default_rng(0).integers(0, 2000, (40, 48))
    hu = stored if "u" in kind else stored - 1000
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no value below 0")
        expected = encoder(torch.from_numpy(hu.astype(np.float32))).cls
        given = hu.astype(kind)
        given.flags.writeable = False
        upside_down = hu[::-1, ::-1].astype(kind)
        for array in (given, upside_down[::-1, ::-1], np.asfortranarray(given)):
            assert torch.equal(encoder(array).cls, expected)
        if kind in ("u2", "u8"):
            assert torch.equal(encoder(torch.from_numpy(hu.astype(kind))).cls, expected)
    with pytest.raises(HounsfieldError, match="no numbers"):
        encoder(given.astype(str))


def test_stored_values_without_their_rescale_are_suspected(exported):
    with pytest.warns(UserWarning, match="RescaleIntercept"):
        dinoct.load_encoder(exported["safetensors"])(np.random.default_rng(0).uniform(0, 2000, (64, 64)))


def test_importing_dinoct_is_light():
    code = "import dinoct, sys; dinoct.load_encoder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_example_embeds_a_folder_with_the_public_api_alone(exported, phantom_root, workplace):
    files = sorted(path for path in (phantom_root / "dicom").rglob("*") if path.is_file())[::13]
    (workplace / "ct").mkdir()
    for number, path in enumerate(files):
        shutil.copy(path, workplace / "ct" / f"{number:03d}")
    (workplace / "ct" / "notes.txt").write_text("no DICOM")
    script = REPOSITORY / "scripts" / "embed_example.py"
    typed = [sys.executable, script, exported["safetensors"], "ct", "out.npz"]
    done = subprocess.run(typed, cwd=workplace, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{len(files)} slices, 32 features each, 1 other files" in done.stdout
    encoder = dinoct.load_encoder(exported["safetensors"])
    expected = [encoder(read_hu(str(path))).cls[0].numpy() for path in files]
    np.testing.assert_allclose(np.load("out.npz")["cls"], expected, atol=1e-5)
