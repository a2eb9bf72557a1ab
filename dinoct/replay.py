"""Looking again at a step that was not finite: ``dinoct-train replay=emergency_00000123.pth``."""

from typing import Any

import torch
from torch import Tensor, nn

from dinoct.console import log
from dinoct.data.batch import CropBatch
from dinoct.engine import Engine


def replay(engine: Engine, positions: list[int]) -> bool:
    """Run the forward and backward passes of the engine's next step and say where they stop being finite.

    The optimiser does not move and nothing is written.

    Args:
        engine: with the emergency checkpoint loaded.
        positions: samples of the step, from the checkpoint.
    Returns:
        Whether everything was finite this time.
    """
    step = engine.step + 1
    log.info("replaying step %d: %d samples", step, len(positions))
    batches = engine.stream()
    finite = True
    for number in range(engine.hardware.accumulation_steps):
        batch = next(batches).to(engine.hardware.device)
        log.info("micro-batch %d: slices %s", number + 1, ", ".join(_slices(engine, batch)))
        finite &= _look("input", batch.global_crops)
        with engine.hardware.autocast():
            terms = engine.model(batch, teacher_temperature=engine.schedules.teacher_temperature(engine.step))
        for name, value in terms.scalars.items():
            if name.startswith("loss/"):
                log.info("  %s = %g", name, float(value))
                finite &= bool(torch.isfinite(value))
        (terms.total / engine.hardware.accumulation_steps).backward()
    bad = _bad_gradients(engine.model.student)
    norm = nn.utils.get_total_norm([p.grad for p in engine.model.student.parameters() if p.grad is not None])
    log.info("gradient norm %g", float(norm))
    if bad:
        log.warning("gradients that are not finite: %s", ", ".join(bad[:10]) + (" ..." if len(bad) > 10 else ""))
    finite &= not bad
    if finite:
        log.info("step %d is finite here: if it was not, what broke it was not in the data, weights or seeds", step)
    else:
        log.warning("step %d is not finite here either", step)
    return finite


def _slices(engine: Engine, batch: CropBatch) -> list[str]:
    data: Any = engine.train_data
    return [str(data.index.slice_id[data.slice_at(position)[1]]) for position in batch.positions]


def _look(name: str, tensor: Tensor) -> bool:
    ok = bool(torch.isfinite(tensor).all())
    log.info("  %s: %s, min %g, max %g", name, "finite" if ok else "NOT FINITE", tensor.min(), tensor.max())
    return ok


def _bad_gradients(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
