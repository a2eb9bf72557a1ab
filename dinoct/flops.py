"""Model FLOPs of training by formula, and what cards could do at best: together, how well a card is used.

A multiply-add counts as two FLOPs. Only matrix products count, attention's quadratic term among them, and only those
that the objective asks for: blocks that gradient checkpointing computes again do not count, so that utilisation (model
FLOPs per second over the card's peak) compares between settings (Kaplan et al. 2020, arXiv:2001.08361, section 2.1;
Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). A backward pass counts twice its forward pass. Left out for
being under a thousandth: norms, softmax, KoLeo's similarities, the gauges of the log.
"""

import re

from dinoct.config import LossConfig, ModelConfig, TrainConfig
from dinoct.validate import local_crop_size

TRAINED = 3  # passes' worth of a network that learns: forward, and backward by weights and by inputs

# Peak FLOP/s as the makers give it, without sparsity: bf16 with float32 accumulation; float32 outside of tensor cores.
# The first pattern that is found in a card's name counts.
PEAKS: dict[str, tuple[float, float]] = {
    r"H200 NVL": (835e12, 60e12),  # NVIDIA H200 datasheet, 2024
    r"H200": (989e12, 67e12),
    r"H100 PCIe": (756e12, 51e12),  # NVIDIA H100 datasheet, 2023
    r"H100 NVL": (835e12, 60e12),
    r"H100": (989e12, 67e12),
    r"A100": (312e12, 19.5e12),  # NVIDIA A100 datasheet, 2021
    r"RTX 4090$": (165.2e12, 82.6e12),  # NVIDIA Ada architecture whitepaper; the D and the laptop's are other chips
    r"L40S": (362e12, 91.6e12),  # NVIDIA L40S datasheet, 2023
    r"RTX 3090$": (71e12, 35.6e12),  # NVIDIA Ampere GA102 whitepaper
    r"MI300X": (1307e12, 163.4e12),  # AMD Instinct MI300X datasheet, 2023
    r"8060S": (59.4e12, 29.7e12),  # Strix Halo, gfx1151: 40 units x 512 per clock (float32: 256) x 2.9 GHz
}


def peak_flops(card: str, *, amp: bool) -> float | None:
    """Peak FLOP/s of a card in bf16 (`amp`) or float32; ``None`` where it is not known: a CPU, a part of a card."""
    known = (peaks for name, peaks in PEAKS.items() if re.search(name, card) and " MIG " not in card)
    bf16, float32 = next(known, (None, None))
    return bf16 if amp else float32


def token_count(model: ModelConfig, px: int) -> int:
    """Tokens of an image of `px` x `px` pixels: patches, class token, registers."""
    return (px // model.patch) ** 2 + 1 + model.registers


def local_px(cfg: TrainConfig) -> int:
    """Pixels per side of a local crop."""
    return cfg.aug.local_size or local_crop_size(cfg.model.patch)


def masked_patches(cfg: TrainConfig) -> float:
    """Patches of one slice that iBOT masks, by expectation; 0 where it is off."""
    ibot, grid = cfg.loss.ibot, cfg.model.img_size // cfg.model.patch
    share = ibot.mask_probability * sum(ibot.mask_ratio) / 2
    return cfg.aug.global_crops * grid**2 * share if ibot.weight else 0.0


def slice_flops(cfg: TrainConfig, *, snapshot_taken: bool = True) -> float:
    """Model FLOPs that training spends on one slice, all its crops and both teachers included.

    Args:
        cfg: of the run; `model`, `aug` and `loss` count.
        snapshot_taken: whether ``loss.gram.teacher=snapshot`` has its snapshot: until then the EMA teacher stands in.
    """
    model, gram, px = cfg.model, cfg.loss.gram, cfg.model.img_size
    n_global, n_local, masked = cfg.aug.global_crops, cfg.aug.local_crops, masked_patches(cfg)
    total = n_global * _trained_vit(model, px) + n_local * _trained_vit(model, local_px(cfg), class_only=True)
    total += n_global * vit_flops(model, px)  # EMA teacher
    own = gram.teacher == "lagged" or (gram.teacher == "snapshot" and snapshot_taken)
    fine = gram.teacher_px or px
    if own or fine != px:
        total += n_global * vit_flops(model, fine)
    head = head_flops(model, cfg.loss)
    total += head * (TRAINED * (n_global + n_local) + n_global)
    total += head * masked * (TRAINED + 1)  # iBOT's head has the same shape
    patches = (px // model.patch) ** 2
    return total + n_global * 2 * patches**2 * model.dim * (TRAINED + 1)  # similarities of both sides


def flops_at(cfg: TrainConfig, step: int, *, horizon: int) -> float:
    """`slice_flops` at an update; a snapshot costs nothing before it is taken."""
    return slice_flops(cfg, snapshot_taken=step > cfg.loss.gram.snapshot_at * horizon)


def vit_flops(model: ModelConfig, px: int, *, class_only: bool = False) -> float:
    """Forward pass of the backbone on one image of `px` x `px` pixels; `class_only`: no patch tokens are asked for."""
    tokens, dim, hidden = token_count(model, px), model.dim, int(model.dim * model.mlp_ratio)
    keys_and_values = 2 * 2 * dim * dim  # of a token
    behind = 2 * (2 * dim * dim + 2 * dim * hidden)  # of a token: query, output, both layers of the MLP
    attention = 2 * 2 * tokens * dim  # of a query: its scores, and the values under them
    block = tokens * (keys_and_values + behind + attention)
    last = tokens * keys_and_values + behind + attention if class_only else block
    return (model.depth - 1) * block + last + _patch_embedding(model, px)


def _trained_vit(model: ModelConfig, px: int, *, class_only: bool = False) -> float:
    """Forward and backward; nothing asks for the gradient by pixels."""
    return TRAINED * vit_flops(model, px, class_only=class_only) - _patch_embedding(model, px)


def _patch_embedding(model: ModelConfig, px: int) -> float:
    return 2 * (px // model.patch) ** 2 * model.patch**2 * model.dim


def head_flops(model: ModelConfig, loss: LossConfig) -> float:
    """Forward pass of a head on one token."""
    hidden, narrow = loss.hidden_dim, loss.bottleneck_dim
    return 2 * (model.dim * hidden + hidden * hidden + hidden * narrow + narrow * loss.out_dim)
