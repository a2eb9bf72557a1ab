"""The views that the model learns from, as a grid."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dinoct.config import AugConfig
from dinoct.data.batch import CropBatch, collate
from dinoct.data.dataset import SliceViews
from dinoct.viz.figures import TINY, axes_at, new_figure, save

ROWS = 4
WIDTH, CELLS, GAP = 6.0, (1.4, 2.4), 0.06  # inches: the figure's aim, least and largest cell, between cells
HEAD, FOOT = 0.75, 0.55  # inches for the title and for the grey scale
MASKED = (0.95, 0.55, 0.1, 0.55)  # orange


def first_views(data: SliceViews) -> CropBatch:
    """The first samples that a run learns from: always the same for its seed, however far it has come."""
    return collate([data[position] for position in range(ROWS)])


def views_title(aug: AugConfig) -> str:
    """Which views these are, and in which windows."""
    (c0, c1), (w0, w1) = aug.window.center, aug.window.width
    return (
        f"views of the first training slices (aug={aug.name})\n"
        f"each crop in a window of its own: centre {c0:.0f} to {c1:.0f} HU, width {w0:.0f} to {w1:.0f} HU"
    )


def draw_views(batch: CropBatch, path: Path, title: str) -> None:
    """Write the views of the first four slices of a batch as a PNG: a row per slice, global crops before local ones.

    Crops of all sizes are drawn equally large; their titles give the pixels. Patches that iBOT hides are tinted.

    Args:
        batch: at least one slice, on any device.
        path: the file to write; its folder is made.
        title: above the grid; it should state the windows, which differ from crop to crop.
    """
    slices = len(batch.groups)
    rows = min(ROWS, slices)
    columns = _columns(batch.global_crops, slices, "global")
    n_global = len(columns)
    if batch.local_crops is not None:
        columns += _columns(batch.local_crops, slices, "local")
    cell = min(max(WIDTH / len(columns), CELLS[0]), CELLS[1])
    width = max(WIDTH, GAP + len(columns) * (cell + GAP))
    height = HEAD + rows * (cell + GAP) + FOOT
    figure = new_figure(width, height, title)
    for c, (name, crops) in enumerate(columns):
        for r in range(rows):
            left, bottom = GAP + c * (cell + GAP), height - HEAD - (r + 1) * cell - r * GAP
            axis = axes_at(figure, left, bottom, cell, cell)
            image = axis.imshow(crops[r], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
            if r == 0:
                axis.set_title(name, fontsize=TINY, pad=3)
            if batch.masks is not None and c < n_global:
                _tint(axis, batch.masks[c * slices + r].cpu().numpy(), crops.shape[-1])
    foot = "orange: patches that are hidden from the student" if batch.masks is not None else ""
    _grey_scale(figure, image, foot)
    save(figure, path)


def _columns(crops: Tensor, slices: int, kind: str) -> list[tuple[str, np.ndarray]]:
    """Titles and pixels ``[B, s, s]`` of crops ``[V * B, 1, s, s]``, view by view."""
    views = crops[:, 0].float().cpu().numpy().reshape(-1, slices, *crops.shape[2:])
    return [(f"{kind} {i + 1}, {crops.shape[-1]} px", view) for i, view in enumerate(views)]


def _tint(axis: Any, mask: np.ndarray, size: int) -> None:
    grid = round(mask.size**0.5)
    colour = np.zeros((grid, grid, 4))
    colour[mask.reshape(grid, grid)] = MASKED
    axis.imshow(colour, extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest")


def _grey_scale(figure: Any, image: Any, foot: str) -> None:
    """The colour bar in the lower left corner: what black and white mean, whatever the crop's window."""
    width, height = figure.get_size_inches()
    bar = axes_at(figure, 0.3, 0.33, 2.2, 0.1)
    figure.colorbar(image, cax=bar, orientation="horizontal")
    bar.set_xticks([0, 0.5, 1], ["lower edge", "of the crop's window", "upper edge"], fontsize=TINY)
    bar.tick_params(length=2)
    figure.text(3.0 / width, 0.33 / height, foot, fontsize=TINY)
