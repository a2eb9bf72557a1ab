"""Figures without a display and without global state, and the panels that the pictures share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dinoct.data.views import BODY_HU
from dinoct.durable import replacing

DPI = 110
SMALL, TINY = 9, 7  # font sizes
SIDE, BOTTOM, TOP = 4.0, 0.5, 0.8  # inches: a panel's side, the room below it, and above it for titles
LEFT, STEP = 0.5, 5.3  # inches: the first panel's left edge, and from panel to panel with the colour bar between


@dataclass(frozen=True)
class Scene:
    """What stands in every picture of a slice. Panels are in units of patches, so that their axes count them."""

    hu: np.ndarray  # [N, N]
    image: np.ndarray  # [S, S] in [0, 1]: what the model gets
    window: tuple[float, float]  # HU that become 0 and 1
    grid: tuple[int, int]  # patches
    title: str

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return (-0.5, self.grid[1] - 0.5, self.grid[0] - 0.5, -0.5)

    @property
    def heading(self) -> str:
        return f"{self.title}   window {self.window[0]:.0f} to {self.window[1]:.0f} HU"


def new_figure(width: float, height: float, title: str) -> Any:
    """A figure of `width` x `height` inches under a title; no pyplot: no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=SMALL, va="top", wrap=True)
    return figure


def axes_at(figure: Any, left: float, bottom: float, width: float, height: float) -> Any:
    """Axes at a place in inches. A layout engine would draw everything twice, and panels of unequal size."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def panels(count: int, title: str) -> tuple[Any, list[Any]]:
    """A figure with a row of equal square panels, and room for a colour bar beside each."""
    figure = new_figure(LEFT + count * STEP, BOTTOM + SIDE + TOP, title)
    return figure, [axes_at(figure, LEFT + i * STEP, BOTTOM, SIDE, SIDE) for i in range(count)]


def save(figure: Any, path: Path) -> None:
    """Write a PNG that names no program and no time; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def slice_panel(figure: Any, axis: Any, scene: Scene) -> None:
    """The input of the model with its colour bar in HU."""
    low, high = scene.window
    hu = scene.image * (high - low) + low
    grey = axis.imshow(hu, cmap="gray", vmin=low, vmax=high, extent=scene.extent, interpolation="nearest")
    bar(figure, axis, grey, "HU")
    axis.set_title(f"input of the model, {scene.image.shape[0]} px", fontsize=SMALL)
    axis.set_axis_off()


def map_panel(axis: Any, values: np.ndarray, scene: Scene, title: str, **options: Any) -> Any:
    """A map on the grid of patches, or its colours, with the outlines of body and lungs over it."""
    picture = axis.imshow(values, extent=scene.extent, interpolation="nearest", **options)
    outline(axis, scene)
    axis.set_title(title, fontsize=SMALL)
    axis.set_axis_off()
    return picture


def bar(figure: Any, axis: Any, picture: Any, label: str) -> None:
    """A colour bar beside a panel, as high as the panel."""
    across, up = figure.get_size_inches()
    box = axis.get_position(original=True)
    side = axes_at(figure, box.x1 * across + 0.1, box.y0 * up, 0.14, box.height * up)
    figure.colorbar(picture, cax=side)
    side.set_ylabel(label, fontsize=SMALL)
    side.tick_params(labelsize=TINY)


def outline(axis: Any, scene: Scene, width: float = 0.8) -> None:
    """Where soft tissue meets air, smoothed over the vessels: a map of patches alone does not show where one is."""
    side = 128  # enough for an outline
    hu = cv2.resize(scene.hu.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    hu = cv2.GaussianBlur(np.clip(hu, -1000, 100), (0, 0), side / 70)
    if hu.min() < BODY_HU < hu.max():
        left, right, bottom, top = scene.extent
        rows = (np.arange(side) + 0.5) / side * (bottom - top) + top
        cols = (np.arange(side) + 0.5) / side * (right - left) + left
        for colour, factor in (("black", 2.5), ("white", 1.0)):  # seen on bright and on dark patches
            axis.contour(cols, rows, hu, levels=[BODY_HU], colors=colour, linewidths=factor * width, linestyles="solid")
