"""The peers' own DINO on dinoct's slices: their classes, their views, their training loop. Used by `peers.py`.

Each recipe comes in two variants. `default` is what the peer's documentation or example sets. `tuned` keeps the peer's
objective and views and takes what helps dinoct's demo: learning rate and its schedule, weight decay, clipping, the
momentum of the EMA teacher, teacher temperature, and the sizes of the head.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset

from dinoct.config import ModelConfig, TrainConfig

LOCAL_VIEWS = 6  # of lightly's and lightly-train's transforms, and of stable-pretraining's DINO benchmark
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # the normalisation that all peers ship


@dataclass
class Task:
    """What a recipe gets. `images` maps a transform of PIL images to a data set of the training slices."""

    settings: TrainConfig  # dinoct's demo
    images: Callable[[Callable], Dataset]
    tuned: bool
    updates: int
    batch_size: int
    local_size: int

    def loader(self, transform: Callable) -> DataLoader:
        return DataLoader(self.images(transform), batch_size=self.batch_size, shuffle=True, drop_last=True)

    def epochs(self, loader: DataLoader) -> int:
        return math.ceil(self.updates / len(loader))


class Clock:
    """Seconds of wall time, and of this process's processor time, which a busy machine changes less."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()
        self.wall = self.cpu = 0.0

    def stop(self) -> None:
        self.wall, self.cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]


@dataclass
class Trained:
    """What a recipe gives back: both sides as timm models, the settings that were used, what training took."""

    teacher: VisionTransformer
    student: VisionTransformer | None  # where the peer gives it back
    used: dict[str, Any]
    clock: Clock
    losses: list[float] = field(default_factory=list)
    patch_mean: bool = False  # its objective was on the mean of the patch tokens, not on the class token


def rgb_vit(model: ModelConfig) -> VisionTransformer:
    """dinoct's shape as timm's plain ViT: three channels, class token as output."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=model.img_size,
        patch_size=model.patch,
        num_classes=0,
        embed_dim=model.dim,
        depth=model.depth,
        num_heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        reg_tokens=model.registers,
        dynamic_img_size=True,
    )


def endless(loader: DataLoader, updates: int) -> Iterator[tuple[int, Any]]:
    """(epoch, batch) for so many updates."""
    epoch = done = 0
    while True:
        for batch in loader:
            if done == updates:
                return
            yield epoch, batch
            done += 1
        epoch += 1
