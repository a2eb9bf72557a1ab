"""A table of features: a row per slice, the encoder's features in it, no name, and nothing left behind."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, run, start
from pyarrow import parquet

import dinoct
from dinoct import checkpoint as checkpoints
from dinoct.data.dataset import read_slice
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore

CANARY = "Zq7Canary"


@pytest.fixture(scope="module")
def trained(phantom_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", *TINY, f"data.root={phantom_root}", f"run_dir={folder}", "train.max_steps=1") == 0
    return folder / "checkpoint_00000001.pth"


@pytest.fixture(scope="module")
def exported(trained):
    assert run("export", f"checkpoint={trained}") == 0
    return trained.parent / "encoder_00000001.safetensors"


def read_table(path: Path) -> tuple[dict, np.ndarray, dict]:
    table = parquet.read_table(path)
    cls = table["cls"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return table.drop(["cls"]).to_pydict(), cls, json.loads(table.schema.metadata[b"dinoct"])


def test_embed_of_a_prepared_set_has_a_row_per_slice_of_the_index(trained, exported, phantom_root, workplace):
    hardware = ["hardware=cpu", "hardware.num_workers=0", "hardware.batch_size=3"]
    for checkpoint, out in ((exported, "f.parquet"), (trained, "f.npz")):
        assert run("embed", f"data.root={phantom_root}", f"checkpoint={checkpoint}", f"out={out}", *hardware) == 0
    index, store = SliceIndex.load(phantom_root / "_index" / "index.csv"), SliceStore(phantom_root / "store")
    slices = np.stack([read_slice(index, store, i) for i in range(len(index))])
    columns, cls, facts = read_table(workplace / "f.parquet")
    assert columns["slice_id"] == index.slice_id.tolist()
    assert columns["series"] == [index.series_name(i) for i in range(len(index))]
    assert columns["patient"] == [index.patient_name(i) for i in range(len(index))]
    assert columns["z_mm"] == index.z_mm.tolist()
    assert columns["row"] == index.row.tolist()
    expected = dinoct.load_encoder(exported)(slices).cls.numpy()
    np.testing.assert_allclose(cls, expected, atol=1e-5)
    assert facts["data_manifest_hash"] == checkpoints.load(trained).meta["data_manifest_hash"]
    assert (facts["checkpoint"], facts["step"]) == ("checkpoint_00000001.pth", 1)
    assert facts["encoder_file"] == "encoder_00000001.safetensors"
    other = np.load("f.npz")
    assert np.array_equal(other["cls"], cls)
    assert other["slice_id"].tolist() == columns["slice_id"]
    assert json.loads(str(other["metadata"]))["weights_sha256"] == facts["weights_sha256"]


def test_embed_of_dicom_leaves_no_name_behind(exported, phantom_root, workplace, capfd, monkeypatch):
    source, temporary = workplace / f"{CANARY}_source", workplace / "tmp"
    shutil.copytree(phantom_root / "dicom", source)
    (source / f"{CANARY}.txt").write_text("no DICOM")
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    typed = [f"source={source}", f"checkpoint={exported}", "prepare.workers=1", "hardware=cpu"]
    assert run("embed", *typed, "hardware.num_workers=0", "out=f.parquet") == 0
    assert list(temporary.iterdir()) == []
    index = SliceIndex.load(phantom_root / "_index" / "index.csv")
    columns, cls, facts = read_table(workplace / "f.parquet")
    assert sorted(columns["z_mm"]) == sorted(index.z_mm.tolist())
    assert len(cls) == len(index)
    assert facts["files_without_slice"] == {"not a DICOM file": 1}
    out, err = capfd.readouterr()
    assert "files that gave no slice: 1" in out
    for needle in (CANARY, "PHANTOM"):
        assert needle not in out + err
        assert needle.encode() not in (workplace / "f.parquet").read_bytes()


def test_embed_of_one_patient_needs_no_split_and_keeps_the_set_where_asked(exported, phantom_root, workplace):
    (patient, *_) = sorted((phantom_root / "dicom").iterdir())
    typed = [f"checkpoint={exported}", "data.root=kept", "hardware=cpu", "hardware.num_workers=0"]
    assert run("embed", f"source={patient}", *typed, "prepare.workers=0", "out=a.npz") == 0
    assert run("embed", *typed, "out=b.npz") == 0
    a, b = np.load("a.npz"), np.load("b.npz")
    assert len(a["cls"]) == sum(1 for path in patient.rglob("*") if path.is_file())
    assert all(np.array_equal(a[key], b[key]) for key in a.files)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["source=... is needed"]),
        (["/nowhere/Doe"], ["a word stands there without a key"]),
        (["source=/nowhere/Doe"], ["source: number 1 of 1 does not exist"]),
        (["source=/nowhere/Doe_é"], ["source=... cannot be read", """'source="..."'"""]),
        (["data.root=/nowhere"], ["data.root: there is no index at /nowhere"]),
        (["source={root}/dicom", "data.root={root}"], ["holds a prepared set", "dinoct-prepare"]),
        (["source={root}/dicom", "out=f.csv"], ["must end in .parquet or .npz"]),
        (["source={root}/dicom", "out=taken.npz"], ["out=taken.npz exists", "overwrite=true"]),
        (["source={root}/_splits"], ["none of the 1 files gave a CT slice"]),
        (["source={root}/dicom", "hardware.batch_size=0"], ["hardware.batch_size must be at least 1"]),
        (["-m", "source={root}/dicom"], ["embed takes no -m"]),
    ],
    ids=str,
)
def test_wrong_input_to_embed(exported, phantom_root, workplace, capfd, arguments, says):
    Path("taken.npz").write_text("old")
    typed = [argument.format(root=phantom_root) for argument in arguments]
    assert run("embed", *typed, f"checkpoint={exported}", "prepare.workers=0") == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1, err
    assert "Doe" not in err
    for words in says:
        assert words in err
    assert [path.name for path in workplace.iterdir()] == ["taken.npz"]
    assert Path("taken.npz").read_text() == "old"


def test_too_many_rejects_point_to_no_list_that_is_gone(exported, phantom_root, workplace, capfd):
    shutil.copytree(phantom_root / "dicom", "damaged")
    for file in sorted(path for path in Path("damaged").rglob("*") if path.is_file())[:40]:
        file.write_bytes(file.read_bytes()[:2000])
    arguments = [f"checkpoint={exported}", "source=damaged", "out=f.npz", "prepare.max_reject_fraction=0.1"]
    assert run("embed", *arguments, "hardware=cpu", "hardware.num_workers=0", "prepare.workers=0") == 1
    err = capfd.readouterr().err
    assert "prepare.max_reject_fraction=0.1; data.root=NEW keeps a list of them" in err
    assert "rejects.csv" not in err


def test_a_signal_takes_the_temporary_set_along(exported, phantom_root, workplace, monkeypatch):
    """It holds the salt and the paths: a job that is cancelled must not leave it in a shared folder."""
    monkeypatch.setenv("TMPDIR", str(workplace))
    source, checkpoint = f"source={phantom_root / 'dicom'}", f"checkpoint={exported}"
    process = start("embed", source, checkpoint, "prepare.workers=1", "out=f.npz", cwd=workplace)
    deadline = time.monotonic() + 60
    while not list(workplace.glob("dinoct-embed-*/_private/salt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert list(workplace.iterdir()) == []
