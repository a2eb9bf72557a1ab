"""The estimate of a step's memory against what torch holds: every tensor of a step, followed from birth to death."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from commands import REPOSITORY
from hydra import compose, initialize_config_module

from dinoct.checkup.preflight import student_parameters
from dinoct.config import TrainConfig, to_object
from dinoct.flops import token_count
from dinoct.hardware import Hardware, resolve
from dinoct.memory import block_bytes, estimate, remedies
from dinoct.models.ssl import SelfDistillation

sys.path.append(str(REPOSITORY / "scripts" / "bench"))

from alive import highest

SMALL = [
    "hardware=cpu",
    "model=custom",
    "model.dim=64",
    "model.depth=4",
    "model.heads=2",
    "model.img_size=96",
    "model.patch=8",
    "loss.out_dim=512",
    "loss.hidden_dim=96",
    "loss.bottleneck_dim=32",
]
IBOT = ["loss.ibot.weight=1", "loss.ibot.mask_probability=1", "loss.ibot.mask_ratio=[1,1]"]  # all: synthetic ones are


def settings(*overrides: str, base: list[str] = SMALL) -> TrainConfig:
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        return to_object(compose("train", overrides=[*base, *overrides]))


def machine(cfg: TrainConfig, *, batch_size: int, amp: bool) -> Hardware:
    return replace(resolve(cfg.hardware), batch_size=batch_size, amp=amp)


@pytest.mark.parametrize(
    ("overrides", "amp"),
    [
        ([], False),
        ([], True),
        (["train.grad_checkpoint=true"], False),
        (["train.grad_checkpoint=true", "model.layer_scale=0.01"], True),
        (["train.grad_checkpoint=true", "aug=multicrop", "aug.local_size=48", "model.patch=16"], False),
        (["train.grad_checkpoint=selective", "model.layer_scale=0.01"], False),
        (["model.layer_scale=0.01", "model.dim=256", "model.img_size=32", "aug=multicrop", "aug.local_size=16"], False),
        (["train.grad_checkpoint=selective", "aug=multicrop", "aug.local_size=48"], True),
        (["aug=multicrop", "aug.local_size=48", "loss.out_dim=8192", *IBOT], True),
        (["train.grad_checkpoint=true", "loss.gram.teacher=lagged", "loss.gram.teacher_px=192"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"amp={value}",
)
def test_a_step_takes_what_was_estimated(overrides, amp):
    cfg = settings(*overrides)
    hardware = machine(cfg, batch_size=6, amp=amp)
    needed = estimate(cfg, hardware, parameters=student_parameters(cfg))
    assert needed.activations == pytest.approx(highest(cfg, hardware), rel=0.1)


def test_a_large_model_is_traced_without_its_memory():
    cfg = settings("train.grad_checkpoint=true")
    hardware = machine(cfg, batch_size=6, amp=True)
    assert highest(cfg, hardware, fake=True) == highest(cfg, hardware)


@pytest.mark.parametrize("kind", [False, "selective", True])
@pytest.mark.parametrize("amp", [False, True])
def test_what_a_block_keeps_for_its_backward_pass(amp, kind):
    cfg = settings("model.layer_scale=0.01")
    hardware, vit = machine(cfg, batch_size=2, amp=amp), SelfDistillation(cfg.model, cfg.loss).student.backbone.vit
    weights = {parameter.untyped_storage()._cdata for parameter in vit.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.randn(2, token_count(cfg.model, 96), cfg.model.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), hardware.autocast():
        vit.blocks[0](tokens, recompute=kind)
    copies = {tuple(p.shape[::-1]) for p in vit.parameters() if p.ndim == 2} | {p.shape for p in vit.parameters()}
    size = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in weights and t.shape not in copies)
    kept = block_bytes(cfg.model, amp=amp, recompute=kind)
    assert size == pytest.approx(tokens.shape[0] * tokens.shape[1] * kept, rel=0.02)


def test_no_copies_of_weights_are_held_where_the_backward_pass_makes_its_own():
    """A model as wide as it has tokens: autocast's bf16 weights would be most of what a micro-batch takes."""
    cfg = settings("train.grad_checkpoint=true", "model.dim=512", "model.img_size=32", "loss.out_dim=64")
    hardware = machine(cfg, batch_size=1, amp=True)
    weights = student_parameters(cfg)
    assert (
        highest(cfg, hardware)
        < 1.0 * weights
        < highest(replace(cfg, train=replace(cfg.train, grad_checkpoint=False)), hardware)
    )


def test_on_a_card_the_first_remedy_is_a_batch_that_fits(monkeypatch):
    giant = settings("model=vit-giant", "train.grad_checkpoint=true", base=["hardware=cpu"])
    hardware = replace(machine(giant, batch_size=64, amp=True), platform="cuda", accumulation_steps=4)
    parameters = student_parameters(giant)
    monkeypatch.setattr("dinoct.memory.card_room", lambda: 24 * 2**30)  # an RTX 4090
    said = remedies(giant, hardware, parameters=parameters)
    batch, accumulation = map(int, re.search(r"train\.batch_size=(\d+) train\.accumulation_steps=(\d+)", said).groups())
    assert batch * accumulation == 256
    total = [estimate(giant, replace(hardware, batch_size=n), parameters=parameters).total for n in (batch, 2 * batch)]
    assert total[0] <= 0.92 * 24 * 2**30 < total[1]
    monkeypatch.setattr("dinoct.memory.card_room", lambda: 16 * 2**30)  # nothing fits: the half, as elsewhere
    assert "train.batch_size=32 train.accumulation_steps=8" in remedies(giant, hardware, parameters=parameters)


def test_remedies_save_something():
    large = settings("model=vit-large", "hardware=cpu", base=[])
    said = remedies(large, machine(large, batch_size=64, amp=False), parameters=311_800_000)
    saved = [float(value) for value in re.findall(r"about ([-\d.]+) GB less", said)]
    assert len(saved) == 3
    assert all(value > 1 for value in saved)
    tiny = settings()  # autocast's copies of many weights would take more than few activations give back
    assert "train.amp" not in remedies(tiny, machine(tiny, batch_size=1, amp=False), parameters=311_800_000)
