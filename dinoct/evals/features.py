"""Fixed views of held-out slices, and what encoders make of them, in one pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from dinoct.config import ProbeConfig
from dinoct.data.dataset import read_slice, start_worker
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore
from dinoct.data.views import View, ViewSpec, middle_window, render_view, sample_view
from dinoct.hardware import Hardware


@dataclass
class Tokens:
    """What an encoder makes of B images."""

    cls: Tensor  # [B, D]
    patches: Tensor | None = None  # [B, P, D]; None: the encoder looks at no patches


Encoder = Callable[[Tensor], Tokens]  # of images [B, 1, S, S] in [0, 1]
Batch = dict[str, Tensor]


def choose_slices(index: SliceIndex, n: int, seed: int) -> np.ndarray:
    """Rows of at most n slices: a fixed draw that data added later thins out but does not reorder."""
    draw = [np.random.default_rng([seed, int(str(name), 16)]).random() for name in index.slice_id]
    return np.argsort(draw, kind="stable")[:n]


class _Slices(Dataset):
    """Chosen slices of an index."""

    def __init__(self, index: SliceIndex, store: SliceStore, rows: np.ndarray):
        self.index, self.store, self.rows = index, store, rows

    def __len__(self) -> int:
        return len(self.rows)

    def hu(self, j: int) -> np.ndarray:
        return read_slice(self.index, self.store, int(self.rows[j]))


class WholeSlices(_Slices):
    """``images`` ``[1, 1, S, S]``: the whole slice in the middle of the probe's windows."""

    def __init__(self, index: SliceIndex, store: SliceStore, rows: np.ndarray, probe: ProbeConfig, *, size: int):
        super().__init__(index, store, rows)
        self.size, self.window = size, middle_window(probe.window)

    def __getitem__(self, j: int) -> Batch:
        return {"images": torch.from_numpy(self.whole(self.hu(j)))[None, None]}

    def whole(self, hu: np.ndarray) -> np.ndarray:
        return render_view(hu, View(0, 0, *hu.shape, False, *self.window), self.size)


class FixedViews(WholeSlices):
    """Two views of each slice, and the whole of it; the views depend on the probe's seed and the slice alone.

    ``images`` ``[3, 1, S, S]``: first view, second view, whole slice.
    ``boxes`` ``[2, 5]``: top, left, height, width in pixels of the slice, and 1 where flipped.
    ``tissue`` ``[2, g, g]``: mean HU under each patch of the two views.
    """

    def __init__(
        self,
        index: SliceIndex,
        store: SliceStore,
        rows: np.ndarray,
        probe: ProbeConfig,
        spec: ViewSpec,
        *,
        grid: int,
        whole: bool = True,
    ):
        super().__init__(index, store, rows, probe, size=spec.size)
        self.spec, self.seed, self.grid, self.with_whole = spec, probe.seed, grid, whole

    def __getitem__(self, j: int) -> Batch:
        hu = self.hu(j)
        name = int(str(self.index.slice_id[int(self.rows[j])]), 16)
        views = [sample_view(np.random.default_rng([self.seed, name, v]), self.spec, hu) for v in (1, 2)]
        images = [render_view(hu, view, self.spec.size) for view in views]
        images += [self.whole(hu)] if self.with_whole else []
        boxes = [[v.top, v.left, v.height, v.width, v.flip] for v in views]
        return {
            "images": torch.from_numpy(np.stack(images)).unsqueeze(1),
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "tissue": torch.from_numpy(np.stack([patch_hu(hu, view, self.grid) for view in views])),
        }


def patch_hu(hu: np.ndarray, view: View, grid: int) -> np.ndarray:
    """Mean HU under each patch of a view, ``[grid, grid]`` float32."""
    low, high = -1024.0, 3071.0
    plain = View(view.top, view.left, view.height, view.width, view.flip, low, high)
    return render_view(hu, plain, grid) * (high - low) + low


@torch.inference_mode()
def encode(
    encoders: Mapping[str, Encoder],
    slices: Dataset,
    *,
    hardware: Hardware,
    batch_size: int,
    look: Callable[[str, Tensor, Batch], None] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Class tokens ``[n, V, D]`` float32 on the CPU of the V images of each slice, for every encoder.

    Args:
        look: sees the patch tokens ``[B, V, P, D]`` (on the device) of every encoder that has some, with the batch;
            they are not kept.
        advance: is told of each finished batch's number of slices.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for batch in _batches(slices, hardware, batch_size):
        b, v = batch["images"].shape[:2]
        images = batch["images"].flatten(0, 1).to(hardware.device)  # [B * V, 1, S, S]
        for name, encoder in encoders.items():
            tokens = encoder(images)
            parts[name].append(tokens.cls.float().cpu().unflatten(0, (b, v)))
            if look is not None and tokens.patches is not None:
                look(name, tokens.patches.float().unflatten(0, (b, v)), batch)
        advance(b)
    return {name: torch.cat(part) for name, part in parts.items()}


def _batches(slices: Dataset, hardware: Hardware, batch_size: int) -> Iterator[Batch]:
    return iter(
        DataLoader(
            slices,
            batch_size=batch_size,
            num_workers=hardware.num_workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
            collate_fn=default_collate,
        )
    )


def backbone_encoder(backbone: torch.nn.Module, hardware: Hardware) -> Encoder:
    """Class and patch tokens of a backbone in evaluation mode."""
    backbone = backbone.to(hardware.device).eval()

    def run(x: Tensor) -> Tokens:
        with hardware.autocast():
            return Tokens(*backbone(x))

    return run


def pixel_encoder(patch: int) -> Encoder:
    """What raw intensity at fixed positions is worth: 32 x 32 average pixels without their mean; a patch's pixels."""

    def run(x: Tensor) -> Tokens:
        patches = F.unfold(x, patch, stride=patch).transpose(1, 2)  # [B, P, patch * patch]
        small = F.adaptive_avg_pool2d(x, 32).flatten(1)  # [B, 1024]
        return Tokens(small - small.mean(dim=-1, keepdim=True), patches)

    return run


def histogram_encoder(x: Tensor, bins: int = 64) -> Tokens:
    """Histogram of the windowed intensities, ``[B, bins]``: what a view is worth without any geometry."""
    which = (x.flatten(1) * bins).long().clamp_(0, bins - 1)  # [B, S * S]
    counts = torch.zeros(len(x), bins, device=x.device).scatter_add_(1, which, torch.ones_like(which, dtype=x.dtype))
    return Tokens(counts / which.shape[1])


def neighbours(index: SliceIndex, rows: Sequence[int], offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Slices beside others in their series.

    Returns:
        Places in `rows` ``[m]`` of the slices that have all their neighbours, and those ``[m, len(offsets)]`` as rows
        of the index.
    """
    place = {(int(s), int(r)): i for i, (s, r) in enumerate(zip(index.series, index.row, strict=True))}
    kept, found = [], []
    for j, i in enumerate(rows):
        beside = [place.get((int(index.series[i]), int(index.row[i]) + offset)) for offset in offsets]
        if None not in beside:
            kept.append(j)
            found.append(beside)
    return np.array(kept, dtype=int), np.array(found, dtype=int).reshape(len(kept), len(offsets))
