"""How fast steps go: a few are taken for real and timed, and what a long run makes of them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dinoct.data.batch import CropBatch
from dinoct.engine import Engine, NonFiniteError

WARM, TIMED = 3, 5  # steps
BUDGET_S = 60.0  # for all of them
PROBE_S = 20.0  # for a larger probe, where two whole steps go beyond the budget
LEAST_PROBE = 3  # slices in it
LOADER_S = 10.0


@dataclass(frozen=True)
class Pace:
    """Seconds per slice: `elapsed` is all of them, `waited` those spent waiting for data; and how it was measured."""

    elapsed: float
    waited: float
    how: str

    @property
    def compute(self) -> float:
        return self.elapsed - self.waited


def measure(engine: Engine) -> Pace:
    """The pace of whole steps; where two of them go beyond `BUDGET_S`, what smaller updates say about it."""
    hardware = engine.hardware
    slices = hardware.batch_size * hardware.accumulation_steps
    on_card = hardware.platform != "cpu"
    size = hardware.batch_size if on_card else 1  # a card's speed shows at a full batch alone
    start = time.perf_counter()
    pace = take_steps(engine, batch_size=size, accumulation=1, warm=1, timed=1)
    left = BUDGET_S - (time.perf_counter() - start)
    fit = int(BUDGET_S / (pace.elapsed * slices))
    larger = min(hardware.batch_size, max(LEAST_PROBE, int(PROBE_S / pace.elapsed)))
    if fit < 2 and larger > size and larger * pace.elapsed < left:
        second = take_steps(engine, batch_size=larger, accumulation=1, warm=0, timed=1)
        pace = extrapolate(pace, size, second, larger, slices)
        fit = int(BUDGET_S / (pace.elapsed * slices))
    if fit < 2:
        return replace(pace, how=f"about, scaled up from {pace.how}: two whole ones go beyond {BUDGET_S:.0f} s")
    warm = min(WARM, fit // 2)
    return take_steps(
        engine,
        batch_size=hardware.batch_size,
        accumulation=hardware.accumulation_steps,
        warm=warm,
        timed=min(TIMED, fit - warm),
    )


def extrapolate(small: Pace, n: int, large: Pace, m: int, slices: int) -> Pace:
    """Pace of an update with many slices, from those with `n` and `m` > `n`.

    An update costs something for itself and something per slice. Where the smaller update was the slower one (another
    process had the cores), the larger one's pace is taken as it is.
    """
    per_slice = (large.compute * m - small.compute * n) / (m - n)
    own = large.compute * m - per_slice * m
    how = f"updates with {n} and {m} slices"
    if per_slice <= 0 or own < 0:
        return replace(large, how=how)
    return Pace(per_slice + own / slices + large.waited, large.waited, how)


def take_steps(engine: Engine, *, batch_size: int, accumulation: int, warm: int, timed: int) -> Pace:
    """Take real optimiser updates of another size, `warm` of them untimed; stop after `BUDGET_S`.

    Raises:
        NonFiniteError: as training would.
    """
    own = engine.hardware
    engine.hardware = replace(own, batch_size=batch_size, accumulation_steps=accumulation)
    batches = _Watch(engine.stream())
    for _ in range(warm):
        engine.update(batches)
    _wait_for_card(engine)
    start, before, done = time.perf_counter(), batches.waited, 0
    while done < timed and (not done or time.perf_counter() - start < BUDGET_S):
        engine.update(batches)
        done += 1
    _wait_for_card(engine)
    slices = done * batch_size * accumulation
    elapsed, engine.hardware = time.perf_counter() - start, own
    many = f"{done} steps" if done > 1 else "one step"
    how = f"{many} with {batch_size * accumulation} slice{'s' if batch_size * accumulation > 1 else ''}"
    return Pace(elapsed / slices, (batches.waited - before) / slices, f"{how}, behind {warm} to warm up")


def _wait_for_card(engine: Engine) -> None:
    if engine.hardware.device.type == "cuda":
        torch.cuda.synchronize()
    if (note := engine.guard.settle()) is not None:
        raise NonFiniteError(f"step {note.step + 1}: the loss or the gradient is not finite")


class _Watch(Iterator[CropBatch]):
    """Batches, with the time spent waiting for them."""

    def __init__(self, batches: Iterator[CropBatch]):
        self.batches, self.waited = batches, 0.0

    def __next__(self) -> CropBatch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        return batch


def loader_rate(engine: Engine) -> float | None:
    """Slices per second that the loader's workers make when nobody holds them up; ``None`` without workers.

    In a few steps the model lives on what the workers made while it warmed up: its waiting tells nothing of a long run.
    """
    workers, batches = engine.hardware.num_workers, engine.stream()
    if not workers:
        return None
    for _ in range(workers):  # they all begin at once: the first batch of each comes late, and together
        next(batches)
    start, done = time.perf_counter(), 0
    while done < 2 * workers and (not done or time.perf_counter() - start < LOADER_S):
        next(batches)
        done += 1
    return done * engine.hardware.batch_size / (time.perf_counter() - start)


def predict(*, compute: float, data: float, ahead: bool) -> tuple[float, float]:
    """Seconds of a step in a long run, and the share of them spent waiting for data.

    Args:
        compute: seconds that the model needs for a step.
        data: seconds that its slices need to be made.
        ahead: workers make them meanwhile, so that the slower of the two counts.
    """
    step = max(compute, data) if ahead else compute + data
    return step, (step - compute) / step


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for limit, unit, name in ((1, 1e-3, "ms"), (90, 1, "s"), (90 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if seconds / unit >= 100 else 1}f} {name}"
    return f"{seconds / 3600:,.0f} h ({seconds / 86400:,.1f} days)"
