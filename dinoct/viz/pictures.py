"""The pictures of one slice, each from its arrays to its file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoct.viz.figures import (
    BOTTOM,
    LEFT,
    SIDE,
    SMALL,
    STEP,
    TINY,
    Scene,
    axes_at,
    bar,
    map_panel,
    outline,
    panels,
    save,
    slice_panel,
)
from dinoct.viz.maps import Seen
from dinoct.viz.slices import clipped

MOST_HEADS = 16
BINS = 200


def draw_input(scene: Scene, path: Path) -> None:
    """The slice at its own resolution, in the window, in HU."""
    figure, (axis,) = panels(1, scene.heading)
    grey = axis.imshow(scene.hu, cmap="gray", vmin=scene.window[0], vmax=scene.window[1], interpolation="nearest")
    bar(figure, axis, grey, "HU")
    axis.set_title(f"{scene.hu.shape[0]} px", fontsize=SMALL)
    axis.set_axis_off()
    save(figure, path)


def draw_heatmap(scene: Scene, norms: np.ndarray, path: Path) -> None:
    """Norms ``[h, w]`` of the patch tokens."""
    figure, (left, axis) = panels(2, scene.heading)
    slice_panel(figure, left, scene)
    heat = map_panel(axis, norms, scene, f"{norms.shape[0]} x {norms.shape[1]} patch tokens", cmap="inferno")
    bar(figure, axis, heat, "L2 norm of the patch token before the final norm")
    save(figure, path)


def draw_pca(scene: Scene, colours: np.ndarray, explained: np.ndarray, std: float, path: Path) -> None:
    """Colours ``[h, w, 4]`` of `principal_colours`; `std` says whether there is anything behind them."""
    figure, (left, axis) = panels(2, scene.heading)
    slice_panel(figure, left, scene)
    shares = "red {:.0%} green {:.0%} blue {:.0%}".format(*explained)
    says = f"principal components of the patch tokens\nvariance: {shares}; feature std {std:.4f}"
    shown = colours[..., 3] > 0
    map_panel(axis, colours, scene, says if shown.any() else "no patch of this slice holds a body")
    axis.set_facecolor("0.25")
    axis.set(frame_on=True, xticks=[], yticks=[])
    axis.set_axis_on()  # for the colour behind the transparent patches
    axis.set_xlabel("" if shown.all() else "dark grey: patches outside the body", fontsize=TINY)
    save(figure, path)


def draw_similarity(scene: Scene, cosines: np.ndarray, patch: tuple[int, int], path: Path) -> None:
    """Cosines ``[h, w]`` to one patch, which is marked; the axes count patches, for the key `patch`."""
    figure, (left, right) = panels(2, scene.heading)
    slice_panel(figure, left, scene)
    others = np.delete(cosines.ravel(), patch[0] * cosines.shape[1] + patch[1])
    says = f"cosine to patch [{patch[0]},{patch[1]}], the others' median {np.median(others):.2f}" if others.size else ""
    heat = map_panel(right, cosines, scene, says, cmap="RdBu_r", vmin=-1, vmax=1)
    bar(figure, right, heat, "cosine similarity of patch tokens")
    for axis in (left, right):
        axis.set_axis_on()
        axis.set_xlabel("column", fontsize=TINY)
        axis.set_ylabel("row", fontsize=TINY)
        axis.tick_params(labelsize=TINY)
        for name, count in (("x", scene.grid[1]), ("y", scene.grid[0])):
            axis.set(**{f"{name}ticks": range(0, count, -(-count // 16))})
        _mark(axis, patch)
    save(figure, path)


def _mark(axis: Any, patch: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 3.0), ("yellow", 1.5)):
        corner = (patch[1] - 0.5, patch[0] - 0.5)
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))


def draw_attention(scene: Scene, seen: Seen, outside: float, path: Path) -> None:
    """Attention of the class token to the patches: the mean of all heads, and up to 16 heads.

    What falls on the class token itself and on registers, and the share `outside` the body, are in the title.
    """
    figure, (left, middle, right) = panels(3, scene.heading)
    slice_panel(figure, left, scene)
    options = {"cmap": "inferno", "vmin": 0}
    registers = "no registers" if seen.on_registers is None else f"{seen.on_registers:.0%} on registers"
    says = f"{seen.on_class:.0%} on class token, {registers}, {outside:.0%} outside the body"
    heat = map_panel(middle, 100 * seen.heads.mean(axis=0), scene, says, **options)
    bar(figure, middle, heat, "% of the class token's attention, mean of the heads")
    shown = seen.heads[:MOST_HEADS]
    of = f" of {len(seen.heads)}" if len(seen.heads) > len(shown) else ""
    right.set_title(f"{len(shown)}{of} heads, each up to its own largest share", fontsize=SMALL)
    right.set_axis_off()
    columns = int(np.ceil(len(shown) ** 0.5))
    step = (SIDE + 0.2) / columns
    for i, head in enumerate(shown):
        row, column = divmod(i, columns)
        bottom = BOTTOM + SIDE - (row + 1) * step + 0.03
        axis = axes_at(figure, LEFT + 2 * STEP + column * step, bottom, step - 0.2, step - 0.2)
        axis.imshow(head, extent=scene.extent, interpolation="nearest", **options)
        outline(axis, scene, width=0.4)
        axis.set_title(f"{i + 1}: {100 * head.max():.1f} %", fontsize=TINY, pad=2)
        axis.set_axis_off()
    save(figure, path)


def draw_hu(slices: Sequence[np.ndarray], window: tuple[float, float], path: Path) -> None:
    """Histograms of slices ``[H, W]`` in HU: before the window, with its edges, and behind it."""
    low, high = window
    values = np.concatenate([hu.ravel() for hu in slices]).astype(np.float32)
    below, above = clipped(slices, window)
    says = f"window {low:.0f} to {high:.0f} HU: {below:.1%} of the pixels below, {above:.1%} above"
    figure, (before, behind) = panels(2, f"HU of {len(slices)} slice{'s' * (len(slices) > 1)}   {says}")
    edges = np.linspace(min(values.min(), low) - 1, max(values.max(), high) + 1, BINS + 1)
    before.stairs(np.histogram(values, edges)[0], edges, fill=True, color="0.55")
    before.axvspan(low, high, color="tab:blue", alpha=0.12)
    for edge in window:
        before.axvline(edge, color="tab:blue", linewidth=1)
    edges = np.linspace(0, 1, BINS + 1)
    behind.stairs(np.histogram(np.clip((values - low) / (high - low), 0, 1), edges)[0], edges, fill=True, color="0.55")
    for axis, label, name in (
        (before, "HU", "before the window (blue)"),
        (behind, "input of the model: 0 black, 1 white", "behind the window; its ends hold what is clipped"),
    ):
        axis.set_yscale("log")
        axis.set_xlabel(label, fontsize=SMALL)
        axis.set_ylabel("pixels", fontsize=SMALL)
        axis.set_title(name, fontsize=SMALL)
        axis.tick_params(labelsize=TINY)
    save(figure, path)
