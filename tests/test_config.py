"""Every choice composes; wrong combinations are refused with the key to change."""

from pathlib import Path

import dinoct.conf
import pytest
import torch
from hydra import compose, initialize_config_module

from dinoct.config import TrainConfig, to_object
from dinoct.errors import ConfigError
from dinoct.models.backbone import Backbone, parameter_count
from dinoct.typed import option_keys
from dinoct.validate import check_deletions, local_crop_size, teach, validate

CONF = Path(dinoct.conf.__file__).parent
GROUPS = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml") if path.parent.name not in ("split", "sweep"))


def train_config(*overrides: str) -> TrainConfig:
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        return to_object(compose("train", overrides=list(overrides)))


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_every_choice_composes_and_is_valid(path):
    validate(train_config(f"{path.parent}={path.stem}"))


@pytest.mark.parametrize("name", ["prepare", "eval", "monitor"])
def test_other_commands_compose(name):
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        overrides = ["source=x"] if name == "prepare" else ["checkpoint=x"]
        to_object(compose(name, overrides=overrides))


def test_presets_are_what_the_guide_names():
    a, b = train_config("experiment=phase5a"), train_config("experiment=phase5b")
    assert (a.model.patch, a.model.dim, a.model.depth, a.model.heads) == (14, 1024, 24, 16)
    assert (b.model.patch, b.model.dim, b.model.depth, b.model.heads) == (14, 1408, 40, 16)
    assert (a.train.max_steps, a.train.batch_size, a.train.accumulation_steps) == (384, 64, 4)
    assert (b.train.max_steps, b.train.batch_size, b.train.accumulation_steps) == (None, 128, 2)
    assert a.train.grad_checkpoint
    assert a.hardware.num_workers == 8
    large = train_config("experiment=phase5a_512")
    assert (large.model.patch, large.model.img_size, large.train.batch_size) == (16, 512, 16)


@pytest.mark.parametrize(("name", "millions"), [("vit-large", 303), ("vit-giant", 1011), ("vit-small", 21.5)])
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        backbone = Backbone(train_config(f"model={name}").model)
    assert parameter_count(backbone) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["model.patch=14", "model.img_size=512"],
            r"model.img_size=512 .* model.patch=14: take model.img_size=504 or 518",
        ),
        (["loss.gram.weight=0"], "loss.gram.weight=0 is refused, 0.01 is the least. Gram anchoring is always on"),
        (["loss.gram.weight=1e-12"], "loss.gram.weight=1e-12 is refused"),
        (["loss.gram.weight=-1"], "loss.gram.weight=-1 is refused"),
        (["loss.gram.weight=nan"], "loss.gram.weight=nan is refused"),
        (["loss.gram.teacher=none"], "loss.gram.teacher must be one of ema, lagged, snapshot"),
        (["model.heads=5"], "model.dim=1024 is not a multiple of model.heads=5"),
        (["train.batch_size=0"], "train.batch_size must be at least 1"),
        (["train.compile=true", "parallel=fsdp"], "train.compile=true and parallel=fsdp do not go together"),
        (["train.grad_checkpoint=mlp"], "train.grad_checkpoint must be true, false or selective, not 'mlp'"),
        (["aug.global_crops=1"], "aug.global_crops=1 leaves one view"),
        (["aug.global_scale=[0.9,0.1]"], "aug.global_scale must be two rising numbers"),
        (["aug.local_crops=2", "aug.local_size=100"], "aug.local_size=100 is not a multiple of model.patch=14"),
        (["optim.min_lr=1"], "optim.min_lr=1 is above optim.lr"),
        (["parallel.processes=2"], "parallel.processes=2 needs parallel=ddp"),
    ],
)
def test_wrong_combinations_name_the_key(overrides, says):
    with pytest.raises(ConfigError, match=says):
        validate(train_config(*overrides))


@pytest.mark.parametrize("override", ["~loss.gram", "~loss", "~loss.gram.weight"])
def test_gram_cannot_be_deleted(override):
    with pytest.raises(ConfigError, match="Gram anchoring is always on"):
        check_deletions(["model=vit-small", override])


def test_no_key_switches_gram_off():
    gram = [key.removeprefix("loss.gram.") for key in option_keys(TrainConfig) if key.startswith("loss.gram.")]
    assert gram == ["weight", "teacher", "lag", "snapshot_at", "teacher_px"]


def test_local_crops_are_multiples_of_the_patch_nearest_to_96():
    assert [local_crop_size(patch) for patch in (14, 16, 8)] == [98, 96, 96]


def test_keys_that_people_type_exist():
    """Scripts rely on these: renaming one is a breaking change."""
    keys = """data.root data.index_csv data.split_manifest data.split_seed model.patch model.dim model.depth model.heads
        model.img_size model.init_from train.max_steps train.batch_size train.accumulation_steps train.grad_checkpoint
        train.amp optim.lr loss.out_dim loss.gram.weight loss.gram.teacher ckpt.every ckpt.keep_last ckpt.keep_every
        monitor.every eval.every optim.horizon parallel.processes hardware.device hardware.num_workers
        hardware.pin_memory tracker.every run_dir resume seed"""
    assert set(keys.split()) <= set(option_keys(TrainConfig))


def test_warnings_teach_what_batches_cannot_do():
    cfg = train_config("loss=dinov3", "loss.out_dim=65536")
    sinkhorn, koleo = teach(cfg, batch_size=8)
    assert "ln(K/B) = 8.32" in sinkhorn
    assert "loss.out_dim=2048 or less" in sinkhorn
    assert "loss.koleo.weight=0" in koleo
    assert teach(train_config("loss=dinov3", "loss.out_dim=4096"), batch_size=64) == []
    assert teach(train_config(), batch_size=64) == []
