"""Whole runs: what lands in the folder, and that a run which was interrupted equals one which was not."""

import csv
import errno
import json
import random
import shutil
import signal
import time

import pytest
import torch
from commands import TINY, losses, metrics, run, start

from dinoct import checkpoint as checkpoints
from dinoct.provenance import data_seen
from dinoct.stopping import STOPPING


def train(root, folder, *overrides: str) -> int:
    return run("train", *TINY, f"data.root={root}", f"run_dir={folder}", *overrides)


def weights(path):
    return checkpoints.load(path).state["model"]


def assert_same_weights(a, b):
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_container_does_not_decide_how_a_run_computes(phantom_root, workplace):
    """Images with TF32 switched on, and cuDNN's attention, change what a step computes without a word."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert train(phantom_root, workplace / "run", "train.max_steps=1", "monitor.every=null") == 0
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_run_leaves_what_the_contract_says(phantom_root, workplace):
    folder = workplace / "run"
    overrides = [
        "train.max_steps=6",
        "ckpt.every=2",
        "ckpt.keep_last=2",
        "monitor.every=4",
        "eval.every=3",
        "eval.n=16",
    ]
    assert train(phantom_root, folder, *overrides, "tracker.wandb=offline", "tracker.tensorboard=true") == 0
    names = {path.name for path in folder.iterdir()}
    assert {"checkpoint_00000004.pth", "checkpoint_00000006.pth", "checkpoint_final_00000006.pth"} <= names
    assert {"config.json", "metrics.jsonl", "train.log", "tb", "wandb", "monitor"} <= names
    assert "checkpoint_00000002.pth" not in names
    assert {p.name for p in (folder / "monitor" / "step_00000004").iterdir()} == {
        *("heatmap.png", "input.png", "pca.png", "similarity.png", "attention.png", "hu.png"),
        "stats.json",
    }
    assert (folder / "monitor" / "views.png").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["state"] == "done"
    assert len(config["data_manifest_hash"]) == 16
    assert int(config["data_manifest_hash"], 16) >= 0
    assert config["config"]["train"]["max_steps"] == 6
    assert "train.max_steps=6" in config["command"]
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {
        "loss/dino",
        "loss/gram",
        "loss/koleo",
        "Train/Entropy_Teacher",
        "Train/Entropy_Student",
        "Train/ln_K",
    } <= set(rows[0])
    assert rows[-1]["Train/samples_seen"] == 48
    assert 0 <= rows[2]["Eval/mean_percentile_rank"] <= 1
    log = (folder / "train.log").read_text()
    assert "step=     6 loss=" in log
    assert "auto: " in log


def test_default_folder_is_outputs_runs_with_a_time_stamp(phantom_root, workplace):
    assert run("train", *TINY, f"data.root={phantom_root}", "train.max_steps=1") == 0
    (folder,) = (workplace / "outputs" / "runs").iterdir()
    time.strptime(folder.name[:15], "%Y%m%d_%H%M%S")


@pytest.mark.parametrize(("first", "second"), [(0, 0), (2, 0), (0, 1), (1, 4)])
def test_a_resumed_run_equals_an_uninterrupted_one(phantom_root, workplace, first, second):
    """Drop path, every term and masks on; other numbers of workers before and after."""
    common = ["optim.horizon=9", "model.drop_path=0.3", "loss.ibot.weight=1", "aug.local_crops=2", "aug.local_size=16"]
    common += ["loss.gram.teacher=lagged", "train.accumulation_steps=2"]
    whole, parts = workplace / "whole", workplace / "parts"
    assert train(phantom_root, whole, *common, "train.max_steps=9") == 0
    assert train(phantom_root, parts, *common, "train.max_steps=5", f"hardware.num_workers={first}") == 0
    resume = [
        f"resume={parts}",
        "train.max_steps=9",
        "hardware=cpu",
        f"hardware.num_workers={second}",
        "hardware.threads=1",
    ]
    assert run("train", *resume) == 0
    assert losses(parts) == losses(whole)
    assert_same_weights(parts / "checkpoint_00000009.pth", whole / "checkpoint_00000009.pth")


def test_interrupted_at_a_random_step_and_resumed(phantom_root, workplace):
    whole, parts = workplace / "whole", workplace / "outputs" / "runs" / "20260101_000000"
    length = ["train.max_steps=60", "ckpt.every=1000"]
    assert train(phantom_root, whole, *length) == 0
    command = [*TINY, f"data.root={phantom_root}", f"run_dir={parts}", *length]
    process = start("train", *command, cwd=workplace)
    try:
        stop_at = random.Random(time.time_ns()).randrange(2, 40)
        while not (parts / "metrics.jsonl").exists() or len(metrics_text(parts)) < stop_at:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "stopped by signal 2 at step" in out
    assert err.split() == STOPPING.decode().split()  # said at once, and nothing else
    assert json.loads((parts / "config.json").read_text())["state"] == "stopped"
    assert run("train", "resume=auto", "hardware=cpu", "hardware.num_workers=0", "hardware.threads=1") == 0
    assert losses(parts) == losses(whole)
    assert_same_weights(parts / "checkpoint_00000060.pth", whole / "checkpoint_00000060.pth")
    config = json.loads((parts / "config.json").read_text())
    assert len(config["history"]) == 2
    assert f"at step {config['history'][1]['from_step']}, state saved" in out


def metrics_text(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_metrics_behind_the_resumed_step_are_cut(phantom_root, workplace):
    """Killed between checkpoints: what was logged after the last one is logged again, once."""
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=4", "optim.horizon=6", "ckpt.every=2") == 0
    before = losses(folder)
    (folder / "checkpoint_00000004.pth").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss/to')  # cut in the middle of a line
    assert run("train", f"resume={folder}", "train.max_steps=6", "hardware=cpu", "hardware.num_workers=0") == 0
    after = losses(folder)
    assert [row[0] for row in after] == [1, 2, 3, 4, 5, 6]
    assert after[:4] == before


def test_resume_takes_what_was_typed_and_keeps_the_rest(phantom_root, workplace):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=2", "optim.lr=1e-3", "optim.horizon=8") == 0
    again = [
        "experiment=demo",
        f"resume={folder}",
        "train.max_steps=3",
        "optim.clip=1",
        "hardware=cpu",
        "hardware.num_workers=0",
    ]
    assert run("train", *again) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["optim"]["lr"] == 1e-3  # the experiment typed again does not bring its own back
    assert config["config"]["model"]["dim"] == 32
    assert config["horizon"] == 8
    assert set(config["history"][1]["changes"]) == {"train.max_steps: 2 -> 3", "optim.clip: 3.0 -> 1.0"}


def test_a_choice_that_was_changed_on_the_way_can_be_changed_back(phantom_root, workplace):
    folder, here = workplace / "run", ["hardware=cpu", "hardware.num_workers=0"]
    assert train(phantom_root, folder, "train.max_steps=1", "optim.horizon=8") == 0
    smaller = ["aug=multicrop", "aug.local_crops=2", "aug.local_size=16"]
    for steps, typed in enumerate((smaller, ["aug=multicrop"], ["aug=spatial_strong"]), start=2):
        assert run("train", f"resume={folder}", f"train.max_steps={steps}", *typed, *here) == 0
        config = json.loads((folder / "config.json").read_text())
        now = config["config"]["aug"]
        assert now["name"] == config["choices"]["aug"] == typed[0].removeprefix("aug=")
        assert now["local_crops"] == (2 if now["name"] == "multicrop" else 0)  # typed again it brings no default back


def test_a_checkpoint_with_a_setting_that_is_no_more_goes_on(phantom_root, workplace):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=1", "optim.horizon=8") == 0
    found = checkpoints.load(folder / "checkpoint_00000001.pth")
    found.meta["config"]["probe"]["bootstrap"] = 1000
    checkpoints.save(folder / "checkpoint_00000001.pth", found.state, found.meta)
    assert run("train", f"resume={folder}", "train.max_steps=2", "hardware=cpu", "hardware.num_workers=0") == 0
    assert "bootstrap" not in json.loads((folder / "config.json").read_text())["config"]["probe"]


def test_settings_typed_as_one_leave_the_others(phantom_root, workplace):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=1", "optim.horizon=8") == 0
    typed = [
        "train={max_steps:2}",
        "optim={lr:1e-3}",
        "hardware=cpu",
        "hardware.num_workers=0",
    ]
    assert run("train", f"resume={folder}", *typed) == 0
    changes = json.loads((folder / "config.json").read_text())["history"][1]["changes"]
    assert sorted(changes) == ["optim.lr: 0.002 -> 0.001", "train.max_steps: 1 -> 2"]


def test_other_weights_to_start_from_are_refused_at_a_resume(phantom_root, workplace, capfd):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=1") == 0
    capfd.readouterr()
    assert run("train", f"resume={folder}", "model.init_from=other.pth", "hardware=cpu") == 1
    assert "model.init_from=other.pth starts a new run" in capfd.readouterr().err


def test_another_rule_for_the_gram_teacher_counts_from_the_resume_on(phantom_root, workplace):
    """By the lagged rule it had been taken; the snapshot is still to come, and the EMA teacher stands in."""
    folder, length = workplace / "run", ["optim.horizon=10", "loss.gram.snapshot_at=0.6", "optim.teacher_momentum=0.5"]
    assert train(phantom_root, folder, "train.max_steps=4", "loss.gram.teacher=lagged", *length) == 0
    typed = ["loss.gram.teacher=snapshot", "train.max_steps=8", "hardware=cpu", "hardware.num_workers=0"]
    assert metrics(folder)[-1]["Train/gram_teacher_age"] < 4
    assert run("train", f"resume={folder}", *typed) == 0
    assert [row["Train/gram_teacher_age"] for row in metrics(folder)[4:]] == [0, 0, 1, 2]


def test_resume_on_another_device_profile_keeps_schedule_and_order(phantom_root, workplace):
    folder = workplace / "run"
    length = ["train.max_steps=2", "optim.horizon=4", "train.accumulation_steps=2"]
    assert train(phantom_root, folder, *length) == 0
    profile = ["hardware=rocm_strix", "hardware.device=cpu", "hardware.num_workers=0"]
    typed = ["train.max_steps=4", "train.batch_size=16", "train.accumulation_steps=1"]
    assert run("train", f"resume={folder}", *profile, *typed) == 0
    rows = metrics(folder)
    assert [row["Train/samples_seen"] for row in rows] == [16, 32, 48, 64]
    whole = workplace / "whole"
    assert train(phantom_root, whole, "train.max_steps=4", "train.accumulation_steps=2") == 0
    assert [row["Train/lr"] for row in rows] == [row["Train/lr"] for row in metrics(whole)]


def test_resume_refuses_another_architecture_by_name(phantom_root, workplace, capfd):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=1") == 0
    capfd.readouterr()
    assert run("train", f"resume={folder}", "loss.out_dim=128", "model.depth=3", "hardware=cpu") == 1
    err = capfd.readouterr().err
    assert "model.depth=3 (checkpoint: 2)" in err
    assert "loss.out_dim=128 (checkpoint: 64)" in err


def test_a_sweep_makes_a_folder_per_value_and_a_table(phantom_root, workplace, capfd):
    arguments = [*TINY, f"data.root={phantom_root}", "train.max_steps=2", "optim.lr=1e-4,3e-4", "tracker.wandb=offline"]
    assert run("train", "-m", *arguments) == 0
    (sweep,) = (workplace / "outputs" / "sweeps").iterdir()
    runs = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert len(runs) == 2
    assert runs[0].startswith("0_")
    assert not any("=" in name for name in runs)
    for name, lr in zip(runs, (1e-4, 3e-4), strict=True):
        config = json.loads((sweep / name / "config.json").read_text())
        assert config["config"]["optim"]["lr"] == lr
        assert config["sweep"] == sweep.name
        assert list((sweep / name / "wandb").glob("offline-run-*"))
    header, *table = csv.reader((sweep / "summary.csv").read_text().splitlines())
    assert "optim.lr" in header
    ranks = [float(row[header.index("rank")]) for row in table]
    assert ranks == sorted(ranks)  # judged at the end, best first
    assert "0.0003" in capfd.readouterr().out


def test_one_failed_job_does_not_stop_a_sweep(phantom_root, workplace, capfd):
    arguments = [*TINY, f"data.root={phantom_root}", "train.max_steps=1", "loss.gram.weight=0,1"]
    assert run("train", "-m", *arguments) == 1
    said = capfd.readouterr()
    assert "loss.gram.weight=0 is refused" in said.err
    assert "failed: loss.gram.weight=0 is refused" in " ".join(said.out.split())  # under the table
    (sweep,) = (workplace / "outputs" / "sweeps").iterdir()
    assert len(list(sweep.glob("*/checkpoint_final_*.pth"))) == 1


def test_nan_stops_before_the_optimiser_moves(phantom_root, workplace, capfd, monkeypatch):
    from dinoct.models.ssl import SelfDistillation

    forward, calls = SelfDistillation.forward, []

    def poisoned(self, batch, **kwargs):
        terms = forward(self, batch, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            terms.total = terms.total * float("nan")
            terms.scalars["loss/total"] = terms.total.detach()
        return terms

    monkeypatch.setattr(SelfDistillation, "forward", poisoned)
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=5", "ckpt.every=1") == 1
    err = capfd.readouterr().err
    assert "step 3: loss/total is not finite" in err
    assert len(err.splitlines()) == 1
    assert_same_weights(folder / "emergency_00000002.pth", folder / "checkpoint_00000002.pth")
    emergency = checkpoints.load(folder / "emergency_00000002.pth")
    assert emergency.meta["positions"] == list(range(16, 24))
    assert json.loads((folder / "config.json").read_text())["state"] == "failed"


def test_gram_is_in_every_record_and_in_the_gradient(phantom_root, workplace):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=20") == 0
    rows = metrics(folder)
    assert rows[0]["loss/gram"] == 0
    assert all(row["loss/gram"] > 0 for row in rows[5:])
    assert [row["step"] for row in rows if "Train/gram_gradient_share" in row] == [1, 10, 20]
    assert 0 < rows[-1]["Train/gram_gradient_share"] <= 1.5


def test_two_trainers_do_not_share_a_folder(phantom_root, workplace, capfd):
    from dinoct.rundir import RunFolder

    folder = workplace / "run"
    with RunFolder.create(str(folder)):
        assert train(phantom_root, folder, "train.max_steps=1") == 1
    assert "another process is training in" in capfd.readouterr().err


def test_a_file_system_without_locks_is_warned_of(phantom_root, workplace, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert train(phantom_root, workplace / "run", "train.max_steps=1") == 0
    said = (workplace / "run" / "train.log").read_text()
    assert "run has no locks: see to it that no other process writes there" in said


def test_an_experiment_that_goes_over_a_typed_choice_says_so(phantom_root, workplace, capfd):
    assert train(phantom_root, workplace / "run", "train.max_steps=1", "model=vit-tiny", "model.depth=3") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "experiment=demo goes over model=vit-tiny: model.name=demo model.heads=4 model.registers=0; type" in said
    assert train(phantom_root, workplace / "other", "train.max_steps=1", "aug=multicrop", "aug.local_size=16") == 0
    assert train(phantom_root, workplace / "own", "train.max_steps=1", "model=custom", "optim={lr:1e-3}") == 0
    assert run("train", f"resume={workplace / 'run'}", "experiment=demo", "model=vit-tiny", "train.max_steps=2") == 0
    assert "goes over" not in capfd.readouterr().out


def test_a_finished_run_is_not_overwritten(phantom_root, workplace, capfd):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=1") == 0
    assert train(phantom_root, folder, "train.max_steps=1") == 1
    assert "holds a run already" in capfd.readouterr().err


def test_a_finished_run_that_is_resumed_says_that_nothing_is_left(phantom_root, workplace, capfd):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=1") == 0
    before = (folder / "checkpoint_00000001.pth").stat().st_ino
    assert run("train", f"resume={folder}", "hardware=cpu", "hardware.num_workers=0") == 0
    assert "train.max_steps=1 is reached, nothing is left to train" in capfd.readouterr().out
    assert (folder / "checkpoint_00000001.pth").stat().st_ino == before
    assert (folder / "checkpoint_final_00000001.pth").stat().st_ino == before


def test_going_back_in_place_keeps_what_comes_after_aside(phantom_root, workplace):
    """Resumed from an older file: the later ones are renamed, the new ones stay, and auto follows the new line."""
    folder = workplace / "outputs" / "runs" / "20260101_000000"
    length = ["train.max_steps=6", "ckpt.every=1", "ckpt.keep_last=3"]
    assert train(phantom_root, folder, *length) == 0
    whole = losses(folder)
    here = ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    assert run("train", f"resume={folder / 'checkpoint_00000004.pth'}", "train.max_steps=5", *here) == 0
    names = {path.name for path in folder.glob("*.pth")}
    assert {"abandoned_00000005.pth", "abandoned_00000006.pth", "checkpoint_00000005.pth"} <= names
    assert "checkpoint_00000006.pth" not in names
    assert (folder / "checkpoint_final_00000005.pth").samefile(folder / "checkpoint_00000005.pth")
    assert run("train", "resume=auto", "train.max_steps=6", *here) == 0
    assert losses(folder) == whole


def test_the_best_encoder_of_a_run_is_kept_over_rotation_and_resume(phantom_root, workplace, monkeypatch):
    """Figures of the evaluations are given here: what is tested is which state is kept."""
    from dinoct import looks
    from dinoct.checkpoint import load

    given = iter([0.4, 0.2, 0.3, 0.25, 0.1])

    def judge(*_, **__):
        rank = next(given)
        return {"mean_percentile_rank": rank, "top1": 0.0, "n": 4}

    monkeypatch.setattr(looks, "judge", judge)
    arguments = [*TINY, f"data.root={phantom_root}", "eval.every=1", "ckpt.every=1", "ckpt.keep_last=1", "run_dir=r"]
    assert run("train", *arguments, "train.max_steps=3", "optim.horizon=9") == 0
    assert [path.name for path in (workplace / "r").glob("*best*")] == ["checkpoint_best_00000002.pth"]
    assert load(workplace / "r" / "checkpoint_best_00000002.pth").step == 2
    assert run("train", "resume=r", "train.max_steps=4") == 0  # 0.25 is not better than 0.2 was
    assert [path.name for path in (workplace / "r").glob("*best*")] == ["checkpoint_best_00000002.pth"]
    assert run("train", "resume=r", "train.max_steps=5") == 0
    assert [path.name for path in (workplace / "r").glob("*best*")] == ["checkpoint_best_00000005.pth"]


def test_a_kill_before_the_best_encoder_was_kept_leaves_its_place_open(phantom_root, workplace, monkeypatch, capfd):
    """The newest checkpoint says 0.2 by then, and the file that is kept had 0.4: 0.3 is better than what there is."""
    from dinoct import looks

    given = iter([0.4, 0.2, 0.3, 0.35, 0.5])
    monkeypatch.setattr(looks, "judge", lambda *_, **__: {"mean_percentile_rank": next(given), "top1": 0.0, "n": 4})
    folder, here = workplace / "r", ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    assert train(phantom_root, folder, "eval.every=1", "ckpt.every=1", "train.max_steps=2", "optim.horizon=9") == 0
    (folder / "checkpoint_best_00000002.pth").unlink()
    (folder / "checkpoint_best_00000001.pth").hardlink_to(folder / "checkpoint_00000001.pth")
    assert run("train", "resume=r", "train.max_steps=3", *here) == 0
    assert [path.name for path in folder.glob("*best*")] == ["checkpoint_best_00000003.pth"]

    (folder / "checkpoint_best_00000003.pth").unlink()
    (folder / "checkpoint_best_00000003.pth").write_bytes(b"cut")
    capfd.readouterr()
    assert run("train", "resume=r", "train.max_steps=4", *here) == 0  # 0.35 is better than a file that cannot be read
    assert "the next encoder that is judged counts as the best so far" in capfd.readouterr().out
    assert [path.name for path in folder.glob("*best*")] == ["checkpoint_best_00000004.pth"]


def test_a_last_step_that_was_not_judged_is_not_the_best(phantom_root, workplace, monkeypatch):
    from dinoct import looks

    monkeypatch.setattr(looks, "judge", lambda *_, **__: {"mean_percentile_rank": 0.1, "top1": 0.0, "n": 4})
    assert train(phantom_root, workplace / "r", "eval.every=2", "train.max_steps=3") == 0
    assert [path.name for path in (workplace / "r").glob("*best*")] == ["checkpoint_best_00000002.pth"]


def test_going_on_from_what_was_set_aside_leaves_the_other_branch(phantom_root, workplace):
    """A kill behind it must not send the run back to the branch that it turned away from."""
    folder, here = workplace / "r", ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    assert train(phantom_root, folder, "train.max_steps=4", "ckpt.every=1") == 0
    first = checkpoints.load(folder / "checkpoint_00000004.pth").state["model"]
    turned = [f"resume={folder / 'checkpoint_00000002.pth'}", "optim.lr=0.1", "train.max_steps=4"]
    assert run("train", *turned, *here) == 0
    assert (
        run("train", f"resume={folder / 'abandoned_00000004.pth'}", "ckpt.every=100", "train.max_steps=4", *here) == 0
    )
    again = checkpoints.load(folder / "checkpoint_00000004.pth").state["model"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (folder / "abandoned_00000004x.pth").is_file()  # the other branch's
    stamp = (folder / "checkpoint_00000004.pth").stat().st_ino
    final = (
        f"resume={folder / 'checkpoint_final_00000004.pth'}"  # another name of the regular one: nothing is to be done
    )
    assert run("train", final, "train.max_steps=4", *here) == 0
    assert (folder / "checkpoint_00000004.pth").stat().st_ino == stamp


def test_a_start_that_ends_before_its_first_checkpoint_turns_back_all_the_same(
    phantom_root, workplace, monkeypatch, capfd
):
    """As a kill does while W&B is asked; what was typed for it is in no checkpoint, and is named."""
    from dinoct import run as module

    folder, here = workplace / "r", ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    assert train(phantom_root, folder, "train.max_steps=4", "ckpt.every=1", "ckpt.keep_last=9") == 0
    turned = [f"resume={folder / 'checkpoint_00000002.pth'}", "optim.lr=0.1", "train.max_steps=4"]
    assert run("train", *turned, *here) == 0
    first = checkpoints.load(folder / "abandoned_00000004.pth").state["model"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "build_tracker", lambda *_, **__: (_ for _ in ()).throw(OSError("W&B is away")))
        again = [f"resume={folder / 'abandoned_00000004.pth'}", "optim.lr=0.003"]
        assert run("train", *again, *here) == 1
    capfd.readouterr()
    assert run("train", "resume=auto", f"run_dir={folder}", "train.max_steps=4", *here) == 0
    assert "type them again: optim.lr: 0.002 -> 0.003" in " ".join(capfd.readouterr().out.split())
    found = checkpoints.load(folder / "checkpoint_00000004.pth").state["model"]
    assert all(torch.equal(first[name], found[name]) for name in first)
    assert {"abandoned_00000003x.pth", "abandoned_00000004x.pth"} <= {path.name for path in folder.glob("*.pth")}


def test_a_process_that_trained_on_until_the_lock_was_free_is_not_turned_back(
    phantom_root, workplace, monkeypatch, capfd
):
    """Ctrl+C there, resume=auto here: the checkpoint was chosen before the other had saved its last one."""
    folder, here = workplace / "r", ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    assert train(phantom_root, folder, "train.max_steps=4", "ckpt.every=1", "ckpt.keep_last=9") == 0
    early = checkpoints.load(folder / "checkpoint_00000002.pth")
    with monkeypatch.context() as patch:
        patch.setattr("dinoct.resume.find_checkpoint", lambda *_: (early, []))
        assert run("train", "resume=r", "train.max_steps=6", *here) == 1
    assert "another process went on to" in capfd.readouterr().err
    assert not list(folder.glob("abandoned*"))
    assert json.loads((folder / "config.json").read_text())["state"] == "done"
    assert run("train", "resume=r", "train.max_steps=6", *here) == 0


def test_a_checkpoint_that_lies_in_no_run_folder_begins_one_of_its_own(phantom_root, workplace, capfd):
    archive, here = workplace / "archive", ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    assert train(phantom_root, workplace / "r", "train.max_steps=4", "ckpt.every=1", "ckpt.keep_last=9") == 0
    archive.mkdir()
    for path in (workplace / "r").glob("checkpoint_0*.pth"):
        shutil.copy(path, archive)
    before = sorted(path.name for path in archive.iterdir())
    assert run("train", "resume=archive/checkpoint_00000002.pth", "ckpt.keep_last=1", "train.max_steps=3", *here) == 0
    assert sorted(path.name for path in archive.iterdir()) == before
    (own,) = (workplace / "outputs" / "runs").iterdir()
    assert (own / "checkpoint_00000003.pth").is_file()
    capfd.readouterr()
    assert run("train", "resume=archive/checkpoint_00000002.pth", "run_dir=archive", *here) == 1
    assert "run_dir=" in (said := capfd.readouterr().err)
    assert "holds checkpoints, which the run's own would replace" in said


def test_a_link_to_a_checkpoint_stands_for_it(phantom_root, workplace):
    here = ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    assert train(phantom_root, workplace / "r", "train.max_steps=1") == 0
    (workplace / "latest.pth").symlink_to(workplace / "r" / "checkpoint_00000001.pth")
    assert run("train", "resume=latest.pth", "train.max_steps=2", *here) == 0
    assert (workplace / "r" / "checkpoint_00000002.pth").is_file()
    assert not (workplace / "config.json").exists()


def test_a_folder_whose_run_ended_before_a_checkpoint_says_so(phantom_root, workplace, capfd):
    (workplace / "r").mkdir()
    (workplace / "r" / "config.json").write_text("{}")
    assert train(phantom_root, workplace / "r", "train.max_steps=1") == 1
    assert "it ended before a checkpoint: remove the folder, or take another run_dir" in capfd.readouterr().err


def test_accumulation_typed_as_a_group_counts_at_a_resume(phantom_root, workplace):
    folder, here = workplace / "r", ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    assert train(phantom_root, folder, "train.max_steps=1") == 0
    assert run("train", "resume=r", "train={accumulation_steps:3,max_steps:2}", *here) == 0
    assert json.loads((folder / "config.json").read_text())["hardware"]["accumulation_steps"] == 3


def test_a_folder_without_a_regular_checkpoint_names_the_others(workplace, capfd):
    (workplace / "r").mkdir()
    (workplace / "r" / "config.json").write_text("{}")
    for name in ("abandoned_00000009.pth", "emergency_00000001.pth", "emergency_00000007.pth"):
        (workplace / "r" / name).touch()
    assert run("train", "resume=r") == 1
    says = "no usable checkpoint in r; there is emergency_00000007.pth, which is resumed by name"
    assert says in capfd.readouterr().err


def test_auto_means_the_newest_run_and_says_so_when_it_has_nothing(phantom_root, workplace, capfd):
    runs = workplace / "outputs" / "runs"
    assert train(phantom_root, runs / "20260101_000000", "train.max_steps=1") == 0
    assert train(phantom_root, runs / "20260102_000000", "train.max_steps=1") == 0
    for path in (runs / "20260102_000000").glob("*.pth"):
        path.unlink()
    capfd.readouterr()
    assert run("train", "resume=auto", "train.max_steps=2", "hardware=cpu") == 1
    err = capfd.readouterr().err
    assert "no usable checkpoint in outputs/runs/20260102_000000" in err
    assert "resume=outputs/runs/20260101_000000" in err


def test_auto_means_the_run_that_was_begun_last_whatever_its_name(phantom_root, workplace, capfd):
    runs = workplace / "outputs" / "runs"
    for name, created in (("pilot", "2026-01-01T00:00:00"), ("20260102_000000", "2026-01-02T00:00:00")):
        assert train(phantom_root, runs / name, "train.max_steps=1") == 0
        config = json.loads((runs / name / "config.json").read_text())
        (runs / name / "config.json").write_text(json.dumps(config | {"created": created}))
    capfd.readouterr()
    assert run("train", "resume=auto", "train.max_steps=2", "hardware=cpu", "hardware.num_workers=0") == 0
    assert "resuming at step 1 from outputs/runs/20260102_000000/" in capfd.readouterr().out


def test_other_hardware_keeps_the_effective_batch(phantom_root, workplace):
    folder = workplace / "run"
    length = ["train.max_steps=1", "optim.horizon=4", "train.batch_size=null", "hardware.batch_size=8"]
    assert train(phantom_root, folder, *length, "train.accumulation_steps=4") == 0
    again = ["hardware=cpu", "hardware.batch_size=16", "hardware.num_workers=0", "train.max_steps=2"]
    assert run("train", f"resume={folder}", *again) == 0
    assert [row["Train/samples_seen"] for row in metrics(folder)] == [32, 64]
    hardware = json.loads((folder / "config.json").read_text())["hardware"]
    assert (hardware["batch_size"], hardware["accumulation_steps"]) == (16, 2)


def test_eval_refuses_patients_that_were_trained_on(phantom_root, workplace, capfd):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=1") == 0
    manifest = json.loads((phantom_root / "_splits" / "val30_seed0.json").read_text())
    manifest["train"], manifest["val"] = manifest["val"], manifest["train"]
    (workplace / "swapped.json").write_text(json.dumps(manifest))
    capfd.readouterr()
    typed = [f"checkpoint={folder}/checkpoint_00000001.pth", "data.split_manifest=swapped.json", "hardware=cpu"]
    assert run("eval", *typed) == 1
    assert "validation patients were trained on" in capfd.readouterr().err


@pytest.mark.parametrize("own", [True, False])
def test_neither_report_nor_picture_claims_unseen_patients_where_the_split_is_another(
    phantom_root, workplace, capfd, monkeypatch, own
):
    from dinoct.evals import picture

    titles, draw = [], picture.new_figure
    monkeypatch.setattr(picture, "new_figure", lambda *size: titles.append(size[-1]) or draw(*size))
    assert train(phantom_root, workplace / "run", "train.max_steps=1") == 0
    manifest = json.loads((phantom_root / "_splits" / "val30_seed0.json").read_text())
    if not own:
        manifest["train"].append(manifest["val"].pop())
    (workplace / "split.json").write_text(json.dumps(manifest))
    capfd.readouterr()
    typed = ["checkpoint=run/checkpoint_00000001.pth", "data.split_manifest=split.json", "probe=view_retrieval"]
    assert run("eval", *typed, "hardware=cpu", "hardware.num_workers=0", "n=6") in (0, 2)
    report = json.loads((workplace / "run" / "view_retrieval_step00000001_N6.json").read_text())
    assert report["patients_unseen"] is own
    assert ("that training never saw" in titles[0]) is own
    said = " ".join(capfd.readouterr().out.split())
    assert ("by their keys it saw none of these patients: make sure that none has another key now" in said) is not own


def test_patients_of_the_weights_that_a_run_started_from_are_not_new_to_it(phantom_root, workplace, capfd):
    """A first run on one split, a second from its weights on another: some of its held-out patients were trained on."""
    manifest = json.loads((phantom_root / "_splits" / "val30_seed0.json").read_text())
    manifest["train"], manifest["val"] = manifest["val"], manifest["train"]
    (workplace / "swapped.json").write_text(json.dumps(manifest))
    assert train(phantom_root, workplace / "a", "train.max_steps=1") == 0
    first = "model.init_from=a/checkpoint_00000001.pth"
    assert train(phantom_root, workplace / "b", "train.max_steps=1", first, "data.split_manifest=swapped.json") == 0
    assert "held-out patients were trained on before: dinoct-eval will refuse" in capfd.readouterr().out
    typed = ["probe=view_retrieval", "hardware=cpu", "hardware.num_workers=0", "n=6"]
    assert run("eval", "checkpoint=b", *typed) == 1
    assert "validation patients were trained on" in capfd.readouterr().err

    assert train(phantom_root, workplace / "c", "train.max_steps=1", first) == 0
    capfd.readouterr()
    assert run("eval", "checkpoint=c", *typed) in (0, 2)
    assert "make sure" not in capfd.readouterr().out
    torch.save(weights(workplace / "a" / "checkpoint_00000001.pth"), workplace / "bare.pth")
    assert train(phantom_root, workplace / "d", "train.max_steps=1", "model.init_from=bare.pth") == 0
    assert "whom its weights were trained on is not known" in " ".join(capfd.readouterr().out.split())
    assert run("eval", "checkpoint=d", *typed) in (0, 2)
    assert "is not known in full: make sure that they never saw" in " ".join(capfd.readouterr().out.split())
    assert not json.loads((workplace / "d" / "view_retrieval_step00000001_N6.json").read_text())["patients_unseen"]


def test_data_that_changed_at_a_resume_leaves_a_doubt(phantom_root, workplace, capfd):
    """Somebody who is held out now may have been trained on before, under another key."""
    manifest = json.loads((phantom_root / "_splits" / "val30_seed0.json").read_text())
    manifest["train"].append(manifest["val"].pop())
    (workplace / "more.json").write_text(json.dumps(manifest))
    assert train(phantom_root, workplace / "run", "train.max_steps=1") == 0
    here = ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1", "train.max_steps=2"]
    assert run("train", "resume=run", "data.split_manifest=more.json", *here) == 0
    assert run("eval", "checkpoint=run/checkpoint_00000002.pth", "probe=view_retrieval", *here[:2], "n=6") in (0, 2)
    report = json.loads((workplace / "run" / "view_retrieval_step00000002_N6.json").read_text())
    assert report["judged_on"] == report["data_manifest_hash"]
    assert report["patients_unseen"] is False


def test_patients_without_a_slice_in_the_index_were_not_trained_on(phantom_root, workplace):
    manifest = json.loads((phantom_root / "_splits" / "val30_seed0.json").read_text())
    gone = manifest["train"][0]
    rows = (phantom_root / "_index" / "index.csv").read_text().splitlines()
    part = workplace / "part"
    shutil.copytree(phantom_root / "_splits", part / "_splits")
    (part / "store").symlink_to(phantom_root / "store")
    (part / "_index").mkdir()
    (part / "_index" / "index.csv").write_text("\n".join(row for row in rows if gone not in row) + "\n")
    assert train(part, workplace / "run", "train.max_steps=1") == 0
    patients = checkpoints.load(workplace / "run" / "checkpoint_00000001.pth").meta["train_patients"]
    assert patients == sorted(set(manifest["train"]) - {gone})


def test_what_an_earlier_version_wrote_of_its_data_is_taken_for_no_more_than_it_says():
    of_own = {"data_manifest_hash": "a", "train_patients": ["p"], "config": {"model": {"init_from": None}}}
    assert data_seen(of_own) == ["a"]
    assert data_seen(of_own | {"config": {"model": {"init_from": "other.pth"}}}) == [None]
    assert data_seen(of_own | {"train_patients": []}) == data_seen({}) == [None]  # format 1; no checkpoint
    assert data_seen(of_own | {"data_seen": ["a", "b"]}) == ["a", "b"]


def test_a_run_from_another_makers_card_says_so_and_takes_this_machines_settings(phantom_root, workplace, capfd):
    """A checkpoint as a card would have left it: other platform, its own generator's state, other workers."""
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=2", "optim.horizon=4") == 0
    found = checkpoints.load(folder / "checkpoint_00000002.pth")
    found.meta["hardware"] |= {"platform": "cuda", "card": "NVIDIA GeForce RTX 4090", "num_workers": 8, "amp": "bf16"}
    found.meta["config"]["hardware"] |= {"name": "cuda_4090", "device": "cuda", "num_workers": 8, "pin_memory": True}
    found.state["rng"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    checkpoints.save(folder / "checkpoint_00000002.pth", found.state, found.meta)
    capfd.readouterr()
    assert run("train", f"resume={folder}", "train.max_steps=4", "hardware=cpu", "hardware.num_workers=0") == 0
    assert "platform changed: cuda (NVIDIA GeForce RTX 4090) -> cpu" in capfd.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert (config["hardware"]["platform"], config["hardware"]["num_workers"]) == ("cpu", 0)
    assert [event["hardware"]["platform"] for event in config["history"]] == ["cpu", "cpu"]
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]
