"""Adam's moments in 8 bits, block by block on a dynamic scale (Dettmers et al. 2021, arXiv:2110.02861), by torchao.

They take 2 bytes per weight instead of 8. In a checkpoint such a moment is three plain tensors, named ``.codes``,
``.scale`` and ``.qmap`` behind its own name: it is read where torchao is not, and a run goes on with moments of either
kind. As in torchao, tensors of fewer than 4,096 numbers, or of no whole blocks, stay float32.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinoct.config import OptimConfig

BLOCK, LEAST = 256, 4096  # numbers that share a scale; numbers of the smallest tensor that is brought down to 8 bits
PARTS = ("codes", "scale", "qmap")
State = dict[str, Tensor]  # of one parameter: step, exp_avg, exp_avg_sq


def adamw_8bit(groups: Sequence[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """torchao's AdamW. It compiles its step, so that what changes from step to step must be tensors."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # deprecations inside torchao are not the user's
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(list(groups), lr=cfg.lr, betas=tuple(cfg.betas), block_size=BLOCK)
    for group in optimizer.param_groups:
        group["weight_decay"] = torch.tensor(0.0)
    return optimizer


def has_8bit(optimizer: torch.optim.Optimizer) -> bool:
    return not isinstance(optimizer, torch.optim.AdamW)


def packed(state: State) -> State:
    """For a checkpoint: moments in 8 bits taken apart."""
    found: State = {}
    for key, value in state.items():
        parts = {part: getattr(value, part) for part in PARTS} if hasattr(value, "codes") else None
        found |= {key: value} if parts is None else {f"{key}.{part}": tensor for part, tensor in parts.items()}
    return found


def unpacked(state: State, *, eight: bool) -> State:
    """From a checkpoint: moments in 8 bits put together again, or made of others, where `eight`; else float32."""
    found: State = {}
    for key in dict.fromkeys(name.partition(".")[0] for name in state):
        parts = None if key in state else [state[f"{key}.{part}"] for part in PARTS]
        if not eight:
            found[key] = state[key] if parts is None else _float(*parts)
        elif parts is not None:
            found[key] = _eight(*parts, key)
        else:
            found[key] = _lowered(state[key], key)
    return found


def _float(codes: Tensor, scale: Tensor, qmap: Tensor) -> Tensor:
    """Each code's number on the map, times its block's scale."""
    return (qmap[codes.int()].view(len(scale), -1) * scale.unsqueeze(1)).view(codes.shape)


def _eight(codes: Tensor, scale: Tensor, qmap: Tensor, key: str) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(codes, scale, qmap, signed=key == "exp_avg", dtype=torch.float32)


def _lowered(value: Tensor, key: str) -> Tensor:
    """Float32 moments in 8 bits; what torchao leaves in float32 as it is."""
    if value.numel() < LEAST or value.numel() % BLOCK:
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    made = OptimState8bit.zeros(value.shape, key == "exp_avg", BLOCK, value.device, dtype=torch.float32)
    return made.copy_(value)
