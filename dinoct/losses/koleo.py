"""Spreading the features of a batch (Kozachenko-Leonenko; Sablayrolles et al. 2019, arXiv:1806.03198)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def koleo_loss(features: Tensor, *, groups: Tensor | None = None, floor: float = 1e-3) -> Tensor:
    """Mean of -log(distance to the nearest neighbour) over L2-normalised features, in float32.

    Neighbouring slices of one series are near-duplicates: pushing them apart is wrong, and the gradient of the
    logarithm there is thousands of times the usual one. Hence the groups, and the floor under the distance.

    Args:
        features: ``[B, D]``.
        groups: ``[B]`` integers; rows with the same number are never each other's neighbour. A row that has no
            neighbour left is left out.
        floor: distances below it count as the floor, with zero gradient.
    Returns:
        A scalar; 0 where no row has a neighbour.
    """
    x = F.normalize(features.float(), dim=-1)  # [B, D]
    with torch.no_grad():
        similarity = x @ x.T  # [B, B]
        barred = torch.eye(len(x), dtype=torch.bool, device=x.device)
        if groups is not None:
            barred |= groups[:, None] == groups[None, :]
        nearest = similarity.masked_fill(barred, -2.0).argmax(dim=1)  # [B]
        valid = ~barred.all(dim=1)  # [B]
    distance = (x - x[nearest]).square().sum(dim=-1).clamp_min(floor**2).sqrt()  # [B]
    return -(distance.log() * valid).sum() / valid.sum().clamp_min(1)
