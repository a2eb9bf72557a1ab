"""Two fixed views of each held-out slice, and what encoders make of them, in one pass."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dinoct.data.dataset import _start_worker, read_slice
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore
from dinoct.data.views import ViewSpec, render_view, sample_view
from dinoct.hardware import Hardware

Encoder = Callable[[Tensor], Tensor]  # [B, 1, S, S] in [0, 1] -> [B, D]


def choose_slices(index: SliceIndex, n: int, seed: int) -> np.ndarray:
    """Rows of at most n slices: a fixed draw that data added later thins out but does not reorder."""
    draw = [np.random.default_rng([seed, int(str(name), 16)]).random() for name in index.slice_id]
    return np.argsort(draw, kind="stable")[:n]


class ProbePairs(Dataset):
    """Two views of each chosen slice; the views depend on the probe's seed and the slice alone."""

    def __init__(self, index: SliceIndex, store: SliceStore, spec: ViewSpec, *, n: int, seed: int):
        self.index, self.store, self.spec, self.seed = index, store, spec, seed
        self.rows = choose_slices(index, n, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, j: int) -> Tensor:
        i = int(self.rows[j])
        hu = read_slice(self.index, self.store, i)
        name = int(str(self.index.slice_id[i]), 16)
        views = [
            render_view(hu, sample_view(np.random.default_rng([self.seed, name, view]), self.spec, hu), self.spec.size)
            for view in (1, 2)
        ]
        return torch.from_numpy(np.stack(views)).unsqueeze(1)  # [2, 1, S, S]


@dataclass
class PairFeatures:
    """Features of the first and second view, ``[n, D]`` float32 on the CPU, in the same order."""

    first: Tensor
    second: Tensor


@torch.inference_mode()
def extract(
    encoders: Mapping[str, Encoder],
    pairs: ProbePairs,
    *,
    hardware: Hardware,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, PairFeatures]:
    """Run every encoder over the same views; `advance` is told of each finished batch's number of slices."""
    loader: Iterable[Tensor] = DataLoader(
        pairs,
        batch_size=batch_size,
        num_workers=hardware.num_workers,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    parts: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for batch in loader:  # [B, 2, 1, S, S]
        views = batch.transpose(0, 1).flatten(0, 1).to(hardware.device)  # [2 * B, 1, S, S]
        for name, encoder in encoders.items():
            parts[name].append(encoder(views).float().cpu().unflatten(0, (2, -1)))  # [2, B, D]
        advance(len(batch))
    joined = {name: torch.cat(part, dim=1) for name, part in parts.items()}
    return {name: PairFeatures(both[0], both[1]) for name, both in joined.items()}


def class_token_encoder(backbone: torch.nn.Module, hardware: Hardware) -> Encoder:
    """The class token of a backbone in evaluation mode."""
    backbone = backbone.to(hardware.device).eval()

    def encode(x: Tensor) -> Tensor:
        with hardware.autocast():
            return backbone(x)[0]

    return encode


def pixel_encoder(x: Tensor) -> Tensor:
    """32 x 32 average pixels without their mean: what raw intensity at fixed positions is worth."""
    small = F.adaptive_avg_pool2d(x, 32).flatten(1)  # [B, 1024]
    return small - small.mean(dim=1, keepdim=True)


def histogram_encoder(x: Tensor, bins: int = 64) -> Tensor:
    """Histogram of the windowed intensities, ``[B, bins]``: what a view is worth without any geometry."""
    which = (x.flatten(1) * bins).long().clamp_(0, bins - 1)  # [B, S * S]
    counts = torch.zeros(len(x), bins, device=x.device).scatter_add_(1, which, torch.ones_like(which, dtype=x.dtype))
    return counts / which.shape[1]
