"""dinoct: a folder of CT scans in, a self-supervised vision encoder out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dinoct.delivery.encoder import Encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of an exported ``.safetensors`` file or of a training checkpoint.

    ``encoder(hu)`` takes slices in Hounsfield units, ``[B, 1, H, W]``, ``[B, H, W]`` or ``[H, W]`` of any size, and
    gives ``.cls`` ``[B, D]`` and ``.patches`` ``[B, P, D]``. See `dinoct.delivery.encoder`.

    Args:
        path: the file.
    Returns:
        A ``torch.nn.Module`` in evaluation mode on the CPU.
    Raises:
        dinoct.errors.CheckpointError: if the file is missing, damaged, or holds no encoder of dinoct's.
    """
    from dinoct.delivery.encoder import load_encoder as load  # here, so that `import dinoct` does not import torch

    return load(path)
