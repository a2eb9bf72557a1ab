"""Views of several slices as one batch. No model is imported here: a loader worker needs none."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor


@dataclass
class CropBatch:
    """The views of B slices, crop by crop: row ``v * B + b`` is view v of slice b."""

    global_crops: Tensor  # [Vg * B, 1, S, S] in [0, 1]
    local_crops: Tensor | None  # [Vl * B, 1, s, s]
    masks: Tensor | None  # [Vg * B, P] booleans; None where no patch is masked
    masked: Tensor  # [M] flat indices of the masked patches: made on the host, the device need not count them
    mask_weights: Tensor  # [M] 1 / masked patches of the same crop
    groups: Tensor  # [B] number of the slice's series
    positions: list[int]  # [B] positions in the sample order
    gram_crops: Tensor | None = None  # [Vg * B, 1, G, G] the global crops at the Gram teacher's size, where it differs

    def to(self, device: torch.device) -> "CropBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "CropBatch":
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "CropBatch":
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return CropBatch(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def mask_fields(masks: Tensor | None) -> dict[str, Tensor | None]:
    """The three fields of a `CropBatch` that belong to masks ``[Vg * B, P]``, or to none."""
    if masks is None:
        return {"masks": None, "masked": torch.empty(0, dtype=torch.int64), "mask_weights": torch.empty(0)}
    weights = (1.0 / masks.sum(dim=1).clamp_min(1)).unsqueeze(1).expand_as(masks)[masks]
    return {"masks": masks, "masked": masks.flatten().nonzero().squeeze(1), "mask_weights": weights}


def collate(items: list[dict]) -> CropBatch:
    """Samples to a batch, crop by crop (see `CropBatch`)."""

    def crops(key: str) -> Tensor | None:
        stacked = np.stack([item[key] for item in items], axis=1)  # [V, B, s, s]
        return torch.from_numpy(stacked.reshape(-1, 1, *stacked.shape[2:])) if stacked.size else None

    masks = np.stack([item["masks"] for item in items], axis=1)  # [Vg, B, P]
    masks = torch.from_numpy(masks.reshape(-1, masks.shape[-1]))
    return CropBatch(
        global_crops=crops("global"),
        local_crops=crops("local"),
        **mask_fields(masks if masks.any() else None),
        groups=torch.tensor([item["group"] for item in items]),
        positions=[item["position"] for item in items],
        gram_crops=crops("gram"),
    )
