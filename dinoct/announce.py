"""What a training command says before it starts: what is about to run, and what `auto` chose."""

import math
from collections.abc import Sequence

import numpy as np

from dinoct.console import log
from dinoct.data.index import SliceIndex
from dinoct.data.splits import few_held_out
from dinoct.hardware import Hardware
from dinoct.plan import RunPlan
from dinoct.schedules import BEHIND_HORIZON
from dinoct.validate import EIGHT_BIT, teach


def announce(
    plan: RunPlan, hardware: Hardware, *, parameters: int, data: Sequence[SliceIndex], horizon: int, notes: list[str]
) -> None:
    """Log the run's machine, model, data, length, warnings and, where it goes on from a checkpoint, what changed.

    Args:
        plan: of the run.
        hardware: as it was filled.
        parameters: weights of the backbone.
        data: slices to train on, and held out.
        horizon: length of the schedules in steps.
        notes: what starting from other weights changed.
    """
    cfg = plan.cfg
    for line in hardware.lines():
        log.info("  %s", line)
    log.info(
        "model %s: %.1f M parameters, patch %d, %d px",
        cfg.model.name, parameters / 1e6, cfg.model.patch, cfg.model.img_size,
    )  # fmt: skip
    (train, patients), (held, held_patients) = ((len(index), len(np.unique(index.patient))) for index in data)
    log.info(
        "data: %d slices of %d patients to train on, %d of %d held out; views: %s",
        train, patients, held, held_patients, cfg.aug.name,
    )  # fmt: skip
    if few := few_held_out(held_patients):
        log.warning(few)
    log.info(
        "steps: %s; effective batch %d; schedules over %d steps; ln K %.4f",
        cfg.train.max_steps or "no limit, Ctrl+C saves and stops",
        hardware.effective_batch,
        horizon,
        math.log(cfg.loss.out_dim),
    )
    if cfg.train.max_steps is None:
        log.info(BEHIND_HORIZON, horizon)
    if cfg.train.compile or cfg.optim.moments == EIGHT_BIT:
        log.info("the first step compiles: most of a minute on a machine that has not compiled it before")
    for line in [*plan.warnings, *teach(cfg, batch_size=hardware.batch_size * hardware.processes)]:
        log.warning(line)
    for line in notes:
        log.info(line)
    if plan.checkpoint is not None:
        _announce_resume(plan, hardware)


def _announce_resume(plan: RunPlan, hardware: Hardware) -> None:
    before = plan.checkpoint.meta["hardware"]
    log.info("resuming at step %d from %s", plan.checkpoint.step, plan.checkpoint.path)
    for line in plan.changes:
        log.info("  changed: %s", line)
    limit = plan.cfg.train.max_steps
    if limit is not None and plan.checkpoint.step >= limit:
        log.warning("train.max_steps=%d is reached, nothing is left to train: give a larger one", limit)
    if (before["platform"], before["card"]) != (hardware.platform, hardware.card):
        log.warning(
            "platform changed: %s (%s) -> %s (%s); this hardware's settings apply",
            before["platform"], before["card"], hardware.platform, hardware.card,
        )  # fmt: skip
