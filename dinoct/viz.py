"""Pictures of what an encoder sees."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dinoct.config import WindowConfig
from dinoct.data.views import View, render_view


def middle_window(window: WindowConfig) -> tuple[float, float]:
    """The middle of a range of windows, as (low, high) HU."""
    center, width = sum(window.center) / 2, sum(window.width) / 2
    return center - width / 2, center + width / 2


def whole_slice(hu: np.ndarray, window: WindowConfig, size: int) -> np.ndarray:
    """The slice as the model gets it in evaluation: whole, in the middle window, ``[size, size]`` in [0, 1]."""
    low, high = middle_window(window)
    return render_view(hu, View(0, 0, *hu.shape, False, low, high), size)


@torch.inference_mode()
def patch_norms(backbone: nn.Module, image: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """L2 norms ``[h, w]`` of the patch tokens of an image ``[S, S]`` in [0, 1], and the tokens ``[P, D]``.

    The norms are taken before the final LayerNorm, which makes all of them nearly the same.
    """
    before: list[torch.Tensor] = []
    hook = backbone.vit.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    try:
        patches = backbone(torch.from_numpy(image)[None, None].to(device))[1][0].float().cpu()  # [P, D]
    finally:
        hook.remove()
    raw = before[0][0, -len(patches) :].float().cpu()  # [P, D]; class and register tokens stand in front
    grid = (image.shape[0] // backbone.patch, image.shape[1] // backbone.patch)
    return raw.norm(dim=-1).view(grid).numpy(), patches.numpy()


def draw_monitor(
    backbone: nn.Module, hu: np.ndarray, *, window: WindowConfig, size: int, device: torch.device, out: Path, title: str
) -> dict[str, Any]:
    """Write input.png, heatmap.png and stats.json for one slice ``[H, W]`` into the folder `out`.

    Returns:
        The statistics: dispersion of the patch tokens (``std`` is the raw one, above 0.001 expected).
    """
    image = whole_slice(hu, window, size)
    training = backbone.training
    norms, tokens = patch_norms(backbone.eval(), image, device)
    backbone.train(training)
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True).clip(1e-12)
    raw = float(unit.std(axis=0).mean())
    stats = {
        "std": raw,
        "std_normalised": raw * tokens.shape[1] ** 0.5,
        "token_std": float(tokens.std(axis=0).mean()),
        "norm_min": float(norms.min()),
        "norm_mean": float(norms.mean()),
        "norm_max": float(norms.max()),
        "patches": int(norms.size),
        "window_hu": list(middle_window(window)),
    }
    out.mkdir(parents=True, exist_ok=True)
    _draw_input(hu, middle_window(window), out / "input.png", title)
    _draw_heatmap(image, norms, out / "heatmap.png", title)
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    return stats


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _draw_input(hu: np.ndarray, window: tuple[float, float], path: Path, title: str) -> None:
    figure, (axis,) = _figure(5.4, 5.2, 1)
    image = axis.imshow(hu, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest")
    figure.colorbar(image, ax=axis, label="HU", shrink=0.85)
    axis.set_title(f"{title}\nwindow {window[0]:.0f} to {window[1]:.0f} HU", fontsize=9)
    axis.set_axis_off()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_heatmap(image: np.ndarray, norms: np.ndarray, path: Path, title: str) -> None:
    figure, (left, right) = _figure(9.6, 4.8, 2)
    left.imshow(image, cmap="gray", vmin=0, vmax=1)
    left.set_title(f"{title}\ninput of the model, {image.shape[0]} px", fontsize=9)
    right.imshow(image, cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    heat = right.imshow(norms, cmap="inferno", alpha=0.65, extent=extent, interpolation="nearest")
    figure.colorbar(heat, ax=right, label="L2 norm of the patch token before the final norm", shrink=0.85)
    right.set_title(f"{norms.shape[0]} x {norms.shape[1]} patch tokens of the EMA teacher", fontsize=9)
    for axis in (left, right):
        axis.set_axis_off()
    figure.savefig(path, dpi=110, metadata={"Software": None})
