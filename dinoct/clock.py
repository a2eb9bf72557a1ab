"""Rates of a run: per record of the log, and for the line on the console."""

import time

from dinoct.config import TrainConfig
from dinoct.flops import flops_at, peak_flops
from dinoct.hardware import Hardware

LINE_EVERY_S = 10.0


class Clock:
    """Counts steps and samples against the wall clock, from `start` on."""

    def __init__(self, cfg: TrainConfig, hardware: Hardware, *, horizon: int):
        self._cfg, self._horizon = cfg, horizon
        peak = peak_flops(hardware.card, amp=hardware.amp)
        self._peak = None if peak is None else peak * hardware.processes

    def start(self, step: int, samples: int) -> None:
        now = time.perf_counter()
        self.began = now
        self._line = (now, step, samples)
        self._record = (now, step, samples)
        self._waited = 0.0

    def rates(self, step: int, samples: int, waited: float) -> dict[str, float]:
        """Scalars since the last record; `waited` is all the time spent waiting for data so far, in seconds.

        ``Train/utilisation`` is the share of the card's peak that the model's own FLOPs make, for known cards.
        """
        now, (then, last_step, last_samples) = time.perf_counter(), self._record
        span = max(now - then, 1e-9)
        flops = self._flops_per_s(step, samples - last_samples, span)
        out = {
            "Train/samples_seen": float(samples),
            "Train/steps_per_s": (step - last_step) / span,
            "Train/samples_per_s": (samples - last_samples) / span,
            "Train/model_tflops_per_s": flops / 1e12,
            "Train/data_wait_share": min((waited - self._waited) / span, 1.0),
        }
        if self._peak is not None:
            out["Train/utilisation"] = flops / self._peak
        self._record, self._waited = (now, step, samples), waited
        return out

    def line_due(self) -> bool:
        return time.perf_counter() - self._line[0] >= LINE_EVERY_S

    def line(self, step: int, samples: int, loss: float) -> str:
        """The console's line; rates since the last line."""
        now, (then, last_step, last_samples) = time.perf_counter(), self._line
        span = max(now - then, 1e-9)
        self._line = (now, step, samples)
        flops = self._flops_per_s(step, samples - last_samples, span)
        speed = f"TFLOP/s={flops / 1e12:.2g}" if self._peak is None else f"mfu={flops / self._peak:.0%}"
        return (
            f"step={step:6d} loss={loss:.4f} steps/s={(step - last_step) / span:.2f} "
            f"samples/s={(samples - last_samples) / span:.1f} {speed} elapsed={now - self.began:.1f}s"
        )

    def _flops_per_s(self, step: int, samples: int, span: float) -> float:
        return samples * flops_at(self._cfg, step, horizon=self._horizon) / span
