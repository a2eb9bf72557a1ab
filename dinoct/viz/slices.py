"""What the pictures need to know of a slice: its window, its body, and how both fall on the grid of patches."""

from collections.abc import Sequence

import cv2
import numpy as np

from dinoct.config import WindowConfig
from dinoct.data.dataset import read_slice
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore
from dinoct.data.views import BODY_HU, View, middle_window, render_view

LUNG_HU = (-970, -500)  # below is air outside the lung, which the body's hull may hold
COUCH_SHARE = 0.01  # openings of this share of the slice's side part the couch from the back
LEAST_PIECE = 0.05  # of the largest piece's area: an arm counts, what is left of the couch does not
IN_BODY = 0.25  # a patch with this share of body belongs to it: with 4 x 4 patches few are filled


def whole_slice(hu: np.ndarray, window: WindowConfig, size: int) -> np.ndarray:
    """The slice as the model gets it in evaluation: whole, in the middle window, ``[size, size]`` in [0, 1]."""
    low, high = middle_window(window)
    return render_view(hu, View(0, 0, *hu.shape, False, low, high), size)


def clipped(slices: Sequence[np.ndarray], window: tuple[float, float]) -> tuple[float, float]:
    """Shares of the pixels that a window (low, high) HU makes black and white: those below `low` and above `high`."""
    pixels = sum(hu.size for hu in slices)
    below = sum(int((hu < window[0]).sum()) for hu in slices)
    above = sum(int((hu > window[1]).sum()) for hu in slices)
    return below / pixels, above / pixels


def body_mask(hu: np.ndarray) -> np.ndarray:
    """The body with its lungs, and arms, without the couch: the convex hulls of the large pieces above -500 HU.

    Hulls, since a lung that the edge of the picture cuts is no hole that could be filled.

    Args:
        hu: ``[H, W]``.
    Returns:
        ``[H, W]`` booleans, all False where nothing is above -500 HU.
    """
    side = 2 * round(COUCH_SHARE * min(hu.shape) / 2) + 1
    solid = cv2.morphologyEx((hu > BODY_HU).astype(np.uint8), cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    pieces, _ = cv2.findContours(solid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    mask = np.zeros(hu.shape, np.uint8)
    areas = [cv2.contourArea(piece) for piece in pieces]
    for piece, area in zip(pieces, areas, strict=True):
        if area >= LEAST_PIECE * max(areas):
            cv2.drawContours(mask, [cv2.convexHull(piece)], -1, 1, thickness=cv2.FILLED)
    return mask.astype(bool)


def body_patches(hu: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which of ``h x w`` patches hold the body: booleans ``[h, w]``."""
    share = cv2.resize(body_mask(hu).astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)
    return share >= IN_BODY


def default_patch(hu: np.ndarray, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the patch that lies deepest in a lung; without a lung, in the body; else the middle one.

    A lung is easy to judge by eye: its like should be the rest of both lungs. Depth is the distance to anything else,
    averaged over the patch; a patch that is less than half lung does not count as one.
    """
    body = body_mask(hu)
    lung = cv2.medianBlur((body & (hu > LUNG_HU[0]) & (hu < LUNG_HU[1])).astype(np.uint8), 5)  # over the vessels
    for tissue in (lung, body.astype(np.uint8)):
        depth = cv2.distanceTransform(np.pad(tissue, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]  # the picture's edge ends it
        depth = cv2.resize(depth, grid[::-1], interpolation=cv2.INTER_AREA)
        row, col = (int(i) for i in np.unravel_index(int(depth.argmax()), grid))
        if cv2.resize(tissue.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)[row, col] >= 0.5:
            return row, col
    return grid[0] // 2, grid[1] // 2


def sample_slices(index: SliceIndex, store: SliceStore, count: int = 16) -> list[np.ndarray]:
    """Slices ``[N, N]`` in HU at equal distances over an index: over its series, and over each from end to end."""
    rows = np.unique(np.linspace(0, len(index) - 1, count).round().astype(int))
    return [read_slice(index, store, int(i)) for i in rows]
