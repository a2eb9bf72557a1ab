"""Typed wrong: exit status 1 and one clear line. Judged and drawn: the files and exit statuses of the contract."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from commands import REPOSITORY, TINY, run

from dinoct.config import PrepareConfig
from dinoct.typed import keep_text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=vit-gaint"], ["vit-gaint", "vit-giant"]),
        (["optim.lrr=1"], ["optim.lrr is not a setting", "did you mean optim.lr"]),
        (["loss.gram.weight=0"], ["loss.gram.weight=0 is refused", "always on"]),
        (["loss.gram.weight=1e-12"], ["loss.gram.weight=1e-12 is refused"]),
        (["~loss.gram"], ["~loss.gram is refused", "always on"]),
        (["model.patch=14", "model.img_size=512"], ["model.img_size=512", "model.patch=14", "504 or 518"]),
        (["data.root=/nowhere"], ["data.root", "/nowhere", "dinoct-prepare"]),
        (["train.max_steps=many"], ["train.max_steps", "many"]),
        (["train.max_steps", "3"], ["a setting is train.max_steps=VALUE, in one word"]),
        (["experiment=null", "model=vit-tiny"], ["experiment=null", "leave it out"]),
        (["tracker.tags=a,b"], ["'tracker.tags=[a,b]'"]),
        (["resume=auto"], ["resume=auto: no usable checkpoint in outputs/runs"]),
        (["resume=/nowhere/c.pth"], ["there is no checkpoint at /nowhere/c.pth"]),
        (["hardware.device=cuda"], ["hardware.device=cuda was asked for"]),
        (["optim.lr"], ["optim.lr"]),
        (["--max-steps", "3"], ["--max-steps", "KEY=VALUE", "scripts/phase5_"]),
        (["train.max_steps=5", "-m", "optim.lr=1e-4,3e-4"], ["flags such as -m stand before them"]),
        (["experiment=phase5c"], ["experiment/phase5c", "phase5a"]),
        (["aug=spatial"], ["Could not find 'aug/spatial'", "intensity_only multicrop spatial_strong\n"]),
        (["+optim.lrr=1"], ["there is no setting optim.lrr", "did you mean optim.lr"]),
        (["optim.lr=abc"], ["optim.lr=abc: it must be a number"]),
        (["lr=1e-3"], ["lr is not a setting; did you mean optim.lr?"]),
        (["train.lr=1e-3"], ["train.lr is not a setting; did you mean optim.lr?"]),
        (["optim.lr=0,0005"], ["optim.lr takes one number, with a decimal point; several are a sweep (-m)"]),
        (["optim.lr=[1e-4,3e-4]"], ["it must be a number; a sweep (-m) has no brackets"]),
        (["train.max_steps=2 optim.lr=1e-3"], ["takes one number, and each setting is a word of its own"]),
        (["aug.window.center=-600"], ["a list stands in brackets: aug.window.center=[-600]"]),
        (["n=40"], ["n is not a setting of this command but of dinoct-eval"]),
        (["runs/checkpoint_00000004.pth"], ["a path stands behind its key (resume=PATH)"]),
        (["resume=true"], ["resume=true: there is no checkpoint at true"]),
        (["optim.lr=''"], ["optim.lr= has no value: give one, or optim.lr=null for none"]),
        (["run_dir="], ["run_dir= has no value"]),
        (["resume="], ["resume= has no value"]),
        (["train.grad_checkpoint=1"], ["train.grad_checkpoint=1: Value '1' of type 'int' is none of: bool, str"]),
        (["loss.gram=null"], ["loss.gram=null", "not Optional"]),
        (["hardware.batch_size=0"], ["hardware.batch_size must be at least 1, not 0"]),
        (["hardware.num_workers=-1"], ["hardware.num_workers must be at least 0, not -1"]),
        (["loss.gram.teacher_px=100"], ["loss.gram.teacher_px=100", "model.patch=14"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_input_to_train(workplace, capfd, arguments, says):
    if torch.cuda.is_available() and "hardware.device=cuda" in arguments:
        pytest.skip("there is a card")
    assert run("train", *arguments) == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    for words in says:
        assert words in err
    assert not (workplace / "outputs").exists()


def test_a_text_that_looks_like_a_number_stays_as_it_was_typed(phantom_root, workplace):
    """Hydra reads 20260103_120000, the form of dinoct's own run folders, as 20260103120000."""
    assert run("train", *TINY, f"data.root={phantom_root}", "run_dir=20260103_120000", "train.max_steps=1") == 0
    assert (workplace / "20260103_120000" / "checkpoint_00000001.pth").is_file()
    assert run("train", "resume=20260103_120000", "train.max_steps=2", "hardware=cpu", "hardware.num_workers=0") == 0


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("split.val_patients=[2019_0034, 1e5,abc]", "split.val_patients=['2019_0034','1e5',abc]"),
        ("split.val_patients=['1_0',a]", "split.val_patients=['1_0',a]"),
        ("explain=123e4567", "explain='123e4567'"),
        ("+labels=true", "+labels='true'"),
        ("masks=null", "masks=null"),
        ("seed=1_0", "seed=1_0"),  # a number
    ],
)
def test_texts_are_told_from_numbers_by_their_setting(typed, kept):
    assert keep_text([typed], PrepareConfig) == [kept]


@pytest.fixture(scope="module")
def trained(phantom_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", *TINY, f"data.root={phantom_root}", f"run_dir={folder}", "train.max_steps=2") == 0
    return folder / "checkpoint_00000002.pth"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["checkpoint is needed"]),
        (["runs/checkpoint_00000004.pth"], ["a path stands behind its key (checkpoint=PATH)"]),
        (["train.batch_size=4"], ["train.batch_size is not a setting of this command but of dinoct-train"]),
        (["checkpoint=/nowhere.pth"], ["there is no checkpoint at /nowhere.pth"]),
        (["checkpoint={text}"], ["not a dinoct checkpoint"]),
        (["checkpoint=."], ["checkpoint: there is no checkpoint_STEP.pth in ."]),
        (["checkpoint={good}", "model=vit-large"], ["model=vit-large", "this one holds demo (patch 16, 32/2/4)"]),
        (["checkpoint={good}", "n=1"], ["n must be at least 2"]),
        (["checkpoint={good}", "hardware.batch_size=0"], ["hardware.batch_size must be at least 1"]),
        (["checkpoint={good}", "probe.fit_n=0"], ["probe.fit_n must be at least 1"]),
        (["--checkpoint", "x"], ["--checkpoint", "KEY=VALUE"]),
        (["checkpoint=Müller/x.pth"], ["needs quotes", """: 'checkpoint="Müller/x.pth"'"""]),
        (["checkpoint=a,b/x.pth"], ["sweep (-m)", """: 'checkpoint="a,b/x.pth"'"""]),
        (["checkpoint=[a,ä/x.pth]"], ["""'checkpoint=[a,"ä/x.pth"]'"""]),
        (['checkpoint="Müller, A/x.pth"'], ["there is no checkpoint at Müller, A/x.pth"]),
        (["chéckpoint=x"], ["chéckpoint is not a setting"]),
        (["checkpoint={good}", "n=1e1"], ["n=1e1: it must be a whole number, such as 10"]),
        (["checkpoint={good}", "probe.min_ratio=nan"], ["probe.min_ratio must be a number"]),
        (["checkpoint={good}", "probe.min_gain=10"], ["probe.min_gain is a share of the untrained rank"]),
        (["checkpoint={good}", "probe.min_ratio=high"], ["probe.min_ratio=high: it must be a number"]),
        (["checkpoint={good}", "probe.rules=dice"], ["probe.rules=dice: a list stands in brackets"]),
        (["checkpoint={good}", "out={text}"], ["out: ", "text.pth cannot be written"]),
        (["checkpoint={encoder}"], ["encoder.safetensors is an exported encoder: name the checkpoint"]),
        (["checkpoint={good}", "data.root=/nowhere"], ["/nowhere"]),
    ],
)
def test_wrong_input_to_eval(trained, workplace, capfd, arguments, says):
    (workplace / "text.pth").write_text("not a checkpoint")
    (workplace / "encoder.safetensors").touch()
    files = {"good": trained, "text": workplace / "text.pth", "encoder": workplace / "encoder.safetensors"}
    typed = [argument.format(**files) for argument in arguments]
    assert run("eval", *typed) == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1, err
    for words in says:
        assert words in err


@pytest.mark.parametrize(
    ("command", "typed"),
    [("monitor", ["checkpoint={good}", "out=file/look"]), ("prepare", ["source=phantom", "data.root=file"])],
)
def test_a_place_that_cannot_be_written_names_its_key(trained, workplace, capfd, command, typed):
    (workplace / "file").touch()
    typed = [argument.format(good=trained) for argument in typed]
    assert run(command, *typed) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {typed[-1]} cannot be written or read: ")


@pytest.mark.parametrize("command", ["eval", "monitor"])
def test_a_full_disk_names_the_place_to_change(trained, workplace, capfd, monkeypatch, command):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert run(command, f"checkpoint={trained}", "out=look") == 1
    err = capfd.readouterr().err
    assert "error: No space left on device: free some, or write elsewhere than out=look" in err


def test_eval_writes_its_verdict_beside_the_checkpoint(trained, workplace, capfd):
    status = run("eval", f"checkpoint={trained}", "hardware=cpu", "hardware.num_workers=0")
    (path,) = trained.parent.glob("view_retrieval_step*.json")
    report = json.loads(path.read_text())
    assert path.name == f"view_retrieval_step00000002_N{report['n']}.json"
    assert status == (0 if report["passed"] else 2)
    assert report["baseline"] == 1 / report["n"]
    assert report["ratio"] == pytest.approx(report["top1"] * report["n"])
    assert set(report["baselines"]) == {"random_init", "pixels", "histogram"}
    out = capfd.readouterr().out
    for name, check in report["checks"].items():
        assert f"{'pass' if check['passed'] else 'FAIL'}  {name}: " in out
    assert "n=4096, but the validation split has" in out


def test_eval_is_repeatable_and_takes_out_and_n(trained, workplace):
    for folder in ("a", "b"):
        run("eval", f"checkpoint={trained}", "n=6", f"out={folder}", "hardware=cpu", "hardware.num_workers=0")
    a, b = (json.loads((workplace / f / "view_retrieval_step00000002_N6.json").read_text()) for f in ("a", "b"))
    assert a == b
    assert a["n"] == 6


def test_a_quick_look_does_not_replace_the_whole_evaluation(trained, workplace, capfd):
    typed = [f"checkpoint={trained}", "n=6", "out=o", "hardware=cpu", "hardware.num_workers=0"]
    name = "view_retrieval_step00000002_N6"
    run("eval", *typed)
    whole = (workplace / "o" / f"{name}.json").read_text()
    run("eval", *typed)
    assert {path.stem for path in (workplace / "o").iterdir()} == {name}
    run("eval", *typed, "probe=view_retrieval")
    assert "the earlier report, of other settings" in capfd.readouterr().out
    assert (workplace / "o" / f"{name}_earlier.json").read_text() == whole
    assert (workplace / "o" / f"{name}_earlier.png").is_file()
    assert json.loads((workplace / "o" / f"{name}.json").read_text())["settings"]["probes"] == []


def test_monitor_draws(trained, workplace):
    assert run("monitor", f"checkpoint={trained}", "out=look", "hardware=cpu") == 0
    assert {path.name for path in (workplace / "look").iterdir()} == {
        *("input.png", "heatmap.png", "pca.png", "similarity.png", "attention.png", "hu.png", "views.png"),
        "stats.json",
    }
    stats = json.loads((workplace / "look" / "stats.json").read_text())
    assert stats["std"] > 0.001


def test_a_foreign_target_in_a_checkpoint_is_not_instantiated(trained, phantom_root, workplace):
    from dinoct import checkpoint as checkpoints

    found = checkpoints.load(trained)
    found.meta["config"]["engine"]["_target_"] = "os.mkdir"
    path = workplace / "checkpoint_00000002.pth"
    checkpoints.save(path, found.state, found.meta)
    arguments = ["hardware=cpu", "hardware.num_workers=0", "train.max_steps=3", "run_dir=again"]
    assert run("train", f"resume={path}", *arguments) == 0
    config = json.loads((workplace / "again" / "config.json").read_text())
    assert config["config"]["engine"]["_target_"] == "dinoct.engine.Engine"


@pytest.mark.parametrize(
    "script", ["phase5_big_run", "phase5_view_retrieval_eval", "phase5_monitor", "check_checkpoint"]
)
def test_older_scripts_run(trained, phantom_root, workplace, script):
    typed = {
        "phase5_big_run": [*TINY, f"data.root={phantom_root}", "--max-steps", "1", "--device", "cpu"],
        "phase5_view_retrieval_eval": [
            "--checkpoint", trained, "--split-manifest", phantom_root / "_splits" / "val30_seed0.json",
            "--index-csv", phantom_root / "_index" / "index.csv", "--n", "8", "hardware=cpu",
        ],
        "phase5_monitor": ["--checkpoint", trained, "out=look", "--device", "cpu"],
        "check_checkpoint": [trained, trained],
    }[script]  # fmt: skip
    path = REPOSITORY / "scripts" / f"{script}.py"
    done = subprocess.run(
        [sys.executable, path, *map(str, typed)], cwd=workplace, capture_output=True, text=True, timeout=200
    )
    assert done.returncode in ((0, 2) if "eval" in script else (0,)), done.stderr
    if script == "check_checkpoint":
        assert done.stdout.count("entropy of softmax(centre") == 2
    else:
        assert "equivalent: dinoct-" in done.stdout


def test_help_is_quick_to_import_and_teaches():
    """Help must not wait for torch: it is not imported at all."""
    code = (
        "import sys; sys.argv = ['dinoct-train', '--help']\n"
        "from dinoct.train import cli\n"
        "try: cli()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for words in ("resume=auto", "optim.lr", "vit-giant", "-m", "Exit status"):
        assert words in done.stdout
