"""Parameter groups and the optimiser."""

import re

import torch
from torch import nn

from dinoct import moments
from dinoct.config import OptimConfig
from dinoct.parallel import like
from dinoct.validate import EIGHT_BIT


def parameter_groups(model: nn.Module, *, depth: int, cfg: OptimConfig) -> list[dict]:
    """Group the student's parameters by learning-rate factor and weight decay.

    Weight decay applies to matrices alone: not to biases, norms, LayerScale, position embedding, or the class,
    register and mask tokens. Block i of `depth` has its learning rate times ``layer_decay ** (depth + 1 - i)``
    (Bao et al. 2022, arXiv:2106.08254), the embeddings count as layer 0, the heads keep the full rate.

    Returns:
        Dicts for ``torch.optim``: ``params``, ``names``, ``lr_factor``, ``decays``, ``last_layer``.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = layer_factor(name, depth=depth, cfg=cfg)
        decays = parameter.ndim >= 2 and not re.search(r"(token|pos_embed|\.bias$)", name)
        last_layer = name.endswith("prototypes.weight")
        key = (factor, decays, last_layer)
        group = groups.setdefault(
            key, {"params": [], "names": [], "lr_factor": factor, "decays": decays, "last_layer": last_layer}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layer_factor(name: str, *, depth: int, cfg: OptimConfig) -> float:
    """Factor on the learning rate of the parameter called `name`."""
    if not name.startswith("backbone."):
        return 1.0
    block = re.search(r"blocks\.(\d+)\.", name)
    embedding = any(part in name for part in ("patch_embed", "pos_embed", "cls_token", "reg_token", "mask_token"))
    layer = int(block.group(1)) + 1 if block else 0 if embedding else depth + 1
    factor = cfg.layer_decay ** (depth + 1 - layer)
    return factor * cfg.patch_embed_lr if "patch_embed" in name else factor


def build_optimizer(model: nn.Module, *, depth: int, cfg: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; the learning rate and weight decay of each step come from the schedules."""
    fused = all(p.device.type in ("cuda", "cpu") for p in model.parameters())
    groups = parameter_groups(model, depth=depth, cfg=cfg)
    if cfg.moments == EIGHT_BIT:
        return moments.adamw_8bit(groups, cfg)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas), fused=fused)


def apply_schedule(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float, frozen: bool) -> None:
    """Set the step's learning rate and weight decay in every group; the prototypes stand still while `frozen`."""
    for group in optimizer.param_groups:
        rate = 0.0 if frozen and group["last_layer"] else lr * group["lr_factor"]
        for key, value in (("lr", rate), ("weight_decay", weight_decay if group["decays"] else 0.0)):
            group[key] = group[key].fill_(value) if isinstance(group[key], torch.Tensor) else value


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Moments and counts by parameter name, plain tensors: independent of how the parameters are grouped."""
    state = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter in optimizer.state:
                state[name] = moments.packed(optimizer.state[parameter])
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, dict[str, torch.Tensor]]) -> None:
    """Put the state of `optimizer_state` back; the groups' own settings stay as this run has them."""
    own, eight = optimizer.state_dict(), moments.has_8bit(optimizer)
    numbers = [
        (name, i) for group in own["param_groups"] for name, i in zip(group["names"], group["params"], strict=True)
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own["state"] = {
        i: {key: like(value, parameters[i]) for key, value in moments.unpacked(state[name], eight=eight).items()}
        for name, i in numbers
        if name in state
    }
    optimizer.load_state_dict(own)
