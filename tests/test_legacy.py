"""The older flags: every one maps, wrong ones are refused, the step's meaning is said."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dinoct.config import EvalConfig, MonitorConfig, TrainConfig
from dinoct.errors import ConfigError
from dinoct.legacy import EVAL_FLAGS, MONITOR_FLAGS, TRAIN_FLAGS, TRAIN_SWITCHES, run_legacy, step_note, to_overrides
from dinoct.typed import option_keys


def test_phase5a_as_typed():
    typed = (
        "--config vit-large --max-steps 384 --num-workers 8 --batch-size 64 --accumulation-steps 4 --grad-checkpoint"
    )
    hydra, overrides = to_overrides(typed.split(), TRAIN_FLAGS, TRAIN_SWITCHES)
    assert hydra == []
    assert overrides == [
        "model=vit-large",
        "train.max_steps=384",
        "hardware.num_workers=8",
        "train.batch_size=64",
        "train.accumulation_steps=4",
        "train.grad_checkpoint=true",
    ]
    assert step_note(overrides).endswith("4 micro-batches of 64 = 256 slices, and --max-steps 384 means 384 updates")


def test_overrides_switches_and_hydra_flags_mix():
    typed = ["-m", "--amp", "false", "--lr=1e-3,5e-4", "aug=multicrop", "--grad-checkpoint"]
    hydra, overrides = to_overrides(typed, TRAIN_FLAGS, TRAIN_SWITCHES)
    assert hydra == ["-m"]
    assert overrides == ["train.amp=false", "optim.lr=1e-3,5e-4", "aug=multicrop", "train.grad_checkpoint=true"]


def test_paths_with_odd_characters_are_quoted():
    _, overrides = to_overrides(["--resume", "a b/c=d(1)'s.pth"], TRAIN_FLAGS)
    assert overrides == ["resume='a b/c=d(1)\\'s.pth'"]


@pytest.mark.parametrize("value", ["Müller/x.pth", "日本", "a,b/x.pth", "C:\\x\\", "a\\'b", "{a}", "[1]", "b\\\\", ""])
def test_hydra_reads_what_was_typed(value):
    _, overrides = to_overrides(["--checkpoint", value], EVAL_FLAGS)
    assert OverridesParser.create().parse_override(overrides[0]).value() == value


@pytest.mark.parametrize(
    ("typed", "says"),
    [(["--max-step", "3"], "--max-step is not a flag"), (["--resume"], "--resume needs a value"),
     (["--resume", "--amp"], "--resume needs a value")],
)  # fmt: skip
def test_wrong_flags_are_refused(typed, says):
    with pytest.raises(ConfigError, match=says):
        to_overrides(typed, TRAIN_FLAGS, TRAIN_SWITCHES)


def test_help_tells_what_each_flag_became(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["phase5_big_run.py", "--help"])
    run_legacy("dinoct-train", lambda: print("the command's own"), TRAIN_FLAGS, TRAIN_SWITCHES)
    out = capsys.readouterr().out
    for flag, key in (TRAIN_FLAGS | TRAIN_SWITCHES).items():
        assert f"{flag} {key}" in " ".join(out.split())
    assert out.endswith("the command's own\n")


def test_a_run_of_the_older_folder_is_told_where_runs_lie_now(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["phase5_big_run.py", "--resume", "data/runs/20260101_000000/checkpoint_00000004.pth"]
    )
    run_legacy("dinoct-train", lambda: None, TRAIN_FLAGS, TRAIN_SWITCHES)
    assert "runs lie in outputs/runs now" in capsys.readouterr().out


def test_every_flag_leads_to_a_setting():
    for flags, schema in (
        (TRAIN_FLAGS | TRAIN_SWITCHES, TrainConfig),
        (EVAL_FLAGS, EvalConfig),
        (MONITOR_FLAGS, MonitorConfig),
    ):
        assert set(flags.values()) <= set(option_keys(schema))
