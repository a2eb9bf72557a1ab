"""Projection head from features to prototype scores (Caron et al. 2021, arXiv:2104.14294)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrototypeHead(nn.Module):
    """MLP to a normalised bottleneck, then cosine similarity with K prototypes."""

    def __init__(self, in_dim: int, *, out_dim: int, hidden_dim: int, bottleneck_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(bottleneck_dim, out_dim, bias=False)
        nn.init.trunc_normal_(self.prototypes.weight, std=0.02)  # small: only its direction counts, and it can turn

    def forward(self, features: Tensor) -> Tensor:
        """``[..., D]`` features to ``[..., K]`` scores in [-1, 1], before any temperature."""
        x = self.mlp(features).float()
        with torch.autocast(x.device.type, enabled=False):  # bf16 scores, divided by a temperature, are 0.1 nats off
            x = F.normalize(x, dim=-1, eps=1e-6)
            return F.linear(x, _unit_rows(self.prototypes.weight.float()))


def _unit_rows(weight: Tensor) -> Tensor:
    """Rows of length 1, by the kernel behind torch's `weight_norm`: it takes fewer passes than `F.normalize`."""
    return torch._weight_norm(weight, weight.new_ones(len(weight), 1), 0)
