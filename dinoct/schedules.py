"""Schedules: pure functions of the step (one step is one optimiser update)."""

import math

from dinoct.config import DinoConfig, OptimConfig

ENDLESS_HORIZON = 100_000  # length of the schedules of a run that goes on until it is stopped
BEHIND_HORIZON = (
    "the schedules end at step %d: behind it the learning rate is optim.min_lr and the teacher, whose momentum is "
    "optim.teacher_momentum_end, hardly moves or stands still"
)


def cosine(step: int, *, horizon: int, start: float, end: float, warmup: int = 0) -> float:
    """Linear warm-up from 0 to `start` over `warmup` steps, then a cosine to `end` at `horizon` and constant after.

    Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), with the warm-up of DINO: the last warm-up step has `start`.
    """
    if step < warmup:
        return start * step / (warmup - 1) if warmup > 1 else start
    if step >= horizon:
        return end
    progress = (step - warmup) / (horizon - warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear(step: int, *, length: int, start: float, end: float) -> float:
    """From `start` to `end` over `length` steps, constant after."""
    return end if step >= length else start + (end - start) * step / length


class Schedules:
    """All scheduled values of a run at a step."""

    def __init__(self, optim: OptimConfig, dino: DinoConfig, horizon: int):
        self.optim, self.dino, self.horizon = optim, dino, horizon

    def lr(self, step: int) -> float:
        o = self.optim
        warmup = round(o.warmup * self.horizon)
        return cosine(step, horizon=self.horizon, start=o.lr, end=o.min_lr, warmup=warmup)

    def weight_decay(self, step: int) -> float:
        return cosine(step, horizon=self.horizon, start=self.optim.weight_decay, end=self.optim.weight_decay_end)

    def teacher_momentum(self, step: int) -> float:
        o = self.optim
        return cosine(step, horizon=self.horizon, start=o.teacher_momentum, end=o.teacher_momentum_end)

    def teacher_temperature(self, step: int) -> float:
        d = self.dino
        length = round(d.teacher_warmup * self.horizon)
        return linear(step, length=length, start=d.teacher_temperature_start, end=d.teacher_temperature)

    def last_layer_frozen(self, step: int) -> bool:
        return step < round(self.optim.freeze_last_layer * self.horizon)
