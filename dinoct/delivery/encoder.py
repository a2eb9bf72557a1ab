"""The trained encoder for use elsewhere: HU in, features out. `dinoct.load_encoder` is the way in.

Window, size and normalisation come with the weights, so that nobody has to get them right again.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dinoct import checkpoint as checkpoints
from dinoct.config import ModelConfig
from dinoct.data.pixels import HU_MAX, HU_MIN
from dinoct.data.views import AREA_FROM
from dinoct.delivery.card import ModelCard, fingerprint
from dinoct.errors import CheckpointError, DinoctError
from dinoct.models.backbone import Backbone
from dinoct.models.load import fill, load_backbone

HOLDS_ENCODER = "an encoder"  # what the card in a file says, for files that `load_encoder` reads
LEAST_SIDE = 8  # pixels; a slice with fewer is an axis in the wrong place
NORMALISED = 10.0  # no slice of CT lies within -10 to 10 HU, whatever was normalised does


class HounsfieldError(DinoctError, ValueError):
    """What was given to an encoder is not a slice in HU."""


class Features(NamedTuple):
    """What an encoder makes of B slices, after its final LayerNorm, not L2-normalised."""

    cls: Tensor  # [B, D] class token
    patches: Tensor  # [B, P, D] patch tokens, row by row: P = (img_size / patch) ** 2


class Encoder(nn.Module):
    """A backbone with its preprocessing.

    Attributes: `card` (see `dinoct.delivery.card`), `window` (low and high HU), `img_size`, `patch`, `dim`, `grid`
    (patches per side), `backbone`.
    """

    def __init__(self, backbone: Backbone, card: ModelCard):
        super().__init__()
        self.backbone, self.card = backbone, card
        self.window = card.window_hu
        self.img_size: int = card.model["img_size"]
        self.patch, self.dim = backbone.patch, backbone.dim
        self.grid = self.img_size // self.patch

    def forward(self, hu: Tensor | np.ndarray) -> Features:
        """Encode slices.

        Args:
            hu: ``[B, 1, H, W]``, ``[B, H, W]`` or ``[H, W]`` in Hounsfield units, of any size and number type, in any
                byte order and layout, on any device, with square pixels. A slice that is not square is padded with air,
                not stretched.
        Raises:
            HounsfieldError: for another shape, and for values that are windowed or normalised already.
        """
        return self.encode(as_slices(as_tensor(hu)))

    def encode(self, hu: Tensor) -> Features:
        """`forward` of ``[B, 1, H, W]`` without its checks, for what is known to be HU."""
        return Features(*self.backbone(self.image(hu)))

    def image(self, hu: Tensor) -> Tensor:
        """What the backbone sees of HU ``[B, 1, H, W]``: ``[B, 1, S, S]`` in [0, 1], on the encoder's device."""
        weight = self.backbone.mask_token
        hu = hu.to(weight.device, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):  # bf16 holds HU in steps of 8
            return to_image(hu, size=self.img_size, window=self.window).to(weight.dtype)


def as_tensor(hu: Any) -> Tensor:
    """A tensor of whatever holds numbers; what torch cannot count with becomes the next type that it can."""
    if not isinstance(hu, Tensor):
        hu = np.asarray(hu)
        if hu.dtype.kind not in "biuf":
            raise HounsfieldError(f"the slices hold no numbers but {hu.dtype}")
        known = hu.dtype.newbyteorder("=") if hu.dtype.itemsize <= 8 else np.dtype(np.float64)  # longdouble
        hu = torch.from_numpy(np.require(hu, known, ["C", "W"]))  # no negative strides, no foreign byte order
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.float64}
    return hu.to(wider.get(hu.dtype, hu.dtype))


def as_slices(hu: Tensor) -> Tensor:
    """Check HU and give them the shape ``[B, 1, H, W]``.

    Raises:
        HounsfieldError: saying what is wrong with them.
    """
    shape = list(hu.shape)
    if hu.ndim == 2:
        hu = hu[None]
    if hu.ndim == 3:
        hu = hu[:, None]
    if hu.ndim != 4 or hu.shape[1] != 1 or not len(hu) or min(hu.shape[-2:]) < LEAST_SIDE:
        raise HounsfieldError(f"expected slices as [B, 1, H, W], [B, H, W] or [H, W], got the shape {shape}")
    low, high = (float(value) for value in torch.aminmax(hu))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise HounsfieldError("the slices hold values that are not finite")
    if max(abs(low), abs(high)) <= NORMALISED:
        raise HounsfieldError(
            f"values from {low:g} to {high:g} look windowed or normalised: Hounsfield units are expected (air is "
            "-1000), the encoder windows by itself"
        )
    if low >= 0:
        warnings.warn(
            f"no value below 0 HU (from {low:g} to {high:g}): a slice of CT has air in it. Stored values need "
            "RescaleSlope and RescaleIntercept first",
            stacklevel=5,  # the line that called the encoder, above nn.Module's two
        )
    return hu


def to_image(hu: Tensor, *, size: int, window: tuple[float, float]) -> Tensor:
    """HU ``[B, 1, H, W]`` to ``[B, 1, size, size]`` in [0, 1], as dinoct's evaluation sees a whole slice.

    The twin in torch of `views.letterbox` and `views.render_view`, so that it runs on any device and in an ONNX graph;
    a test holds the two together.
    """
    height, width = hu.shape[-2:]
    side = torch.sym_max(height, width)
    rows = resize_matrix(size, side, (side - height) // 2, height, hu.device)  # [size, H]
    cols = resize_matrix(size, side, (side - width) // 2, width, hu.device)  # [size, W]
    above_air = hu.clamp(HU_MIN, HU_MAX) - HU_MIN  # the padding is air: as 0 it needs no place in the product
    resized = rows @ above_air @ cols.T + HU_MIN
    low, high = window
    return ((resized - low) / (high - low)).clamp(0.0, 1.0)


def resize_matrix(size: int, side: int, start: int, count: int, device: torch.device) -> Tensor:
    """Weights ``[size, count]`` by which an axis of `side` pixels becomes one of `size`.

    Of the axis only the pixels from `start` on, `count` of them, have a column: the others are padding. As OpenCV does
    it: bilinear between pixel centres, or the mean over each target pixel's area where it shrinks by more than
    `AREA_FROM`. Both are computed and one is chosen, and all numbers are whole until the division: so a graph of it
    takes any size, and float32 loses nothing.
    """
    target = torch.arange(size, device=device)[:, None]  # [size, 1]
    source = start + torch.arange(count, device=device)[None]  # [1, count]
    length = torch.full((), side, dtype=torch.int64, device=device)
    centre = ((2 * target + 1) * length - size).clamp(min=0).minimum(2 * size * (length - 1))  # times 2 * size
    linear = (1 - (centre - 2 * size * source).abs() / (2 * size)).clamp(min=0)
    overlap = torch.minimum((target + 1) * length, (source + 1) * size) - torch.maximum(target * length, source * size)
    return torch.where(length > AREA_FROM * size, overlap.clamp(min=0) / length, linear)


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of an exported ``.safetensors`` file or of a training checkpoint (its EMA teacher's backbone).

    Args:
        path: the file.
    Returns:
        The encoder in evaluation mode on the CPU, without gradients (``requires_grad_(True)`` to train it on).
    Raises:
        CheckpointError: if it is missing, damaged, or holds no encoder of dinoct's.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        return _load_exported(path)
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is an ONNX graph: onnxruntime reads it, its card {path.name}.md says how")
    checkpoint = checkpoints.load(path, lazily=True)
    backbone = load_backbone(checkpoint)
    return Encoder(backbone, ModelCard.of(checkpoint, backbone.state_dict())).eval()


def _load_exported(path: Path) -> Encoder:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no encoder at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is cut or damaged ({error})") from error
    card = ModelCard.from_metadata(metadata, path, holds=HOLDS_ENCODER)
    if fingerprint(weights) != card.weights_sha256:
        raise CheckpointError(f"{path} is damaged: its weights are not those that were exported")
    backbone = Backbone(ModelConfig(**card.model))
    fill(backbone, weights, source=path)
    return Encoder(backbone.eval().requires_grad_(False), card).eval()
