"""``train.batch_size=auto``: the largest batch per forward that fits the card, found by trial."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dinoct.checkup.machine import card_memory
from dinoct.config import TrainConfig
from dinoct.data.batch import CropBatch, collate
from dinoct.data.views import ViewMaker
from dinoct.errors import DinoctError
from dinoct.faults import is_out_of_memory
from dinoct.hardware import EFFECTIVE_BATCH, Hardware
from dinoct.memory import KEEP_FREE, remedies
from dinoct.models.backbone import parameter_count
from dinoct.models.ssl import SelfDistillation
from dinoct.plan import RunPlan
from dinoct.rng import restore_rng, rng_state
from dinoct.validate import AUTO, EIGHT_BIT

STEP = 8  # batches are multiples of it
TOLERANCE = 1 / 16  # of the effective batch, for the sake of fewer micro-batches


def fit_batch(plan: RunPlan, hardware: Hardware, model: SelfDistillation, *, slices: int) -> Hardware:
    """The same hardware with the batch size that ``train.batch_size=auto`` means on it.

    A run that is resumed on the card that it was on keeps the batch that was found there, so that it goes on with the
    same micro-batches; typing ``train.batch_size=auto`` again tries anew. Whatever the batch, the effective batch and
    the order of the samples stay.

    Args:
        plan: of the run.
        hardware: with the preset's batch size.
        model: on the device; it is as before behind the trials.
        slices: that there are to train on.
    Raises:
        DinoctError: if not one slice fits.
    """
    cfg = plan.cfg
    if cfg.train.batch_size != AUTO or hardware.platform == "cpu":
        return hardware
    before = plan.checkpoint.meta["hardware"] if plan.checkpoint is not None else {}
    effective = EFFECTIVE_BATCH
    accumulation = cfg.train.accumulation_steps
    if before and "train.accumulation_steps" not in plan.typed:
        ranks = before.get("processes", 1)
        effective, accumulation = before["batch_size"] * before["accumulation_steps"] * ranks, None
        here = (hardware.platform, hardware.card, 1)
        if (before["platform"], before["card"], ranks) == here and "train.batch_size" not in plan.typed:
            reasons = hardware.reasons | {"batch_size": "auto: as it was found on this card"}
            found = {key: before[key] for key in ("batch_size", "accumulation_steps")}
            return replace(hardware, **found, reasons=reasons)
    limit = max(1, min(effective // (accumulation or 1), slices))
    found = largest_that_fits(lambda n: fits_card(model, cfg, hardware, n), limit)
    torch.cuda.reset_peak_memory_stats()  # the run's own peak is told, not a trial's
    if not found:
        one = replace(hardware, batch_size=1)
        options = remedies(cfg, one, parameters=parameter_count(model.student))
        raise DinoctError(f"train.batch_size=auto: not one slice fits the memory of the card. Try {options}")
    reason = f"auto: {found} slices fit, tried up to {limit}, {KEEP_FREE:.0%} of the free memory kept"
    reasons = hardware.reasons | {"batch_size": reason}
    if accumulation is not None:
        return replace(hardware, batch_size=found, accumulation_steps=accumulation, reasons=reasons)
    batch, accumulation = split_update(effective, found)
    reasons["accumulation_steps"] = f"auto: effective batch {batch * accumulation}, {effective} is meant"
    return replace(hardware, batch_size=batch, accumulation_steps=accumulation, reasons=reasons)


def largest_that_fits(fits: Callable[[int], bool], limit: int, *, step: int = STEP) -> int:
    """The largest multiple of `step` up to `limit` that fits, by doubling, then bisecting.

    Args:
        fits: says whether a batch fits; what fits, fits when smaller.
        limit: largest batch of interest, at least 1.
        step: below it, `limit` and powers of two are tried.
    Returns:
        0 where nothing fits.
    """
    if limit < step or not fits(step):
        small = {limit, *(2**i for i in range(step.bit_length()))}
        return next((n for n in sorted(small, reverse=True) if n <= limit and n < step and fits(n)), 0)
    good, top = step, limit // step * step
    bad = top + step
    while good < top:
        n = min(2 * good, top)
        if not fits(n):
            bad = n
            break
        good = n
    while bad - good > step:
        n = (good + bad) // 2 // step * step
        good, bad = (n, bad) if fits(n) else (good, n)
    return good


def split_update(effective: int, found: int, *, step: int = STEP) -> tuple[int, int]:
    """Batch size, at most `found`, and accumulation: the fewest micro-batches that make about the effective batch."""

    def cost(batch: int) -> tuple[bool, int, int]:
        accumulation = max(1, round(effective / batch))
        miss = abs(accumulation * batch - effective)
        return miss > TOLERANCE * effective, accumulation, miss

    batch = min(range(step, found + 1, step), key=cost, default=found)
    return batch, max(1, round(effective / batch))


def fits_card(model: SelfDistillation, cfg: TrainConfig, hardware: Hardware, n: int) -> bool:
    """Whether forward and backward of `n` slices leave `KEEP_FREE` of the card, Adam's two moments counted in."""
    torch.cuda.empty_cache()
    free = card_memory().free
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        dtype = torch.uint8 if cfg.optim.moments == EIGHT_BIT else None
        moments = [torch.empty_like(p, dtype=dtype) for p in model.student.parameters() for _ in range(2)]
        trial(model, cfg, hardware, n)
        del moments
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return torch.cuda.max_memory_reserved() - held <= (1 - KEEP_FREE) * free


def trial(model: SelfDistillation, cfg: TrainConfig, hardware: Hardware, n: int) -> None:
    """Forward and backward of `n` synthetic slices.

    Whatever happens, nothing of it stays: no gradient, no sum for a centre, no draw of a random generator.
    """
    generators = rng_state()
    model.train()
    model.teacher.eval()
    try:
        batch = synthetic_batch(cfg, n).to(hardware.device)
        for parameter in model.student.parameters():  # as there are from the second micro-batch of an update on
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with hardware.autocast():
            terms = model(batch, teacher_temperature=cfg.loss.dino.teacher_temperature)
        terms.total.backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.discard_update()
        restore_rng(generators)


def synthetic_batch(cfg: TrainConfig, n: int) -> CropBatch:
    """A micro-batch of `n` slices of noise, in the shapes of the real ones, with as many masked patches as may be."""
    views = ViewMaker(cfg.aug, cfg.model, cfg.loss.ibot, gram_px=cfg.loss.gram.teacher_px)
    rng = np.random.default_rng(0)
    item = views(rng.integers(-1000, 1000, (512, 512), dtype=np.int16), rng)
    if cfg.loss.ibot.weight:
        item["masks"][:, : round(cfg.loss.ibot.mask_ratio[1] * item["masks"].shape[1])] = True
    return collate([item | {"group": i, "position": i} for i in range(n)])
