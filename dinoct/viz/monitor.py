"""All pictures of one slice, and the figures behind them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dinoct.config import WindowConfig
from dinoct.data.views import middle_window
from dinoct.durable import replacing_text
from dinoct.errors import ConfigError
from dinoct.viz import pictures
from dinoct.viz.figures import Scene
from dinoct.viz.maps import Seen, cosine_to, dispersion, principal_colours, see
from dinoct.viz.slices import body_patches, clipped, default_patch, whole_slice

PICTURES = ("input", "heatmap", "pca", "similarity", "attention", "hu")


def draw_monitor(
    backbone: nn.Module,
    hu: np.ndarray,
    *,
    window: WindowConfig,
    size: int,
    device: torch.device,
    amp: bool = False,
    out: Path,
    title: str,
    patch: Sequence[int] | None = None,
    sample: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """Write NAME.png for each of `PICTURES`, and stats.json, for one slice ``[N, N]`` into the folder `out`.

    Args:
        backbone: on `device`; it is left in the mode that it was in.
        hu: square slice in HU.
        window: a range of windows; the model sees the slice in the middle one.
        size: pixels of the model's input.
        amp: encode in bf16.
        out: made where it is missing.
        title: stands above every picture of this slice.
        patch: (row, column) of the patch that the others are compared with; None: the one deepest in a lung.
        sample: slices for the histogram of HU; without them it is that of `hu` alone.
    Returns:
        The statistics: dispersion of the patch tokens (``std`` is the raw one, above 0.001 expected), ...
    Raises:
        ConfigError: naming `patch`, before anything is drawn.
    """
    grid = (size // backbone.patch, size // backbone.patch)
    patch = default_patch(hu, grid) if patch is None else checked_patch(patch, grid)
    scene = Scene(hu, whole_slice(hu, window, size), middle_window(window), grid, title)
    slices = sample or [hu]
    seen = see(backbone, scene.image, device, amp=amp)
    body = body_patches(hu, grid)
    colours, explained = principal_colours(seen.tokens, body)
    cosines = cosine_to(seen.tokens, patch)
    stats = statistics(seen, body) | {
        "pca_explained": explained.tolist(),
        "similarity_patch": list(patch),
        "similarity_mean": float(cosines.mean()),
        "window_hu": list(scene.window),
        **dict(zip(("clipped_below", "clipped_above"), clipped(slices, scene.window), strict=True)),
        "clipped_slices": len(slices),
    }
    pictures.draw_input(scene, out / "input.png")
    pictures.draw_heatmap(scene, seen.norms, out / "heatmap.png")
    pictures.draw_pca(scene, colours, explained, stats["std"], out / "pca.png")
    pictures.draw_similarity(scene, cosines, patch, out / "similarity.png")
    pictures.draw_attention(scene, seen, stats["attention_outside_body"], out / "attention.png")
    pictures.draw_hu(slices, scene.window, out / "hu.png")
    with replacing_text(out / "stats.json") as file:
        file.write(json.dumps(stats, indent=2) + "\n")
    return stats


def statistics(seen: Seen, body: np.ndarray) -> dict[str, Any]:
    """What the encoder's state is in numbers; `body` ``[h, w]`` says which patches hold the body."""
    return dispersion(seen.tokens) | {
        "norm_min": float(seen.norms.min()),
        "norm_mean": float(seen.norms.mean()),
        "norm_max": float(seen.norms.max()),
        "patches": int(body.size),
        "body_patches": int(body.sum()),
        "attention_class_token": seen.on_class,
        "attention_registers": seen.on_registers,
        "attention_outside_body": float(seen.heads.mean(axis=0)[~body].sum()),
    }


def checked_patch(patch: Sequence[int], grid: tuple[int, int]) -> tuple[int, int]:
    """A typed patch as (row, column). Raises ConfigError where the grid ``h x w`` has no such patch."""
    rows, cols = grid
    if len(patch) != 2:
        raise ConfigError(f"patch must be two numbers, 'patch=[row,column]', not {list(patch)}")
    if not (0 <= patch[0] < rows and 0 <= patch[1] < cols):
        raise ConfigError(
            f"patch=[{patch[0]},{patch[1]}] is outside the {rows} x {cols} patches of this model: "
            f"rows go from 0 to {rows - 1}, columns from 0 to {cols - 1}"
        )
    return patch[0], patch[1]
