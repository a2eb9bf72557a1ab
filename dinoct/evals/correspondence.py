"""Patch correspondence: do patch tokens at the same anatomical point of two views agree more than at other points?"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dinoct.evals.features import Batch

INSIDE_HU = -950.0  # mean of a patch: above it is body or lung, below it the air around, where all patches agree


def matching_patches(boxes: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Where each patch of the first view lies in the second.

    Args:
        boxes: ``[B, 2, 5]``: top, left, height, width in pixels of the slice, and 1 where the view is flipped.
        grid: patches per side of a view.
    Returns:
        Numbers ``[B, P]`` of the patches of the second view that hold the centres of the first view's patches, and
        booleans ``[B, P]``: the centre lies in the second view.
    """
    top, left, height, width, flip = (boxes[:, :, i, None] for i in range(5))  # each [B, 2, 1]
    centre = (torch.arange(grid, device=boxes.device) + 0.5) / grid
    v, u = (axis.flatten() for axis in torch.meshgrid(centre, centre, indexing="ij"))  # [P], share of the view
    y = top[:, 0] + v * height[:, 0]  # [B, P] in the slice
    x = left[:, 0] + torch.where(flip[:, 0] > 0, 1 - u, u) * width[:, 0]
    v2, u2 = (y - top[:, 1]) / height[:, 1], (x - left[:, 1]) / width[:, 1]
    u2 = torch.where(flip[:, 1] > 0, 1 - u2, u2)
    inside = (v2 >= 0) & (v2 < 1) & (u2 >= 0) & (u2 < 1)
    rows, cols = ((share * grid).long().clamp(0, grid - 1) for share in (v2, u2))
    return rows * grid + cols, inside


def compare(first: Tensor, second: Tensor, match: Tensor, valid: Tensor) -> Tensor:
    """Agreement of matching patches, one row per slice.

    Args:
        first, second: patch tokens ``[B, P, D]`` of the two views.
        match: ``[B, P]`` number of the matching patch in the second view.
        valid: ``[B, P]`` booleans: the patches that count.
    Returns:
        ``[B, 3]``: mean cosine to the matching patch, mean cosine to the view's other patches, and mean percentile
        rank of the matching patch among all (0 best, 0.5 chance, equals count half); NaN where no patch counts.
    """
    similarity = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).transpose(1, 2)  # [B, P, P]
    right = similarity.gather(2, match.unsqueeze(-1))  # [B, P, 1]
    others = similarity.shape[-1] - 1
    above, equal = (similarity > right).sum(dim=-1), (similarity == right).sum(dim=-1) - 1
    right = right.squeeze(-1)
    figures = [right, (similarity.sum(dim=-1) - right) / others, (above + 0.5 * equal) / others]
    weights = valid.float() / valid.sum(dim=1, keepdim=True)  # 0 / 0 is NaN
    return torch.stack([(figure * weights).sum(dim=1) for figure in figures], dim=1)


@dataclass
class Correspondence:
    """Collects the agreement of patches over a pass of `encode`; pass its `look` there."""

    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def look(self, name: str, patches: Tensor, batch: Batch) -> None:
        """Take patch tokens ``[B, 3, P, D]`` of the views of `FixedViews`."""
        grid = batch["tissue"].shape[-1]
        match, inside = matching_patches(batch["boxes"].to(patches.device), grid)
        tissue = batch["tissue"][:, 0].flatten(1).to(patches.device) > INSIDE_HU
        self.rows.setdefault(name, []).append(compare(patches[:, 0], patches[:, 1], match, inside & tissue).cpu())

    def summary(self) -> dict[str, dict[str, float]]:
        """Per encoder: means over the slices that have a matching patch, and the gap between the two cosines."""
        result = {}
        for name, parts in self.rows.items():
            rows = torch.cat(parts).double()
            same, other, rank = rows[~rows.isnan().any(dim=1)].mean(dim=0).tolist()
            result[name] = {"cosine": same, "other_cosine": other, "gap": same - other, "mean_percentile_rank": rank}
        return result
