"""``dinoct-train preflight=true``: what a run would take, from a few steps whose result is thrown away."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dinoct.checkup.machine import Space, card_memory, disk, ram, size_text
from dinoct.checkup.pace import duration, loader_rate, measure, predict
from dinoct.config import CkptConfig, TrainConfig
from dinoct.console import log
from dinoct.engine import Engine, NonFiniteError
from dinoct.errors import DinoctError
from dinoct.hardware import Hardware
from dinoct.memory import KEEP_FREE, advice, estimate, remedies
from dinoct.models.backbone import parameter_count
from dinoct.models.ssl import Network
from dinoct.saving import HEADROOM, has_room, state_bytes
from dinoct.validate import RECOMPUTE
from dinoct.viz import draw_views, first_views, views_title

PICTURE = Path("outputs/preflight/views.png")
PER_STEPS = 100_000  # time is given for so many where a run has no end
MAX_WAIT = 0.1  # share of the time spent waiting for data, above which something should be done


def student_parameters(cfg: TrainConfig) -> int:
    """Weights of the student's backbone and heads; nothing is allocated."""
    with torch.device("meta"):
        return parameter_count(Network(cfg.model, cfg.loss, drop_path=0.0, grad_checkpoint=False))


def free_memory(hardware: Hardware) -> Space | None:
    """Of the card, or of the machine where there is none; ``None`` where the system does not tell."""
    return ram() if hardware.platform == "cpu" else card_memory()


def check_memory(cfg: TrainConfig, hardware: Hardware) -> None:
    """Refuse what plainly does not fit. On a card the activations are left to the steps themselves, which end cleanly.

    Raises:
        DinoctError: naming the settings to change.
    """
    parameters, room = student_parameters(cfg), free_memory(hardware)
    needed = estimate(cfg, hardware, parameters=parameters)
    plain = needed.total if hardware.platform == "cpu" else needed.state
    if room is not None and plain > room.free:
        raise DinoctError(
            f"preflight: a step needs about {size_text(needed.total)} by estimate, and the memory has {room}. "
            f"Try {remedies(cfg, hardware, parameters=parameters)}"
        )


def out_of_memory(cfg: TrainConfig, hardware: Hardware) -> str:
    """What to say when the steps ran out of memory."""
    return advice(cfg, hardware, parameters=student_parameters(cfg))


def preflight(engine: Engine) -> None:
    """Take a few steps and report memory, time, waiting for data and disk; draw the views of one batch.

    Args:
        engine: of the run, in a folder that need not exist. Behind this its weights are good for nothing.
    Raises:
        DinoctError: if the disk plainly does not suffice, or a step is not finite.
    """
    cfg, hardware = engine.cfg, engine.hardware
    steps = None if cfg.train.max_steps is None else max(cfg.train.max_steps - engine.step, 0)
    if steps == 0:
        log.warning("the checkpoint is at step %d, train.max_steps=%d is reached", engine.step, cfg.train.max_steps)
    folder, engine.saver = engine.saver.folder, _NoSaver()
    draw_views(first_views(engine.train_data), PICTURE, views_title(cfg.aug))
    log.info("views of the first slices: %s", PICTURE)
    needed = estimate(cfg, hardware, parameters=parameter_count(engine.model.student))
    log.info(
        "memory: about %s by estimate (weights, gradients and moments %s, activations %s); %s",
        *map(size_text, (needed.total, needed.state, needed.activations)), free_memory(hardware) or "free: unknown",
    )  # fmt: skip
    log.info("taking a few steps, which are thrown away")
    engine.model.train()
    engine.model.teacher.eval()
    try:
        _report_time(engine, hardware, steps)
    except NonFiniteError as error:
        raise DinoctError(f"preflight: {str(error).split(';')[0]}") from error
    if hardware.device.type == "cuda":
        log.info("memory measured: %s at most; %s", size_text(torch.cuda.max_memory_reserved()), card_memory())
    if options := faster(cfg, hardware, parameters=parameter_count(engine.model.student)):
        log.info("steps would be shorter with %s", "; or ".join(options))
    size, room = state_bytes(engine.state_dict()), ram()
    log.info(check_disk(cfg.ckpt, size, disk(folder), steps, judged=cfg.eval.every is not None))
    if not has_room(size, room):
        log.warning(
            "the memory has no room for a copy of the state, %s: training waits while a checkpoint is written (%s)",
            size_text(size), room,
        )  # fmt: skip
    log.info("preflight passed: nothing was trained, and nothing but the picture is written")


class _NoSaver:
    """In the place of the engine's: a step that is not finite leaves no emergency checkpoint here."""

    def emergency(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        return None


def _report_time(engine: Engine, hardware: Hardware, steps: int | None) -> None:
    slices = hardware.batch_size * hardware.accumulation_steps
    rate = loader_rate(engine)
    pace = measure(engine)
    step, share = predict(
        compute=pace.compute * slices,
        data=pace.waited * slices if rate is None else slices / rate,
        ahead=rate is not None,
    )
    length = f"{PER_STEPS:,}" if steps is None else f"{steps:,}"
    log.info(
        "time: %s per step (%s): %s for %s steps%s, without evaluations, pictures and checkpoints",
        duration(step), pace.how, duration(step * (PER_STEPS if steps is None else steps)), length,
        " (train.max_steps is null)" if steps is None else "",
    )  # fmt: skip
    loader = "" if rate is None else f"; the loader alone gives {rate:.3g} slices/s"
    log.info("waiting for data: %.0f %% of the time%s; the model takes %.3g", 100 * share, loader, 1 / pace.compute)
    if share > MAX_WAIT:
        log.warning("the data are the bottleneck: raise hardware.num_workers, or put data.root on a faster disk")


def faster(cfg: TrainConfig, hardware: Hardware, *, parameters: int) -> list[str]:
    """Settings that make steps shorter and that this machine has room for, asked behind steps: the state lies there."""
    options, room, now = [], free_memory(hardware), cfg.train.grad_checkpoint
    for kind in RECOMPUTE[: RECOMPUTE.index(now)]:
        less = replace(cfg, train=replace(cfg.train, grad_checkpoint=kind))
        needed = estimate(less, hardware, parameters=parameters)
        if room is not None and needed.activations <= room.free - KEEP_FREE * room.total:
            options.append(f"train.grad_checkpoint={str(kind).lower()} ({size_text(needed.total)} by estimate)")
            break
    if hardware.platform != "cpu" and cfg.parallel.name != "fsdp" and not cfg.train.compile:
        options.append("train.compile=true (dinoct-doctor tries whether it works here)")
    return options


def check_disk(ckpt: CkptConfig, size: int, room: Space, steps: int | None, *, judged: bool) -> str:
    """What the checkpoints of a run take, as a line.

    Args:
        ckpt: how often, and how many are kept.
        size: bytes of one.
        room: of the disk.
        steps: to go; ``None``: without end.
        judged: whether the run is evaluated on its way: it keeps its best checkpoint then.
    Raises:
        DinoctError: if those that are kept, and the next one, do not fit.
    """
    written = math.inf if steps is None else math.ceil(steps / ckpt.every)
    kept = max(2, min(ckpt.keep_last + 1, written)) + judged  # the new one is written before an old one goes
    line = f"checkpoints: {size_text(size)} each, up to {kept} at once take {size_text(kept * size)}"
    if ckpt.keep_every:
        count = PER_STEPS // ckpt.keep_every if steps is None else steps // ckpt.keep_every
        per = f" per {PER_STEPS:,} steps" if steps is None else ""
        line += f", ckpt.keep_every={ckpt.keep_every} keeps {count} more{per}, {size_text(count * size)}"
    line += f"; the disk has {room}"
    if HEADROOM * kept * size > room.free:
        raise DinoctError(f"preflight: {line}: free some space, lower ckpt.keep_last, or take run_dir on another disk")
    return line
