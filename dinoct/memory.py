"""Memory of a training step by formula: what the out-of-memory message advises from."""

from dataclasses import dataclass, replace

from dinoct.config import TrainConfig
from dinoct.hardware import Hardware
from dinoct.validate import local_crop_size

STATE_BYTES = 20  # per weight: student, teacher, gradient and two Adam moments, float32
ACTIVATION_BYTES = 34  # per token, channel and block, at two bytes a number and with fused attention


@dataclass(frozen=True)
class Memory:
    """Estimates in bytes. Source of the activation formula: Korthikanti et al. 2022 (arXiv:2205.05198), 34 s b h."""

    state: float
    activations: float

    @property
    def total(self) -> float:
        return self.state + self.activations


def estimate(cfg: TrainConfig, hardware: Hardware, *, parameters: int) -> Memory:
    """Memory of one micro-batch, without the allocator's own overhead.

    Args:
        cfg: the run's settings.
        hardware: device settings; float32 activations count double.
        parameters: weights of student backbone and heads.
    """
    m, aug = cfg.model, cfg.aug
    local = aug.local_size or local_crop_size(m.patch)
    extra = 1 + m.registers
    tokens = aug.global_crops * ((m.img_size // m.patch) ** 2 + extra)
    tokens += aug.local_crops * ((local // m.patch) ** 2 + extra)
    per_block = tokens * hardware.batch_size * m.dim * ACTIVATION_BYTES * (1 if hardware.amp else 2)
    if cfg.train.grad_checkpoint:  # one block at full, the input of each
        activations = per_block + m.depth * per_block * 2 / ACTIVATION_BYTES
    else:
        activations = m.depth * per_block
    copies = STATE_BYTES + (4 if cfg.loss.gram.teacher != "ema" else 0)
    return Memory(copies * parameters, activations)


def advice(cfg: TrainConfig, hardware: Hardware, *, parameters: int) -> str:
    """What to say when memory is out: what a step needs, and the settings to change."""
    now = estimate(cfg, hardware, parameters=parameters)
    options = remedies(cfg, hardware, parameters=parameters)
    return f"out of memory; a step needs about {_gb(now.total)} GB by estimate. Try {options}"


def remedies(cfg: TrainConfig, hardware: Hardware, *, parameters: int) -> str:
    """Up to three settings that need less memory, each with what it would give."""
    now = estimate(cfg, hardware, parameters=parameters)
    options = []
    if hardware.batch_size > 1:
        half = hardware.batch_size // 2
        smaller = estimate(cfg, replace(hardware, batch_size=half), parameters=parameters)
        options.append(
            f"train.batch_size={half} train.accumulation_steps={hardware.accumulation_steps * 2} "
            f"(the same effective batch, about {_gb(now.total - smaller.total)} GB less)"
        )
    if not cfg.train.grad_checkpoint:
        checkpointed = replace(cfg, train=replace(cfg.train, grad_checkpoint=True))
        saved = now.total - estimate(checkpointed, hardware, parameters=parameters).total
        options.append(f"train.grad_checkpoint=true (about {_gb(saved)} GB less, slower)")
    if not hardware.amp:
        saved = now.activations / 2
        options.append(f"train.amp=true (about {_gb(saved)} GB less)")
    size = max(cfg.model.patch, cfg.model.img_size * 3 // 4 // cfg.model.patch * cfg.model.patch)
    tiny = replace(cfg, model=replace(cfg.model, img_size=size))
    saved = now.total - estimate(tiny, hardware, parameters=parameters).total
    options.append(f"model.img_size={size} (a new run; about {_gb(saved)} GB less)")
    return "; or ".join(options[:3])


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}"
