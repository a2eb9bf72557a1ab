"""No identity in any byte that the whole way writes: prepare, train, a crash, eval, monitor, the trackers."""

import sys
from pathlib import Path

import pytest
from commands import TINY, run

sys.path.insert(0, str(Path(__file__).parent / "data"))
from synthetic_dicom import body, dataset, save

CANARY = "Zq7Canary"


def canary_patients(folder: Path) -> None:
    for patient in range(4):
        for i in range(6):
            ds = dataset(
                body(10 * patient + i),
                z=2.5 * i,
                PatientID=f"{CANARY}ID{patient}",
                PatientName=f"{CANARY}^Name",
                PatientBirthDate="19630412",
                InstitutionName=f"{CANARY} Hospital",
                StudyDate="20190417",
                StudyInstanceUID=f"1.2.826.0.1.9999.{patient}",
                SeriesInstanceUID=f"1.2.826.0.1.9999.{patient}.1",
            )
            save(ds, folder / f"{CANARY}_folder{patient}" / f"{CANARY}_{i}.dcm")
    (folder / f"{CANARY}_broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + CANARY.encode())


def test_no_name_is_in_any_file_outside_private(workplace, capfd, monkeypatch):
    source = workplace / f"{CANARY}_source"
    canary_patients(source)
    assert run("prepare", f"source={source}", "data.root=data", "split.val_fraction=0.3", "prepare.workers=1") == 0
    tracked = [*TINY, "data.root=data", "tracker.wandb=offline", "tracker.tensorboard=true", "train.max_steps=2"]
    assert run("train", *tracked, "run_dir=run", "monitor.every=1", "eval.every=2", "eval.n=4") == 0
    checkpoint = "checkpoint=run/checkpoint_00000002.pth"
    assert run("eval", checkpoint, "hardware=cpu", "hardware.num_workers=0") in (0, 2)
    assert run("monitor", checkpoint, "out=look", "hardware=cpu") == 0
    (workplace / "data" / "store").rename(workplace / "data" / "gone")  # training crashes over its data
    assert run("train", *tracked, "run_dir=crash") == 1
    said = "".join(capfd.readouterr())
    files = [p for p in workplace.rglob("*") if p.is_file() and "_private" not in p.parts and source not in p.parents]
    assert {"index.csv", "rejects.csv", "config.json", "metrics.jsonl", "train.log", "input.png"} <= {
        p.name for p in files
    }
    assert any(p.suffix == ".wandb" for p in files)
    for needle in (CANARY, "19630412", "20190417", "1.2.826.0.1.9999"):
        assert needle not in said
        found = [p.name for p in files if needle.encode() in p.read_bytes() or needle in p.name]
        assert found == [], needle
    commands = (workplace / "data" / "_private" / "commands.jsonl").read_text()
    assert f"{CANARY}_source" in commands  # the one place where it may stand


@pytest.mark.parametrize(
    "source", ["/data/DOE^JOHN (2)/x", "/data/Doe, John/CT", "/nowhere/Doe^John", "/data/" + "Doe" * 200]
)
def test_a_wrong_source_is_not_repeated(workplace, capfd, source):
    """The path may hold a name, and a console is often a log."""
    assert run("prepare", f"source={source}", "data.root=data") == 1
    said = "".join(capfd.readouterr())
    assert "source" in said
    assert "Doe" not in said
    assert "DOE" not in said
    assert run("prepare", "-m", f"source={source}", "data.root=data") == 1
    assert not (workplace / "outputs").exists()


@pytest.mark.parametrize("source", ["phantom", "data", "."])
def test_a_source_that_can_be_nobodys_name_garbles_no_message(workplace, capfd, source):
    assert run("prepare", f"source={source}", "dat.root=x") == 1
    assert capfd.readouterr().err == "error: dat.root is not a setting; did you mean data.root? (see --cfg job)\n"
