"""Slice to views: crops, flips, windows, masks. The only place where HU becomes [0, 1].

A view is drawn in two steps, both pure: `sample_view` turns a random generator into numbers (`View`), `render_view`
turns a slice and these numbers into pixels. So the geometry of every view is known, and the same seed gives the same
view whoever renders it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np

from dinoct.config import AugConfig, IbotConfig, ModelConfig, ProbeConfig, WindowConfig
from dinoct.validate import local_crop_size

AIR_HU = -1024
BODY_HU = -500  # above it is body, not lung or air around
CROP_TRIES = 10
AREA_FROM = 2.5  # shrink factor from which bilinear sampling would skip pixels

cv2.setNumThreads(0)  # its thread pool does not survive a fork, and workers are the parallelism


@dataclass(frozen=True)
class View:
    """The numbers of one view. The box is in pixels of the slice, the window in HU."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    low: float
    high: float
    blur: float = 0.0  # sigma in output pixels, 0: none
    noise: float = 0.0  # standard deviation in window units, 0: none
    noise_seed: int = 0


@dataclass(frozen=True)
class ViewSpec:
    """What views are drawn from."""

    size: int  # output pixels
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    window: WindowConfig
    blur: float = 0.0
    noise: float = 0.0
    min_body: float = 0.0
    side_mm: tuple[float, float] | None = None  # takes the place of `scale`


def sample_view(rng: np.random.Generator, spec: ViewSpec, hu: np.ndarray, mm_per_pixel: float = 1.0) -> View:
    """Draw a view of the slice ``[H, W]``. A crop with too little body is drawn again, 10 times at most.

    The field of view is a fingerprint of the scanner's protocol: with `side_mm` a crop has the same size in the body,
    whatever the pixel spacing, as far as the slice reaches.
    """
    scale = spec.scale
    if spec.side_mm is not None:
        scale = tuple(min(1.0, (side / mm_per_pixel) ** 2 / hu.size) for side in spec.side_mm)
    body = hu[::8, ::8] > BODY_HU if spec.min_body else None
    best, best_body = None, -1.0
    for _ in range(CROP_TRIES if spec.min_body else 1):
        box = sample_box(rng, hu.shape, scale, spec.ratio)
        share = _body_share(body, box) if body is not None else 1.0
        if share > best_body:
            best, best_body = box, share
        if share >= spec.min_body:
            break
    flip = bool(rng.random() < spec.flip)
    center, width = rng.uniform(*spec.window.center), rng.uniform(*spec.window.width)
    blur = float(rng.uniform(0.1, 2.0)) if rng.random() < spec.blur else 0.0
    noise = float(rng.uniform(0.005, 0.03)) if rng.random() < spec.noise else 0.0
    return View(*best, flip, center - width / 2, center + width / 2, blur, noise, int(rng.integers(2**31)))


def sample_box(
    rng: np.random.Generator, shape: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) of a share `scale` of the area and of width / height in `ratio`.

    As in Inception's random resized crop (Szegedy et al. 2015): a box that does not fit is drawn again, and after ten
    tries the largest centred box of the nearest ratio is taken.
    """
    rows, cols = shape
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    for _ in range(CROP_TRIES):
        area = rows * cols * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(log_low, log_high))
        height, width = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < height <= rows and 0 < width <= cols:
            top, left = int(rng.integers(rows - height + 1)), int(rng.integers(cols - width + 1))
            return top, left, height, width
    aspect = min(max(cols / rows, ratio[0]), ratio[1])
    height, width = min(rows, round(cols / aspect)), min(cols, round(rows * aspect))
    return (rows - height) // 2, (cols - width) // 2, height, width


def _body_share(body: np.ndarray, box: tuple[int, int, int, int]) -> float:
    top, left, height, width = (value // 8 for value in box)
    return float(body[top : top + max(height, 1), left : left + max(width, 1)].mean())


def render_view(hu: np.ndarray, view: View, size: int) -> np.ndarray:
    """Pixels of a view: crop, resize, flip in HU, then the window.

    Args:
        hu: slice ``[H, W]`` in HU.
        view: its numbers.
        size: output pixels per side.
    Returns:
        ``[size, size]`` float32 in [0, 1].
    """
    crop = hu[view.top : view.top + view.height, view.left : view.left + view.width].astype(np.float32)
    shrink = min(crop.shape) / size
    out = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if shrink > AREA_FROM else cv2.INTER_LINEAR)
    if view.flip:
        out = out[:, ::-1]
    out = window(out, view.low, view.high)
    if view.blur:
        out = cv2.GaussianBlur(out, (0, 0), view.blur)
    if view.noise:
        out = out + np.random.default_rng(view.noise_seed).normal(0.0, view.noise, out.shape).astype(np.float32)
        np.clip(out, 0.0, 1.0, out=out)
    return np.ascontiguousarray(out)


def window(hu: np.ndarray, low: float, high: float) -> np.ndarray:
    """HU to [0, 1]: `low` and below is 0, `high` and above is 1; float32."""
    return np.clip((hu.astype(np.float32) - low) / (high - low), 0.0, 1.0)


def letterbox(hu: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """A slice as a square with square pixels, padded with air, never stretched.

    Args:
        hu: ``[H, W]``.
        spacing: millimetres per row and per column.
    Returns:
        ``[N, N]`` of the same type; the slice itself where it is square already.
    """
    row_mm, col_mm = spacing
    if row_mm > 0 and col_mm > 0 and abs(row_mm - col_mm) > 1e-3 * max(row_mm, col_mm):
        fine = min(row_mm, col_mm)
        shape = (round(hu.shape[1] * col_mm / fine), round(hu.shape[0] * row_mm / fine))
        hu = cv2.resize(hu.astype(np.float32), shape, interpolation=cv2.INTER_LINEAR).astype(hu.dtype)
    rows, cols = hu.shape
    if rows == cols:
        return hu
    side = max(rows, cols)
    out = np.full((side, side), AIR_HU, dtype=hu.dtype)
    top, left = (side - rows) // 2, (side - cols) // 2
    out[top : top + rows, left : left + cols] = hu
    return out


def block_mask(rng: np.random.Generator, grid: int, share: float) -> np.ndarray:
    """Mask about `share` of a ``grid x grid`` of patches in rectangular blocks (Bao et al. 2022, arXiv:2106.08254)."""
    mask = np.zeros((grid, grid), dtype=bool)
    target = round(share * grid * grid)
    for _ in range(CROP_TRIES * 5):
        left = target - int(mask.sum())
        if left <= 0:
            break
        area = rng.uniform(min(4, left), left)
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        height = min(grid, max(1, int(np.sqrt(area / aspect))))
        width = min(grid, max(1, int(np.sqrt(area * aspect))))
        top, start = int(rng.integers(grid - height + 1)), int(rng.integers(grid - width + 1))
        mask[top : top + height, start : start + width] = True
    return mask


class ViewMaker:
    """All crops and masks of a training sample."""

    def __init__(self, aug: AugConfig, model: ModelConfig, ibot: IbotConfig, *, gram_px: int | None = None):
        spec = partial(
            ViewSpec,
            ratio=tuple(aug.ratio),
            flip=aug.flip,
            window=aug.window,
            blur=aug.blur,
            noise=aug.noise,
            min_body=aug.min_body,
        )
        self.global_spec = spec(size=model.img_size, scale=tuple(aug.global_scale), side_mm=_pair(aug.global_mm))
        self.local_spec = spec(
            size=aug.local_size or local_crop_size(model.patch),
            scale=tuple(aug.local_scale),
            side_mm=_pair(aug.local_mm),
        )
        self.global_crops, self.local_crops = aug.global_crops, aug.local_crops
        self.grid = model.img_size // model.patch
        self.ibot = ibot
        self.gram_px = gram_px if gram_px != model.img_size else None

    def __call__(self, hu: np.ndarray, rng: np.random.Generator, mm_per_pixel: float = 1.0) -> dict[str, np.ndarray]:
        """Views of a slice ``[H, W]`` in HU with square pixels of `mm_per_pixel`.

        Returns:
            ``global`` ``[Vg, S, S]`` and ``local`` ``[Vl, s, s]`` float32 in [0, 1], ``masks`` ``[Vg, P]`` booleans,
            ``gram`` ``[Vg, G, G]``: the global crops at the Gram teacher's size without blur and noise, or empty.
        """
        glob = [sample_view(rng, self.global_spec, hu, mm_per_pixel) for _ in range(self.global_crops)]
        local = [sample_view(rng, self.local_spec, hu, mm_per_pixel) for _ in range(self.local_crops)]
        clean = [replace(view, blur=0.0, noise=0.0) for view in glob] if self.gram_px else []
        return {
            "global": _render_all(hu, glob, self.global_spec.size),
            "local": _render_all(hu, local, self.local_spec.size),
            "masks": self._masks(rng),
            "gram": _render_all(hu, clean, self.gram_px or 0),
        }

    def _masks(self, rng: np.random.Generator) -> np.ndarray:
        masks = np.zeros((self.global_crops, self.grid * self.grid), dtype=bool)
        if self.ibot.weight:
            for i in range(self.global_crops):
                if rng.random() < self.ibot.mask_probability:
                    masks[i] = block_mask(rng, self.grid, rng.uniform(*self.ibot.mask_ratio)).ravel()
        return masks


def _render_all(hu: np.ndarray, views: Sequence[View], size: int) -> np.ndarray:
    """``[V, size, size]``."""
    out = np.empty((len(views), size, size), dtype=np.float32)
    for i, view in enumerate(views):
        out[i] = render_view(hu, view, size)
    return out


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def probe_spec(probe: ProbeConfig, size: int) -> ViewSpec:
    """The fixed views that encoders are judged by: independent of any run's augmentation."""
    return ViewSpec(size=size, scale=tuple(probe.scale), ratio=(0.75, 1.3333), flip=probe.flip, window=probe.window)


def middle_window(window: WindowConfig) -> tuple[float, float]:
    """The middle of a range of windows, as (low, high) HU."""
    center, width = sum(window.center) / 2, sum(window.width) / 2
    return center - width / 2, center + width / 2
