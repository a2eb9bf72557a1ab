"""stable-pretraining's DINO and DINOv2: its method classes under Lightning, with the views of its DINO benchmark."""

import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from recipes import IMAGENET, LOCAL_VIEWS, Clock, Task, Trained, rgb_vit


def transform(size: int, local_size: int) -> Callable:
    """The views of its DINO benchmark, as its own transforms: an image to views by name."""
    from stable_pretraining.data import transforms as T

    def view(size: int, scale: tuple[float, float], blur: float, *extra: Callable) -> Callable:
        jitter = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
        first = (T.RGB(), T.RandomResizedCrop((size, size), scale=scale), jitter, T.RandomGrayscale(p=0.2))
        last = (T.RandomHorizontalFlip(p=0.5), T.ToImage(**IMAGENET))
        return T.Compose(*first, T.PILGaussianBlur(p=blur), *extra, *last)

    views = {
        "global_1": view(size, (0.4, 1.0), 1.0),
        "global_2": view(size, (0.4, 1.0), 0.1, T.RandomSolarize(threshold=0.5, p=0.2)),
    }
    views |= {f"local_{i}": view(local_size, (0.05, 0.4), 0.5) for i in range(LOCAL_VIEWS)}
    multi = T.MultiViewTransform(views)
    return lambda image: {name: found["image"] for name, found in multi({"image": image}).items()}


def settings_of(task: Task, method: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments of the method class, the optimiser and the schedule.

    5e-4 is the rate of its docstring and of its table of results; the linear rule for the batch would make it 6e-5.
    """
    given: dict[str, Any] = {"image_size": task.settings.model.img_size} if method == "DINOv2" else {}
    schedule: dict[str, Any] = {"type": "LinearWarmupCosineAnnealing"}
    if not task.tuned:
        return given, {"type": "AdamW", "lr": 5e-4, "weight_decay": 1e-4}, schedule
    loss, optim = task.settings.loss, task.settings.optim
    given |= {"projector_hidden_dim": loss.hidden_dim, "projector_bottleneck_dim": loss.bottleneck_dim}
    given |= {"temperature_teacher": loss.dino.teacher_temperature, "ema_decay_start": optim.teacher_momentum}
    if method == "DINO":
        given |= {"n_prototypes": loss.out_dim, "temperature_teacher_warmup": loss.dino.teacher_temperature_start}
    else:
        given |= {"n_cls_prototypes": loss.out_dim, "n_patch_prototypes": loss.out_dim}
    schedule |= {"peak_step": round(optim.warmup * task.updates), "total_steps": task.updates, "end_lr": optim.min_lr}
    return given, {"type": "AdamW", "lr": optim.lr, "weight_decay": optim.weight_decay}, schedule


def train(task: Task, *, method: str) -> Trained:
    """Train by its class `DINO` (softmax with a centre) or `DINOv2` (Sinkhorn-Knopp, and iBOT on masked patches)."""
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    from stable_pretraining import methods

    class Run(getattr(methods, method)):
        def forward(self, batch: dict, stage: str) -> dict[str, torch.Tensor]:
            kinds = [[x for name, x in batch.items() if name.startswith(kind)] for kind in ("global", "local")]
            return {"loss": super().forward(global_views=kinds[0], local_views=kinds[1]).loss}

    given, optimizer, schedule = settings_of(task, method)
    module = Run(rgb_vit(task.settings.model), **given)
    module.optim = {"optimizer": optimizer, "scheduler": schedule, "interval": "step"}
    loader = task.loader(transform(task.settings.model.img_size, task.local_size))
    clip = task.settings.optim.clip if task.tuned else None
    clock, losses = fit(module, loader, epochs=task.epochs(loader), updates=task.updates, clip=clip)
    used = {"method": method, "given": given, "optimizer": optimizer, "schedule": schedule, "clip": clip}
    return Trained(module.backbone.teacher, module.backbone.student, used, clock, losses)


def fit(module: Any, loader: DataLoader, *, epochs: int, updates: int, clip: float | None) -> tuple[Clock, list[float]]:
    """Train its module as its users do, by a Lightning trainer with its callback for the teacher."""
    import lightning
    import stable_pretraining as spt

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: dict, *_: Any) -> None:
            losses.append(float(outputs["loss"].detach()))

    losses: list[float] = []
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            max_steps=updates,
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=[spt.callbacks.TeacherStudentCallback(), Losses()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=scratch,
        )
        trainer.gradient_clip_val_ = clip  # where its module looks for it: it steps by hand
        trainer.gradient_clip_algorithm_ = "norm"
        clock = Clock()
        trainer.fit(module, loader)
        clock.stop()
    return clock, losses
