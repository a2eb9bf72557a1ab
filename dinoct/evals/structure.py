"""The patch probe on masks: can a linear layer on frozen patch tokens find a structure, such as the lungs?"""

from collections.abc import Mapping

import cv2
import numpy as np
import torch
from torch import Tensor

from dinoct.config import ProbeConfig
from dinoct.data.index import SliceIndex
from dinoct.data.masks import MaskStore
from dinoct.data.store import SliceStore
from dinoct.evals.features import Batch, Encoder, WholeSlices, choose_slices, encode
from dinoct.evals.linear import Figures, linear_classifier
from dinoct.hardware import Hardware

FIT_PATCHES = 20_000  # at most; more do not move a linear layer


class MaskedSlices(WholeSlices):
    """Whole slices with ``share`` ``[g, g]``: the share of each patch inside the mask."""

    def __init__(
        self,
        index: SliceIndex,
        store: SliceStore,
        masks: MaskStore,
        probe: ProbeConfig,
        *,
        size: int,
        patch: int,
    ):
        rows = masks.rows_with_mask(index)
        rows = rows[choose_slices(index.select(rows), probe.masks_n, probe.seed)]
        super().__init__(index, store, np.sort(rows), probe, size=size)  # sorted: one series after the other
        self.masks, self.grid = masks, size // patch

    def __getitem__(self, j: int) -> Batch:
        mask = self.masks.read(self.index, int(self.rows[j])).astype(np.float32)
        share = cv2.resize(mask, (self.grid, self.grid), interpolation=cv2.INTER_AREA)
        return super().__getitem__(j) | {"share": torch.from_numpy(share)}


class _Patches:
    """Collects patch tokens and the mask's share of each patch."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[Tensor]] = {}
        self.shares: dict[str, list[Tensor]] = {}

    def look(self, name: str, patches: Tensor, batch: Batch) -> None:
        self.tokens.setdefault(name, []).append(patches[:, 0].half().cpu())  # [B, P, D]
        self.shares.setdefault(name, []).append(batch["share"].flatten(1))  # [B, P]

    def joined(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``[n, P, D]`` and booleans ``[n, P]``: most of the patch is inside."""
        return torch.cat(self.tokens[name]).float().numpy(), torch.cat(self.shares[name]).numpy() > 0.5


def mask_probe(
    encoders: Mapping[str, Encoder],
    sides: tuple[SliceIndex, SliceIndex],
    store: SliceStore,
    masks: MaskStore,
    probe: ProbeConfig,
    *,
    size: int,
    patch: int,
    hardware: Hardware,
) -> Figures:
    """Fit a linear layer on patch tokens of training patients, judge it on the others.

    A patch counts as inside where the mask covers more than half of it.

    Args:
        sides: training and validation rows.
    Returns:
        By encoder, Dice: of all judged patches together, and the mean over patients.
    """
    found: list[_Patches] = []
    patients = np.empty(0)
    for side in sides:
        slices = MaskedSlices(side, store, masks, probe, size=size, patch=patch)
        if not len(slices):
            return {"not_measured": "masks on one side of the split alone"}
        found.append(_Patches())
        encode(encoders, slices, hardware=hardware, batch_size=probe.batch_size, look=found[-1].look)
        patients = side.patient[slices.rows]
    result: Figures = {}
    for name in found[0].tokens:
        tokens, inside = found[0].joined(name)
        x, y = tokens.reshape(-1, tokens.shape[-1]), inside.ravel()
        use = np.random.default_rng(probe.seed).permutation(len(x))[:FIT_PATCHES]
        if len(np.unique(y[use])) < 2:
            return {"not_measured": "masks that cover no patch, or every one"}
        layer = linear_classifier(balanced=False).fit(x[use], y[use])
        judged, truth = found[1].joined(name)
        got = layer.predict(judged.reshape(-1, judged.shape[-1])).reshape(truth.shape)
        each = [dice(got[patients == patient], truth[patients == patient]) for patient in np.unique(patients)]
        result[name] = {"dice": dice(got, truth), "dice_patients": float(np.mean(each)), "patients": len(each)}
    return result


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two boolean masks: 2 |a and b| / (|a| + |b|) (Dice 1945); 1 where both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0
