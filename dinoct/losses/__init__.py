"""The objective: pure functions of tensors, computed in float32."""

from dinoct.losses.dino import center_softmax, cross_entropy_pairs, sinkhorn_knopp
from dinoct.losses.gram import gram_loss, gram_loss_per_patch, resize_patches
from dinoct.losses.ibot import masked_cross_entropy
from dinoct.losses.koleo import koleo_loss

__all__ = [
    "center_softmax",
    "cross_entropy_pairs",
    "gram_loss",
    "gram_loss_per_patch",
    "koleo_loss",
    "masked_cross_entropy",
    "resize_patches",
    "sinkhorn_knopp",
]
