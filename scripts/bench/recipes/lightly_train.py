"""lightly-train's DINO: its command, which reads images from files and fits itself to the size of the data set."""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from recipes import Clock, Task, Trained, rgb_vit


def arguments(task: Task) -> dict[str, Any]:
    """What the command is given. By default it takes SGD, 1024 prototypes and a teacher temperature of 0.02 here."""
    size, local = task.settings.model.img_size, task.local_size
    views = {"image_size": (size, size), "local_view": {"view_size": (local, local)}}
    if not task.tuned:
        return {"method": "dino", "transform_args": views}
    loss, optim = task.settings.loss, task.settings.optim
    scale = math.sqrt(task.batch_size / 256)  # its rule, undone: an update's rate is dinoct's
    return {
        "method": "dino",
        "transform_args": views,
        "optim": "adamw",
        "optim_args": {"lr": optim.lr / scale, "weight_decay": optim.weight_decay},
        "method_args": {
            "hidden_dim": loss.hidden_dim,
            "bottleneck_dim": loss.bottleneck_dim,
            "output_dim": loss.out_dim,
            "student_freeze_last_layer_steps": round(optim.freeze_last_layer * task.updates),
            "warmup_teacher_temp": loss.dino.teacher_temperature_start,
            "teacher_temp": loss.dino.teacher_temperature,
            "momentum_start": optim.teacher_momentum,
        },
    }


def train(task: Task) -> Trained:
    """Its teacher is the model it was given; the feature it trains is the mean of a timm ViT's patch tokens."""
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # no usage statistics
    import lightly_train

    images = task.images(lambda image: image)
    vit, used = rgb_vit(task.settings.model), arguments(task)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        for i in range(len(images)):
            images[i].save(folder / f"{i:06d}.png")
        clock = Clock()
        lightly_train.pretrain(
            out=Path(scratch) / "out",
            data=folder,
            model=vit,
            batch_size=task.batch_size,
            epochs=math.ceil(task.updates / (len(images) // task.batch_size)),
            num_workers=0,
            accelerator="cpu",
            devices=1,
            seed=torch.initial_seed() % 2**32,
            loggers={"tensorboard": None},
            trainer_args={"max_steps": task.updates},
            **used,
        )
        clock.stop()
    return Trained(vit, None, used, clock, patch_mean=True)
