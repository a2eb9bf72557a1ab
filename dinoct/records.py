"""What a run records of its steps: scalars for the tracker, a line for the console, signs that it goes wrong."""

import math
from typing import Any

import torch
from torch import Tensor

from dinoct.anomaly import Anomaly, AnomalyDetector
from dinoct.clock import Clock
from dinoct.config import TrainConfig
from dinoct.console import log
from dinoct.hardware import Hardware
from dinoct.tracking import Tracker

GRACE_STEPS = 50  # behind the warm-up, before an encoder that was never healthy counts as collapsed

Scalars = dict[str, Tensor | float]  # tensors are 0-d and stay on the device until a record is due


class Records:
    """Takes every step, and passes on every ``tracker.every``-th: the device is asked once for all steps in between."""

    def __init__(self, cfg: TrainConfig, hardware: Hardware, *, horizon: int, tracker: Tracker):
        self.cfg, self.hardware, self.tracker = cfg, hardware, tracker
        self.anomalies = AnomalyDetector(
            out_dim=cfg.loss.out_dim,
            slices=hardware.batch_size,
            crops=cfg.aug.global_crops,
            grace=round(cfg.optim.warmup * horizon) + GRACE_STEPS,
        )
        self.waited = 0.0  # seconds for data, so far
        self._clock = Clock(cfg, hardware, horizon=horizon)
        self._pending: list[tuple[int, Scalars]] = []

    def start(self, step: int, samples: int) -> None:
        """From here on the clock counts."""
        self._clock.start(step, samples)

    def due(self, step: int, every: int = 1) -> bool:
        """Whether a record is due at a step; with `every`, each so many of them."""
        return step == 1 or step % (self.cfg.tracker.every * every) == 0

    def add(self, step: int, samples: int, scalars: Scalars, *, last: bool) -> None:
        """Note a step; now and then, and at the `last` one, a line says so on the console."""
        self._pending.append((step, scalars))
        if self._clock.line_due() or last:
            log.info(self._clock.line(step, samples, float(scalars["loss/total"])))

    @property
    def waiting(self) -> bool:
        """Whether steps were noted that no record was made of."""
        return bool(self._pending)

    def write(self, samples: int) -> list[Anomaly]:
        """Make the record of the last step noted; returns the signs of collapse that are new."""
        losses = torch.stack([scalars["loss/total"] for _, scalars in self._pending]).tolist()
        for (step, _), loss in zip(self._pending, losses, strict=True):
            if spike := self.anomalies.check_loss(step, loss):
                log.warning(spike.message)
        step, last = self._pending[-1]
        self._pending.clear()
        tensors = {name: value for name, value in last.items() if isinstance(value, Tensor)}
        fetched = torch.stack([value.float() for value in tensors.values()]).tolist()  # one transfer for all
        record = last | dict(zip(tensors, fetched, strict=True))
        record |= self._clock.rates(step, samples, self.waited)
        record["Train/ln_K"] = math.log(self.cfg.loss.out_dim)
        if self.hardware.device.type == "cuda":
            record["Train/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.tracker.log(step, record)
        signs = self.anomalies.check_record(step, record)
        for sign in signs:
            log.critical(sign.message)
        return signs

    def state(self) -> dict[str, Any]:
        """What the detector has seen, for the checkpoint."""
        return self.anomalies.state()
